"""Something that says texts, for tests of all that stands around it: Kokoro's own package with random weights
where it is installed, else a small program with the same interface, which says every letter as a tone."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from avatar_core.media.kokoro import CONFIG, MODEL, STYLE_SHAPE

VOICES = ("ef_dora", "em_alex")

_PROGRAM = '''
import math
import re
from dataclasses import dataclass

import torch


class KModel(torch.nn.Module):
    def __init__(self, repo_id, config, model):
        super().__init__()
        self.pitch = torch.nn.Linear(256, 1)
        for name, state in torch.load(model, weights_only=True).items():
            getattr(self, name).load_state_dict(state)


@dataclass
class Part:
    graphemes: str
    phonemes: str
    audio: torch.Tensor


class KPipeline:
    """Letters last 40 ms each, half a tone apart; the voice gives the key."""

    def __init__(self, lang_code, repo_id, model):
        pass

    def __call__(self, text, voice=None, model=None):
        time_s = torch.arange(960) / 24000
        for line in re.split("\\\\n+", text):
            letters = [letter for letter in line.lower() if letter.isalnum()]
            if model is None:
                yield Part(line, "".join(letters), None)
                continue
            with torch.no_grad():
                key = 80 + 40 * torch.sigmoid(model.pitch(voice[len(letters)])).item()
            hz = [key * 2 ** (ord(letter) % 24 / 12) for letter in letters]
            tones = [0.3 * torch.sin(2 * math.pi * each * time_s) for each in hz]
            if tones:
                yield Part(line, "".join(letters), torch.cat(tones) + 0.001 * torch.randn(960 * len(tones)))
'''


def is_installed() -> bool:
    return importlib.util.find_spec("kokoro") is not None


def provide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes it importable, with weights `kokoro-tiny` in a folder of their own, which is returned."""
    weights = folder / "weights"
    monkeypatch.setenv("AVATAR_WEIGHTS", str(weights))
    if is_installed():
        from avatar_core.media.kokoro_tiny import write_tiny_checkpoint

        write_tiny_checkpoint(weights / "kokoro-tiny")
        return weights / "kokoro-tiny"
    package, notes = folder / "program" / "kokoro", folder / "program" / "kokoro-0.1.dist-info"
    for each in (package, notes):
        each.mkdir(parents=True)
    (package / "__init__.py").write_text(_PROGRAM)
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: kokoro\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(folder / "program")
    _write_weights(weights / "kokoro-tiny")
    return weights / "kokoro-tiny"


def _write_weights(folder: Path) -> None:
    (folder / "voices").mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"pitch": torch.nn.Linear(256, 1).state_dict()}, folder / MODEL)
        for voice in VOICES:
            torch.save(torch.randn(STYLE_SHAPE), folder / "voices" / f"{voice}.pt")
