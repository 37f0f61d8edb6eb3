"""Layers that the picture networks share."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvNorm(nn.Module):
    """Convolution that keeps the size, batch normalisation, leaky ReLU (slope 0: ReLU); `dim` axes."""

    def __init__(
        self, dim: int, in_channels: int, out_channels: int, kernel_size: int = 3, slope: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = _CONV[dim](in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm: nn.Module = _NORM[dim](out_channels)
        self.slope = slope

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.conv(hidden)), self.slope)

    def fold(self) -> None:
        """The normalisation becomes part of the convolution; only in eval mode."""
        if isinstance(self.norm, nn.BatchNorm2d | nn.BatchNorm3d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


def fold_norms(model: nn.Module) -> None:
    """In place, wherever a batch normalisation directly follows its convolution."""
    for module in list(model.modules()):
        if isinstance(module, ConvNorm):
            module.fold()


def channels_last(model: nn.Module) -> None:
    """In place: convolutions keep the channels of a pixel together, as tensor cores read them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def count(state: Iterable[str], pattern: str) -> int:
    """How many blocks a state has whose names begin with `pattern` and a number: `blocks.` -> 0, 1, ..."""
    numbers = {name.removeprefix(pattern).partition(".")[0] for name in state if name.startswith(pattern)}
    return len(numbers)


def rows(state: Mapping[str, Tensor], names: Iterable[str]) -> tuple[int, ...]:
    """First axis (output channels) of each tensor."""
    return tuple(state[name].shape[0] for name in names)


def spatial_grid(*sizes: int, device: torch.device | str) -> Tensor:
    """(*sizes, axes) in -1 .. 1 from first to last entry of each axis, the last axis (x) first."""
    axes = [torch.linspace(-1, 1, size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
