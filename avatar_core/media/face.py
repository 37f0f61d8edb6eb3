"""Faces in a picture: detection, alignment and the choice of which one speaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import InputError
from avatar_core.media.mtcnn import MTCNN, normalise

Picture = NDArray[np.uint8]
Floats = NDArray[np.float64]

RULES = ("largest", "leftmost", "most_confident", "reference")

WINDOW = 12  # side of the proposal network's view, px
PYRAMID_FACTOR = 0.709
SMALLEST_FACE = 20  # px in the searched picture: smaller ones are noise
LOOKS = (-0.06, 0.0, 0.06)  # shifts of the view from which the points are measured, in box sides
PROPOSAL_MIN, REFINEMENT_MIN, OUTPUT_MIN = 0.6, 0.7, 0.8  # face probabilities

# Five points of an upright face in a 112 x 112 crop, the layout common to face recognition networks.
ALIGNED_POINTS = np.array([[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]]) / 112


@dataclass(frozen=True)
class Face:
    """`box` = x_min, y_min, x_max, y_max and `points` = left eye, right eye, nose, left and right mouth
    corner (left as seen in the picture), shape (5, 2); upright picture pixels, float32."""

    box: NDArray[np.float32]
    score: float
    points: NDArray[np.float32]


class FaceDetector:
    """`weights` is the folder of pnet.lz4, rnet.lz4 and onet.lz4 (see `mtcnn.installed_weights`)."""

    def __init__(self, weights: Path) -> None:
        self._networks = MTCNN(weights)

    def detect(self, picture: Picture, *, min_face: int = 40, max_side: int = 720) -> list[Face]:
        """All faces of at least `min_face` picture pixels, left to right; RGB [H, W, 3]. The search runs
        on the picture reduced to `max_side`, in which no face under 20 px is found."""
        small, scale = _reduced(picture, max_side)
        squares = self._proposals(small, WINDOW / max(SMALLEST_FACE, min_face * scale))
        squares = self._refined(small, squares)
        faces = self._faces(small, squares, scale)
        return sorted(faces, key=lambda face: (float(face.box[0]), float(face.box[1])))

    def _proposals(self, picture: Picture, scale: float) -> Floats:
        height, width = picture.shape[:2]
        found = []
        while min(height, width) * scale >= WINDOW:
            size = (int(width * scale + 1), int(height * scale + 1))
            found.append(self._level_proposals(normalise(_averaged(picture, size)), scale))
            scale *= PYRAMID_FACTOR
        if not found:
            return np.zeros((0, 4))
        boxes = np.concatenate(found)
        return _squares(boxes[keep_best(boxes[:, :4], boxes[:, 4], 0.7), :4])

    def _level_proposals(self, level: NDArray[np.float32], scale: float) -> Floats:
        """Boxes and probability [n, 5] found at one size of the picture."""
        offsets, probability = self._networks.propose(level)
        row, column = np.nonzero(probability > PROPOSAL_MIN)
        corner = np.stack([column, row], axis=1) * 2.0
        windows = np.concatenate([corner, corner + WINDOW], axis=1) / scale
        score = probability[row, column]
        boxes = windows + offsets[row, column] * (WINDOW / scale)
        return np.column_stack([boxes, score])[keep_best(windows, score, 0.5)]

    def _refined(self, picture: Picture, squares: Floats) -> Floats:
        if not len(squares):
            return squares
        offsets, probability = self._networks.refine(_crops(picture, squares, 24))
        boxes = squares + offsets * _sides(squares)
        sure = probability > REFINEMENT_MIN
        boxes, probability = boxes[sure], probability[sure]
        return _squares(boxes[keep_best(boxes, probability, 0.7)])

    def _faces(self, picture: Picture, squares: Floats, scale: float) -> list[Face]:
        """Faces in the pixels of the unreduced picture."""
        if not len(squares):
            return []
        offsets, _, probability = self._networks.output(_crops(picture, squares, 48))
        sure = probability > OUTPUT_MIN
        boxes, probability = (squares + offsets * _sides(squares))[sure], probability[sure]
        return [
            Face(
                box=(boxes[best] / scale).astype(np.float32),
                score=float(probability[best]),
                points=(self._points(picture, boxes[best]) / scale).astype(np.float32),
            )
            for best in keep_best(boxes, probability, 0.7, of_smaller=True)
        ]

    def _points(self, picture: Picture, box: Floats) -> Floats:
        """Median of the points seen from nine places a little apart: a single look is off by some percent
        of the face, differently after the least change of the picture."""
        (square,) = _squares(box[None])
        side = square[2] - square[0]
        shifts = np.array([(x, y, x, y) for y in LOOKS for x in LOOKS]) * side
        _, flat_points, _ = self._networks.output(_crops(picture, square + shifts, 48))
        relative = flat_points.reshape(-1, 2, 5).transpose(0, 2, 1)
        points = (square + shifts)[:, None, :2] + relative * side
        return np.asarray(np.median(points, axis=0), np.float64)


def _reduced(picture: Picture, max_side: int) -> tuple[Picture, float]:
    scale = min(1.0, max_side / max(picture.shape[:2]))
    if scale == 1.0:
        return picture, scale
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return _averaged(picture, (width, height)), scale


def _averaged(picture: Picture, size: tuple[int, int]) -> Picture:
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _sides(squares: Floats) -> Floats:
    return squares[:, 2:3] - squares[:, 0:1]


def _squares(boxes: Floats) -> Floats:
    """Squares round the boxes' centres, at least 1 px wide."""
    side = np.maximum(boxes[:, 2:] - boxes[:, :2], 1).max(axis=1, keepdims=True)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.concatenate([centre - side / 2, centre + side / 2], axis=1)


def keep_best(
    boxes: Floats, score: NDArray[np.floating], limit: float, *, of_smaller: bool = False
) -> NDArray[np.intp]:
    """Non-maximum suppression: indices of the boxes to keep, best first."""
    left, kept = np.argsort(-score, kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[_overlap(boxes[best], boxes[left], of_smaller=of_smaller) <= limit]
    return np.array(kept, dtype=np.intp)


def _overlap(box: Floats, others: Floats, *, of_smaller: bool = False) -> Floats:
    """Shared area as part of the union or of the smaller box, 0..1, for each of `others` (n, 4)."""
    area, areas = _areas(box[None]), _areas(others)
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    whole = np.minimum(area, areas) if of_smaller else area + areas - shared
    return np.asarray(shared / whole, np.float64)


def _areas(boxes: Floats) -> Floats:
    return np.asarray(np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6), axis=1), np.float64)


def _crops(picture: Picture, squares: Floats, size: int) -> NDArray[np.float32]:
    """[n, size, size, 3], normalised; black outside the picture."""
    return normalise(np.stack([_crop(picture, square, size) for square in squares]))


def _crop(picture: Picture, square: Floats, size: int) -> Picture:
    x, y, side = square[0], square[1], square[2] - square[0]
    pixels = max(size, round(side))
    zoom = pixels / side
    matrix = np.array([[zoom, 0, -x * zoom], [0, zoom, -y * zoom]])
    crop = np.asarray(cv2.warpAffine(picture, matrix, (pixels, pixels)), np.uint8)
    return crop if pixels == size else _averaged(crop, (size, size))


def align(picture: Picture, points: NDArray[np.floating], size: int = 256) -> Picture:
    """The face turned upright and scaled to the common five-point layout; RGB [size, size, 3]."""
    around, corner = _surroundings(picture, points)
    matrix = similarity(points.astype(np.float64) - corner, ALIGNED_POINTS * size)
    zoom = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    # A strong reduction is done in two steps, the second one averaging.
    steps = int(np.clip(np.ceil(1 / max(zoom, 0.1)), 1, 8)) if zoom < 0.5 else 1
    wide = (size * steps, size * steps)
    crop = cv2.warpAffine(around, matrix * steps, wide, borderMode=cv2.BORDER_REPLICATE)
    return _averaged(np.asarray(crop, np.uint8), (size, size))


def _surroundings(picture: Picture, points: NDArray[np.floating]) -> tuple[Picture, NDArray[np.intp]]:
    """The part of the picture round the points and its upper left corner (x, y): OpenCV cannot warp a
    picture of 32768 or more pixels a side."""
    reach = 3 * np.ptp(points, axis=0).max() + 1
    last = np.array(picture.shape[1::-1]) - 1
    corner = np.clip(points.min(axis=0) - reach, 0, last).astype(np.intp)
    right, bottom = np.maximum(points.max(axis=0) + reach, corner + 1).astype(np.intp)
    return picture[corner[1] : bottom, corner[0] : right], corner


def similarity(source: Floats, target: Floats) -> Floats:
    """Least-squares rotation, scale and shift [2, 3] taking `source` points to `target`. Points are read
    as complex numbers, in which rotation and scale are one factor."""
    source_centre, target_centre = source.mean(axis=0), target.mean(axis=0)
    a, b = ((p - c) @ np.array([1, 1j]) for p, c in ((source, source_centre), (target, target_centre)))
    factor = (a.conj() @ b) / max(float((a.conj() @ a).real), 1e-12)
    rotation = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([rotation, target_centre - rotation @ source_centre])


def choose(
    faces: Sequence[Face],
    rule: str,
    boxes: Sequence[Sequence[float]] | None = None,
    count: int = 1,
    *,
    min_face: int = 40,
) -> list[Face]:
    """The `count` faces that speak. `boxes` has one x_min, y_min, x_max, y_max per speaker in picture
    pixels and decides alone; without it, one speaker is found by `rule` and several are the largest
    faces, left to right. `min_face` was the detector's."""
    if rule not in RULES:
        raise InputError(f"unknown face rule {rule!r}; choose from {', '.join(RULES)}")
    if boxes is not None and len(boxes) != count:
        raise InputError(f"got {len(boxes)} face boxes for {count} speakers; give one box per speaker")
    if not faces:
        raise InputError(
            f"no face found in the picture (needs {count}); use a picture with a clearly visible face of "
            f"at least {min_face} pixels (face.min_face), or set face.required=false"
        )
    if len(faces) < count:
        raise InputError(
            f"found {len(faces)} of the {count} faces needed; use a picture that shows all speakers, "
            "or give fewer recordings"
        )
    if boxes is not None:
        return _in_boxes(faces, boxes)
    if count == 1:
        return [_by_rule(faces, rule)]
    return sorted(sorted(faces, key=_area, reverse=True)[:count], key=lambda face: float(face.box[0]))


def _by_rule(faces: Sequence[Face], rule: str) -> Face:
    if rule == "leftmost":
        return min(faces, key=lambda face: float(face.box[0]))
    if rule == "reference":
        return _last_larger(faces)
    return max(faces, key=_area if rule == "largest" else lambda face: face.score)


def _last_larger(faces: Sequence[Face]) -> Face:
    """What HunyuanVideo-Avatar's code takes for the largest face: of those larger than the most confident
    one, the least confident."""
    first, *others = sorted(faces, key=lambda face: face.score, reverse=True)
    return [first, *(face for face in others if _area(face) > _area(first))][-1]


def _area(face: Face) -> float:
    return float(np.prod(face.box[2:] - face.box[:2]))


def _in_boxes(faces: Sequence[Face], boxes: Sequence[Sequence[float]]) -> list[Face]:
    """One face per box, none twice: the one overlapping it most, a face centred in the box before others."""
    left, chosen = list(faces), []
    for number, box in enumerate(boxes, start=1):
        best = max(left, key=lambda face: _match(face, box))
        if _match(best, box) <= 0:
            raise InputError(
                f"no face in box {number} {[round(float(x)) for x in box]}; boxes are x_min, y_min, x_max, "
                f"y_max in picture pixels and the free faces are at "
                f"{[face.box.round().astype(int).tolist() for face in left]}"
            )
        left = [face for face in left if face is not best]
        chosen.append(best)
    return chosen


def _match(face: Face, box: Sequence[float]) -> float:
    """0: apart; up to 1: part of the union shared; above 1: the face's centre lies in the box too."""
    low, high = np.asarray(box[:2], float), np.asarray(box[2:], float)
    shared = float(np.prod(np.maximum(np.minimum(high, face.box[2:]) - np.maximum(low, face.box[:2]), 0)))
    union = float(np.prod(np.maximum(high - low, 0))) + _area(face) - shared
    centre = (face.box[:2] + face.box[2:]) / 2
    return shared / max(union, 1e-6) + float(((centre >= low) & (centre <= high)).all())
