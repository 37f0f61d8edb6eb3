"""MultiTalk's input documents, from the file to the video."""

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avatar_core.pipeline import render
from tests.sample_rows import SAMPLES, RunAvatar, Watcher, read_video, speech, write_picture, write_recording

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_picture(folder / "two.jpg", "two_people", side=400)
    write_recording(folder / "man.wav", start_s=0.5)
    write_recording(folder / "woman.wav", start_s=1.5, duration_s=0.48)
    return folder


def two_people(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "Two people talk.",
        "cond_image": "two.jpg",
        "audio_type": "para",
        "cond_audio": {"person1": "man.wav", "person2": "woman.wav"},
        **changes,
    }


def rendered(folder: Path, store: Path, document: dict[str, Any], watcher: Watcher | None = None) -> Path:
    path = folder / "document.json"
    path.write_text(json.dumps(document))
    result = render({"table": str(path), "storage": {"root": str(store)}}, watcher)
    assert result.failures.empty, result.failures["error"].tolist()
    return Path(result.dataset) / result.metadata["file_name"].iloc[0]


def loudness(video: Path) -> float:
    with av.open(str(video)) as file:
        heard = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in file.decode(audio=0)])
    return float(np.sqrt((heard**2).mean()))


def test_a_document_is_a_table_for_the_command(avatar: RunAvatar, folder: Path, tmp_path: Path) -> None:
    (folder / "talk.json").write_text(json.dumps(two_people()))
    code, output = avatar("plan", folder / "talk.json", f"storage.root={tmp_path}")
    assert code == 0, output
    assert re.search(r"^decode +1 ", output, re.MULTILINE), output
    video = rendered(folder, tmp_path, two_people())
    assert video.name == "two-man.mp4"
    assert len(read_video(video)) == 15


def test_the_first_box_is_the_first_speakers(folder: Path, tmp_path: Path) -> None:
    """Of two faces in boxes [row_min, column_min, row_max, column_max] the one that speaks moves."""
    height, width = read_video(rendered(folder, tmp_path, two_people()))[0].shape[:2]
    left, right = [0, 0, height, width // 2], [0, width // 2, height, width]
    spoken = {"cond_audio": {"person1": "man.wav", "person2": "None"}}
    moved = []
    for boxes in ([left, right], [right, left]):
        named = dict(zip(("person1", "person2"), boxes, strict=True))
        frames = read_video(rendered(folder, tmp_path, two_people(bbox=named, **spoken, seed=1))).astype(int)
        change = np.abs(np.diff(frames, axis=0)).mean(axis=(0, 1, 3))
        moved.append(change[: width // 2].sum() > change[width // 2 :].sum())
    assert moved == [True, False]


@pytest.mark.parametrize(("audio_type", "num_frames"), [("para", 15), ("add", 30)])
def test_a_silent_speaker_lasts_as_the_other(
    folder: Path, tmp_path: Path, audio_type: str, num_frames: int
) -> None:
    recordings = {"person1": "None", "person2": "man.wav"}
    document = two_people(cond_audio=recordings, audio_type=audio_type)
    watcher = Watcher()
    video = rendered(folder, tmp_path, document, watcher)
    assert len(read_video(video)) == num_frames
    ingested = [row for stage, row in watcher.ended if stage == "ingest"]
    silent, spoken = sorted(
        (row for row in ingested if row["kind"] != "image"), key=lambda row: row["kind"], reverse=True
    )
    assert (silent["kind"], spoken["kind"]) == ("silence", "audio")
    for column in ("duration_s", "sample_rate"):
        assert silent[column] == spoken[column]


def test_beside_silence_a_voice_keeps_its_loudness(folder: Path, tmp_path: Path) -> None:
    samples, _ = speech()
    expected = np.sqrt(((samples / 32768) ** 2).mean())
    alone = rendered(folder, tmp_path, two_people(cond_audio={"person1": "None", "person2": "man.wav"}))
    assert 0.8 < loudness(alone) / expected < 1.2
    both = rendered(folder, tmp_path, two_people(cond_audio={"person1": "man.wav", "person2": "man.wav"}))
    assert 0.8 < loudness(both) / expected < 1.2


def test_nothing_outside_the_allowed_roots_is_read(avatar: RunAvatar, folder: Path, tmp_path: Path) -> None:
    """A silent speaker's length is read from a file, too."""
    document = two_people(cond_audio={"person1": "None", "person2": str(SAMPLES / "hello.wav")})
    (folder / "outside.json").write_text(json.dumps(document))
    roots = f"input.allowed_roots=[{folder}]"
    code, _ = avatar("render", folder / "outside.json", f"storage.root={tmp_path}", roots)
    failures = (tmp_path / "datasets/outside/failures.csv").read_text()
    assert code == 1
    assert "lies outside the allowed folders" in failures
