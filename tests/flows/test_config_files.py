"""Batch, preset, storage and backend files of one's own."""

from pathlib import Path
from typing import Any

import pytest

from avatar_core.config import Config
from avatar_core.errors import ConfigError
from flows.compose import compose_config

BATCH = """\
table: t.csv
preset: draft
backend: hunyuan
storage: s3
video: {fps: 30}
"""
HEADER = "# @package _global_\n"
DEFAULTS = """\
defaults:
  - override /preset: draft
  - override /backend: hunyuan
  - override /storage: s3
table: t.csv
video: {fps: 30}
"""
WITH_BASE = "defaults: [base, _self_, preset: draft]\nbackend: hunyuan\nstorage: s3\nvideo: {fps: 30}\n"
DOTTED = "table: t.csv\npreset: [high, draft]\nbackend.name: hunyuan\nstorage: s3\nvideo.fps: 30\n"


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_BUCKET", "bucket")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / (name if "." in name else f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(own: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides, own)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what a file may say


@pytest.mark.parametrize(
    "content",
    [
        BATCH,
        HEADER + BATCH,
        f"# night\n\n{HEADER}\n{BATCH}",
        f"# @package batch\n{BATCH}",
        DEFAULTS,
        HEADER + DEFAULTS,
        WITH_BASE,
        DOTTED,
        BATCH.replace("\n", "\r\n"),
        "\ufeff" + BATCH,
    ],
    ids=["plain", "header", "late", "group", "defaults", "both", "base", "dotted", "windows", "bom"],
)
def test_a_batch_file_says_all_of_a_run(own: Path, content: str) -> None:
    write(own, "batch/base", "table: t.csv\nvideo: {fps: 24, crf: 30}\n")
    write(own, "batch/my", content)
    config = compose_config(["batch=my"], own)
    assert (config.table, config.video.fps) == ("t.csv", 30.0)
    assert (config.video.max_side, config.video.x264_preset) == (512, "ultrafast")
    assert config.video.crf == (30 if content == WITH_BASE else 26)
    assert (config.backend["name"], config.backend["image_size"]) == ("hunyuan", 704)
    assert config.storage.root == "s3://bucket/avatar-store"


def test_the_command_line_wins_then_batch_preset_backend_and_the_defaults(own: Path) -> None:
    write(own, "backend/mine", "name: ditto\nimage_size: 320\nmode: parity\ndenoise: {emo: 1, fade_in: 1}\n")
    preset = (
        "backend: {name: mine, mode: default, denoise: {emo: 2}}\nvideo: {crf: 1, fps: 11, max_side: 111}\n"
    )
    write(own, "preset/mine", preset)
    write(own, "batch/my", "preset: mine\nbackend: {denoise: {emo: 3}}\nvideo: {crf: 2, fps: 22}\n")
    config = compose_config(["batch=my", "video.crf=3"], own)
    assert (config.video.crf, config.video.fps, config.video.max_side) == (3, 22.0, 111)
    assert config.video.x264_preset == "veryfast"
    backend = config.backend
    assert (backend["name"], backend["image_size"], backend["mode"]) == ("ditto", 320, "default")
    assert backend["denoise"] == {"emo": 3, "fade_in": 1}
    other = compose_config(["batch=my", "preset=high", "backend=ditto"], own)
    assert (other.video.crf, other.video.max_side, other.backend["image_size"]) == (2, 1920, 512)
    without = ["backend=hunyuan", "~backend.denoise.emo"]  # which hunyuan does not have
    assert compose_config(["preset=mine", *without], own).backend["image_size"] == 704
    assert compose_config(["batch=my", "preset=null", "backend=ditto"], own).video.max_side == 1280


def test_backend_and_storage_files_hold_a_section_with_or_without_its_name(own: Path) -> None:
    write(own, "storage/plain", "root: /plain\noptions: {anon: yes}\n")
    write(own, "storage/named.yml", "storage: {root: /named}\n")
    write(own, "storage/global", f"{HEADER}storage: {{root: /global}}\nseed: 3\n")
    write(own, "backend/small", "defaults: [hunyuan]\nimage_size: 128\n")
    assert compose_config(["storage=plain"], own).storage.options == {"anon": True}
    roots = [compose_config([f"storage={name}"], own).storage.root for name in ("plain", "named", "global")]
    assert roots == ["/plain", "/named", "/global"]
    backend = compose_config(["backend=small"], own).backend
    assert (backend["name"], backend["image_size"], backend["text"]["prompt_prefix"][:9]) == (
        "hunyuan",
        128,
        "Authentic",
    )


def test_a_file_may_build_on_another(own: Path) -> None:
    write(own, "batch/base", "table: t.csv\npreset: draft\nseed: 1\nname: base\n")
    write(own, "batch/more", "batch: base\nseed: 2\npreset: small\n")
    write(own, "preset/small", "preset: draft\nvideo: {max_side: 128}\n")
    config = compose_config(["batch=more"], own)
    assert (config.table, config.name, config.seed) == ("t.csv", "base", 2)
    assert (config.video.max_side, config.video.x264_preset) == (128, "ultrafast")


def test_one_s_own_file_comes_before_ours_of_the_same_name(own: Path) -> None:
    write(own, "preset/draft", "video: {max_side: 99}\n")
    video = compose_config(["preset=draft"], own).video
    assert (video.max_side, video.x264_preset) == (99, "veryfast")


def test_texts_in_a_file_are_what_was_written(own: Path) -> None:
    write(own, "batch/a", "name: 12:30\nonly: [1, 007, 2024-05-01, it's]\nvideo: {fps: 3e1, crf: '20'}\n")
    config = compose_config(["batch=a"], own)
    assert (config.name, config.only) == ("12:30", ("1", "007", "2024-05-01", "it's"))
    assert (config.video.fps, config.video.crf) == (30.0, 20)
    write(own, "batch/b", "name: at-${video.fps}\ntable: '\\${x}.csv'\n")
    config = compose_config(["batch=b", "video.fps=24"], own)
    assert (config.name, config.table) == ("at-24", "${x}.csv")


def test_a_table_on_the_command_line_takes_the_place_of_rows_in_a_file(own: Path) -> None:
    write(own, "batch/rows", "rows: [{image: a.png, audio: a.wav}]\n")
    write(own, "batch/table", "table: t.csv\n")
    config = compose_config(["batch=rows", "table=x.csv"], own)
    assert (config.table, config.rows) == ("x.csv", ())
    config = compose_config(["batch=table"], own, {"rows": [{"image": "b.png", "audio": "b.wav"}]})
    assert (config.table, config.rows) == (None, ({"image": "b.png", "audio": "b.wav"},))


@pytest.mark.parametrize("name", ["my conf", "größe", "a,b", "it's", "${x}"])
def test_folder_and_file_may_be_called_anything(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    path = write(folder, f"batch/{name}", "table: talks.csv\n")
    assert compose_config([f"batch={name}"], folder).table == "talks.csv"
    assert compose_config([f"batch={path}"]).table == "talks.csv"


def test_a_file_may_be_given_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "night.yml", "table: night.csv\npreset: ./quick.yaml\n")
    write(tmp_path, "quick.yaml", "video: {crf: 40}\n")
    for word in ("batch=night.yml", "batch=./night.yml", f"batch={tmp_path}/night.yml"):
        config = compose_config([word])
        assert (config.table, config.video.crf) == ("night.csv", 40)


# --- where files are found


def test_the_folder_may_come_from_the_environment(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own, "batch/my", "table: own.csv\n")
    monkeypatch.setenv("AVATAR_CONFIG_DIR", str(own))
    assert compose_config(["batch=my"]).table == "own.csv"
    write(tmp_path / "other", "batch/my", "table: other.csv\n")
    assert compose_config(["batch=my"], tmp_path / "other").table == "other.csv"
    monkeypatch.setenv("AVATAR_CONFIG_DIR", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"AVATAR_CONFIG_DIR=.*absent: no such folder"):
        compose_config([])


def test_a_wrong_folder_is_named(own: Path) -> None:
    path = write(own, "batch/my", "table: t.csv\n")
    assert refusal(own / "absent") == f"--config-dir {own / 'absent'}: no such folder"
    assert refusal(path) == f"--config-dir {path}: is no folder; one file is chosen by batch=PATH"


def test_a_config_file_that_would_not_be_read_is_refused(own: Path) -> None:
    write(own, "config", "video: {fps: 30}\n")
    assert "its config.yaml is not read; move it to" in refusal(own, "seed=1")


def test_an_unknown_file_is_answered_with_those_there_are(own: Path) -> None:
    write(own, "batch/interviews", "table: t.csv\n")
    assert refusal(own, "batch=interview") == (
        "`batch=interview`: unknown batch `interview`; choose one of: demo, interviews; did you mean "
        "`interviews`?"
    )
    assert (
        "is found by its path, batch=./NAME.yaml, or as batch/NAME.yaml in the folder named by --config-dir"
        in (refusal(own, "batch=night"))
    )
    write(own, "batch/interviews.yml", "table: t.csv\n")
    assert "there are both" in refusal(own, "batch=interviews")


# --- what is wrong in a file


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("vidoe: {fps: 30}", ": unknown option `vidoe`; did you mean `video`?"),
        ("video:\n  fsp: 30", ": unknown option `video.fsp`; did you mean `video.fps`?"),
        ("video: {1: 2}", ": unknown option `video.1`"),
        ("presett: draft", ": unknown option `presett`; did you mean `preset`?"),
        ("preset: drafft", ": unknown preset `drafft`; choose one of: draft, "),
        ("defaults: [preset: drafft]", ": unknown preset `drafft`; choose one of: draft, "),
        ("defaults: [nope]", ": unknown batch `nope`; choose one of: demo, my; "),
        ("defaults: draft", ": `defaults` is a list of files, such as [preset: draft]; got 'draft'"),
        ("backend: dito", ": unknown backend `dito`; choose one of: ditto, "),
        ("backend: {name: dito}", ": unknown backend `dito`; choose one of: ditto, "),
        (
            "backend: {denoise: {mouth_gian: 1}}",
            ": unknown option `backend.denoise.mouth_gian`; did you mean",
        ),
        (
            "backend: {denoise: {mouth_gain: 9}}",
            ": option `backend.denoise.mouth_gain`: give a number from 0 to 1.5 (got 9)",
        ),
        (
            "preset: high\nbackend: {image_size: 64}",
            " sets backend.image_size, which the backend preview does not have",
        ),
        ("storage: s4", ": unknown storage `s4`; choose one of: local, s3"),
        ("storage: {rot: hunter2}", ": unknown option `storage.rot`; did you mean `storage.root`?"),
        ("storage: {options: hunter2}", ": option `storage.options`: give a mapping such as {name: value}"),
        ("storage: [hunter2]", ": unknown storage "),
        ("video: {crf: 99}", ": option `video.crf`: give a whole number from 1 to 51 (got 99)"),
        (
            "video: 3",
            ": option `video`: give the options in it by name (fps, max_side, crf, x264_preset) (got 3)",
        ),
        ("name: yes", ": option `name`: give text that is not empty, or null, in quotes (got True)"),
        ("name: 1.50", ": option `name`: give text that is not empty, or null, in quotes (got 1.5)"),
        ("name: a-${vidoe.fps}", ": option `name`: Interpolation key 'vidoe.fps' not found; set it, or"),
        (
            "name: a${b",
            ": option `name` holds `${`, but no reference such as ${video.fps}; write \\${ for the text",
        ),
        ("hydra: {run: {dir: x}}", ": unknown option `hydra`"),
        ("video.fps: 30\nvideo: {fps: 31}", ": `video` is there twice; write it once"),
        ("batch: my", "my.yaml; name no file in itself"),
        ("", ": is empty; write options, such as `table: batch.csv`, or {} for none"),
        ("# nothing\n", ": is empty; write options"),
        ("- a\n- b", ": is a list; write options by name, such as `table: batch.csv`"),
        ("hunter2", ": is one text; write options by name, such as `table: batch.csv`"),
        ("seed: 1\nvideo:\n  crf: 1\n  crf: 2", ", line 4: `crf` is there twice; write it once"),
        ("video:\n\tfps: 3", ", line 2: holds a tab; indent with spaces"),
        (
            "seed: 1\ntable: a: b",
            ", line 2: is no YAML (mapping values are not allowed here); a text with special",
        ),
        (
            "table: @a",
            ", line 1: is no YAML (found character '@' that cannot start any token); a text with special",
        ),
        ("table: [a\n", ", line 2: is no YAML"),
        ("a: 1\n---\nb: 2", ", line 2: is no YAML"),
        ("table: !!python/name:os.system x", ", line 1: is no YAML"),
        (b"seed: 1\nname: \xe9t\xe9\n", ", line 2: is not UTF-8; save it as UTF-8"),
        ("seed: 1\nname: a\x01b", ": is no YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(
    own: Path, content: str | bytes, problem: str
) -> None:
    path = write(own, "batch/my", content)
    message = refusal(own, "batch=my")
    assert f"{path}{problem}" in message or (f"{path}" in message and message.endswith(problem))
    assert "hunter2" not in message or "unknown storage" in problem


def test_a_preset_of_another_backend_says_of_which(own: Path) -> None:
    path = write(own, "preset/mine", "backend: {checkpoint: hunyuan-tiny, denoise: {step_cache: 'off'}}\n")
    assert refusal(own, "preset=mine") == (
        f"{path} sets backend.denoise.step_cache, backend.checkpoint, which the backend preview does not "
        "have; choose a backend that does: hunyuan, multitalk, such as `backend=hunyuan`"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("nam: ditto", "has no `name`; write which backend it is for"),
        ("name: dito", "unknown backend `dito`"),
    ],
)
def test_a_backend_file_must_name_a_backend(own: Path, content: str, problem: str) -> None:
    path = write(own, "backend/mine", content)
    assert refusal(own, "backend=mine").startswith(f"{path}: {problem}")


def test_a_broken_file_that_nobody_chose_does_no_harm(own: Path) -> None:
    write(own, "batch/broken", "video: [")
    write(own, "batch/my", "table: t.csv\n")
    assert compose_config(["batch=my"], own).table == "t.csv"


def test_other_users_of_hydra_in_the_process_are_left_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    write(tmp_path, "config", "defaults: [_self_, preset: mine]\n")
    write(tmp_path, "preset/mine", "a: 1\n")
    compose_config(["preset=draft"])
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        values: Any = compose("config")
    assert values == {"preset": {"a": 1}}
    assert compose_config([]) == Config(backend=compose_config([]).backend)
