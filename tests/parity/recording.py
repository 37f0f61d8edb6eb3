"""What the modules of a model give on the way."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """What each module returns within, call by call; copies, for blocks that are written to later."""
    calls: dict[str, list[Any]] = defaultdict(list)

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            calls[name].append(tuple(part.clone() for part in parts if isinstance(part, Tensor)))

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
