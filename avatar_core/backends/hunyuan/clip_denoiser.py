"""The transformer on its device, from the stored conditions of a clip to its latents."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from avatar_core.backends.hunyuan.chunked_blocks import run_in_chunks
from avatar_core.backends.hunyuan.config import DenoiseConfig
from avatar_core.backends.hunyuan.official import load_transformer
from avatar_core.backends.hunyuan.sampling import (
    MOTION_EXP,
    MOTION_POSE,
    ClipConditions,
    SamplerSettings,
    State,
    denoise,
    draw_noise,
)
from avatar_core.backends.hunyuan.schedules import ClipWindows
from avatar_core.backends.hunyuan.transformer import TextConditions
from avatar_core.memory import Level, attention, attention_kernel, compile_blocks, place
from avatar_core.stages.base import Report

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]

_CHECKSUM_BYTES = sha256().digest_size


class ClipDenoiser:
    """`weights` names the registry's part, `hunyuan/transformer` or another one."""

    def __init__(self, weights: str, device: str, level: Level, *, as_fp8: bool = False) -> None:
        on_gpu = device.startswith("cuda")
        self._device = device
        self._level = level
        waits = "cpu" if level.offload else device
        self._dtype = torch.bfloat16 if on_gpu else torch.float32
        self._transformer = load_transformer(weights, waits, self._dtype, as_fp8=as_fp8)
        place(self._transformer, level, device)
        if level.row_chunks:
            run_in_chunks(self._transformer)
        compile_blocks(self._transformer, level, device)
        self._kernel = attention_kernel(device, self._dtype, self._transformer.config.attention_head_dim)

    def denoise(
        self,
        text: Arrays,
        reference: Arrays,
        windows: NDArray[Any],
        fps: float,
        seed: int,
        config: DenoiseConfig,
        report: Report,
        unfinished: Path | None,
    ) -> NDArray[np.float32]:
        """Latents (1, C, frames, h, w). `windows` (frames, positions, layers, channels) hold the padding.
        What is done of the clip is kept in the file `unfinished` and taken up from there."""
        conditions = self._conditions(text, reference, windows, fps)
        noise = self._noise(conditions, seed, parity=config.mode == "parity")
        keep = unfinished is not None and config.checkpoint_steps > 0
        with attention(self._kernel):
            latents = denoise(
                self._transformer,
                conditions,
                noise,
                SamplerSettings.from_config(config),
                report,
                sequential=self._level.split_guidance,
                cache_device="cpu" if self._level.offload else None,
                state=_read_state(unfinished) if unfinished and keep else None,
                save=(lambda state: _write_state(unfinished, state)) if unfinished and keep else None,
                save_every=config.checkpoint_steps,
            )
        return np.asarray(latents.cpu().numpy())

    def _conditions(
        self, text: Arrays, reference: Arrays, windows: NDArray[Any], fps: float
    ) -> ClipConditions:
        return ClipConditions(
            prompt=self._text(text, ""),
            negative_prompt=self._text(text, "negative_"),
            ref_latents=self._tensor(reference["ref_latents"]),
            audio=self._tensor(windows[None]),
            face_mask=self._tensor(reference["face_mask"]),
            motion_exp=self._tensor(np.array([MOTION_EXP], np.float32)),
            motion_pose=self._tensor(np.array([MOTION_POSE], np.float32)),
            fps=self._tensor(np.array([fps], np.float32)),
        )

    def _text(self, text: Arrays, half: str) -> TextConditions:
        return TextConditions(
            self._tensor(text[f"{half}prompt_embeds"]),
            torch.from_numpy(np.asarray(text[f"{half}prompt_mask"])).to(self._device),
            self._tensor(text[f"{half}pooled_prompt_embeds"]),
        )

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).to(self._device)

    def _noise(self, conditions: ClipConditions, seed: int, *, parity: bool) -> Tensor:
        """In `parity` drawn in float16 on the device, otherwise the same on every device."""
        _, channels, _, height, width = conditions.ref_latents.shape
        windows = ClipWindows.of(conditions.audio.shape[1])
        generator = torch.Generator(self._device if parity else "cpu").manual_seed(seed)
        dtype = torch.float16 if parity else torch.float32
        return draw_noise(windows, (channels, height, width), generator, dtype).to(self._device)


def _read_state(path: Path) -> State | None:
    try:
        content = path.read_bytes()
    except OSError:  # nearly always: there is none
        return None
    checksum, tensors = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if sha256(tensors).digest() != checksum:
        log.warning("%s is damaged and ignored: the clip begins anew", path)
        return None
    state = load(tensors)
    log.info("going on after step %d", int(state["step"]))
    return state


def _write_state(path: Path, state: State) -> None:
    """In one rename, so that a kill leaves the former state. A full disk costs the state, not the clip."""
    tensors = save({name: tensor.contiguous() for name, tensor in state.items()})
    fresh = path.with_suffix(f".{os.getpid()}")  # a run on another store may be at the same clip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(sha256(tensors).digest() + tensors)
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        log.warning("how far the clip is cannot be kept: %s", error)
