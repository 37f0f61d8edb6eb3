"""Schedules, whole denoising loops, the autoencoder, and what the loop is handed."""

import re
from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from torch import Tensor

from avatar_core.backends.hunyuan.rope import rotary_tables
from avatar_core.backends.hunyuan.sampling import (
    MOTION_EXP,
    MOTION_POSE,
    ClipConditions,
    SamplerSettings,
    denoise_steps,
)
from avatar_core.backends.hunyuan.schedules import WINDOW, ClipWindows, euler_step, flow_sigmas
from avatar_core.backends.hunyuan.transformer import TextConditions
from avatar_core.backends.hunyuan.vae import (
    NUM_REFERENCE_FRAMES,
    build_vae,
    decode_tiles,
    encode_reference,
)
from avatar_core.checkpoint import load_strict
from tests.parity.golden import Compare, Golden, Values
from tests.parity.hunyuan.transformer import load_transformer


def scheduler(golden: Golden) -> Values:
    values = {}
    for pair in golden.settings["pairs"]:
        index = pair["index"]
        sigmas = flow_sigmas(pair["steps"], pair["shift"])
        values |= {f"{index}.sigmas": sigmas, f"{index}.timesteps": sigmas[:-1] * 1000}
        latents = golden.inputs[f"{index}.x0"]
        for step in range(sum(name.startswith(f"{index}.v") for name in golden.inputs)):
            noise_pred = golden.inputs[f"{index}.v{step}"]
            latents = euler_step(latents, noise_pred, sigmas[step], sigmas[step + 1])
            values[f"{index}.x{step + 1}"] = latents
    return values


def conditions_of(golden: Golden) -> ClipConditions:
    inputs, settings = golden.inputs, golden.settings
    return ClipConditions(
        prompt=TextConditions(inputs["prompt_embeds"], inputs["prompt_mask"], inputs["pooled"]),
        negative_prompt=TextConditions(
            inputs["negative_prompt_embeds"], inputs["negative_prompt_mask"], inputs["negative_pooled"]
        ),
        ref_latents=inputs["ref_latents"],
        audio=inputs["audio_prompts"],
        face_mask=inputs["face_masks"],
        motion_exp=torch.tensor([settings["motion_exp"]]),
        motion_pose=torch.tensor([settings["motion_pose"]]),
        fps=torch.tensor([settings["fps"]]),
    )


def settings_of(golden: Golden) -> SamplerSettings:
    return SamplerSettings(
        num_inference_steps=golden.settings["steps"],
        guidance_scale=golden.settings["cfg_scale"],
        flow_shift=golden.settings["shift"],
        step_cache="reference",
        latents_dtype=getattr(torch, golden.settings["round_dtype"].removeprefix("torch.")),
    )


def loop(golden: Golden) -> Values:
    transformer = load_transformer(golden.sibling(golden.settings["weights"]))
    conditions, settings = conditions_of(golden), settings_of(golden)
    results = list(denoise_steps(transformer, conditions, golden.inputs["noise"], settings))
    kept = [results[step] for step in golden.settings["kept_steps"]]
    sigmas = flow_sigmas(settings.num_inference_steps, settings.flow_shift)
    num_kept_frames = ClipWindows.of(conditions.audio.shape[1]).num_kept_frames
    return {
        "sched.sigmas": sigmas,
        "sched.timesteps": sigmas[:-1] * 1000,
        "mid.guidance_scale": [result.guidance_scale for result in results],
        "mid.is_cache": torch.tensor([result.is_cached for result in results]),
        "mid.latents_all": torch.stack([result.latents for result in kept]),
        "mid.window_noise_pred": torch.stack([torch.stack(list(result.noise_preds)) for result in kept]),
        "out.latents": results[-1].latents[:, :, :num_kept_frames],
    }


@torch.no_grad()
def vae_tiny(golden: Golden) -> Values:
    pixels, latents = golden.inputs["x"], golden.inputs["z"]
    vae = load_vae(golden, is_causal=True)
    tiled = {
        "tiled.moments": vae.encode(pixels).latent_dist.parameters,
        "tiled.decoded": torch.cat(list(decode_tiles(vae, latents)), dim=2),
    }
    noncausal = load_vae(golden, is_causal=False)
    for each in (vae, noncausal):
        each.use_tiling = each.use_framewise_encoding = each.use_framewise_decoding = False
    return tiled | {
        "plain.moments": vae.encode(corner(golden, "x")).latent_dist.parameters,
        "plain.decoded": vae.decode(corner(golden, "z")).sample,
        "plain_noncausal_mid.decoded": noncausal.decode(corner(golden, "z")).sample,
    }


def load_vae(golden: Golden, is_causal: bool) -> AutoencoderKLHunyuanVideo:
    vae = build_vae({**golden.settings["config"], "mid_block_causal_attn": is_causal})
    load_strict(vae, golden.weights)
    return vae


def corner(golden: Golden, name: str) -> Tensor:
    """The part of an input that was coded without tiles. Its size is told by the description alone, as in
    `x[:,:,:9,:32,:32]`."""
    found = re.search(rf"\b{name}\[:, ?:, ?:(\d+), ?:(\d+), ?:(\d+)\]", golden.settings["desc"])
    if found is None:
        raise ValueError(f"the description does not say which part of {name} was coded without tiles")
    num_frames, height, width = map(int, found.groups())
    return golden.inputs[name][:, :, :num_frames, :height, :width]


def predict_glue(golden: Golden) -> Values:
    """Shapes, from models without memory; those of the recording had one latent channel."""
    with torch.device("meta"):
        vae = build_vae(golden.sibling("vae_tiny").settings["config"])
    picture = golden.inputs["pixel_value_ref"][0, 0].permute(1, 2, 0).to(torch.uint8).numpy()
    ref_latents = encode_reference(vae, picture, generator=None)
    height, width = (side // 2 for side in ref_latents.shape[3:])
    cosines, _ = rotary_tables(WINDOW, height, width, (16, 56, 56), 256)
    return {
        "frame": NUM_REFERENCE_FRAMES,
        "n_tokens": len(cosines),
        "ref_latents_shape": Compare(torch.tensor(ref_latents.shape), rows=[0, 2, 3, 4]),
        "motion_exp": [MOTION_EXP],
        "motion_pose": [MOTION_POSE],
    }


def image_pixels(golden: Golden) -> Values:
    return {"motion_bucket_id_heads": MOTION_POSE, "motion_bucket_id_exps": MOTION_EXP}


CASES: dict[str, Callable[[Golden], Values]] = {
    "scheduler": scheduler,
    "loop_": loop,
    "vae_tiny": vae_tiny,
    "predict_glue": predict_glue,
    "image_pixels": image_pixels,
}
