from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.preview.contours import contours_from_points
from avatar_core.backends.preview.motion import make_motion
from avatar_core.backends.preview.renderer import Renderer
from avatar_core.backends.preview.visemes import make_visemes
from avatar_core.errors import InputError
from avatar_core.media.audio import load_mono
from avatar_core.media.face import FaceDetector
from avatar_core.media.image import load_image
from avatar_core.media.mtcnn import installed_weights
from avatar_core.media.video import Sound, VideoWriter
from avatar_core.stages.score.sync import SyncScore, best_correlation, measure_sync

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
SAMPLE_RATE, FPS = 16_000, 25
FRAME_SAMPLES = SAMPLE_RATE // FPS


@cache
def speech() -> NDArray[np.float32]:
    return np.concatenate(
        [load_mono(SAMPLES / name, SAMPLE_RATE) for name in ("hello.wav", "voice.flac", "story.ogg")]
    )


@cache
def face_points() -> NDArray[np.float32]:
    (face,) = FaceDetector(installed_weights()).detect(load_image(SAMPLES / "portrait.jpg"))
    return face.points


def render(path: Path, mouth_gain: float) -> Path:
    picture = load_image(SAMPLES / "portrait.jpg")
    (face,) = FaceDetector(installed_weights()).detect(picture)
    renderer = Renderer(picture, [contours_from_points(picture, face)])
    num_frames = len(speech()) // FRAME_SAMPLES
    motion = make_motion(
        make_visemes(speech(), SAMPLE_RATE, FPS, num_frames), FPS, seed=1, mouth_gain=mouth_gain
    )
    sound = Sound(iter([speech()[:, None]]), SAMPLE_RATE, 1)
    with VideoWriter(path, 512, 512, FPS, sound, crf=20, preset="veryfast") as writer:
        for i in range(num_frames):
            tracks = (motion.mouth_open, motion.mouth_wide, motion.blink, motion.head)
            writer.write_frame(renderer.frame(*(track[i : i + 1] for track in tracks)))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("sync") / "speaking.mp4", mouth_gain=1)


@pytest.fixture(scope="module")
def score(video: Path) -> SyncScore:
    return measure_sync(video, face_points())


def test_a_rendered_clip_is_in_sync(score: SyncScore) -> None:
    assert score.r >= 0.75
    assert abs(score.lag_frames) <= 1
    assert score.spread >= 0.02


@pytest.mark.drill
def test_a_frozen_mouth_on_a_nodding_head_scores_low(tmp_path: Path) -> None:
    frozen = measure_sync(render(tmp_path / "frozen.mp4", mouth_gain=0), face_points())
    assert frozen.r <= 0.4
    assert frozen.spread < 0.02


@pytest.mark.drill
def test_reversed_sound_scores_low(video: Path) -> None:
    assert measure_sync(video, face_points(), audio=speech()[::-1].copy()).r <= 0.4


@pytest.mark.drill
@pytest.mark.parametrize("shift_frames", [-3, 3])
def test_shifted_sound_is_found(video: Path, score: SyncScore, shift_frames: int) -> None:
    late = np.roll(speech(), shift_frames * FRAME_SAMPLES)
    shifted = measure_sync(video, face_points(), audio=late)
    assert shifted.lag_frames - score.lag_frames == pytest.approx(-shift_frames, abs=0.5)


def test_own_track_replaces_the_sound_of_the_video(video: Path, score: SyncScore) -> None:
    own = measure_sync(video, face_points(), audio=speech())
    assert own.r == pytest.approx(score.r, abs=0.05)
    assert own.lag_frames == pytest.approx(score.lag_frames, abs=0.3)


def test_silent_film_needs_a_track(tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    with VideoWriter(path, 512, 512, FPS) as writer:
        for _ in range(5):
            writer.write_frame(load_image(SAMPLES / "portrait.jpg"))
    with pytest.raises(InputError, match="sound"):
        measure_sync(path, face_points())
    still = measure_sync(path, face_points(), audio=speech()[: 5 * FRAME_SAMPLES])
    assert still.r == pytest.approx(0, abs=0.8)
    assert still.spread < 0.001


def test_face_beyond_the_border_is_an_input_error(video: Path) -> None:
    with pytest.raises(InputError, match="too small or too near"):
        measure_sync(video, face_points() + np.array([0, 400], np.float32))


def test_lag_is_positive_for_a_late_mouth() -> None:
    loudness = np.random.default_rng(0).standard_normal(200)
    r, lag_frames = best_correlation(np.roll(loudness, 2), loudness)
    assert r > 0.9
    assert lag_frames == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_very_short_tracks(length: int) -> None:
    r, lag_frames = best_correlation(np.arange(length, dtype=float), np.arange(length, dtype=float))
    assert np.isfinite([r, lag_frames]).all()
