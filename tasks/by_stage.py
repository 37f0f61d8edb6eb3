"""The task of each stage."""

from typing import Any

from prefect import Task

from tasks.audio import audio
from tasks.decode import decode
from tasks.denoise import denoise
from tasks.face import face
from tasks.ingest import ingest
from tasks.reference import reference
from tasks.speech import speech
from tasks.text import text

_TASKS: dict[str, Task[..., Any]] = {
    each.name: each for each in (ingest, speech, face, audio, text, reference, denoise, decode)
}


def task_of(stage: str) -> Task[..., Any]:
    """Also of a stage that only a backend of the user's own has."""
    return (
        _TASKS[stage] if stage in _TASKS else denoise.with_options(name=stage, description=f"Stage {stage}.")
    )
