"""What a table may name: bad inputs fail as rows with their reason, unusual good ones render."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.sample_rows import (
    RunAvatar,
    read_video,
    write_landscape,
    write_picture,
    write_recording,
    write_table,
    write_wav,
)

pytestmark = pytest.mark.timeout(60)

Cells = Mapping[str, Any]
MakeRow = Callable[[Path], Cells]


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good rows are the same in every test here, so they are rendered once."""
    return tmp_path_factory.mktemp("inputs_store")


def expect_rejected(
    avatar: RunAvatar, table: Path, store: Path, name: str, fragment: str, *options: str
) -> None:
    """The row `bad` of the table fails with `fragment`, the row `good` is rendered."""
    code, output = avatar("render", table, f"storage.root={store}", f"name={name}", *options)
    metadata = pd.read_parquet(store / "datasets" / name / "metadata.parquet").set_index("name")
    assert code == 1
    assert "Traceback" not in output
    assert metadata.loc["good", "status"] == "ok"
    assert len(read_video(store / "datasets" / name / "videos/good.mp4")) == 15
    assert metadata.loc["bad", "status"] == "failed"
    error = str(metadata.loc["bad", "error"])
    assert fragment in error
    assert "\n" not in error
    assert metadata.loc["bad", "error_type"] == "InputError"


def good_and_bad(inputs: Path, cells: Cells) -> list[dict[str, Any]]:
    good = {"image": str(inputs / "portrait.jpg"), "audio": str(inputs / "hello.wav"), "seed": 1}
    return [{"name": "good", **good}, {"name": "bad", **good, **cells}]


# --- cells

CELLS: dict[str, tuple[Cells, str]] = {
    "fps_text": ({"fps": "fast"}, "column 'fps': 'fast' is not a number from 1 to 120"),
    "fps_zero": ({"fps": 0}, "column 'fps': '0' is not a number from 1 to 120"),
    "fps_high": ({"fps": 1000}, "is not a number from 1 to 120"),
    "seed_negative": ({"seed": -1}, "column 'seed': '-1' is not a whole number"),
    "seed_fraction": ({"seed": 1.5}, "column 'seed': '1.5' is not a whole number"),
    "bbox_short": ({"bbox": "[1, 2, 3]"}, "column 'bbox': '[1, 2, 3]' is no list of boxes"),
    "bbox_inside_out": ({"bbox": "[90, 90, 10, 10]"}, "is no list of boxes"),
    "bbox_no_json": ({"bbox": "left"}, "column 'bbox': 'left' is not JSON"),
    "bbox_count": ({"bbox": "[[0, 0, 9, 9], [9, 9, 20, 20]]"}, "2 boxes for 1 speakers"),
    "bbox_elsewhere": ({"bbox": "[0, 150, 5, 158]"}, "no face in box 1"),
    "params_list": ({"params": "[1]"}, "column 'params': '[1]' is not a JSON object"),
    "params_no_json": ({"params": "{"}, "column 'params': '{' is not JSON"),
    "params_unknown": (
        {"params": '{"mouth_gian": 1}'},
        "unknown option `mouth_gian` for backend preview; a row may set: blinks, head_motion, mouth_gain; "
        "did you mean `mouth_gain`?",
    ),
    "params_range": ({"params": '{"mouth_gain": 9}'}, "give a number from 0 to 1.5 (got 9)"),
    "params_kind": ({"params": '{"mouth_gain": "loud"}'}, "give a number from 0 to 1.5 (got 'loud')"),
    "params_not_for_rows": ({"params": '{"landmarks": "mesh"}'}, "unknown option `landmarks`"),
    "audio_type_unknown": ({"audio_type": "both"}, "allowed: para (at once), add (one after the other)"),
    "audio_type_alone": ({"audio_type": "add"}, "'audio_2' is empty"),
    "audio_type_absent": ({"audio_2": "b.wav"}, "'audio_type' is empty; allowed: para, add"),
    "image_empty": ({"image": ""}, "column 'image': is empty"),
    "audio_empty": ({"audio": " "}, "column 'audio': is empty"),
    "url": ({"image": "http://localhost:1/a.png"}, "network sources are off (http)"),
    "url_of_sound": ({"audio": "https://localhost:1/a.wav"}, "set input.allow_network=true"),
    "concat": ({"audio": "concat:a.wav|b.wav"}, "the scheme 'concat:' is not allowed"),
    "subfile": ({"audio": "subfile,,start,0,end,9,,:/etc/hosts"}, "the scheme 'subfile:' is not allowed"),
    "chained": ({"image": "zip::/etc/hosts"}, "chained URIs ('::') are not allowed"),
    "missing_picture": ({"image": "absent.png"}, "absent.png: no such file"),
    "missing_recording": ({"audio": "absent.wav"}, "absent.wav: no such file"),
    "long_path": ({"image": "a" * 5000}, "characters, allowed are 4096"),
    "long_name": ({"image": "a" * 300 + ".png"}, "aaa.png: "),
    "device": ({"image": "/dev/zero"}, "is a device; give a regular file"),
    "device_as_recording": ({"audio": "/dev/zero"}, "is a device; give a regular file"),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_bad_cell_fails_its_row(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path, case: str
) -> None:
    cells, fragment = CELLS[case]
    table = write_table(tmp_path / "table.csv", good_and_bad(inputs, cells))
    expect_rejected(avatar, table, shared_store, case, fragment)


# --- files


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds a few bytes of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def half(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def gif(folder: Path) -> Path:
    Image.new("P", (64, 64)).save(folder / "a.png", format="GIF")
    return folder / "a.png"


def plain(name: str, size: tuple[int, int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Image.new("RGB", size, "teal").save(folder / name)
        return folder / name

    return make


def bomb(folder: Path) -> Path:
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    return folder / "bomb.png"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def empty(folder: Path) -> Path:
    (folder / "empty.png").touch()
    return folder / "empty.png"


PICTURES: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    "text_as_picture": (text("a.png", "Not a picture at all."), "is a text; allowed: PNG, JPEG, WebP", ()),
    "page_as_picture": (text("a.jpg", "<!doctype html><p>404"), "is an HTML page; allowed: PNG", ()),
    "svg": (text("a.png", "<svg xmlns='http://www.w3.org/2000/svg'/>"), "is in the format SVG", ()),
    "gif": (gif, "is in the format GIF; allowed: PNG", ()),
    "cut_png": (lambda folder: half(write_picture(folder / "a.png")), "is a broken PNG picture", ()),
    "cut_jpeg": (lambda folder: half(write_picture(folder / "a.jpg")), "is a broken JPEG picture", ()),
    "bomb": (bomb, "pixels", ()),
    "one_pixel": (plain("a.png", (1, 1)), "has 1x1 pixels, each side needs 32 or more", ()),
    "thin": (plain("a.png", (200, 8)), "has 200x8 pixels, each side needs 32 or more", ()),
    "too_large": (
        plain("a.png", (300, 200)),
        "has 300x200 pixels, allowed are 40000 in all",
        ("input.max_pixels=40000",),
    ),
    "too_many_bytes": (
        lambda folder: write_picture(folder / "a.png", side=400),
        "allowed are 60000; raise input.max_bytes",
        ("input.max_bytes=60000",),
    ),
    "pipe": (pipe, "is a pipe; give a regular file", ()),
    "folder_as_picture": (lambda folder: folder, "is a folder; give a regular file", ()),
    "empty_picture": (empty, "is empty (0 bytes)", ()),
    "recording_as_picture": (lambda folder: write_recording(folder / "a.png"), "is in the format WAV", ()),
    "nobody": (lambda folder: write_landscape(folder / "a.png"), "no face found in the picture", ()),
}


@pytest.mark.drill
@pytest.mark.parametrize("case", PICTURES)
def test_a_bad_picture_fails_its_row(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path, case: str
) -> None:
    make, fragment, options = PICTURES[case]
    rows = good_and_bad(inputs, {"image": str(make(tmp_path))})
    expect_rejected(avatar, write_table(tmp_path / "table.csv", rows), shared_store, case, fragment, *options)


def zeros(name: str, count: int) -> Callable[[Path], Path]:
    return lambda folder: write_wav(folder / name, np.zeros(count, np.int16), 16_000)


def silent_film(folder: Path) -> Path:
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode(None))
    return folder / "film.mp4"


RECORDINGS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "silence": (zeros("a.wav", 9600), "is silent: -inf dBFS, quieter than audio.silence_db=-60"),
    "no_samples": (zeros("a.wav", 0), "holds no samples"),
    "too_short": (zeros("a.wav", 1600), "lasts 0.100 s, allowed are 0.2 s or more"),
    "playlist": (text("a.wav", "#EXTM3U\n#EXTINF:1,\nfile:///etc/hosts\n"), "is a playlist"),
    "concat_list": (text("a.wav", "ffconcat version 1.0\nfile b.wav\n"), "is a playlist"),
    "cut_wav": (
        lambda folder: half(write_recording(folder / "a.wav")),
        "header says 0.60 s",
    ),
    "picture_as_recording": (lambda folder: write_picture(folder / "a.wav", format="PNG"), "format PNG"),
    "silent_film": (silent_film, "has no sound"),
    "text_as_recording": (text("a.mp3", "Not a sound at all."), "is a text; allowed: WAV"),
    "folder_as_recording": (lambda folder: folder, "is a folder; give a regular file"),
}


@pytest.mark.parametrize("case", RECORDINGS)
def test_a_bad_recording_fails_its_row(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path, case: str
) -> None:
    make, fragment = RECORDINGS[case]
    rows = good_and_bad(inputs, {"audio": str(make(tmp_path))})
    expect_rejected(avatar, write_table(tmp_path / "table.csv", rows), shared_store, case, fragment)


def test_two_speakers_need_two_faces(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path
) -> None:
    cells = {"audio_2": str(inputs / "again.wav"), "audio_type": "para"}
    table = write_table(tmp_path / "table.csv", good_and_bad(inputs, cells))
    expect_rejected(avatar, table, shared_store, "one_face", "found 1 of the 2 faces needed")


def test_a_face_that_is_too_small_is_measured_by_the_option(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path
) -> None:
    rows = good_and_bad(inputs, {"image": str(write_picture(tmp_path / "small.jpg"))})
    rows[0]["image"] = str(write_picture(tmp_path / "large.jpg", "closeup", side=400))
    table = write_table(tmp_path / "table.csv", rows)
    fragment = "at least 60 pixels"
    expect_rejected(avatar, table, shared_store, "small_face", fragment, "face.min_face=60")


@pytest.mark.parametrize("way", ["dots", "link", "absolute"])
def test_nothing_outside_the_allowed_roots_is_read(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path, way: str
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = write_picture(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(outside)
    image = {"dots": "../outside.png", "link": "link.png", "absolute": str(outside)}[way]
    table = write_table(inside / "table.csv", good_and_bad(inputs, {"image": image}))
    roots = f"input.allowed_roots=[{inside},{inputs}]"
    expect_rejected(avatar, table, shared_store, f"root_{way}", "lies outside the allowed folders", roots)


@pytest.mark.parametrize(
    ("case", "bad", "fragment"),
    [
        ("nul", {"image": "a\0.png", "audio": "a.wav"}, "is not a path or URI"),
        ("number", {"image": 7, "audio": "a.wav"}, "column 'image': 7 is not a path or URI"),
        ("absent_column", {"image": "a.png"}, "column 'audio': is empty"),
    ],
)
def test_a_bad_line_of_json_fails_its_row(
    avatar: RunAvatar,
    inputs: Path,
    shared_store: Path,
    tmp_path: Path,
    case: str,
    bad: Cells,
    fragment: str,
) -> None:
    good = good_and_bad(inputs, {})[0]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in (good, {"name": "bad", **bad})))
    expect_rejected(avatar, table, shared_store, f"line_{case}", fragment)


def test_a_csv_row_with_too_many_values_fails_alone(
    avatar: RunAvatar, inputs: Path, shared_store: Path, tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    good = f"good,{inputs}/portrait.jpg,{inputs}/hello.wav,1"
    table.write_text(f"name,image,audio,seed\n{good}\nbad,a.png,a.wav,1,Hello, you\n")
    expect_rejected(avatar, table, shared_store, "too_many_values", "the row has 6 values for 4 columns")


# --- tables that cannot be read at all


def parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


TABLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "header_only": (b"image,audio\n", "has a header but no rows"),
    "no_audio": (b"image,sound\na.png,a.wav\n", "has no column 'audio'; its columns: image, sound"),
    "misspelt": (b"image,audoi\na.png,a.wav\n", "is 'audoi' meant?"),
    "doubled": (b"image,audio,Image\na,b,c\n", "has the column 'image' more than once"),
    "excel": (b"PK\x03\x04" + bytes(99), "is a zip or Excel file"),
    "utf16": ("image,audio\na,b\n".encode("utf-16"), "is UTF-16 text"),
    "latin1": ("image,audio\nmüller.png,a.wav\n".encode("latin-1"), "is not UTF-8 (byte 13, line 2)"),
    "picture": (png_header(64, 64), "is a picture"),
    "open_quote": (b'image,audio\n"a.png,a.wav\n', "check the quotes"),
    "cut_parquet": (parquet(pd.DataFrame({"image": ["a"], "audio": ["b"]}))[:-40], "broken Parquet file"),
    "parquet_without_audio": (parquet(pd.DataFrame({"image": ["a"]})), "has no column 'audio'"),
    "json_number": (b"[1, 2]", "holds no rows"),
    "broken_json": (b'{"image": "a.png", ', "is neither JSON nor JSON Lines"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(
    avatar: RunAvatar, tmp_path: Path, case: str
) -> None:
    content, fragment = TABLES[case]
    (tmp_path / "table.csv").write_bytes(content)
    code, output = avatar("render", tmp_path / "table.csv", f"storage.root={tmp_path / 'store'}")
    assert code == 2
    assert output.startswith(f"error: table {tmp_path / 'table.csv'}: ")
    assert output.count("\n") == 1
    assert fragment in output
