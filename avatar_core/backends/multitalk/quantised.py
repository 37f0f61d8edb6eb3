"""Linear layers whose weights are int8 or float8 with a scale for each row, multiplied out in use.

The official files are in the format of optimum-quanto: a map of modules, and for each of them its data, its
scales and two constants.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avatar_core.checkpoint import Rename
from avatar_core.errors import WeightsError

SCALE = ".scale"
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_KINDS = {"qint8": "int8", "qfloat8_e4m3fn": "fp8", "qfloat8": "fp8"}
_MAP_NAMES = {"int8": "qint8", "fp8": "qfloat8_e4m3fn"}
_TABLES = ("token_embedding", "pos_embedding.embedding")  # of two dimensions, but no linear layers
_DATA, _SCALE, _CONSTANTS = ".weight._data", ".weight._scale", (".input_scale", ".output_scale")


class QuantisedLinear(nn.Module):
    """`weight` (out, in) in int8 or float8, `scale` (out, 1); computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        weight = self.weight.to(dtype) * self.scale.to(dtype)
        return nn.functional.linear(hidden_states, weight, None if self.bias is None else self.bias.to(dtype))


def quantise_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows of a weight in the dtype, and the scale of each."""
    dtype = DTYPES[kind]
    largest = 127 if kind == "int8" else torch.finfo(dtype).max
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
    levels = weight.float() / scale
    return (levels.round() if kind == "int8" else levels).to(dtype), scale


def cast_weights(model: nn.Module, kind: str) -> None:
    """The linear layers of a model's blocks, in place."""
    blocks: Any = model.get_submodule("blocks")
    for name, linear in [(n, m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear)]:
        stored = _stored(linear, DTYPES[kind])
        data, scale = quantise_weight(linear.weight.data, kind)
        stored.weight.data, stored.scale.data = data, scale
        if stored.bias is not None:
            stored.bias.data = linear.bias.data
        blocks.set_submodule(name, stored)


def store_quantised(model: nn.Module, modules: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the model, on the meta device, places for quantised weights of these modules."""
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), name
        model.set_submodule(name, _stored(linear, dtypes[name]))


def _stored(linear: nn.Linear, dtype: torch.dtype) -> QuantisedLinear:
    with torch.device(linear.weight.device):
        return QuantisedLinear(
            linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=dtype
        )


def read_quantised(state: Mapping[str, Tensor], quantisation_map: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official state with `<module>.weight` in int8 or float8 and `<module>.scale` beside it. Raises
    `WeightsError` for a map that says anything else."""
    read = dict(state)
    for module, entry in quantisation_map.items():
        kind = entry.get("weights") if isinstance(entry, Mapping) else None
        if kind not in _KINDS or entry.get("activations", "none") != "none":
            raise WeightsError(
                f"module {module} is quantised as {entry}; allowed are weights in {[*_KINDS]} alone"
            )
        try:
            data, scale = read.pop(module + _DATA), read.pop(module + _SCALE)
        except KeyError as error:
            raise WeightsError(f"the quantised file lacks {error}; fetch it again") from None
        dtype = DTYPES[_KINDS[kind]]
        read[f"{module}.weight"] = data.view(dtype) if data.dtype == torch.uint8 else data.to(dtype)
        read[module + SCALE] = scale
        for constant in _CONSTANTS:
            read.pop(module + constant, None)
    return read


def scale_renames(name_map: Sequence[Rename], state: Mapping[str, Tensor]) -> list[Rename]:
    """The name map with the scales that the state has."""
    modules = {
        entry.source.removesuffix(".weight"): entry.target.removesuffix(".weight")
        for entry in name_map
        if entry.source.endswith(".weight")
    }
    return [*name_map, *(Rename(a + SCALE, b + SCALE) for a, b in modules.items() if a + SCALE in state)]


def quantise(state: Mapping[str, Tensor], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An official state in optimum-quanto's format, all its linear layers quantised, and the map of them."""
    quantised: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or module == name or module.endswith(_TABLES):
            quantised[name] = tensor
            continue
        data, scale = quantise_weight(tensor, kind)
        constants = {module + each: torch.ones(()) for each in _CONSTANTS}
        quantised |= {module + _DATA: data, module + _SCALE: scale.to(tensor.dtype), **constants}
        modules[module] = {"weights": _MAP_NAMES[kind], "activations": "none"}
    return quantised, modules
