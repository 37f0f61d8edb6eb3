"""Appearance extractor: from a face picture to the feature volume that every frame is warped from."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.layers import ConvNorm, count, rows


@dataclass(frozen=True)
class AppearanceConfig:
    """`channels` after `first` and each halving; the volume has `feature_channels` x `depth`."""

    channels: tuple[int, ...] = (64, 128, 256)
    feature_channels: int = 32
    depth: int = 16
    num_resblocks: int = 6

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "AppearanceConfig":
        halvings = count(state, "down_blocks.")
        names = ["first.conv.weight", *(f"down_blocks.{i}.conv.weight" for i in range(halvings))]
        feature_channels = state["resblocks_3d.3dr0.conv1.weight"].shape[0]
        return cls(
            channels=rows(state, names),
            feature_channels=feature_channels,
            depth=state["second.weight"].shape[0] // feature_channels,
            num_resblocks=count(state, "resblocks_3d.3dr"),
        )


class _ResBlock3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        hidden = self.conv1(torch.relu(self.norm1(volume)))
        return volume + self.conv2(torch.relu(self.norm2(hidden)))


class AppearanceExtractor(nn.Module):
    def __init__(self, config: AppearanceConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.first = ConvNorm(2, 3, channels[0])
        self.down_blocks = nn.ModuleList(ConvNorm(2, narrow, wide) for narrow, wide in pairwise(channels))
        self.second = nn.Conv2d(channels[-1], config.feature_channels * config.depth, 1)
        blocks = {f"3dr{i}": _ResBlock3d(config.feature_channels) for i in range(config.num_resblocks)}
        self.resblocks_3d = nn.ModuleDict(blocks)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in 0..1 -> (B, C, D, H/4, W/4)."""
        hidden = self.first(pictures)
        for block in self.down_blocks:
            hidden = nn.functional.avg_pool2d(block(hidden), 2)
        hidden = self.second(hidden)
        volume = hidden.unflatten(1, (self.config.feature_channels, self.config.depth))
        for block in self.resblocks_3d.values():
            volume = block(volume)
        return volume
