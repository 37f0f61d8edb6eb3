"""Tables as spreadsheets, editors and mistakes leave them: read as meant, or refused by name and line."""

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from avatar_core.errors import InputError
from avatar_core.media.table import TableRow, read_table
from tests.sample_rows import SAMPLES, write_picture

HEADER = "image,audio,prompt\n"
MEDIA = "to render one picture with one recording give both: PICTURE RECORDING"
SHEET = "save the sheet as CSV in UTF-8"


def read(folder: Path, content: str | bytes) -> list[TableRow]:
    (folder / "table").write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_table(str(folder / "table")))


def refusal(folder: Path, content: str | bytes) -> str:
    """Why it is refused, without the table's name."""
    with pytest.raises(InputError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"table {folder / 'table'}: ")


def lines(count: int) -> str:
    return "".join(f"{number}.png,{number}.wav,x\n" for number in range(count))


GOOD = {
    "sep": "sep=;\nimage;audio\na.png;b.wav\n",
    "sep_in_quotes": '"sep=;"\r\nimage;audio\r\na.png;b.wav\r\n',
    "sep_in_capitals": "SEP=\t\nimage\taudio\na.png\tb.wav\n",
    "sep_of_ones_own": "sep=^\nimage^audio\na.png^b.wav\n",
    "comments": "# made by hand; yesterday\n\n#, twice\nimage,audio\na.png,b.wav\n",
    "comment_below_sep": "sep=;\n# made by hand\nimage;audio\na.png;b.wav\n",
    "comments_with_columns": "# image = path, audio = path\nimage;audio\na.png;b.wav\n",
    "blank_lines": "\n  \nimage,audio\n\n,\na.png,b.wav\n\n",
    "surplus_delimiters": "image,audio\na.png,b.wav,, \n",
    "hard_blanks": "\xa0image,audio\u200b\na.png,b.wav\n",
    "two_marks": "\ufeff\ufeffimage,audio\na.png,b.wav\n",
    "mixed_ends": "image,audio\r\n\ra.png,b.wav\n",
}


@pytest.mark.parametrize("case", GOOD)
def test_what_spreadsheets_write_is_read(tmp_path: Path, case: str) -> None:
    (row,) = read(tmp_path, GOOD[case])
    assert (row.image, row.audio, row.error) == ("a.png", "b.wav", None)
    assert row.source == {"image": "a.png", "audio": "b.wav"}


def test_a_column_may_be_called_by_a_number_sign(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "#,image,audio\n# 1,a.png,b.wav\n")
    assert row.source == {"#": "# 1", "image": "a.png", "audio": "b.wav"}


def test_a_commented_header_is_told_apart_from_a_comment(tmp_path: Path) -> None:
    message = "has no column 'image'; its columns: # image, audio; is '# image' meant? then rename it"
    assert refusal(tmp_path, "# image,audio\na.png,b.wav\n") == message


def test_long_values_are_read(tmp_path: Path) -> None:
    first, second = read(tmp_path, f"{HEADER}a.png,b.wav,{'x' * 300_000}\nc.png,d.wav,y\n")
    assert (len(first.prompt), second.prompt) == (300_000, "y")


@pytest.mark.parametrize(
    ("content", "line", "noticed"),
    [
        (HEADER + lines(3) + '"a.png,b.wav,x\n' + lines(3500) + 'z.png,z.wav,"y"\n', 5, 3506),
        (HEADER + lines(3) + 'a.png,b.wav,"x\n' + lines(3500), 5, 3505),
        (HEADER + 'a.png,a.wav,"two\nlines"\nb.png,b.wav,"open\n' + lines(2), 4, 6),
        (HEADER + '"two\nlines",b.wav,"open\n' + lines(2), 3, 5),
        (HEADER.replace("\n", "\r") + 'a.png,b.wav,"x\r' + lines(2).replace("\n", "\r"), 2, 4),
        ("# a comment\n" + HEADER + 'a.png,b.wav,"x\n' + lines(2), 3, 5),
        ("sep=;\nimage;audio\n" + '"a;b\n' + "c;d\n", 3, 4),
        (HEADER + '\na.png,b.wav,"say ""hi""\n' + lines(1), 3, 4),
    ],
)
def test_an_open_quote_is_named_by_its_line(tmp_path: Path, content: str, line: int, noticed: int) -> None:
    message = refusal(tmp_path, content)
    assert message.startswith(f"line {line}: a quote is opened and not closed (noticed in line {noticed}: ")
    assert message.endswith("; check the quotes of this line")


def test_a_quote_that_swallowed_rows_fails_its_row(tmp_path: Path) -> None:
    stray = '"b.wav,x\nc.png,d.wav"'
    (row,) = read(tmp_path, f"{HEADER}a.png,{stray},x\n")
    assert "column 'audio'" in str(row.error)
    assert "is a quote left open in the table?" in str(row.error)
    _, row = read(tmp_path, f'{HEADER}{lines(1)}a.png,"b.wav,x\nc.png,d.wav,x"\n')
    assert str(row.error).startswith(
        "lines 3 to 4: the row has 2 values for 3 columns; a value is missing, or a quote is left open; "
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + 'a.png,b.wav,"a" b\n', "line 2: ',' expected after '\"'; check the quotes of this line"),
        (
            HEADER + lines(2) + "a.png,b.wav," + "x" * 5_000_000 + "\n",
            "line 4: field larger than field limit",
        ),
        ("# one\n# two\n", "has no header: name the columns in a line above the rows"),
        ("a.png,b.wav\nc.png,d.wav\n", "its columns: a.png, b.wav; name the columns in the first line"),
        (",".join(f"c{n}" for n in range(30)) + "\n" + ",".join("1" * 30), "c19 and 10 more; name the"),
        ("<?xml version='1.0'?><rows/>", "is XML; a table is CSV, JSON Lines or JSON in UTF-8, or Parquet;"),
        ("<!doctype html><p>Log in", "is an HTML page; a table is CSV"),
        ('[{"image": "a", "audio": "b"},]', "neither JSON nor JSON Lines (a comma too many: column "),
        ('[\n{"image": "a", "audio": "b"},\n{"image": "a", "audio": "b"}\n,]', "(a comma too many: line "),
        ('{"image": "a", "audio": "b",}', "(a comma too many: column "),
        ('[\n{"image": "a" "audio": "b"}\n]', "(Expecting ',' delimiter: line 2, column 15)"),
    ],
)
def test_a_text_that_is_no_table_says_why(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(tmp_path, content)


def test_a_broken_line_of_json_is_named(tmp_path: Path) -> None:
    good = '{"image": "a.png", "audio": "a.wav"}'
    rows = read(tmp_path, f'{good}\n\n{{"image": "b.png"\n[1]\n{good}\n')
    assert [row.error for row in rows] == [
        None,
        "line 3: the line is not JSON (Expecting ',' delimiter: column 18); mend it",
        "line 4: the row is a list; give a JSON object with image and audio",
        None,
    ]


@pytest.mark.parametrize("cells", ["a.png,b.wav,c, d", "a.png,b.wav"])
def test_a_ragged_row_is_named_by_its_line(tmp_path: Path, cells: str) -> None:
    _, bad = read(tmp_path, f"{HEADER}\n{lines(1)}{cells}\n")
    assert str(bad.error).startswith("line 4: the row has ")


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return content.getvalue()


def film() -> bytes:
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode(None))
    return content.getvalue()


def picture(folder: Path, name: str) -> bytes:
    return write_picture(folder / name).read_bytes()


UNREADABLE = {
    "film": (film, "is a video (MP4)", MEDIA),
    "wav": ((SAMPLES / "hello.wav").read_bytes, "is a recording (WAV)", MEDIA),
    "flac": ((SAMPLES / "voice.flac").read_bytes, "is a recording (FLAC)", MEDIA),
    "jpeg": ((SAMPLES / "portrait.jpg").read_bytes, "is a picture (JPEG)", MEDIA),
    "xlsx": (
        lambda: zipped("[Content_Types].xml", "xl/workbook.xml"),
        "is an Excel workbook (XLSX)",
        SHEET,
    ),
    "ods": (lambda: zipped("mimetype", "content.xml"), "is an OpenDocument file (ODS)", SHEET),
    "numbers": (lambda: zipped("Index/Document.iwa"), "is an Apple document (Numbers)", SHEET),
    "xls": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504), "is an old Excel file (XLS)", SHEET),
    "zip": (lambda: zipped("table.csv"), "is a zip or Excel file", f"unpack it first, or {SHEET}"),
    "gzip": (lambda: gzip.compress(HEADER.encode()), "is a gzip file", "unpack it first"),
    "bzip2": (lambda: bz2.compress(HEADER.encode()), "is a bzip2 file", "unpack it first"),
    "xz": (lambda: lzma.compress(HEADER.encode()), "is an xz file", "unpack it first"),
    "utf16": (lambda: HEADER.encode("utf-16"), "is UTF-16 text", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    "utf32": (lambda: HEADER.encode("utf-32"), "is UTF-32 text", "save it as UTF-8 (in Excel: CSV UTF-8)"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_is_no_table_is_called_what_it_is(tmp_path: Path, case: str) -> None:
    make, name, remedy = UNREADABLE[case]
    formats = "a table is CSV, JSON Lines or JSON in UTF-8, or Parquet"
    assert refusal(tmp_path, make()) == f"{name}; {formats}; {remedy}"


def test_a_png_is_no_table(tmp_path: Path) -> None:
    assert refusal(tmp_path, picture(tmp_path, "a.png")).startswith("is a picture (PNG); ")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman"])
def test_text_in_another_encoding_is_named_by_its_line(tmp_path: Path, encoding: str) -> None:
    # "BM" begins a BMP picture, and this header
    content = ("BMI,image,audio\r\n" + "1,a.png,b.wav\r\n" * 3 + "2,müller.png,b.wav\r\n").encode(encoding)
    message = "is not UTF-8 (byte 65, line 5); save it as UTF-8 (in Excel: CSV UTF-8)"
    assert refusal(tmp_path, content) == message


def test_nul_bytes_are_named_by_their_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, HEADER + lines(2) + "a\0.png,b.wav,x\n")
    assert message.startswith("holds NUL bytes (line 4), so it is binary or UTF-16; ")
