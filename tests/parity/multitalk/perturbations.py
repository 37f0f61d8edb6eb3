"""Single things spoilt on purpose: the cases that they touch must fail, all others must still pass."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.parity.golden import Golden
from tests.parity.judge import Perturbation, Spoil

RUNS = ("stream_", "clip_1p_cfg2")
SAMPLED = ("teacache", *RUNS)
TRANSFORMER_CASES = ("transformer_1p", "transformer_2p", "lora", "quant", *SAMPLED)


def scale_settings(factor: float, *names: str) -> Spoil:
    """Numbers of these names, also in the lists of the sidecar."""

    def scaled(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value * factor if name in names and value is not None else value
            for name, value in settings.items()
        }

    def spoil(golden: Golden) -> Golden:
        settings = scaled(golden.settings)
        if "cases" in settings:
            settings["cases"] = [scaled(case) for case in settings["cases"]]
        return replace(golden, settings=settings)

    return spoil


def exchange_rows(one: str, other: str) -> Spoil:
    """Two weights of one shape change places in the name map."""

    def spoil(golden: Golden) -> Golden:
        return replace(golden, wrong_rows={one: other, other: one})

    return spoil


def swap_modulation(golden: Golden) -> Golden:
    """Shift and scale of the output layer change places."""
    name = "head.modulation"
    spoilt = {name: golden.weights[name].flip(1)} if name in golden.weights else {}
    return replace(golden, weights={**golden.weights, **spoilt})


def exchange_speakers(golden: Golden) -> Golden:
    """Who is who in the picture; where the picture is halved, nothing says it."""
    inputs, settings = dict(golden.inputs), dict(golden.settings)
    if "ref_target_masks" in inputs:
        inputs["ref_target_masks"] = inputs["ref_target_masks"][torch.tensor([1, 0, 2])]
    if settings.get("bbox"):
        settings["bbox"] = settings["bbox"][::-1]
    return replace(golden, inputs=inputs, settings=settings)


PERTURBATIONS: dict[str, Perturbation] = {
    "shift": Perturbation(scale_settings(1.01, "shift"), touches=("scheduler", *SAMPLED)),
    "guidance": Perturbation(scale_settings(1.01, "text_guide_scale"), touches=SAMPLED),
    "audio_guidance": Perturbation(scale_settings(1.01, "audio_guide_scale"), touches=SAMPLED),
    "momentum": Perturbation(
        scale_settings(0.9, "momentum", "apg_momentum"), touches=("apg", "stream_2p_apg_bbox")
    ),
    "cache_threshold": Perturbation(
        scale_settings(1e-12, "thresh", "teacache_thresh"), touches=("teacache", "stream_2p_teacache")
    ),
    "colours": Perturbation(
        scale_settings(0.8, "color_correction_strength"),
        touches=("stream_1p", "stream_2p_teacache", "clip_1p_cfg2"),
    ),
    "seed": Perturbation(scale_settings(2, "seed"), touches=RUNS),
    "lora_scale": Perturbation(scale_settings(1.01, "scale"), touches=("lora",)),
    "speakers": Perturbation(exchange_speakers, touches=("transformer_2p", "teacache", "stream_2p_apg_bbox")),
    "modulation": Perturbation(swap_modulation, touches=TRANSFORMER_CASES),
    "name_map": Perturbation(
        exchange_rows("blocks.0.norm3.weight", "blocks.0.norm_x.weight"), touches=TRANSFORMER_CASES
    ),
    "name_map_clip": Perturbation(
        exchange_rows("visual.transformer.0.norm1.weight", "visual.transformer.0.norm2.weight"),
        touches=("clip_visual", *RUNS),
    ),
    "name_map_vae": Perturbation(
        exchange_rows("decoder.middle.0.residual.2.weight", "decoder.middle.2.residual.2.weight"),
        touches=("vae", *RUNS),
    ),
    "name_map_text": Perturbation(
        exchange_rows("blocks.0.norm1.weight", "blocks.0.norm2.weight"), touches=("t5_encoder",)
    ),
}
