"""The transformer's blocks for devices with little memory: all but the attention of tokens to each other runs
on a part of them at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from avatar_core.backends.multitalk.transformer import (
    Conditions,
    Modulation,
    MultiTalkBlock,
    MultiTalkTransformer,
    Rotary,
)

CHUNK_ROWS = 8192


def run_in_chunks(transformer: MultiTalkTransformer, num_rows: int = CHUNK_ROWS) -> None:
    blocks: Any = transformer.blocks
    for block in blocks:
        block.forward = partial(_forward, block, num_rows)


def _forward(
    block: MultiTalkBlock,
    num_rows: int,
    hidden_states: Tensor,
    time: Tensor,
    conditions: Conditions,
    rotary: Rotary,
) -> Tensor:
    """As the block's own."""
    modulation = block.modulation(time)
    attended, positions = _attended(block, num_rows, hidden_states, conditions, rotary, modulation)
    states = _filled(
        hidden_states,
        num_rows,
        lambda rows: block.attend(hidden_states[:, rows], attended[:, rows], conditions.context, modulation),
    )
    heard = _listen(block, num_rows, states, conditions.audio, positions)
    return _filled(heard, num_rows, lambda rows: block.feed_forward(heard[:, rows], modulation))


def _attended(
    block: MultiTalkBlock,
    num_rows: int,
    hidden_states: Tensor,
    conditions: Conditions,
    rotary: Rotary,
    modulation: Modulation,
) -> tuple[Tensor, Tensor | None]:
    """What the tokens take from each other, and their positions where two speak."""
    total, width = hidden_states.shape[1:]
    shape = (1, total, block.attn1.heads, width // block.attn1.heads)
    query, key, value = (hidden_states.new_empty(shape) for _ in range(3))
    for rows in _chunks(total, num_rows):
        cos, sin = (table[:, rows] for table in rotary)
        part = block.heads(hidden_states[:, rows], (cos, sin), modulation)
        query[:, rows], key[:, rows], value[:, rows] = part
    return dispatch_attention_fn(query, key, value), conditions.positions(query, key)


def _listen(
    block: MultiTalkBlock, num_rows: int, hidden_states: Tensor, audio: Tensor, positions: Tensor | None
) -> Tensor:
    """In whole frames, at least one."""
    size = hidden_states.shape[1] // len(audio)
    num_frames = max(1, num_rows // size)

    def listen(rows: slice) -> Tensor:
        heard = audio[rows.start // size : rows.stop // size]
        return block.listen(hidden_states[:, rows], heard, None if positions is None else positions[rows])

    return _filled(hidden_states, num_frames * size, listen)


def _filled(like: Tensor, num_rows: int, compute: Callable[[slice], Tensor]) -> Tensor:
    result = torch.empty_like(like)
    for rows in _chunks(like.shape[1], num_rows):
        result[:, rows] = compute(rows)
    return result


def _chunks(total: int, num_rows: int) -> Iterator[slice]:
    for start in range(0, total, num_rows):
        yield slice(start, min(start + num_rows, total))
