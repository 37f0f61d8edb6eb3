"""Sound, text and pictures on their way to the transformer, the autoencoder, and colours."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Wav2Vec2Config

from avatar_core.backends.multitalk.audio import (
    LOUDNESS_LUFS,
    AudioEncoder,
    gain,
    levelled,
    loudness_lufs,
    normalised,
)
from avatar_core.backends.multitalk.clip import clip_features, clip_pixels
from avatar_core.backends.multitalk.colour import match_colour
from avatar_core.backends.multitalk.picture import (
    BUCKETS,
    cover,
    covering,
    halves,
    masks_within,
    nearest_key,
    pixel_masks,
)
from avatar_core.backends.multitalk.transformer import token_masks
from avatar_core.backends.multitalk.vae import decode_window, encode
from avatar_core.backends.multitalk.window_decoder import as_frame
from avatar_core.backends.multitalk.windows import SAMPLE_RATE, num_speech_frames
from tests.parity.golden import Compare, Golden, Values
from tests.parity.multitalk.models import load_clip, load_text_encoder, load_vae
from tests.parity.recording import outputs_of


def wav2vec2(golden: Golden) -> Values:
    """From files as they are published."""
    samples = golden.inputs["wav"].numpy()
    num_frames = num_speech_frames(len(samples) / SAMPLE_RATE, 25.0, "parity")
    with TemporaryDirectory() as folder:
        Wav2Vec2Config(**golden.settings["config"]).save_pretrained(folder)
        save_file(dict(golden.weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        encoder = AudioEncoder(Path(folder), "cpu")
    with outputs_of(encoder.model) as calls:
        embedding = torch.from_numpy(encoder.embed(samples, num_frames))
    layers = embedding.shape[1]
    rows = calls[f"feature_extractor.conv_layers.{len(golden.settings['config']['conv_dim']) - 1}"][0][0]
    states = [calls["encoder.dropout"][0][0]]
    states += [calls[f"encoder.layers.{layer}"][0][0] for layer in range(layers)]
    return {
        "inter.normalised_input": torch.from_numpy(normalised(samples))[None],
        "inter.conv_features": rows.transpose(1, 2),
        "inter.interpolated": calls["feature_extractor"][0][0].transpose(1, 2),
        **{f"inter.hidden_states.{layer}": state for layer, state in enumerate(states)},
        "out.audio_embedding": embedding,
        "out.last_hidden_state": states[-1],
        "frames": num_frames,
        "conv_frames": rows.shape[-1],
        "n_hidden_states": len(states),
    }


@torch.no_grad()
def t5_encoder(golden: Golden) -> Values:
    ids, mask = golden.inputs["ids"], golden.inputs["mask"]
    states = load_text_encoder(golden)(ids, attention_mask=mask).last_hidden_state
    return {"out.hidden": Compare(states, mask.bool()), "valid_lengths": mask.sum(dim=1)}


@torch.no_grad()
def clip_visual(golden: Golden) -> Values:
    clip, frame = load_clip(golden), golden.inputs["image"][:, :, 0]
    return {
        "inter.pixel_values": clip_pixels(frame, clip.config.image_size),
        "out.features": clip_features(clip, frame),
    }


@torch.no_grad()
def vae(golden: Golden) -> Values:
    model = load_vae(golden)
    latents = encode(model, golden.inputs["video"][None])[0]
    return {
        "out.latent_normalised": latents,
        "out.decoded": decode_window(model, latents),
        "latents_mean": list(model.config.latents_mean),
        "latents_std": list(model.config.latents_std),
    }


def color_match(golden: Golden) -> Values:
    inputs = golden.inputs
    reference = inputs["reference"][0, :, 0]

    def matched(name: str, strength: float) -> Tensor:
        return match_colour(inputs[name][0], reference, strength, parity=True)[None]

    return {
        "out.strength1": matched("source", 1.0),
        "out.strength0.4": matched("source", 0.4),
        "out.flat_strength1": matched("source_flat_frame1", 1.0),
    }


def loudness(golden: Golden) -> Values:
    samples, rate = golden.inputs["wav"].numpy(), golden.settings["sample_rate"]
    measured = loudness_lufs(samples, rate)
    return {
        "out.wav": torch.from_numpy(levelled(samples, rate, samples)),
        "measured_lufs": measured,
        "gain": gain(measured),
        "target": LOUDNESS_LUFS,
        "silence_lufs": str(loudness_lufs(0 * samples, rate)),
        "samples_to_frames": [[count, frames_of(count)] for count in sample_counts(golden)],
    }


def frames_of(num_samples: int) -> int:
    return num_speech_frames(num_samples / SAMPLE_RATE, 25.0, "parity")


def sample_counts(golden: Golden) -> list[int]:
    """The first of each recorded pair; the second is a result."""
    sidecar = json.loads((golden.folder / f"{golden.name}.json").read_text())
    return [count for count, _ in sidecar["samples_to_frames"]]


def image_and_masks(golden: Golden) -> Values:
    values: dict[str, Any] = {}
    for number, row in enumerate(golden.settings["bucket_table"]):
        values |= {f"bucket_table.{number}.{name}": value for name, value in bucket(row).items()}
    for number in range(sum(name.endswith(".in") for name in golden.inputs)):
        height, width = shape_of(golden, f"image{number}.out_uint8")[3:]
        fitted = cover(golden.inputs[f"image{number}.in"].numpy(), (height, width))
        pixels = torch.tensor(fitted).permute(2, 0, 1)[None, :, None]
        values |= {f"image{number}.out_uint8": pixels}
        values |= {f"image{number}.out_normalised": as_frame(fitted)[None, :, None]}
    for number, case in enumerate(golden.settings["masks"]):
        values |= {f"mask{number}.{name}": value for name, value in masks(case).items()}
    return values


def bucket(row: Mapping[str, Any]) -> dict[str, Any]:
    height, width = row["src_h"], row["src_w"]
    sizes = BUCKETS[int(row["size"].rpartition("-")[2])]
    key = nearest_key(height / width, sizes)
    target = sizes[key]
    resized, top, left = covering(height, width, target)
    found = {"bucket": f"{key:.2f}", "crop_top": top, "crop_left": left}
    found |= {"target_h": target[0], "target_w": target[1]}
    return found | {"resized_h": resized[0], "resized_w": resized[1]}


def shape_of(golden: Golden, name: str) -> list[int]:
    """How large a picture was made is told by the recorded one alone."""
    with safe_open(golden.folder / f"{golden.name}.safetensors", framework="pt") as file:
        return list(file.get_slice(name).get_shape())


def masks(case: Mapping[str, Any]) -> dict[str, Any]:
    target, size = (case["target_h"], case["target_w"]), (case["src_w"], case["src_h"])
    boxes = [(x0, y0, x1, y1) for y0, x0, y1, x1 in case["bbox_rows_cols"] or []]
    latent = torch.from_numpy(masks_within(target, *size, boxes or None, 2))
    return {
        "pixel": torch.from_numpy(pixel_masks(target, *size, boxes or halves(*size))),
        "latent": latent,
        "token": token_masks(latent),
    }


CASES: dict[str, Callable[[Golden], Values]] = {
    "wav2vec2": wav2vec2,
    "t5_encoder": t5_encoder,
    "clip_visual": clip_visual,
    "vae": vae,
    "color_match": color_match,
    "loudness": loudness,
    "image_and_masks": image_and_masks,
}
