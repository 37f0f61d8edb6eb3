"""SPADE decoder: from the warped feature map to the picture of a face."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import instance_norm, interpolate, leaky_relu

from avatar_core.backends.ditto.layers import count, rows

_SLOPE = 0.2


@dataclass(frozen=True)
class DecoderConfig:
    """`channels` of the middle blocks and after each doubling; `upscale` of the last layer."""

    feature_channels: int = 256
    channels: tuple[int, ...] = (512, 256, 64)
    num_middle: int = 6
    label_channels: int = 128
    upscale: int = 2

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "DecoderConfig":
        """Of a state with folded spectral norms."""
        doublings = range(count(state, "up_"))
        channels, feature_channels = state["fc.weight"].shape[:2]
        return cls(
            feature_channels=feature_channels,
            channels=(channels, *rows(state, [f"up_{i}.conv_0.weight" for i in doublings])),
            num_middle=count(state, "G_middle_"),
            label_channels=state["G_middle_0.norm_0.mlp_shared.0.weight"].shape[0],
            upscale=round((state["conv_img.0.weight"].shape[0] / 3) ** 0.5),
        )


class _Spade(nn.Module):
    """Instance normalisation whose scale and shift are read from the feature map."""

    def __init__(self, channels: int, config: DecoderConfig) -> None:
        super().__init__()
        label = config.label_channels
        self.mlp_shared = nn.Sequential(nn.Conv2d(config.feature_channels, label, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(label, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(label, channels, 3, padding=1)

    def forward(self, hidden: Tensor, feature: Tensor) -> Tensor:
        """`feature` already has the size of `hidden`."""
        shared = self.mlp_shared(feature)
        return torch.addcmul(self.mlp_beta(shared), instance_norm(hidden), 1 + self.mlp_gamma(shared))


class _Block(nn.Module):
    def __init__(self, fin: int, fout: int, config: DecoderConfig) -> None:
        super().__init__()
        middle = min(fin, fout)
        self.conv_0 = nn.Conv2d(fin, middle, 3, padding=1)
        self.conv_1 = nn.Conv2d(middle, fout, 3, padding=1)
        self.norm_0 = _Spade(fin, config)
        self.norm_1 = _Spade(middle, config)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = nn.Conv2d(fin, fout, 1, bias=False)
            self.norm_s = _Spade(fin, config)

    def forward(self, hidden: Tensor, feature: Tensor) -> Tensor:
        feature = interpolate(feature, size=hidden.shape[-2:], mode="nearest")
        shortcut = self.conv_s(self.norm_s(hidden, feature)) if self.learned_shortcut else hidden
        change = self.conv_0(leaky_relu(self.norm_0(hidden, feature), _SLOPE))
        change = self.conv_1(leaky_relu(self.norm_1(change, feature), _SLOPE))
        return shortcut + change


class SpadeDecoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.fc = nn.Conv2d(config.feature_channels, channels[0], 3, padding=1)
        for i in range(config.num_middle):
            self.add_module(f"G_middle_{i}", _Block(channels[0], channels[0], config))
        for i, (wide, narrow) in enumerate(pairwise(channels)):
            self.add_module(f"up_{i}", _Block(wide, narrow, config))
        self.conv_img = nn.Sequential(
            nn.Conv2d(channels[-1], 3 * config.upscale**2, 3, padding=1), nn.PixelShuffle(config.upscale)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, 8h, 8w) RGB in 0..1, float32."""
        hidden = self.fc(feature)
        for i in range(self.config.num_middle):
            hidden = self.get_submodule(f"G_middle_{i}")(hidden, feature)
        for i in range(len(self.config.channels) - 1):
            doubled = interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = self.get_submodule(f"up_{i}")(doubled, feature)
        picture: Tensor = self.conv_img(leaky_relu(hidden, _SLOPE))
        return picture.float().sigmoid()
