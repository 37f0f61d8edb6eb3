"""The table of rows that a dataset is made from."""

import difflib
import json
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, overload

import fsspec

from avatar_core.errors import InputError, about, shown
from avatar_core.media.cells import plain
from avatar_core.media.dialogue import split_turns, voice_name
from avatar_core.media.documents import KEYS, SILENCE
from avatar_core.media.records import Record, parse_records, record_of
from avatar_core.media.source import local_path, normalise_uri, scheme_of
from avatar_core.store.packed import PackedRows

AUDIO_TYPES = ("para", "add")
MIN_FPS, MAX_FPS = 1.0, 120.0
MAX_SEED = 2**63 - 1
MAX_BYTES = 512 << 20

_SLICE_ROWS = 4096

_NAMES = ("videoid", "id", "name")
PATHS = ("image", "video", "audio", "audio_2")
"""Columns that point to files."""
_EITHER = (("image", "video"), ("audio", "tts_text"))
"""Of each pair a row has one."""

Box = tuple[float, ...]


@dataclass(frozen=True)
class TableRow:
    """`index` counts data rows from 0. A row has an `image` or a `video`, and its speech in `audio` (with
    `audio_2` of a second speaker) or as `tts_text` for `voice` (and `voice_2`). The recording of a speaker
    who is silent is `silence:` and the other's.

    `bbox`: one (x_min, y_min, x_max, y_max) per speaker, in pixels of the upright picture. `extra`: the
    columns that mean nothing here; `source`: all columns as given. A row with an `error` is not rendered."""

    index: int
    image: str = ""
    video: str | None = None
    audio: str = ""
    audio_2: str | None = None
    tts_text: str | None = None
    voice: str | None = None
    voice_2: str | None = None
    audio_type: str | None = None
    name: str | None = None
    prompt: str = ""
    negative_prompt: str = ""
    fps: float | None = None
    seed: int | None = None
    bbox: tuple[Box, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


_EMPTY = vars(TableRow(0))


class TableRows(Sequence[TableRow]):
    """Rows kept packed; a `TableRow` is built when it is asked for."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """`rows` have all fields of a `TableRow` by name."""
        self._rows = PackedRows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TableRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TableRow]: ...

    def __getitem__(self, index: int | slice) -> TableRow | list[TableRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return TableRow(**self._rows[index])

    def __iter__(self) -> Iterator[TableRow]:
        return (self[index] for index in range(len(self)))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """One field of the rows from `start` to before `stop`, at a tenth of the cost of the rows."""
        return self._rows.column(name, start, stop)

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Some fields of each row."""
        for start in range(0, len(self), _SLICE_ROWS):
            yield from zip(*(self.column(name, start, start + _SLICE_ROWS) for name in names), strict=True)

    def chosen(self, positions: Iterable[int]) -> "TableRows":
        return TableRows(self._rows[position] for position in positions)


def read_table(
    uri: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    base: str | None = None,
) -> TableRows:
    """A bad row comes back with its `error`; a bad table raises `InputError`. With `base` pictures and
    recordings come back as `resolve_uri(..., base)`."""
    content = _read(uri, storage_options or {}, max_bytes)
    try:
        rows = _rows(parse_records(content, max_bytes, _KNOWN), base)
        if not rows:
            raise InputError("has a header but no rows")
    except InputError as error:
        raise InputError(f"table {uri}: {error}") from error
    return rows


def parse_rows(values: Sequence[Mapping[str, Any]], base: str | None = None) -> TableRows:
    """Rows that are given as such, not in a file; the same columns and rules."""
    return _rows((record_of(row, _KNOWN) for row in values), base)


def _rows(records: Iterable[Record], base: str | None) -> TableRows:
    columns: dict[str, None] = {}

    def noted() -> Iterator[dict[str, Any]]:
        for index, record in enumerate(records):
            if not record.error:
                columns.update(dict.fromkeys(record.values))
            yield _row(index, record, base)

    rows = TableRows(noted())
    _check_required(list(columns))
    return rows


def _read(uri: str, storage_options: Mapping[str, Any], max_bytes: int) -> bytes:
    try:
        storage, path = fsspec.core.url_to_fs(uri, **storage_options)
        info = storage.info(path)
        if info["type"] != "file":
            kind = "a folder" if info["type"] == "directory" else "no regular file"
            raise InputError(f"table {uri}: is {kind}; give a CSV, JSON Lines, JSON or Parquet file")
        if (info["size"] or 0) > max_bytes:
            raise InputError(f"table {uri}: has {info['size']} bytes, allowed are {max_bytes}; split it")
        content: bytes = storage.cat_file(path)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"table {uri}: no such file") from error
    except Exception as error:  # every fsspec file system has its own exception types
        reason = " ".join(str(error).split())
        raise InputError(f"table {uri}: cannot be read ({type(error).__name__}: {reason})") from error
    return content


def _check_required(columns: Sequence[str]) -> None:
    lower = {name.lower(): name for name in columns}
    for required, instead in _EITHER:
        if columns and required not in lower and instead not in lower:
            near = difflib.get_close_matches(required, lower, n=1, cutoff=0.5)
            hint = f"; is {lower[near[0]]!r} meant? then rename it" if near else ""
            if _KNOWN.isdisjoint(lower):
                hint = "; name the columns in the first line"
            raise InputError(f"has no column {required!r}; its columns: {_listed(columns)}{hint}")


def _listed(columns: Sequence[str]) -> str:
    names = [name if name.isprintable() and len(name) <= 40 else shown(name) for name in columns[:20]]
    return ", ".join(names) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


@cache
def _folder_of(table_uri: str) -> str:
    return str(Path(local_path(table_uri)).absolute().parent)


@lru_cache(4096)
def resolve_uri(value: str, table_uri: str) -> str:
    """A relative path counts from the table's folder; absolute paths and URIs stay as they are."""
    if scheme_of(value) is not None or value.startswith("/"):
        return value
    if scheme_of(table_uri) in (None, "file"):
        return os.path.normpath(os.path.join(_folder_of(table_uri), value))  # noqa: PTH118 - for every row
    return normalise_uri(posixpath.join(posixpath.dirname(table_uri), value))


def _row(index: int, record: Record, base: str | None) -> dict[str, Any]:
    """The fields of a `TableRow`."""
    cells = {name.lower(): value for name, value in record.values.items()}
    values: dict[str, Any] = {**_EMPTY, "index": index}
    errors = [record.error] if record.error else _check_given(cells)
    try:
        values["name"] = _name(cells)
    except InputError as error:
        errors.append(str(error))
    for column, parse in _PARSERS.items():
        if column not in cells:
            continue
        try:
            _check_text(cells[column])
            values[column] = parse(cells[column])
        except InputError as error:
            errors.append(f"column {column!r}: {error}")
    if not errors:
        errors = _check_recordings(values) + _check_speech(values) + _check_boxes(values)
    if base is not None:
        values |= {column: resolve_uri(values[column], base) for column in PATHS if values[column]}
    if values["audio_2"]:
        for column, other in (("audio", "audio_2"), ("audio_2", "audio")):
            if values[column] == SILENCE:
                values[column] += values[other]
    extra = {name: value for name, value in record.values.items() if name.lower() not in _KNOWN}
    return values | {"extra": extra, "source": record.source, "error": "; ".join(errors) or None}


def _check_text(value: Any) -> None:
    if isinstance(value, bytes):
        raise InputError(
            f"{shown(value)} is no text in UTF-8 (half a character, or another encoding); write it in UTF-8"
        )


def _check_given(cells: Mapping[str, Any]) -> list[str]:
    errors = []
    for column, instead in _EITHER:
        is_given, is_instead = not is_absent(cells.get(column)), not is_absent(cells.get(instead))
        if is_given and is_instead:
            errors.append(f"columns {column!r} and {instead!r} are both given; give one of them")
        if not is_given and not is_instead:
            errors.append(f"column {column!r}: is empty; give a path or URI")
    return errors


def _check_recordings(values: Mapping[str, Any]) -> list[str]:
    recordings = [values[column] for column in ("audio", "audio_2") if values[column]]
    errors = []
    if values["audio_2"] and not values["audio_type"]:
        errors.append("column 'audio_2' is given but 'audio_type' is empty; allowed: para, add")
    if values["audio_type"] and not values["audio_2"]:
        errors.append(
            f"column 'audio_type' is {values['audio_type']!r} but 'audio_2' is empty; give both or none"
        )
    silent = [recording for recording in recordings if recording.startswith(SILENCE)]
    if any(recording != SILENCE for recording in silent):
        errors.append(f"{shown(silent[0])} names a recording; write {SILENCE!r} alone: it lasts as the other")
    elif silent and len(silent) == len(recordings):
        errors.append(f"column 'audio' is {SILENCE!r}, so a recording of another speaker is needed")
    return errors


def _check_speech(values: Mapping[str, Any]) -> list[str]:
    if not values["tts_text"]:
        names = [column for column in ("voice", "voice_2") if values[column]]
        return [f"column {name!r} is given but 'tts_text' is empty; give both or none" for name in names]
    if values["audio_2"]:
        return ["columns 'audio_2' and 'tts_text' are both given; name a second speaker's voice in 'voice_2'"]
    if not values["voice"]:
        return ["column 'voice': is empty; name the Kokoro voice that says 'tts_text', such as af_heart"]
    try:
        split_turns(values["tts_text"], 2 if values["voice_2"] else 1)
    except InputError as error:
        return [f"column 'tts_text': {error}"]
    return []


def _check_boxes(values: Mapping[str, Any]) -> list[str]:
    speakers = 2 if values["audio_2"] or values["voice_2"] else 1
    if values["bbox"] and len(values["bbox"]) != speakers:
        return [f"column 'bbox' has {len(values['bbox'])} boxes for {speakers} speakers; give one each"]
    return []


def _name(cells: Mapping[str, Any]) -> str | None:
    for column in _NAMES:
        value = cells.get(column)
        if isinstance(value, bytes):
            with about(f"column {column!r}"):
                _check_text(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_absent(value):
            return str(value).strip()
    return None


def is_absent(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null", "<na>")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _path(value: Any) -> str | None:
    if is_absent(value):
        return None
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"{shown(value)} is not a path or URI")
    if "\n" in value.strip():
        raise InputError(f"{shown(value)} holds a line break; is a quote left open in the table?")
    return value.strip()


def _path_or_empty(value: Any) -> str:
    return _path(value) or ""


def _speech(value: Any) -> str | None:
    if is_absent(value):
        return None
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"{shown(value)} is not a text")
    return value.strip()


def _voice(value: Any) -> str | None:
    return None if is_absent(value) else voice_name(str(value))


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _audio_type(value: Any) -> str | None:
    if is_absent(value):
        return None
    if str(value).strip().lower() not in AUDIO_TYPES:
        raise InputError(f"{shown(value)} is not allowed; allowed: para (at once), add (one after the other)")
    return str(value).strip().lower()


def _fps(value: Any) -> float | None:
    if is_absent(value):
        return None
    fps = _number(value)
    if not MIN_FPS <= fps <= MAX_FPS:
        raise InputError(f"{shown(value)} is not a number from {MIN_FPS:g} to {MAX_FPS:g}")
    return fps


def _number(value: Any) -> float:
    """NaN for what is no number, which no range holds."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _seed(value: Any) -> int | None:
    if is_absent(value):
        return None
    try:
        seed = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    except ValueError:
        seed = None
    if seed is None and _number(value).is_integer():
        seed = int(_number(value))
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise InputError(f"{shown(value)} is not a whole number from 0 to {MAX_SEED}")
    return seed


def _json_value(value: Any) -> Any:
    """Text cells hold JSON; Parquet and JSON give the value itself. NaN and infinity are no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return plain(json.loads(value, parse_constant=lambda constant: float(f"not JSON: {constant}")))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(value)} is not JSON ({error})") from error


def _bbox(value: Any) -> tuple[Box, ...] | None:
    if is_absent(value):
        return None
    boxes = _json_value(value)
    if isinstance(boxes, Sequence) and boxes and not isinstance(boxes[0], Sequence):
        boxes = [boxes]
    if not isinstance(boxes, Sequence) or not boxes or not all(_is_box(box) for box in boxes):
        raise InputError(
            f"{shown(value)} is no list of boxes; give [x_min, y_min, x_max, y_max] in pixels per speaker"
        )
    return tuple(tuple(float(edge) for edge in box) for box in boxes)


def _is_box(box: Any) -> bool:
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        return False
    x_min, y_min, x_max, y_max = map(_number, box)
    return 0 <= x_min < x_max < math.inf and 0 <= y_min < y_max < math.inf


def _params(value: Any) -> dict[str, Any]:
    if is_absent(value):
        return {}
    params = _json_value(value)
    if not isinstance(params, Mapping):
        raise InputError(f'{shown(value)} is not a JSON object such as {{"num_inference_steps": 30}}')
    given = {name: item for name, item in params.items() if item is not None}
    try:
        json.dumps(given, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{shown(value)} holds a number that is not finite; give another") from error
    return given


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "image": _path_or_empty,
    "video": _path,
    "audio": _path_or_empty,
    "audio_2": _path,
    "tts_text": _speech,
    "voice": _voice,
    "voice_2": _voice,
    "audio_type": _audio_type,
    "prompt": _text,
    "negative_prompt": _text,
    "fps": _fps,
    "seed": _seed,
    "bbox": _bbox,
    "params": _params,
}
_KNOWN = frozenset((*_NAMES, *_PARSERS, *KEYS))
