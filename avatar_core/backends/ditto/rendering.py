"""Frames from key points: stitching, warping of the appearance volume, decoder; some frames at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from avatar_core.backends.ditto.motion_vector import Array
from avatar_core.backends.ditto.spade_decoder import SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingNetwork
from avatar_core.backends.ditto.warp import WarpingNetwork

_CPU_VOLUME_ELEMENTS = 2**20
"""Of the volumes rendered at once on a CPU. A published checkpoint's has twice as many: five such frames at
once, beyond the caches, were seen to take 1.14 times as long as one by one, while small ones gain."""


class Renderer:
    """`stitching` fits the driven face to the picture; without it key points are taken as they are."""

    def __init__(
        self, stitching: StitchingNetwork | None, warping: WarpingNetwork, decoder: SpadeDecoder
    ) -> None:
        self._stitching, self._warping, self._decoder = stitching, warping, decoder
        parameter = next(warping.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self._batch_frames: int | None = None

    def compile(self, batch_frames: int) -> None:
        """The networks become code for batches of this size, which takes a while with the first one; smaller
        batches are filled up. Does nothing on a CPU."""
        if self.device.type == "cuda":
            self._batch_frames = batch_frames
            self._warping.compile(dynamic=False)
            self._decoder.compile(dynamic=False)

    def volumes(self, features: Array) -> Tensor:
        """Appearance volumes [n, 32, 16, 64, 64] of a source, where they are used."""
        return torch.from_numpy(features).to(self.device, self._dtype)

    @torch.inference_mode()
    def render(
        self,
        volumes: Tensor,
        x_s: Array,
        x_d: Array,
        source_frames: Sequence[int],
    ) -> Tensor:
        """[k, 512, 512, 3] float32, 0..255, on the renderer's device, for key points [k, 21, 3] and the index
        of the source's volume for each frame."""
        source, driving = (torch.from_numpy(points).to(self.device) for points in (x_s, x_d))
        if self._stitching is not None:
            driving = self._stitching(source, driving)
        rows = list(range(len(x_s)))
        if self._batch_frames is not None:
            rows += rows[-1:] * (self._batch_frames - len(rows))
        on_gpu = self.device.type == "cuda"
        size = len(rows) if on_gpu else max(1, _CPU_VOLUME_ELEMENTS // volumes[0].numel())
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        images = [self._pictures(volumes, source, driving, part, source_frames) for part in parts]
        return torch.cat(images)[: len(x_s)].permute(0, 2, 3, 1) * 255

    def _pictures(
        self, volumes: Tensor, source: Tensor, driving: Tensor, rows: list[int], source_frames: Sequence[int]
    ) -> Tensor:
        if len(volumes) == 1:
            volume = volumes.expand(len(rows), -1, -1, -1, -1)
        else:
            volume = volumes[[source_frames[row] for row in rows]]
        picture: Tensor = self._decoder(self._warping(volume, source[rows], driving[rows]).feature)
        return picture.clamp(0, 1)
