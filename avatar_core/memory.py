"""Fits a model to a device: what stays loaded, what moves in block by block, which attention kernel runs.

Execution only: a level changes when things are computed, never what. Whatever changes numbers (steps,
fp8 weights, VAE tiles) belongs to a backend's configuration and thereby to the key.
"""

import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from avatar_core.errors import ConfigError

log = logging.getLogger(__name__)

_cuda: Any = torch.cuda  # typed only in part

GIB = 1024**3
_USABLE = 0.91  # of the memory in a card's name is there at least


@dataclass(frozen=True)
class Level:
    """`device_gb`: memory of the device it is meant for. `offload`: blocks wait in main memory, and with
    `prefetch` the next one moves in while one computes. `row_chunks`: blocks run on a part of their rows at a
    time where they can. `split_guidance`: the two halves of guidance run one after the other."""

    name: str
    device_gb: int
    offload: bool = False
    prefetch: bool = False
    row_chunks: bool = False
    split_guidance: bool = False
    compile: bool = False


LEVELS = (
    Level("h200", 140, compile=True),
    Level("80gb", 80, compile=True),
    Level("48gb", 48, split_guidance=True, compile=True),
    Level("24gb", 24, split_guidance=True, offload=True, prefetch=True, row_chunks=True),
    Level("10gb", 10, split_guidance=True, offload=True, row_chunks=True),
)
"""From the most memory to the least."""

LEVEL_NAMES = tuple(level.name for level in LEVELS)


def get_level(name: str) -> Level:
    for level in LEVELS:
        if level.name == name:
            return level
    raise ConfigError(f"unknown memory level `{name}`; choose auto or one of: {', '.join(LEVEL_NAMES)}")


def fitting_level(device: str) -> Level:
    """The first level that a device has memory for; on a CPU the first one of all."""
    if not device.startswith("cuda"):
        return LEVELS[0]
    gib = torch.cuda.get_device_properties(device).total_memory / GIB
    return next((level for level in LEVELS if gib >= level.device_gb * _USABLE), LEVELS[-1])


def fitting_level_names(device: str) -> tuple[str, ...]:
    """The levels that a device has memory for, from the most to the least."""
    return LEVEL_NAMES[LEVEL_NAMES.index(fitting_level(device).name) :]


def chosen_level(name: str | None, device: str) -> Level:
    """The level of this name, without one the first that the device has memory for."""
    return get_level(name) if name else fitting_level(device)


BLOCK_STACKS = ("transformer_blocks", "single_transformer_blocks")
"""Where diffusers' two-stream transformers have nearly all of their weights, in the order they run."""


def place(model: nn.Module, level: Level, device: str, stacks: Sequence[str] = BLOCK_STACKS) -> nn.Module:
    """Moves a model to its device. With `offload` the blocks in `stacks`, names of its `ModuleList`s, stay in
    main memory and move in while they run; they may be called in any order, all else as on the device."""
    if not level.offload:
        return model.to(device)
    blocks = [block for name in stacks for block in model.get_submodule(name).children()]
    BlockOffload(blocks, torch.device(device), prefetch=level.prefetch)
    offloaded = {module for block in blocks for module in block.modules()}
    for module in set(model.modules()) - offloaded:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
    return model


_PAGE, _ALIGNMENT = 4096, 256  # bytes
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass
class _Slot:
    """A place for one block's weights on the device. The events are of CUDA alone: `arrived`, weights may be
    read; `released`, they may be overwritten."""

    memory: Tensor
    holds: int | None = None
    arrived: torch.cuda.Event | None = None
    released: torch.cuda.Event | None = None


class BlockOffload:
    """Weights of blocks wait in main memory and are on the device while their block runs.

    The device has place for one block, or with `prefetch` for two: while one computes, the next one's weights
    move in on a stream of their own, and after the last block those of the first. Each block is one transfer
    into memory that is there for good: nothing is allocated on the way, and the host never waits.

    It lives as long as the blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, prefetch: bool) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._prefetch = prefetch
        self._stream = _cuda.Stream(device) if on_gpu and prefetch else None
        self._parameters = [list(block.parameters()) for block in blocks]
        memory, self._waiting = _pack(self._parameters)
        if on_gpu:
            self._pin(memory)
        size = max(memory.nbytes for memory in self._waiting)
        self._slots = [self._slot(size) for _ in range(2 if prefetch else 1)]
        self._running: _Slot | None = None
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, number))
            block.register_forward_hook(partial(self._after, number), always_call=True)

    def _pin(self, memory: Tensor) -> None:
        """Lets the device read it by itself, as long as this object lives.

        In place: `pin_memory` would take a copy of the next power of two in size.
        """
        runtime = _cuda.cudart()
        error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if error:
            raise ConfigError(
                f"{memory.nbytes / GIB:.0f} GiB of main memory cannot be pinned (CUDA error {error}); free "
                "main memory or take a memory level that does not offload"
            )

        weakref.finalize(self, _unpin, self._device, memory.data_ptr()).atexit = False

    def _slot(self, size: int) -> _Slot:
        memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._stream is None:
            return _Slot(memory)
        memory.record_stream(self._stream)  # a transfer may be under way when the memory is let go
        return _Slot(memory, arrived=_cuda.Event(), released=_cuda.Event())

    def _before(self, number: int, *_: Any) -> None:
        slot = self._running = self._fetch(number)
        if slot.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.arrived)
        self._use(number, slot.memory)
        if self._prefetch:
            self._fetch((number + 1) % len(self._waiting))

    def _after(self, number: int, *_: Any) -> None:
        slot, self._running = self._running, None
        if slot is not None and slot.released is not None:
            slot.released.record(torch.cuda.current_stream(self._device))
        self._use(number, self._waiting[number])

    def _fetch(self, number: int) -> _Slot:
        """The slot that has the block's weights, or will have."""
        for slot in self._slots:
            if slot.holds == number:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._running)
        slot.holds = number
        waiting = self._waiting[number]
        if slot.released is not None and self._stream is not None:
            self._stream.wait_event(slot.released)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            slot.memory[: waiting.nbytes].copy_(waiting, non_blocking=True)
        if slot.arrived is not None:
            slot.arrived.record(self._stream)
        return slot

    def _use(self, number: int, memory: Tensor) -> None:
        parameters = self._parameters[number]
        for parameter, view in zip(parameters, _views(memory, parameters), strict=True):
            parameter.data = view


def _unpin(device: torch.device, address: int) -> None:
    _cuda.synchronize(device)  # a transfer may be under way
    _cuda.cudart().cudaHostUnregister(address)


def _pack(blocks: Sequence[Sequence[nn.Parameter]]) -> tuple[Tensor, Sequence[Tensor]]:
    """Main memory in whole pages, and the bytes of every block in it, which the parameters are views of from
    then on."""
    sizes = [sum(_aligned(each.nbytes) for each in parameters) for parameters in blocks]
    num_bytes = -(-sum(sizes) // _PAGE) * _PAGE
    memory = torch.empty(num_bytes + _PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % _PAGE :][:num_bytes]
    packed = torch.split(memory[: sum(sizes)], sizes)
    for parameters, part in zip(blocks, packed, strict=True):
        for parameter, view in zip(parameters, _views(part, parameters), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
    return memory, packed


def _views(memory: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    views, start = [], 0
    for parameter in parameters:
        bytes_of_it = memory[start : start + parameter.nbytes]
        views.append(bytes_of_it.view(parameter.dtype).view(parameter.shape))
        start += _aligned(parameter.nbytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def free_device_memory(device: str) -> None:
    """After models were let go: torch keeps their memory for itself until told."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


ATTENTION_KERNELS = ("_flash_3", "_native_cudnn", "flash", "_native_flash", "native")
"""In diffusers' names, from fast to always there; flash-attn is used if installed and never needed."""

_PROBE_ROWS, _PROBE_TOLERANCE = 192, 0.02


@cache
def attention_kernel(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The first kernel that computes an attention without a mask on this device, and computes it right."""
    if not device.startswith("cuda"):
        return "native"
    for kernel in ATTENTION_KERNELS:
        problem = kernel_problem(kernel, device, dtype, head_dim)
        if not problem:
            log.info("attention kernel: %s", kernel)
            return kernel
        log.info("attention kernel %s does not work here: %s", kernel, problem)
    raise ConfigError(
        f"no attention kernel of {', '.join(ATTENTION_KERNELS)} works on {device} with {dtype}; "
        "check the installed torch"
    )


def kernel_problem(kernel: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a kernel cannot be used, nothing where it can."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, _PROBE_ROWS, 2, head_dim, generator=generator).to(device, dtype)
    try:
        with torch.inference_mode():
            with attention_backend(kernel):
                answer = dispatch_attention_fn(query, key, value)
            with attention_backend("_native_math"):
                exact = dispatch_attention_fn(query.float(), key.float(), value.float())
        error = float((answer.float() - exact).norm() / exact.norm())
    except Exception as problem:  # a package that was built for something else raises anything
        return " ".join(str(problem).split())[:200] or type(problem).__name__
    return "" if error < _PROBE_TOLERANCE else f"its result is wrong by {error:.2g}"


@contextmanager
def attention(kernel: str) -> Iterator[None]:
    """diffusers' blocks within use this kernel. Setting it on a model would change it for all others too."""
    with attention_backend(kernel):
        yield


def compile_blocks(model: nn.Module, level: Level, device: str, stacks: Sequence[str] = BLOCK_STACKS) -> None:
    """Compiles the repeated blocks in place. Blocks of a stack share their code, and clips of one shape too;
    from the second length of text on it serves any."""
    if not level.compile or level.offload or not device.startswith("cuda"):
        return
    for name in stacks:
        for block in model.get_submodule(name).children():
            block.compile()
