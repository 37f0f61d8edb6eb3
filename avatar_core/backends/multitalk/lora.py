"""Small changes to the official weights, merged into them when they are loaded."""

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from avatar_core.errors import WeightsError

log = logging.getLogger(__name__)

_PREFIX = "diffusion_model."
_PAIRS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"))
_SUMS = {".diff": ".weight", ".diff_b": ".bias"}


def merge_lora(
    state: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    scale: float,
    *,
    parity: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The state, under the official names, with the changes of a LoRA file `scale` times in it; what changes
    gets `dtype`. In `parity` as the published code does it: `alpha` is not heeded, pairs named A and B
    neither, and all is computed in `dtype` instead of float32. Raises `WeightsError` for a file that changes
    nothing of this model."""
    precision = dtype if parity else torch.float32
    merged = dict(state)
    unknown = []
    for name, change in _changes({n: t.to(precision) for n, t in lora.items()}, parity=parity):
        if name not in state or state[name].shape != change.shape:
            unknown.append(name)
            continue
        merged[name] = (merged[name].to(precision) + scale * change).to(dtype)
    if all(merged[name] is state[name] for name in merged):
        raise WeightsError(
            f"the LoRA has nothing for this model: {len(lora)} tensors, such as {next(iter(lora), 'none')}; "
            "give one made for Wan2.1 14B, with lora_down and lora_up"
        )
    if unknown:
        log.warning("the LoRA has %d tensors that do not fit, such as %s", len(unknown), unknown[0])
    return merged


def _changes(lora: Mapping[str, Tensor], *, parity: bool) -> Iterator[tuple[str, Tensor]]:
    """Official names, and what is to be added."""
    for name, tensor in lora.items():
        path = name.removeprefix(_PREFIX)
        for suffix, kind in _SUMS.items():
            if path.endswith(suffix):
                yield path.removesuffix(suffix) + kind, tensor
        for down, up in _PAIRS[:1] if parity else _PAIRS:
            if path.endswith(down):
                module = name.removesuffix(down)
                if module + up not in lora:
                    raise WeightsError(f"the LoRA has {name} without {module}{up}; fetch it again")
                yield f"{path.removesuffix(down)}.weight", _product(lora, module, down, up, parity=parity)


def _product(lora: Mapping[str, Tensor], module: str, down: str, up: str, *, parity: bool) -> Tensor:
    product = lora[module + up] @ lora[module + down]
    alpha = None if parity else lora.get(f"{module}.alpha")
    return product if alpha is None else product * (float(alpha) / lora[module + down].shape[0])
