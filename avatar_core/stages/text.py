"""Text: the prompts of a clip, as the backend wants them; some encoders look at the picture too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from avatar_core.stages.base import BackendStage, Item, Output, Report
from avatar_core.stages.reference import load_fitted


@dataclass(frozen=True)
class TextStageConfig:
    """`max_side` counts only where the encoder sees the picture."""

    prompt: str = ""
    negative_prompt: str | None = None
    max_side: int = 0
    backend: Any = None


class TextStage(BackendStage):
    name = "text"
    columns = pa.schema({"prompt": pa.string(), "negative_prompt": pa.string()})

    def process(
        self, item: Item, config: TextStageConfig, models: Any, scratch: Path, report: Report
    ) -> Output:
        picture = None
        if item.assets:
            picture, _ = load_fitted(self.backend, item, config.max_side, config.backend)
        tensors = self.backend.encode_text(
            models, config.prompt, config.negative_prompt, picture, config.backend
        )
        return Output({"prompt": config.prompt, "negative_prompt": config.negative_prompt}, tensors)
