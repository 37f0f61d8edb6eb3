"""The models of a window on their device, from the stored conditions of a clip to the window's latents."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatar_core import weights
from avatar_core.backends.multitalk.audio import audio_window
from avatar_core.backends.multitalk.chunked_blocks import run_in_chunks
from avatar_core.backends.multitalk.clip import clip_features
from avatar_core.backends.multitalk.colour import match_colour
from avatar_core.backends.multitalk.config import DenoiseConfig
from avatar_core.backends.multitalk.official import load_clip, load_transformer, load_vae
from avatar_core.backends.multitalk.sampling import ClipInputs, SamplerSettings, denoise_window
from avatar_core.backends.multitalk.vae import decode_window, encode_condition
from avatar_core.backends.multitalk.window_decoder import as_frame
from avatar_core.backends.multitalk.windows import (
    SPARE_FRAMES,
    num_windows,
    window_seed,
    window_start,
    with_mirrored_end,
)
from avatar_core.memory import Level, attention, attention_kernel, compile_blocks, place
from avatar_core.stages.base import Report

Arrays = Mapping[str, NDArray[Any]]

_STACKS = ("blocks",)
_CASTS = {"int8_cast": "int8", "fp8_cast": "fp8"}


class WindowDenoiser:
    """`kernel` computes the transformer's attention."""

    def __init__(self, transformer: Any, clip: Any, vae: Any, device: str, kernel: str = "native") -> None:
        self._transformer = transformer
        self._clip = clip
        self._vae = vae
        self._device = device
        self._kernel = kernel

    @torch.inference_mode()
    def denoise(
        self,
        text: Arrays,
        reference: Arrays,
        audio: Arrays,
        seed: int,
        config: DenoiseConfig,
        report: Report,
        window: int,
        previous: Arrays | None,
    ) -> dict[str, NDArray[Any]]:
        """`latents` [16, T, h, w]; with a window to follow also `motion_frames` [3, frames, H, W] in -1..1,
        the end of this one, and in `parity` the state of the one generator that a clip has."""
        generator = self._generator(seed, window, config, previous)
        inputs = self.inputs(text, reference, audio, config, window, previous)
        settings = SamplerSettings.from_config(config)
        with attention(self._kernel):
            latents = denoise_window(self._transformer, inputs, settings, generator, report)
        tensors = {"latents": _array(latents)}
        if config.mode == "parity" or window + 1 < num_windows(int(audio["num_frames"]), config):
            picture = as_frame(reference["picture"]).to(self._device)
            frames = decode_window(self._vae, latents)
            parity = config.mode == "parity"
            frames = match_colour(frames, picture, config.colour_correction, parity=parity)
            tensors["motion_frames"] = _array(frames[:, -config.motion_frames :])
            if config.mode == "parity":
                tensors["generator_state"] = generator.get_state().numpy()
        return tensors

    @torch.inference_mode()
    def inputs(
        self,
        text: Arrays,
        reference: Arrays,
        audio: Arrays,
        config: DenoiseConfig,
        window: int,
        previous: Arrays | None,
    ) -> ClipInputs:
        """Of a window that begins with the picture, or with the end of the window before."""
        picture = as_frame(reference["picture"]).to(self._device)
        begin = self._tensor(previous["motion_frames"]) if previous else picture[:, None]
        condition = encode_condition(self._vae, begin[None], config.window_frames)
        return ClipInputs(
            prompt_embeds=self._tensor(text["prompt_embeds"]),
            negative_prompt_embeds=self._tensor(text["negative_prompt_embeds"]),
            clip_features=clip_features(self._clip, begin[None, :, -1]),
            condition=condition,
            audio=self._tensor(_speech(audio["embeddings"], window, config)),
            speaker_masks=self._tensor(reference["speaker_masks"]),
            motion_latents=_motion_latents(condition, begin.shape[1]) if previous else None,
        )

    def _generator(
        self, seed: int, window: int, config: DenoiseConfig, previous: Arrays | None
    ) -> torch.Generator:
        """In `parity` on the device and one for the whole clip, otherwise one per window, equal on every
        device."""
        if config.mode != "parity":
            return torch.Generator().manual_seed(window_seed(seed, window))
        generator = torch.Generator(self._device).manual_seed(seed)
        if previous:
            generator.set_state(torch.from_numpy(np.array(previous["generator_state"])))
        return generator

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).to(self._device)


def load_window_denoiser(
    names: Mapping[str, str], device: str, level: Level, config: DenoiseConfig
) -> WindowDenoiser:
    """`names` are those of the weights, by what they are."""
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    vae = load_vae(weights.locate(names["vae"]), device)
    clip = load_clip(weights.locate(names["clip"]), device, torch.float16 if on_gpu else torch.float32)
    transformer = load_transformer(
        names["transformer"],
        "cpu" if level.offload else device,
        dtype,
        lora=names.get("lora"),
        lora_scale=config.lora_scale,
        parity=config.mode == "parity",
        cast=_CASTS.get(config.transformer),
    )
    if level.row_chunks:
        run_in_chunks(transformer)
    place(transformer, level, device, _STACKS)
    compile_blocks(transformer, level, device, _STACKS)
    heads = transformer.config
    kernel = attention_kernel(device, dtype, heads.dim // heads.num_heads)
    return WindowDenoiser(transformer, clip, vae, device, kernel)


def _speech(embeddings: NDArray[np.float32], window: int, config: DenoiseConfig) -> NDArray[np.float32]:
    """Rows round the last frames lie beyond the window's end."""
    start = window_start(window, config)
    extended = with_mirrored_end(embeddings, start + config.window_frames + SPARE_FRAMES)
    return audio_window(extended, start, config.window_frames)


def _motion_latents(condition: Tensor, num_frames: int) -> Tensor:
    """Those of the frames before, without the mask."""
    return condition[0, 4:, : 1 + (num_frames - 1) // 4]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.float().cpu().numpy())
