"""A mean face, turned in three dimensions until its eyes, nose and mouth corners meet the detector's."""

import json
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

Points = NDArray[np.float64]

START_YAWS = (-0.6, 0.0, 0.6)  # radians; a face turned left and right can look alike to five points
PITCH_PRIOR = 0.15
EYES_AND_CORNERS = [0, 1, 3, 4]


@cache
def template() -> dict[str, Points]:
    """Curves (n, 3) and single points (3,) of the mean face by their `Contours` name, and
    `detector_points` (5, 3); unit = distance between the eyes."""
    text = resources.files(__package__).joinpath("template.json").read_text("utf-8")
    return {name: np.array(value) for name, value in json.loads(text).items() if name != "about"}


def posed_template(points: Points) -> dict[str, Points]:
    """The mean face's curves in picture pixels, seen as the five detector points (5, 2) say; eyes and
    mouth corners are met exactly as far as an affine map can."""
    mean = template()
    project = fitted_projection(mean["detector_points"], points)
    drawn = project(mean["detector_points"])
    matrix = affine(drawn[EYES_AND_CORNERS], points[EYES_AND_CORNERS])
    return {
        name: project(value) @ matrix[:, :2].T + matrix[:, 2]
        for name, value in mean.items()
        if name != "detector_points"
    }


class Projection:
    """Scaled orthography: turn by `rotation`, drop the depth, multiply by `scale` and add `shift`."""

    def __init__(self, rotation: Points, scale: float, shift: Points) -> None:
        self.rotation, self.scale, self.shift = rotation, scale, shift

    def __call__(self, points: Points) -> Points:
        return self.scale * (points @ self.rotation.T)[..., :2] + self.shift


def fitted_projection(mean: Points, points: Points) -> Projection:
    """Projection of `mean` (5, 3) nearest to `points` (5, 2); of the two mirror poses the better one."""
    scale = eye_mouth_distance(points) / eye_mouth_distance(mean)
    centre = points.mean(axis=0)

    def projection(pose: Points) -> Projection:
        roll_yaw_pitch, log_zoom, shift = pose[:3], pose[3], pose[4:]
        rotation = Rotation.from_euler("zyx", roll_yaw_pitch).as_matrix()
        return Projection(rotation, float(np.exp(log_zoom)) * scale, centre + shift * scale)

    def residuals(pose: Points) -> Points:
        error = (projection(pose)(mean) - points) / scale
        return np.append(error, PITCH_PRIOR * pose[2])

    fits = [least_squares(residuals, [0, yaw, 0, 0, 0, 0]) for yaw in START_YAWS]
    return projection(min(fits, key=lambda fit: float(fit.cost)).x)


def eye_mouth_distance(points: Points) -> float:
    """Between the middle of the eyes and the middle of the mouth corners; never zero."""
    return max(float(np.linalg.norm(points[:2].mean(axis=0) - points[3:].mean(axis=0))), 1.0)


def affine(source: Points, target: Points) -> Points:
    """Least-squares affine map [2, 3]."""
    columns, *_ = np.linalg.lstsq(np.column_stack([source, np.ones(len(source))]), target)
    return np.asarray(columns.T, np.float64)
