"""Equal inputs give equal results in every stage, whatever lies in memory that nobody has written."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.media.image import load_image
from avatar_core.media.video import Sound, VideoWriter
from tests.perturbed import FILLS, in_fresh_processes
from tests.rendered_items import BACKENDS, described
from tests.sample_rows import speech, write_picture, write_recording


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_picture(tmp_path / "portrait.jpg", side=208)
    write_picture(tmp_path / "closeup.png", "closeup", side=211)
    write_picture(tmp_path / "pair.jpg", "two_people", side=400)
    write_recording(tmp_path / "hello.wav", 0.5, 0.48)
    write_recording(tmp_path / "again.wav", 1.5, 0.4)
    write_recording(tmp_path / "long.wav", 0.3, 1.6)
    write_film(tmp_path / "film.mp4", load_image(tmp_path / "portrait.jpg"))
    return tmp_path


def write_film(path: Path, still: NDArray[np.uint8]) -> None:
    """Half a second of somebody who drifts across the picture and is heard to speak."""
    still = still[: still.shape[0] // 2 * 2, : still.shape[1] // 2 * 2]
    samples, rate = speech(0.5, 0.48)
    sound = Sound(iter([(samples[:, None] / 2**15).astype(np.float32)]), rate, 1)
    with VideoWriter(path, still.shape[1], still.shape[0], 25, sound) as writer:
        for step in range(12):
            writer.write_frame(np.roll(still, step, axis=1))


def test_what_is_compared_tells_films_apart(folder: Path) -> None:
    still = load_image(folder / "portrait.jpg").copy()
    write_film(folder / "again.mp4", still)
    still[:16, :16] ^= 0x40
    write_film(folder / "other.mp4", still)
    film, again, other = (
        described(folder, {"key": "film", "data": f"{name}.mp4"}) for name in ("film", "again", "other")
    )
    assert film == again
    assert film["frames"] != other["frames"]


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_every_item_has_one_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(folder / "weights"))
    first, *others = in_fresh_processes("tests.rendered_items", folder, *BACKENDS)
    assert {name.split()[0] for name in first} == set(BACKENDS)
    assert all(item["status"] == "ok" for item in first.values())
    for fill, other in zip(FILLS[1:], others, strict=True):
        assert other.keys() == first.keys()
        differing = {name for name in first if other[name] != first[name]}
        assert not differing, f"with memory filled with {fill}"
