"""A clip that takes long is kept on disk as far as it is."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.hunyuan.clip_denoiser import ClipDenoiser
from avatar_core.backends.hunyuan.config import DenoiseConfig
from avatar_core.backends.hunyuan.schedules import WINDOW
from avatar_core.backends.hunyuan.tiny import TRANSFORMER, write_tiny_checkpoint
from avatar_core.errors import Cancelled
from avatar_core.memory import get_level

STEPS = 6
SIDE = 4  # of the latents

Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClipDenoiser]:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_checkpoint(folder / "hunyuan-tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_WEIGHTS", str(folder))
        yield ClipDenoiser("hunyuan-tiny/transformer", "cpu", get_level("h200"))


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return tmp_path / "unfinished" / "0123abcd"


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(
    denoiser: ClipDenoiser, unfinished: Path | None, **options: Any
) -> tuple[NDArray[np.float32], list[int]]:
    """Latents and the steps told; `stop` stops after that step."""
    stop = options.pop("stop", None)
    settings = {"num_inference_steps": STEPS, "checkpoint_steps": 2, "step_cache": "off"} | options
    steps: list[int] = []

    def report(done: int, total: int) -> None:
        steps.append(done)
        if done == stop:
            raise Cancelled("stopped by the user")

    text = {}
    for number, half in enumerate(("", "negative_")):
        text[f"{half}prompt_embeds"] = normal(1, 7, TRANSFORMER.text_embed_dim, seed=number)
        text[f"{half}prompt_mask"] = np.ones((1, 7), np.int64)
        text[f"{half}pooled_prompt_embeds"] = normal(1, TRANSFORMER.pooled_projection_dim, seed=number)
    reference = {
        "ref_latents": normal(1, TRANSFORMER.in_channels, WINDOW, SIDE, SIDE),
        "face_mask": np.ones((1, 1, 1, SIDE, SIDE), np.float32),
    }
    windows = normal(129, *TRANSFORMER.audio_window).astype(np.float16)
    config = DenoiseConfig(**settings)
    return denoiser.denoise(text, reference, windows, 25.0, 3, config, report, unfinished), steps


@pytest.fixture(scope="module")
def whole(denoiser: ClipDenoiser) -> NDArray[np.float32]:
    latents, steps = run(denoiser, None)
    assert steps == list(range(STEPS + 1))
    return latents


@pytest.mark.parametrize(("stop", "begins"), [(0, 0), (1, 0), (3, 2), (5, 4)])
def test_a_stopped_clip_goes_on_from_the_kept_step(
    denoiser: ClipDenoiser, whole: NDArray[np.float32], unfinished: Path, stop: int, begins: int
) -> None:
    with pytest.raises(Cancelled):
        run(denoiser, unfinished, stop=stop)
    latents, steps = run(denoiser, unfinished)
    assert steps == list(range(begins, STEPS + 1))
    assert np.array_equal(latents, whole)


DAMAGES: dict[str, Damage] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-5],
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "zeros, as after a power failure": lambda content: bytes(len(content)),
    "another format": lambda content: content[32:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_told_and_ignored(
    denoiser: ClipDenoiser,
    whole: NDArray[np.float32],
    unfinished: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Cancelled):
        run(denoiser, unfinished, stop=3)
    unfinished.write_bytes(DAMAGES[damage](unfinished.read_bytes()))
    with caplog.at_level(logging.WARNING):
        latents, steps = run(denoiser, unfinished)
    assert steps[0] == 0
    assert np.array_equal(latents, whole)
    assert "damaged and ignored" in caplog.text


def test_nothing_is_kept_or_read_where_that_is_not_wanted(
    denoiser: ClipDenoiser, whole: NDArray[np.float32], unfinished: Path
) -> None:
    with pytest.raises(Cancelled):
        run(denoiser, unfinished, stop=4, checkpoint_steps=0)
    assert not unfinished.exists()
    with pytest.raises(Cancelled):
        run(denoiser, unfinished, stop=4)
    assert [path.name for path in unfinished.parent.iterdir()] == [unfinished.name]
    latents, steps = run(denoiser, unfinished, checkpoint_steps=0)
    assert steps[0] == 0
    assert np.array_equal(latents, whole)


def test_a_folder_that_cannot_be_written_costs_the_state_alone(
    denoiser: ClipDenoiser, whole: NDArray[np.float32], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "unfinished").write_text("a file where the folder should be")
    latents, _ = run(denoiser, tmp_path / "unfinished" / "0123abcd")
    assert np.array_equal(latents, whole)
    assert "cannot be kept" in caplog.text
