import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, option_names
from avatar_core.errors import ConfigError
from avatar_core.media.table import read_table
from flows.compose import compose_config

ROOT = Path(__file__).parents[2]
GROUP_FILES = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/*.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_the_file_shows_are_the_defaults() -> None:
    config, default = compose_config([]), Config()
    assert config.storage == default.storage
    composed, declared = create_backend(config.backend), create_backend(default.backend)
    assert composed.name == declared.name
    assert composed.config == declared.config
    for name in set(Config.__dataclass_fields__) - {"backend"}:
        assert getattr(config, name) == getattr(default, name), name


MULTITALK = ["backend=multitalk", "backend.checkpoint=multitalk-tiny"]
GO_TOGETHER = {
    "backend/ditto.yaml": ["preset=tiny"],
    "backend/hunyuan.yaml": ["preset=tiny"],
    "backend/multitalk.yaml": ["preset=tiny"],
    "preset/tiny.yaml": ["backend=hunyuan"],
    "preset/fusionx.yaml": MULTITALK,
    "preset/lightx2v.yaml": MULTITALK,
}
"""Without these, one would need the official weights and the other a backend that has weights."""


def test_the_file_shows_every_option() -> None:
    shown: dict[str, Any] = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
    names = set(shown) | {
        f"{group}.{name}" for group, v in shown.items() if isinstance(v, dict) for name in v
    }
    chosen_by_group = {name for name in option_names(Config) if name.split(".")[0] in ("storage", "backend")}
    assert set(option_names(Config)) - chosen_by_group <= names


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_every_file_of_a_group_composes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_BUCKET", "bucket")
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    config = compose_config([f"{path.parent}={path.stem}", *GO_TOGETHER.get(str(path), [])])
    create_backend(config.backend).resolve()


def test_the_batch_file_of_the_samples_names_a_sound_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = compose_config(["batch=demo"])
    assert config.table
    assert [row.error for row in read_table(config.table)] == [None] * 5


def test_groups_change_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_BUCKET", "bucket")
    config = compose_config(["storage=s3", "preset=draft", "batch=demo"])
    assert config.storage.root == "s3://bucket/avatar-store"
    assert (config.video.max_side, config.video.x264_preset) == (512, "ultrafast")
    assert config.name == "demo"


def test_an_override_wins_over_a_preset() -> None:
    assert compose_config(["video.crf=10", "preset=draft"]).video.crf == 10


def test_a_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVATAR_BUCKET", raising=False)
    assert "AVATAR_BUCKET" in refusal("storage=s3")


UNKNOWN = {
    "video.fsp=30": "unknown option `video.fsp`; did you mean `video.fps`?",
    "fps=30": "unknown option `fps`; did you mean `video.fps`?",
    "vidoe.fps=30": "unknown option `vidoe`; did you mean `video`?",
    "+video.fsq=30": "unknown option `video.fsq`; did you mean `video.fps`?",
    "++face.rul=largest": "unknown option `face.rul`; did you mean `face.rule`?",
    "presett=draft": "unknown option `presett`; did you mean `preset`?",
    "mouth_gain=1": "unknown option `mouth_gain`; did you mean `backend.denoise.mouth_gain`?",
    "xyzzy=a.csv": "unknown option `xyzzy`; nor is there a file `xyzzy=a.csv`",
}
WRONG = {
    "video.fps=abc": "give a number from 1 to 120 (got 'abc')",
    "video.crf=99": "give a whole number from 1 to 51 (got 99)",
    "video.max_side=": "give a whole number from 64 to 8192 (got '')",
    "seed=-1": "give a whole number at least 0 and below 9223372036854775808 (got -1)",
    "limit=x(y": "give a whole number at least 1, or null (got 'x(y')",
    "name=": "give text that is not empty, or null (got '')",
    "only=": "give a list, each text that is not empty (got [''])",
    "audio.long=splt": "give 'split', 'refuse' or 'trim' (got 'splt'); did you mean `split`?",
    "face.required=maybe": "give true or false (got 'maybe')",
    "tts=kokoro": "give the options in it by name (checkpoint) (got 'kokoro')",
    "runtime.gpus=atuo": "give a list, each a whole number at least 0, or 'auto' (got 'atuo'); "
    "did you mean `auto`?",
    r"table=C:\data\a.csv": r"C:\data\a.csv is a Windows path; give a POSIX path, in WSL /mnt/c/data/a.csv",
    "storage.root=D:/store": "D:/store is a Windows path; give a POSIX path, in WSL /mnt/d/store",
    "runtime.cache_dir=~nobody-here/x": "~nobody-here/x: there is no user nobody-here; write "
    "./~nobody-here/x for a name",
}


@pytest.mark.parametrize("expected", [UNKNOWN, WRONG], ids=["unknown", "wrong"])
def test_every_wrong_override_is_named_as_typed_with_what_is_allowed(expected: dict[str, str]) -> None:
    sentences = refusal(*expected, "storage.options.secret=hunter2")
    for override, sentence in expected.items():
        assert f"`{override}`: {sentence}" in sentences, override
    assert not re.search("hunter2|mismatched|Lexer|multirun|Hydra|Input should", sentences)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "preset=drafty",
            "unknown preset `drafty`; choose one of: draft, fusionx, high, lightx2v, tiny; did you mean "
            "`draft`?",
        ),
        ("backend=preveiw", "choose one of: ditto, hunyuan, multitalk, preview; did you mean `preview`?"),
        (
            "backend.name=ditto2",
            "unknown backend `ditto2`; choose one of: ditto, hunyuan, multitalk, preview; did",
        ),
        ("backend={name: ditto2}", "unknown backend `ditto2`; choose one of"),
        ("backend=null", "unknown backend `null`; choose one of"),
        ("~storage", "unknown storage `null`; choose one of: local, s3"),
        ("preset=a,b", "unknown preset `a,b`; choose one of"),
        ("batch=absent.yaml", "no such file: "),
        ("seed=1,2", "`seed` takes one value, got 2; start a run for each"),
        ("video.fps=24,25,30", "`video.fps` takes one value, got 3; start a run for each"),
        ("~video.fsp", "unknown option `video.fsp`; did you mean `video.fps`?"),
        ("rows.3.image=a", "cannot be set"),
        ("=3", "sets no option; write it as NAME=VALUE, such as video.fps=30"),
        ("batch.csv", "sets no option; write it as NAME=VALUE, such as video.fps=30"),
    ],
)
def test_a_choice_or_word_that_cannot_be_is_named(override: str, sentence: str) -> None:
    message = refusal(override, "storage.options.secret=hunter2")
    assert message.startswith(f"`{override}`")
    assert sentence in message
    assert "hunter2" not in message


def test_options_of_the_backend_are_explained() -> None:
    message = refusal("backend.denoise.mouth_gian=1", "backend.denoise.mouth_gain=abc")
    assert (
        "`backend.denoise.mouth_gian=1`: unknown option `backend.denoise.mouth_gian`; did you mean" in message
    )
    assert "`backend.denoise.mouth_gain=abc`: give a number from 0 to 1.5 (got 'abc')" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["preset=tiny"],
            "`preset=tiny` sets backend.denoise.num_inference_steps, backend.checkpoint, backend.image_size, "
            "which the backend preview does not have; choose a backend that does: hunyuan, multitalk, ditto, "
            "such as `backend=hunyuan preset=tiny`",
        ),
        (
            ["backend=ditto", "preset=fusionx"],
            "`preset=fusionx` sets backend.denoise.lora, backend.denoise.flow_shift, "
            "backend.denoise.text_guidance_scale, backend.denoise.audio_guidance_scale, which the backend "
            "ditto does not have; choose a backend that does: multitalk, such as "
            "`backend=multitalk preset=fusionx`",
        ),
        (
            ["backend=ditto", "backend.denoise.mouth_gain=1"],
            "`backend.denoise.mouth_gain=1` sets backend.denoise.mouth_gain, which the backend ditto does "
            "not have; choose a backend that does: preview, such as "
            "`backend=preview backend.denoise.mouth_gain=1`",
        ),
    ],
    ids=["tiny", "fusionx", "option"],
)
def test_what_is_of_another_backend_says_of_which(overrides: list[str], message: str) -> None:
    assert refusal(*overrides) == message


@pytest.mark.parametrize(
    "override",
    [
        "storage.options.secret=hunter2",
        "storage.secret=hunter2",
        "+storage.secret=hunter2",
        "storage.options=hunter2",
        "+storage.options.secret=hunter2/a+b==,",
        "+storage.options.secret=[hunter2",
    ],
)
def test_credentials_stay_out_of_the_message(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override, "video.crf=99"])
    assert "hunter2" not in str(caught.value)


def test_storage_options_may_be_given_as_overrides() -> None:
    options = ["+storage.options.key=k", "+storage.options.secret='a/b+c='"]
    config = compose_config(["storage.root=s3://b/a", *options])
    assert config.storage.options == {"key": "k", "secret": "a/b+c="}
