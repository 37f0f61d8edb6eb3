"""The `multitalk` backend: MultiTalk (https://arxiv.org/abs/2505.22647) on Wan2.1 I2V 14B, 1 or 2 speakers.

Planning must start fast, so what computes (torch, diffusers, transformers) is imported by the methods that
use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from avatar_core import weights
from avatar_core.backends.base import Picture, ReportStep, Tensors
from avatar_core.backends.multitalk.config import OFFICIAL_QUANTISED, DenoiseConfig, MultiTalkConfig
from avatar_core.backends.multitalk.picture import boxes_of_faces, fit_picture, speaker_masks
from avatar_core.backends.multitalk.windows import num_speech_frames, num_video_frames, num_windows
from avatar_core.errors import about
from avatar_core.media.face import Face
from avatar_core.optional_packages import hide_broken_packages
from avatar_core.weights.ensure import ensure

_STAGES = ("audio", "text", "reference", "denoise", "decode")
_TINY = "multitalk-tiny"
_ENCODERS = {"vae": "vae", "clip": "clip"}  # that every window needs for the next


class MultiTalkBackend:
    name = "multitalk"
    label = "MultiTalk"
    config_type = MultiTalkConfig
    versions: ClassVar = MappingProxyType(
        dict.fromkeys(_STAGES, 1) | {"audio": 2, "reference": 2, "decode": 2}
    )
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 0.2, "text": 5.0, "reference": 0.1, "denoise": 150.0, "decode": 5.0}
    )
    max_speakers = 2
    text_sees_picture = False

    def __init__(self, config: MultiTalkConfig) -> None:
        self.config = config
        # Random weights prove the chain on any machine.
        heavy = "cpu" if config.checkpoint == _TINY else "gpu"
        self.queues: Mapping[str, str] = dict.fromkeys(_STAGES, heavy) | {"audio": "cpu", "reference": "cpu"}

    def resolve(self) -> "MultiTalkBackend":
        checkpoint = self.config.checkpoint
        used = [name for stage in _STAGES for name in self.weights(stage, getattr(self.config, stage))]
        ensure(checkpoint, list(dict.fromkeys(used)), _write_tiny if checkpoint == _TINY else None)
        return self

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        return tuple(self._parts(stage, config).values())

    def _parts(self, stage: str, config: Any) -> dict[str, str]:
        """Names of the weights by what they are."""
        if stage == "audio":
            parts = {"audio": "audio"}
        elif stage == "text":
            parts = {"text": "text" if config.encoder == "bf16" else f"text-{config.encoder}"}
        elif stage == "denoise":
            parts = _denoise_parts(config)
        else:
            parts = {"vae": "vae"} if stage == "decode" else {}
        return {what: f"{self.config.checkpoint}/{part}" for what, part in parts.items()}

    def fit_picture(
        self, picture: Picture, max_side: int, config: Any
    ) -> tuple[Picture, tuple[float, float]]:
        """By `image_size`; `max_side` is for backends of any size. What does not fit is cut off on both
        sides."""
        with about("picture"):
            fitted = fit_picture(picture, config.image_size)
        scale = max(fitted.shape[0] / picture.shape[0], fitted.shape[1] / picture.shape[1])
        return fitted, (scale, scale)

    def num_frames(self, duration_s: float, fps: float) -> int:
        speech = num_speech_frames(duration_s, fps, self.config.mode)
        return num_video_frames(speech, self.config.denoise)

    def num_windows(self, duration_s: float, fps: float) -> int:
        return num_windows(num_speech_frames(duration_s, fps, self.config.mode), self.config.denoise)

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> Any:
        if stage == "reference":
            return None
        hide_broken_packages()
        names = self._parts(stage, config)
        if stage == "audio":
            return _load_audio_encoder(names["audio"], device)
        if stage == "text":
            return _load_text_encoder(names["text"], device, memory)
        if stage == "denoise":
            return _load_denoiser(names, config, device, memory)
        return _load_decoder(names["vae"], device)

    def memory_levels(self, stage: str, device: str) -> tuple[str, ...]:
        if stage not in ("text", "denoise"):
            return ()
        from avatar_core.memory import LEVEL_NAMES, fitting_level

        return LEVEL_NAMES[LEVEL_NAMES.index(fitting_level(device).name) :]

    def encode_audio(
        self,
        models: Any,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        """`embeddings` [persons, frames, layers, channels] of the whole sound."""
        count = num_speech_frames(len(tracks[0]) / sample_rate, fps, self.config.mode)
        embeddings = models.encode(tracks, sample_rate, count)
        return {"embeddings": embeddings, "num_frames": np.array(num_frames)}

    def encode_text(
        self, models: Any, prompt: str, negative_prompt: str | None, picture: Picture | None, config: Any
    ) -> Tensors:
        unwanted = config.negative_prompt if negative_prompt is None else negative_prompt
        encoded = {"prompt_embeds": prompt, "negative_prompt_embeds": unwanted}
        return {name: models.encode(words).float().cpu().numpy() for name, words in encoded.items()}

    def encode_scene(
        self,
        models: Any,
        picture: Picture,
        faces: Sequence[Face],
        boxes: Sequence[Sequence[float]],
        speakers: int,
        config: Any,
    ) -> Tensors:
        """`picture` as it is animated; `speaker_masks` [3, h, w] of where it shows each speaker and none."""
        height, width = picture.shape[:2]
        regions: Sequence[Sequence[float]] | None = boxes or None
        if regions is None and config.mode == "default" and faces:
            regions = boxes_of_faces(faces, width, height)
        fitted, _ = self.fit_picture(picture, 0, config)
        masks = speaker_masks(width, height, regions if speakers > 1 else None, speakers, config.image_size)
        return {"picture": fitted, "speaker_masks": masks}

    def denoise_window(
        self,
        models: Any,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: Any,
        report: ReportStep,
        window: int,
        previous: Tensors | None,
    ) -> Tensors:
        text, reference, audio = (conditions[stage] for stage in ("text", "reference", "audio"))
        tensors: Tensors = models.denoise(text, reference, audio, seed, config, report, window, previous)
        return tensors

    def decode_windows(
        self,
        models: Any,
        picture: Picture,
        conditions: Mapping[str, Tensors],
        windows: Sequence[Tensors],
        config: Any,
    ) -> Iterator[Picture]:
        denoise = self.config.denoise
        for window, tensors in enumerate(windows):
            frames = models.frames(
                tensors["latents"], picture, denoise.colour_correction, parity=config.mode == "parity"
            )
            yield from frames if window == 0 else frames[denoise.motion_frames :]


def _denoise_parts(config: DenoiseConfig) -> dict[str, str]:
    """The official quantised files have the LoRA merged; the others take it on loading."""
    with_lora = config.lora != "none"
    if config.transformer in OFFICIAL_QUANTISED:
        merged = f"-{config.lora}" if with_lora else ""
        return {"transformer": f"transformer-{config.transformer}{merged}", **_ENCODERS}
    lora = {"lora": f"lora-{config.lora}"} if with_lora else {}
    return {"transformer": "transformer", **lora, **_ENCODERS}


def _load_audio_encoder(name: str, device: str) -> Any:
    from avatar_core.backends.multitalk.audio import AudioEncoder

    return AudioEncoder(weights.locate(name), device)


def _load_text_encoder(name: str, device: str, memory: str | None) -> Any:
    import torch

    from avatar_core.backends.multitalk.official import TOKENIZER, load_text_encoder, wan_folder
    from avatar_core.backends.multitalk.text import TextEncoder
    from avatar_core.memory import fitting_level, get_level, place

    level = get_level(memory) if memory else fitting_level(device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_text_encoder(name, "cpu" if level.offload else device, dtype)
    place(model, level, device, ("encoder.block",))
    return TextEncoder(model, wan_folder(name) / TOKENIZER, device)


def _load_denoiser(names: Mapping[str, str], config: DenoiseConfig, device: str, memory: str | None) -> Any:
    from avatar_core.backends.multitalk.window_denoiser import load_window_denoiser
    from avatar_core.memory import fitting_level, get_level

    level = get_level(memory) if memory else fitting_level(device)
    return load_window_denoiser(names, device, level, config)


def _load_decoder(name: str, device: str) -> Any:
    from avatar_core.backends.multitalk.official import load_vae
    from avatar_core.backends.multitalk.window_decoder import WindowDecoder

    return WindowDecoder(load_vae(weights.locate(name), device), device)


def _write_tiny(folder: Path) -> None:
    hide_broken_packages()
    from avatar_core.backends.multitalk.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder)
