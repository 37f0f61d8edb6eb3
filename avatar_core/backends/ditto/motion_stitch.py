"""Key points of the source and of every driven frame: as much of the driving motion as is wanted.

`parity` keeps what the reference does: `vad_alpha` fades the whole expression and not the lips alone,
`alpha_*` multiplies logits unless the same angle has a `delta_*`, a faded angle may mix degrees with logits,
and a given first frame (`reference`) makes motion relative whatever `relative_d` says.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.motion_vector import (
    NUM_POINTS,
    POSE,
    WIDTHS,
    Array,
    Motion,
    degrees,
    frame,
    keypoints,
)
from avatar_core.errors import ConfigError

Control = Mapping[str, Any]
"""Of one frame: `fade_alpha`, `fade_out_keys`, `delta_pitch`, `alpha_pitch` (and yaw, roll), `delta_exp`,
`vad_alpha`."""

CONTROLS = (
    "fade_alpha",
    "fade_out_keys",
    *(f"{change}_{angle}" for change in ("delta", "alpha") for angle in POSE),
    "delta_exp",
    "vad_alpha",
)
EYE_POINTS = (11, 13, 15, 16, 18)
LIP_POINTS = (6, 12, 14, 17, 19, 20)
_IMAGE_KEYS, _VIDEO_KEYS = ("exp", *POSE, "t"), ("exp",)
_ENDLESS_FRAMES = 3000  # of a blink schedule where the length is not known; it comes round again
_BLINK_GAP_FRAMES = (60, 100)


@dataclass(frozen=True)
class StitchSettings:
    """`use_d_keys`: what is driven, by names or with a factor each (None: all motion of a picture, the
    expression of a video). `drive_eye` (None: pictures only). `delta_eye_open_n`: frames between two blinks,
    or a list of them, 0: random, below 0: none."""

    use_d_keys: Sequence[str] | Mapping[str, float] | None = None
    drive_eye: bool | None = None
    relative_d: bool = True
    delta_eye_open_n: int | Sequence[int] = 0
    fade_type: Literal["", "d0", "s"] = ""
    fade_out_keys: Sequence[str] = ("exp",)
    overall_ctrl_info: Control = field(default_factory=dict)
    parity: bool = False


def point_mask(points: Sequence[int]) -> Array:
    """[63], 1 at every component of the key points."""
    mask = np.zeros((NUM_POINTS, 3), np.float32)
    mask[list(points)] = 1
    return mask.reshape(-1)


def blink_schedule(
    num_frames: int, blink_frames: int, gaps: int | Sequence[int], generator: random.Random
) -> NDArray[np.int64]:
    """[num_frames] which frame of a blink is shown when, 0 between blinks. `num_frames` of -1: any length."""
    length = _ENDLESS_FRAMES if num_frames == -1 else num_frames
    schedule = np.zeros(length, np.int64)
    if isinstance(gaps, int) and gaps < 0:
        return schedule
    listed = list(gaps) if isinstance(gaps, Sequence) else [gaps] if gaps else []
    draw = iter(lambda: generator.randint(*_BLINK_GAP_FRAMES), None)
    start, end = (listed[0], listed[-1]) if listed else (next(draw), next(draw))
    current, blinks = start, 0
    while current < length - max(end, blink_frames):
        schedule[current : current + blink_frames] = np.arange(blink_frames)
        blinks += 1
        current += blink_frames + (listed[blinks % len(listed)] if listed else next(draw))
    return schedule


def fades(
    num_frames: int, fade_in: int, fade_out: int, controls: Mapping[int, Control]
) -> dict[int, dict[str, Any]]:
    """The controls by frame with `fade_alpha` for the first `fade_in` and the last `fade_out` frames (0 or
    less: none); the latter win."""
    faded = {index: dict(control) for index, control in controls.items()}
    alphas = {i: i / fade_in for i in range(fade_in)}
    if fade_out > 0:
        first = num_frames - fade_out - 1
        alphas |= {i: max((num_frames - 1 - i) / fade_out, 0.0) for i in range(first, num_frames)}
    for index, alpha in alphas.items():
        faded.setdefault(index, {})["fade_alpha"] = alpha
    return faded


class MotionStitch:
    """One clip; frames go through `pair` in order. `source` holds the source's frames; `character` the first
    frame of a reference character, whose scale the driving motion has; `reference` the driving frame that
    motion is relative to (None: the first one)."""

    def __init__(
        self,
        settings: StitchSettings,
        source: Motion,
        *,
        is_image: bool,
        delta_eye_arr: Array | None = None,
        character: Motion | None = None,
        reference: Motion | None = None,
        num_frames: int = -1,
        seed: int = 0,
        start_frame: int = 0,
    ) -> None:
        self.settings, self._source, self._is_image = settings, source, is_image
        unknown = settings.overall_ctrl_info.keys() - set(CONTROLS)
        if unknown:
            raise ConfigError(f"unknown control {min(unknown)!r}; choose from: {', '.join(CONTROLS)}")
        self._reference = reference
        self._driven = self._driven_keys(character)
        self._drive_eye = is_image if settings.drive_eye is None else settings.drive_eye
        self._blinks, self._schedule = np.zeros((1, 63), np.float32), np.zeros(1, np.int64)
        blinking = self._drive_eye and delta_eye_arr is not None
        if blinking and delta_eye_arr is not None:
            self._blinks = np.asarray(delta_eye_arr, np.float32)
            gaps, generator = settings.delta_eye_open_n, random.Random(seed)
            self._schedule = blink_schedule(num_frames, len(self._blinks), gaps, generator)
        eyes, lips = point_mask(EYE_POINTS), point_mask(LIP_POINTS)
        driven = np.maximum(lips, eyes) if self._drive_eye and not blinking else lips
        self._blinked = eyes if blinking else np.zeros_like(eyes)
        self._driven_exp = driven * (1 - self._blinked)
        self._source_exp = (1 - driven) + driven * self._blinked
        self._lips = lips
        self._gaze_from: dict[str, Array] = {}
        self._fade_target: Motion | None = None
        self._x_s: dict[int, Array] = {}
        self._counter = start_frame

    def _driven_keys(self, character: Motion | None) -> Sequence[str] | Mapping[str, float]:
        keys = self.settings.use_d_keys
        if keys is None:
            keys = _IMAGE_KEYS if self._is_image else _VIDEO_KEYS
        if unknown := set(keys) - {*WIDTHS, "kp"}:
            raise ConfigError(f"use_d_keys has {min(unknown)!r}; choose from: {', '.join(WIDTHS)}")
        if character is None:
            return keys
        ratio = float(np.ravel(character["scale"])[0] / np.ravel(self._source["scale"])[0])
        if ratio == 1:
            return keys
        given = dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(keys, 1.0)
        return {key: factor * (ratio if key in ("exp", *POSE) else 1.0) for key, factor in given.items()}

    def pair(
        self, driving: Motion, source_frame: int = 0, control: Control | None = None
    ) -> tuple[Array, Array]:
        """Key points [21, 3] of the source frame and of the driven one, before the stitching network."""
        source = frame(self._source, source_frame)
        control = {**self.settings.overall_ctrl_info, **(control or {})}
        if self.settings.relative_d and self._reference is None:
            self._reference = {key: values.copy() for key, values in driving.items()}
        mixed = self._mix(source, driving)
        mixed["exp"] = self._expression(source, mixed["exp"])
        self._apply_controls(mixed, source, control)
        self._fade(mixed, source, control)
        mixed |= {angle: degrees(mixed[angle]) for angle in POSE}
        if self._drive_eye:
            mixed["exp"] = self._gaze(mixed, source)
        self._counter += 1
        return self._source_points(source_frame), keypoints(mixed)[0]

    def _source_points(self, source_frame: int) -> Array:
        """Computed once for every frame of the source."""
        if source_frame not in self._x_s:
            self._x_s[source_frame] = keypoints(frame(self._source, source_frame))[0]
        return self._x_s[source_frame]

    def _mix(self, source: Motion, driving: Motion) -> dict[str, Array]:
        """Angles are mixed as logits."""
        factors = self._driven if isinstance(self._driven, Mapping) else {}
        relative = self._reference is not None and (self.settings.relative_d or self.settings.parity)
        mixed: dict[str, Array] = {}
        for key in source:
            if key not in driving or key not in self._driven:
                mixed[key] = source[key]
                continue
            factor = np.float32(factors.get(key, 1.0))
            if relative and self._reference is not None:
                mixed[key] = source[key] + (driving[key] - self._reference[key]) * factor
            else:
                mixed[key] = driving[key] * factor
        return mixed

    def _expression(self, source: Motion, driven: Array) -> Array:
        blink = self._blinks[self._schedule[self._counter % len(self._schedule)]]
        return np.asarray(
            driven * self._driven_exp + source["exp"] * self._source_exp + blink * self._blinked, np.float32
        )

    def _apply_controls(self, mixed: dict[str, Array], source: Motion, control: Control) -> None:
        alpha = control.get("vad_alpha", 1)
        if alpha < 1:
            part = np.float32(1) if self.settings.parity else self._lips
            mixed["exp"] = mixed["exp"] + np.float32(1 - alpha) * part * (source["exp"] - mixed["exp"])
        for angle in POSE:
            if f"delta_{angle}" in control:
                mixed[angle] = degrees(mixed[angle]) + np.float32(control[f"delta_{angle}"])
            if f"alpha_{angle}" in control:
                turned = mixed[angle] if self.settings.parity else degrees(mixed[angle])
                mixed[angle] = turned * np.float32(control[f"alpha_{angle}"])
        if "delta_exp" in control:
            mixed["exp"] = mixed["exp"] + np.asarray(control["delta_exp"], np.float32).reshape(1, -1)

    def _fade(self, mixed: dict[str, Array], source: Motion, control: Control) -> None:
        if self.settings.fade_type == "d0" and self._fade_target is None:
            self._fade_target = dict(mixed)
        target = source if self.settings.fade_type == "s" else self._fade_target
        if "fade_alpha" not in control or target is None:
            return
        alpha = np.float32(control["fade_alpha"])
        for key in control.get("fade_out_keys", self.settings.fade_out_keys):
            if key == "kp":
                continue
            driven, still = mixed[key], target[key]
            if not self.settings.parity and key in POSE and driven.shape != still.shape:
                driven, still = degrees(driven), degrees(still)
            mixed[key] = alpha * driven + (1 - alpha) * still

    def _gaze(self, mixed: Motion, source: Motion) -> Array:
        """The eyes turned against the head, from where it was in the first frame."""
        if not self._gaze_from:
            self._gaze_from = {angle: degrees(source[angle]) for angle in ("pitch", "yaw")}
        turn = {angle: mixed[angle] - still for angle, still in self._gaze_from.items()}
        right, down = 0.26 * float(turn["yaw"][0]), 0.28 * float(turn["pitch"][0])
        exp = mixed["exp"].copy()
        exp[:, 33] += right * (0.0007 if right > 0 else 0.001)
        exp[:, 45] += right * (0.001 if right > 0 else 0.0007)
        exp[:, [34, 46]] -= 0.001 * down
        return exp
