"""MultiTalk's input documents: JSON objects such as

    {"prompt": "...", "cond_image": "two.png", "audio_type": "para",
     "cond_audio": {"person1": "man.wav", "person2": "woman.wav"},
     "bbox": {"person1": [0, 150, 1300, 1000], "person2": [220, 1180, 1300, 1720]}}

with `tts_audio` in place of recordings where a text is to be spoken. One document is one row of a table.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from avatar_core.errors import InputError, shown
from avatar_core.media.cells import plain

SILENCE = "silence:"
"""In place of a recording: this speaker is silent, for as long as the other's recording lasts."""

_MARKS = ("cond_image", "cond_audio", "tts_audio")
KEYS = (*_MARKS, "audio_type", "bbox")
_COLUMNS = ("image", "audio", "audio_2", "tts_text", "voice", "voice_2")
_PEOPLE = ("person1", "person2")
_AUDIO_TYPES = "allowed: para (at once), add (one after the other)"
_BOX = "[row_min, column_min, row_max, column_max] in pixels of the picture"


def is_document(values: Mapping[str, Any]) -> bool:
    return any(_is_given(values.get(key)) for key in _MARKS)


def columns_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a table that say the same; other keys stay. Objects may also be JSON texts, as in the
    cells of a CSV. Raises `InputError`."""
    values = {key: value for key, value in document.items() if not (key in _COLUMNS and not _is_given(value))}
    if doubled := [key for key in _COLUMNS if key in values]:
        raise InputError(
            f"key {doubled[0]!r}: {shown(values[doubled[0]])} cannot be given beside {_mark(values)!r}; "
            "write the row with our columns or with MultiTalk's keys"
        )
    prompt = values.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"key 'prompt': {shown(prompt)} is not a text")
    values["image"] = _path(values.pop("cond_image", None), "cond_image", "a picture")
    speech, recordings = _object(values, "tts_audio"), _object(values, "cond_audio")
    audio_type, boxes = values.pop("audio_type", None), _object(values, "bbox")
    if speech:
        if recordings:
            raise InputError(
                f"key 'cond_audio': {shown(recordings)} cannot be given beside 'tts_audio'; allowed: {{}}"
            )
        values |= _speech(speech)
        speakers = 2 if "voice_2" in values else 1
    else:
        values |= _recordings(recordings)
        speakers = len(recordings)
        if speakers == 2:
            values["audio_type"] = _audio_type(audio_type)
    if boxes:
        values["bbox"] = _boxes(boxes, _PEOPLE[:speakers])
    return values


def other_columns(document: Mapping[str, Any]) -> dict[str, Any]:
    """What remains of a document that is wrong: its name and the like."""
    return {key: value for key, value in document.items() if key not in (*KEYS, *_COLUMNS)}


def _mark(values: Mapping[str, Any]) -> str:
    return next(key for key in _MARKS if _is_given(values.get(key)))


def _is_given(value: Any) -> bool:
    """NaN is what a data frame has in an empty cell."""
    if isinstance(value, float) and math.isnan(value):
        return False
    return value is not None and not (isinstance(value, str) and not value.strip())


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Takes the key out; empty if it is absent. Entries that are null do not count: a Parquet struct has all
    of them in every row."""
    value = values.pop(key, None)
    if not _is_given(value):
        return {}
    found = value
    if isinstance(value, str):
        try:
            found = plain(json.loads(value))
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping):
        raise InputError(f"key {key!r}: {shown(value)} is not a JSON object; allowed: {_FORMS[key]}")
    return {name: part for name, part in found.items() if part is not None}


_FORMS = {
    "cond_audio": '{"person1": "a.wav"} or {"person1": "a.wav", "person2": "b.wav"}',
    "tts_audio": '{"text": "...", "human1_voice": "af_heart.pt"}, with "human2_voice" for two speakers',
    "bbox": f"an object with one {_BOX} per speaker",
}


def _path(value: Any, key: str, what: str) -> str:
    if not _is_given(value):
        raise InputError(f"key {key!r}: is absent or empty; give the path or URI of {what}")
    if not isinstance(value, str) or "\0" in value or value.strip() == "None":
        raise InputError(f"key {key!r}: {shown(value)} is not the path or URI of {what}")
    return value.strip()


def _recordings(recordings: Mapping[str, Any]) -> dict[str, str]:
    """By name, as the reference takes them."""
    people = _PEOPLE[: max(1, len(recordings))]
    if set(recordings) != set(people):
        raise InputError(
            f"key 'cond_audio': {shown(dict(recordings))} is not allowed; give one or two recordings: "
            f"{_FORMS['cond_audio']}"
        )
    silent = [person for person in people if _is_silence(recordings[person])]
    if len(silent) == len(people):
        raise InputError(
            f"key 'cond_audio.{silent[0]}': 'None' makes this speaker silent, so another one must speak; "
            "give a path or URI"
        )
    paths = [
        SILENCE if person in silent else _path(recordings[person], f"cond_audio.{person}", "a recording")
        for person in people
    ]
    return dict(zip(("audio", "audio_2"), paths, strict=False))


def _is_silence(value: Any) -> bool:
    return isinstance(value, str) and value.strip() == "None"


def _audio_type(value: Any) -> str:
    if not _is_given(value):
        raise InputError(f"key 'audio_type': is absent or empty, with two recordings; {_AUDIO_TYPES}")
    if not isinstance(value, str) or value.strip() not in ("para", "add"):
        raise InputError(f"key 'audio_type': {shown(value)} is not allowed; {_AUDIO_TYPES}")
    return value.strip()


def _speech(speech: Mapping[str, Any]) -> dict[str, str]:
    columns = {"text": "tts_text", "human1_voice": "voice", "human2_voice": "voice_2"}
    if unknown := [key for key in speech if key not in columns]:
        raise InputError(f"key 'tts_audio': unknown key {unknown[0]!r}; allowed: {', '.join(columns)}")
    for key in ("text", "human1_voice"):
        if not _is_given(speech.get(key)):
            raise InputError(f"key 'tts_audio.{key}': is absent or empty; {_SPEECH[key]}")
    for key, value in speech.items():
        if not isinstance(value, str):
            raise InputError(f"key 'tts_audio.{key}': {shown(value)} is not a text; {_SPEECH[key]}")
    return {columns[key]: value.strip() for key, value in speech.items() if value.strip()}


_SPEECH = {
    "text": "give what is to be said",
    "human1_voice": "name a voice such as af_heart.pt",
    "human2_voice": "name a voice such as am_adam.pt",
}


def _boxes(boxes: Mapping[str, Any], people: Sequence[str]) -> list[list[float]]:
    """[x_min, y_min, x_max, y_max] of each speaker. The order in the document counts and not the names, as in
    the reference."""
    if len(boxes) != len(people):
        raise InputError(
            f"key 'bbox': {shown(dict(boxes))} holds {len(boxes)}; give one box for each of "
            f"{', '.join(people)}: {_BOX}"
        )
    for person, box in boxes.items():
        if not _is_box(box):
            raise InputError(f"key 'bbox.{person}': {shown(box)} is no box; give {_BOX}")
    return [[box[1], box[0], box[3], box[2]] for box in boxes.values()]


def _is_box(box: Any) -> bool:
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        return False
    if any(isinstance(edge, bool) or not isinstance(edge, int | float) for edge in box):
        return False
    row_min, column_min, row_max, column_max = map(float, box)
    return 0 <= row_min < row_max < math.inf and 0 <= column_min < column_max < math.inf
