"""All stages of a batch: ingest, which meets the outside world, and those of its backend."""

from avatar_core.backends.base import Backend
from avatar_core.stages.base import Stage
from avatar_core.stages.ingest import IngestStage


def create_stages(backend: Backend) -> dict[str, Stage]:
    """By name, in running order."""
    return {IngestStage.name: IngestStage(), **backend.stages()}
