"""The six networks on weights by recipe, small and full size, and the sampling of motion."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.appearance import AppearanceConfig, AppearanceExtractor
from avatar_core.backends.ditto.layers import fold_norms
from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_extractor import MotionExtractor, MotionExtractorConfig
from avatar_core.backends.ditto.official import NETWORKS, motion_decoder, official_shapes
from avatar_core.backends.ditto.sampling import (
    ClipSampler,
    Schedule,
    alphas_cumprod,
    both_halves,
    guided,
    predicted_noise,
)
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork
from tests.parity.ditto.recipe import Shapes, randn, tiny_lmdm, weights
from tests.parity.golden import Golden, Values

GUIDANCE = 2.0
"""The sidecars name it in words only."""
FULL_SIZE: Mapping[str, tuple[type[nn.Module], Any]] = {
    "appearance": (AppearanceExtractor, AppearanceConfig()),
    "motion": (MotionExtractor, MotionExtractorConfig()),
    "warp": (WarpingNetwork, WarpConfig()),
    "decoder": (SpadeDecoder, DecoderConfig()),
    "stitch": (StitchingNetwork, StitchingConfig()),
    "lmdm": (MotionDecoder, LmdmConfig()),
}
WARP_RESULTS = {"out": "feature", "mask": "mask", "deformation": "deformation", "occlusion_map": "occlusion"}

TAGGED = re.compile(r"'(\w+/\w+)'(?:, shape)? \(([\d,]+)\)")
SLICED = re.compile(r"(\w+) (?:=|uses) [^\[\];]*(\[[^\]]*\])")
STEP = re.compile(r"(uncond|x_start|conditional|pred_noise)_t(\d+)")
TIME_PROBE = re.compile(r"probe_time_(sinusoid|mlp)_t(\d+)")
RUN = re.compile(r"(tiny|full)(\d+)")


def full_shapes(name: str) -> Shapes:
    network, config = FULL_SIZE[name]
    with torch.device("meta"):
        return official_shapes(network(config))


def network(golden: Golden, name: str) -> Any:
    """Of the sizes in the sidecar, else full size; folded as it runs."""
    shapes = golden.settings["shapes"][name] if "shapes" in golden.settings else full_shapes(name)
    model = NETWORKS[name](weights(golden.settings["seed"], shapes, golden.wrong_rows))
    fold_norms(model)
    return model


def tagged_inputs(golden: Golden) -> dict[str, Tensor]:
    """Inputs by recipe, as the sidecar's note gives their tags and shapes."""
    found = TAGGED.findall(golden.settings["note"])
    shapes = {tag: [int(size) for size in text.split(",")] for tag, text in found}
    return {tag: drawn(golden, tag, shape) for tag, shape in shapes.items()}


def drawn(golden: Golden, tag: str, shape: Any) -> Tensor:
    return torch.from_numpy(randn(golden.settings["seed"], tag, shape))


def slices(text: str) -> tuple[slice, ...]:
    """`[:, ::4, :64]`."""
    parts = [part.strip() for part in text.strip("[]").split(",")]
    return tuple(slice(*(int(n) if n else None for n in part.split(":"))) for part in parts)


@torch.inference_mode()
def nets_tiny(golden: Golden) -> Values:
    inputs = golden.inputs
    picture = inputs["appearance.image"]
    kp = {name: (inputs[f"{name}.kp_source"], inputs[f"{name}.kp_driving"]) for name in ("warp", "stitch")}
    warped = network(golden, "warp")(inputs["warp.feature_3d"], *kp["warp"])
    motion = network(golden, "motion")(picture)
    return {
        "appearance.f_s": network(golden, "appearance")(picture),
        **{f"motion.{name}": value for name, value in motion.items()},
        **{f"warp.{name}": getattr(warped, field) for name, field in WARP_RESULTS.items()},
        "decoder.image": network(golden, "decoder")(inputs["decoder.feature"]),
        "stitch.out": network(golden, "stitch")(*kp["stitch"]),
    }


@torch.inference_mode()
def net_appearance(golden: Golden) -> Values:
    """Part of the picture, whole result; whole picture, part of the result."""
    picture = golden.inputs["image_u8"] / 255
    model = network(golden, "appearance")
    values = {}
    for name, text in SLICED.findall(golden.settings["note"]):
        if name.endswith("_strided"):
            values[name] = model(picture)[slices(text)]
        else:
            values[name] = model(picture[slices(text)])
    return {name: values[name] for name in values.keys() & golden.results}


@torch.inference_mode()
def net_motion(golden: Golden) -> Values:
    motion: dict[str, Tensor] = network(golden, "motion")(golden.inputs["image_u8"] / 255)
    return motion


@torch.inference_mode()
def net_warp(golden: Golden) -> Values:
    model = network(golden, "warp")
    values = {}
    for volume in tagged_inputs(golden).values():
        warped = model(volume, golden.inputs["kp_source"], golden.inputs["kp_driving"])
        for name, field in WARP_RESULTS.items():
            whole = f"{name}_{volume.shape[-1]}"
            values[whole] = getattr(warped, field)
            if text := golden.settings["strides"].get(f"{whole}_strided"):
                values[f"{whole}_strided"] = values[whole][slices(text)]
    return {name: values[name] for name in values.keys() & golden.results}


@torch.inference_mode()
def net_decoder(golden: Golden) -> Values:
    model = network(golden, "decoder")
    strides = dict(SLICED.findall(golden.settings["note"]))
    values = {}
    for feature in tagged_inputs(golden).values():
        name = f"image_{feature.shape[-1]}"
        values[name] = model(feature)
        if text := strides.get(f"{name}_strided"):
            values[f"{name}_strided"] = values[name][slices(text)]
    return {name: values[name] for name in values.keys() & golden.results}


@torch.inference_mode()
def net_stitch(golden: Golden) -> Values:
    model = network(golden, "stitch")
    return {"out": model(golden.inputs["kp_source"], golden.inputs["kp_driving"])}


def full_lmdm(golden: Golden) -> MotionDecoder:
    step = golden.sibling("lmdm_step_full")
    return motion_decoder(weights(step.settings["seed"], full_shapes("lmdm"), step.wrong_rows))


LMDM: Mapping[str, Callable[[Golden], MotionDecoder]] = {"tiny": tiny_lmdm, "full": full_lmdm}


@torch.inference_mode()
def lmdm_step(golden: Golden) -> Values:
    model = LMDM[golden.name.removeprefix("lmdm_step_")](golden)
    (cond,) = tagged_inputs(golden).values()
    both = both_halves(model, cond)
    values: dict[str, Any] = {}
    for name in golden.results:
        if found := STEP.fullmatch(name):
            kind, time = found[1], int(found[2])
            x, cond_frame, times = golden.inputs["x"], golden.inputs["cond_frame"], torch.full((2,), time)
            clean, unconditional = guided(model, x, cond_frame, times, both, GUIDANCE)
            conditional, _ = guided(model, x, cond_frame, times, both, 1.0)
            noise = predicted_noise(x, clean, alphas_cumprod()[time])
            kinds = {"uncond": unconditional, "x_start": clean, "conditional": conditional}
            values[name] = (kinds | {"pred_noise": noise})[kind]
    return values | (probes(golden, model, cond) if "probe_rotary_in" in golden.inputs else {})


def probes(golden: Golden, model: MotionDecoder, cond: Tensor) -> dict[str, Tensor]:
    alphas = alphas_cumprod()
    values = {
        "alphas_cumprod": alphas,
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "sqrt_recip1m_alphas_cumprod": (1 / (1 - alphas)).sqrt(),
        "probe_rotary_out": model.rotary(golden.inputs["probe_rotary_in"]),
        "probe_cond_encoder_out": model.conditional(cond).tokens,
    }
    for name in golden.results:
        if found := TIME_PROBE.fullmatch(name):
            module = {"sinusoid": model.time_mlp[0], "mlp": model.time_mlp}[found[1]]
            values[name] = module(torch.tensor([int(found[2])]))
    return values


@torch.inference_mode()
def ddim(golden: Golden) -> Values:
    values: dict[str, Any] = {}
    for path in golden.results:
        name = path.removeprefix("schedules.")
        if path != name:
            values[path] = Schedule(int(re.sub(r"\D", "", name))).times
    for run in {path.partition(".")[0] for path in golden.results if path.endswith(".out")}:
        values |= sampled(golden, run)
    return values


def sampled(golden: Golden, run: str) -> dict[str, Any]:
    found = RUN.fullmatch(run)
    assert found
    model = LMDM[found[1]](golden)
    draws = itertools.count()
    sampler = ClipSampler(
        model,
        int(found[2]),
        GUIDANCE,
        draw=lambda shape: drawn(golden, f"ddim/{run}/draw{next(draws)}", shape),
        parity=True,
    )
    config = model.config
    cond = drawn(golden, "lmdm/cond", (1, config.seq_len, config.cond_feature_dim))
    cond_frame = drawn(golden, "lmdm/cond_frame", (1, config.nfeats))
    entered: list[Tensor] = []
    values: dict[str, Any] = {f"{run}.out": sampler.sample(cond_frame, cond, entered.append)}
    schedule = sampler.schedule
    values |= {f"{run}.{name}": getattr(schedule, name) for name in ("sigma", "c", "alpha_next_sqrt")}
    if f"{run}.traj_inputs" in golden.results:
        values[f"{run}.traj_inputs"] = torch.cat(entered)
    return values


CASES: dict[str, Callable[[Golden], Values]] = {
    "nets_tiny": nets_tiny,
    "net_appearance": net_appearance,
    "net_motion": net_motion,
    "net_warp": net_warp,
    "net_decoder": net_decoder,
    "net_stitch": net_stitch,
    "lmdm_step_": lmdm_step,
    "ddim": ddim,
}
