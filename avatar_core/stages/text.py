"""Text: the prompts of a clip, as the backend wants them; some encoders look at the picture too."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import pyarrow as pa

from avatar_core.stages.base import Item, Output, Picture, Report, Tensors
from avatar_core.stages.clip_stage import BackendStage, ModelsT, OptionsT
from avatar_core.stages.reference import load_fitted
from avatar_core.stages.subject import Subject


@dataclass(frozen=True)
class TextStageConfig:
    """`max_side` counts only where the encoder sees the picture."""

    prompt: str = ""
    negative_prompt: str | None = None
    max_side: int = 0
    backend: Any = None


class _PromptStage(BackendStage[TextStageConfig, OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    config_type = TextStageConfig
    name = "text"
    noun = "prompt"
    columns = pa.schema({"prompt": pa.string(), "negative_prompt": pa.string()})

    def _output(self, config: TextStageConfig, tensors: Tensors) -> Output:
        return Output({"prompt": config.prompt, "negative_prompt": config.negative_prompt}, tensors)


class TextStage(_PromptStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    facts = ("options", "prompt", "negative_prompt")

    @abstractmethod
    def encode(self, models: ModelsT, prompt: str, negative_prompt: str | None, options: OptionsT) -> Tensors:
        """Both prompts; a row need not have a negative one."""
        ...

    def configure(self, subject: Subject) -> TextStageConfig:
        options = subject.options.by_stage.get(self.name)
        return TextStageConfig(subject.prompt, subject.negative_prompt, backend=options)

    def process(
        self, item: Item, config: TextStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        return self._output(
            config, self.encode(models, config.prompt, config.negative_prompt, config.backend)
        )


class PictureTextStage(_PromptStage[OptionsT, ModelsT], Generic[OptionsT, ModelsT]):
    """Its encoder sees the picture."""

    facts = ("batch", "options", "prompt", "negative_prompt")
    reads = ("picture",)

    @abstractmethod
    def encode(
        self,
        models: ModelsT,
        prompt: str,
        negative_prompt: str | None,
        picture: Picture,
        options: OptionsT,
    ) -> Tensors:
        """Both prompts; a row need not have a negative one."""
        ...

    def configure(self, subject: Subject) -> TextStageConfig:
        options = subject.options.by_stage.get(self.name)
        max_side = subject.batch.video.max_side
        return TextStageConfig(subject.prompt, subject.negative_prompt, max_side, options)

    def process(
        self, item: Item, config: TextStageConfig, models: ModelsT, scratch: Path, report: Report
    ) -> Output:
        picture, _ = load_fitted(self.backend, item, config.max_side)
        return self._output(
            config, self.encode(models, config.prompt, config.negative_prompt, picture, config.backend)
        )
