"""Speech features: hidden states of Whisper's encoder (https://arxiv.org/abs/2212.04356) and the stretch of
them that each frame of the video sees.

`parity` is the clip as the reference implementation makes it: Whisper hears the first 30 s, at most 400
frames have speech, they are counted at 25 a second whatever the frame rate, and that is 25 or 12.5. Otherwise
Whisper hears everything, in pieces of 30 s, and any frame rate is allowed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from avatar_core.errors import InputError

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

Samples = NDArray[np.float32]

SAMPLE_RATE = 16_000
ROWS_PER_SECOND = 50  # hidden states of Whisper's encoder
ROWS_BEFORE, ROWS_PER_FRAME = 4, 10  # the window of a frame: 80 ms before its time, 120 ms from there

NUM_FRAMES = 129  # of the shortest video
EXTRA_FRAMES = 5  # of silence behind longer ones

PARITY_FPS = (25.0, 12.5)
PARITY_HEARD_FRAMES = 400
_PARITY_ROWS = 1500  # of Whisper's first 30 s
_PARITY_FRAME_SAMPLES = SAMPLE_RATE // 25


def parity_audio_len(num_samples: int) -> int:
    """Frames that the reference counts in a recording at `SAMPLE_RATE`."""
    return num_samples // _PARITY_FRAME_SAMPLES


def parity_num_frames(duration_s: float, fps: float) -> int:
    """Frames of the reference's video: of a long recording, 400 with speech and the silent ones behind.
    Raises `InputError` for clips that it cannot make."""
    if fps not in PARITY_FPS:
        raise InputError(f"mode=parity knows 25 and 12.5 frames a second, got {fps:g}; use mode=default")
    audio_len = parity_audio_len(round(duration_s * SAMPLE_RATE))
    heard = min(audio_len, PARITY_HEARD_FRAMES)
    longest = int((_PARITY_ROWS + ROWS_BEFORE - ROWS_PER_FRAME) * fps / ROWS_PER_SECOND) + 1
    if not 1 <= heard <= longest:
        raise InputError(
            f"the recording gives {heard} frames, mode=parity makes 1 to {longest} at {fps:g} frames a "
            "second; use mode=default"
        )
    return min(audio_len, PARITY_HEARD_FRAMES + EXTRA_FRAMES)


def whisper_samples(samples: Samples, sample_rate: int) -> Samples:
    """At `SAMPLE_RATE`, by the resampler of librosa's reader."""
    if sample_rate == SAMPLE_RATE:
        return samples
    import librosa

    return np.asarray(librosa.resample(samples, orig_sr=sample_rate, target_sr=SAMPLE_RATE), np.float32)


def log_mel(samples: Samples, extractor: "WhisperFeatureExtractor") -> NDArray[np.float16]:
    """[mel bands, 3000 k] for samples at `SAMPLE_RATE`; each of the k pieces of 30 s is normalised alone, the
    last one filled up with silence."""
    length = extractor.n_samples
    pieces = [samples[start : start + length] for start in range(0, max(1, len(samples)), length)]
    mels = [
        extractor(piece, sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"][0]
        for piece in pieces
    ]
    return np.concatenate(mels, axis=1).astype(np.float16)


class WhisperEncoder:
    """`folder` is that of an official Whisper model; weights are float32."""

    def __init__(self, folder: Path, device: str) -> None:
        from avatar_core.backends.hunyuan.pretrained import load_feature_extractor, load_whisper_encoder

        self._extractor = load_feature_extractor(folder)
        self._encoder = load_whisper_encoder(folder, device)

    def hidden_states(self, samples: Samples, *, parity: bool = False) -> NDArray[np.float32]:
        """[rows, layers + 1, channels] of samples at `SAMPLE_RATE`, 50 rows a second: embedding, every layer,
        the last one after the final norm."""
        length = self._extractor.n_samples
        heard = samples[:length] if parity else samples
        mel = log_mel(heard, self._extractor)
        columns = self._extractor.nb_max_frames
        pieces = [mel[:, start : start + columns] for start in range(0, mel.shape[1], columns)]
        return np.concatenate([self._states(piece) for piece in pieces])

    def _states(self, mel: NDArray[np.float16]) -> NDArray[np.float32]:
        import torch

        features = torch.from_numpy(mel.astype(np.float32))[None].to(self._encoder.device)
        with torch.inference_mode():
            states = self._encoder(features, output_hidden_states=True).hidden_states
        return np.asarray(torch.stack(states, dim=2)[0].cpu().numpy(), np.float32)

    def encode(
        self, tracks: Sequence[Samples], sample_rate: int, *, parity: bool = False
    ) -> NDArray[np.float16]:
        """`hidden_states` of a clip's only recording."""
        if len(tracks) != 1:
            raise InputError(
                f"got {len(tracks)} recordings for one clip, hunyuan animates one speaker; give one "
                "recording or use a backend for several speakers"
            )
        states = self.hidden_states(whisper_samples(tracks[0], sample_rate), parity=parity)
        return states.astype(np.float16)


def num_rows(fps: float, num_frames: int) -> int:
    """Rows that the windows of so many frames reach into, or a few more."""
    return int(np.ceil(num_frames * ROWS_PER_SECOND / fps)) + ROWS_PER_FRAME


def clip_windows(
    states: NDArray[np.floating], fps: float, num_frames: int, *, parity: bool = False
) -> NDArray[np.float16]:
    """What the transformer hears of a clip: the windows of its frames (with `parity` of 400 at most), and
    the padding behind."""
    heard = min(num_frames, PARITY_HEARD_FRAMES) if parity else num_frames
    return pad_windows(audio_windows(states.astype(np.float32), fps, heard).astype(np.float16))


def audio_windows(states: NDArray[np.float32], fps: float, num_frames: int) -> NDArray[np.float32]:
    """[num_frames, 10, layers + 1, channels]: for each frame the rows round its time (the nearest row where
    the time falls between two), zeros before the first and after the last."""
    times = np.arange(num_frames) * (ROWS_PER_SECOND / fps)
    rows = np.floor(times + 0.5).astype(np.intp)[:, None] + np.arange(ROWS_PER_FRAME)
    behind = max(0, int(rows[-1, -1]) + 1 - ROWS_BEFORE - len(states))
    return np.pad(states, ((ROWS_BEFORE, behind), (0, 0), (0, 0)))[rows]


def pad_windows(windows: NDArray[Any]) -> NDArray[Any]:
    """Zero frames behind: up to 129 frames, or 5 for a longer clip."""
    num_frames = len(windows)
    behind = NUM_FRAMES - num_frames if num_frames <= NUM_FRAMES else EXTRA_FRAMES
    return np.pad(windows, ((0, behind), *[(0, 0)] * (windows.ndim - 1)))
