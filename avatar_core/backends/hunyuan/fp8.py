"""The official float8 checkpoint: block weights in float8_e4m3fn with one scale each, dequantised in use.

    name_map = transformer_name_map(config)
    state = rename(official_state, name_map)
    check_fp8_weights(state)
    store_linears_as_fp8(transformer)       # on the meta device
    load_strict(transformer, state | official_scales(scale_map, name_map))

Such a model must not be cast: `.to(dtype)` would take the float8 weights along.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avatar_core.backends.hunyuan.transformer import HunyuanAvatarTransformer
from avatar_core.checkpoint import Rename
from avatar_core.errors import WeightsError
from avatar_core.memory import BLOCK_STACKS

WEIGHT_DTYPE = torch.float8_e4m3fn
COMPUTE_DTYPE = torch.bfloat16

_BLOCKS = "transformer_blocks."  # of both stacks
_WEIGHT = ".weight"
_SHOWN = 3


class Fp8Linear(nn.Module):
    """`weight` float8 (out, in), `scale` a number, `bias` (out,); computes in bfloat16, answers in the dtype
    of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=WEIGHT_DTYPE)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty((), dtype=COMPUTE_DTYPE), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=COMPUTE_DTYPE), requires_grad=False)

    def dequantized_weight(self) -> Tensor:
        return self.weight.to(COMPUTE_DTYPE) * self.scale.to(COMPUTE_DTYPE)

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = self.bias.to(COMPUTE_DTYPE)
        output = nn.functional.linear(hidden_states.to(COMPUTE_DTYPE), self.dequantized_weight(), bias)
        return output.to(hidden_states.dtype)


def store_linears_as_fp8(transformer: HunyuanAvatarTransformer) -> None:
    """Replace every linear layer of the two stacks of blocks; those elsewhere stay as they are."""
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        for parent in list(blocks.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    with torch.device(child.weight.device):
                        setattr(parent, name, Fp8Linear(child.in_features, child.out_features))


def cast_to_fp8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A half-precision state with the linear weights of its blocks as the official float8 file has them."""
    cast = dict(state)
    for name, tensor in state.items():
        if name.split(".")[0] in BLOCK_STACKS and name.endswith(_WEIGHT) and tensor.dim() == 2:
            largest = tensor.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            scale = (largest / torch.finfo(WEIGHT_DTYPE).max).to(COMPUTE_DTYPE)
            limit = torch.finfo(WEIGHT_DTYPE).max
            cast[name] = (tensor.float() / scale.float()).clamp(-limit, limit).to(WEIGHT_DTYPE)
            cast[name.removesuffix(_WEIGHT) + ".scale"] = scale
    return cast


def official_scales(scale_map: Mapping[str, Tensor], name_map: Sequence[Rename]) -> dict[str, Tensor]:
    """Scales under the names that `Fp8Linear` gives them, from those by official layer name.

    Layers that are cut from one official layer share its scale.
    """
    scales = {}
    unknown = set(scale_map)
    for entry in name_map:
        layer = entry.source.removesuffix(_WEIGHT)
        if layer != entry.source and layer in scale_map:
            scales[f"{entry.target.removesuffix(_WEIGHT)}.scale"] = scale_map[layer].reshape(())
            unknown.discard(layer)
    if unknown:
        raise WeightsError(
            f"the scale map names {len(unknown)} layers that the model does not have "
            f"({', '.join(sorted(unknown)[:_SHOWN])}); take the map that belongs to the float8 file"
        )
    return scales


def check_fp8_weights(state: Mapping[str, Tensor]) -> None:
    """`state` has the names used here. Raises `WeightsError` for a linear layer of a block that is not float8
    or holds nothing but zeros: another file, or a damaged or unfinished conversion."""
    weights = {name: state[name] for name in state if _BLOCKS in name and name.endswith(_WEIGHT)}
    bad = sorted(name for name, weight in weights.items() if weight.ndim == 2 and not _is_filled_fp8(weight))
    if bad:
        raise WeightsError(
            f"{len(bad)} layers of the float8 checkpoint are of another type or zero throughout "
            f"({', '.join(bad[:_SHOWN])}); fetch the file again"
        )


def _is_filled_fp8(weight: Tensor) -> bool:
    # Comparison is not defined for float8; a zero has either no bit set or the sign alone.
    return weight.dtype == WEIGHT_DTYPE and bool((weight.view(torch.uint8) & 0x7F).any())
