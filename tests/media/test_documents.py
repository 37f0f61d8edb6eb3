"""MultiTalk's input documents as rows."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from avatar_core.media.table import TableRow, read_table

MAN, WOMAN = [0, 150, 1300, 1000], [220, 1180, 1300, 1720]
TWO_PEOPLE: dict[str, Any] = {
    "prompt": "Two people sing.",
    "cond_image": "two.png",
    "audio_type": "para",
    "cond_audio": {"person1": "man.wav", "person2": "woman.wav"},
    "bbox": {"person1": MAN, "person2": WOMAN},
}
ONE_PERSON: dict[str, Any] = {
    "prompt": "A man.",
    "cond_image": "one.png",
    "cond_audio": {"person1": "man.wav"},
}
SPOKEN: dict[str, Any] = {
    "cond_image": "two.png",
    "cond_audio": {},
    "tts_audio": {
        "text": "(s1) Hello. (s2) Hi.",
        "human1_voice": "voices/af_heart.pt",
        "human2_voice": "am_adam.pt",
    },
}


def read(tmp_path: Path, content: Any, **options: Any) -> list[TableRow]:
    path = tmp_path / "document.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return list(read_table(str(path), **options))


def test_two_people_with_boxes(tmp_path: Path) -> None:
    (row,) = read(tmp_path, TWO_PEOPLE)
    assert row.error is None
    assert (row.image, row.audio, row.audio_2, row.audio_type) == ("two.png", "man.wav", "woman.wav", "para")
    assert row.bbox == ((150, 0, 1000, 1300), (1180, 220, 1720, 1300))
    assert row.prompt == "Two people sing."
    assert row.source["bbox"] == {"person1": MAN, "person2": WOMAN}


def test_recordings_go_by_name_and_boxes_by_order(tmp_path: Path) -> None:
    (row,) = read(
        tmp_path,
        TWO_PEOPLE
        | {
            "cond_audio": {"person2": "woman.wav", "person1": "man.wav"},
            "bbox": {"person2": WOMAN, "a": MAN},
        },
    )
    assert (row.audio, row.audio_2) == ("man.wav", "woman.wav")
    assert row.bbox == ((1180, 220, 1720, 1300), (150, 0, 1000, 1300))


def test_one_person(tmp_path: Path) -> None:
    (row,) = read(tmp_path, ONE_PERSON | {"audio_type": "add", "bbox": {"person1": MAN}, "seed": 7})
    assert row.error is None
    assert (row.audio, row.audio_2, row.audio_type, row.seed) == ("man.wav", None, None, 7)
    assert row.bbox == ((150, 0, 1000, 1300),)


def test_paths_are_relative_to_the_document(tmp_path: Path) -> None:
    (row,) = read(tmp_path, TWO_PEOPLE, base=str(tmp_path / "document.json"))
    assert (row.image, row.audio_2) == (f"{tmp_path}/two.png", f"{tmp_path}/woman.wav")


@pytest.mark.parametrize(
    ("silent", "expected"),
    [("person1", ("silence:woman.wav", "woman.wav")), ("person2", ("man.wav", "silence:man.wav"))],
)
def test_none_is_a_silent_speaker(tmp_path: Path, silent: str, expected: tuple[str, str]) -> None:
    (row,) = read(tmp_path, TWO_PEOPLE | {"cond_audio": {**TWO_PEOPLE["cond_audio"], silent: "None"}})
    assert row.error is None
    assert (row.audio, row.audio_2) == expected


def test_a_text_for_two_voices(tmp_path: Path) -> None:
    (row,) = read(tmp_path, SPOKEN | {"audio_type": "para", "bbox": {"person1": MAN, "person2": WOMAN}})
    assert row.error is None
    assert (row.tts_text, row.voice, row.voice_2) == ("(s1) Hello. (s2) Hi.", "af_heart", "am_adam")
    assert (row.audio, row.audio_2, row.audio_type, len(row.bbox)) == ("", None, None, 2)


def test_a_text_for_one_voice(tmp_path: Path) -> None:
    (row,) = read(
        tmp_path, {"cond_image": "a.png", "tts_audio": {"text": "Hello.", "human1_voice": "af_heart.pt"}}
    )
    assert (row.error, row.tts_text, row.voice, row.voice_2) == (None, "Hello.", "af_heart", None)


@pytest.mark.parametrize("form", ["list", "lines", "csv", "parquet"])
def test_documents_make_a_table(tmp_path: Path, form: str) -> None:
    documents = [TWO_PEOPLE, {**ONE_PERSON, "name": "single"}]
    if form == "list":
        rows = read(tmp_path, documents)
    elif form == "lines":
        rows = read(tmp_path, "\n".join(map(json.dumps, documents)))
    elif form == "csv":
        cells = [
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in d.items()}
            for d in documents
        ]
        rows = read(tmp_path, pd.DataFrame(cells).to_csv(index=False))
    else:
        pd.DataFrame(documents).to_parquet(tmp_path / "documents.parquet")
        rows = list(read_table(str(tmp_path / "documents.parquet")))
    assert [row.error for row in rows] == [None, None]
    assert [(row.image, row.audio, row.audio_2) for row in rows] == [
        ("two.png", "man.wav", "woman.wav"),
        ("one.png", "man.wav", None),
    ]
    assert rows[0].bbox == ((150, 0, 1000, 1300), (1180, 220, 1720, 1300))
    assert rows[1].name == "single"


def test_documents_and_plain_rows_side_by_side(tmp_path: Path) -> None:
    rows = read(tmp_path, [{"image": "a.png", "audio": "a.wav"}, ONE_PERSON])
    assert [(row.image, row.audio) for row in rows] == [("a.png", "a.wav"), ("one.png", "man.wav")]


BOX = "[row_min, column_min, row_max, column_max] in pixels of the picture"
RECORDINGS = 'give one or two recordings: {"person1": "a.wav"} or {"person1": "a.wav", "person2": "b.wav"}'
OBJECT = 'is not a JSON object; allowed: {"person1": "a.wav"} or {"person1": "a.wav", "person2": "b.wav"}'
AUDIO_TYPES = "allowed: para (at once), add (one after the other)"
TEXT = {"text": "Hello.", "human1_voice": "af_heart.pt"}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": (
        {"cond_image": None},
        "key 'cond_image': is absent or empty; give the path or URI of a picture",
    ),
    "picture is a number": ({"cond_image": 5}, "key 'cond_image': 5 is not the path or URI of a picture"),
    "picture is silence": (
        {"cond_image": "None"},
        "key 'cond_image': 'None' is not the path or URI of a picture",
    ),
    "prompt is a number": ({"prompt": 5}, "key 'prompt': 5 is not a text"),
    "no recordings": ({"cond_audio": {}}, f"key 'cond_audio': {{}} is not allowed; {RECORDINGS}"),
    "no audio key": ({"cond_audio": None}, f"key 'cond_audio': {{}} is not allowed; {RECORDINGS}"),
    "a path for all": ({"cond_audio": "a.wav"}, f"key 'cond_audio': 'a.wav' {OBJECT}"),
    "a list": ({"cond_audio": ["a.wav"]}, f"key 'cond_audio': ['a.wav'] {OBJECT}"),
    "second person alone": (
        {"cond_audio": {"person2": "a.wav"}},
        f"key 'cond_audio': {{'person2': 'a.wav'}} is not allowed; {RECORDINGS}",
    ),
    "recording is a number": (
        {"cond_audio": {"person1": 1, "person2": "b.wav"}},
        "key 'cond_audio.person1': 1 is not the path or URI of a recording",
    ),
    "empty path": (
        {"cond_audio": {"person1": "a.wav", "person2": ""}},
        "key 'cond_audio.person2': is absent or empty; give the path or URI of a recording",
    ),
    "one silent person": (
        {"cond_audio": {"person1": "None"}, "bbox": None},
        "key 'cond_audio.person1': 'None' makes this speaker silent, so another one must speak; give a "
        "path or URI",
    ),
    "two silent people": (
        {"cond_audio": {"person1": "None", "person2": "None"}},
        "key 'cond_audio.person1': 'None' makes this speaker silent, so another one must speak; give a "
        "path or URI",
    ),
    "no audio type": (
        {"audio_type": None},
        f"key 'audio_type': is absent or empty, with two recordings; {AUDIO_TYPES}",
    ),
    "unknown audio type": ({"audio_type": "both"}, f"key 'audio_type': 'both' is not allowed; {AUDIO_TYPES}"),
    "boxes in a list": (
        {"bbox": [MAN, WOMAN]},
        "key 'bbox': [[0, 150, 1300, 1000], [220, 1180, 1300, 1720]] is not a JSON object; allowed: an "
        "object with "
        f"one {BOX} per speaker",
    ),
    "a box is absent": (
        {"bbox": {"person1": [0, 1, 2, 3]}},
        f"key 'bbox': {{'person1': [0, 1, 2, 3]}} holds 1; give one box for each of person1, person2: {BOX}",
    ),
    "a box of one number": (
        {"bbox": {"person1": MAN, "person2": [1]}},
        f"key 'bbox.person2': [1] is no box; give {BOX}",
    ),
    "a box of texts": (
        {"bbox": {"person1": list("abcd"), "person2": WOMAN}},
        f"key 'bbox.person1': ['a', 'b', 'c', 'd'] is no box; give {BOX}",
    ),
    "a box upside down": (
        {"bbox": {"person1": [9, 0, 3, 5], "person2": WOMAN}},
        f"key 'bbox.person1': [9, 0, 3, 5] is no box; give {BOX}",
    ),
    "recordings and a text": (
        {"tts_audio": TEXT},
        "key 'cond_audio': {'person1': 'man.wav', 'person2': 'woman.wav'} cannot be given beside "
        "'tts_audio'; "
        "allowed: {}",
    ),
    "our column too": (
        {"image": "a.png"},
        "key 'image': 'a.png' cannot be given beside 'cond_image'; write the row with our columns or with "
        "MultiTalk's keys",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_document_names_key_value_and_what_is_allowed(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    (row,) = read(tmp_path, {**TWO_PEOPLE, **changes, "name": "mine"})
    assert row.error == f"MultiTalk document: {message}"
    assert row.name == "mine"


WRONG_SPEECH: dict[str, tuple[Any, str]] = {
    "no text": (
        {"human1_voice": "af_heart.pt"},
        "MultiTalk document: key 'tts_audio.text': is absent or empty; give what is to be said",
    ),
    "no voice": (
        {"text": "Hello."},
        "MultiTalk document: key 'tts_audio.human1_voice': is absent or empty; name a voice such as "
        "af_heart.pt",
    ),
    "text is a number": (
        {**TEXT, "text": 5},
        "MultiTalk document: key 'tts_audio.text': 5 is not a text; give what is to be said",
    ),
    "third voice": (
        {**TEXT, "human3_voice": "a.pt"},
        "MultiTalk document: key 'tts_audio': unknown key 'human3_voice'; allowed: text, human1_voice, "
        "human2_voice",
    ),
    "a text alone": (
        "Hello.",
        "MultiTalk document: key 'tts_audio': 'Hello.' is not a JSON object; allowed: "
        '{"text": "...", "human1_voice": "af_heart.pt"}, with "human2_voice" for two speakers',
    ),
    "unknown voice": (
        {**TEXT, "human1_voice": "Adam.pt"},
        "column 'voice': 'Adam.pt' is not the name of a Kokoro voice; give one such as af_heart or "
        "am_adam, of a "
        "language whose letter is a (American), b (British), e, f, h, i or p",
    ),
}


@pytest.mark.parametrize("case", WRONG_SPEECH)
def test_wrong_speech_in_a_document(tmp_path: Path, case: str) -> None:
    speech, message = WRONG_SPEECH[case]
    (row,) = read(tmp_path, {"cond_image": "a.png", "cond_audio": {}, "tts_audio": speech})
    assert row.error == message


def test_a_wrong_document_spoils_no_other(tmp_path: Path) -> None:
    rows = read(tmp_path, [ONE_PERSON, {**ONE_PERSON, "cond_audio": []}])
    assert [row.error is None for row in rows] == [True, False]
