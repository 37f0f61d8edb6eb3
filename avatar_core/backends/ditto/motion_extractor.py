"""Motion extractor: ConvNeXt-V2 with one head for each part of a face's pose, expression and key points."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.layers import count, rows

HEADS = ("pitch", "yaw", "roll", "t", "exp", "scale", "kp")
_EPS = 1e-6


@dataclass(frozen=True)
class MotionExtractorConfig:
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    num_kp: int = 21
    num_bins: int = 66

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "MotionExtractorConfig":
        stages = range(count(state, "detector.stages."))
        return cls(
            depths=tuple(count(state, f"detector.stages.{i}.") for i in stages),
            dims=rows(state, [f"detector.stages.{i}.0.dwconv.weight" for i in stages]),
            num_kp=state["detector.fc_kp.weight"].shape[0] // 3,
            num_bins=state["detector.fc_yaw.weight"].shape[0],
        )

    @property
    def head_sizes(self) -> dict[str, int]:
        angles = dict.fromkeys(("pitch", "yaw", "roll"), self.num_bins)
        return angles | {"t": 3, "exp": 3 * self.num_kp, "scale": 1, "kp": 3 * self.num_kp}


class _ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.movedim(1, -1)).movedim(-1, 1)


class _GlobalResponseNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H, W, C)."""
        response = torch.linalg.vector_norm(hidden, dim=(1, 2), keepdim=True, dtype=torch.float32)
        response = response / (response.mean(dim=-1, keepdim=True) + _EPS)
        return self.gamma * (hidden * response.to(hidden.dtype)) + self.beta + hidden


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = _GlobalResponseNorm(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.norm(self.dwconv(hidden).permute(0, 2, 3, 1))
        rows = self.pwconv2(self.grn(nn.functional.gelu(self.pwconv1(rows))))
        return hidden + rows.permute(0, 3, 1, 2)


class _ConvNext(nn.Module):
    def __init__(self, config: MotionExtractorConfig) -> None:
        super().__init__()
        dims = config.dims
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), _ChannelsFirstNorm(dims[0], eps=_EPS))
        halvings = [
            nn.Sequential(_ChannelsFirstNorm(narrow, eps=_EPS), nn.Conv2d(narrow, wide, 2, stride=2))
            for narrow, wide in pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(dim) for _ in range(depth)))
            for dim, depth in zip(dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=_EPS)
        for name, size in config.head_sizes.items():
            self.add_module(f"fc_{name}", nn.Linear(dims[-1], size))

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            hidden = stage(downsample(hidden))
        pooled = self.norm(hidden.mean(dim=(-2, -1)))
        return {name: self.get_submodule(f"fc_{name}")(pooled).float() for name in HEADS}


class MotionExtractor(nn.Module):
    def __init__(self, config: MotionExtractorConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = _ConvNext(config)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) RGB in 0..1 -> pitch, yaw, roll (B, bins) logits; t (B, 3); exp, kp (B, 3 x points);
        scale (B, 1); float32, in this order."""
        motion: dict[str, Tensor] = self.detector(pictures)
        return motion
