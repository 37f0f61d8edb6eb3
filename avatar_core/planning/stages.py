"""All stages of a batch: those that take in what its rows name or say, and those of its backend."""

from avatar_core.backends.base import Backend
from avatar_core.stages.base import Stage
from avatar_core.stages.ingest import IngestStage
from avatar_core.stages.speech import SpeechStage


def create_stages(backend: Backend) -> dict[str, Stage]:
    """By name, in running order."""
    sources: tuple[Stage, ...] = (IngestStage(), SpeechStage())
    return {stage.name: stage for stage in sources} | backend.stages()
