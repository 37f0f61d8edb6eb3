"""DDIM sampling of motion: the published schedule, guidance on the clean prediction, noise by seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_core.backends.ditto.lmdm import Guidance, MotionDecoder
from avatar_core.errors import ConfigError

NUM_TRAIN_STEPS = 1000
_COSINE_OFFSET = 0.008
_WARM_UPS = 3  # before a graph is captured

Draw = Callable[[tuple[int, ...]], Tensor]
"""Standard normal noise of a shape."""


def alphas_cumprod() -> Tensor:
    """(1000,) float32. The product is taken in float32 too: the last entries depend on it."""
    steps = np.arange(NUM_TRAIN_STEPS + 1) / NUM_TRAIN_STEPS
    kept = np.cos((steps + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2) ** 2
    betas = np.clip(1 - kept[1:] / kept[:-1], 0, 0.999)
    return (1 - torch.from_numpy(betas).float()).cumprod(dim=0)


@dataclass(frozen=True)
class Schedule:
    """Times and factors (float32) of `num_steps` DDIM steps with eta 1; from each step to the next.

    `parity`: the factor `c` as the published code rounds it, which for 5 steps is no number there; here 0.
    """

    num_steps: int
    parity: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= NUM_TRAIN_STEPS:
            raise ConfigError(f"num_inference_steps={self.num_steps}: allowed are 1 to {NUM_TRAIN_STEPS}")

    @cached_property
    def times(self) -> list[int]:
        """(num_steps,) falling; truncated, as the model was sampled."""
        times = torch.linspace(-1, NUM_TRAIN_STEPS - 1, self.num_steps + 1).int().tolist()
        return times[:0:-1]

    @cached_property
    def alphas(self) -> Tensor:
        """(num_steps,) of `times`."""
        return alphas_cumprod()[self.times]

    @cached_property
    def sigma(self) -> Tensor:
        """(num_steps - 1,) factor of the fresh noise."""
        alpha, following = self.alphas[:-1], self.alphas[1:]
        return ((1 - alpha / following) * (1 - following) / (1 - alpha)).sqrt()

    @cached_property
    def c(self) -> Tensor:
        """(num_steps - 1,) factor of the predicted noise: sqrt(1 - following - sigma^2). With eta 1 that is
        the product below, which loses no digits and is never the root of a negative number."""
        alpha, following = self.alphas[:-1], self.alphas[1:]
        if self.parity:
            return (1 - following - self.sigma**2).clamp(min=0).sqrt()
        return (1 - following) * (alpha / (following * (1 - alpha))).sqrt()

    @cached_property
    def alpha_next_sqrt(self) -> Tensor:
        return self.alphas[1:].sqrt()


def predicted_noise(noisy: Tensor, clean: Tensor, alpha: Tensor) -> Tensor:
    """What was added to `clean` at a time with this cumulative alpha (a number, float32)."""
    return noisy * float((1 / (1 - alpha)).sqrt()) - clean / float((1 / alpha - 1).sqrt())


def guided(
    model: MotionDecoder,
    noisy: Tensor,
    cond_frame: Tensor,
    times: Tensor,
    both: Guidance,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """Clean motion, guided and unconditional. `times` (2,) holds the time twice, `both` the unconditional
    half first."""
    clean = model(noisy.expand(2, -1, -1), cond_frame.expand(2, -1), times, both)
    unconditional, conditional = clean.chunk(2)
    return unconditional + weight * (conditional - unconditional), unconditional


class GraphedStep:
    """`guided` as one CUDA graph: its many small kernels cost more to launch than to run."""

    def __init__(self, model: MotionDecoder, weight: float) -> None:
        self._model, self._weight = model, weight
        self._inputs: list[Tensor] = []
        self._clean = torch.empty(0)
        self._graph: Any = None

    def __call__(self, noisy: Tensor, cond_frame: Tensor, times: Tensor, both: Guidance) -> Tensor:
        given = [noisy, cond_frame, times, *both]
        if self._graph is None:
            self._capture(given)
        for held, tensor in zip(self._inputs, given, strict=True):
            held.copy_(tensor)
        self._graph.replay()
        return self._clean.clone()

    def _capture(self, given: list[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in given]
        stream: Any = torch.cuda.Stream(given[0].device)
        stream.wait_stream(torch.cuda.current_stream(given[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream(given[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._clean = self._run()

    def _run(self) -> Tensor:
        noisy, cond_frame, times, tokens, hidden = self._inputs
        return guided(self._model, noisy, cond_frame, times, Guidance(tokens, hidden), self._weight)[0]


def both_halves(model: MotionDecoder, cond: Tensor) -> Guidance:
    """Unconditional, then conditional, for a batch of two; `cond` (1, 80, 1103)."""
    halves = zip(model.unconditional(), model.conditional(cond), strict=True)
    return Guidance(*(torch.cat(pair) for pair in halves))


class ClipSampler:
    """Motion of one clip, window by window. The step noises are drawn once, then a start for each window, so
    that all of them come from one generator."""

    def __init__(
        self,
        model: MotionDecoder,
        num_steps: int,
        guidance: float,
        generator: torch.Generator | None = None,
        draw: Draw | None = None,
        *,
        parity: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        """`draw` takes the place of the generator. `cuda_graph` has no effect on a CPU."""
        self.model = model
        self.schedule = Schedule(num_steps, parity)
        self.guidance = guidance
        self.device = model.null_cond_hidden.device
        self._draw = draw or (lambda shape: torch.randn(shape, generator=generator))
        self._step: Callable[[Tensor, Tensor, Tensor, Guidance], Tensor] = self._guided
        if cuda_graph and self.device.type == "cuda":
            self._step = GraphedStep(model, guidance)
        self._shape = (1, model.config.seq_len, model.config.nfeats)
        self._step_noises = [self._noise() for _ in range(num_steps - 1)]

    def _guided(self, noisy: Tensor, cond_frame: Tensor, times: Tensor, both: Guidance) -> Tensor:
        return guided(self.model, noisy, cond_frame, times, both, self.guidance)[0]

    def _noise(self) -> Tensor:
        return self._draw(self._shape).to(self.device)

    def __call__(self, cond_frame: NDArray[np.float32], cond: NDArray[np.float32]) -> NDArray[np.float32]:
        """`cond_frame` (1, 265) is the frame before, `cond` (1, 80, 1103) -> (1, 80, 265)."""
        clean = self.sample(
            torch.from_numpy(cond_frame).to(self.device), torch.from_numpy(cond).to(self.device)
        )
        return np.asarray(clean.cpu().numpy())

    @torch.inference_mode()
    def sample(
        self, cond_frame: Tensor, cond: Tensor, visit: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """`visit` sees what enters each step."""
        schedule, both = self.schedule, both_halves(self.model, cond)
        noisy = clean = self._noise()
        for step, time in enumerate(schedule.times):
            if visit:
                visit(noisy)
            clean = self._step(noisy, cond_frame, torch.full((2,), time, device=self.device), both)
            if step + 1 < schedule.num_steps:
                noise = predicted_noise(noisy, clean, schedule.alphas[step])
                noisy = (
                    float(schedule.alpha_next_sqrt[step]) * clean
                    + float(schedule.c[step]) * noise
                    + float(schedule.sigma[step]) * self._step_noises[step]
                )
        return clean
