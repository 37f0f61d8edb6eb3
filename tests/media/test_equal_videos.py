"""Equal frames and sound give equal files, whatever lies in memory that nobody has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.perturbed import in_fresh_processes


def variants(folder: Path, size: str, presets: Sequence[str], **options: Any) -> dict[str, int]:
    """How many different files there are, by size and preset."""
    cases = [f"{size}:{preset}" for preset in presets]
    found = in_fresh_processes("tests.media.varied_videos", folder, *cases, **options)
    return {case: len({hashes[case] for hashes in found}) for case in cases}


def test_a_video_has_one_file(tmp_path: Path) -> None:
    assert variants(tmp_path, "208x208", ["medium"], fills=(1, 85, 170)) == {"208x208:medium": 1}


@pytest.mark.drill
@pytest.mark.parametrize("size", ["832x480", "208x208", "322x242", "400x400"])
def test_every_video_has_one_file(tmp_path: Path, size: str) -> None:
    found = variants(tmp_path, size, ["veryfast", "medium"])
    assert found == {f"{size}:veryfast": 1, f"{size}:medium": 1}
