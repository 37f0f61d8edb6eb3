"""Options of the backend: what holds for several stages, and where a value comes from."""

import subprocess
import sys
from typing import Any

import pytest

from avatar_core.backends.base import create_backend
from avatar_core.backends.ditto.config import CODE_DEFAULTS, DenoiseConfig, ReferenceConfig, chosen
from avatar_core.errors import ConfigError, InputError


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        create_backend({"name": "ditto", **options})
    return str(caught.value)


def test_shared_options_reach_their_stages() -> None:
    config = create_backend(
        {"name": "ditto", "mode": "parity", "precision": "bf16", "output": "crop", "image_size": 320}
    ).config
    assert {config.audio.mode, config.reference.mode, config.denoise.mode} == {"parity"}
    assert {config.reference.precision, config.decode.precision} == {"bf16"}
    assert (config.decode.output, config.decode.image_size) == ("crop", 320)


def test_the_side_of_a_square_that_is_not_made_is_in_no_key() -> None:
    configs = [create_backend({"name": "ditto", "image_size": side}).config.decode for side in (64, 512)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"denoise": {"mode": "parity"}}, "set backend.mode for all stages"),
        ({"decode": {"image_size": 320}}, "set backend.image_size for all stages"),
        ({"mode": "parity", "reference": {"detector": "mtcnn"}}, "mode=parity needs insightface"),
        ({"denoise": {"emo": 8}}, "emo"),
        ({"denoise": {"emo": "hapy"}}, "happy"),
        ({"denoise": {"overlap_v2": 80}}, "79"),
        ({"denoise": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"image_size": 321}, "image_size"),
        ({"denoise": {"use_d_keys": ["nose"]}}, "use_d_keys"),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, Any], fragment: str) -> None:
    assert fragment in refusal(**options)


def test_an_option_given_wins_over_the_published_configuration_and_that_over_the_code() -> None:
    official = {"sampling_timesteps": 10, "overlap_v2": 70, "crop_scale": 2.0}
    options = chosen(DenoiseConfig(overlap_v2=30), official)
    assert (options["overlap_v2"], options["sampling_timesteps"], options["smo_k_d"]) == (30, 10, 3)
    assert chosen(ReferenceConfig(), official)["crop_scale"] == 2.0
    assert chosen(DenoiseConfig(num_inference_steps=5, relative_d=False), official) == {
        **{name: CODE_DEFAULTS[name] for name in options},
        "overlap_v2": 70,
        "sampling_timesteps": 5,
        "relative_d": False,
    }


@pytest.mark.parametrize(
    ("duration_s", "default", "parity"), [(1.0, 25, 25), (0.28, 7, 8), (0.281, 8, 8), (0.01, 1, 1)]
)
def test_frames_of_a_duration(duration_s: float, default: int, parity: int) -> None:
    """The published code divides in floating point."""
    assert create_backend({"name": "ditto"}).num_frames(duration_s, 25.0) == default
    assert create_backend({"name": "ditto", "mode": "parity"}).num_frames(duration_s, 25.0) == parity


def test_other_frame_rates_are_refused() -> None:
    with pytest.raises(InputError, match=r"fps=30: backend ditto renders 25 frames a second"):
        create_backend({"name": "ditto"}).num_frames(1.0, 30.0)


def test_planning_imports_no_model_library() -> None:
    code = (
        "import sys; from avatar_core.backends.base import create_backend as create; "
        "create({'name': 'ditto'}).num_frames(1.0, 25.0); "
        "print([name for name in ('torch', 'onnxruntime', 'onnx', 'librosa') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
