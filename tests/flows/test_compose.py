from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, option_names
from avatar_core.errors import ConfigError
from avatar_core.media.table import read_table
from flows.compose import compose_config, is_override, quoted

ROOT = Path(__file__).parents[2]
GROUP_FILES = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/*.yaml"))


def refusal(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides, config_dir)
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


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("video.fsp=30", ["unknown option `video.fsp`", "did you mean `video.fps`?"]),
        ("fps=30", ["unknown option `fps`", "did you mean `video.fps`?"]),
        ("vidoe.fps=30", ["unknown option `vidoe", "did you mean `video"]),
        ("+video.fsp=30", ["unknown option `video.fsp`; did you mean `video.fps`?"]),
        (
            "preset=drafty",
            [
                "unknown preset `drafty`; choose one of: draft, fusionx, high, lightx2v, tiny; "
                "did you mean `draft`?"
            ],
        ),
        ("backend=preveiw", ["unknown backend `preveiw`", "did you mean `preview`?"]),
        ("backend.denoise.mouth_gian=1", ["`backend.denoise.mouth_gian`", "mouth_gain"]),
        ("backend.denoise.mouth_gain=9", ["option `backend.denoise.mouth_gain`", "1.5", "got 9"]),
        ("backend.name=ditto2", ["unknown backend `ditto2`; choose one of: preview"]),
        ("video.fps=fast", ["option `video.fps`", "valid number", "got 'fast'"]),
        ("video.crf=99", ["option `video.crf`", "got 99"]),
        ("name={", ["cannot read the configuration"]),
        ("=3", ["cannot read the configuration"]),
        ("backend=null", ["backend"]),
        ("video=3", ["option `video`"]),
    ],
)
def test_a_wrong_override_is_explained_in_one_line(override: str, fragments: list[str]) -> None:
    message = refusal(override)
    assert all(fragment in message for fragment in fragments), message


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


# --- files of one's own


def write_conf(folder: Path) -> Path:
    (folder / "batch").mkdir(parents=True)
    talks = "table: talks.csv\nseed: 7\nvideo: {fps: 30}\nbackend: {denoise: {blinks: false}}\n"
    (folder / "batch/interviews.yaml").write_text(f"# @package _global_\n{talks}")
    (folder / "preset").mkdir()
    (folder / "preset/small.yaml").write_text("# @package _global_\nvideo: {max_side: 128}\n")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_conf(tmp_path / "conf")


def test_a_batch_file_of_ones_own_is_found(own: Path) -> None:
    config = compose_config(["batch=interviews", "preset=small", "video.crf=30"], own)
    assert (config.table, config.seed, config.video.fps) == ("talks.csv", 7, 30.0)
    assert (config.video.max_side, config.video.crf) == (128, 30)
    assert create_backend(config.backend).config.denoise.blinks is False
    assert compose_config(["batch=demo", "preset=draft"], own).name == "demo"


@pytest.mark.parametrize("name", ["my conf", "größe", "a,b", "it's"])
def test_the_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    assert compose_config(["batch=interviews"], write_conf(tmp_path / name)).table == "talks.csv"


def test_a_misspelt_option_in_a_batch_file_is_named(own: Path) -> None:
    (own / "batch/wrong.yaml").write_text("# @package _global_\nvideo:\n  fsp: 30\n")
    message = refusal("batch=wrong", config_dir=own)
    assert "unknown option `video.fsp`; did you mean `video.fps`?" in message


def test_a_batch_file_that_is_no_yaml_is_refused(own: Path) -> None:
    (own / "batch/broken.yaml").write_text("video: [\n")
    assert "broken.yaml" in refusal("batch=broken", config_dir=own)


def test_an_unknown_batch_file_is_answered_with_those_there_are(own: Path) -> None:
    message = refusal("batch=interview", config_dir=own)
    assert "unknown batch `interview`" in message
    assert "did you mean `interviews`?" in message


@pytest.mark.filterwarnings("ignore:provider=hydra.searchpath")
def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "absent" in refusal("batch=demo", config_dir=tmp_path / "absent")


# --- words of the command line


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("video.fps=30", True),
        ("+storage.options.key=a", True),
        ("~preset", False),
        ("preset=draft", True),
        ("batch.csv", False),
        ("/data/a=b.csv", False),
        ("s3://bucket/a.csv", False),
    ],
)
def test_overrides_are_told_from_files(word: str, expected: bool) -> None:
    assert is_override(word) == expected


def test_a_file_that_looks_like_an_override_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fps=30.csv").touch()
    assert not is_override("fps=30.csv")


TEXTS = ["plain", "it's", 'a "b"', "a\\b", "end\\", "a\\'b", "a,b=c[d]{e}", "${x}", "$a", " a ", "ü", "'"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_quoting(text: str) -> None:
    assert compose_config([f"table={quoted(text)}"]).table == text
    assert compose_config([f"only=[{quoted(text)},{quoted('b')}]"]).only == (text, "b")
