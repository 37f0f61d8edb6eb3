"""Rows with a video in place of a picture, through all stages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatar_core.backends.base import BACKENDS
from avatar_core.backends.preview.backend import PreviewBackend
from avatar_core.backends.preview.config import ReferenceConfig
from avatar_core.backends.preview.stages import PreviewAudio, PreviewDecode, PreviewDenoise, PreviewReference
from avatar_core.media.face import Face
from avatar_core.media.image import load_image
from avatar_core.media.video import VideoWriter
from avatar_core.pipeline import render
from avatar_core.result import Result
from avatar_core.stages.base import Picture, Tensors
from avatar_core.stages.clip_stage import BackendStage
from avatar_core.stages.decode import FootageDecodeStage
from avatar_core.stages.reference import FootageReferenceStage
from tests.sample_rows import (
    PREVIEW_STAGES,
    RunAvatar,
    Watcher,
    attempts,
    flip_byte,
    open_known,
    read_video,
    write_landscape,
)

pytestmark = pytest.mark.timeout(60)

NUM_FRAMES = 8


class FootageReference(PreviewReference, FootageReferenceStage[ReferenceConfig, Path | None]):
    def encode_footage(
        self,
        models: Path | None,
        frames: Sequence[Picture],
        faces: Sequence[Face],
        options: ReferenceConfig,
    ) -> Tensors:
        greys = np.array([float(frame[0, 0].mean()) for frame in frames])
        return {**self.encode(models, frames[0], faces, options), "greys": greys}


class FootageDecode(PreviewDecode, FootageDecodeStage[None, None]):
    def footage_frames(
        self, models: None, footage: Sequence[Picture], conditions: Mapping[str, Tensors], options: None
    ) -> Iterator[Picture]:
        reference = {name: value for name, value in conditions["reference"].items() if name != "greys"}
        assert len(conditions["reference"]["greys"]) == len(footage)
        frames = self.frames(models, footage[0], {**conditions, "reference": reference}, options)
        there_and_back = [*range(len(footage)), *range(len(footage) - 1, -1, -1)]
        for index, frame in enumerate(frames):
            source = footage[there_and_back[index % len(there_and_back)]]
            yield np.concatenate([source[:16], frame[16:]])


class FootageBackend(PreviewBackend):
    """Draws the speech of the first frame's face and, in the top row, which frame of the footage is its "
    "source."""

    name = "footage"
    takes_video = True

    def own_stages(self) -> Sequence[BackendStage[Any, Any, Any]]:
        return PreviewAudio(self), FootageReference(self), PreviewDenoise(self), FootageDecode(self)


@pytest.fixture(autouse=True)
def known_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "footage", f"{__name__}:FootageBackend")


def write_footage(path: Path, picture: Path, num_frames: int = NUM_FRAMES, fps: float = 25) -> Path:
    """A still picture of a speaker whose upper edge grows lighter from frame to frame."""
    still = load_image(picture)
    still = np.ascontiguousarray(still[: still.shape[0] // 2 * 2, : still.shape[1] // 2 * 2])
    with VideoWriter(path, still.shape[1], still.shape[0], fps, crf=4) as writer:
        for index in range(num_frames):
            frame = still.copy()
            frame[:16] = 20 + 200 // num_frames * index
            writer.write_frame(frame)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    write_footage(folder / "talk.mp4", inputs / "portrait.jpg")
    (folder / "hello.wav").write_bytes((inputs / "hello.wav").read_bytes())
    (folder / "portrait.jpg").write_bytes((inputs / "portrait.jpg").read_bytes())
    return folder


def rendered(
    folder: Path, store: Path, row: dict[str, Any], watcher: Watcher | None = None, **options: Any
) -> Result:
    row = {column: str(folder / value) for column, value in row.items()}
    config = {"rows": [row], "storage": {"root": str(store)}, "backend": {"name": "footage"}, **options}
    return render(config, watcher)


def test_a_row_with_a_video_goes_through_all_stages(folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    row = {"video": "talk.mp4", "audio": "hello.wav"}
    result = rendered(folder, tmp_path, row, watcher)
    assert result.failures.empty, result.failures["error"].tolist()
    assert watcher.counts == {"ingest": 2, **dict.fromkeys(PREVIEW_STAGES, 1)}
    assert result.metadata["name"].tolist() == ["talk-hello"]
    video = next(ended for stage, ended in watcher.ended if stage == "ingest" and ended["kind"] == "video")
    assert (video["fps"], video["num_frames"], video["duration_s"]) == (25, NUM_FRAMES, NUM_FRAMES / 25)
    frames = read_video(Path(result.dataset) / result.metadata["file_name"].iloc[0])
    assert len(frames) == 15
    order = [*range(NUM_FRAMES), *range(NUM_FRAMES - 1, -1, -1)][:15]
    assert [round((frame[4].mean() - 20) / 25) for frame in frames] == order
    again = Watcher()
    rendered(folder, tmp_path, row, again)
    assert again.counts == {}


def test_the_footages_size_is_the_videos(folder: Path, tmp_path: Path) -> None:
    row = {"video": "talk.mp4", "audio": "hello.wav"}
    result = rendered(folder, tmp_path, row, video={"max_side": 96})
    assert result.failures.empty, result.failures["error"].tolist()
    assert max(result.metadata["width"].iloc[0], result.metadata["height"].iloc[0]) == 96


def test_a_picture_still_renders_with_such_a_backend(folder: Path, tmp_path: Path) -> None:
    result = rendered(folder, tmp_path, {"image": "portrait.jpg", "audio": "hello.wav"})
    assert result.failures.empty


def test_other_backends_say_that_they_take_pictures_only(
    avatar: RunAvatar, folder: Path, tmp_path: Path
) -> None:
    (folder / "table.csv").write_text("video,audio\ntalk.mp4,hello.wav\n")
    code, _ = avatar("render", folder / "table.csv", f"storage.root={tmp_path}")
    assert code == 1
    failures = (tmp_path / "datasets/table/failures.csv").read_text()
    assert (
        "column `video`: backend preview renders from pictures only; give `image`, or choose a backend "
        "that takes "
        "footage"
    ) in failures


def test_bad_footage_fails_its_row(folder: Path, inputs: Path, tmp_path: Path) -> None:
    write_footage(tmp_path / "nobody.mp4", write_landscape(tmp_path / "nobody.png"))
    (tmp_path / "text.mp4").write_text("Not a video at all.")
    expected = {
        "nobody.mp4": ("reference", "no face"),
        "text.mp4": ("ingest", f"video {tmp_path}/text.mp4: is a text; allowed: MP4, MOV, WebM"),
        "absent.mp4": ("ingest", f"{tmp_path}/absent.mp4: no such file"),
    }
    for name, (stage, fragment) in expected.items():
        row = {"video": str(tmp_path / name), "audio": "hello.wav"}
        (failure,) = rendered(folder, tmp_path / "store", row).failures.to_dict("records")
        assert failure["failed_stage"] == stage
        assert fragment in failure["error"].lower() if stage == "reference" else fragment in failure["error"]


def test_damaged_footage_in_the_store_is_taken_in_again(folder: Path, tmp_path: Path) -> None:
    row = {"video": "talk.mp4", "audio": "hello.wav"}
    first = rendered(folder, tmp_path, row)
    flip_byte(next((tmp_path / "assets").rglob("*.mp4")))
    for path in (tmp_path / "stages/decode").rglob("*.mp4"):
        path.unlink()
    watcher = Watcher()
    second = rendered(folder, tmp_path, row, watcher)
    assert watcher.counts["ingest"] == 1
    assert second.metadata["sha256"].tolist() == first.metadata["sha256"].tolist()


def top_rows(result: Result, num_frames: int) -> list[int]:
    """Which frame of the footage each frame of the clip stands on."""
    assert result.failures.empty, result.failures["error"].tolist()
    frames = read_video(Path(result.dataset) / result.metadata["file_name"].iloc[0])
    return [round((frame[4].mean() - 20) / (200 // num_frames)) for frame in frames]


def test_movement_keeps_its_speed(folder: Path, tmp_path: Path) -> None:
    """Footage of 50 and of 12.5 frames a second in a clip of 25, and of 25 in one of 12.5."""
    expected = {50: [0, 2, 4, 6, 8, 10, 12, 14], 12.5: [i // 2 for i in range(15)]}
    for rate, frames in expected.items():
        write_footage(tmp_path / f"{rate}.mp4", folder / "portrait.jpg", 16, rate)
        result = rendered(
            folder, tmp_path / "store", {"video": str(tmp_path / f"{rate}.mp4"), "audio": "hello.wav"}
        )
        assert top_rows(result, 16)[: len(frames)] == frames
    row = {"video": "talk.mp4", "audio": "hello.wav"}
    slow = rendered(folder, tmp_path / "store", row, video={"fps": 12.5})
    assert top_rows(slow, NUM_FRAMES)[:4] == [0, 2, 4, 6]


def test_a_backend_may_take_frames_in_turn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FootageBackend, "frames_in_turn", True)
    write_footage(tmp_path / "fast.mp4", folder / "portrait.jpg", 16, 50)
    row = {"video": str(tmp_path / "fast.mp4"), "audio": "hello.wav"}
    assert top_rows(rendered(folder, tmp_path / "store", row), 16) == list(range(15))


def test_the_clips_rate_is_in_the_key_of_footage_and_not_of_a_picture(folder: Path, tmp_path: Path) -> None:
    for column, name, differs in (("video", "talk.mp4", True), ("image", "portrait.jpg", False)):
        row = {column: str(folder / name), "audio": str(folder / "hello.wav")}
        config = {
            "rows": [{**row, "fps": fps} for fps in (25, 30)],
            "storage": {"root": str(tmp_path)},
            "backend": {"name": "footage"},
        }
        first, second = open_known(config).clips
        assert first.items["face"].key == second.items["face"].key
        assert (first.items["reference"].key != second.items["reference"].key) is differs


def test_a_warning_of_ingest_is_shown_and_kept(inputs: Path, tmp_path: Path) -> None:
    with Image.open(inputs / "portrait.jpg") as picture:
        picture.save(tmp_path / "a.jpg", icc_profile=b"not a profile")
    row = {"image": str(tmp_path / "a.jpg"), "audio": str(inputs / "hello.wav")}
    for _ in range(2):
        watcher = Watcher()
        render({"rows": [row], "storage": {"root": str(tmp_path / "store")}}, watcher)
        (warning,) = watcher.warnings
        assert warning.startswith(f"image {tmp_path}/a.jpg: its colour profile is ignored: ")
    assert attempts(tmp_path / "store", "ingest")["warning"].dropna().tolist() == [warning.partition(": ")[2]]
