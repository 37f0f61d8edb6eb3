"""Mouth, eye and face outlines of one face, in picture pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.preview.eye_outline import fitted_eye
from avatar_core.backends.preview.lip_outline import LipCurves, fitted_lips, mouth_frame
from avatar_core.backends.preview.mesh import mesh_curves
from avatar_core.backends.preview.outline_order import ordered_curves
from avatar_core.backends.preview.pose import eye_mouth_distance, posed_template
from avatar_core.media.face import Face, Picture

Points = NDArray[np.float64]

SOURCES = ("points", "mesh")
EYE_DISAGREEMENT = 0.13  # of the eye-mouth distance, between the detector's eye and an outline's middle

# Distance between the eyes, in eye-mouth distances (1.1 seen from the front), from which an eye shows.
FAR_EYE_SHOWN, NEAR_EYE_SHOWN = 0.76, 0.55


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


SIDES = ("left", "right")
LIPS = ("upper_lip_outer", "upper_lip_inner", "lower_lip_inner", "lower_lip_outer")  # top to bottom
CURVES = tuple(field.name for field in fields(Contours) if field.name not in ("eyes_trusted", "source"))


def contours_from_points(picture: Picture, face: Face) -> Contours:
    """From the five detector points alone: a mean face in their pose, its mouth and eyes then fitted to
    the pixels. Good for frontal faces, passable to about 45 degrees."""
    points = face.points.astype(np.float64)
    curves = posed_template(points)
    curves |= _fit_lips(picture, curves, points, closed=True)
    seen = [_fit_eye(picture, curves, side) for side in SIDES]
    shown = _eyes_shown(points)
    trusted = (seen[0] and shown[0], seen[1] and shown[1])
    return Contours(**_ordered(curves), eyes_trusted=trusted, source="points")


def contours_from_mesh(picture: Picture, face: Face, model: Path) -> Contours:
    """From the face landmark network in `model` (.tflite): follows turned faces and open mouths better."""
    points = face.points.astype(np.float64)
    curves = mesh_curves(picture, points, model)
    curves |= _fit_lips(picture, curves, points, closed=False)
    limit = EYE_DISAGREEMENT * eye_mouth_distance(points)
    left, right = (
        bool(np.linalg.norm(curves[f"{side}_eye_upper"].mean(axis=0) - eye) <= limit)
        for side, eye in zip(SIDES, points, strict=False)
    )
    return Contours(**_ordered(curves), eyes_trusted=(left, right), source="mesh")


def _eyes_shown(points: Points) -> tuple[bool, bool]:
    """Whether the head is turned little enough to show the left and the right eye."""
    eyes, nose = points[:2], points[2]
    distance = float(np.linalg.norm(eyes[1] - eyes[0])) / eye_mouth_distance(points)
    near_left, near_right = np.linalg.norm(eyes - nose, axis=1)
    both = distance > FAR_EYE_SHOWN
    return (
        both or (distance > NEAR_EYE_SHOWN and bool(near_left > near_right)),
        both or (distance > NEAR_EYE_SHOWN and bool(near_right > near_left)),
    )


def _fit_lips(picture: Picture, curves: dict[str, Points], points: Points, closed: bool) -> dict[str, Points]:
    lips = LipCurves(**{name.replace("_lip", ""): curves[name] for name in LIPS})
    frame = mouth_frame(lips, curves["nose"], curves["chin"], eye_mouth_distance(points))
    lips = fitted_lips(picture, lips, frame, closed=closed)
    return {name: getattr(lips, name.replace("_lip", "")) for name in LIPS}


def _fit_eye(picture: Picture, curves: dict[str, Points], side: str) -> bool:
    """Moves the lids in `curves`; False where no open eye is seen."""
    upper, lower = f"{side}_eye_upper", f"{side}_eye_lower"
    lids = fitted_eye(picture, curves[upper], curves[lower])
    if lids is not None:
        curves[upper], curves[lower] = lids
    return lids is not None


def _ordered(curves: dict[str, Points]) -> dict[str, Points]:
    """Without folds and crossings, which turned faces bring."""
    ordered = dict(curves)
    for names in (LIPS, *((f"{side}_eye_upper", f"{side}_eye_lower") for side in SIDES)):
        corners = curves[names[0]][[0, -1]]
        outline = ordered_curves([curves[name] for name in names], *corners)
        ordered |= dict(zip(names, outline, strict=True))
    return ordered


def contours_to_tensors(contours: Sequence[Contours]) -> dict[str, NDArray[np.float32 | np.uint8]]:
    """Per curve float32 [faces, n, 2] (n = 1 for a single point), `eyes_trusted` uint8 [faces, 2] and
    `source` uint8 [faces], an index into SOURCES."""
    tensors: dict[str, NDArray[np.float32 | np.uint8]] = {}
    for name in CURVES:
        stacked = np.array([getattr(face, name) for face in contours], np.float32)
        tensors[name] = stacked.reshape(len(contours), -1 if contours else 1, 2)
    tensors["eyes_trusted"] = np.array([face.eyes_trusted for face in contours], np.uint8).reshape(-1, 2)
    tensors["source"] = np.array([SOURCES.index(face.source) for face in contours], np.uint8)
    return tensors


def contours_from_tensors(tensors: Mapping[str, NDArray[Any]]) -> list[Contours]:
    return [_face_contours(tensors, index) for index in range(len(tensors["source"]))]


def _face_contours(tensors: Mapping[str, NDArray[Any]], index: int) -> Contours:
    curves = {name: tensors[name][index].astype(np.float64) for name in CURVES}
    left, right = (bool(flag) for flag in tensors["eyes_trusted"][index])
    return Contours(
        **{name: points[0] if len(points) == 1 else points for name, points in curves.items()},
        eyes_trusted=(left, right),
        source=SOURCES[int(tensors["source"][index])],
    )
