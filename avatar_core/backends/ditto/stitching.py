"""Stitching network: moves the driving key points so that the face fits the picture it is put back into."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.layers import rows


@dataclass(frozen=True)
class StitchingConfig:
    num_kp: int = 21
    hidden_sizes: tuple[int, ...] = (128, 128, 64)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "StitchingConfig":
        names = [name for name in state if name.endswith(".weight")]
        ordered = sorted(names, key=lambda name: int(name.split(".")[1]))
        return cls(num_kp=state[ordered[0]].shape[1] // 6, hidden_sizes=rows(state, ordered[:-1]))


class StitchingNetwork(nn.Module):
    def __init__(self, config: StitchingConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (6 * config.num_kp, *config.hidden_sizes)
        layers: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 3 * config.num_kp + 2))

    def forward(self, source: Tensor, driving: Tensor) -> Tensor:
        """Both (B, points, 3); the driving points, moved each by itself and all together across and down."""
        change = self.mlp(torch.cat([source.flatten(1), driving.flatten(1)], dim=1))
        each, together = change[:, :-2].view_as(driving), change[:, None, -2:]
        return driving + each + nn.functional.pad(together, (0, 1))
