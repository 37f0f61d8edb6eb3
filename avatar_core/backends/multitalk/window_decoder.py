"""Latents of a window to its frames."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_core.backends.multitalk.colour import match_colour
from avatar_core.backends.multitalk.official import load_vae
from avatar_core.backends.multitalk.vae import decode_window


class WindowDecoder:
    """`folder` is that of the base model."""

    def __init__(self, folder: Path, device: str) -> None:
        self._vae = load_vae(folder, device)
        self._device = device

    @torch.inference_mode()
    def frames(
        self, latents: NDArray[np.float32], picture: NDArray[np.uint8], colour_correction: float
    ) -> NDArray[np.uint8]:
        """[frames, H, W, 3] of latents [16, T, h, w]; `picture` [H, W, 3] is what colours are drawn to."""
        frames = decode_window(self._vae, torch.from_numpy(np.array(latents)).to(self._device))
        frames = match_colour(frames, as_frame(picture).to(frames.device), colour_correction)
        pixels = ((frames + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
        return np.asarray(pixels.permute(1, 2, 3, 0).cpu().numpy())


def as_frame(picture: NDArray[np.uint8]) -> Tensor:
    """[3, H, W] in -1..1."""
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - 0.5) * 2
