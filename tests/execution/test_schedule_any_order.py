from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from avatar_core.execution.graph import StageInfo
from avatar_core.execution.schedule import Schedule


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, beside a slow and obvious account of every item's state."""

    @initialize(data=st.data(), stage_count=st.integers(1, 5), count=st.integers(0, 25))
    def plan(self, data, stage_count, count):
        self.infos = [
            StageInfo(
                f"stage-{index}",
                data.draw(st.sampled_from(["cpu", "gpu"])),
                data.draw(st.sampled_from(["", "a", "b", "c"])),
                data.draw(st.sampled_from([0.1, 1.0, 20.0])),
                data.draw(st.sampled_from([1, 3, 256])),
                data.draw(st.booleans()),
            )
            for index in range(stage_count)
        ]
        stages = st.lists(st.integers(0, stage_count - 1), min_size=count, max_size=count)
        self.stage_of = sorted(data.draw(stages))
        pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
        drawn = data.draw(st.lists(pairs, max_size=40)) if count else []
        # Numbered along the edges here, so that the account can go through the items in order.
        edges = [(min(pair), max(pair)) for pair in drawn if pair[0] != pair[1]]
        self.inputs = [[a for a, b in edges if b == item] for item in range(count)]
        self.shuffled = data.draw(st.permutations(range(count)))
        self.number = {item: index for index, item in enumerate(self.shuffled)}
        self.per_queue = data.draw(st.integers(1, 3))
        self.schedule = Schedule(
            self.infos,
            np.array([self.stage_of[item] for item in self.shuffled], int),
            np.array([1.0 + item % 4 for item in self.shuffled]),
            np.array([(self.number[a], self.number[b]) for a, b in edges], int).reshape(-1, 2),
            models_kept=data.draw(st.integers(1, 3)),
            shard_seconds=data.draw(st.sampled_from([0.5, 10.0])),
        )
        self.known = ["open"] * count
        self.kinds, self.paused, self.shards, self.names = {}, set(), {}, 0
        self.detached = []
        self.add_queue("cpu")
        self.add_queue(data.draw(st.sampled_from(["cpu", "gpu"])))

    def states(self):
        states = []
        for item, known in enumerate(self.known):
            above = [states[producer] for producer in self.inputs[item]]
            if known != "open":
                states.append(known)
            elif "failed" in above or "blocked" in above:
                states.append("blocked")
            else:
                states.append("ready" if all(state == "done" for state in above) else "waiting")
        return states

    def runs(self, kind, item):
        return kind == (self.infos[self.stage_of[item]].queue if "gpu" in self.kinds.values() else "cpu")

    @rule(kind=st.sampled_from(["cpu", "gpu"]))
    def add_queue(self, kind):
        self.names += 1
        self.kinds[f"queue-{self.names}"] = kind
        self.schedule.add_queue(f"queue-{self.names}", kind, self.per_queue)

    @rule(data=st.data(), more=st.integers(0, 6))
    def more_items_become_known(self, data, more):
        """What is done by then is no longer among them."""
        kept = [item for item, known in enumerate(self.known) if known != "done"]
        place = {item: index for index, item in enumerate(kept)}
        self.stage_of = [self.stage_of[item] for item in kept]
        self.inputs = [[place[above] for above in self.inputs[item] if above in place] for item in kept]
        self.known = [self.known[item] for item in kept]
        for _ in range(more):
            stage = data.draw(st.integers(0, len(self.infos) - 1))
            above = [item for item, of in enumerate(self.stage_of) if of <= stage]
            self.inputs.append(data.draw(st.lists(st.sampled_from(above), max_size=3)) if above else [])
            self.stage_of.append(stage)
            self.known.append("open")
        before = {number: place[item] for number, item in enumerate(self.shuffled) if item in place}
        self.shuffled = data.draw(st.permutations(range(len(self.known))))
        self.number = {item: index for index, item in enumerate(self.shuffled)}
        running = {
            number: self.number[item] for number, item in before.items() if self.known[item] == "running"
        }
        edges = [(self.number[a], self.number[b]) for b, above in enumerate(self.inputs) for a in above]
        self.schedule.extend(
            self.infos,
            np.array([self.stage_of[item] for item in self.shuffled], int),
            np.array([1.0 + item % 4 for item in self.shuffled]),
            np.array(edges, int).reshape(-1, 2),
            running,
            [self.number[item] for item, known in enumerate(self.known) if known == "failed"],
        )
        self.detached = [running[number] for number in self.detached]
        self.shards = {
            shard_id: replace(shard, items=tuple(running[number] for number in shard.items))
            for shard_id, shard in self.shards.items()
        }

    @precondition(lambda self: self.kinds)
    @rule(data=st.data())
    def pause_or_resume(self, data):
        name = data.draw(st.sampled_from(sorted(self.kinds)))
        (self.schedule.resume if name in self.paused else self.schedule.pause)(name)
        self.paused ^= {name}

    @rule()
    def ask_all(self):
        for name in self.kinds:
            self.take(name)

    def take(self, name):
        states = self.states()
        has = sum(shard.queue == name for shard in self.shards.values())
        shard = self.schedule.next(name)
        if shard is None:
            mine = [
                i for i, state in enumerate(states) if state == "ready" and self.runs(self.kinds[name], i)
            ]
            assert has or name in self.paused or not mine
            return
        items = [self.shuffled[number] for number in shard.items]
        assert name not in self.paused
        assert has < self.per_queue
        assert 1 <= len(items) <= self.infos[self.stage_of[items[0]]].max_items
        assert len(set(items)) == len(items)
        for item in items:
            assert states[item] == "ready"
            assert self.runs(self.kinds[name], item)
            assert self.infos[self.stage_of[item]].name == shard.stage
            self.known[item] = "running"
        self.shards[shard.id] = shard

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def shard_ends(self, data):
        shard = data.draw(st.sampled_from(list(self.shards.values())))
        outcome = data.draw(
            st.lists(st.sampled_from("ddfa"), min_size=len(shard.items), max_size=len(shard.items))
        )
        failed, again = (
            [item for item, letter in zip(shard.items, outcome, strict=True) if letter == wanted]
            for wanted in "fa"
        )
        self.schedule.ended(shard.id, failed, again)
        self.account_for_shard(shard.id, failed, again)

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def shard_is_given_back(self, data):
        shard = data.draw(st.sampled_from(list(self.shards.values())))
        self.schedule.give_back(shard.id)
        self.account_for_shard(shard.id, failed=(), again=shard.items)

    def account_for_shard(self, shard_id, failed, again):
        self.account_for(self.shards.pop(shard_id).items, failed, again)

    def account_for(self, numbers, failed, again):
        for number in numbers:
            known = "failed" if number in failed else "open" if number in again else "done"
            self.known[self.shuffled[number]] = known

    @precondition(lambda self: self.shards)
    @rule(data=st.data())
    def items_turn_out_to_be_done_elsewhere(self, data):
        shard = data.draw(st.sampled_from(list(self.shards.values())))
        kept = data.draw(st.lists(st.booleans(), min_size=len(shard.items), max_size=len(shard.items)))
        gone = [item for item, keep in zip(shard.items, kept, strict=True) if not keep]
        self.schedule.detach(shard.id, gone)
        self.detached += gone
        self.shards[shard.id] = replace(shard, items=tuple(item for item in shard.items if item not in gone))

    @precondition(lambda self: self.detached)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "failed", "again"]))
    def what_became_of_them(self, data, outcome):
        items = data.draw(st.lists(st.sampled_from(self.detached), unique=True))
        self.schedule.settle(**{outcome: items})
        self.account_for(items, failed=items * (outcome == "failed"), again=items * (outcome == "again"))
        self.detached = [item for item in self.detached if item not in items]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), seconds=st.floats(0.1, 100.0))
    def stage_is_measured(self, data, seconds):
        self.schedule.measured(data.draw(st.sampled_from(self.infos)).name, seconds, 2.0)

    @invariant()
    def the_schedule_agrees(self):
        states = Counter(zip(self.stage_of, self.states(), strict=True))
        for index, info in enumerate(self.infos):
            expected = {name: states[index, name] for name in self.schedule.counts[info.name]._fields}
            assert self.schedule.counts[info.name]._asdict() == expected
        assert self.schedule.finished == (not {"waiting", "ready", "running"} & set(self.states()))

    def teardown(self):
        if not hasattr(self, "schedule"):
            return
        for kind in ("cpu", "gpu"):
            self.add_queue(kind)
        first, last = f"queue-{self.names - 1}", f"queue-{self.names}"
        self.schedule.settle(done=self.detached)
        self.account_for(self.detached, failed=(), again=())
        while not self.schedule.finished:
            before = len(self.shards)
            for name in (first, last):
                self.take(name)
            assert self.shards or before
            for shard_id in list(self.shards):
                self.schedule.ended(shard_id)
                self.account_for_shard(shard_id, failed=(), again=())
        self.the_schedule_agrees()
        assert set(self.states()) <= {"done", "failed", "blocked"}


AnyOrder.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
