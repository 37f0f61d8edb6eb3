"""Steps that repeat what the blocks added, as long as the time embedding moves little (TeaCache)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from avatar_core.backends.multitalk.transformer import RunBlocks

WARM_UP_STEPS = 5

# From the change of the time embedding to that of what the blocks add; highest power first.
COEFFICIENTS = {
    480: (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    720: (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}


@dataclass
class CallCache:
    """Of one kind of call, which comes once a step; new for every window."""

    threshold: float
    coefficients: Sequence[float]
    computed: list[bool] = field(default_factory=list)
    """Of each call so far, whether the blocks ran."""
    moved: float = 0.0
    _time: Tensor | None = None
    _added: Tensor | None = None

    def __call__(self, time: Tensor, tokens: Tensor, run: RunBlocks) -> Tensor:
        if self._time is not None and len(self.computed) >= WARM_UP_STEPS:
            change = relative_change(time, self._time)
            self.moved += float(np.polyval(self.coefficients, change))
        self._time = time
        must = len(self.computed) < WARM_UP_STEPS or self.moved >= self.threshold
        self.computed.append(must)
        if not must and self._added is not None:
            return tokens + self._added
        self.moved = 0.0
        result = run(tokens)
        self._added = result - tokens
        return result


def relative_change(time: Tensor, before: Tensor) -> float:
    return float((time - before).abs().mean() / before.abs().mean())


def coefficients(image_size: int) -> Sequence[float]:
    return COEFFICIENTS[min(COEFFICIENTS, key=lambda size: abs(size - image_size))]
