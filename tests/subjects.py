"""Facts of a clip for stages that are asked directly."""

from typing import Any

from avatar_core.backends.base import Backend
from avatar_core.config import Config
from avatar_core.stages.base import Asset
from avatar_core.stages.subject import BackendOptions, BatchOptions, Segment, SoundFormat, Subject


def subject(backend: Backend, duration_s: float = 1.0, **facts: Any) -> Subject:
    config = Config()
    known: dict[str, Any] = {
        "batch": BatchOptions(config.input, config.audio, config.face, config.video),
        "options": BackendOptions(backend.options()),
        "picture": Asset("picture", "p" * 64, "assets/picture.jpg"),
        "footage": False,
        "recordings": (Asset("recording", "r" * 64, "assets/recording.wav"),),
        "sound": SoundFormat(48_000, 1),
        "segment": Segment(duration_s),
        "fps": 25.0,
        "boxes": (),
        "prompt": "",
        "negative_prompt": None,
        "seed": 1,
    }
    return Subject(**{**known, **facts})
