"""From noise to a clip's latents: guided flow matching over windows, with a cache between steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from avatar_core.backends.hunyuan.audio_adapter import AudioKeys
from avatar_core.backends.hunyuan.config import DenoiseConfig
from avatar_core.backends.hunyuan.schedules import (
    EARLY_STEPS,
    WINDOW,
    ClipWindows,
    StepCache,
    Window,
    cached_steps,
    euler_step,
    flow_sigmas,
    guidance_at,
)
from avatar_core.backends.hunyuan.transformer import (
    BlockInput,
    HunyuanAvatarTransformer,
    Prepared,
    PreparedText,
    TextConditions,
)
from avatar_core.stages.base import Report

MOTION_EXP = (30, 30, 30, 30)
MOTION_POSE = (25, 25, 25, 25)
"""Strengths of expression and head motion that the model was published with."""

EARLY_FACE_SHARE = 0.6  # of the face mask, in the early steps

State = Mapping[str, Tensor]
"""A clip between two steps: `latents` and `step`, the number of steps done."""
SaveState = Callable[[State], None]


@dataclass(frozen=True)
class SamplerSettings:
    """`latents_dtype` is what latents are rounded to after every step, and the least precise dtype that
    guidance is computed in."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    flow_shift: float = 5.0
    step_cache: StepCache = "scaled"
    cache_threshold: float = 0.1
    latents_dtype: torch.dtype = torch.float32

    @classmethod
    def from_config(cls, config: DenoiseConfig) -> "SamplerSettings":
        settings = cls(
            config.num_inference_steps,
            config.guidance_scale,
            config.flow_shift,
            config.step_cache,
            config.cache_threshold,
        )
        if config.mode == "parity":
            return replace(settings, step_cache="reference", latents_dtype=torch.bfloat16)
        return settings


@dataclass(frozen=True)
class ClipConditions:
    """What one clip is made from; every tensor has batch size 1 and lies on the transformer's device."""

    prompt: TextConditions
    negative_prompt: TextConditions
    ref_latents: Tensor  # (1, C, WINDOW, h, w)
    audio: Tensor  # (1, video frames with their padding, positions, layers, channels)
    face_mask: Tensor  # (1, 1, 1, h, w)
    motion_exp: Tensor  # (1, 4)
    motion_pose: Tensor  # (1, 4)
    fps: Tensor  # (1,)


@dataclass(frozen=True)
class StepResult:
    index: int
    latents: Tensor  # (1, C, frames, h, w)
    noise_preds: Sequence[Tensor]  # of each window, after guidance
    guidance_scale: float
    is_cached: bool


def draw_noise(
    windows: ClipWindows, frame_shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """(1, C, frames, h, w) on the generator's device; `frame_shape` = C, h, w. The reference draws float16 on
    the device that computes."""
    channels, height, width = frame_shape
    shape = (1, channels, windows.num_noise_frames, height, width)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


class WindowCache:
    """Activations of the last full step, for cached steps, whose windows lie elsewhere.

    Rows of the video are kept by frame. Reference and text rows belong to a window; a cached step takes those
    of the last window that held its first frame. Rows of the video wait on `device`, or where they came from.
    """

    def __init__(self, num_frames: int, device: str | None = None) -> None:
        self._device = device
        self._owners = torch.zeros(num_frames, dtype=torch.long)
        self._rows: dict[int, BlockInput] = {}
        self._image: Tensor | None = None  # (B, num_frames, S, D)

    def store(self, number: int, window: Window, rows: BlockInput) -> None:
        """`number` counts the windows of a step."""
        image = rows.image.to(self._device or rows.image.device).unflatten(1, (WINDOW, -1))
        if len(self._owners) == WINDOW:
            self._image = image
        else:
            if self._image is None:
                self._image = image.new_zeros(len(image), len(self._owners), *image.shape[2:])
            self._image[:, window.frames] = image
        self._owners[window.frames] = number
        # Copies, for as views they would keep all rows of the window.
        self._rows[number] = BlockInput(rows.reference.clone(), image.new_empty(0), rows.text.clone())

    def take(self, window: Window) -> BlockInput:
        assert self._image is not None, "the first step is a full one"
        rows = self._rows[int(self._owners[window.frames[0]])]
        image = self._image if len(self._owners) == WINDOW else self._image[:, window.frames]
        return replace(rows, image=image.flatten(1, 2).to(rows.text.device))


@dataclass(frozen=True)
class Batch:
    """Halves of the guidance that run at once: what they see in every step and window but the sound, and what
    they keep for cached steps."""

    halves: tuple[int, ...]
    constants: Prepared
    cache: WindowCache


class GuidedTransformer:
    """The transformer's answer for a window, with guidance.

    The unconditional half (0: negative prompt, silence) and the conditional one (1) are one batch, or with
    `sequential` two, one after the other, which take less memory. They are two in the early steps, too, if
    their texts differ in length: one batch would need an attention mask, which the fast kernels do not take.
    """

    def __init__(
        self,
        transformer: HunyuanAvatarTransformer,
        conditions: ClipConditions,
        windows: ClipWindows,
        *,
        sequential: bool,
        cache_device: str | None = None,
    ) -> None:
        self._transformer = transformer
        behind = max(0, windows.num_audio_frames - conditions.audio.shape[1])
        self._audio = pad(conditions.audio, (0, 0) * 3 + (0, behind))
        self._silence = transformer.prepare_audio(torch.zeros_like(conditions.audio[:, :1]))
        self._heard: dict[int, tuple[AudioKeys, ...]] = {}
        shared = self._constants(conditions)
        weak = transformer.prepare_face_masks(EARLY_FACE_SHARE * conditions.face_mask)
        texts = conditions.negative_prompt, conditions.prompt
        num_lengths = len({int(text.prompt_mask.sum()) for text in texts})
        self._new_cache = partial(WindowCache, windows.num_frames, cache_device)
        self._early = self._batches(
            replace(shared, face_gate=weak), texts, apart=sequential or num_lengths > 1
        )
        self._late = self._batches(shared, (conditions.prompt, conditions.prompt), apart=sequential)

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        step: int,
        number: int,
        window: Window,
        *,
        cached: bool,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Answers of both halves to the latents (1, C, WINDOW, h, w) of the step's window `number`. With
        `keep` a full step leaves its activations to the cached ones that follow."""
        answers = []
        if step == EARLY_STEPS:
            self._early.clear()
        for batch in self._early if step < EARLY_STEPS else self._late:
            size = len(batch.halves)
            inputs = latents.expand(size, -1, -1, -1, -1), timestep.expand(size)
            if cached:
                output = self._transformer(*inputs, batch.constants, batch.cache.take(window))
            else:
                sound = self._sound(window, batch.halves)
                output = self._transformer(*inputs, replace(batch.constants, audio=sound))
                if keep:
                    batch.cache.store(number, window, output.cache)
            answers.append(output.sample)
        unconditional, conditional = torch.cat(answers).chunk(2)
        return unconditional, conditional

    def _batches(
        self, constants: Prepared, texts: tuple[TextConditions, TextConditions], *, apart: bool
    ) -> list[Batch]:
        return [
            Batch(halves, replace(constants, text=self._text(texts, halves)), self._new_cache())
            for halves in (((0,), (1,)) if apart else ((0, 1),))
        ]

    def _constants(self, conditions: ClipConditions) -> Prepared:
        """All but the sound, which goes with the window; of the prompt alone."""
        transformer = self._transformer
        return Prepared(
            text=transformer.prepare_text(conditions.prompt),
            picture=transformer.prepare_picture(conditions.ref_latents),
            audio=(),
            face_gate=transformer.prepare_face_masks(conditions.face_mask),
            scalars=transformer.prepare_scalars(
                conditions.motion_exp, conditions.motion_pose, conditions.fps
            ),
        )

    def _text(self, texts: tuple[TextConditions, TextConditions], halves: Sequence[int]) -> PreparedText:
        chosen = [texts[half] for half in halves]
        return self._transformer.prepare_text(
            TextConditions(
                torch.cat([text.prompt_embeds for text in chosen]),
                torch.cat([text.prompt_mask for text in chosen]),
                torch.cat([text.pooled_prompt_embeds for text in chosen]),
            )
        )

    def _sound(self, window: Window, halves: Sequence[int]) -> tuple[AudioKeys, ...]:
        """Of a short clip, whose only window stays where it is, it is computed once."""
        first = int(window.frames[0])
        if first not in self._heard:
            self._heard = {first: self._transformer.prepare_audio(self._audio[:, window.audio_frames])}
        both = (
            [AudioKeys(silent.key.expand_as(heard.key), silent.value.expand_as(heard.value)), heard]
            for silent, heard in zip(self._silence, self._heard[first], strict=True)
        )
        return tuple(
            AudioKeys(
                torch.cat([pair[half].key for half in halves]),
                torch.cat([pair[half].value for half in halves]),
            )
            for pair in both
        )


class StepChooser:
    """Says which steps run on the activations of the last full one.

    In `adaptive` these are the steps at which the latents and the time embedding, each by its mean change
    relative to its mean size, have moved by less than `cache_threshold` together since the last full step:
    the idea of TeaCache (https://arxiv.org/abs/2411.19108), without its fit to one model's outputs.
    """

    def __init__(self, transformer: HunyuanAvatarTransformer, settings: SamplerSettings) -> None:
        self._transformer = transformer
        self._is_adaptive = settings.step_cache == "adaptive"
        self._threshold = settings.cache_threshold
        self._may_be_cached = cached_steps(settings.step_cache, settings.num_inference_steps)
        self._at_full: tuple[Tensor, Tensor] | None = None

    def is_cached(self, step: int, latents: Tensor, timestep: Tensor) -> bool:
        if not self._is_adaptive:
            return self._may_be_cached[step]
        now = latents, self._transformer.embed_time(timestep)
        if self._at_full is not None and self._may_be_cached[step]:
            moved = sum(
                float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, self._at_full, strict=True)
            )
            if moved < self._threshold:
                return True
        self._at_full = now
        return False

    def may_be_needed(self, step: int) -> bool:
        """Whether the step after this one may want its activations."""
        return any(self._may_be_cached[step + 1 : step + 2])

    def is_full_for_sure(self, step: int) -> bool:
        """Known beforehand, and independent of what came before."""
        return not self._is_adaptive and not self._may_be_cached[step]


@torch.no_grad()
def denoise_steps(
    transformer: HunyuanAvatarTransformer,
    conditions: ClipConditions,
    noise: Tensor,
    settings: SamplerSettings,
    *,
    sequential: bool = False,
    cache_device: str | None = None,
    state: State | None = None,
) -> Iterator[StepResult]:
    """Every step, or those after a saved `state`; latents keep the noise's dtype. `cache_device`: where the
    activations of full steps wait for cached ones, if not where they are computed."""
    windows = ClipWindows.of(conditions.audio.shape[1])
    guided = GuidedTransformer(
        transformer, conditions, windows, sequential=sequential, cache_device=cache_device
    )
    num_steps = settings.num_inference_steps
    sigmas = flow_sigmas(num_steps, settings.flow_shift)
    chooser = StepChooser(transformer, settings)
    latents = noise[:, :, : windows.num_frames] if state is None else state["latents"].to(noise)
    for step in range(0 if state is None else int(state["step"]), num_steps):
        timestep = (sigmas[step] * 1000).to(latents.device)
        scale = guidance_at(step, num_steps, settings.guidance_scale)
        total, count = torch.zeros_like(latents), latents.new_zeros(windows.num_frames, 1, 1)
        noise_preds = []
        cached, keep = chooser.is_cached(step, latents, timestep), chooser.may_be_needed(step)
        for number, window in enumerate(windows.at(step)):
            seen = latents[:, :, window.frames]
            answers = guided(seen, timestep, step, number, window, cached=cached, keep=keep)
            noise_preds.append(guide(*answers, scale, settings.latents_dtype))
            moved = euler_step(seen, noise_preds[-1], sigmas[step], sigmas[step + 1])
            total[:, :, window.frames] += moved.to(settings.latents_dtype).to(total.dtype)
            count[window.frames] += 1
        latents = total / count
        yield StepResult(step, latents, noise_preds, scale, cached)


def guide(unconditional: Tensor, conditional: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """In `dtype` or the answers' own, whichever is more precise."""
    precise = torch.promote_types(unconditional.dtype, dtype)
    unconditional, conditional = unconditional.to(precise), conditional.to(precise)
    return unconditional + scale * (conditional - unconditional)


def denoise(
    transformer: HunyuanAvatarTransformer,
    conditions: ClipConditions,
    noise: Tensor,
    settings: SamplerSettings,
    report: Report,
    *,
    sequential: bool = False,
    cache_device: str | None = None,
    state: State | None = None,
    save: SaveState | None = None,
    save_every: int = 5,
) -> Tensor:
    """Latents of a clip, float32 (1, C, frames, h, w). `report` is called before the first and after every
    step and may raise to stop.

    `save` receives a state that a later call goes on from with the same result, every `save_every` steps or
    a few later: only before a full step, so that no activations need be kept, and cached steps cost little
    to do again. Never in `adaptive`, where a full step depends on those before it.
    """
    num_steps = settings.num_inference_steps
    chooser = StepChooser(transformer, settings)
    saved_at = 0 if state is None else int(state["step"])
    report(saved_at, num_steps)
    latents = noise
    steps = denoise_steps(
        transformer,
        conditions,
        noise,
        settings,
        sequential=sequential,
        cache_device=cache_device,
        state=state,
    )
    for result in steps:
        latents, done = result.latents, result.index + 1
        if latents.device.type != "cpu":
            torch.accelerator.synchronize(latents.device)  # report what is done, not what is queued
        report(done, num_steps)
        is_due = done < num_steps and done - saved_at >= save_every
        if save and is_due and chooser.is_full_for_sure(done):
            save({"latents": latents.cpu(), "step": torch.tensor(done)})
            saved_at = done
    return latents.float()[:, :, : ClipWindows.of(conditions.audio.shape[1]).num_kept_frames]
