"""Reference: picture or footage at the size of the video, as the backend wants it. Faces are chosen here."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from avatar_core.backends.base import Backend, Picture
from avatar_core.config import FaceConfig
from avatar_core.media.face import Face, choose
from avatar_core.media.footage import Footage
from avatar_core.media.image import ImageLimits
from avatar_core.stages.base import BackendStage, Item, Output, Report
from avatar_core.stages.face import faces_from_tensors, load_upright

# Ingest and face have checked the picture.
NO_LIMITS = ImageLimits(max_pixels=sys.maxsize, min_side=2)


@dataclass(frozen=True)
class ReferenceStageConfig:
    """`boxes`: one per speaker, x_min, y_min, x_max, y_max in pixels of the upright picture. `fps` is the
    clip's where the source is footage."""

    max_side: int
    fps: float | None = None
    speakers: int = 1
    boxes: tuple[tuple[float, ...], ...] = ()
    rule: str = FaceConfig.rule
    required: bool = FaceConfig.required
    min_face: int = field(default=FaceConfig.min_face, metadata={"execution": True})
    backend: Any = None


class ReferenceStage(BackendStage):
    name = "reference"
    columns = pa.schema({"faces": pa.int64(), "width": pa.int64(), "height": pa.int64()})

    def process(
        self, item: Item, config: ReferenceStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        found = item.inputs["face"][0]
        faces = faces_from_tensors(found.tensors)
        encode_scene = getattr(self.backend, "encode_scene", None)
        if encode_scene and config.boxes:
            faces = []
        elif config.required or len(faces) >= config.speakers:
            faces = choose(
                faces, config.rule, config.boxes or None, config.speakers, min_face=config.min_face
            )
        picture, scale = load_fitted(self.backend, item, config.max_side, config.backend)
        height, width = picture.shape[:2]
        scaled = [_scaled(face, *scale) for face in faces]
        if encode_scene:
            source = load_upright(item, NO_LIMITS)
            tensors = encode_scene(models, source, faces, config.boxes, config.speakers, config.backend)
        elif "video" in item.assets:
            with open_fitted(self.backend, item, config.max_side, config.fps, config.backend) as footage:
                tensors = self.backend.encode_video(models, footage, scaled, config.backend)
        else:
            tensors = self.backend.encode_picture(models, picture, scaled, config.backend)
        return Output({"faces": len(faces), "width": width, "height": height}, tensors)


def load_fitted(
    backend: Backend, item: Item, max_side: int, config: Any
) -> tuple[Picture, tuple[float, float]]:
    """The upright picture, of footage the first, at the size of the video; and its scale across and down."""
    return backend.fit_picture(load_upright(item, NO_LIMITS), max_side, config)


def open_fitted(backend: Backend, item: Item, max_side: int, fps: float | None, config: Any) -> Footage:
    """An item's footage at the rate of its clip, each frame at the size of the video."""
    return Footage(
        item.assets["video"][0],
        lambda frame: backend.fit_picture(frame, max_side, config)[0],
        None if getattr(backend, "frames_in_turn", False) else fps,
    )


def _scaled(face: Face, across: float, down: float) -> Face:
    scale = np.array([across, down], np.float32)
    return Face(face.box * np.tile(scale, 2), face.score, face.points * scale)
