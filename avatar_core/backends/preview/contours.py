"""Mouth, eye and face outlines of one face, in picture pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.eye_outline import fitted_eye
from avatar_core.backends.preview.lip_outline import LipCurves, fitted_lips, mouth_frame
from avatar_core.backends.preview.mesh import mesh_curves
from avatar_core.backends.preview.pose import eye_mouth_distance, posed_template
from avatar_core.media.face import Face, Picture

Points = NDArray[np.float64]

SOURCES = ("points", "mesh")
EYE_DISAGREEMENT = 0.13  # of the eye-mouth distance, between the detector's eye and an outline's middle


@dataclass(frozen=True)
class Contours:
    """Curves run from picture left to picture right, shape (n, 2); single points have shape (2,)."""

    upper_lip_inner: Points  # (11, 2)
    lower_lip_inner: Points  # (11, 2)
    upper_lip_outer: Points  # (11, 2)
    lower_lip_outer: Points  # (11, 2)
    left_eye_upper: Points  # (9, 2), the eye at picture left
    left_eye_lower: Points  # (9, 2)
    right_eye_upper: Points  # (9, 2)
    right_eye_lower: Points  # (9, 2)
    chin: Points
    nose: Points
    left_brow: Points
    right_brow: Points
    eyes_trusted: tuple[bool, bool]  # False where the outline disagrees with the detector: no blink there
    source: str  # "mesh" or "points"


CURVES = tuple(field.name for field in fields(Contours) if field.name not in ("eyes_trusted", "source"))


def contours_from_points(picture: Picture, face: Face) -> Contours:
    """From the five detector points alone: a mean face in their pose, its mouth and eyes then fitted to
    the pixels. Good for frontal faces, passable to about 35 degrees."""
    points = face.points.astype(np.float64)
    curves = posed_template(points)
    lips = LipCurves(**{name.replace("_lip", ""): curves[name] for name in CURVES[:4]})
    frame = mouth_frame(lips, curves["nose"], curves["chin"], eye_mouth_distance(points))
    lips = fitted_lips(picture, lips, frame)
    for name in CURVES[:4]:
        curves[name] = getattr(lips, name.replace("_lip", ""))
    for side in ("left", "right"):
        upper, lower = f"{side}_eye_upper", f"{side}_eye_lower"
        curves[upper], curves[lower] = fitted_eye(picture, curves[upper], curves[lower])
    return Contours(**curves, eyes_trusted=(True, True), source="points")


def contours_from_mesh(picture: Picture, face: Face, model: Path) -> Contours:
    """From the face landmark network in `model` (.tflite): follows turned faces and open mouths better."""
    points = face.points.astype(np.float64)
    curves = mesh_curves(picture, points, model)
    limit = EYE_DISAGREEMENT * eye_mouth_distance(points)
    left, right = (
        bool(np.linalg.norm(curves[f"{side}_eye_upper"].mean(axis=0) - eye) <= limit)
        for side, eye in zip(("left", "right"), points, strict=False)
    )
    return Contours(**curves, eyes_trusted=(left, right), source="mesh")


def scale_contours(
    contours: Contours, scale: float, offset: tuple[float, float] | Points = (0.0, 0.0)
) -> Contours:
    """Every point times `scale`, then plus `offset` (x, y): from source to output pixels."""
    moved = {name: getattr(contours, name) * scale + np.asarray(offset) for name in CURVES}
    return replace(contours, **moved)


def contours_to_tensors(contours: Sequence[Contours]) -> dict[str, NDArray[np.float32 | np.uint8]]:
    """Per curve float32 [faces, n, 2] (n = 1 for a single point), `eyes_trusted` uint8 [faces, 2] and
    `source` uint8 [faces], an index into SOURCES."""
    tensors: dict[str, NDArray[np.float32 | np.uint8]] = {}
    for name in CURVES:
        stacked = [np.atleast_2d(getattr(face, name)) for face in contours]
        tensors[name] = np.array(stacked, np.float32).reshape(len(contours), -1, 2)
    tensors["eyes_trusted"] = np.array([face.eyes_trusted for face in contours], np.uint8).reshape(-1, 2)
    tensors["source"] = np.array([SOURCES.index(face.source) for face in contours], np.uint8)
    return tensors


def contours_from_tensors(tensors: dict[str, NDArray[np.float32 | np.uint8]]) -> list[Contours]:
    return [_face_contours(tensors, index) for index in range(len(tensors["source"]))]


def _face_contours(tensors: dict[str, NDArray[np.float32 | np.uint8]], index: int) -> Contours:
    curves = {name: tensors[name][index].astype(np.float64) for name in CURVES}
    left, right = (bool(flag) for flag in tensors["eyes_trusted"][index])
    return Contours(
        **{name: points[0] if len(points) == 1 else points for name, points in curves.items()},
        eyes_trusted=(left, right),
        source=SOURCES[int(tensors["source"][index])],
    )
