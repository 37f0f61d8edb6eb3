"""The rows of a CSV: of any dialect, with every complaint about the line where the fault begins."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from avatar_core.errors import InputError
from avatar_core.media.columns import column_names

DELIMITERS = ",;\t|"
MAX_FIELD_CHARS = 1 << 22
_HEADER_CHARS = 1 << 16

_LINE_END = re.compile(r"\r\n?|\n")
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n|\Z)")
_SEPARATOR = re.compile(r'"?sep=(.)"?[ \t,;|]*(?:\r\n?|\n)', re.IGNORECASE)


def parse_csv(text: str, known: frozenset[str]) -> Iterator[tuple[dict[str, str], str | None]]:
    """Each row by column, with what is wrong with it. `known` are the columns that mean something: they tell
    which delimiter it is, and comments above the header from the header.

    Raises `InputError` where what follows cannot be told apart, which may show only after some rows.
    """
    start, skipped, delimiter = _header_start(text, known)
    file = io.StringIO(text, newline="")
    file.seek(start)
    # The limit is one for the process. It is raised, never lowered, so that it suits all who read.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: Sequence[str] = ()
    read = 0  # lines
    try:
        for cells in reader:
            first, read = read + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header:
                yield _row(header, cells, skipped + first, skipped + read)
            else:
                header = column_names(tuple(cells), known)
    except csv.Error as error:
        first, last = skipped + read + 1, skipped + reader.line_num
        raise InputError(_explained(str(error), text, delimiter, first, last)) from error


def _row(header: Sequence[str], cells: list[str], first: int, last: int) -> tuple[dict[str, str], str | None]:
    values = dict(zip(header, cells, strict=False))
    surplus = cells[len(header) :]
    if len(cells) >= len(header) and not any(map(str.strip, surplus)):
        return values, None
    hint = "quote a value that holds the delimiter" if surplus else "a value is missing"
    lines = f"line {first}" if first == last else f"lines {first} to {last}"
    quotes = "" if first == last else ", or a quote is left open"
    return values, f"{lines}: the row has {len(cells)} values for {len(header)} columns; {hint}{quotes}"


def _header_start(text: str, known: frozenset[str]) -> tuple[int, int, str]:
    """Where the header begins, how many lines are above it, and the delimiter."""
    position, lines = 0, 0
    declared = _SEPARATOR.match(text)  # Excel's
    if declared:
        position, lines = declared.end(), 1
    while position < len(text):
        line = _LINE.match(text, position)
        assert line is not None
        if line[0].strip():
            is_comment = line[0].lstrip(' "').startswith("#")
            start = line[0] if is_comment else text[position : position + _HEADER_CHARS]
            delimiters = declared[1] if declared else DELIMITERS
            fitness, delimiter = max((_fitness(start, each, known), each) for each in delimiters)
            if fitness[0] or not is_comment:
                return position, lines, delimiter
        position, lines = line.end(), lines + 1
    raise InputError("has no header: name the columns in a line above the rows")


def _fitness(text: str, delimiter: str, known: frozenset[str]) -> tuple[int, int, int]:
    """How many of the columns we know a header at the start of the text holds, and how many at all."""
    try:
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error:
        cells = []
    names = {cell.strip().lower() for cell in cells}
    return len(names.intersection(known)), len(cells), -DELIMITERS.find(delimiter)


def _explained(error: str, text: str, delimiter: str, first: int, last: int) -> str:
    """What is wrong in the record that begins in line `first`, noticed in line `last`."""
    record = "".join(islice(io.StringIO(text, newline=""), first - 1, last))
    end = re.escape(delimiter)
    field = re.compile(rf'(?:"(?:[^"]++|"")*+"|(?!")[^{end}\r\n]*+)(?:{end}|\r\n?|\n)')
    position = 0
    while found := field.match(record, position):
        position = found.end()
    line = first + (len(_LINE_END.findall(record, 0, position)) if position < len(record) else 0)
    quoted = re.match(r'"(?:[^"]++|"")*+', record[position:])
    if quoted and (_LINE_END.search(quoted[0]) or position + quoted.end() == len(record)):
        noticed = f" (noticed in line {last}: {error})" if line != last else ""
        return f"line {line}: a quote is opened and not closed{noticed}; check the quotes of this line"
    if "field limit" in error:
        return f"line {line}: {error}; shorten this value, or save the table as Parquet"
    return f"line {line}: {error}; check the quotes of this line: one within a quoted value is written twice"
