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
    """The state, under the official names, with the changes of a LoRA file `scale` times in it. In `parity`
    as the published code does it: `alpha` is not heeded, pairs named A and B neither, and all is in `dtype`.
    Raises `WeightsError` for a file that changes nothing of this model."""
    merged = dict(state)
    unknown = []
    for name, change in _changes(lora, parity=parity):
        if name not in state or state[name].shape != change.shape:
            unknown.append(name)
            continue
        base = merged[name]
        precision = dtype if parity else torch.float32
        merged[name] = (base.to(precision) + scale * change.to(precision)).to(dtype if parity else base.dtype)
    changed = [name for name in merged if merged[name] is not state[name]]
    if not changed:
        raise WeightsError(
            f"the LoRA has nothing for this model: {len(lora)} tensors, such as {next(iter(lora), 'none')}; "
            "give one made for Wan2.1 14B, with lora_down and lora_up"
        )
    if unknown:
        log.warning("the LoRA has %d tensors that do not fit, such as %s", len(unknown), unknown[0])
    return merged


def _changes(lora: Mapping[str, Tensor], *, parity: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in lora.items():
        path = name.removeprefix(_PREFIX)
        for suffix, kind in _SUMS.items():
            if path.endswith(suffix):
                yield path.removesuffix(suffix) + kind, tensor
        for down, up in _PAIRS[:1] if parity else _PAIRS:
            if path.endswith(down):
                module = name.removesuffix(down)
                product = lora[module + up].float() @ tensor.float()
                alpha = None if parity else lora.get(f"{module}.alpha")
                factor = 1.0 if alpha is None else float(alpha) / tensor.shape[0]
                yield f"{module.removeprefix(_PREFIX)}.weight", factor * product
