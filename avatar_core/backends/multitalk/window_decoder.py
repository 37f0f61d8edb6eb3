"""Latents of a window to its frames."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_core.backends.multitalk.colour import match_colour
from avatar_core.backends.multitalk.vae import decode_window

Picture = NDArray[np.uint8]


class WindowDecoder:
    def __init__(self, vae: Any, device: str) -> None:
        self._vae = vae
        self._device = device

    def frames(
        self, latents: NDArray[np.float32], picture: Picture, colour_correction: float, *, parity: bool
    ) -> Picture:
        """[frames, H, W, 3] of latents [16, T, h, w]; `picture` [H, W, 3] is what colours are drawn to."""
        frames = self.pixels(latents, picture, colour_correction, parity=parity)
        rounded = ((frames + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
        return np.asarray(rounded.permute(1, 2, 3, 0).cpu().numpy())

    @torch.inference_mode()
    def pixels(
        self, latents: NDArray[np.float32], picture: Picture, colour_correction: float, *, parity: bool
    ) -> Tensor:
        """The same as [3, frames, H, W] in -1..1."""
        frames = decode_window(self._vae, torch.from_numpy(np.array(latents)).to(self._device))
        reference = as_frame(picture).to(frames.device)
        return match_colour(frames, reference, colour_correction, parity=parity)


def as_frame(picture: Picture) -> Tensor:
    """[3, H, W] in -1..1."""
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5) * 2
