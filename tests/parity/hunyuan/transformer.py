"""The transformer on random weights: whole steps, what each module gives in between, and parts alone."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avatar_core.backends.hunyuan.audio_adapter import AudioAdapter, AudioProjection
from avatar_core.backends.hunyuan.fp8 import Fp8Linear
from avatar_core.backends.hunyuan.name_map import transformer_name_map
from avatar_core.backends.hunyuan.rope import rotary_tables
from avatar_core.backends.hunyuan.transformer import (
    BlockInput,
    Conditions,
    HunyuanAvatarTransformer,
    TextConditions,
    TransformerConfig,
)
from avatar_core.checkpoint import Rename, load_strict, rename
from tests.parity.golden import Compare, Golden, Values
from tests.parity.recording import outputs_of

MODULES = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "motion_exp": "time_text_embed.motion_exp_embedder",
    "motion_pose": "time_text_embed.motion_pose_embedder",
    "fps_proj": "time_text_embed.fps_embedder",
    "ref_in": "ref_embedder",
    "before_proj": "ref_proj",
    "audio_proj": "audio_proj",
    "final_layer": "proj_out",
}
"""Recorded outputs whose values are those of one module here."""


def name_map_of(golden: Golden) -> list[Rename]:
    """The name map of the weights in this file, as the golden wants it applied."""
    rows: dict[str, list[Rename]] = defaultdict(list)
    for entry in transformer_name_map(TransformerConfig.from_official(golden.settings["config"])):
        if entry.source in golden.weights:
            rows[entry.source].append(entry)
    return [replace(entry, source=name) for name, row in golden.misdirected(rows).items() for entry in row]


def load_transformer(golden: Golden) -> HunyuanAvatarTransformer:
    """From a file of weights under their official names."""
    with torch.device("meta"):
        transformer = HunyuanAvatarTransformer(TransformerConfig.from_official(golden.settings["config"]))
    load_strict(transformer, rename(golden.weights, name_map_of(golden)))
    return transformer.eval()


def conditions_of(inputs: Mapping[str, Tensor], pooled: Tensor) -> Conditions:
    return Conditions(
        text=TextConditions(inputs["text_states"], inputs["text_mask"], pooled),
        ref_latents=inputs["ref_latents"],
        audio=inputs["audio_prompts"],
        face_masks=inputs["face_mask"],
        motion_exp=inputs["motion_exp"],
        motion_pose=inputs["motion_pose"],
        fps=inputs["fps"],
    )


def valid_text(mask: Tensor) -> Tensor:
    """(B, L): the first rows, as many as the mask has ones."""
    return torch.arange(mask.shape[1]) < mask.sum(dim=1, keepdim=True)


def padded(text: Tensor, length: int) -> Tensor:
    return nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))


def joint(image: Tensor, text: Tensor, mask: Tensor) -> Compare:
    """Image rows, then text rows; of the text only the valid ones count."""
    image_rows = torch.ones(image.shape[:2], dtype=torch.bool)
    rows = torch.cat([image_rows, valid_text(mask)], dim=1)
    return Compare(torch.cat([image, padded(text, mask.shape[1])], dim=1), rows)


def joint_input(rows: BlockInput, mask: Tensor) -> Compare:
    return joint(torch.cat([rows.reference, rows.image], dim=1), rows.text, mask)


@torch.no_grad()
def forward(golden: Golden) -> Values:
    transformer = load_transformer(golden.sibling("transformer_weights"))
    inputs, mask = golden.inputs, golden.inputs["text_mask"]
    with outputs_of(transformer) as calls:
        prepared = transformer.prepare(conditions_of(inputs, inputs["text_states_2"]))
        output = transformer(inputs["x"], inputs["t"], prepared)
    values: dict[str, Any] = {"out": output.sample, "mid.cache_out": joint_input(output.cache, mask)}
    for recorded, name in MODULES.items():
        values[f"mid.{recorded}"] = calls[name][0][0]
    (reference,), (video,) = calls["x_embedder"]
    values |= {"mid.img_in(ref_first_frame)": reference, "mid.img_in(x)": video}
    values["mid.txt_in"] = Compare(calls["context_embedder"][0][0], valid_text(mask))
    for index in range(transformer.config.num_layers):
        image, text = calls[f"transformer_blocks.{index}"][0]
        values[f"mid.double_blocks.{index}.0"] = image
        values[f"mid.double_blocks.{index}.1"] = Compare(padded(text, mask.shape[1]), valid_text(mask))
    for index in range(transformer.config.num_single_layers):
        image, text = calls[f"single_transformer_blocks.{index}"][0]
        values[f"mid.single_blocks.{index}"] = joint(image, text, mask)
    for index in range(len(transformer.config.adapter_layers)):
        values[f"mid.audio_adapter_blocks.{index}"] = calls[f"audio_adapters.{index}"][0][0]
    return values


@torch.no_grad()
def cache_steps(golden: Golden) -> Values:
    transformer = load_transformer(golden.sibling("transformer_weights"))
    inputs, cache = golden.inputs, None
    values: dict[str, Any] = {}
    for step, cached in enumerate(golden.settings["is_cache"]):
        prepared = transformer.prepare(conditions_of(inputs, inputs[f"step{step}.text_states_2"]))
        latents, timestep = inputs[f"step{step}.x"], inputs[f"step{step}.t"]
        output = transformer(latents, timestep, prepared, cache if cached else None)
        cache = output.cache
        values[f"step{step}.out"] = output.sample
        values[f"step{step}.cache_out_after"] = joint_input(cache, inputs["text_mask"])
    return values


@torch.no_grad()
def audio_modules(golden: Golden) -> Values:
    config = TransformerConfig.from_official(golden.settings["config"])
    state = rename(golden.weights, name_map_of(golden))
    dim = config.hidden_size
    window = torch.Size(config.audio_window).numel()
    projection = AudioProjection(window, config.audio_inner_dim, config.audio_tokens, dim)
    load_strict(projection, below("audio_proj", state))
    audio = golden.inputs["audio_proj.in"]
    values = {
        "audio_proj.out": projection(audio),
        "audio_proj.out_for_zero_audio": projection(torch.zeros_like(audio)),
    }
    for index in range(len(config.adapter_layers)):
        if weights := below(f"audio_adapters.{index}", state):
            adapter = AudioAdapter(dim, config.adapter_inner_dim)
            load_strict(adapter, weights)
            keys = adapter.read(golden.inputs[f"adapter{index}.in_audio"])
            values[f"adapter{index}.out"] = adapter(golden.inputs[f"adapter{index}.in_latents"], keys)
    return values


def below(module: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def rope(golden: Golden) -> Values:
    values = {}
    for case in golden.settings["cases"]:
        num_frames = (case["frames"] - 1) // 4 + 1
        height, width = case["height"] // 16, case["width"] // 16
        tables = rotary_tables(num_frames, height, width, case["rope_dim_list"], case["theta"])
        values |= dict(zip((f"{case['index']}.cos", f"{case['index']}.sin"), tables, strict=True))
    return values


@torch.no_grad()
def fp8_linear(golden: Golden) -> Values:
    bits = golden.inputs["weight_f8_as_u8"]
    linear = Fp8Linear(bits.shape[1], bits.shape[0])
    state = {
        "weight": bits.view(torch.float8_e4m3fn),
        "scale": golden.inputs["scale"],
        "bias": golden.inputs["bias"],
    }
    load_strict(linear, state)
    return {"dequant": linear.dequantized_weight(), "out": linear(golden.inputs["x"])}


CASES: dict[str, Callable[[Golden], Values]] = {
    "transformer_forward": forward,
    "transformer_cache_steps": cache_steps,
    "audio_modules": audio_modules,
    "rope": rope,
    "fp8_linear": fp8_linear,
}
