"""A source, picture or footage, made ready to be driven: where its face lies, its appearance, its motion.

Nothing in it depends on speech, so that it is made once for all clips of a source.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.condition import NEUTRAL, Condition, Emotion, emotion_weights
from avatar_core.backends.ditto.crop import (
    CROP_SIZE,
    CropMatrices,
    Outline,
    crop_matrices,
    face_outline,
    mapped,
    network_input,
    outline,
)
from avatar_core.backends.ditto.eyes import eye_ball, eye_open
from avatar_core.backends.ditto.motion_vector import WIDTHS, Array, Motion, frame, pack, smooth_motion
from avatar_core.errors import InputError, about
from avatar_core.media.affine import warp_square
from avatar_core.media.face import Face, Picture, choose
from avatar_core.media.landmarks import SIDE_203

SOURCE_KEYS = (*WIDTHS, "kp")

_TRACKING_SCALE, _TRACKING_VY = 1.5, -0.1  # of the crop in which the 203 landmarks are found
_MAX_GROWTH = 1.5  # of a face from one frame to the next: beyond it, the landmarks are lost
_MAX_SHIFT = 0.5  # of its centre, by its size


class FaceDetection(Protocol):
    def detect(self, picture: Picture) -> list[Face]: ...


class BoxLandmarks(Protocol):
    def find(self, picture: Picture, box: NDArray[np.floating]) -> Array: ...


class CropLandmarks(Protocol):
    def find(self, crop: Picture) -> Array: ...


@dataclass(frozen=True)
class RegistrationSettings:
    """`crop_scale`: side of the crop by the face's; it is moved by the parts `crop_vx_ratio` and
    `crop_vy_ratio` of its side, and upright in the face's axes if `crop_flag_do_rot`. `smo_k_s`: frames of
    footage over which its motion is averaged. `parity` takes the largest face, never looks for it again in
    later frames, and leaves `crop_vx_ratio` out, as the reference does."""

    crop_scale: float = 2.3
    crop_vx_ratio: float = 0.0
    crop_vy_ratio: float = -0.125
    crop_flag_do_rot: bool = True
    smo_k_s: int = 13
    parity: bool = False


@dataclass(frozen=True)
class Character:
    """What conditions the motion: a face's `motion` with `kp`, `eye_open` [n, 2], `eye_ball` [n, 6], the
    first frame's canonical key points `sc` [63]; float32. A reference character may stand in for the
    source."""

    motion: Motion
    eye_open: Array
    eye_ball: Array
    sc: Array

    def condition(self, emotion: Emotion = NEUTRAL, **switches: bool) -> Condition:
        return Condition(emotion_weights(emotion), self.eye_open, self.eye_ball, self.sc, **switches)

    def first_vector(self) -> Array:
        """[1, 265], what the first clip of motion follows."""
        return pack(frame(self.motion, 0))


@dataclass(frozen=True)
class Avatar(Character):
    """A registered source of n frames, with appearance volumes `features` [n, 32, 16, 64, 64] and
    `crop_to_picture` [n, 3, 3]."""

    features: Array
    crop_to_picture: Array
    is_image: bool

    def __len__(self) -> int:
        return len(self.features)

    def tensors(self) -> dict[str, NDArray[Any]]:
        arrays = {
            field.name: np.asarray(getattr(self, field.name))
            for field in fields(self)
            if field.name != "motion"
        }
        return arrays | {f"motion.{key}": values for key, values in self.motion.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> "Avatar":
        arrays: dict[str, Any] = {
            field.name: tensors[field.name] for field in fields(cls) if field.name != "motion"
        }
        motion = {key: tensors[f"motion.{key}"] for key in SOURCE_KEYS}
        return cls(motion=motion, **arrays | {"is_image": bool(tensors["is_image"])})


class FaceFinder:
    """The speaker's face, frame by frame. Without `landmark106` the detector's own points lead to the crop in
    which the 203 landmarks are looked for; they are then looked for once more in the crop that they give."""

    def __init__(
        self,
        detector: FaceDetection,
        landmark106: BoxLandmarks | None,
        landmark203: CropLandmarks,
        settings: RegistrationSettings,
        speaker: Face | None = None,
    ) -> None:
        self._detector, self._landmark106, self._landmark203 = detector, landmark106, landmark203
        self._settings = settings
        self._speaker = speaker
        self._landmarks: Array | None = None

    def find(self, picture: Picture) -> Array:
        """203 landmarks [203, 2] in pixels of the next frame. Raises `InputError`."""
        if self._landmarks is not None:
            tracked = self._landmarks_in(picture, outline(self._landmarks))
            if self._settings.parity or _follows(self._landmarks, tracked, picture):
                self._landmarks = tracked
                return tracked
        self._landmarks = self._detected(picture)
        return self._landmarks

    def _detected(self, picture: Picture) -> Array:
        face = self._face(picture)
        if self._landmark106 is not None:
            return self._landmarks_in(picture, outline(self._landmark106.find(picture, face.box)))
        rough = self._landmarks_in(picture, face_outline(face))
        return self._landmarks_in(picture, outline(rough))

    def _face(self, picture: Picture) -> Face:
        """Of those found, the one nearest to where it was, or the chosen speaker; else the largest."""
        faces = self._detector.detect(picture)
        if self._landmarks is not None and not self._settings.parity and faces:
            return _nearest(faces, self._landmarks.mean(axis=0))
        if self._speaker is not None and not self._settings.parity and self._landmarks is None:
            return self._detected_speaker(faces, self._speaker)
        if not faces:
            raise InputError("no face found; use a picture, or footage, in which the face is always seen")
        return choose(faces, "largest")[0]

    def _detected_speaker(self, faces: Sequence[Face], speaker: Face) -> Face:
        """The speaker may have been found by another detector, and not be among the faces."""
        if not faces:
            return speaker
        nearest = _nearest(faces, _centre(speaker))
        x, y = _centre(nearest)
        x_min, y_min, x_max, y_max = speaker.box
        return nearest if x_min <= x <= x_max and y_min <= y <= y_max else speaker

    def _landmarks_in(self, picture: Picture, face: Outline) -> Array:
        matrices = crop_matrices(face, SIDE_203, _TRACKING_SCALE, _TRACKING_VY)
        crop = warp_square(picture, matrices.from_picture, SIDE_203)
        return mapped(self._landmark203.find(crop), matrices.to_picture)


def _centre(face: Face) -> Array:
    return np.asarray((face.box[:2] + face.box[2:]) / 2, np.float32)


def _nearest(faces: Sequence[Face], point: Array) -> Face:
    return min(faces, key=lambda face: float(np.linalg.norm(_centre(face) - point)))


def _follows(before: Array, now: Array, picture: Picture) -> bool:
    """Whether landmarks can be those of the same face a frame later, and inside the picture."""
    old, new = (float(np.ptp(points, axis=0).max()) for points in (before, now))
    centre = now.mean(axis=0)
    inside = bool(np.all((centre >= 0) & (centre < picture.shape[1::-1])))
    moved = float(np.linalg.norm(centre - before.mean(axis=0)))
    return inside and old / _MAX_GROWTH <= new <= old * _MAX_GROWTH and moved <= old * _MAX_SHIFT


def register(
    frames: Iterable[Picture],
    finder: FaceFinder,
    landmark478: CropLandmarks,
    appearance: Callable[[Array], Array],
    motion: Callable[[Array], Motion],
    settings: RegistrationSettings,
    *,
    is_image: bool,
) -> Avatar:
    """`frames` are RGB [height, width, 3]; `appearance` and `motion` take [1, 3, 256, 256], 0..1. Raises
    `InputError` for a frame in which no face is found."""
    motions, features, matrices, opened, balls = [], [], [], [], []
    for number, picture in enumerate(frames):
        with nullcontext() if is_image else about(f"frame {number + 1}"):
            square, face = face_crop(picture, finder, settings)
            landmarks = landmark478.find(square)
        pixels = network_input(square)
        motions.append(motion(pixels))
        features.append(appearance(pixels))
        matrices.append(face.to_picture)
        opened.append(eye_open(landmarks))
        balls.append(eye_ball(landmarks))
    if not motions:
        raise InputError("the source has no frames; give a picture, or footage of a face")
    joined = {key: np.concatenate([each[key] for each in motions]) for key in SOURCE_KEYS}
    smoothed = not is_image and settings.smo_k_s > 1
    return Avatar(
        motion=smooth_motion(joined, settings.smo_k_s) if smoothed else joined,
        features=np.concatenate(features),
        crop_to_picture=np.stack(matrices),
        eye_open=np.stack(opened),
        eye_ball=np.stack(balls),
        sc=joined["kp"][0].reshape(-1),
        is_image=is_image,
    )


def face_crop(
    picture: Picture, finder: FaceFinder, settings: RegistrationSettings
) -> tuple[Picture, CropMatrices]:
    """The square round the next frame's face, RGB [512, 512, 3], and where it lies."""
    matrices = crop_matrices(
        outline(finder.find(picture)),
        CROP_SIZE,
        settings.crop_scale,
        settings.crop_vy_ratio,
        vx_ratio=0.0 if settings.parity else settings.crop_vx_ratio,
        rotate=settings.crop_flag_do_rot,
    )
    return warp_square(picture, matrices.from_picture, CROP_SIZE), matrices
