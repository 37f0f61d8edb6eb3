"""Files that ship beside the code: `conf/` and the weights registry."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_data"


def resource(path: str) -> Path:
    """`path` relative to the project's root, for example `conf/config.yaml`, in a checkout and in a wheel."""
    return (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent) / path


def checkout() -> Path | None:
    """Root of the checkout that the code runs from; None where a wheel is installed."""
    return None if _INSTALLED.is_dir() else _PACKAGE.parent
