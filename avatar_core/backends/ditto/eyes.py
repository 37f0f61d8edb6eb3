"""How far the eyes are open and where they look, from 478 landmarks of a face."""

import numpy as np

from avatar_core.backends.ditto.motion_vector import Array

_CORNERS = np.array([[33, 133], [263, 362]])  # of the left and the right eye: outer, inner
_LIDS = np.array([[[145, 159], [144, 160], [153, 158]], [[374, 386], [373, 387], [380, 385]]])
_IRISES = np.array([468, 473])
_EPSILON = np.float32(1e-8)


def eye_open(landmarks: Array) -> Array:
    """[2], left and right: the sum of three heights by the width. `landmarks` [478, 3]."""
    lids, corners = landmarks[_LIDS], landmarks[_CORNERS]
    heights = np.linalg.norm(lids[:, :, 0] - lids[:, :, 1], axis=-1)
    widths = np.linalg.norm(corners[:, 0] - corners[:, 1], axis=-1)
    return np.asarray(heights.sum(axis=1) / (widths + _EPSILON), np.float32)


def eye_ball(landmarks: Array) -> Array:
    """[6], left and right for each axis in turn: where the iris lies beside the middle of the corners."""
    outer, inner = landmarks[_CORNERS].transpose(1, 0, 2)
    aside = landmarks[_IRISES] - (outer + inner) / 2
    distance = np.linalg.norm(aside, axis=-1, keepdims=True)
    across = outer - inner
    width = np.linalg.norm(across, axis=-1, keepdims=True)
    moves = (aside / (distance + _EPSILON) - across / (width + _EPSILON)) * distance
    return np.asarray(moves.T.reshape(-1), np.float32)
