"""Whole tables through every real class, with the random checkpoint."""

import re
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
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from avatar_core.backends.hunyuan.official import convert
from avatar_core.backends.hunyuan.tiny import write_tiny_checkpoint
from avatar_core.checkpoint import read_checkpoint
from avatar_core.errors import Cancelled
from avatar_core.pipeline import render
from avatar_core.result import Result
from tests.processes import until
from tests.sample_rows import (
    Watcher,
    attempts,
    data_files,
    open_known,
    read_video,
    render_table,
    videos,
    write_picture,
    write_recording,
    write_table,
)
from tests.watch import Watch

DURATION_S = 1.0
BEFORE_DENOISE = ("face", "audio", "text", "reference")
PROMPT = "A girl speaks in a sunny garden."
BASE = {"name": "base", "image": "portrait.jpg", "audio": "hello.wav", "prompt": PROMPT, "seed": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "picture": {"image": "closeup.jpg"},
    "recording": {"audio": "again.wav"},
    "prompt": {"prompt": "A man sings in a dark studio."},
    "negative prompt": {"negative_prompt": "rain, snow and a very long beard"},
    "seed": {"seed": 2},
    "guidance": {"params": '{"guidance_scale": 4.0}'},
}

TRANSFORMER = "hunyuan-tiny/transformer"
FILE = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"


def backend(steps: int = 2, **options: Any) -> dict[str, Any]:
    denoise = {"num_inference_steps": steps, **options.pop("denoise", {})}
    return {"name": "hunyuan", "checkpoint": "hunyuan-tiny", "image_size": 64, "denoise": denoise, **options}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint where runs look for it; not to be changed."""
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_checkpoint(folder / "hunyuan-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_WEIGHTS", str(folder))
        yield folder / "hunyuan-tiny"


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One to be changed, in its place."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny, folder / "hunyuan-tiny")
    monkeypatch.setenv("AVATAR_WEIGHTS", str(folder))
    return folder / "hunyuan-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_picture(folder / "portrait.jpg")
    write_picture(folder / "closeup.jpg", "closeup")
    portrait = Image.open(folder / "portrait.jpg")
    ImageOps.pad(portrait, (160, 1000)).save(folder / "narrow.png")
    write_recording(folder / "hello.wav", 0.5, DURATION_S)
    write_recording(folder / "again.wav", 1.5, DURATION_S)
    write_recording(folder / "long.wav", 0.0, 6.5)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """The base row, and one row for each change."""
    changed = [{**BASE, **change, "name": name.replace(" ", "-")} for name, change in CHANGES.items()]
    return write_table(folder / "batch.csv", [BASE, *changed])


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
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert (video.width, video.height) == (64, 64) == (row["width"], row["height"])
            assert video.average_rate == 25
            heard = [frame.to_ndarray() for frame in container.decode(audio=0)]
        assert np.abs(np.concatenate(heard, axis=1)).max() > 0.05
        assert sum(map(np.size, heard)) / sound.rate == pytest.approx(DURATION_S, abs=0.1)
        assert len(read_video(path)) == row["num_frames"] == 25


def test_rows_share_what_is_equal(done: tuple[Result, Watcher, Path]) -> None:
    """One picture with two recordings is one reference; one picture with one pair of prompts is one text."""
    _, watcher, store = done
    clips = len(CHANGES) + 1
    expected = {
        "ingest": 4,
        "face": 2,
        "audio": 2,
        "text": 4,
        "reference": 2,
        "denoise": clips,
        "decode": clips,
    }
    assert watcher.counts == expected
    assert {path.name for path in (store / "stages").iterdir()} == set(expected)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_row_says_shows_in_the_frames(done: tuple[Result, Watcher, Path], change: str) -> None:
    result, _, _ = done
    before, after = frames(result, "base"), frames(result, change.replace(" ", "-"))
    assert before.std() > 5
    assert after.std() > 5
    assert np.abs(after - before).max() > 10


def test_the_same_run_twice_gives_the_same_videos(
    done: tuple[Result, Watcher, Path], table: Path, tmp_path: Path
) -> None:
    again = videos(render_table(table, tmp_path, backend=backend(), only=["base", "recording"]).dataset)
    assert len(again) == 2
    assert again.items() <= videos(done[0].dataset).items()


def test_options_that_are_no_content_change_no_key(tiny: Path, base: Path, tmp_path: Path) -> None:
    expected = keys(base, tmp_path, backend())
    assert keys(base, tmp_path, backend(denoise={"checkpoint_steps": 1})) == expected
    assert keys(base, tmp_path, backend(), runtime={"memory": "10gb"}) == expected
    assert keys(base, tmp_path, backend(steps=3))["denoise"] != expected["denoise"]


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


def test_one_changed_tensor_changes_the_video_and_no_earlier_key(
    done: tuple[Result, Watcher, Path], own_tiny: Path, base: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(done[2], tmp_path / "store"))
    before = keys(base, store, backend())
    state = read_checkpoint(own_tiny / FILE, key="module")
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["double_blocks.1.img_mlp.fc2.weight"] *= 2
    torch.save({"module": state}, own_tiny / FILE)
    after = keys(base, store, backend())
    assert {stage for stage in after if after[stage] != before[stage]} == {"denoise", "decode"}

    watcher = Watcher()
    result = render_table(base, store, watcher, backend=backend())
    assert watcher.counts == {"denoise": 1, "decode": 1}
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
@pytest.mark.parametrize("transformer", ["fp8", "fp8_cast"])
def test_float8_weights_render_under_keys_of_their_own(
    done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path, transformer: str
) -> None:
    store = Path(shutil.copytree(done[2], tmp_path / "store"))
    watcher = Watcher()
    result = render_table(base, store, watcher, backend=backend(denoise={"transformer": transformer}))
    assert watcher.counts == {"denoise": 1, "decode": 1}
    difference = np.abs(frames(result, "base") - frames(done[0], "base"))
    assert 0 < difference.mean() < frames(done[0], "base").std()


# --- frame rates, parity, rows that cannot be


@pytest.fixture(scope="module")
def rates(folder: Path) -> Path:
    rows = [{**BASE, "name": f"fps-{fps:g}", "fps": fps} for fps in (25.0, 12.5, 30.0)]
    return write_table(folder / "rates.csv", rows)


@pytest.mark.drill
def test_any_frame_rate(tiny: Path, rates: Path, tmp_path: Path) -> None:
    result = render_table(rates, tmp_path, backend=backend())
    assert result.metadata["num_frames"].tolist() == [25, 13, 30]
    assert [len(frames(result, name)) for name in result.metadata["name"]] == [25, 13, 30]


@pytest.mark.drill
def test_parity_knows_two_frame_rates(tiny: Path, rates: Path, tmp_path: Path) -> None:
    """It counts 25 frames a second whatever the rate."""
    result = render_table(rates, tmp_path, backend=backend(mode="parity"))
    finished = result.metadata[result.metadata["status"] == "ok"]
    assert finished["num_frames"].tolist() == [25, 25]
    assert all(frames(result, name).std() > 5 for name in finished["name"])
    (failure,) = result.failures.itertuples()
    assert failure.name == "fps-30"
    assert failure.error == "mode=parity knows 25 and 12.5 frames a second, got 30; use mode=default"


TOO_LONG = r"has \d+ tokens, allowed are \d+; shorten it$"


def test_rows_that_cannot_be_rendered_say_why(tiny: Path, folder: Path, tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "two-speakers": {"audio_2": "again.wav", "audio_type": "para"},
        "endless": {"prompt": "very long " * 200},
        "endless-negative": {"negative_prompt": "very long " * 200},
        "narrow": {"image": "narrow.png"},
        "place": {"prompt": "a <image> of her"},
        "option": {"params": '{"checkpoint_steps": 2}'},
    }
    rows = [{**BASE, **change, "name": name} for name, change in wrong.items()]
    result = render_table(write_table(folder / "wrong.csv", [BASE, *rows]), tmp_path, backend=backend())
    assert result.metadata["status"].tolist() == ["ok", *["failed"] * len(wrong)]
    errors = dict(zip(result.failures["name"], result.failures["error"], strict=True))
    assert errors["two-speakers"].startswith("column `audio_2`: backend hunyuan renders 1 speaker")
    assert re.match(TOO_LONG, errors["endless"].replace("prompt (prompt_prefix included): ", ""))
    assert re.match(TOO_LONG, errors["endless-negative"].replace("negative_prompt: ", ""))
    assert errors["narrow"].startswith("picture: has 160x1000 pixels, too narrow for a video")
    assert "contains <image>, which stands for the picture" in errors["place"]
    assert "a row may set: flow_shift, guidance_scale, negative_prompt" in errors["option"]


# --- stopping


class Steps(Watcher):
    """Steps told of denoising, the first of which is where it began."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def item_progress(self, stage: str, key: str, done: int, total: int) -> None:
        if stage == "denoise" and total > 1:
            self.steps.append(done)


NUM_STEPS = 12  # of which the eighth is cached


def latents(store: Path) -> list[bytes]:
    return [path.read_bytes() for path in data_files(store, "denoise")]


@pytest.mark.drill
@pytest.mark.parametrize(("audio", "stop", "kept"), [("hello.wav", 7, 6), ("long.wav", 9, 9)])
def test_a_clip_stopped_between_steps_goes_on_from_there(
    tiny: Path, folder: Path, tmp_path: Path, audio: str, stop: int, kept: int
) -> None:
    """`long.wav` has two windows."""
    table = write_table(folder / "stopped.csv", [{**BASE, "audio": audio}])
    options = {
        "backend": backend(NUM_STEPS, denoise={"checkpoint_steps": 1}),
        "runtime": {"cache_dir": str(tmp_path / "cache")},
    }
    whole, stopped, rest = Steps(), Steps(), Steps()
    expected = render_table(table, tmp_path / "whole", whole, **options)
    assert whole.steps == list(range(NUM_STEPS + 1))

    config = {"table": str(table), "storage": {"root": str(tmp_path / "store")}, **options}
    with pytest.raises(Cancelled):
        render(config, stopped, lambda: stop in stopped.steps)
    assert stopped.steps == list(range(stop + 1))
    assert len(list((tmp_path / "cache/unfinished").iterdir())) == 1

    result = render(config, rest)
    assert rest.steps == list(range(kept, NUM_STEPS + 1))
    assert latents(tmp_path / "store") == latents(tmp_path / "whole")
    assert videos(result.dataset) == videos(expected.dataset)
    assert list((tmp_path / "cache/unfinished").iterdir()) == []


@pytest.mark.drill
def test_a_killed_command_denoises_no_finished_clip_again(tiny: Path, folder: Path, tmp_path: Path) -> None:
    rows = [{**BASE, "name": audio, "audio": f"{audio}.wav"} for audio in ("hello", "again")]
    table = write_table(folder / "killed.csv", rows)
    settings = {"num_inference_steps": 24, "checkpoint_steps": 1}
    words = ["render", str(table), "backend=hunyuan", "preset=tiny", f"storage.root={tmp_path / 'store'}"]
    words += [f"backend.denoise.{name}={value}" for name, value in settings.items()]
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
    until(lambda: any((tmp_path / "store").glob("stages/denoise/manifests/*.parquet")), [process])
    process.kill()
    assert process.wait() == -signal.SIGKILL

    watcher = Steps()
    options = {"backend": backend(denoise=settings), "runtime": {"cache_dir": str(tmp_path / "cache")}}
    result = render_table(table, tmp_path / "store", watcher, **options)
    assert result.failures.empty
    assert watcher.counts["denoise"] == 1
    assert watcher.steps[0] > 0
    assert len(attempts(tmp_path / "store", "denoise")) == 2
    unbroken = render_table(table, tmp_path / "unbroken", **options)
    assert videos(result.dataset) == videos(unbroken.dataset)
