"""Whole tables through every real class, with the random checkpoint."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.base import create_backend
from avatar_core.backends.ditto.motion_vector import mirror_index
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.stages import DittoDecode, DittoDenoise, DittoReference
from avatar_core.backends.ditto.tiny import write_tiny_checkpoint
from avatar_core.errors import InputError
from avatar_core.media.image import load_image
from avatar_core.result import Result
from tests.sample_rows import (
    Watcher,
    open_known,
    read_video,
    render_table,
    videos,
    write_picture,
    write_recording,
    write_table,
)

DURATION_S = 0.4
NUM_FRAMES = 10
BASE = {"name": "base", "image": "portrait.jpg", "audio": "hello.wav", "seed": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "picture": {"image": "closeup.jpg"},
    "recording": {"audio": "again.wav"},
    "seed": {"seed": 2},
    "guidance": {"params": '{"guidance_scale": 4.0}'},
    "emotion": {"params": '{"emo": "happy"}'},
}


def backend(**options: Any) -> dict[str, Any]:
    denoise = {"num_inference_steps": 2, **options.pop("denoise", {})}
    return {"name": "ditto", "checkpoint": "ditto-tiny", "denoise": denoise, **options}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint where runs look for it."""
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_checkpoint(folder / "ditto-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_WEIGHTS", str(folder))
        yield folder / "ditto-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_picture(folder / "portrait.jpg")
    write_picture(folder / "closeup.jpg", "closeup")
    write_recording(folder / "hello.wav", 0.5, DURATION_S)
    write_recording(folder / "again.wav", 1.5, DURATION_S)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> Path:
    """The base row, one row for each change, and one that differs in what no frame depends on."""
    changed = [{**BASE, **change, "name": name} for name, change in CHANGES.items()]
    same = {**BASE, "name": "same", "prompt": "A man sings in a dark studio."}
    return write_table(folder / "batch.csv", [BASE, *changed, same])


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return write_table(folder / "base.csv", [BASE])


@pytest.fixture(scope="module")
def done(tiny: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Watcher, Path]:
    store, watcher = tmp_path_factory.mktemp("rendered") / "store", Watcher()
    return render_table(table, store, watcher, backend=backend()), watcher, store


def frames(result: Result, name: str) -> NDArray[np.float64]:
    return read_video(Path(result.dataset) / "videos" / f"{name}.mp4").astype(float)


def keys(table: Path, store: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Of the items of the first clip, by stage."""
    config = {"table": str(table), "storage": {"root": str(store)}, "backend": settings}
    return {stage: item.key for stage, item in open_known(config).clips[0].items.items()}


def test_every_row_becomes_a_video_with_sound(done: tuple[Result, Watcher, Path], folder: Path) -> None:
    result, _, _ = done
    assert result.failures.empty
    for row in result.metadata.to_dict("records"):
        path = Path(result.dataset, row["file_name"])
        height, width = load_image(folder / row["image"]).shape[:2]
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert (video.width, video.height) == (width - width % 2, height - height % 2)
            assert video.average_rate == 25
            heard = [frame.to_ndarray() for frame in container.decode(audio=0)]
        assert np.abs(np.concatenate(heard, axis=1)).max() > 0.05
        assert sum(map(np.size, heard)) / sound.rate == pytest.approx(DURATION_S, abs=0.1)
        assert len(read_video(path)) == row["num_frames"] == NUM_FRAMES


def test_a_picture_is_registered_once_for_all_its_clips(done: tuple[Result, Watcher, Path]) -> None:
    _, watcher, _ = done
    clips = len(CHANGES) + 1
    assert watcher.counts == {
        "ingest": 4,
        "face": 2,
        "audio": 2,
        "reference": 2,
        "denoise": clips,
        "decode": clips,
    }


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_row_says_shows_in_the_frames(done: tuple[Result, Watcher, Path], change: str) -> None:
    before, after = frames(done[0], "base"), frames(done[0], change)
    width = min(before.shape[2], after.shape[2])
    assert before.std() > 5
    assert np.abs(after[:, :, :width] - before[:, :, :width]).max() > 10


def test_the_face_moves(done: tuple[Result, Watcher, Path]) -> None:
    assert np.abs(np.diff(frames(done[0], "base"), axis=0)).max() > 10


def test_nothing_else_changes_a_video(done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path) -> None:
    made = videos(done[0].dataset)
    assert made["same.mp4"] == made["base.mp4"]
    assert videos(render_table(base, tmp_path, backend=backend()).dataset)["base.mp4"] == made["base.mp4"]


def test_how_a_machine_works_is_in_no_key(tiny: Path, base: Path, tmp_path: Path) -> None:
    expected = keys(base, tmp_path, backend())
    execution = backend(decode={"compile": False}, denoise={"cuda_graph": False})
    assert keys(base, tmp_path, execution) == expected
    changed = keys(base, tmp_path, backend(denoise={"emo": 3}))
    assert {stage for stage in changed if changed[stage] != expected[stage]} == {"denoise", "decode"}


@pytest.mark.parametrize("side", [512, 320])
def test_a_square_round_the_face(
    done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path, side: int
) -> None:
    """Only the frames are made anew."""
    store, watcher = Path(shutil.copytree(done[2], tmp_path / "store")), Watcher()
    result = render_table(base, store, watcher, backend=backend(output="crop", image_size=side))
    assert watcher.counts == {"decode": 1}
    assert frames(result, "base").shape == (NUM_FRAMES, side, side, 3)
    assert result.metadata[["width", "height"]].iloc[0].tolist() == [side, side]


def test_batches_of_any_size_give_the_same_frames(
    done: tuple[Result, Watcher, Path], base: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(done[2], tmp_path / "store"))
    result = render_table(base, store, backend=backend(decode={"batch_frames": 3}))
    assert np.abs(frames(result, "base") - frames(done[0], "base")).max() <= 8


def test_parity_renders_with_the_published_count_of_frames(tiny: Path, folder: Path, tmp_path: Path) -> None:
    write_recording(folder / "seven.wav", 0.5, 0.28)
    rows = [{**BASE, "audio": "seven.wav"}]
    result = render_table(write_table(folder / "parity.csv", rows), tmp_path, backend=backend(mode="parity"))
    assert len(frames(result, "base")) == 8


def test_mtcnn_in_place_of_the_detector_with_a_licence(tiny: Path, base: Path, tmp_path: Path) -> None:
    for name in ("det_10g.onnx", "2d106det.onnx"):
        (tiny / "ditto_pytorch/aux_models" / name).rename(tmp_path / name)
    try:
        settings = backend(reference={"detector": "mtcnn"})
        result = render_table(base, tmp_path / "store", backend=settings)
    finally:
        for name in ("det_10g.onnx", "2d106det.onnx"):
            (tmp_path / name).rename(tiny / "ditto_pytorch/aux_models" / name)
    assert len(frames(result, "base")) == NUM_FRAMES


def test_rows_that_cannot_be_rendered_say_why(tiny: Path, folder: Path, tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "two-speakers": {"audio_2": "again.wav", "audio_type": "para"},
        "rate": {"fps": 30},
        "option": {"params": '{"overlap_v2": 2}'},
        "emotion": {"params": '{"emo": "hapy"}'},
    }
    rows = [{**BASE, **change, "name": name} for name, change in wrong.items()]
    result = render_table(write_table(folder / "wrong.csv", rows), tmp_path, backend=backend())
    errors = dict(zip(result.failures["name"], result.failures["error"], strict=True))
    assert errors["two-speakers"].startswith("column `audio_2`: backend ditto renders 1 speaker")
    assert errors["rate"].startswith("fps=30: backend ditto renders 25 frames a second")
    assert "a row may set: delta_eye_open_n, drive_eye, emo, guidance_scale" in errors["option"]
    assert "happy" in errors["emotion"]


def test_a_row_without_a_seed_may_set_options(tiny: Path, folder: Path, tmp_path: Path) -> None:
    row = {name: value for name, value in BASE.items() if name != "seed"}
    rows = [{**row, "name": f"n{n}", "params": f'{{"guidance_scale": {n}}}'} for n in ("3", "3.0", "4")]
    table = write_table(folder / "options.csv", rows)
    config = {"table": str(table), "storage": {"root": str(tmp_path)}, "backend": backend()}
    clips = open_known(config).clips
    assert clips[0].seed == clips[1].seed != clips[2].seed
    assert [clip.items["denoise"].config.backend.guidance_scale for clip in clips] == [3.0, 3.0, 4.0]


def test_footage_is_registered_frame_by_frame_and_runs_forth_and_back(tiny: Path, folder: Path) -> None:
    ditto = create_backend(backend()).resolve()
    still = load_image(folder / "portrait.jpg")
    footage = [np.roll(still, 2 * i, axis=1) for i in range(3)]
    config, checkpoint = ditto.config, ditto.config.checkpoint
    register = DittoReference(ditto, checkpoint)
    registrar = register.load_models(config.reference, "cpu", None)
    reference = register.encode_footage(registrar, footage, [], config.reference)
    avatar = Avatar.from_tensors(reference)
    assert (len(avatar), avatar.is_image) == (3, False)

    features = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    conditions = {"audio": {"features": features}, "reference": reference}
    denoise = DittoDenoise(ditto, checkpoint)
    models = denoise.load_models(config.denoise, "cpu", None)
    motion = denoise.denoise(models, conditions, 25.0, 1, config.denoise, lambda *_: None, None)
    assert motion["source_frames"].tolist() == [mirror_index(i, 3) for i in range(8)]
    decode = DittoDecode(ditto, checkpoint)
    renderer = decode.load_models(config.decode, "cpu", None)
    conditions = {"reference": reference, "denoise": motion}
    made = list(decode.footage_frames(renderer, footage, conditions, config.decode))
    assert len(made) == 8
    assert {frame.shape for frame in made} == {still.shape}


def test_footage_may_be_too_long(tiny: Path) -> None:
    ditto = create_backend(backend()).resolve()
    footage = [np.zeros((2, 2, 3), np.uint8)] * 1001
    with pytest.raises(InputError, match=r"video: has 1001 frames; backend ditto takes 1000 at most"):
        DittoReference(ditto, "ditto-tiny").encode_footage(None, footage, [], ditto.config.reference)
