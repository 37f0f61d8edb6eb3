"""The transformer on random weights: whole calls, what its modules give in between, and parts alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from avatar_core.backends.multitalk.audio import audio_window
from avatar_core.backends.multitalk.audio_layers import (
    AudioCrossAttention,
    AudioProjection,
    by_latent_frame,
    join_speakers,
)
from avatar_core.backends.multitalk.guidance import Scales, guide, guide_by_speech
from avatar_core.backends.multitalk.lora import merge_lora
from avatar_core.backends.multitalk.lrope import attention_map, query_positions, rotate
from avatar_core.backends.multitalk.quantised import DTYPES, quantise, read_quantised
from avatar_core.backends.multitalk.transformer import (
    Conditions,
    MultiTalkTransformer,
    rotated,
    time_sinusoid,
    token_masks,
)
from avatar_core.checkpoint import load_strict
from tests.parity.golden import Golden, Values
from tests.parity.multitalk.models import TRANSFORMER, load_transformer
from tests.parity.recording import outputs_of

Inputs = Mapping[str, Tensor]

OF_BLOCK = {
    "self_attn": "attn1.to_out.0",
    "text_image_cross_attn": "attn2",
    "norm_x": "norm_x",
    "audio_cross_attn": "audio_cross_attn",
}
"""Recorded outputs of a block, and the modules here that give them."""
DEQUANTISED = "blocks.0.self_attn.q"


def conditions_of(
    transformer: MultiTalkTransformer, inputs: Inputs, *, text: bool = True, audio: bool = True
) -> Conditions:
    """Silence is that of one person."""
    speech = inputs["audio"] if audio else torch.zeros_like(inputs["audio"][:1])
    prompt_embeds = inputs["context" if text else "context_null"]
    return transformer.prepare(prompt_embeds, inputs["clip_fea"], speech, inputs["ref_target_masks"])


def answer(transformer: MultiTalkTransformer, inputs: Inputs, **which: bool) -> Tensor:
    latents = torch.cat([inputs["x"][None], inputs["y"]], dim=1)
    conditions = conditions_of(transformer, inputs, **which)
    velocity: Tensor = transformer(latents, inputs["t"], conditions)[0]
    return velocity


@torch.no_grad()
def forward(golden: Golden) -> Values:
    transformer, inputs = load_transformer(golden.sibling(TRANSFORMER)), golden.inputs
    with outputs_of(transformer) as calls:
        conditional = answer(transformer, inputs)
    no_text = answer(transformer, inputs, text=False)
    nothing = answer(transformer, inputs, text=False, audio=False)
    silent = answer(transformer, inputs, audio=False)
    first, later = by_latent_frame(inputs["audio"])
    embedder = "condition_embedder"
    return {
        "out.cond": conditional,
        "out.drop_text": no_text,
        "out.uncond": nothing,
        "out.drop_audio": silent,
        "out.cfg3_5_4": guide(conditional, no_text, nothing, Scales(5.0, 4.0)),
        "out.cfg2_audio2": guide_by_speech(conditional, silent, 2.0),
        "inter.time_sinusoid": time_sinusoid(inputs["t"], transformer.config.freq_dim),
        "inter.time_embedding": calls[f"{embedder}.time_embedder"][0][0],
        "inter.time_projection": calls[f"{embedder}.time_proj"][0][0],
        "inter.text_embedding": calls[f"{embedder}.text_embedder"][0][0],
        "inter.image_embedding": calls[f"{embedder}.image_embedder"][0][0],
        "inter.patch_embedding": calls["patch_embedding"][0][0],
        "inter.audio_proj.in_first": first,
        "inter.audio_proj.in_latter": later,
        "inter.audio_proj.out": calls["audio_proj"][0][0],
        **between(transformer, inputs, calls),
    }


def between(transformer: MultiTalkTransformer, inputs: Inputs, calls: Mapping[str, Any]) -> Values:
    """Of every block. A single speaker has no need of the map, but it was recorded."""
    rotary, masks = transformer.rope(inputs["x"][None]), token_masks(inputs["ref_target_masks"])
    values = {}
    for number, block in enumerate(transformer.blocks):
        place, recorded = f"blocks.{number}", f"inter.block{number}"
        values[f"{recorded}.out"] = calls[place][0][0]
        values |= {f"{recorded}.{name}": calls[f"{place}.{part}"][0][0] for name, part in OF_BLOCK.items()}
        query, key = (calls[f"{place}.attn1.{norm}"][0][0] for norm in ("norm_q", "norm_k"))
        heads = (block.attn1.heads, -1)
        query, key = (rotated(states.unflatten(2, heads), rotary) for states in (query, key))
        values[f"{recorded}.x_ref_attn_map"] = attention_map(query, key, masks)
    return values


@torch.no_grad()
def audio_proj(golden: Golden) -> Values:
    windows, config = golden.inputs["audio_windows"], golden.settings["config"]
    projection = AudioProjection(
        windows.shape[2],
        config["audio_blocks"],
        config["audio_channels"],
        config["intermediate_dim"],
        config["output_dim"],
        config["context_tokens"],
    )
    load_strict(projection, golden.weights)
    first, later = by_latent_frame(windows)
    tokens = projection(windows)
    return {
        "inter.first": first,
        "inter.latter": later,
        "out.tokens": tokens,
        "out.context_for_attention": join_speakers(tokens)[None],
    }


def audio_windows(golden: Golden) -> Values:
    values = {}
    for number, case in enumerate(golden.settings["cases"]):
        speech = golden.inputs[f"case{number}.in.full"]
        rows = torch.arange(len(speech)).view(1, -1, 1, 1)
        for name, given in {"windows": speech[None], "indices": rows}.items():
            windows = torch.from_numpy(audio_window(given.numpy(), case["start"], case["clip_frames"]))[0]
            values[f"case{number}.out.{name}"] = windows[..., 0, 0] if name == "indices" else windows
    return values


@torch.no_grad()
def lrope(golden: Golden) -> Values:
    inputs, settings = golden.inputs, golden.settings
    turned = rotate(inputs["rope1d.in.x"].transpose(1, 2), inputs["rope1d.in.pos"]).transpose(1, 2)
    attention = AudioCrossAttention(settings["dim"], settings["heads"], settings["encoder_dim"])
    prefix = "attn.weight."
    load_strict(attention, {name.removeprefix(prefix): tensor for name, tensor in golden.weights.items()})
    tokens, positions = inputs["attn.in.x"], query_positions(inputs["attn.in.x_ref_attn_map"])
    return {
        "rope1d.out": turned,
        "attn.inter.query_positions": positions,
        "attn.out.1p": attention(tokens, inputs["attn.in.audio_1p"][0], None),
        "attn.out.2p": attention(tokens, inputs["attn.in.audio_2p"][0], positions),
        "map.out": attention_map(inputs["map.in.q"], inputs["map.in.k"], inputs["map.in.token_masks"]),
    }


@torch.no_grad()
def lora(golden: Golden) -> Values:
    base = golden.sibling(TRANSFORMER)
    changes = {name.removeprefix("lora."): tensor for name, tensor in golden.inputs.items()}
    merged = merge_lora(base.weights, changes, golden.settings["scale"], parity=True)
    changed = {name: tensor for name, tensor in merged.items() if tensor is not base.weights[name]}
    inputs = golden.sibling("transformer_1p").inputs
    return {
        "out.forward": answer(load_transformer(base, merged), inputs),
        **{f"merged.{name}": tensor for name, tensor in changed.items()},
    }


@torch.no_grad()
def quant(golden: Golden) -> Values:
    """Most modules are quantised here; the recorded ones take their places."""
    base, inputs = golden.sibling(TRANSFORMER), golden.sibling("transformer_1p").inputs
    values: dict[str, Any] = {}
    for kind in DTYPES:
        own, modules = quantise(base.weights, kind)
        recorded = {
            name.removeprefix(f"{kind}."): tensor
            for name, tensor in golden.inputs.items()
            if name.startswith(f"{kind}.")
        }
        state = read_quantised({**own, **recorded}, modules)
        weight = state[f"{DEQUANTISED}.weight"].float() * state[f"{DEQUANTISED}.scale"]
        values |= {
            f"{kind}.dequantised.{DEQUANTISED}.weight": weight,
            f"{kind}.out.forward": answer(load_transformer(base, state), inputs),
            f"maps.{kind}.modules": sorted(modules),
            f"maps.{kind}.n_modules": len(modules),
            f"maps.{kind}.data_dtype": str(DTYPES[kind]),
            **{f"maps.{kind}.map_entry.{n}": v for n, v in next(iter(modules.values())).items()},
        }
    return values


CASES: dict[str, Callable[[Golden], Values]] = {
    "transformer_1p": forward,
    "transformer_2p": forward,
    "audio_proj": audio_proj,
    "audio_windows": audio_windows,
    "lrope": lrope,
    "lora": lora,
    "quant": quant,
}
