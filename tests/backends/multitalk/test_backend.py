from pathlib import Path
from typing import Any

import pytest

from avatar_core import weights
from avatar_core.backends.base import create_backend
from avatar_core.backends.multitalk.config import MultiTalkConfig
from avatar_core.backends.multitalk.stages import MultiTalkDenoise
from avatar_core.backends.multitalk.tiny import write_tiny_checkpoint
from avatar_core.errors import ConfigError, WeightsError
from tests.subjects import subject

FAST = {"checkpoint": "multitalk-tiny"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder, empty."""
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def multitalk(**options: Any) -> Any:
    return create_backend({"name": "multitalk", **options})


# --- weights


def test_first_use_of_the_random_checkpoint_writes_it_whole(home: Path) -> None:
    multitalk(**FAST).resolve()
    assert weights.verify("multitalk-tiny") == []
    assert [path.name for path in home.iterdir()] == ["multitalk-tiny"]
    every = ("bf16", "none"), ("int8", "none"), ("int8", "fusionx"), ("fp8", "fusionx"), ("bf16", "lightx2v")
    for transformer, lora in every:
        multitalk(**FAST, denoise={"transformer": transformer, "lora": lora}).resolve()


def test_absent_official_weights_are_one_line(home: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        multitalk().resolve()
    assert str(caught.value) == (
        "weights 'multitalk': audio, text, transformer, vae, clip not found in "
        f"{home / 'multitalk'}; run: avatar weights fetch multitalk"
    )
    write_tiny_checkpoint(home / "multitalk")
    multitalk().resolve()
    for path in (home / "multitalk").rglob("*int8*"):
        path.unlink()
    multitalk().resolve()
    with pytest.raises(WeightsError, match=r"run: avatar weights fetch multitalk/transformer-int8$"):
        multitalk(denoise={"transformer": "int8"}).resolve()


def test_an_installation_as_its_authors_describe_it_is_found(home: Path) -> None:
    """The base's index is that of MultiTalk, whose file lies beside the base's too."""
    write_tiny_checkpoint(home / "multitalk")
    base, added = home / "multitalk/Wan2.1-I2V-14B-480P", home / "multitalk/MeiGen-MultiTalk"
    (base / "multitalk.safetensors").symlink_to(added / "multitalk.safetensors")
    multitalk().resolve()
    assert weights.verify("multitalk") == []


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decode": {"image_size": 720}},
            "backend.decode.image_size=720: set backend.image_size for all stages",
        ),
        ({"audio": {"mode": "parity"}}, "backend.audio.mode=parity: set backend.mode for all stages"),
        ({"denoise": {"steps": 3}}, "unknown option `backend.denoise.steps`"),
        ({"denoise": {"num_inference_steps": 0}}, "from 1 to 1000 (got 0)"),
        ({"denoise": {"window_frames": 80}}, "window_frames=80: give a multiple of four and one"),
        ({"denoise": {"motion_frames": 81}}, "motion_frames=81 must be fewer than window_frames=81"),
        (
            {"denoise": {"transformer": "int8", "lora": "lightx2v"}},
            "lora=lightx2v cannot be merged into transformer=int8",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        multitalk(**options)
    assert message in str(caught.value)


def test_shared_options_reach_their_stages() -> None:
    config = MultiTalkConfig(mode="parity", image_size=720)
    assert {stage.mode for stage in (config.audio, config.reference, config.denoise)} == {"parity"}
    assert {stage.image_size for stage in (config.reference, config.denoise, config.decode)} == {720}


def test_the_shift_follows_the_size() -> None:
    shifts = {size: MultiTalkConfig(image_size=size).denoise.shift for size in (64, 480, 720, 960)}
    assert shifts == {64: 7.0, 480: 7.0, 720: 11.0, 960: 11.0}
    assert multitalk(denoise={"flow_shift": 2.0}).config.denoise.shift == 2.0


def test_every_kind_of_weights_has_its_part() -> None:
    def used(**denoise: Any) -> tuple[str, ...]:
        backend = multitalk(denoise=denoise)
        names: tuple[str, ...] = MultiTalkDenoise(backend, "multitalk").weight_names(backend.config.denoise)
        return names

    always = ("multitalk/vae", "multitalk/clip")
    assert used() == ("multitalk/transformer", *always)
    assert used(transformer="fp8_cast") == used()
    assert used(transformer="fp8") == ("multitalk/transformer-fp8", *always)
    assert used(lora="fusionx") == ("multitalk/transformer", "multitalk/lora-fusionx", *always)
    assert used(transformer="int8", lora="fusionx") == ("multitalk/transformer-int8-fusionx", *always)


def test_random_weights_wait_where_the_real_ones_do_and_need_no_gpu() -> None:
    for backend in (multitalk(), multitalk(**FAST)):
        kinds = {name: stage.device_kind for name, stage in backend.stages().items()}
        assert {name for name in kinds if kinds[name] == "cpu"} == {"face", "audio", "reference"}
    assert multitalk(**FAST).renders_on_cpu
    assert not multitalk().renders_on_cpu


def test_the_large_models_have_memory_levels() -> None:
    levels = {name: stage.memory_levels("cpu") for name, stage in multitalk(**FAST).stages().items()}
    assert {stage for stage in levels if levels[stage]} == {"text", "denoise"}
    assert levels["text"] == levels["denoise"] == ("h200", "80gb", "48gb", "24gb", "10gb")


@pytest.mark.parametrize(("duration_s", "windows"), [(1.0, 1), (3.24, 1), (3.25, 2), (60.0, 27)])
def test_a_clip_has_windows(duration_s: float, windows: int) -> None:
    backend = multitalk(**FAST)
    assert MultiTalkDenoise(backend).num_windows(subject(backend, duration_s=duration_s)) == windows


def test_a_clip_has_as_many_frames_as_its_speech() -> None:
    assert multitalk(**FAST).num_frames(60.0, 25.0) == 1500
    assert multitalk(denoise={"max_windows": 2}).num_frames(60.0, 25.0) == 137
