import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatar_core.config import Config, VideoConfig, nearest, option_names, parse, to_dict
from avatar_core.errors import ConfigError
from avatar_core.planning.batch import located


def refusal(values: Any, kind: type[Any] = Config, where: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(kind, values, where)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_plain_values_become_typed_ones() -> None:
    config = parse(
        Config,
        {
            "table": "batch.csv",
            "only": ["a", "b"],
            "seed": "7",
            "video": {"fps": "30", "max_side": 512.0},
            "audio": {"max_duration_s": 5},
            "face": {"required": "false"},
        },
    )
    assert config.only == ("a", "b")
    assert config.seed == 7
    assert (config.video.fps, config.video.max_side) == (30.0, 512)
    assert isinstance(config.video.fps, float)
    assert config.audio.max_duration_s == 5.0
    assert config.face.required is False
    assert config.video.crf == VideoConfig().crf


def test_every_problem_is_reported_at_once() -> None:
    message = refusal({"tabel": "a.csv", "video": {"fsp": 30, "crf": 99}, "face": {"rule": "nearest"}})
    assert "unknown option `tabel`; did you mean `table`?" in message
    assert "unknown option `video.fsp`; did you mean `video.fps`?" in message
    assert "option `video.crf`" in message
    assert "(got 99)" in message
    assert "option `face.rule`" in message
    assert "'largest', 'leftmost' or 'most_confident'" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("video.fps", 0),
        ("video.fps", 121),
        ("video.fps", float("nan")),
        ("video.fps", "fast"),
        ("video.crf", -1),
        ("video.crf", 52),
        ("video.crf", 20.5),
        ("video.max_side", 32),
        ("video.x264_preset", "placebo"),
        ("audio.max_duration_s", 0.5),
        ("audio.silence_db", 3),
        ("audio.min_duration_s", 0),
        ("audio.long", "cut"),
        ("face.min_face", 4),
        ("input.max_bytes", 0),
        ("input.min_side", 1),
        ("runtime.shard_seconds", 0),
        ("runtime.cache_bytes", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(path: str, value: Any) -> None:
    group, _, name = path.partition(".")
    assert f"option `{path}`: " in refusal({group: {name: value}})


@pytest.mark.parametrize("value", [0, 0.0, "0"])
def test_lossless_videos_are_refused_with_the_reason(value: Any) -> None:
    assert refusal({"video": {"crf": value}}) == (
        "option `video.crf`: 0 is lossless, which most players cannot show; use 1, the least allowed"
    )
    assert parse(Config, {"video": {"crf": 1}}).video.crf == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", 2**63), ("takes", 0), ("limit", 0), ("max_failed_fraction", 1.5), ("seed", 0.5)],
)
def test_a_run_option_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    assert f"option `{name}`: " in refusal({name: value})


def test_the_path_of_a_part_stands_in_front() -> None:
    assert "unknown option `video.crff`; did you mean `video.crf`?" in refusal(
        {"crff": 1}, VideoConfig, "video"
    )


def test_a_path_may_be_a_path_object(tmp_path: Path) -> None:
    values = {
        "table": tmp_path / "a.csv",
        "only": [1, "b"],
        "name": 2024,
        "storage": {"root": tmp_path},
        "runtime": {"cache_dir": tmp_path / "cache"},
        "input": {"allowed_roots": [tmp_path, "s3://bucket/a"]},
    }
    config = parse(Config, values)
    assert (config.table, config.storage.root) == (f"{tmp_path}/a.csv", str(tmp_path))
    assert (config.name, config.only) == ("2024", ("1", "b"))
    assert config.runtime.cache_dir == f"{tmp_path}/cache"
    assert config.input.allowed_roots == (str(tmp_path), "s3://bucket/a")
    assert to_dict(config)["table"] == f"{tmp_path}/a.csv"


def test_the_home_folder_of_a_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located(parse(Config, {"table": "~/a.csv"})).table == f"{tmp_path}/a.csv"


def test_numbers_of_numpy_are_numbers() -> None:
    config = parse(
        Config,
        {
            "seed": np.int64(3),
            "only": np.array(["a"]),
            "video": {"fps": np.float32(30), "crf": np.uint8(4)},
            "face": {"required": np.bool_(False)},
        },
    )
    assert (config.seed, config.only, config.video.fps, config.video.crf) == (3, ("a",), 30.0, 4)
    assert config.face.required is False


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (r"C:\data\a.csv", "is a Windows path; give a POSIX path, in WSL /mnt/c/data/a.csv"),
        ("d:/a", "is a Windows path; give a POSIX path, in WSL /mnt/d/a"),
        ("a\0b", "holds a character that no file name can have"),
        ("~nobody-here/a", "there is no user nobody-here; write ./~nobody-here/a for a name"),
        ("caf\udce9.csv", "is not UTF-8; give it, or the file, another name"),
        ("", "give text that is not empty"),
        (3.5, "give text that is not empty"),
    ],
)
def test_what_no_path_can_be_is_refused(place: Any, problem: str) -> None:
    for values in ({"table": place}, {"storage": {"root": place}}, {"runtime": {"cache_dir": place}}):
        assert problem in refusal(values)


@pytest.mark.parametrize("values", ["batch.csv", 3, None, ["a"]])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    assert "a configuration is a mapping such as {'table': 'batch.csv'} (got " in refusal(values)


def test_table_and_rows_exclude_each_other() -> None:
    assert "not both" in refusal({"table": "a.csv", "rows": [{"image": "a.png", "audio": "a.wav"}]})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().video.fps = 30.0


def test_credentials_stay_out_of_what_is_shown_or_recorded() -> None:
    config = parse(Config, {"storage": {"root": "s3://bucket/a", "options": {"secret": "hunter2"}}})
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(to_dict(config))
    assert to_dict(config)["storage"] == {"root": "s3://bucket/a"}
    assert config.storage.options == {"secret": "hunter2"}


@pytest.mark.parametrize("storage", [{"options": "hunter2"}, {"options": ["hunter2"]}, {"secret": "hunter2"}])
def test_misplaced_credentials_stay_out_of_the_message(storage: Any) -> None:
    assert "hunter2" not in refusal({"storage": storage})


def test_option_names_are_dotted() -> None:
    names = option_names(Config)
    assert {"table", "video", "video.crf", "storage.options", "runtime.shard_seconds"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("video.fsp", "; did you mean `video.fps`?"),
        ("fps", "; did you mean `video.fps`?"),
        ("entirely_different", ""),
    ],
)
def test_the_nearest_name_is_offered(name: str, hint: str) -> None:
    assert nearest(name, option_names(Config)) == hint
