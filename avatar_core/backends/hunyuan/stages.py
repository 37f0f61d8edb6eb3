"""The stages of the `hunyuan` backend.

Planning must start fast, so what computes (torch, diffusers, transformers) is imported by the methods that
use it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avatar_core import weights
from avatar_core.backends.hunyuan.audio import WhisperEncoder, clip_windows, num_rows
from avatar_core.backends.hunyuan.config import (
    AudioConfig,
    DecodeConfig,
    DenoiseConfig,
    ReferenceConfig,
    TextConfig,
)
from avatar_core.backends.hunyuan.picture import face_mask, latent_mask
from avatar_core.errors import about
from avatar_core.media.face import Face, choose
from avatar_core.media.face_torchscript import TorchScriptFaceDetector
from avatar_core.stages.audio import SAMPLE_RATE, AudioStage, Track
from avatar_core.stages.base import Picture, Report, Tensors
from avatar_core.stages.decode import DecodeStage
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.reference import ReferenceStage
from avatar_core.stages.text import PictureTextStage

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    from avatar_core.backends.hunyuan.clip_denoiser import ClipDenoiser
    from avatar_core.backends.hunyuan.text import TextEncoder

_PARITY_SEED = 128  # of the published scripts
_TEXTS = ("prompt_embeds", "prompt_mask", "pooled_prompt_embeds")


class HunyuanAudio(AudioStage[AudioConfig, WhisperEncoder]):
    version = 2
    guessed_seconds = 0.1

    def parts(self, options: AudioConfig) -> tuple[str, ...]:
        return ("whisper",)

    def load_models(self, options: AudioConfig, device: str, memory: str | None) -> WhisperEncoder:
        return WhisperEncoder(weights.locate(f"{self.checkpoint}/whisper"), device)

    def encode(
        self,
        models: WhisperEncoder,
        tracks: Sequence[Track],
        fps: float,
        num_frames: int,
        options: AudioConfig,
    ) -> Tensors:
        states = models.encode(tracks, SAMPLE_RATE, parity=options.mode == "parity")
        return {"hidden_states": states[: num_rows(fps, num_frames)], "num_frames": np.array(num_frames)}


class HunyuanText(PictureTextStage[TextConfig, "TextEncoder"]):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 5.0
    has_memory_levels = True

    def parts(self, options: TextConfig) -> tuple[str, ...]:
        return ("llava", "clip")

    def load_models(self, options: TextConfig, device: str, memory: str | None) -> "TextEncoder":
        import torch

        from avatar_core.backends.hunyuan.text import TextEncoder
        from avatar_core.memory import chosen_level

        folder = weights.locate(f"{self.checkpoint}/llava").parent
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        return TextEncoder(folder, device, dtype, chosen_level(memory, device))

    def encode(
        self,
        models: "TextEncoder",
        prompt: str,
        negative_prompt: str | None,
        picture: Picture,
        options: TextConfig,
    ) -> Tensors:
        unwanted = options.negative_prompt if negative_prompt is None else negative_prompt
        encoded = {}
        with about("prompt (prompt_prefix included)"):
            encoded[""] = models.encode(options.prompt_prefix + prompt, picture)
        with about("negative_prompt"):
            encoded["negative_"] = models.encode(unwanted, picture)
        return {f"{half}{name}": encoded[half][name].cpu().numpy() for half in encoded for name in _TEXTS}


class HunyuanReference(
    ReferenceStage[ReferenceConfig, tuple[TorchScriptFaceDetector, "AutoencoderKLHunyuanVideo"]]
):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 5.0

    def parts(self, options: ReferenceConfig) -> tuple[str, ...]:
        return ("vae", "detector")

    def load_models(
        self, options: ReferenceConfig, device: str, memory: str | None
    ) -> tuple[TorchScriptFaceDetector, "AutoencoderKLHunyuanVideo"]:
        detector = weights.locate(f"{self.checkpoint}/detector") / "detface.pt"
        return TorchScriptFaceDetector(detector), _load_vae(self.checkpoint, device)

    def encode(
        self,
        models: tuple[TorchScriptFaceDetector, "AutoencoderKLHunyuanVideo"],
        picture: Picture,
        faces: Sequence[Face],
        options: ReferenceConfig,
    ) -> Tensors:
        import torch

        from avatar_core.backends.hunyuan.vae import encode_reference

        detector, vae = models
        height, width = picture.shape[:2]
        parity = options.mode == "parity"
        box = _face_box(detector.detect(picture), faces, parity=parity)
        if parity:
            generator = torch.Generator(vae.device).manual_seed(_PARITY_SEED)
        else:
            generator = torch.Generator().manual_seed(0)
        latents = encode_reference(vae, picture, generator)
        return {
            "ref_latents": latents.float().cpu().numpy(),
            "face_mask": latent_mask(face_mask(box, width, height)),
        }


class HunyuanDenoise(DenoiseStage[DenoiseConfig, "ClipDenoiser"]):
    version = 1
    inputs = ("audio", "text", "reference")
    device_kind = "gpu"
    guessed_seconds = 100.0
    has_memory_levels = True

    def parts(self, options: DenoiseConfig) -> tuple[str, ...]:
        return ("transformer-fp8" if options.transformer == "fp8" else "transformer",)

    def load_models(self, options: DenoiseConfig, device: str, memory: str | None) -> "ClipDenoiser":
        from avatar_core.backends.hunyuan.clip_denoiser import ClipDenoiser
        from avatar_core.memory import chosen_level

        (name,) = self.weight_names(options)
        as_fp8 = options.transformer == "fp8_cast"
        return ClipDenoiser(name, device, chosen_level(memory, device), as_fp8=as_fp8)

    def denoise(
        self,
        models: "ClipDenoiser",
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        options: DenoiseConfig,
        report: Report,
        unfinished: Path | None,
    ) -> Tensors:
        audio, text, reference = (conditions[stage] for stage in self.inputs)
        windows = clip_windows(
            audio["hidden_states"], fps, int(audio["num_frames"]), parity=options.mode == "parity"
        )
        return {"latents": models.denoise(text, reference, windows, fps, seed, options, report, unfinished)}


class HunyuanDecode(DecodeStage[DecodeConfig, "AutoencoderKLHunyuanVideo"]):
    version = 2
    device_kind = "gpu"
    guessed_seconds = 5.0

    def parts(self, options: DecodeConfig) -> tuple[str, ...]:
        return ("vae",)

    def load_models(
        self, options: DecodeConfig, device: str, memory: str | None
    ) -> "AutoencoderKLHunyuanVideo":
        return _load_vae(self.checkpoint, device)

    def frames(
        self,
        models: "AutoencoderKLHunyuanVideo",
        picture: Picture,
        conditions: Mapping[str, Tensors],
        options: DecodeConfig,
    ) -> Iterator[Picture]:
        import torch

        from avatar_core.backends.hunyuan.vae import decode_frames

        latents = torch.from_numpy(np.asarray(conditions["denoise"]["latents"]))
        return decode_frames(models, latents, 4 * (latents.shape[2] - 1) + 1)


def _face_box(found: Sequence[Face], chosen: Sequence[Face], *, parity: bool) -> NDArray[np.float32] | None:
    """The detector's box of the face that speaks: the mask was made from such boxes. Which face that is has
    been decided before, except in `parity`; a face that this detector misses has the other one's box."""
    if parity:
        return choose(found, "reference")[0].box if found else None
    if not chosen:
        return choose(found, "largest")[0].box if found else None
    box = chosen[0].box
    x, y = (box[:2] + box[2:]) / 2
    hits = [f.box for f in found if f.box[0] <= x <= f.box[2] and f.box[1] <= y <= f.box[3]]
    return hits[0] if hits else box


def _load_vae(checkpoint: str, device: str) -> "AutoencoderKLHunyuanVideo":
    import torch

    from avatar_core.backends.hunyuan.official import load_vae

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return load_vae(weights.locate(f"{checkpoint}/vae"), device, dtype)
