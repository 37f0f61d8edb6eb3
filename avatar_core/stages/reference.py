"""Reference: picture or footage at the size of the video, as the backend wants it. Faces are chosen here."""

import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import numpy as np
import pyarrow as pa

from avatar_core.config import FaceConfig
from avatar_core.media.face import Face, choose
from avatar_core.media.footage import Footage
from avatar_core.media.image import ImageLimits
from avatar_core.stages.base import Item, Output, Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, ClipRules, ModelsT, OptionsT, Scale
from avatar_core.stages.face import faces_from_tensors, load_upright
from avatar_core.stages.subject import Subject

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


class _ReferenceStage(BackendStage[ReferenceStageConfig, OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    config_type = ReferenceStageConfig
    name = "reference"
    noun = "picture"
    inputs: tuple[str, ...] = ("face",)
    facts = ("batch", "options", "footage", "speakers", "fps", "boxes")
    reads = ("picture",)
    columns = pa.schema({"faces": pa.int64(), "width": pa.int64(), "height": pa.int64()})

    def configure(self, subject: Subject) -> ReferenceStageConfig:
        face = subject.batch.face
        return ReferenceStageConfig(
            max_side=subject.batch.video.max_side,
            fps=subject.fps if subject.footage else None,
            speakers=subject.speakers,
            boxes=subject.boxes,
            rule=face.rule,
            required=face.required,
            min_face=face.min_face,
            backend=subject.options.by_stage.get(self.name),
        )

    def _output(self, picture: Picture, faces: Sequence[Face], tensors: Tensors) -> Output:
        height, width = picture.shape[:2]
        return Output({"faces": len(faces), "width": width, "height": height}, tensors)


class ReferenceStage(_ReferenceStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    """Gets the picture at the size of the video, and the faces of the speakers in it."""

    @abstractmethod
    def encode(self, models: ModelsT, picture: Picture, faces: Sequence[Face], options: OptionsT) -> Tensors:
        """What denoise and decode need of the picture; `faces` are the speakers, in order."""
        ...

    def process(
        self, item: Item, config: ReferenceStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        chosen = _speakers(item, config)
        picture, scale = load_fitted(self.backend, item, config.max_side)
        faces = [_scaled(face, *scale) for face in chosen]
        return self._output(picture, faces, self.encode_source(item, config, models, picture, faces))

    def encode_source(
        self,
        item: Item,
        config: ReferenceStageConfig,
        models: ModelsT,
        picture: Picture,
        faces: Sequence[Face],
    ) -> Tensors:
        return self.encode(models, picture, faces, config.backend)


class FootageReferenceStage(ReferenceStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    """Takes footage too."""

    @abstractmethod
    def encode_footage(
        self, models: ModelsT, frames: Sequence[Picture], faces: Sequence[Face], options: OptionsT
    ) -> Tensors:
        """The same from footage: pictures of equal size, to be read in order or by index; `faces` are those
        of the first."""
        ...

    def encode_source(
        self,
        item: Item,
        config: ReferenceStageConfig,
        models: ModelsT,
        picture: Picture,
        faces: Sequence[Face],
    ) -> Tensors:
        if "video" not in item.assets:
            return self.encode(models, picture, faces, config.backend)
        with open_fitted(self.backend, item, config.max_side, config.fps) as footage:
            return self.encode_footage(models, footage, faces, config.backend)


@dataclass(frozen=True)
class Scene:
    """A picture as it was given, upright, and `fitted` to the size of the video; and who speaks in it:
    `boxes` of the row in its pixels, which alone decide where there are any, else the speakers' `faces`."""

    picture: Picture
    fitted: Picture
    faces: Sequence[Face]
    boxes: tuple[tuple[float, ...], ...]
    speakers: int


class SceneReferenceStage(_ReferenceStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    """Must know where in the picture a speaker is, and not just the face."""

    @abstractmethod
    def encode(self, models: ModelsT, scene: Scene, options: OptionsT) -> Tensors: ...

    def process(
        self, item: Item, config: ReferenceStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        faces = [] if config.boxes else _speakers(item, config)
        source = load_upright(item, NO_LIMITS)
        fitted, _ = self.backend.fit_picture(source, config.max_side)
        scene = Scene(source, fitted, faces, config.boxes, config.speakers)
        return self._output(fitted, faces, self.encode(models, scene, config.backend))


def _speakers(item: Item, config: ReferenceStageConfig) -> list[Face]:
    """In order. Raises `InputError` where they must be there and are not."""
    faces = faces_from_tensors(item.inputs["face"][0].tensors)
    if config.required or len(faces) >= config.speakers:
        boxes = config.boxes or None
        return choose(faces, config.rule, boxes, config.speakers, min_face=config.min_face)
    return faces


def load_fitted(backend: ClipRules, item: Item, max_side: int) -> tuple[Picture, Scale]:
    """The upright picture, of footage the first, at the size of the video; and its scale."""
    return backend.fit_picture(load_upright(item, NO_LIMITS), max_side)


def open_fitted(backend: ClipRules, item: Item, max_side: int, fps: float | None) -> Footage:
    """An item's footage at the rate of its clip, each frame at the size of the video."""
    return Footage(
        item.assets["video"][0],
        lambda frame: backend.fit_picture(frame, max_side)[0],
        None if backend.frames_in_turn else fps,
    )


def _scaled(face: Face, across: float, down: float) -> Face:
    scale = np.array([across, down], np.float32)
    return Face(face.box * np.tile(scale, 2), face.score, face.points * scale)
