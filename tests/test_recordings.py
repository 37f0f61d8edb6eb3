"""What becomes of long recordings, and of two in one row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sample_rows import (
    Watcher,
    only_video,
    read_video,
    render_table,
    videos,
    write_recording,
    write_table,
)

pytestmark = pytest.mark.timeout(120)

FPS = 25


@pytest.fixture(scope="module")
def long_table(inputs: Path) -> Path:
    write_recording(inputs / "long.wav", start_s=0.4, duration_s=2.3)
    return write_table(inputs / "long.csv", [{"name": "talk", "image": "portrait.jpg", "audio": "long.wav"}])


def test_a_long_recording_is_split_into_parts_that_add_up(long_table: Path, tmp_path: Path) -> None:
    result = render_table(long_table, tmp_path, audio={"max_duration_s": 1.0})
    assert result.metadata["name"].tolist() == ["talk-part1", "talk-part2", "talk-part3"]
    assert result.metadata["part"].tolist() == [0, 1, 2]
    assert result.metadata["num_frames"].sum() == np.ceil(2.3 * FPS)
    assert result.metadata["num_frames"].max() - result.metadata["num_frames"].min() <= 1
    before = videos(result.dataset)
    watcher = Watcher()
    assert (
        videos(render_table(long_table, tmp_path, watcher, audio={"max_duration_s": 1.0}).dataset) == before
    )
    assert watcher.counts == {}


def test_a_long_recording_is_trimmed_or_refused_where_that_is_asked(long_table: Path, tmp_path: Path) -> None:
    trimmed = render_table(long_table, tmp_path, audio={"max_duration_s": 1.0, "long": "trim"})
    assert trimmed.metadata["num_frames"].tolist() == [FPS]
    assert trimmed.metadata["name"].tolist() == ["talk"]
    refused = render_table(long_table, tmp_path, audio={"max_duration_s": 1.0, "long": "refuse"})
    assert "audio.max_duration_s=1" in refused.failures["error"].iloc[0]
    assert videos(refused.dataset) == {}


# --- two speakers

TWO = {"image": "two_people.jpg", "audio": "hello.wav", "audio_2": "again.wav", "seed": 1}


def movement(video: np.ndarray[Any, Any]) -> tuple[float, float]:
    """How much the left and the right half change from frame to frame."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean(axis=(0, 1, 3))
    half = len(change) // 2
    return float(change[:half].mean()), float(change[half:].mean())


@pytest.mark.parametrize(("how", "frames"), [("para", 15), ("add", 27)])
def test_two_speakers_talk_at_once_or_in_turn(inputs: Path, tmp_path: Path, how: str, frames: int) -> None:
    table = write_table(inputs / f"{how}.csv", [{**TWO, "audio_type": how}])
    result = render_table(table, tmp_path)
    assert result.failures.empty
    video = read_video(only_video(result))
    assert len(video) == frames
    assert min(movement(video)) > 0


def test_the_order_of_boxes_says_who_speaks(inputs: Path, tmp_path: Path) -> None:
    left, right = [0, 0, 200, 200], [200, 0, 400, 200]
    params = '{"head_motion": 0, "blinks": false}'
    rows = [
        {**TWO, "name": name, "audio_type": "add", "params": params, "bbox": str(boxes)}
        for name, boxes in (("left_first", [left, right]), ("right_first", [right, left]))
    ]
    result = render_table(write_table(inputs / "boxes.csv", rows), tmp_path)
    assert result.failures.empty
    for name, first in (("left_first", 0), ("right_first", 1)):
        video = read_video(Path(result.dataset) / "videos" / f"{name}.mp4")
        beginning, end = movement(video[:14]), movement(video[16:])
        assert beginning[first] > 1.5 * beginning[1 - first]
        assert end[1 - first] > 1.5 * end[first]
