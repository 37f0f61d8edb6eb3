"""Speech from text with Kokoro (https://github.com/hexgrad/kokoro), by its own package and offline.

The package, its language data and the weights are optional; what speaks is imported by what needs it.
"""

import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import ConfigError, InputError, WeightsError, shown
from avatar_core.media.dialogue import split_turns
from avatar_core.optional_packages import hide_broken_packages

SAMPLE_RATE = 24_000
REPOSITORY = "hexgrad/Kokoro-82M"
MODEL, CONFIG = "kokoro-v1_0.pth", "config.json"
MAX_PHONEMES = 510
STYLE_SHAPE = (MAX_PHONEMES, 1, 256)

_ENGLISH = "ab"
_TAGGER = "en_core_web_sm"
_PACKAGES = ("kokoro", "misaki")
_SEED = 0  # of the noise in breath and hiss: the same text sounds the same every time


def check_installed(voices: Iterable[str]) -> None:
    """Raises `ConfigError` with the command that helps, where what these voices need is not installed."""
    if _version("kokoro") is None:
        if sys.version_info >= (3, 13):
            raise ConfigError(
                f"tts_text needs the package kokoro, which is made for Python 3.11 and 3.12; this is "
                f"{sys.version_info.major}.{sys.version_info.minor}: use one of these, or give recordings"
            )
        raise ConfigError(
            "tts_text needs the package kokoro, which is not installed; "
            "run: pip install 'avatar-dataset[tts]'"
        )
    english = next((voice for voice in voices if voice[0] in _ENGLISH), None)
    if english and _version(_TAGGER) is None:
        raise ConfigError(
            f"the English voice {english} needs spaCy's model {_TAGGER}, which is not installed; "
            f"run: python -m spacy download {_TAGGER}"
        )


def versions(voices: Sequence[str]) -> tuple[str, ...]:
    """Of the packages that decide how these voices sound."""
    packages = [*_PACKAGES, *([_TAGGER] if any(voice[0] in _ENGLISH for voice in voices) else [])]
    return tuple(f"{package} {_version(package)}" for package in packages)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Speaker:
    """Kokoro with its weights, on the CPU. `model` is the folder of `config.json` and `kokoro-v1_0.pth`,
    `voices` that of the voices' files."""

    def __init__(self, model: Path, voices: Path) -> None:
        self._voices = voices
        self._model = _load_model(model)
        self._pipelines: dict[str, Any] = {}
        self.tracks = lru_cache(1)(self._tracks)  # a dialogue is asked for once per speaker

    def _tracks(self, text: str, voices: tuple[str, ...]) -> list[NDArray[np.float32]]:
        """A recording per voice at `SAMPLE_RATE`, equally long: silence while the other one speaks."""
        turns = split_turns(text, len(voices))
        said = [(turn.speaker, self._speak(turn.text, voices[turn.speaker])) for turn in turns]
        return [
            np.concatenate([sound if who == speaker else np.zeros_like(sound) for who, sound in said])
            for speaker in range(len(voices))
        ]

    def _speak(self, text: str, voice: str) -> NDArray[np.float32]:
        import torch

        pipeline, style = self._pipeline(voice[0]), _load_style(self._voices / f"{voice}.pt")
        _check_phonemes(list(pipeline(text)), text, voice)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            said = list(pipeline(text, voice=style, model=self._model))
        sound = torch.cat([part.audio.flatten() for part in said]).float().numpy()
        if not np.isfinite(sound).all():
            raise InputError(f"the voice {voice} says {shown(text)} with NaN or infinite samples")
        return np.asarray(sound, np.float32)

    def _pipeline(self, language: str) -> Any:
        """Turns texts of a language into phonemes, and with a model these into sound."""
        if language not in self._pipelines:
            from kokoro import KPipeline

            self._pipelines[language] = KPipeline(language, repo_id=REPOSITORY, model=False)
        return self._pipelines[language]


def _check_phonemes(parts: Sequence[Any], text: str, voice: str) -> None:
    """What is too long the package would cut off."""
    if not parts:
        raise InputError(f"the voice {voice} finds nothing to say in {shown(text)}")
    for part in parts:
        if len(part.phonemes) >= MAX_PHONEMES:
            raise InputError(
                f"{shown(part.graphemes)} is too long for one breath; divide it into sentences or lines"
            )


def _load_model(folder: Path) -> Any:
    hide_broken_packages()
    import torch
    from kokoro import KModel

    try:
        parts = torch.load(folder / MODEL, map_location="cpu", weights_only=True)
        model = KModel(REPOSITORY, config=str(folder / CONFIG), model=str(folder / MODEL)).eval()
    except Exception as error:  # a file that is none makes torch and the package raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{folder} holds no Kokoro model ({reason})") from error
    for name, part in model.named_children():
        # The package itself would leave at random what it does not find.
        found = {key.removeprefix("module.") for key in parts.get(name, {})}
        if missing := [key for key in part.state_dict() if key not in found]:
            raise WeightsError(
                f"{folder / MODEL} lacks {len(missing)} tensors of {name}, such as {missing[0]}"
            )
    return model


def _load_style(path: Path) -> Any:
    import torch

    try:
        style = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path} is no voice of Kokoro ({reason})") from error
    if not isinstance(style, torch.Tensor) or tuple(style.shape) != STYLE_SHAPE:
        raise WeightsError(f"{path} is no voice of Kokoro: it holds no tensor of shape {STYLE_SHAPE}")
    return style.float()
