import heapq
from collections import Counter, deque
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from avatar_core.execution.graph import StageInfo
from avatar_core.execution.schedule import Schedule

NO_EDGES = np.empty((0, 2), np.int64)


class Run(NamedTuple):
    queue: str
    stage: str
    items: tuple[int, ...]
    start: float
    end: float


class Simulation:
    """Queues that run their shards one after the other, on a pretend clock.

    An item takes `seconds[item]` on a queue of speed 1, a model that is not among the last `kept` of the
    queue takes `load_seconds`. `at` names what else happens, and when.
    """

    def __init__(self, schedule, seconds, models, *, load_seconds=0.0, kept=2):
        self.schedule, self.seconds, self.models = schedule, seconds, models
        self.load_seconds, self.kept = load_seconds, kept
        self.speeds, self.held, self.lined_up, self.busy = {}, {}, {}, {}
        self.clock, self.runs, self.loads, self.events = 0.0, [], Counter(), []

    def add(self, name, kind, speed=1.0):
        self.schedule.add_queue(name, kind)
        self.speeds[name], self.held[name], self.lined_up[name], self.busy[name] = speed, [], deque(), None

    def at(self, clock, action):
        heapq.heappush(self.events, (clock, len(self.events) + len(self.runs) + 1e6, action, None))

    def run(self):
        self.ask()
        while self.events:
            self.clock, _, action, shard = heapq.heappop(self.events)
            if action is not None:
                action()
            elif self.busy.get(shard.queue) is shard:
                self.busy[shard.queue] = None
                self.schedule.ended(shard.id)
            else:
                continue
            self.ask()
        assert self.schedule.finished
        return self

    def ask(self):
        for name, line in self.lined_up.items():
            while (shard := self.schedule.next(name)) is not None:
                line.append(shard)
            if self.busy[name] is None and line:
                self.start(line.popleft())

    def start(self, shard):
        model, held = self.models[shard.stage], self.held[shard.queue]
        seconds = sum(self.seconds[item] for item in shard.items) / self.speeds[shard.queue]
        if model and model not in held:
            seconds += self.load_seconds
            self.loads[shard.queue, model] += 1
        self.held[shard.queue] = [*(name for name in held if name != model), model][-self.kept :]
        self.busy[shard.queue] = shard
        end = self.clock + seconds
        self.runs.append(Run(shard.queue, shard.stage, shard.items, self.clock, end))
        heapq.heappush(self.events, (end, shard.id, None, shard))

    def of(self, stage):
        return [run for run in self.runs if run.stage == stage]

    def end_of(self, item):
        return max(run.end for run in self.runs if item in run.items)


def simulate(stages, stage_of, seconds, edges=NO_EDGES, *, load_seconds=0.0, **options):
    """The work of an item is what it takes, so that forecasts are right."""
    seconds = np.asarray(seconds, float)
    schedule = Schedule(stages, np.asarray(stage_of), seconds, np.asarray(edges), **options)
    models = {stage.name: stage.model for stage in stages}
    kept = options.get("models_kept", 2)
    return Simulation(schedule, seconds.tolist(), models, load_seconds=load_seconds, kept=kept)


def one_stage(count, *, max_items=256, seconds=1.0, **options):
    stages = [StageInfo("denoise", "gpu", "transformer", 1.0, max_items)]
    return simulate(stages, np.zeros(count, int), np.full(count, seconds), **options)


CLIP_STAGES = (
    StageInfo("face", "cpu", "detector", 1.0),
    StageInfo("audio", "cpu", "wav2vec", 1.0),
    StageInfo("text", "gpu", "encoder", 1.0),
    StageInfo("reference", "gpu", "clip", 1.0),
    StageInfo("denoise", "gpu", "transformer", 1.0, 1),
    StageInfo("decode", "gpu", "vae", 1.0, 1),
)
CLIP_SECONDS = (0.05, 0.5, 0.1, 0.1, 30.0, 5.0)


def clip_batch(clips, seconds=CLIP_SECONDS, **options):
    """Every clip with a picture, a recording and a prompt of its own; item = stage * clips + clip."""
    clip = np.arange(clips)
    pairs = [(0, 3), (1, 4), (2, 4), (3, 4), (3, 5), (4, 5)]
    edges = np.concatenate([np.stack([a * clips + clip, b * clips + clip], 1) for a, b in pairs])
    return simulate(CLIP_STAGES, np.repeat(np.arange(6), clips), np.repeat(seconds, clips), edges, **options)


@pytest.mark.parametrize(("max_items", "low", "high"), [(1, 5.0, 20.0), (256, 0.1, 0.5)])
def test_a_gpu_of_double_speed_gets_double_work(max_items, low, high):
    seconds = np.random.default_rng(0).uniform(low, high, 60 if max_items == 1 else 3000)
    simulation = simulate(
        [StageInfo("denoise", "gpu", "", 1.0, max_items)], np.zeros(len(seconds), int), seconds
    )
    simulation.add("slow", "gpu", 1.0)
    simulation.add("fast", "gpu", 2.0)
    simulation.run()
    assert simulation.clock <= 1.1 * seconds.sum() / 3


def test_a_slow_gpu_does_not_hoard_the_last_clips():
    simulation = one_stage(4, max_items=1, seconds=30.0)
    simulation.add("slow", "gpu", 1.0)
    simulation.add("fast", "gpu", 2.25)
    assert simulation.run().clock == pytest.approx(40)


def test_a_wrong_speed_costs_little():
    """The schedule believes both equal; shards are given late enough for that not to matter."""
    simulation = one_stage(90, max_items=1, seconds=10.0)
    simulation.add("slow", "gpu")
    simulation.add("fast", "gpu")
    simulation.speeds["fast"] = 2.0
    simulation.run()
    assert simulation.clock <= 1.1 * 300


def test_the_first_clip_is_early_and_clips_are_finished_one_by_one():
    simulation = clip_batch(100)
    for queue in ("cpu-0", "cpu-1"):
        simulation.add(queue, "cpu")
    simulation.add("gpu", "gpu")
    simulation.run()
    decoded = [run.end for run in simulation.of("decode")]
    assert decoded[0] < 3 * sum(CLIP_SECONDS)
    assert max(late - early for early, late in pairwise(decoded)) < 2 * 35


def test_parallel_inputs_are_made_for_the_same_clips():
    """Recordings all of another length: their own pictures come first, not those first in the table."""
    clips = 400
    clip = np.arange(clips)
    seconds = np.concatenate(
        [np.full(clips, 1.0), np.random.default_rng(1).uniform(1, 9, clips), np.ones(clips)]
    )
    edges = np.concatenate([np.stack([clip + k * clips, clip + 2 * clips], 1) for k in (0, 1)])
    stages = [StageInfo(name, "cpu", "", 1.0) for name in ("face", "audio", "decode")]
    simulation = simulate(stages, np.repeat(np.arange(3), clips), seconds, edges)
    simulation.add("cpu", "cpu")
    simulation.run()
    assert simulation.of("decode")[0].end < 30
    halfway = [run for run in simulation.runs if run.end < simulation.clock / 2]
    done = Counter(stage for run in halfway for stage in [run.stage] * len(run.items))
    assert done["decode"] > 0.7 * done["audio"]


def test_one_gpu_with_short_items_is_kept_busy():
    clips = 1500
    clip = np.arange(clips)
    edges = np.concatenate([np.stack([clip + k * clips, clip + (k + 1) * clips], 1) for k in (0, 1)])
    stages = [
        StageInfo("face", "cpu", "", 1.0),
        StageInfo("denoise", "gpu", "lstm", 1.0, 8),
        StageInfo("decode", "cpu", "", 1.0),
    ]
    seconds = np.repeat([0.02, 0.04, 0.03], clips)
    simulation = simulate(stages, np.repeat(np.arange(3), clips), seconds, edges)
    for queue in ("cpu-0", "cpu-1"):
        simulation.add(queue, "cpu")
    simulation.add("gpu", "gpu")
    simulation.run()
    runs = simulation.of("denoise")
    assert clips * 0.04 >= 0.95 * (runs[-1].end - runs[0].start)
    assert len(runs) <= 1.1 * clips / 8


def test_text_and_reference_are_drained_before_denoise_and_each_model_is_loaded_once():
    simulation = clip_batch(60, seconds=(0.001, 0.001, 0.1, 0.1, 30.0, 5.0), load_seconds=20.0)
    simulation.add("cpu", "cpu")
    simulation.add("gpu", "gpu")
    simulation.run()
    first_denoise = simulation.of("denoise")[0].start
    assert max(run.end for run in (*simulation.of("text"), *simulation.of("reference"))) <= first_denoise
    assert set(simulation.loads.values()) == {1}


def test_draining_ends_in_time_for_a_first_clip():
    simulation = clip_batch(2000, seconds=(1e-4, 1e-4, 0.1, 1e-4, 2.0, 1.0))
    for name, kind in (("cpu", "cpu"), ("gpu", "gpu")):
        simulation.add(name, kind)
    simulation.run()
    assert 120 < simulation.of("decode")[0].end < 150


@pytest.mark.parametrize("models_kept", [1, 2])
def test_decode_follows_its_denoise(models_kept):
    simulation = clip_batch(20, models_kept=models_kept)
    for name, kind in (("cpu", "cpu"), ("gpu", "gpu")):
        simulation.add(name, kind)
    simulation.run()
    for clip in range(20):
        assert simulation.end_of(100 + clip) - simulation.end_of(80 + clip) <= 2 * 35


def test_a_gpu_that_keeps_one_model_loads_another_for_a_full_shard_only():
    stages = [StageInfo("denoise", "gpu", "transformer", 1.0, 1), StageInfo("decode", "gpu", "vae", 1.0)]
    seconds = np.repeat([3.0, 1.0], 100)
    edges = np.stack([np.arange(100), np.arange(100, 200)], 1)
    simulation = simulate(stages, np.repeat([0, 1], 100), seconds, edges, models_kept=1)
    simulation.add("gpu", "gpu")
    simulation.run()
    assert simulation.loads["gpu", "vae"] <= 100 / 10 + 4


def test_a_new_gpu_begins_with_what_is_cheap():
    stages = [StageInfo("text", "gpu", "encoder", 0.1), StageInfo("denoise", "gpu", "transformer", 5.0)]
    schedule = Schedule(stages, np.array([0, 0, 0, 1, 1]), np.ones(5), np.array([[0, 3]]))
    schedule.add_queue("gpu", "gpu")
    assert [schedule.next("gpu").stage for _ in range(2)] == ["text", "text"]


def test_a_cheap_stage_is_drained_once_it_is_loaded():
    stages = [StageInfo("text", "gpu", "encoder", 0.1, 4), StageInfo("denoise", "gpu", "transformer", 5.0, 1)]
    edges = np.stack([np.arange(40), np.arange(40, 80)], 1)
    schedule = Schedule(stages, np.repeat([0, 1], 40), np.ones(80), edges, models_kept=1)
    schedule.add_queue("gpu", "gpu")
    order = []
    while (shard := schedule.next("gpu")) is not None:
        order.extend(shard.items)
        schedule.ended(shard.id)
    assert max(order[:40]) < 40


def test_a_late_gpu_shares_what_is_left():
    simulation = one_stage(100, max_items=1)
    simulation.add("early", "gpu")
    simulation.at(49.5, lambda: simulation.add("late", "gpu"))
    assert simulation.run().clock == pytest.approx(75, abs=2)


def test_a_paused_queue_ends_what_it_has_and_goes_on_when_resumed():
    simulation = one_stage(30, max_items=1)
    simulation.add("gpu", "gpu")
    simulation.at(3.5, lambda: simulation.schedule.pause("gpu"))
    simulation.at(20.0, lambda: simulation.schedule.resume("gpu"))
    simulation.run()
    starts = [run.start for run in simulation.runs]
    assert [start for start in starts if 3.5 < start < 20] == [4.0]
    assert simulation.clock == pytest.approx(45)


def test_first_shards_hold_1_2_4_items_and_the_longest_come_first():
    seconds = np.random.default_rng(2).permutation(np.linspace(0.1, 0.2, 200))
    simulation = simulate([StageInfo("face", "cpu", "", 1.0, 16)], np.zeros(200, int), seconds)
    simulation.add("cpu", "cpu")
    simulation.run()
    assert [len(run.items) for run in simulation.runs[:6]] == [1, 2, 4, 8, 16, 16]
    assert np.all(np.diff([seconds[item] for run in simulation.runs for item in run.items]) <= 0)


def test_shards_hold_shard_seconds_and_shrink_towards_the_end():
    simulation = one_stage(1000, seconds=0.1, shard_seconds=5.0)
    simulation.add("gpu-0", "gpu")
    simulation.add("gpu-1", "gpu")
    simulation.run()
    sizes = [len(run.items) for run in simulation.runs]
    assert max(sizes) == 50
    assert min(sizes[6:-1]) == 6
    assert simulation.clock < 51


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_longest_chain_of_windows_starts_first_and_runs_through(gpus):
    windows = [3, 3, 12, 3]
    clip_of = np.repeat(np.arange(4), windows)
    edges = [(i, i + 1) for i in range(20) if clip_of[i] == clip_of[i + 1]]
    simulation = simulate([StageInfo("denoise", "gpu", "", 1.0, 1)], np.zeros(21, int), np.ones(21), edges)
    for gpu in range(gpus):
        simulation.add(f"gpu-{gpu}", "gpu")
    simulation.run()
    longest = [run.start for run in simulation.runs if 6 <= run.items[0] < 18]
    assert longest == list(range(12))
    assert simulation.clock <= max(13, 21 / gpus)


def test_a_gpu_stage_waits_for_a_gpu_queue_unless_there_is_none():
    stages = [StageInfo("face", "cpu", "", 1.0), StageInfo("denoise", "gpu", "", 1.0)]
    schedule = Schedule(stages, np.array([0, 1]), np.ones(2), np.array([[0, 1]]))
    schedule.add_queue("cpu", "cpu")
    schedule.add_queue("gpu", "gpu")
    assert schedule.next("gpu") is None
    face = schedule.next("cpu")
    assert (face.stage, face.items, face.queue, face.seconds) == ("face", (0,), "cpu", 1.0)
    schedule.ended(face.id)
    schedule.pause("gpu")
    assert schedule.next("cpu") is None
    alone = Schedule(stages[1:], np.zeros(1, int), np.ones(1), NO_EDGES)
    alone.add_queue("cpu", "cpu")
    assert alone.next("cpu").stage == "denoise"


def three_stages():
    """Two faces; clips 2, 3 with the first face, 4 with the second; 5, 6, 7 their videos."""
    stages = [StageInfo(name, "cpu", "", 1.0) for name in ("face", "denoise", "decode")]
    edges = np.array([(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7)])
    schedule = Schedule(stages, np.array([0, 0, 1, 1, 1, 2, 2, 2]), np.ones(8), edges)
    schedule.add_queue("cpu", "cpu", capacity=1)
    return schedule


def finish(schedule, failing=()):
    order = []
    while (shard := schedule.next("cpu")) is not None:
        order.extend(shard.items)
        schedule.ended(shard.id, failed=set(failing) & set(shard.items))
    assert schedule.finished
    return order


def test_a_failure_blocks_its_descendants_only():
    schedule = three_stages()
    assert sorted(finish(schedule, failing=[0])) == [0, 1, 4, 7]
    counts = schedule.counts
    assert (counts["face"].done, counts["face"].failed) == (1, 1)
    assert (counts["denoise"].done, counts["denoise"].blocked) == (1, 2)
    assert (counts["decode"].done, counts["decode"].blocked) == (1, 2)
    assert schedule.forecast_seconds == 0


def test_an_item_is_blocked_by_any_of_its_inputs():
    stages = [StageInfo(name, "cpu", "", 1.0) for name in ("face", "denoise", "decode")]
    schedule = Schedule(stages, np.array([0, 0, 1, 2]), np.ones(4), np.array([(0, 2), (1, 2), (2, 3)]))
    schedule.add_queue("cpu", "cpu")
    assert sorted(finish(schedule, failing=[1])) == [0, 1]
    assert schedule.counts["decode"].blocked == 1


def test_what_others_do_is_awaited_without_a_queue():
    schedule = three_stages()
    shard = schedule.next("cpu")
    schedule.detach(shard.id, shard.items)
    schedule.ended(shard.id)
    other = schedule.next("cpu")
    assert other.stage == "face"
    assert not set(other.items) & set(shard.items)
    schedule.ended(other.id, again=other.items)
    assert schedule.counts["face"] == (0, 1, 1, 0, 0, 0)
    schedule.settle(done=shard.items)
    assert set(finish(schedule)) == set(range(8)) - set(shard.items)


def test_what_others_leave_or_fail_at_is_no_longer_awaited():
    schedule = three_stages()
    taken = []
    while (shard := schedule.next("cpu")) is not None:
        schedule.detach(shard.id, shard.items)
        schedule.ended(shard.id)
        taken += shard.items
    assert taken == [0, 1]
    schedule.settle(failed=[0])
    schedule.settle(again=[1])
    assert finish(schedule) == [1, 4, 7]
    assert schedule.counts["decode"].blocked == 2


def test_after_a_hang_one_item_is_lost_and_the_rest_is_put_back():
    stages = [StageInfo("face", "cpu", "", 1.0)]
    schedule = Schedule(stages, np.zeros(8, int), np.full(8, 0.1), NO_EDGES)
    schedule.add_queue("cpu", "cpu")
    for _ in range(2):
        schedule.ended(schedule.next("cpu").id)
    shard = schedule.next("cpu")
    assert len(shard.items) == 4
    schedule.ended(shard.id, failed=shard.items[1:2], again=shard.items[:1] + shard.items[2:])
    assert schedule.counts["face"] == (0, 4, 0, 3, 1, 0)
    assert shard.items[1] not in finish(schedule)


def test_the_forecast_follows_what_was_measured():
    schedule = three_stages()
    assert schedule.forecast_seconds == pytest.approx(8)
    schedule.measured("decode", seconds=10.0, work=2.0)
    assert schedule.forecast_seconds == pytest.approx(20)
    schedule.measured("decode", seconds=20.0, work=8.0)
    assert schedule.forecast_seconds == pytest.approx(14)
    schedule.add_queue("second", "cpu")
    assert schedule.forecast_seconds == pytest.approx(7)
    schedule.pause("second")
    assert schedule.forecast_seconds == pytest.approx(14)
    schedule.resume("second")
    shard = schedule.next("second")
    assert shard.seconds == pytest.approx(1)
    schedule.ended(shard.id)
    assert schedule.forecast_seconds == pytest.approx(13 / 2)


def test_what_makes_no_sense_is_refused():
    stages = [StageInfo("face", "cpu", "", 1.0), StageInfo("decode", "cpu", "", 1.0)]
    with pytest.raises(ValueError, match="face follows decode: give stages in depth order"):
        Schedule(stages, np.array([0, 1]), np.ones(2), np.array([[1, 0]]))
    with pytest.raises(ValueError, match="2 of 3 items can never start"):
        Schedule(stages, np.array([0, 1, 1]), np.ones(3), np.array([[1, 2], [2, 1]]))
    schedule = three_stages()
    with pytest.raises(ValueError, match="queue 'cpu' exists already"):
        schedule.add_queue("cpu", "gpu")
    shard = schedule.next("cpu")
    other = 1 - shard.items[0]
    with pytest.raises(ValueError, match=rf"shard 1 of face ended with failed=\[{other}\]"):
        schedule.ended(shard.id, failed=[other])
    with pytest.raises(ValueError, match="in one list only"):
        schedule.ended(shard.id, failed=shard.items, again=shard.items)
    assert schedule.counts["face"].running == 1
    with pytest.raises(ValueError, match=rf"items \[{other}\] are not detached"):
        schedule.settle(done=[other])


def test_nothing_to_do_is_finished():
    schedule = Schedule(CLIP_STAGES, np.empty(0, int), np.empty(0), NO_EDGES)
    schedule.add_queue("gpu", "gpu")
    assert schedule.finished
    assert schedule.next("gpu") is None
    assert schedule.forecast_seconds == 0


def test_a_large_batch_runs_through():
    simulation = clip_batch(10_000, seconds=(0.05, 0.5, 0.1, 0.1, 3.0, 0.5))
    for queue in range(4):
        simulation.add(f"cpu-{queue}", "cpu")
        simulation.add(f"gpu-{queue}", "gpu", 1.0 + queue % 2)
    simulation.run()
    assert {counts.done for counts in simulation.schedule.counts.values()} == {10_000}
    assert simulation.clock <= 1.05 * 10_000 * 3.7 / 6


# --- more becomes known


def test_what_opens_clips_and_what_finishes_them_take_turns_once_a_clip_is_there():
    stages = [
        StageInfo("ingest", "cpu", "", 1.0, 1, opens_clips=True),
        StageInfo("face", "cpu", "", 1.0, 1),
        StageInfo("decode", "cpu", "", 1.0, 1),
    ]
    edges = np.array([(3, 6), (4, 7), (5, 8)])
    schedule = Schedule(stages, np.repeat([0, 1, 2], 3), np.ones(9), edges)
    schedule.add_queue("cpu", "cpu", capacity=1)
    order = []
    while (shard := schedule.next("cpu")) is not None:
        order.append(shard.stage)
        schedule.ended(shard.id)
    assert order == ["face", "decode", "ingest", "face", "ingest", "decode", "ingest", "face", "decode"]


def test_what_runs_goes_on_when_more_becomes_known():
    schedule = three_stages()
    running = schedule.next("cpu")
    assert running.items == (0,)
    schedule.measured("face", seconds=6.0, work=2.0)
    stages = [StageInfo(name, "cpu", "", 1.0) for name in ("face", "denoise", "decode")]
    edges = np.array([(0, 2), (1, 3), (2, 4), (3, 5)])
    schedule.extend(stages, np.array([0, 0, 1, 1, 2, 2]), np.ones(6), edges, {0: 1}, failed=[0])
    assert schedule.counts["face"] == (0, 0, 1, 0, 1, 0)
    assert schedule.counts["decode"] == (1, 0, 0, 0, 0, 1)
    assert schedule.next("cpu") is None  # it has one
    schedule.ended(running.id)
    assert schedule.next("cpu").items == (3,)
    assert schedule.forecast_seconds == pytest.approx(2)


def test_an_item_that_nobody_wants_any_longer_ends_unheard():
    schedule = three_stages()
    running = schedule.next("cpu")
    stages = [StageInfo("face", "cpu", "", 1.0)]
    schedule.extend(stages, np.zeros(1, int), np.ones(1), NO_EDGES, {})
    assert schedule.counts["face"] == (0, 1, 0, 0, 0, 0)
    schedule.ended(running.id)
    assert finish(schedule) == [0]
