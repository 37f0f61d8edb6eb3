"""Sound through a small random wav2vec2 in the files of the official one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model

from avatar_core.backends.multitalk.audio import (
    AudioEncoder,
    audio_window,
    heard,
    levelled,
    loudness_lufs,
    normalised,
)
from avatar_core.errors import WeightsError

RATE = 16_000
LAYERS, WIDTH = 3, 16
CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that was pretrained, under the names of the time."""
    folder = tmp_path_factory.mktemp("wav2vec2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wav2Vec2ForPreTraining(Wav2Vec2Config(**CONFIG))
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        state[name] = tensor.contiguous()
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> AudioEncoder:
    return AudioEncoder(folder, "cpu")


def speech(duration_s: float, level: float = 0.1, seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * RATE))
    return (level * noise * np.sin(np.arange(len(noise)) / 2000)).astype(np.float32)


# --- states


@pytest.mark.parametrize(("duration_s", "num_frames"), [(1.0, 25), (1.0, 30), (2.7, 68), (0.3, 8)])
def test_a_row_for_every_frame(encoder: AudioEncoder, duration_s: float, num_frames: int) -> None:
    states = encoder.encode([speech(duration_s)], RATE, num_frames)
    assert states.shape == (1, num_frames, LAYERS, WIDTH)
    assert states.dtype == np.float32
    assert np.isfinite(states).all()
    assert states.std(axis=1).min() > 0


def test_states_are_those_of_the_layers(encoder: AudioEncoder, folder: Path) -> None:
    """With as many rows as the convolutions give there is nothing to stretch."""
    samples = speech(1.0)
    model = Wav2Vec2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.from_numpy(normalised(samples))[None], output_hidden_states=True).hidden_states
    expected = torch.cat(states[1:]).transpose(0, 1).numpy()
    assert np.abs(encoder.embed(samples, 49) - expected).max() < 1e-5
    stretched = encoder.embed(samples, 97)
    assert stretched.shape[0] == 97
    assert np.abs(stretched[::2] - expected).max() > 1e-3  # before the layers, not after them


@pytest.mark.parametrize("num_samples", [1, 100, 399, 400, 1000])
def test_the_shortest_recording_is_heard(encoder: AudioEncoder, num_samples: int) -> None:
    states = encoder.encode([speech(1.0)[500 : 500 + num_samples]], RATE, 1)
    assert states.shape == (1, 1, LAYERS, WIDTH)
    assert np.isfinite(states).all()


def test_silence_is_heard_as_silence(encoder: AudioEncoder) -> None:
    silent, spoken = encoder.encode([np.zeros(RATE, np.float32), speech(1.0)], RATE, 25)
    assert np.isfinite(silent).all()
    assert np.abs(silent - spoken).max() > 0.1
    assert np.abs(silent[10] - silent[14]).max() < np.abs(spoken[10] - spoken[14]).max()


def test_speakers_are_heard_alone(encoder: AudioEncoder) -> None:
    one, other = speech(1.0), speech(1.0, seed=1)
    together = encoder.encode([one, other], RATE, 25)
    assert np.array_equal(together[0], encoder.encode([one], RATE, 25)[0])
    assert np.array_equal(together[1], encoder.encode([other], RATE, 25)[0])


def test_how_loud_a_recording_is_changes_nothing(encoder: AudioEncoder) -> None:
    quiet, loud = (encoder.encode([speech(1.0, level)], RATE, 25) for level in (0.001, 0.9))
    assert np.abs(quiet - loud).max() < 1e-3


# --- loudness


@pytest.mark.parametrize("level", [0.001, 0.1, 1.0])
def test_speech_is_levelled(level: float) -> None:
    samples = speech(2.0, level)
    assert loudness_lufs(levelled(samples, RATE, samples), RATE) == pytest.approx(-23, abs=0.05)


def test_the_silence_of_turns_does_not_count() -> None:
    samples, silence = speech(2.0)[1:], np.zeros(5 * RATE, np.float32)
    turn = np.concatenate([silence, samples, silence])
    assert np.array_equal(heard(turn), samples)
    raised = levelled(turn, RATE, heard(turn))
    assert np.array_equal(heard(raised), levelled(samples, RATE, samples))


@pytest.mark.parametrize("samples", [np.zeros(RATE, np.float32), speech(0.39), np.zeros(0, np.float32)])
def test_what_cannot_be_measured_stays_as_it_is(samples: NDArray[np.float32]) -> None:
    assert levelled(samples, RATE, heard(samples)) is samples


# --- windows


def test_windows_end_with_the_speech() -> None:
    embeddings = np.arange(10, dtype=np.float32).reshape(1, 10, 1, 1)
    first = audio_window(embeddings, 0, 5)
    assert first.shape == (1, 5, 5, 1, 1)
    assert first[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1, 2]
    assert first[0, 4, :, 0, 0].tolist() == [2, 3, 4, 5, 6]
    later = audio_window(embeddings, 6, 5)
    assert later[0, 0, :, 0, 0].tolist() == [4, 5, 6, 7, 8]
    assert later[0, 4, :, 0, 0].tolist() == [8, 9, 9, 9, 9]


# --- files


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["wav2vec2.encoder.layers.1.final_layer_norm.bias"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing: encoder\.layers\.1\.final_layer_norm\.bias"):
        AudioEncoder(tmp_path, "cpu")


def test_another_wav2vec2_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"do_stable_layer_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="do_stable_layer_norm=true is that of another wav2vec2"):
        AudioEncoder(tmp_path, "cpu")


def test_a_damaged_file_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        AudioEncoder(tmp_path, "cpu")
