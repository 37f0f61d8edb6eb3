"""Warping network: moves the feature volume of the source face as its key points move.

Grids are float32 throughout: half precision cannot tell neighbouring positions of a volume apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, grid_sample, interpolate

from avatar_core.backends.ditto.layers import ConvNorm, count, rows, spatial_grid

_VARIANCE = 0.01  # of a key point's heat, in squared grid units
_HOURGLASS = "dense_motion_network.hourglass"
_MASK_KERNEL = 7


@dataclass(frozen=True)
class WarpConfig:
    """`down`, `up`: output channels of the hourglass's halvings and doublings."""

    num_kp: int = 21
    feature_channels: int = 32
    depth: int = 16
    compress: int = 4
    down: tuple[int, ...] = (64, 128, 256, 512, 1024)
    up: tuple[int, ...] = (512, 256, 128, 64, 32)
    out_channels: int = 256

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "WarpConfig":
        down, up = f"{_HOURGLASS}.encoder.down_blocks.", f"{_HOURGLASS}.decoder.up_blocks."
        compress, feature_channels = state["dense_motion_network.compress.weight"].shape[:2]
        return cls(
            num_kp=state["dense_motion_network.mask.weight"].shape[0] - 1,
            feature_channels=feature_channels,
            depth=state["third.conv.weight"].shape[1] // feature_channels,
            compress=compress,
            down=rows(state, [f"{down}{i}.conv.weight" for i in range(count(state, down))]),
            up=rows(state, [f"{up}{i}.conv.weight" for i in range(count(state, up))]),
            out_channels=state["third.conv.weight"].shape[0],
        )


class WarpOutput(NamedTuple):
    """`feature` (B, C, h, w), `mask` (B, 1 + points, d, h, w), `deformation` (B, d, h, w, 3), `occlusion`
    (B, 1, h, w)."""

    feature: Tensor
    mask: Tensor
    deformation: Tensor
    occlusion: Tensor


class _Encoder(nn.Module):
    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        pairs = pairwise(channels)
        self.down_blocks = nn.ModuleList(ConvNorm(3, inner, outer) for inner, outer in pairs)

    def forward(self, volume: Tensor) -> list[Tensor]:
        """The input and the result of every halving."""
        levels = [volume]
        for block in self.down_blocks:
            levels.append(avg_pool3d(block(levels[-1]), (1, 2, 2)))
        return levels


class _Decoder(nn.Module):
    def __init__(self, levels: tuple[int, ...], up: tuple[int, ...]) -> None:
        super().__init__()
        skips = levels[-2::-1]
        inner = [levels[-1], *(a + b for a, b in zip(up, skips, strict=True))]
        self.up_blocks = nn.ModuleList(ConvNorm(3, a, b) for a, b in zip(inner, up, strict=False))
        self.conv = nn.Conv3d(inner[-1], inner[-1], 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm3d(inner[-1])
        self.out_channels = inner[-1]

    def forward(self, levels: list[Tensor]) -> Tensor:
        volume = levels[-1]
        for block, skip in zip(self.up_blocks, levels[-2::-1], strict=True):
            doubled = interpolate(volume, scale_factor=(1, 2, 2), mode="nearest")
            volume = torch.cat([block(doubled), skip], dim=1)
        return torch.relu(self.norm(self.conv(volume)))


class _Hourglass(nn.Module):
    def __init__(self, in_channels: int, config: WarpConfig) -> None:
        super().__init__()
        self.encoder = _Encoder((in_channels, *config.down))
        self.decoder = _Decoder((in_channels, *config.down), config.up)

    def forward(self, volume: Tensor) -> Tensor:
        predicted: Tensor = self.decoder(self.encoder(volume))
        return predicted


class _DenseMotion(nn.Module):
    def __init__(self, config: WarpConfig) -> None:
        super().__init__()
        self.compress = nn.Conv3d(config.feature_channels, config.compress, 1)
        self.norm: nn.Module = nn.BatchNorm3d(config.compress)
        self.hourglass = _Hourglass((1 + config.num_kp) * (1 + config.compress), config)
        channels = self.hourglass.decoder.out_channels
        padding = _MASK_KERNEL // 2
        self.mask = nn.Conv3d(channels, 1 + config.num_kp, _MASK_KERNEL, padding=padding)
        self.occlusion = nn.Conv2d(channels * config.depth, 1, _MASK_KERNEL, padding=padding)

    def forward(self, volume: Tensor, source: Tensor, driving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, deformation and occlusion."""
        batch, _, *sizes = volume.shape
        grid = spatial_grid(*sizes, device=volume.device)
        motions = _sparse_motions(grid, source, driving)
        compressed = torch.relu(self.norm(self.compress(volume))).float()
        copies = compressed.repeat_interleave(motions.shape[1], dim=0)
        moved = grid_sample(copies, motions.flatten(0, 1), align_corners=False)
        heat = _heat(grid, driving) - _heat(grid, source)
        heat = nn.functional.pad(heat, (0, 0) * 3 + (1, 0))  # the background has none
        seen = torch.cat([heat[:, :, None], moved.unflatten(0, (batch, -1))], dim=2)
        predicted = self.hourglass(seen.flatten(1, 2).to(volume.dtype))
        mask = self.mask(predicted).float().softmax(dim=1)
        deformation = torch.einsum("bkdhw,bkdhwc->bdhwc", mask, motions)
        occlusion = self.occlusion(predicted.flatten(1, 2)).float().sigmoid()
        return mask, deformation, occlusion


def _sparse_motions(grid: Tensor, source: Tensor, driving: Tensor) -> Tensor:
    """(B, 1 + points, d, h, w, 3): where each position comes from if it moves with one point; first if with
    none."""
    shifts = nn.functional.pad(source - driving, (0, 0, 1, 0))
    return grid + shifts[:, :, None, None, None]


def _heat(grid: Tensor, points: Tensor) -> Tensor:
    """(B, points, d, h, w): nearness to each point."""
    distance = (grid - points[:, :, None, None, None]).square().sum(dim=-1)
    return torch.exp(-0.5 * distance / _VARIANCE)


class WarpingNetwork(nn.Module):
    def __init__(self, config: WarpConfig) -> None:
        super().__init__()
        self.config = config
        self.dense_motion_network = _DenseMotion(config)
        channels = config.out_channels
        self.third = ConvNorm(2, config.feature_channels * config.depth, channels, slope=0.01)
        self.fourth = nn.Conv2d(channels, channels, 1)

    def forward(self, volume: Tensor, source: Tensor, driving: Tensor) -> WarpOutput:
        """`volume` (B, C, d, h, w) in the dtype of the weights, h and w multiples of 2^halvings; key points
        (B, points, 3) float32."""
        mask, deformation, occlusion = self.dense_motion_network(volume, source, driving)
        moved = grid_sample(volume.float(), deformation, align_corners=False).to(volume.dtype)
        feature = self.fourth(self.third(moved.flatten(1, 2)))
        return WarpOutput(feature * occlusion.to(feature.dtype), mask, deformation, occlusion)
