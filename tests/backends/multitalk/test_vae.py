import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatar_core.backends.multitalk.backend import MultiTalkBackend
from avatar_core.backends.multitalk.config import DenoiseConfig, MultiTalkConfig
from avatar_core.backends.multitalk.stages import MultiTalkDecode
from avatar_core.backends.multitalk.vae import (
    build_vae,
    decode_window,
    encode,
    encode_condition,
    vae_name_map,
)
from avatar_core.backends.multitalk.window_decoder import WindowDecoder, as_frame
from avatar_core.checkpoint import rename, undo_rename
from avatar_core.stages.base import Tensors

SIZES = {"base_dim": 4, "num_res_blocks": 1}
WINDOW, MOTION = 9, 5


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_vae(SIZES).eval().requires_grad_(False)


def frames(count: int, height: int = 32, width: int = 48) -> Tensor:
    """[1, 3, count, H, W] in -1..1."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(1, 3, count, height, width, generator=generator) * 2 - 1


def latents(seed: int, num_frames: int = 3) -> Tensor:
    return torch.randn(16, num_frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)


# --- conditions


@pytest.mark.parametrize("given", [1, 5, 9])
def test_the_mask_marks_the_frames_that_are_given(vae: nn.Module, given: int) -> None:
    condition = encode_condition(vae, frames(given), 13)
    assert condition.shape == (1, 20, 4, 4, 6)
    known = 1 + (given - 1) // 4
    assert condition[0, :4, :known].min() == 1
    assert condition[0, :4, known:].max() == 0


def test_a_part_of_a_latent_frame_can_be_given(vae: nn.Module) -> None:
    mask = encode_condition(vae, frames(3), 9)[0, :4, :, 0, 0]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]


def test_latents_of_what_is_given_do_not_depend_on_what_follows(vae: nn.Module) -> None:
    given = frames(5)
    condition = encode_condition(vae, given, 13)[:, 4:]
    assert (condition[:, :, :2] - encode(vae, given)).abs().max() < 1e-5
    grey = torch.cat([given, torch.zeros(1, 3, 8, 32, 48)], dim=2)
    assert torch.equal(condition, encode(vae, grey))


def test_latents_are_scaled_by_channel(vae: Any) -> None:
    plain = vae.encode(frames(5)).latent_dist.mode()
    mean, deviation = (torch.tensor(v) for v in (vae.config.latents_mean, vae.config.latents_std))
    scaled = (plain - mean.view(1, -1, 1, 1, 1)) / deviation.view(1, -1, 1, 1, 1)
    assert torch.allclose(encode(vae, frames(5)), scaled)
    decoded = vae.decode(plain).sample[0].clamp(-1, 1)
    assert (decode_window(vae, encode(vae, frames(5))[0]) - decoded).abs().max() < 1e-5


# --- frames


def test_decoded_frames_follow_each_other_causally(vae: nn.Module) -> None:
    """The first latents of a longer window give the same frames."""
    long = latents(0, 4)
    assert decode_window(vae, long).shape == (3, 13, 32, 48)
    assert (decode_window(vae, long[:, :2]) - decode_window(vae, long)[:, :5]).abs().max() < 1e-5


def test_levels_are_cut_off_not_rounded(vae: nn.Module) -> None:
    decoder = WindowDecoder(vae, "cpu")
    pixels = decoder.pixels(latents(1).numpy(), picture(), 1.0, parity=False)
    written = decoder.frames(latents(1).numpy(), picture(), 1.0, parity=False)
    assert written.shape == (9, 32, 48, 3)
    expected = np.floor((pixels.double().numpy() + 1) / 2 * 255).transpose(1, 2, 3, 0)
    assert np.abs(written - expected).max() <= 1
    assert (written == expected).mean() > 0.999


def test_a_picture_becomes_a_frame() -> None:
    frame = as_frame(np.array([[[0, 51, 255]]], np.uint8))
    assert frame.shape == (3, 1, 1)
    assert frame.flatten().tolist() == pytest.approx([-1, -0.6, 1])


# --- clips of many windows


class Windows(Sequence[Tensors]):
    """As the store has them: read when they are asked for."""

    def __init__(self, count: int) -> None:
        self.asked: list[int] = []
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if number >= self._count:
            raise IndexError(number)
        self.asked.append(number)
        return {"latents": latents(number).numpy()}


def clip(decoder: WindowDecoder, windows: Sequence[Tensors]) -> Iterator[np.ndarray]:
    config = MultiTalkConfig(denoise=DenoiseConfig(window_frames=WINDOW, motion_frames=MOTION))
    decode = MultiTalkDecode(MultiTalkBackend(config), config.checkpoint, config.denoise)
    return decode.frames(decoder, picture(), windows, config.decode)


def test_a_window_is_decoded_when_its_frames_are_asked_for(vae: nn.Module) -> None:
    windows = Windows(4)
    iterator = clip(WindowDecoder(vae, "cpu"), windows)
    assert windows.asked == []
    for number in range(4):
        new = WINDOW if number == 0 else WINDOW - MOTION
        assert all(next(iterator).shape == (32, 48, 3) for _ in range(new))
        assert windows.asked == list(range(number + 1))
    assert list(iterator) == []


def test_frames_shared_with_the_window_before_are_left_out(vae: nn.Module) -> None:
    decoder = WindowDecoder(vae, "cpu")
    whole = [decoder.frames(latents(n).numpy(), picture(), 1.0, parity=False) for n in range(3)]
    expected = np.concatenate([whole[0], whole[1][MOTION:], whole[2][MOTION:]])
    assert np.array_equal(np.stack(list(clip(decoder, Windows(3)))), expected)


class Remembering(WindowDecoder):
    """Knows which of its results are still held by anybody."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, "cpu")
        self._made: list[weakref.ref[Any]] = []

    def frames(self, *args: Any, **options: Any) -> Any:
        return self._noted(super().frames(*args, **options))

    def pixels(self, *args: Any, **options: Any) -> Any:
        return self._noted(super().pixels(*args, **options))

    def held(self) -> list[Any]:
        return [each for made in self._made if (each := made()) is not None]

    def _noted(self, result: Any) -> Any:
        self._made.append(weakref.ref(result))
        return result


def test_memory_does_not_grow_with_the_clip(vae: Any) -> None:
    """Only whole levels are kept, of the window that is shown and until its first frame of the one before;
    of the autoencoder's own state nothing."""
    decoder = Remembering(vae)
    for _ in clip(decoder, Windows(6)):
        kinds = [each.dtype for each in decoder.held()]
        assert set(kinds) == {np.dtype(np.uint8)}
        assert len(kinds) <= 2
        assert not any(isinstance(each, Tensor) for each in vae._feat_map)


# --- names


def test_names_go_there_and_back() -> None:
    state = build_vae(SIZES).state_dict()
    official = undo_rename(state, vae_name_map(SIZES))
    assert {"encoder.conv1.weight", "decoder.middle.1.to_qkv.weight", "conv2.bias"} <= official.keys()
    assert not any("resnets" in name or "sampler" in name for name in official)
    back = rename(official, vae_name_map(SIZES))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_every_official_tensor_has_a_place() -> None:
    """194 of them, which the published code numbers anew in every stage."""
    sources = {entry.source for entry in vae_name_map()}
    assert len(sources) == 194
    assert "decoder.upsamples.14.residual.6.bias" in sources
    assert "decoder.upsamples.3.resample.1.weight" in sources
    assert "encoder.downsamples.9.shortcut.weight" not in sources
