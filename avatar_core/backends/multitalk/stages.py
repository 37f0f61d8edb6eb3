"""The stages of the `multitalk` backend.

Planning must start fast, so what computes (torch, diffusers, transformers) is imported by the methods that
use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from avatar_core import weights
from avatar_core.backends.multitalk.config import (
    OFFICIAL_QUANTISED,
    AudioConfig,
    DecodeConfig,
    DenoiseConfig,
    ReferenceConfig,
    TextConfig,
)
from avatar_core.backends.multitalk.picture import boxes_of_faces, speaker_masks
from avatar_core.backends.multitalk.windows import num_speech_frames, num_windows
from avatar_core.stages.audio import SAMPLE_RATE, AudioStage, Track
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.clip_stage import ClipRules
from avatar_core.stages.decode import ChainedDecodeStage
from avatar_core.stages.denoise import ChainedDenoiseStage
from avatar_core.stages.reference import Scene, SceneReferenceStage
from avatar_core.stages.subject import Subject
from avatar_core.stages.text import TextStage

if TYPE_CHECKING:
    from avatar_core.backends.multitalk.audio import AudioEncoder
    from avatar_core.backends.multitalk.text import TextEncoder
    from avatar_core.backends.multitalk.window_decoder import WindowDecoder
    from avatar_core.backends.multitalk.window_denoiser import WindowDenoiser


class MultiTalkAudio(AudioStage[AudioConfig, "AudioEncoder"]):
    version = 2
    guessed_seconds = 0.2

    def parts(self, options: AudioConfig) -> tuple[str, ...]:
        return ("audio",)

    def load_models(self, options: AudioConfig, device: str, memory: str | None) -> "AudioEncoder":
        from avatar_core.backends.multitalk.audio import AudioEncoder

        return AudioEncoder(weights.locate(f"{self.checkpoint}/audio"), device)

    def encode(
        self,
        models: "AudioEncoder",
        tracks: Sequence[Track],
        fps: float,
        num_frames: int,
        options: AudioConfig,
    ) -> Tensors:
        """`embeddings` [persons, frames, layers, channels] of the whole sound."""
        count = num_speech_frames(len(tracks[0]) / SAMPLE_RATE, fps, options.mode)
        embeddings = models.encode(tracks, SAMPLE_RATE, count)
        return {"embeddings": embeddings, "num_frames": np.array(num_frames)}


class MultiTalkText(TextStage[TextConfig, "TextEncoder"]):
    version = 1
    device_kind = "gpu"
    guessed_seconds = 5.0
    has_memory_levels = True

    def parts(self, options: TextConfig) -> tuple[str, ...]:
        return ("text" if options.encoder == "bf16" else f"text-{options.encoder}",)

    def load_models(self, options: TextConfig, device: str, memory: str | None) -> "TextEncoder":
        import torch

        from avatar_core.backends.multitalk.official import TOKENIZER, load_text_encoder, wan_folder
        from avatar_core.backends.multitalk.text import TextEncoder
        from avatar_core.memory import chosen_level, place

        (name,) = self.weight_names(options)
        level = chosen_level(memory, device)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = load_text_encoder(name, "cpu" if level.offload else device, dtype)
        place(model, level, device, ("encoder.block",))
        return TextEncoder(model, wan_folder(name) / TOKENIZER, device)

    def encode(
        self, models: "TextEncoder", prompt: str, negative_prompt: str | None, options: TextConfig
    ) -> Tensors:
        unwanted = options.negative_prompt if negative_prompt is None else negative_prompt
        encoded = {"prompt_embeds": prompt, "negative_prompt_embeds": unwanted}
        return {name: models.encode(words).float().cpu().numpy() for name, words in encoded.items()}


class MultiTalkReference(SceneReferenceStage[ReferenceConfig, None]):
    version = 2
    guessed_seconds = 0.1

    def load_models(self, options: ReferenceConfig, device: str, memory: str | None) -> None:
        return None

    def encode(self, models: None, scene: Scene, options: ReferenceConfig) -> Tensors:
        """`picture` as it is animated; `speaker_masks` [3, h, w] of where it shows each speaker and none."""
        height, width = scene.picture.shape[:2]
        regions: Sequence[Sequence[float]] | None = scene.boxes or None
        if regions is None and options.mode == "default" and scene.faces:
            regions = boxes_of_faces(scene.faces, width, height)
        shared = regions if scene.speakers > 1 else None
        masks = speaker_masks(width, height, shared, scene.speakers, options.image_size)
        return {"picture": scene.fitted, "speaker_masks": masks}


class MultiTalkDenoise(ChainedDenoiseStage[DenoiseConfig, "WindowDenoiser"]):
    version = 1
    inputs = ("audio", "text", "reference")
    device_kind = "gpu"
    guessed_seconds = 150.0
    has_memory_levels = True

    def num_windows(self, subject: Subject) -> int:
        options: DenoiseConfig = subject.options.by_stage[self.name]
        return num_windows(num_speech_frames(subject.segment.duration_s, subject.fps, options.mode), options)

    def parts(self, options: DenoiseConfig) -> tuple[str, ...]:
        return tuple(_denoise_parts(options).values())

    def load_models(self, options: DenoiseConfig, device: str, memory: str | None) -> "WindowDenoiser":
        from avatar_core.backends.multitalk.window_denoiser import load_window_denoiser
        from avatar_core.memory import chosen_level

        names = {what: f"{self.checkpoint}/{part}" for what, part in _denoise_parts(options).items()}
        return load_window_denoiser(names, device, chosen_level(memory, device), options)

    def denoise_window(
        self,
        models: "WindowDenoiser",
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: DenoiseConfig,
        report: Report,
        window: int,
        previous: Tensors | None,
    ) -> Tensors:
        audio, text, reference = (conditions[stage] for stage in self.inputs)
        return models.denoise(text, reference, audio, seed, options, report, window, previous)


class MultiTalkDecode(ChainedDecodeStage[DecodeConfig, "WindowDecoder"]):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 5.0

    def __init__(self, backend: ClipRules, checkpoint: str, denoise: DenoiseConfig) -> None:
        super().__init__(backend, checkpoint)
        self._denoise = denoise

    def parts(self, options: DecodeConfig) -> tuple[str, ...]:
        return ("vae",)

    def load_models(self, options: DecodeConfig, device: str, memory: str | None) -> "WindowDecoder":
        from avatar_core.backends.multitalk.official import load_vae
        from avatar_core.backends.multitalk.window_decoder import WindowDecoder

        return WindowDecoder(load_vae(weights.locate(f"{self.checkpoint}/vae"), device), device)

    def frames(
        self,
        models: "WindowDecoder",
        picture: Picture,
        windows: Sequence[Tensors],
        options: DecodeConfig,
    ) -> Iterator[Picture]:
        denoise, parity = self._denoise, options.mode == "parity"
        for window, tensors in enumerate(windows):
            frames = models.frames(tensors["latents"], picture, denoise.colour_correction, parity=parity)
            yield from frames if window == 0 else frames[denoise.motion_frames :]


def _denoise_parts(options: DenoiseConfig) -> dict[str, str]:
    """By what they are: every window needs the encoders for the next. The official quantised files have the
    LoRA merged; the others take it on loading."""
    encoders = {"vae": "vae", "clip": "clip"}
    with_lora = options.lora != "none"
    if options.transformer in OFFICIAL_QUANTISED:
        merged = f"-{options.lora}" if with_lora else ""
        return {"transformer": f"transformer-{options.transformer}{merged}", **encoders}
    lora = {"lora": f"lora-{options.lora}"} if with_lora else {}
    return {"transformer": "transformer", **lora, **encoders}
