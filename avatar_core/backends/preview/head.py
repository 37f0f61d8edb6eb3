"""The sway of the heads: one smooth warp of the picture, still at its border and far from the faces."""

from collections.abc import Sequence

import cv2
import numpy as np

from avatar_core.backends.preview.axes import Box, FaceAxes, smoothstep
from avatar_core.backends.preview.warp import (
    FloatArray,
    Picture,
    resize,
    warp_picture,
    warp_sharply,
    weighted_sum,
)

BORDER_SHARE = 0.10  # of the longer side, over which the movement towards a border dies out
TORSO_SHARE = 0.45  # of the head's sway that reaches the shoulders
# Of x, y, roll, yaw, pitch at head_motion = 1.
LARGEST_SWAY = np.array([0.04, 0.05, 0.04, 0.08, 0.07], np.float32)
FACE_WIDTH, FACE_HEIGHT = (-1.0, 1.0), (-0.6, 1.5)  # from between the eyes, in eye-mouth distances
MIN_SHIFT_PX = 0.15  # smaller movements cannot be seen


class HeadSway:
    """Displacements are kept on a coarse lattice: one node in the middle of each cell of the picture, and
    one row of cells around it."""

    def __init__(self, picture_shape: tuple[int, ...], faces: Sequence[FaceAxes]) -> None:
        height, width = picture_shape[:2]
        self._cell = int(np.clip(min(face.eye_mouth for face in faces) / 10, 2, 8))
        columns, rows = -(-width // self._cell), -(-height // self._cell)
        x, y = np.meshgrid(self._nodes(columns), self._nodes(rows))
        fields = _sway_fields(faces, x, y, (width, height))
        first, last = self._moving_cells(fields, columns, rows)
        cells = np.s_[first[1] : last[1] + 2, first[0] : last[0] + 2]
        self._fields = np.ascontiguousarray(fields[(slice(None), *cells)])
        self._places = np.dstack([x[cells], y[cells]])
        low, high = np.multiply(first, self._cell), np.multiply(last, self._cell)
        self.box = Box(int(low[0]), int(low[1]), min(int(high[0]), width), min(int(high[1]), height))
        self._faces = [box for face in faces if not (box := self._face_box(face)).empty]
        self._others = _bands(Box(0, 0, self.box.x1 - self.box.x0, self.box.y1 - self.box.y0), self._faces)

    def _nodes(self, cells: int) -> FloatArray:
        return ((np.arange(-1, cells + 1) + 0.5) * self._cell - 0.5).astype(np.float32)

    def _moving_cells(
        self, fields: FloatArray, columns: int, rows: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """First (column, row) and one past the last."""
        largest = np.tile(LARGEST_SWAY, len(fields) // len(LARGEST_SWAY))
        shift = np.tensordot(largest, np.abs(fields).max(axis=-1), axes=1)[1:-1, 1:-1]
        moving = shift > MIN_SHIFT_PX
        used_columns, used_rows = np.flatnonzero(moving.any(axis=0)), np.flatnonzero(moving.any(axis=1))
        if not len(used_rows):
            return (0, 0), (columns, rows)
        first = int(used_columns[0]), int(used_rows[0])
        return first, (int(used_columns[-1]) + 1, int(used_rows[-1]) + 1)

    def _face_box(self, face: FaceAxes) -> Box:
        """From brows to chin, relative to `self.box`."""
        down, across = face.down * face.eye_mouth, face.across * face.eye_mouth
        corners = [face.eyes + u * across + v * down for u in FACE_WIDTH for v in FACE_HEIGHT]
        x0, y0, x1, y1 = self.box
        return Box.around(np.array(corners) - (x0, y0), (y1 - y0, x1 - x0))

    def draw(self, frame: Picture, sway: FloatArray) -> None:
        """`sway` (faces, 5): x, y, roll, yaw, pitch; roll in radians, the rest in eye-mouth distances."""
        weights = sway.ravel().tolist()
        if not any(weights):
            return
        sources: FloatArray = self._places - weighted_sum(weights, self._fields)
        cell = self._cell
        rows, columns = sources.shape[:2]
        every_pixel = resize(sources, (columns * cell, rows * cell))
        x0, y0, x1, y1 = self.box
        inside = every_pixel[cell : cell + y1 - y0, cell : cell + x1 - x0]
        moved = np.empty((*inside.shape[:2], 3), np.uint8)
        for part in self._others:
            moved[part.slices] = warp_picture(frame, inside[part.slices], cv2.INTER_LINEAR)
        # Linear interpolation blurs, and more so half-way between pixels: faces get the better, slower one.
        for face in self._faces:
            moved[face.slices] = warp_sharply(frame, inside[face.slices])
        frame[self.box.slices] = moved


def _bands(whole: Box, faces: Sequence[Box]) -> list[Box]:
    """Boxes that cover `whole` outside of the first face, and perhaps parts of the others."""
    if not faces:
        return [whole]
    x0, y0, x1, y1 = faces[0]
    parts = [
        Box(whole.x0, whole.y0, whole.x1, y0),
        Box(whole.x0, y0, x0, y1),
        Box(x1, y0, whole.x1, y1),
        Box(whole.x0, y1, whole.x1, whole.y1),
    ]
    return [part for part in parts if part.x0 < part.x1 and part.y0 < part.y1]


def _sway_fields(
    faces: Sequence[FaceAxes], x: FloatArray, y: FloatArray, picture_size: tuple[int, int]
) -> FloatArray:
    """Forward displacement in pixels for a unit weight, shape (5 * faces, height, width, 2)."""
    reaches = [_reach(face, x, y) for face in faces]
    total = np.sum(np.square(reaches), axis=0) + 1e-6
    fields = [
        field
        for face, reach in zip(faces, reaches, strict=True)
        for field in _face_fields(face, x, y, reach * reach**2 / total)  # neighbours share what both reach
    ]
    width, height = picture_size
    border = BORDER_SHARE * max(width, height)
    # Pixels may slide along a border but not across it: what lies outside is unknown.
    free_x = np.clip(np.minimum(x, width - 1 - x) / border, 0, 1)
    free_y = np.clip(np.minimum(y, height - 1 - y) / border, 0, 1)
    return (np.stack(fields) * np.dstack([free_x, free_y])).astype(np.float32)


def _head_coordinates(face: FaceAxes, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Across and down from a point between eyes and nose, in eye-mouth distances."""
    down = face.down
    centre = face.eyes + 0.35 * face.eye_mouth * down
    dx, dy = (x - centre[0]) / face.eye_mouth, (y - centre[1]) / face.eye_mouth
    return dx * down[1] - dy * down[0], dx * down[0] + dy * down[1]


def _reach(face: FaceAxes, x: FloatArray, y: FloatArray) -> FloatArray:
    """How much of the head's movement each place takes part in: 1 on the face."""
    u, v = _head_coordinates(face, x, y)
    radius = np.hypot(u / 1.35, np.where(v < 0, v / 1.75, v / 1.6))
    head = 1 - smoothstep(radius, 0.75, 2.7)  # a long way out: straight lines behind the head must not kink
    torso = TORSO_SHARE * (1 - smoothstep(np.abs(u), 0.8, 2.6)) * smoothstep(v, 1.2, 2.6)
    return np.maximum(head, torso)


def _face_fields(face: FaceAxes, x: FloatArray, y: FloatArray, reach: FloatArray) -> list[FloatArray]:
    across = np.array([face.down[1], -face.down[0]]) * face.eye_mouth
    down = face.down * face.eye_mouth
    neck = face.eyes + 1.9 * down
    # Yaw and pitch shift what is near the viewer one way and what is far the other.
    parallax = _relief(face, x, y) - 0.35 * reach
    return [
        reach[..., None] * across,
        reach[..., None] * down,
        reach[..., None] * np.dstack([neck[1] - y, x - neck[0]]),
        parallax[..., None] * across,
        parallax[..., None] * down,
    ]


def _relief(face: FaceAxes, x: FloatArray, y: FloatArray) -> FloatArray:
    """Height of the face towards the viewer: an ellipsoid with a nose, softened."""
    u, v = _head_coordinates(face, x, y)
    skull = np.sqrt(np.maximum(0, 1 - (u / 1.15) ** 2 - ((v - 0.25) / 1.7) ** 2))
    nose = 0.35 * np.exp(-((u / 0.28) ** 2) - ((v - 0.35) / 0.3) ** 2)
    cell = float(x[0, 1] - x[0, 0])
    softened = cv2.GaussianBlur((skull + nose).astype(np.float32), (0, 0), 0.12 * face.eye_mouth / cell)
    return np.asarray(softened, np.float32)
