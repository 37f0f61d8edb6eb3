"""Face: every face of a picture, or of the first frame of footage. Which of them speaks is decided by the
stages that use them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from avatar_core import weights
from avatar_core.config import InputConfig
from avatar_core.errors import about
from avatar_core.media.face import Face, FaceDetector, align
from avatar_core.media.footage import Footage
from avatar_core.media.image import ImageLimits, load_image
from avatar_core.stages.base import Item, Output, Picture, Report, Tensors
from avatar_core.stages.clip_stage import ClipStage
from avatar_core.stages.subject import Subject

CROP_SIZE = 256


@dataclass(frozen=True)
class FaceStageConfig:
    min_face: int = 40
    max_pixels: int = InputConfig.max_pixels
    min_side: int = InputConfig.min_side


class FaceStage(ClipStage[FaceStageConfig, FaceDetector]):
    config_type = FaceStageConfig
    name = "face"
    noun = "picture"
    version = 2
    guessed_seconds = 0.3
    facts = ("batch",)
    reads = ("picture",)
    columns = pa.schema({"faces": pa.int64(), "width": pa.int64(), "height": pa.int64()})

    def configure(self, subject: Subject) -> FaceStageConfig:
        limits = subject.batch.input
        return FaceStageConfig(subject.batch.face.min_face, limits.max_pixels, limits.min_side)

    def weights(self, config: FaceStageConfig) -> tuple[str, ...]:
        return ("mtcnn",)

    def load(self, config: FaceStageConfig, device: str, memory: str | None) -> FaceDetector:
        return FaceDetector(weights.locate("mtcnn"))

    def process(
        self, item: Item, config: FaceStageConfig, models: FaceDetector, scratch: Path, report: Report
    ) -> Output:
        limits = ImageLimits(max_pixels=config.max_pixels, min_side=config.min_side)
        picture = load_upright(item, limits)
        faces = models.detect(picture, min_face=config.min_face)
        crops = [align(picture, face.points, CROP_SIZE) for face in faces]
        height, width = picture.shape[:2]
        return Output(
            {"faces": len(faces), "width": width, "height": height},
            {
                "boxes": np.array([f.box for f in faces], np.float32).reshape(-1, 4),
                "scores": np.array([f.score for f in faces], np.float32),
                "points": np.array([f.points for f in faces], np.float32).reshape(-1, 5, 2),
                "crops": np.array(crops, np.uint8).reshape(-1, CROP_SIZE, CROP_SIZE, 3),
            },
        )


def load_upright(item: Item, limits: ImageLimits) -> Picture:
    """The item's picture, or the first frame of its footage."""
    if "video" in item.assets:
        with about("video"), Footage(item.assets["video"][0]) as footage:
            return footage[0]
    with about("picture"):
        return load_image(item.assets["image"][0], limits)


def faces_from_tensors(tensors: Tensors) -> list[Face]:
    columns = zip(tensors["boxes"], tensors["scores"], tensors["points"], strict=True)
    return [Face(box, float(score), points) for box, score, points in columns]
