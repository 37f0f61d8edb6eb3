"""The stages of a backend, by name and in running order."""

from avatar_core.backends.base import Backend
from avatar_core.stages.audio import AudioStage
from avatar_core.stages.base import Stage
from avatar_core.stages.decode import DecodeStage
from avatar_core.stages.denoise import DenoiseStage
from avatar_core.stages.face import FaceStage
from avatar_core.stages.ingest import IngestStage
from avatar_core.stages.reference import ReferenceStage
from avatar_core.stages.speech import SpeechStage
from avatar_core.stages.text import TextStage


def create_stages(backend: Backend) -> dict[str, Stage]:
    stages: list[Stage] = [
        IngestStage(),
        SpeechStage(),
        FaceStage(),
        AudioStage(backend),
        *([TextStage(backend)] if TextStage.name in backend.versions else []),
        ReferenceStage(backend),
        DenoiseStage(backend),
        DecodeStage(backend),
    ]
    return {stage.name: stage for stage in stages}
