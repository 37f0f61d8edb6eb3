"""Prompts as the transformer reads them: states of UMT5's encoder, of the valid tokens alone."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor

from avatar_core.checkpoint import Rename
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import (  # noqa: E402 - after the broken packages are hidden
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

MAX_TOKENS = 512

_OFFICIAL: Mapping[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",  # by tanh
    "layer_norm_epsilon": 1e-6,
}

_OF_LAYER = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
}


def text_config(sizes: Mapping[str, Any] | None) -> UMT5Config:
    """`sizes` are those that differ from the official ones."""
    return UMT5Config(**{**_OFFICIAL, **(sizes or {})})


def build_text_encoder(sizes: Mapping[str, Any] | None = None) -> UMT5EncoderModel:
    return UMT5EncoderModel(text_config(sizes))


def text_name_map(sizes: Mapping[str, Any] | None = None) -> list[Rename]:
    """From the official names to those of transformers, which has two for the embedding."""
    names = [
        ("token_embedding", "shared"),
        ("token_embedding", "encoder.embed_tokens"),
        ("norm", "encoder.final_layer_norm"),
    ]
    for layer in range(text_config(sizes).num_layers):
        names += [(f"blocks.{layer}.{a}", f"encoder.block.{layer}.{b}") for a, b in _OF_LAYER.items()]
    return [Rename(f"{source}.weight", f"{target}.weight") for source, target in names]


class TextEncoder:
    """`tokenizer` is the folder of UMT5's tokenizer."""

    def __init__(self, model: Any, tokenizer: Path, device: str) -> None:
        self._model = model
        # As its file says: transformers' own class for T5 would build another from it.
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer, local_files_only=True)
        self._device = device

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """States [n, channels] of the prompt's tokens, of which those beyond 512 are cut off."""
        tokens = self._tokenizer(
            clean(prompt), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)
        states = self._model(ids, attention_mask=mask).last_hidden_state
        return states[0, : int(mask.sum())]


def clean(prompt: str) -> str:
    """Mended encoding, no HTML, single blanks."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
