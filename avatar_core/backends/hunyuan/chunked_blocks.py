"""The transformer's blocks for devices with little memory: all but the attention runs on a part of the rows
at a time.

What diffusers' blocks compute, row by row the same; at full size the memory beside the weights is less than
half. In turn the normalisations are computed twice.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from avatar_core.backends.hunyuan.transformer import HunyuanAvatarTransformer

CHUNK_ROWS = 8192

rotate: Any = apply_rotary_emb  # annotated with another type than it takes

Rotary = tuple[Tensor, Tensor]
Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values, (B, rows, heads, head_dim) each


def run_in_chunks(transformer: HunyuanAvatarTransformer, num_rows: int = CHUNK_ROWS) -> None:
    for stack, forward in (
        (transformer.transformer_blocks, _dual_stream),
        (transformer.single_transformer_blocks, _single_stream),
    ):
        for block in stack:
            block.forward = partial(forward, block, num_rows)


def _dual_stream(
    block: Any, num_rows: int, image: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    attn, num_image = block.attn, image.shape[1]
    heads = _empty_heads(attn, image, num_image + text.shape[1])
    of_image = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
    of_text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
    for chunk in _chunks(num_image, num_rows):
        _project(of_image, block.norm1(image[:, chunk], emb=temb)[0], heads, chunk, rotary)
    text_rows = slice(num_image, None)
    _project(of_text, block.norm1_context(text, emb=temb)[0], heads, text_rows, None)
    attended = dispatch_attention_fn(*heads, attn_mask=mask).flatten(2, 3).to(heads[0].dtype)
    del heads
    image = _dual_stream_end(
        block.norm1, attn.to_out[0], block.norm2, block.ff, num_rows, image, attended[:, :num_image], temb
    )
    text = _dual_stream_end(
        block.norm1_context,
        attn.to_add_out,
        block.norm2_context,
        block.ff_context,
        num_rows,
        text,
        attended[:, num_image:],
        temb,
    )
    return image, text


def _dual_stream_end(
    norm1: Any, to_out: Any, norm2: Any, ff: Any, num_rows: int, rows: Tensor, attended: Tensor, temb: Tensor
) -> Tensor:
    result = torch.empty_like(rows)
    for chunk in _chunks(rows.shape[1], num_rows):
        _, gate_attn, shift, scale, gate_ff = (
            each if each.ndim == 3 else each[:, None] for each in norm1(rows[:, chunk], emb=temb)
        )
        part = rows[:, chunk] + to_out(attended[:, chunk]) * gate_attn
        result[:, chunk] = part + gate_ff * ff(norm2(part) * (1 + scale) + shift)
    return result


def _single_stream(
    block: Any, num_rows: int, image: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    attn, num_image = block.attn, image.shape[1]
    rows = torch.cat([image, text], dim=1)
    heads = _empty_heads(attn, rows, rows.shape[1])
    projections = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
    for chunk in _chunks(num_image, num_rows):
        _project(projections, block.norm(rows[:, chunk], emb=temb)[0], heads, chunk, rotary)
    text_rows = slice(num_image, None)
    _project(projections, block.norm(rows[:, text_rows], emb=temb)[0], heads, text_rows, None)
    attended = dispatch_attention_fn(*heads, attn_mask=mask).flatten(2, 3).to(heads[0].dtype)
    del heads
    for chunk in _chunks(rows.shape[1], num_rows):
        normed, gate = block.norm(rows[:, chunk], emb=temb)
        hidden = block.act_mlp(block.proj_mlp(normed))
        rows[:, chunk] += gate[:, None] * block.proj_out(torch.cat([attended[:, chunk], hidden], dim=2))
    return rows[:, :num_image], rows[:, num_image:]


def _project(
    layers: tuple[Any, ...], normed: Tensor, heads: Heads, rows: slice, rotary: Rotary | None
) -> None:
    """Into those rows of `heads`."""
    to_q, to_k, to_v, norm_q, norm_k = layers
    queries, keys, values = heads
    for to, norm, target in ((to_q, norm_q, queries), (to_k, norm_k, keys)):
        part = norm(to(normed).unflatten(2, target.shape[2:]))
        if rotary is not None:
            part = rotate(part, (rotary[0][rows], rotary[1][rows]), sequence_dim=1)
        target[:, rows] = part
    values[:, rows] = to_v(normed).unflatten(2, values.shape[2:])


def _empty_heads(attn: Any, rows: Tensor, num_rows: int) -> Heads:
    shape = (len(rows), num_rows, attn.heads, rows.shape[2] // attn.heads)
    dtype = (
        torch.get_autocast_dtype(rows.device.type)
        if torch.is_autocast_enabled(rows.device.type)
        else rows.dtype
    )
    queries, keys, values = (torch.empty(shape, device=rows.device, dtype=dtype) for _ in range(3))
    return queries, keys, values


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
