import json
import math
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avatar_core.errors import InputError
from avatar_core.media.table import TableRow, read_table, resolve_uri

HEADER = "videoid,image,audio,prompt,fps\n"
ROW = "1,a.png,a.wav,A woman talks.,25\n"


def read(tmp_path: Path, content: str | bytes, name: str = "batch.csv") -> list[TableRow]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_table(str(path)))


def read_cell(tmp_path: Path, column: str, value: str) -> TableRow:
    quoted = '"' + value.replace('"', '""') + '"'
    return read(tmp_path, f"image,audio,{column}\na.png,a.wav,{quoted}\n")[0]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_of_any_dialect_gives_the_same_row(tmp_path: Path, mark: str, end: str, delimiter: str) -> None:
    lines = [
        ["videoid", " Image ", "AUDIO", "prompt", "fps", "note"],
        ["7", "a.png", "a.wav", "Hi", "25.0", "x"],
    ]
    text = mark + "".join(delimiter.join(line) + end for line in lines)
    assert read(tmp_path, text) == [
        TableRow(
            0,
            image="a.png",
            audio="a.wav",
            name="7",
            prompt="Hi",
            fps=25.0,
            extra={"note": "x"},
            source={
                "videoid": "7",
                "Image": "a.png",
                "AUDIO": "a.wav",
                "prompt": "Hi",
                "fps": "25.0",
                "note": "x",
            },
        )
    ]


def test_quoted_newlines_and_delimiters_stay_in_the_value(tmp_path: Path) -> None:
    rows = read(
        tmp_path, 'image,audio,prompt\na.png,a.wav,"one, two;\nthree ""four"""\n\n,,\nb.png,b.wav,x\n'
    )
    assert [row.prompt for row in rows] == ['one, two;\nthree "four"', "x"]
    assert [row.index for row in rows] == [0, 1]


def test_header_with_a_comma_in_a_semicolon_table(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "image;audio;one, two, three, four\na,1.png;a.wav;x\n")
    assert (row.image, row.extra) == ("a,1.png", {"one, two, three, four": "x"})


def test_unnamed_columns_are_kept(tmp_path: Path) -> None:
    (row,) = read(tmp_path, ",image,audio,\n0,a.png,a.wav,z\n")
    assert row.error is None
    assert row.extra == {"column_1": "0", "column_4": "z"}


def test_parquet(tmp_path: Path) -> None:
    frame = {
        "id": [1.0, math.nan],
        "image": ["a.png", "b.png"],
        "audio": ["a.wav", None],
        "fps": [25.0, math.nan],
        "seed": [5.0, None],
        "bbox": [[[1, 2, 3, 4]], None],
        "params": [{"steps": 3, "size": None}, None],
        "tags": [["x"], []],
    }
    pq.write_table(pa.table(frame), tmp_path / "rows.bin")
    first, second = read_table(str(tmp_path / "rows.bin"))
    assert first.error is None
    assert (first.name, first.fps, first.seed) == ("1", 25.0, 5)
    assert (first.bbox, first.params, first.extra) == (((1.0, 2.0, 3.0, 4.0),), {"steps": 3}, {"tags": ["x"]})
    assert second.error == "column 'audio': is empty; give a path or URI"
    assert (second.name, second.fps, second.seed, second.bbox) == (None, None, None, None)


def test_json_lines_with_a_broken_line(tmp_path: Path) -> None:
    lines = [
        json.dumps(
            {"image": "a.png", "audio": "a.wav", "prompt": "one\u2028two", "seed": 2**63 - 1},
            ensure_ascii=False,
        ),
        '{"image": "b.png", "audio"',
        "[1]",
        '{"image": "c.png", "audio": "c.wav", "params": {"steps": 3}}',
    ]
    rows = read(tmp_path, "\r\n".join(lines), "rows.jsonl")
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert (rows[0].prompt, rows[0].seed, rows[3].params) == ("one\u2028two", 2**63 - 1, {"steps": 3})
    assert "the line is not JSON" in str(rows[1].error)
    assert "the row is a list" in str(rows[2].error)


def test_json_list_and_single_object(tmp_path: Path) -> None:
    row = {"image": "a.png", "audio": "a.wav"}
    assert [r.image for r in read(tmp_path, json.dumps([row, row]), "rows.txt")] == ["a.png", "a.png"]
    assert len(read(tmp_path, json.dumps(row, indent=2))) == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("fps", "fast", "column 'fps': 'fast' is not a number from 1 to 120"),
        ("fps", "29,97", "column 'fps': '29,97' is not a number from 1 to 120"),
        ("fps", "0", "is not a number from 1 to 120"),
        ("fps", "121", "is not a number from 1 to 120"),
        ("fps", "inf", "is not a number from 1 to 120"),
        ("seed", "-1", "column 'seed': '-1' is not a whole number from 0 to 9223372036854775807"),
        ("seed", "1.5", "is not a whole number"),
        ("seed", str(2**63), "is not a whole number"),
        ("seed", "9" * 5000, "is not a whole number"),
        ("seed", "1e999", "is not a whole number"),
        ("audio_type", "mix", "column 'audio_type': 'mix' is not allowed; allowed: para"),
        ("audio_type", "add", "'audio_2' is empty"),
        ("audio_2", "b.wav", "'audio_type' is empty; allowed: para, add"),
        ("video", "a.mp4", "columns 'image' and 'video' are both given; give one of them"),
        ("tts_text", "Hello.", "columns 'audio' and 'tts_text' are both given; give one of them"),
        ("voice", "af_heart", "column 'voice' is given but 'tts_text' is empty; give both or none"),
        ("voice_2", "am_adam", "column 'voice_2' is given but 'tts_text' is empty; give both or none"),
        (
            "voice",
            "Adam",
            "column 'voice': 'Adam' is not the name of a Kokoro voice; give one such as af_heart",
        ),
        ("bbox", "[1, 2, 3]", "column 'bbox': '[1, 2, 3]' is no list of boxes"),
        ("bbox", "[3, 2, 1, 4]", "is no list of boxes"),
        ("bbox", "[1, 2, NaN, 4]", "is not JSON"),
        ("bbox", "1 2 3 4", "is not JSON"),
        ("bbox", "{}", "is no list of boxes"),
        ("bbox", "[]", "is no list of boxes"),
        ("bbox", "[[1, 2, 3, 4], [1, 2, 3, 4]]", "2 boxes for 1 speakers"),
        ("params", "{steps: 3}", "column 'params': '{steps: 3}' is not JSON"),
        ("params", "[1]", "is not a JSON object"),
        ("params", "[" * 100_000, "is not JSON"),
    ],
)
def test_bad_cell_is_the_rows_error(tmp_path: Path, column: str, value: str, message: str) -> None:
    row = read_cell(tmp_path, column, value)
    assert message in str(row.error)
    assert len(str(row.error)) < 300
    assert row.image == "a.png"


@pytest.mark.parametrize("value", ["", " ", "nan", "NaN", "None", "null", "<NA>"])
@pytest.mark.parametrize("column", ["fps", "seed", "bbox", "params", "audio_2", "audio_type"])
def test_empty_values_are_absent(tmp_path: Path, column: str, value: str) -> None:
    row = read_cell(tmp_path, column, value)
    assert row.error is None
    assert not getattr(row, column)


def test_all_errors_of_a_row_are_told_at_once(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "image,audio,fps,seed\n,a.wav,x,y\n")
    assert [part.split(":")[0] for part in str(row.error).split("; column ")] == [
        "column 'image'",
        "'fps'",
        "'seed'",
    ]


@pytest.mark.parametrize(
    ("cells", "hint"), [("a.png,a.wav,hello, world", "4 values for 3"), ("a.png,a.wav", "2 values")]
)
def test_ragged_row(tmp_path: Path, cells: str, hint: str) -> None:
    bad, good = read(tmp_path, f"image,audio,prompt\n{cells}\nb.png,b.wav,x\n")
    assert hint in str(bad.error)
    assert good.error is None


@pytest.mark.parametrize(
    "row",
    [
        '{"image": {"bytes": "x"}, "audio": "a.wav"}',
        '{"image": "a\\u0000b", "audio": "a.wav"}',
        '{"image": 5, "audio": "a.wav"}',
    ],
)
def test_image_that_is_no_path(tmp_path: Path, row: str) -> None:
    assert "column 'image': " in str(read(tmp_path, row)[0].error)


def test_lone_surrogate_and_doubled_key_in_a_json_row(tmp_path: Path) -> None:
    lines = [
        '{"image": "a", "audio": "b"}',
        '{"image": "\\ud800", "audio": "b"}',
        '{"image": "a", "Image": "b", "audio": "c"}',
    ]
    good, half, doubled = read(tmp_path, "\n".join(lines))
    assert good.error is None
    assert "half a character" in str(half.error)
    assert "'image' more than once" in str(doubled.error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (HEADER, "has a header but no rows"),
        (HEADER + "\n,,,,\n", "has a header but no rows"),
        (("\ufeff" + HEADER + ROW).encode("utf-16"), "is UTF-16 text"),
        ((HEADER + ROW).encode("utf-16-le"), "NUL bytes"),
        (
            (HEADER + "1,a.png,a.wav,caf\u00e9,25").encode("latin-1"),
            "is not UTF-8 (byte 48, line 2); save it as UTF-8",
        ),
        (HEADER + "1,a\0.png,a.wav,x,25\n", "NUL bytes"),
        ("image,audio,Image \na,b,c\n", "the column 'image' more than once"),
        ("imgae,audio\na,b\n", "no column 'image'; its columns: imgae, audio; is 'imgae' meant?"),
        ("image,sound\na,b\n", "no column 'audio'; its columns: image, sound"),
        ("a.png|a.wav\n", "has a header but no rows"),
        (
            'image,audio\n"a.png,b.wav\nc,d\n',
            "line 2: a quote is opened and not closed (noticed in line 3: unexpected end of data); "
            "check the quotes of this line",
        ),
        ('image,audio\n"a"b.png,b.wav\n', "line 2: "),
        ("image,audio,prompt\na,b," + "x" * 10_000_000, "line 2: field larger than field limit"),
        (b"PK\x03\x04" + bytes(100), "a zip or Excel file"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (bytes(range(256)) * 10, "is not UTF-8"),
        (b"PAR1" + bytes(200), "broken Parquet"),
        ("{]", "neither JSON nor JSON Lines"),
        ('{"cond_image": "a.png",\n "cond_audio"', "neither JSON nor JSON Lines"),
        ("[" * 100_000, "nested too deeply"),
        ('{"picture": "a.png", "audio": "b"}', "no column 'image'; its columns: picture, audio"),
        ("[]", "no rows"),
        ("[1, 2]", "no rows"),
    ],
)
def test_bad_table(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"table {tmp_path}/batch.csv: ")
    assert "\n" not in str(caught.value)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"image": ["a"], "audio": ["b"]}).to_parquet(path)
    content = path.read_bytes()
    for size in (4, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="broken Parquet"):
            read_table(str(path))


def test_parquet_with_doubled_columns(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["image", "audio", "audio"]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="'audio' more than once"):
        read_table(str(tmp_path / "rows.parquet"))


def test_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv: no such file"):
        read_table(str(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="is a folder"):
        read_table(str(tmp_path))
    with pytest.raises(InputError, match="is no regular file"):
        read_table("/dev/zero")
    with pytest.raises(InputError, match="nosuch"):
        read_table("nosuch://bucket/rows.csv")
    (tmp_path / "big.csv").write_text(HEADER + ROW * 100)
    with pytest.raises(InputError, match="allowed are 100"):
        read_table(str(tmp_path / "big.csv"), max_bytes=100)


def test_table_from_a_uri(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/tables/rows.csv", (HEADER + ROW).encode())
    (tmp_path / "rows.csv").write_text(HEADER + ROW)
    assert list(read_table("memory://tables/rows.csv")) == list(read_table(f"file://{tmp_path}/rows.csv"))


@pytest.mark.parametrize(
    ("value", "table", "expected"),
    [
        ("a.png", "/data/rows.csv", "/data/a.png"),
        ("../a b.png", "/data/in/rows.csv", "/data/a b.png"),
        ("~/a.png", "/data/rows.csv", "/data/~/a.png"),
        ("/x/a.png", "s3://bucket/in/rows.csv", "/x/a.png"),
        ("s3://other/a.png", "/data/rows.csv", "s3://other/a.png"),
        ("concat:a|b", "/data/rows.csv", "concat:a|b"),
        ("a.png", "file:///data/rows.csv", "/data/a.png"),
        ("a.png", "s3://bucket/in/rows.csv", "s3://bucket/in/a.png"),
        ("../../../a.png", "s3://bucket/in/rows.csv", "s3://bucket/a.png"),
        ("take/1:2.wav", "/data/rows.csv", "/data/take/1:2.wav"),
    ],
)
def test_resolve_uri(value: str, table: str, expected: str) -> None:
    assert resolve_uri(value, table) == expected


def test_resolve_uri_of_a_relative_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("a.png", "in/rows.csv") == str(tmp_path / "in/a.png")


def read_rows(tmp_path: Path, header: str, *lines: str) -> list[TableRow]:
    return read(tmp_path, "\n".join([header, *lines]) + "\n")


def test_a_video_stands_in_for_the_picture(tmp_path: Path) -> None:
    (row,) = read_rows(tmp_path, "video,audio", "talk.mp4,a.wav")
    assert (row.error, row.image, row.video, row.audio) == (None, "", "talk.mp4", "a.wav")


def test_a_text_stands_in_for_the_recording(tmp_path: Path) -> None:
    one, two = read_rows(
        tmp_path,
        "image,tts_text,voice,voice_2",
        "a.png, Hello there. ,weights/Kokoro-82M/voices/af_heart.pt,",
        "a.png,(s1) Hello. (s2) Hi. (s1) Bye.,af_heart,am_adam",
    )
    assert (one.error, one.tts_text, one.voice, one.voice_2) == (None, "Hello there.", "af_heart", None)
    assert (two.error, two.voice, two.voice_2) == (None, "af_heart", "am_adam")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            "Hello.,,",
            "column 'voice': is empty; name the Kokoro voice that says 'tts_text', such as af_heart",
        ),
        (",,", "column 'audio': is empty; give a path or URI"),
        (
            "Hello.,af_heart,am_adam",
            "column 'tts_text': has no turns for two speakers; write (s1) ... (s2) ..., or leave "
            "`voice_2` empty",
        ),
        (
            "(s1) Hi. (s2) Ho.,af_heart,",
            "column 'tts_text': the tag (s1) marks turns of two speakers; name `voice_2` too, or take "
            "the tags out",
        ),
        (
            "Hello! (s1) Hi.,af_heart,am_adam",
            "column 'tts_text': nobody says 'Hello!' before the first tag; put (s1) or (s2) there",
        ),
        (
            "(s1) Hi. (s3) Ho.,af_heart,am_adam",
            "column 'tts_text': the tag (s3) names no speaker; allowed: (s1), (s2)",
        ),
        (
            "(s1) (s2) Ho.,af_heart,am_adam",
            "column 'tts_text': a turn of (s1) is empty; write what is said after its tag",
        ),
    ],
)
def test_a_text_that_cannot_be_spoken_as_it_stands(tmp_path: Path, cells: str, message: str) -> None:
    (row,) = read_rows(tmp_path, "image,tts_text,voice,voice_2", f"a.png,{cells}")
    assert row.error == message


def test_a_silent_speaker_is_as_long_as_the_other(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,audio,audio_2,audio_type\na.png,silence:,b.wav,para\n")
    (row,) = read_table(str(tmp_path / "rows.csv"), base=str(tmp_path / "rows.csv"))
    assert (row.error, row.audio, row.audio_2) == (None, f"silence:{tmp_path}/b.wav", f"{tmp_path}/b.wav")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("silence:,,", "column 'audio' is 'silence:', so a recording of another speaker is needed"),
        (
            "silence:,silence:,para",
            "column 'audio' is 'silence:', so a recording of another speaker is needed",
        ),
        (
            "silence:x.wav,b.wav,para",
            "'silence:x.wav' names a recording; write 'silence:' alone: it lasts as the other",
        ),
    ],
)
def test_somebody_must_speak(tmp_path: Path, cells: str, message: str) -> None:
    (row,) = read_rows(tmp_path, "image,audio,audio_2,audio_type", f"a.png,{cells}")
    assert row.error == message
