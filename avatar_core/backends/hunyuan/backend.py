"""The `hunyuan` backend: HunyuanVideo-Avatar (https://arxiv.org/abs/2505.20156), 13B, one speaker.

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
from avatar_core.backends.hunyuan.audio import WhisperEncoder, clip_windows, num_rows, parity_num_frames
from avatar_core.backends.hunyuan.config import HunyuanConfig
from avatar_core.backends.hunyuan.picture import face_mask, fit_picture, latent_mask
from avatar_core.errors import about
from avatar_core.media.face import Face, choose
from avatar_core.media.face_torchscript import TorchScriptFaceDetector
from avatar_core.optional_packages import hide_broken_packages
from avatar_core.weights.ensure import ensure

_STAGES = ("audio", "text", "reference", "denoise", "decode")
_TINY = "hunyuan-tiny"
_PARITY_SEED = 128  # of the published scripts
_TEXTS = ("prompt_embeds", "prompt_mask", "pooled_prompt_embeds")


class HunyuanBackend:
    name = "hunyuan"
    label = "HunyuanVideo-Avatar"
    config_type = HunyuanConfig
    versions: ClassVar = MappingProxyType(
        dict.fromkeys(_STAGES, 1) | {"audio": 2, "text": 2, "reference": 2, "decode": 2}
    )
    guessed_seconds: ClassVar = MappingProxyType(
        {"audio": 0.1, "text": 5.0, "reference": 5.0, "denoise": 100.0, "decode": 5.0}
    )
    max_speakers = 1
    text_sees_picture = True

    def __init__(self, config: HunyuanConfig) -> None:
        self.config = config
        # Random weights prove the chain on any machine.
        heavy = "cpu" if config.checkpoint == _TINY else "gpu"
        self.queues: Mapping[str, str] = dict.fromkeys(_STAGES, heavy) | {"audio": "cpu"}

    def resolve(self) -> "HunyuanBackend":
        checkpoint = self.config.checkpoint
        used = [name for stage in _STAGES for name in self.weights(stage, getattr(self.config, stage))]
        ensure(checkpoint, list(dict.fromkeys(used)), _write_tiny if checkpoint == _TINY else None)
        return self

    def weights(self, stage: str, config: Any) -> tuple[str, ...]:
        transformer = f"transformer{'-fp8' if stage == 'denoise' and config.transformer == 'fp8' else ''}"
        parts = {
            "audio": ("whisper",),
            "text": ("llava", "clip"),
            "reference": ("vae", "detector"),
            "denoise": (transformer,),
            "decode": ("vae",),
        }
        return tuple(f"{self.config.checkpoint}/{part}" for part in parts[stage])

    def fit_picture(
        self, picture: Picture, max_side: int, config: Any
    ) -> tuple[Picture, tuple[float, float]]:
        """By `image_size`; `max_side` is for backends of any size."""
        with about("picture"):
            fitted = fit_picture(picture, config.image_size)
        return fitted, (fitted.shape[1] / picture.shape[1], fitted.shape[0] / picture.shape[0])

    def num_frames(self, duration_s: float, fps: float) -> int:
        if self.config.mode == "parity":
            return parity_num_frames(duration_s, fps)
        # A hair less than a whole frame too much is rounding of the sample count, not a frame.
        return max(1, int(np.ceil(duration_s * fps - 1e-3)))

    def load(self, stage: str, config: Any, device: str, memory: str | None) -> Any:
        hide_broken_packages()
        if stage == "denoise":
            return self._load_denoiser(config, device, memory)
        if stage == "text":
            return _load_text_encoder(weights.locate(self.weights(stage, config)[0]).parent, device, memory)
        folders = {name.rpartition("/")[2]: weights.locate(name) for name in self.weights(stage, config)}
        if stage == "audio":
            return WhisperEncoder(folders["whisper"], device)
        vae = _load_vae(folders["vae"], device)
        if stage == "decode":
            return vae
        return TorchScriptFaceDetector(folders["detector"] / "detface.pt"), vae

    def memory_levels(self, stage: str, device: str) -> tuple[str, ...]:
        if stage not in ("text", "denoise"):
            return ()
        from avatar_core.memory import LEVEL_NAMES, fitting_level

        return LEVEL_NAMES[LEVEL_NAMES.index(fitting_level(device).name) :]

    def _load_denoiser(self, config: Any, device: str, memory: str | None) -> Any:
        from avatar_core.backends.hunyuan.clip_denoiser import ClipDenoiser
        from avatar_core.memory import fitting_level, get_level

        (name,) = self.weights("denoise", config)
        level = get_level(memory) if memory else fitting_level(device)
        return ClipDenoiser(name, device, level, as_fp8=config.transformer == "fp8_cast")

    def encode_audio(
        self,
        models: WhisperEncoder,
        tracks: Sequence[NDArray[np.float32]],
        sample_rate: int,
        fps: float,
        num_frames: int,
    ) -> Tensors:
        states = models.encode(tracks, sample_rate, parity=self.config.mode == "parity")
        return {"hidden_states": states[: num_rows(fps, num_frames)], "num_frames": np.array(num_frames)}

    def encode_text(
        self, models: Any, prompt: str, negative_prompt: str | None, picture: Picture | None, config: Any
    ) -> Tensors:
        assert picture is not None
        wanted = config.prompt_prefix + prompt
        unwanted = config.negative_prompt if negative_prompt is None else negative_prompt
        encoded = {}
        with about("prompt (prompt_prefix included)"):
            encoded[""] = models.encode(wanted, picture)
        with about("negative_prompt"):
            encoded["negative_"] = models.encode(unwanted, picture)
        return {f"{half}{name}": encoded[half][name].cpu().numpy() for half in encoded for name in _TEXTS}

    def encode_picture(self, models: Any, picture: Picture, faces: Sequence[Face], config: Any) -> Tensors:
        import torch

        from avatar_core.backends.hunyuan.vae import encode_reference

        detector, vae = models
        height, width = picture.shape[:2]
        box = _face_box(detector.detect(picture), faces, parity=config.mode == "parity")
        if config.mode == "parity":
            generator = torch.Generator(vae.device).manual_seed(_PARITY_SEED)
        else:
            generator = torch.Generator().manual_seed(0)
        latents = encode_reference(vae, picture, generator)
        return {
            "ref_latents": latents.float().cpu().numpy(),
            "face_mask": latent_mask(face_mask(box, width, height)),
        }

    def denoise(
        self,
        models: Any,
        conditions: Mapping[str, Tensors],
        fps: float,
        seed: int,
        config: Any,
        report: ReportStep,
        unfinished: Path | None,
    ) -> Tensors:
        audio = conditions["audio"]
        windows = clip_windows(
            audio["hidden_states"], fps, int(audio["num_frames"]), parity=config.mode == "parity"
        )
        text, reference = conditions["text"], conditions["reference"]
        return {"latents": models.denoise(text, reference, windows, fps, seed, config, report, unfinished)}

    def decode(
        self, models: Any, picture: Picture, conditions: Mapping[str, Tensors], config: Any
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


def _load_text_encoder(folder: Path, device: str, memory: str | None) -> Any:
    import torch

    from avatar_core.backends.hunyuan.text import TextEncoder
    from avatar_core.memory import fitting_level, get_level

    level = get_level(memory) if memory else fitting_level(device)
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return TextEncoder(folder, device, dtype, level)


def _load_vae(folder: Path, device: str) -> Any:
    import torch

    from avatar_core.backends.hunyuan.official import load_vae

    return load_vae(folder, device, torch.float16 if device.startswith("cuda") else torch.float32)


def _write_tiny(folder: Path) -> None:
    hide_broken_packages()
    from avatar_core.backends.hunyuan.tiny import write_tiny_checkpoint

    write_tiny_checkpoint(folder)
