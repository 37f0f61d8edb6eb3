"""Speech features: Whisper's pieces of 30 s, the rows that each frame sees, and what is refused."""

import librosa
import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from avatar_core.backends.hunyuan.audio import (
    WhisperEncoder,
    audio_windows,
    clip_windows,
    log_mel,
    pad_windows,
    parity_num_frames,
    whisper_samples,
)
from avatar_core.errors import InputError, WeightsError

LAYERS, CHANNELS = 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random recogniser in the files of an official one."""
    torch.manual_seed(0)
    sides = {"d_model": CHANNELS, "encoder_layers": LAYERS, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed_forward = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ids = {
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    path = tmp_path_factory.mktemp("whisper-tiny")
    WhisperForConditionalGeneration(WhisperConfig(**sides, **heads, **feed_forward, **ids)).save_pretrained(
        path
    )
    WhisperFeatureExtractor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return WhisperEncoder(folder, "cpu")


def speech(duration_s: float, sample_rate: int = 16_000) -> np.ndarray:
    times = np.arange(round(duration_s * sample_rate)) / sample_rate
    return (0.3 * np.sin(2 * np.pi * 220 * times) * np.sin(2 * np.pi * 3 * times)).astype(np.float32)


def rows(count: int) -> np.ndarray:
    """Row k holds k + 1, so that zeros are told apart."""
    return np.broadcast_to(np.arange(1, count + 1, dtype=np.float32)[:, None, None], (count, 3, 2))


def seen(windows: np.ndarray, frame: int) -> list[float]:
    return windows[frame, :, 0, 0].tolist()


def test_a_frame_sees_80_ms_before_and_120_ms_from_its_time():
    windows = audio_windows(rows(100), 25, 30)
    assert windows.shape == (30, 10, 3, 2)
    assert seen(windows, 0) == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert seen(windows, 10) == list(range(17, 27))
    assert seen(audio_windows(rows(100), 12.5, 10), 5) == list(range(17, 27))


def test_any_frame_rate_sees_the_rows_at_its_time():
    windows = audio_windows(rows(200), 30, 60)
    assert seen(windows, 30) == seen(audio_windows(rows(200), 25, 60), 25)
    starts = windows[:, 4, 0, 0] - 1
    assert np.abs(starts / 50 - np.arange(60) / 30).max() <= 0.01


def test_behind_the_last_row_there_is_silence():
    assert seen(audio_windows(rows(20), 25, 10), 9) == [15, 16, 17, 18, 19, 20, 0, 0, 0, 0]


@pytest.mark.parametrize(("num_frames", "padded"), [(1, 129), (129, 129), (130, 135), (400, 405)])
def test_zero_frames_behind(num_frames, padded):
    windows = pad_windows(np.ones((num_frames, 10, 3, 2), np.float16))
    assert windows.shape == (padded, 10, 3, 2)
    assert windows.dtype == np.float16
    assert windows[:num_frames].all()
    assert not windows[num_frames:].any()


def test_the_reference_counts_frames_at_25_a_second_up_to_400_and_5_silent_ones():
    assert parity_num_frames(1.3, 25) == 32
    assert parity_num_frames(1.3, 12.5) == 32
    assert parity_num_frames(16.08, 25) == 402
    assert parity_num_frames(60, 25) == 405


@pytest.mark.parametrize(("duration_s", "fps"), [(1, 30), (15.2, 12.5), (0.01, 25)])
def test_what_the_reference_cannot_make(duration_s, fps):
    with pytest.raises(InputError, match="mode=default"):
        parity_num_frames(duration_s, fps)


@pytest.mark.drill
def test_resampling_is_that_of_librosa_s_reader(tmp_path):
    recording = speech(0.5, 22_050)
    soundfile.write(tmp_path / "a.wav", recording, 22_050, subtype="FLOAT")
    wanted, _ = librosa.load(tmp_path / "a.wav", sr=16_000)
    assert np.array_equal(whisper_samples(recording, 22_050), wanted)
    assert whisper_samples(recording, 16_000) is recording


def test_every_30_s_are_normalised_alone():
    extractor = WhisperFeatureExtractor()
    quiet_then_loud = np.concatenate([0.01 * speech(30), speech(2)])
    mel = log_mel(quiet_then_loud, extractor)
    assert mel.shape == (80, 6000)
    assert mel.dtype == np.float16
    assert np.array_equal(mel[:, :3000], log_mel(0.01 * speech(30), extractor))


def test_states_are_those_of_the_encoder_after_every_layer(encoder, folder):
    model = WhisperForConditionalGeneration.from_pretrained(folder).get_encoder().eval()
    mel = log_mel(speech(1), WhisperFeatureExtractor())
    with torch.no_grad():
        wanted = model(torch.from_numpy(mel.astype(np.float32))[None], output_hidden_states=True)
    states = encoder.hidden_states(speech(1))
    assert states.shape == (1500, LAYERS + 1, CHANNELS)
    assert np.abs(states[:, -1] - wanted.last_hidden_state[0].numpy()).max() < 1e-6
    assert np.abs(states[:, 0] - wanted.hidden_states[0][0].numpy()).max() < 1e-6


def test_a_long_recording_is_heard_to_its_end_and_by_the_reference_for_30_s(encoder):
    recording = speech(31)
    states = encoder.hidden_states(recording)
    assert states.shape[0] == 3000
    assert np.array_equal(states[:1500], encoder.hidden_states(recording, parity=True))
    assert np.array_equal(states[1500:], encoder.hidden_states(recording[480_000:]))


def test_one_recording_per_clip(encoder):
    states = encoder.encode([speech(1)], 16_000)
    assert (states.shape[1:], states.dtype) == ((LAYERS + 1, CHANNELS), np.float16)
    windows = clip_windows(states, 25, 25)
    assert windows.shape == (129, 10, LAYERS + 1, CHANNELS)
    assert not windows[0, :4].any()
    assert windows[0, 4:].any()
    assert not windows[25:].any()
    with pytest.raises(InputError, match="got 2 recordings"):
        encoder.encode([speech(1), speech(1)], 16_000)


def test_parity_hears_400_frames(encoder):
    states = encoder.encode([speech(20)], 16_000, parity=True)
    windows = clip_windows(states, 25, 405, parity=True)
    assert len(windows) == 405
    assert windows[399].any()
    assert not windows[400:].any()


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(WeightsError, match="cannot be read"):
        WhisperEncoder(tmp_path, "cpu")
