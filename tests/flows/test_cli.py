"""The `avatar` command, as a user types it."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
import typer.main

from avatar_core.pipeline import render
from flows.cli import app
from tests.sample_rows import (
    Rendered,
    RunAvatar,
    attempts,
    read_video,
    render_table,
    videos,
    write_picture,
    write_table,
)
from tests.watch import Watch

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "render": {"--output", "-o", "--limit", "--only", "--takes", "--config-dir", "--detach"},
    "plan": {"--limit", "--only", "--takes", "--config-dir"},
    "rerun": {"--stage", "--failed", "--config-dir"},
    "verify": {"--repair", "--config-dir"},
    "gc": {"--delete", "--forget", "--min-age-days", "--config-dir"},
    "status": {"--config-dir", "--watch"},
    "doctor": {"--config-dir"},
    "deploy": {"--cron", "--timezone", "--name", "--config-dir", "--paused", "--remove"},
    "up": {
        *("--host", "--port", "--gpus", "--pretend-gpus", "--name", "--renders"),
        *("--postgres", "--database", "--keep-days", "--notify"),
    },
    "down": {"--now"},
    "worker": {"--gpus", "--pretend-gpus", "--name", "--renders", "--remove"},
    "logs": {"--follow", "-f"},
    "weights list": set(),
    "weights fetch": set(),
    "weights verify": set(),
    "weights convert": {"--dtype"},
    "weights tiny": set(),
}

pytestmark = pytest.mark.timeout(120)


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


# --- help


def test_help_lists_every_command(avatar: RunAvatar) -> None:
    code, output = avatar("--help")
    assert code == 0
    for name in ("render", "plan", "rerun", "verify", "gc", "weights", "doctor"):
        assert re.search(rf"\b{name}\b", output)


def test_no_arguments_show_the_help(avatar: RunAvatar) -> None:
    assert "render" in avatar()[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_command_and_option_has_help(avatar: RunAvatar, name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    options = {spelling for option in shown for spelling in option.opts if spelling.startswith("-")}
    assert options == OPTIONS[name]
    for option in shown:
        if option.param_type_name == "option":
            assert option.help, option.name
    code, output = avatar(*name.split(), "--help")
    assert code == 0
    assert all(spelling in output for spelling in options)


def test_there_are_no_other_commands() -> None:
    assert {name for name, command in COMMANDS.items() if not command.hidden} == set(OPTIONS)


def test_the_documents_show_commands_and_options_that_exist() -> None:
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    options: dict[str, set[str]] = {}
    for name, command in COMMANDS.items():
        spellings = options.setdefault(name.split()[0], set())
        spellings |= {spelling for option in command.params for spelling in option.opts}
    shown = [(name, words) for name, words in re.findall(r"avatar (\w+)([^`#\n]*)", text) if name in options]
    assert len(shown) > 10
    for name, words in shown:
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", words)) <= options[name], f"avatar {name}{words}"


def test_version(avatar: RunAvatar) -> None:
    code, output = avatar("--version")
    assert code == 0
    assert re.fullmatch(r"avatar-dataset \d+\.\d+\.\d+\S*\n", output)


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    heavy = {"av", "cv2", "diffusers", "hydra", "librosa", "pandas", "pyarrow", "s3fs", "torch"}
    code = f"import sys, flows.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


# --- render


def test_a_table_renders(avatar: RunAvatar, rendered: Rendered, tmp_path: Path) -> None:
    code, output = avatar("render", rendered.table, f"storage.root={tmp_path}")
    assert code == 0
    assert videos(tmp_path / "datasets/batch") == videos(rendered.result.dataset)
    assert "decode: 4 to do, 0 of 4 cached" in output
    assert f"4 of 4 clips in {tmp_path}/datasets/batch" in output
    code, output = avatar("render", rendered.table, f"storage.root={tmp_path}")
    assert code == 0
    assert "decode: 0 to do, 4 of 4 cached" in output


def test_output_that_is_no_terminal_is_plain_lines(
    avatar: RunAvatar, rendered: Rendered, store: Path
) -> None:
    _, output = avatar("render", rendered.table, f"storage.root={store}")
    assert not re.search(r"[\x1b\r]", output)
    assert "ingest: 0 to do, 4 of 4 cached\n" in output


@pytest.mark.drill
def test_options_choose_rows_and_takes(avatar: RunAvatar, rendered: Rendered, store: Path) -> None:
    words = ("render", rendered.table, f"storage.root={store}")
    assert "2 of 2 clips" in avatar(*words, "--limit", 2)[1]
    names = ("--only", "portrait-hello", "--only", "closeup-again", "--takes", 2)
    code, output = avatar(*words, *names)
    assert code == 0
    assert "4 of 4 clips" in output
    assert "closeup-again-take2" in output


def test_one_picture_and_one_recording(
    avatar: RunAvatar, inputs: Path, rendered: Rendered, tmp_path: Path
) -> None:
    out = tmp_path / "clips" / "out.mp4"
    pair = (inputs / "portrait.jpg", inputs / "hello.wav")
    code, output = avatar("render", *pair, "-o", out, f"storage.root={tmp_path / 'store'}")
    assert code == 0
    assert f"written to {out}" in output
    assert len(read_video(out)) == 15
    assert list(videos(tmp_path / "store/datasets/portrait-hello")) == ["portrait-hello.mp4"]


@pytest.mark.drill
@pytest.mark.parametrize("name", ["it's [1], {a}=b.jpg", "a ${b} c.jpg", 'ü "q" \\ x.jpg', "fps=30.jpg"])
def test_files_on_the_command_line_may_be_called_anything(
    avatar: RunAvatar, inputs: Path, store: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(inputs / "portrait.jpg", name)
    code, output = avatar("render", name, inputs / "hello.wav", f"storage.root={store}")
    assert code == 0, output
    assert "1 of 1 clips" in output


@pytest.mark.drill
def test_rows_that_fail_are_the_exit_code(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "good", "image": "portrait.jpg", "audio": "hello.wav"},
        {"name": "bad", "image": "landscape.png", "audio": "hello.wav"},
    ]
    words = (write_table(inputs / "half.csv", rows), f"storage.root={tmp_path}")
    code, output = avatar("render", *words)
    assert code == 1
    assert "reference: failed: no face found" in output
    assert "1 of 2 clips failed" in output
    assert avatar("render", *words, "max_failed_fraction=0.5")[0] == 0
    assert avatar("render", *words, "max_failed_fraction=0.4")[0] == 1


@pytest.mark.drill
def test_a_recorded_max_failed_fraction_holds_for_rerun(
    avatar: RunAvatar, inputs: Path, tmp_path: Path
) -> None:
    rows = [{"image": picture, "audio": "hello.wav"} for picture in ("portrait.jpg", "landscape.png")]
    table = write_table(inputs / "allowed.csv", rows)
    root = f"storage.root={tmp_path}"
    assert avatar("render", table, root, "max_failed_fraction=0.5")[0] == 0
    assert avatar("rerun", "allowed", root)[0] == 0


@pytest.mark.drill
def test_a_failed_pair_writes_no_output(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    pair = (inputs / "landscape.png", inputs / "hello.wav")
    code, _ = avatar("render", *pair, "-o", tmp_path / "out.mp4", f"storage.root={tmp_path / 'store'}")
    assert code == 1
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["render"], ["nothing to render: give a TABLE"]),
        (["render", "a.csv", "b.csv", "c.csv"], ["got 3 files"]),
        (["render", "absent.csv"], ["absent.csv: no such file"]),
        (["render", "absent.csv", "-o", "out.mp4"], ["-o/--output goes with one PICTURE and one RECORDING"]),
        (["render", "a.csv", "foo=b.csv"], ["unknown option `foo`; nor is there a file `foo=b.csv`"]),
        (["render", "data/a=b.csv"], ["data/a=b.csv: no such file"]),
        (["render", "a.yaml", "b.yml"], ["give one batch file; got 2: batch=a.yaml, batch=b.yml"]),
        (["render", "night.yaml"], ["`batch=night.yaml`: no such file: "]),
        (["render", r"C:\a.csv"], [r"option `table`: C:\a.csv is a Windows path; give a POSIX path"]),
        (["render", "a.csv", "--only", ""], ["option `only`: give a list, each text that is not empty"]),
        (["rerun", "a", "video.fps=3"], ["`video.fps=3` would change what was recorded"]),
        (
            ["rerun", "a", "+storage.options.key=hunter", "seed=3"],
            ["`seed=3` would change what was recorded"],
        ),
        (["rerun", "a", "video.yaml"], ["`video.yaml` sets no option; write it as NAME=VALUE"]),
        (["gc", "storage=s4"], ["unknown storage `s4`; choose one of: local, s3"]),
        (["render", "a.csv", "video.fsp=30"], ["unknown option `video.fsp`; did you mean `video.fps`?"]),
        (["render", "a.csv", "table=b.csv"], ["`table=b.csv`", "both say `table`; give one of them"]),
        (["render", "a.png", "a.wav", "rows=[]"], ["`rows=[]`", "both say `rows`"]),
        (["plan", "a.csv", "--limit", "2", "limit=3"], ["`limit=3`", "both say `limit`"]),
        (["render", "a.csv", "--limit", "0"], ["option `limit`"]),
        (["render", "a.csv", "--takes", "0"], ["option `takes`"]),
        (["plan", "batch=demos"], ["unknown batch `demos`; choose one of: demo; did you mean `demo`?"]),
        (["verify", "absent", "storage.root=ftp://host/a"], ["neither a folder nor"]),
        (["rerun", "absent"], ["no run `absent`", "none yet"]),
        (["verify", "absent"], ["no run `absent`", "none yet"]),
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    avatar: RunAvatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], fragments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = avatar(*words)
    assert code == 2
    assert "Traceback" not in output
    assert all(fragment in output for fragment in fragments), output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["render", "a.csv", "--limit", "many"], "Invalid value for '--limit'"),
        (["render", "a.csv", "--lmit", "1"], "No such option: --lmit"),
        (["rander", "a.csv"], "No such command 'rander'"),
    ],
)
def test_a_misspelt_command_shows_its_usage(avatar: RunAvatar, words: list[str], wrong: str) -> None:
    code, output = avatar(*words)
    assert code == 2
    assert output.startswith("Usage: ")
    assert wrong in output


@pytest.mark.drill
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(rendered: Rendered, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-m", "flows.cli", "render", str(rendered.table), f"storage.root={store}"]
    watch = Watch(tmp_path / "watch")
    watch.hold_at("ingest", 3)
    process = subprocess.Popen(
        command,
        env=watch.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    watch.until_held(process)
    process.send_signal(signal.SIGINT)
    watch.release()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "what is finished is kept, the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not (store / "datasets").exists()
    assert len(attempts(store, "ingest")) >= 2
    result = render({"table": str(rendered.table), "storage": {"root": str(store)}})
    assert videos(result.dataset) == videos(rendered.result.dataset)
    for stage, items in (("ingest", 4), ("decode", 4)):  # each was done once
        keys = attempts(store, stage)["key"]
        assert (len(keys), keys.is_unique) == (items, True)


# --- plan


def test_plan_knows_what_is_to_do_and_what_it_costs(
    avatar: RunAvatar, inputs: Path, rendered: Rendered, tmp_path: Path, store: Path
) -> None:
    code, output = avatar("plan", rendered.table, f"storage.root={tmp_path}")
    assert code == 0
    assert re.search(r"^decode +4 +0 +4 +unknown", output, re.MULTILINE)
    assert "4 clips, 0 rejected; estimated time: unknown" in output
    assert not (tmp_path / "stages/decode").exists()
    assert not (tmp_path / "datasets").exists()

    _, output = avatar("plan", rendered.table, f"storage.root={store}")
    assert re.search(r"^decode +4 +4 +0 *$", output, re.MULTILINE)
    assert "estimated time: 0 s" in output

    _, output = avatar("plan", rendered.table, f"storage.root={store}", "video.crf=30")
    assert re.search(r"^decode +4 +0 +4 +[\d.]+ s +[\d.]+ MB", output, re.MULTILINE)
    assert re.search(r"^denoise +4 +4 +0 *$", output, re.MULTILINE)
    assert re.search(r"estimated time: \d+ s", output)


def test_plan_names_rejected_rows(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "good", "image": "portrait.jpg", "audio": "hello.wav"},
        {"name": "bad", "image": "absent.png", "audio": "hello.wav"},
    ]
    code, output = avatar("plan", write_table(inputs / "rejected.csv", rows), f"storage.root={tmp_path}")
    assert code == 0
    assert re.search(r"rejected bad \(row 2\): .*absent\.png: no such file", output)
    assert "2 clips, 1 rejected" in output


def test_plan_tells_what_failed_for_good(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"name": "good", "image": "portrait.jpg", "audio": "hello.wav"},
        {"name": "bad", "image": "landscape.png", "audio": "hello.wav"},
        {"name": "worse", "image": "landscape.png", "audio": "again.wav"},
        {"name": "absent", "image": "absent.png", "audio": "hello.wav"},
    ]
    table = write_table(inputs / "failed.csv", rows)
    render_table(table, tmp_path)
    code, output = avatar("plan", table, f"storage.root={tmp_path}")
    assert code == 0
    assert re.search(r"^stage +items +cached +to do +failed +skipped +time +size *$", output, re.MULTILINE)
    assert re.search(r"^face +2 +2 +0 *$", output, re.MULTILINE)
    assert re.search(r"^reference +2 +1 +0 +1 *$", output, re.MULTILINE)
    assert re.search(r"^decode +3 +1 +0 +2 *$", output, re.MULTILINE)
    assert "2 clips failed and are left out; retry_failed=true tries them again:\n" in output
    assert re.search(r"^2 x reference: no face found in the picture", output, re.MULTILINE)
    assert "1 clips done, 0 to do, 2 failed before\n4 clips, 1 rejected; " in output
    _, output = avatar("plan", table, f"storage.root={tmp_path}", "retry_failed=true")
    assert re.search(r"^reference +2 +1 +1 +[\d.]+ s", output, re.MULTILINE)
    assert "1 clips done, 2 to do, 0 failed before\n" in output
    assert "left out" not in output


def test_plan_of_many_faults_stays_short(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    rows = [{"image": f"absent-{number}.png", "audio": "hello.wav"} for number in range(50)]
    _, output = avatar("plan", write_table(inputs / "absent.csv", rows), f"storage.root={tmp_path}")
    assert output.count("rejected absent-") == 40
    assert "... and 10 more rejected rows\n" in output
    assert "50 clips, 50 rejected" in output


def test_a_batch_file_of_ones_own(avatar: RunAvatar, rendered: Rendered, store: Path, tmp_path: Path) -> None:
    (tmp_path / "batch").mkdir()
    batch = tmp_path / "batch/mine.yaml"
    batch.write_text(f"table: {rendered.table}\nlimit: 3\nstorage: {{root: {store}}}\n")
    code, output = avatar("plan", "batch=mine", "--config-dir", tmp_path)
    assert code == 0
    assert "3 clips, 0 rejected" in output
    code, output = avatar("render", batch, "--limit", 1)
    assert code == 0
    assert "1 of 1 clips" in output


@pytest.mark.drill
def test_every_command_finds_files_of_ones_own(
    avatar: RunAvatar, rendered: Rendered, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage/mine.yaml").write_text(f"root: {store}\n")
    own = ("storage=mine", "--config-dir", tmp_path)
    for words in (("render", rendered.table), ("rerun", "batch"), ("verify", "batch")):
        code, output = avatar(*words, *own)
        assert code == 0, output
    assert "files checked, 0 damaged or missing" in output
    assert "batch" in avatar("status", *own)[1]
    assert avatar("gc", *own)[0] == 0
    assert str(store) in "".join(avatar("doctor", *own)[1].split())  # a long path is folded
    monkeypatch.setenv("AVATAR_CONFIG_DIR", str(tmp_path))
    assert "4 of 4 clips" in avatar("rerun", "batch", "storage=mine")[1]


@pytest.mark.drill
def test_a_pair_may_take_its_options_from_a_batch_file(
    avatar: RunAvatar, inputs: Path, rendered: Rendered, store: Path, tmp_path: Path
) -> None:
    batch = tmp_path / "settings.yml"
    batch.write_text(
        f"rows: [{{image: x.png, audio: x.wav}}]\nvideo: {{crf: 40}}\nstorage: {{root: {store}}}\n"
    )
    code, output = avatar("render", inputs / "portrait.jpg", inputs / "hello.wav", batch)
    assert code == 0, output
    assert f"1 of 1 clips in {store}/datasets/portrait-hello" in output
    assert (attempts(store, "decode")["status"] == "ok").sum() == 5


# --- rerun


@pytest.mark.drill
def test_rerun_of_a_stage(avatar: RunAvatar, rendered: Rendered, store: Path) -> None:
    code, output = avatar("rerun", "batch", "--stage", "denoise", f"storage.root={store}")
    assert code == 0
    assert "denoise: 4 to do" in output
    assert "reference: 0 to do" in output
    assert (attempts(store, "decode")["status"] == "ok").sum() == 8
    assert videos(store / "datasets/batch") == videos(rendered.result.dataset)
    code, output = avatar("rerun", "batch", "--stage", "denoize", f"storage.root={store}")
    assert code == 2
    assert "did you mean `denoise`?" in output


@pytest.mark.drill
def test_rerun_of_failed_rows(avatar: RunAvatar, inputs: Path, tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "late.png")
    content = picture.read_bytes()
    picture.write_bytes(content[:3000])
    rows = [{"image": str(picture), "audio": str(inputs / "hello.wav")}]
    root = f"storage.root={tmp_path / 'store'}"
    assert avatar("render", write_table(tmp_path / "late.csv", rows), root)[0] == 1
    picture.write_bytes(content)
    code, output = avatar("rerun", "late", "--failed", root)
    assert code == 0
    assert "1 of 1 clips" in output


def test_rerun_refuses_what_it_would_ignore(avatar: RunAvatar, rendered: Rendered, store: Path) -> None:
    """A recorded batch is run as it was; an option that changes results must not be dropped in silence."""
    code, output = avatar("rerun", "batch", "video.crf=40", f"storage.root={store}")
    assert code == 2
    assert "`video.crf=40` would change what was recorded" in output
    assert (attempts(store, "decode")["status"] == "ok").sum() == 4


# --- credentials


@pytest.mark.drill
def test_credentials_are_shown_and_recorded_nowhere(
    avatar: RunAvatar,
    inputs: Path,
    s3_root: str,
    s3_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {**s3_options, "secret": "hunter2-secret", "key": "hunter2-key"}
    table = write_table(inputs / "secret.csv", [{"image": "portrait.jpg", "audio": "hello.wav"}])
    words = [f"+storage.options.{name}='{value}'" for name, value in options.items()]
    words += [f"runtime.cache_dir={tmp_path / 'cache'}", f"storage.root={s3_root}"]
    code, output = avatar("render", table, *words)
    assert code == 0, output
    files = fsspec.filesystem("s3", **s3_options)
    files.invalidate_cache()
    stored = files.find(s3_root)
    assert any(path.endswith("config.yaml") for path in stored)
    assert all(b"hunter2" not in files.cat_file(path) for path in stored)
    outputs = [output, avatar("verify", "secret", *words)[1], avatar("rerun", "absent", *words)[1]]
    outputs.append(avatar("render", table, *words, "storage.root=s3://absent-bucket/a")[1])
    outputs.append(avatar("render", table, *words, "video.fsp=3")[1])
    assert [text.startswith("error: ") for text in outputs[1:]] == [False, True, True, True]
    assert all("hunter2" not in text for text in outputs)


def test_metadata_lists_what_the_command_printed(avatar: RunAvatar, rendered: Rendered, store: Path) -> None:
    _, output = avatar("render", rendered.table, f"storage.root={store}")
    metadata = pd.read_parquet(store / "datasets/batch/metadata.parquet")
    assert all(str(name) in output for name in metadata["file_name"])
