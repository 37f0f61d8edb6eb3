"""The bytes of a table as text, or what they are instead."""

import io
import zipfile

from avatar_core.errors import InputError
from avatar_core.media.files import HEAD_BYTES, sniff_head

FORMATS = "a table is CSV, JSON Lines or JSON in UTF-8, or Parquet"

_SHEET = "save the sheet as CSV in UTF-8"
_CONVERT = "save it as one of them"
_UNPACK = "unpack it first"
_PAIR = "to render one picture with one recording give both: PICTURE RECORDING"

_MAGIC = {
    b"\xff\xfe\0\0": ("UTF-32 text", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8 (in Excel: CSV UTF-8)"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file (XLS)", _SHEET),
    b"%PDF": ("a PDF", _CONVERT),
    b"\x1f\x8b": ("a gzip file", _UNPACK),
    b"BZh9": ("a bzip2 file", _UNPACK),
    b"\xfd7zXZ": ("an xz file", _UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip file", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd file", _UNPACK),
    b"ARROW1": ("an Arrow (Feather) file", "save it as Parquet"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"\x89HDF": ("an HDF5 file", _CONVERT),
    b"\x93NUMPY": ("a NumPy file", _CONVERT),
}
_ZIPPED = {
    "xl/": ("an Excel workbook (XLSX)", _SHEET),
    "content.xml": ("an OpenDocument file (ODS)", _SHEET),
    "Index/": ("an Apple document (Numbers)", _SHEET),
    "word/": ("a Word document (DOCX)", _CONVERT),
}
_MEDIA = {
    "a picture": ("png", "jpeg", "webp", "avif", "heic", "gif", "bmp", "tiff", "psd"),
    "a recording": ("wav", "flac", "ogg", "mp3", "aac", "aiff"),
    "a video": ("mp4", "mov", "webm", "avi"),
}
_MARKUP = {"html": "an HTML page", "svg": "a picture (SVG)"}


def decode(content: bytes) -> str:
    """Without byte order mark and not empty. Raises `InputError` that says what else it is."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse_other_format(content)
        line = _line(content, error.start)
        raise InputError(
            f"is not UTF-8 (byte {error.start}, line {line}); save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from error
    if "\0" in text:
        _refuse_other_format(content)
        line = _line(content, content.index(0))
        raise InputError(f"holds NUL bytes (line {line}), so it is binary or UTF-16; {FORMATS}; {_CONVERT}")
    if not text.strip():
        raise InputError(f"is empty; {FORMATS}")
    if text.lstrip().startswith("<"):
        found = _MARKUP.get(str(sniff_head(content[:HEAD_BYTES])), "XML")
        raise InputError(f"is {found}; {FORMATS}; {_CONVERT}")
    return text


def _line(content: bytes, position: int) -> int:
    return content[:position].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1


def _refuse_other_format(content: bytes) -> None:
    """Raises `InputError` where the first bytes tell what it is."""
    found = next((found for magic, found in _MAGIC.items() if content.startswith(magic)), None)
    if content.startswith(b"PK\x03\x04"):
        found = _zipped(content)
    head = content[:HEAD_BYTES]
    if found is None and (b"\0" in head or content.startswith(b"\x89")):  # a text may begin with BM or ID3
        name = str(sniff_head(head))
        found = next(((f"{kind} ({name.upper()})", _PAIR) for kind in _MEDIA if name in _MEDIA[kind]), None)
    if found:
        raise InputError(f"is {found[0]}; {FORMATS}; {found[1]}")


def _zipped(content: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = []
    for start, found in _ZIPPED.items():
        if any(name.startswith(start) for name in names):
            return found
    return "a zip or Excel file", f"{_UNPACK}, or {_SHEET}"
