"""Where `avatar render -o` writes, and where it refuses to."""

import os
import pty
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatar_core.config import Config, parse
from avatar_core.errors import ConfigError
from avatar_core.pipeline import render
from flows.output import Destination
from tests.sample_rows import RunAvatar, videos, write_recording

pytestmark = pytest.mark.timeout(120)

SPLIT = "audio.max_duration_s=1"
NULL, FULL = os.makedev(1, 3), os.makedev(1, 7)

Render = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A picture and a recording long enough for two parts."""
    folder = tmp_path_factory.mktemp("files")
    return [
        Path(shutil.copy(inputs / "portrait.jpg", folder)),
        write_recording(folder / "hello.wav", 0.5, 1.2),
    ]


@pytest.fixture(scope="module")
def finished(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which two takes of the pair are finished, and two parts of one."""
    store = tmp_path_factory.mktemp("pair") / "store"
    rows = [dict(zip(("image", "audio"), map(str, files), strict=True))]
    settings: dict[str, Any] = {"rows": rows, "name": "portrait-hello", "storage": {"root": str(store)}}
    assert render({**settings, "audio": {"max_duration_s": 1}}).ok
    assert render({**settings, "takes": 2}).ok
    return store


@pytest.fixture
def pair(files: list[Path], finished: Path, tmp_path: Path) -> list[str]:
    """The words that render the finished pair, from files and a store that are this test's own."""
    store = shutil.copytree(finished, tmp_path / "store")
    shutil.rmtree(store / "datasets")  # made from other files, as far as their paths tell
    return [*(str(shutil.copy2(file, tmp_path)) for file in files), f"storage.root={store}"]


@pytest.fixture
def video(finished: Path) -> bytes:
    return videos(finished / "datasets/portrait-hello")["portrait-hello.mp4"]


@pytest.fixture
def to(avatar: RunAvatar, pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Render:
    """`to(PATH, ...)` renders the pair with `-o PATH` in a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda given, *words: avatar("render", *pair, "-o", given, *words)


def process(pair: list[str], *words: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.cli", "render", *pair, *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)


def make_device(path: Path, number: int) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, number)
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"devices cannot be made here: {error}")


# --- files and folders


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("out.mp4", "out.mp4"),
        ("OUT.MP4", "OUT.MP4"),
        ("out", "out"),
        ("a/b/out.mp4", "a/b/out.mp4"),
        ("folder", "folder/portrait-hello.mp4"),
        ("folder/", "folder/portrait-hello.mp4"),
        (".", "portrait-hello.mp4"),
        ("fresh/", "fresh/portrait-hello.mp4"),
        ("linked", "folder/portrait-hello.mp4"),
        ("~/out.mp4", "home/out.mp4"),
        ("é 声.mp4", "é 声.mp4"),
        ("./-", "-"),
    ],
)
def test_a_path_is_taken_as_the_user_means_it(
    to: Render, video: bytes, given: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("folder").mkdir()
    Path("home").mkdir()
    Path("linked").symlink_to("folder")
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    code, output = to(given)
    assert code == 0, output
    assert f"written to {Path(given).expanduser() if given[0] == '~' else written}".split("/")[-1] in output
    assert Path(written).read_bytes() == video
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert files == [Path(written)]


def test_a_file_url_is_a_path(to: Render, video: bytes) -> None:
    assert to(f"file://{Path('out.mp4').absolute()}")[0] == 0
    assert Path("out.mp4").read_bytes() == video


def test_links_are_followed(to: Render, video: bytes) -> None:
    Path("real").mkdir()
    Path("real/there.mp4").write_bytes(b"old")
    for name, target in (("link.mp4", "real/there.mp4"), ("dangling.mp4", "real/fresh.mp4")):
        Path(name).symlink_to(target)
        assert to(name)[0] == 0
        assert Path(name).is_symlink()
        assert Path(target).read_bytes() == video
        assert not Path(target).is_symlink()


def test_permissions_of_a_file_stay(to: Render, video: bytes) -> None:
    out = Path("out.mp4")
    out.write_bytes(b"old")
    out.chmod(0o640)
    assert to("out.mp4")[0] == 0
    assert out.read_bytes() == video
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


@pytest.mark.drill
def test_a_write_that_fails_leaves_what_was_there(
    files: list[Path],
    finished: Path,
    video: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No file may become as large as the video; those of the store are there already."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "store")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/out.mp4").write_bytes(b"old")
    limited = f'ulimit -f {len(video) // 1024 - 1}; exec {sys.executable} -m flows.cli render "$@"'
    words = [*map(str, files), f"storage.root={tmp_path / 'store'}", "-o", "out/out.mp4"]
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the video cannot be written to out/out.mp4: File too large")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"out.mp4": b"old"}


# --- what is refused, before any work


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "is no path"),
        ("out.webm", "the video is an MP4; give a name that ends in .mp4"),
        ("out.mp4.txt", "the video is an MP4"),
        ("table.csv", "the video is an MP4"),
        ("s3://bucket/out.mp4", "a copy goes to this machine only"),
        ("https://host/out.mp4", "a copy goes to this machine only"),
        ("read-only.mp4", "is not to be written, by its permissions"),
        ("file/out.mp4", "Not a directory"),
        ("file/", "file is no folder"),
        ("loop.mp4", "Too many levels of symbolic links"),
        ("socket", "is a socket"),
        (f"{'a' * 300}.mp4", "File name too long"),
        ("/proc/nowhere/out.mp4", "no file can be made there"),
        ("~nobody-of-that-name/out.mp4", "there is no such user"),
        ("../store/datasets/portrait-hello/videos/portrait-hello.mp4", "lies in the store"),
        ("in-store.mp4", "lies in the store"),
        ("../portrait.jpg", "is the input"),
        ("picture.mp4", "is the input"),
        ("recording.mp4", "is the input"),
    ],
)
def test_what_cannot_or_must_not_be_written_is_refused(
    to: Render, files: list[Path], tmp_path: Path, given: str, reason: str
) -> None:
    Path("file").write_text("")
    Path("read-only.mp4").write_text("kept")
    Path("read-only.mp4").chmod(0o444)
    Path("loop.mp4").symlink_to("loop.mp4")
    Path("picture.mp4").symlink_to(tmp_path / "portrait.jpg")
    Path("recording.mp4").hardlink_to(tmp_path / "hello.wav")
    Path("in-store.mp4").symlink_to(tmp_path / "store/stages/new.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    before = sorted(tmp_path.rglob("*"))
    code, output = to(given)
    assert reason in output
    assert f"-o {given}".rstrip("/") in output or not given
    assert code == 2
    assert output.count("\n") == 1, output
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "portrait.jpg").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "hello.wav").read_bytes() == files[1].read_bytes()
    assert Path("read-only.mp4").read_text() == "kept"


@pytest.mark.parametrize("column", ["table", "image", "video", "audio", "audio_2"])
def test_every_input_is_kept(tmp_path: Path, column: str) -> None:
    file = tmp_path / "input.mp4"
    file.write_bytes(b"kept")
    values = {"table": str(file)} if column == "table" else {"rows": [{column: f"file://{file}"}]}
    with pytest.raises(ConfigError, match=r"is the input .*input\.mp4, which would be lost"):
        Destination(str(file), parse(Config, {**values, "storage": {"root": str(tmp_path / "store")}}))


# --- several videos


def test_takes_and_parts_have_numbers(to: Render, finished: Path) -> None:
    takes = videos(finished / "datasets/portrait-hello")
    code, output = to("out.mp4", "--takes", 2)
    assert code == 0
    assert "written to out.mp4\nwritten to out-take2.mp4\n" in output
    assert Path("out.mp4").read_bytes() == takes["portrait-hello.mp4"]
    assert Path("out-take2.mp4").read_bytes() == takes["portrait-hello-take2.mp4"]
    code, output = to("folder/", "--takes", 2)
    assert code == 0
    assert videos_in("folder") == takes
    code, output = to("part", SPLIT)
    assert code == 0
    assert "written to part-part1\nwritten to part-part2\n" in output
    assert Path("part-part1").read_bytes() != Path("part-part2").read_bytes()
    assert not Path("part").exists()


def videos_in(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_a_numbered_path_must_not_be_an_input(to: Render, files: list[Path], tmp_path: Path) -> None:
    Path("out-take2.mp4").symlink_to(tmp_path / "hello.wav")
    code, output = to("out.mp4", "--takes", 2)
    assert code == 2
    assert "-o out-take2.mp4: is the input" in output
    assert not Path("out.mp4").exists()
    assert (tmp_path / "hello.wav").read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("words", [("--takes", 2), (SPLIT,)], ids=["takes", "parts"])
def test_several_videos_do_not_go_into_one_pipe(to: Render, words: tuple[object, ...]) -> None:
    os.mkfifo("pipe")
    for given in ("pipe", "-"):
        code, output = to(given, *words)
        assert code == 2
        assert f"-o {given}: only one video goes there, and this render makes 2" in output
        assert "decode" not in output
    assert sorted(Path().iterdir()) == [Path("pipe")]


# --- pipes, devices and standard output


def test_a_device_stays_a_device(to: Render) -> None:
    make_device(Path("null"), NULL)
    code, output = to("null")
    assert code == 0
    assert "written to null" in output
    assert stat.S_ISCHR(Path("null").stat().st_mode)
    assert list(Path().iterdir()) == [Path("null")]


def test_a_full_device_is_told_by_its_name(to: Render) -> None:
    make_device(Path("full"), FULL)
    code, output = to("full")
    assert code == 2
    assert "error: the video cannot be written to full: No space left on device" in output


def test_a_disk_is_refused(to: Render) -> None:
    try:
        os.mknod("disk", 0o666 | stat.S_IFBLK, os.makedev(259, 1023))
    except OSError as error:
        pytest.skip(f"devices cannot be made here: {error}")
    code, output = to("disk")
    assert code == 2
    assert "-o disk: is a disk" in output


def test_a_pipe_is_written_to(to: Render, video: bytes) -> None:
    os.mkfifo("pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_bytes()))
    reader.start()
    code, _ = to("pipe")
    reader.join(60)
    assert code == 0
    assert read == [video]
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


@pytest.mark.parametrize("given", ["-", "/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_gets_the_video_alone(pair: list[str], video: bytes, given: str) -> None:
    with process(pair, "-o", given, stdout=subprocess.PIPE) as running:
        output, errors = running.communicate()
    assert running.returncode == 0, errors
    assert output == video
    assert b"decode: 0 to do" in errors
    assert b"written to standard output\n" in errors


@pytest.mark.drill
def test_the_file_that_standard_output_goes_to(pair: list[str], video: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    with out.open("wb") as file, process(pair, "-o", str(out), stdout=file) as running:
        _, errors = running.communicate()
    assert running.returncode == 0, errors
    assert out.read_bytes() == video


@pytest.mark.drill
def test_a_terminal_gets_no_video(pair: list[str]) -> None:
    ours, theirs = pty.openpty()
    for given in ("-", os.ttyname(theirs)):
        with process(pair, "-o", given, stdout=theirs) as running:
            _, errors = running.communicate()
        assert running.returncode == 2
        assert b"is a terminal" in errors
    with process(pair, "-o", os.ttyname(theirs), stdout=subprocess.DEVNULL) as running:
        _, errors = running.communicate()
    assert running.returncode == 2
    assert b"is a terminal" in errors
    os.close(ours)
    os.close(theirs)


def test_a_closed_standard_output_gets_no_video(pair: list[str], tmp_path: Path) -> None:
    command = f'exec {sys.executable} -m flows.cli render "$@" -o - >&-'
    done = subprocess.run(["bash", "-c", command, "bash", *pair], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: -o -: standard output is closed; give a file or a folder\n"


@pytest.mark.drill
def test_a_reader_that_leaves_ends_quietly(pair: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with process(pair, "-o", "-", stdout=writing) as running:
        _, errors = running.communicate()
    os.close(writing)
    assert running.returncode == 141
    assert b"Traceback" not in errors
    assert b"error" not in errors
