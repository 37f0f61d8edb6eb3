"""Whole tables through every real class, with the random checkpoint."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from avatar_core.backends.multitalk.official import convert
from avatar_core.backends.multitalk.tiny import write_tiny_checkpoint
from avatar_core.result import Result
from tests.processes import until
from tests.sample_rows import (
    Watcher,
    attempts,
    open_known,
    read_video,
    render_table,
    videos,
    write_picture,
    write_recording,
    write_table,
)
from tests.watch import Watch

DURATION_S = 0.48
NUM_FRAMES, NUM_WINDOWS = 12, 2
PROMPT = "A woman speaks in a sunny garden."
BASE = {"name": "base", "image": "portrait.jpg", "audio": "hello.wav", "prompt": PROMPT, "seed": 1}
PAIR = {**BASE, "image": "pair.jpg", "audio_2": "again.wav", "audio_type": "para"}
CHANGES: dict[str, dict[str, Any]] = {
    "picture": {"image": "closeup.jpg"},
    "recording": {"audio": "again.wav"},
    "prompt": {"prompt": "Two people sing in a dark studio."},
    "negative prompt": {"negative_prompt": "rain, snow and a very long beard"},
    "seed": {"seed": 2},
    "guidance": {"params": '{"audio_guidance_scale": 2.0}'},
}
TRANSFORMER = "multitalk-tiny/transformer"
FILE = "MeiGen-MultiTalk/multitalk.safetensors"


def backend(steps: int = 2, **options: Any) -> dict[str, Any]:
    denoise = {"num_inference_steps": steps, "window_frames": 9, "motion_frames": 5}
    denoise |= options.pop("denoise", {})
    return {
        "name": "multitalk",
        "checkpoint": "multitalk-tiny",
        "image_size": 48,
        "denoise": denoise,
        **options,
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint where runs look for it; not to be changed."""
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_checkpoint(folder / "multitalk-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_WEIGHTS", str(folder))
        yield folder / "multitalk-tiny"


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One to be changed, in its place."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny, folder / "multitalk-tiny")
    monkeypatch.setenv("AVATAR_WEIGHTS", str(folder))
    return folder / "multitalk-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_picture(folder / "portrait.jpg")
    write_picture(folder / "closeup.jpg", "closeup")
    write_picture(folder / "pair.jpg", "two_people", 400)
    write_recording(folder / "hello.wav", 0.5, DURATION_S)
    write_recording(folder / "again.wav", 1.5, DURATION_S)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """The base row, one row for each change, and two people."""
    changed = [{**BASE, **change, "name": name.replace(" ", "-")} for name, change in CHANGES.items()]
    left, right = "[20, 10, 180, 190]", "[210, 10, 390, 190]"
    pairs = [
        {**PAIR, "name": "pair"},
        {**PAIR, "name": "pair-swapped", "audio": "again.wav", "audio_2": "hello.wav"},
        {**PAIR, "name": "pair-boxes", "bbox": f"[{left}, {right}]"},
        {**PAIR, "name": "pair-boxes-swapped", "bbox": f"[{right}, {left}]"},
        {**PAIR, "name": "pair-in-turn", "audio_type": "add"},
    ]
    return write_table(folder / "batch.csv", [BASE, *changed, *pairs])


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return write_table(folder / "base.csv", [BASE])


@pytest.fixture(scope="module")
def done(tiny: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Watcher, Path]:
    store, watcher = tmp_path_factory.mktemp("rendered") / "store", Watcher()
    return render_table(table, store, watcher, backend=backend()), watcher, store


def frames(result: Result, name: str) -> NDArray[np.float64]:
    return read_video(Path(result.dataset) / "videos" / f"{name}.mp4").astype(float)


def keys(table: Path, store: Path, settings: Mapping[str, Any], **options: Any) -> dict[str, str]:
    """Of the items of the first clip, by stage."""
    config = {"table": str(table), "storage": {"root": str(store)}, "backend": settings, **options}
    return {stage: item.key for stage, item in open_known(config).clips[0].items.items()}


# --- what comes out


def test_every_row_becomes_a_video_with_sound(done: tuple[Result, Watcher, Path]) -> None:
    result, _, _ = done
    assert result.failures.empty
    for row in result.metadata.to_dict("records"):
        path = Path(result.dataset, row["file_name"])
        seconds = 2 * DURATION_S if row["name"] == "pair-in-turn" else DURATION_S
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert (video.width, video.height) == (row["width"], row["height"])
            assert video.width % 32 == video.height % 32 == 0
            heard = [frame.to_ndarray() for frame in container.decode(audio=0)]
        assert np.abs(np.concatenate(heard, axis=1)).max() > 0.05
        assert sum(map(np.size, heard)) / sound.rate == pytest.approx(seconds, abs=0.1)
        assert len(read_video(path)) == row["num_frames"] == 25 * seconds


def test_rows_share_what_is_equal(done: tuple[Result, Watcher, Path]) -> None:
    """A picture with one speaker, with two, and with other boxes is another reference; every pair of prompts
    is one text; every window is an item."""
    _, watcher, _ = done
    clips = len(CHANGES) + 6
    assert watcher.counts == {
        "ingest": 5,
        "face": 3,
        "audio": 5,
        "text": 3,
        "reference": 5,
        "denoise": clips * NUM_WINDOWS + 3,
        "decode": clips,
    }


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_row_says_shows_in_the_frames(done: tuple[Result, Watcher, Path], change: str) -> None:
    before, after = frames(done[0], "base"), frames(done[0], change.replace(" ", "-"))
    assert before.std() > 5
    assert after.std() > 5
    if before.shape == after.shape:
        assert np.abs(after - before).max() > 10


@pytest.mark.parametrize("changed", ["pair-swapped", "pair-boxes", "pair-boxes-swapped"])
def test_it_shows_who_speaks(done: tuple[Result, Watcher, Path], changed: str) -> None:
    before, after = frames(done[0], "pair"), frames(done[0], changed)
    assert before.shape == after.shape
    assert np.abs(after - before).max() > 10


def test_the_same_run_twice_gives_the_same_videos(
    done: tuple[Result, Watcher, Path], table: Path, tmp_path: Path
) -> None:
    again = videos(render_table(table, tmp_path, backend=backend(), only=["base", "pair"]).dataset)
    assert len(again) == 2
    assert again.items() <= videos(done[0].dataset).items()


@pytest.mark.drill
def test_every_memory_level_renders_the_same_clip(
    done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path
) -> None:
    expected = frames(done[0], "base")
    for level in ("48gb", "10gb"):
        result = render_table(base, tmp_path / level, backend=backend(), runtime={"memory": level})
        assert set(attempts(tmp_path / level, "denoise")["memory"]) == {level}
        assert np.abs(frames(result, "base") - expected).max() <= 8


# --- weights


@pytest.mark.drill
def test_one_changed_tensor_changes_the_video_and_no_earlier_key(
    done: tuple[Result, Watcher, Path], own_tiny: Path, base: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(done[2], tmp_path / "store"))
    before = keys(base, store, backend())
    state = load_file(own_tiny / FILE)
    state["blocks.1.audio_cross_attn.proj.weight"] *= 2
    save_file(state, own_tiny / FILE)
    after = keys(base, store, backend())
    assert {stage for stage in after if after[stage] != before[stage]} == {"denoise", "decode"}

    watcher = Watcher()
    result = render_table(base, store, watcher, backend=backend())
    assert watcher.counts == {"denoise": NUM_WINDOWS, "decode": 1}
    assert np.abs(frames(result, "base") - frames(done[0], "base")).max() > 0


@pytest.mark.drill
def test_converted_weights_give_the_same_keys_and_videos(
    done: tuple[Result, Watcher, Path], own_tiny: Path, base: Path, tmp_path: Path
) -> None:
    convert(TRANSFORMER)
    (own_tiny / FILE).unlink()
    result = render_table(base, tmp_path / "store", backend=backend())
    assert result.metadata["decode_key"][0] == done[0].metadata["decode_key"][0]
    assert videos(result.dataset)["base.mp4"] == videos(done[0].dataset)["base.mp4"]


@pytest.mark.drill
@pytest.mark.parametrize(
    "options",
    [
        {"transformer": "int8"},
        {"transformer": "fp8"},
        {"transformer": "int8_cast"},
        {"transformer": "fp8_cast"},
        {"lora": "fusionx"},
        {"transformer": "int8", "lora": "fusionx"},
        {"lora": "lightx2v", "text_guidance_scale": 1.0},
        {"step_cache": "teacache", "num_inference_steps": 7, "cache_threshold": 5.0},
        {"apg": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_ways_render_under_keys_of_their_own(
    done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    store = Path(shutil.copytree(done[2], tmp_path / "store"))
    watcher = Watcher()
    result = render_table(base, store, watcher, backend=backend(denoise=options))
    assert result.failures.empty
    assert watcher.counts == {"denoise": NUM_WINDOWS, "decode": 1}
    difference = np.abs(frames(result, "base") - frames(done[0], "base"))
    assert 0 < difference.mean() < 2 * frames(done[0], "base").std()


# --- parity, rows that cannot be


@pytest.mark.drill
def test_parity_is_three_frames_shorter(tiny: Path, folder: Path, tmp_path: Path) -> None:
    rows = [BASE, {**PAIR, "name": "pair"}, {**BASE, "name": "fps", "fps": 30.0}]
    table = write_table(folder / "parity.csv", rows)
    result = render_table(table, tmp_path, backend=backend(mode="parity"))
    finished = result.metadata[result.metadata["status"] == "ok"]
    assert finished["num_frames"].tolist() == [NUM_FRAMES - 3] * 2
    assert all(frames(result, name).std() > 5 for name in finished["name"])
    (failure,) = result.failures.itertuples()
    assert failure.error == "mode=parity knows 25 frames a second, got 30; use mode=default"


def test_rows_that_cannot_be_rendered_say_why(tiny: Path, folder: Path, tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "outside": {**PAIR, "bbox": "[[900, 10, 990, 190], [210, 10, 390, 190]]"},
        "covering": {**PAIR, "bbox": "[[0, 0, 200, 400], [200, 0, 400, 400]]"},
        "alone": {**PAIR, "image": "portrait.jpg"},
        "option": {**BASE, "params": '{"lora": "fusionx"}'},
    }
    rows = [{**change, "name": name} for name, change in wrong.items()]
    result = render_table(write_table(folder / "wrong.csv", [BASE, *rows]), tmp_path, backend=backend())
    assert result.metadata["status"].tolist() == ["ok", *["failed"] * len(wrong)]
    errors = dict(zip(result.failures["name"], result.failures["error"], strict=True))
    assert "[900" in errors["outside"]
    assert "background" in errors["covering"]
    assert errors["alone"].startswith("found 1 of the 2 faces needed")
    assert "a row may set: audio_guidance_scale, flow_shift, negative_prompt" in errors["option"]


# --- windows


class Steps(Watcher):
    """Steps told of denoising by item."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, list[int]] = {}

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        if stage == "denoise" and total > 1:
            self.steps.setdefault(key, []).append(done)


def num_finished_windows(store: Path) -> int:
    return len(attempts(store, "denoise")) if any(store.glob("stages/denoise/manifests/*.parquet")) else 0


@pytest.mark.drill
def test_a_killed_command_computes_no_finished_window_again(tiny: Path, folder: Path, tmp_path: Path) -> None:
    table = write_table(folder / "killed.csv", [{**PAIR, "name": "pair"}])
    store = tmp_path / "store"
    words = ["render", str(table), "backend=multitalk", "preset=tiny", f"storage.root={store}"]
    settings = {"num_inference_steps": 20, "window_frames": 9, "motion_frames": 5}
    words += [f"backend.denoise.{name}={value}" for name, value in settings.items()]
    words += ["backend.image_size=48"]
    words += [f"runtime.cache_dir={tmp_path / 'cache'}", "runtime.cpus=1"]
    watch = Watch(tmp_path / "watch")
    watch.hold_at("denoise", 2, step=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        env=watch.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[3],
    )
    watch.until_held(process)
    until(lambda: num_finished_windows(store) == 1, [process])
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert num_finished_windows(store) == 1

    watcher = Steps()
    options = {"backend": backend(denoise=settings), "runtime": {"cache_dir": str(tmp_path / "cache")}}
    result = render_table(table, store, watcher, **options)
    assert result.failures.empty
    assert watcher.counts["denoise"] == NUM_WINDOWS - 1
    assert len(attempts(store, "denoise")) == NUM_WINDOWS
    unbroken = render_table(table, tmp_path / "unbroken", **options)
    assert videos(result.dataset) == videos(unbroken.dataset)


@pytest.mark.drill
def test_a_longer_clip_is_made_of_more_windows(tiny: Path, folder: Path, tmp_path: Path) -> None:
    """The first windows are equal whatever follows."""
    write_recording(folder / "long.wav", 0.5, 0.8)
    table = write_table(folder / "long.csv", [{**BASE, "audio": "long.wav"}])
    limited = render_table(table, tmp_path / "limited", backend=backend(denoise={"max_windows": 2}))
    whole = render_table(table, tmp_path / "whole", backend=backend())
    assert frames(limited, "base").shape[0] == 13
    assert frames(whole, "base").shape[0] == 20
    assert len(attempts(tmp_path / "whole", "denoise")) == 4
    assert np.abs(frames(whole, "base")[:13] - frames(limited, "base")[:13]).mean() < 3
