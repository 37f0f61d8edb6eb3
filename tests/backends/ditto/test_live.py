"""A stream from the tiny checkpoint, with the published configuration's online settings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avatar_core.backends.ditto.backend import DittoBackend
from avatar_core.backends.ditto.config import DecodeConfig, DenoiseConfig, DittoConfig
from avatar_core.backends.ditto.config_reader import OfficialConfig, read_official_config
from avatar_core.backends.ditto.live import load_stream_models, stream_settings
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.stages import DittoReference
from avatar_core.backends.ditto.stream import DittoStream
from avatar_core.media.image import ImageLimits, load_image
from tests.backends.ditto.toy import speech

PORTRAIT = Path(__file__).parents[3] / "data/samples/portrait.jpg"
TINY = DittoConfig(checkpoint="ditto-tiny", denoise=DenoiseConfig(num_inference_steps=2))


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> DittoBackend:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVATAR_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        yield DittoBackend(TINY).resolve()


def test_a_registered_portrait_speaks_while_speech_arrives(backend: DittoBackend) -> None:
    picture = load_image(PORTRAIT, ImageLimits())
    picture, _ = backend.fit_picture(picture, 320)
    registrar = DittoReference(backend, TINY.checkpoint).load_models(TINY.reference, "cpu", None)
    avatar = Avatar.from_tensors(registrar.register([picture], [], is_image=True))
    official = read_official_config("ditto-tiny")
    models = load_stream_models(TINY, official)

    with DittoStream(avatar, [picture], models, stream_settings(TINY, official)) as stream:
        frames = list(stream.frames([speech(0.5), speech(0.3)]))

    assert len(frames) == 20
    assert {frame.shape for frame in frames} == {picture.shape}
    assert not np.array_equal(frames[0], frames[-1])


def test_chunk_settings_are_those_for_online_unless_chosen() -> None:
    offline = OfficialConfig(defaults={"overlap_v2": 10, "sampling_timesteps": 50, "smo_k_d": 5})
    online = OfficialConfig(defaults={"online_mode": True, "overlap_v2": 75})

    assert stream_settings(TINY, offline).chain.overlap == 70
    assert stream_settings(TINY, offline).chain.smooth_k == 5
    assert stream_settings(TINY, online).chain.overlap == 75
    chosen = replace(TINY, denoise=DenoiseConfig(overlap_v2=60))
    assert stream_settings(chosen, online).chain.overlap == 60
    assert stream_settings(chosen, online).num_inference_steps == 10


def test_without_a_published_configuration(backend: DittoBackend) -> None:
    settings = stream_settings(replace(TINY, output="crop", image_size=320), OfficialConfig(), seed=7)

    assert settings.crop_size == 320
    assert settings.seed == 7
    assert settings.limits is settings.delta_eye_arr is settings.character is None


def test_no_stitching_where_it_is_turned_off(backend: DittoBackend) -> None:
    loose = replace(TINY, decode=DecodeConfig(flag_stitching=False))
    points = np.zeros((1, 21, 3), np.float32)
    renders = []
    for config in (TINY, loose):
        renderer = load_stream_models(config, OfficialConfig()).renderer
        volumes = renderer.volumes(np.ones((1, 4, 2, 16, 16), np.float32))
        renders.append(renderer.render(volumes, points, points + 0.1, [0]))

    assert not np.array_equal(*renders)
