"""The version of a store's layout, so that no code reads what another one wrote in another way."""

import json

from avatar_core.errors import StoreError
from avatar_core.store.storage import Storage

LAYOUT = 2
"""Raised whenever an older version of this package could not read what a store holds, or this one an older
store. 1 had no file that said so."""

_PATH = "store.json"
_TRACES = ("runs", "stages", "catalog")


def check_layout(storage: Storage) -> bool:
    """Whether the store says that it is ours; a new one does not. Raises `StoreError` for another layout."""
    if storage.exists(_PATH):
        try:
            found = json.loads(storage.read_bytes(_PATH))["layout"]
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"{_PATH} in {storage.uri} is damaged; restore it from a backup, or write "
                f'{{"layout": {LAYOUT}}} into it if this version of avatar-dataset made the store'
            ) from None
        if found != LAYOUT:
            raise StoreError(
                f"the store {storage.uri} has layout {found}, this version of avatar-dataset reads {LAYOUT}: "
                "install the version that made it, or give another storage.root"
            )
        return True
    if any(storage.list(folder) for folder in _TRACES):
        raise StoreError(
            f"the store {storage.uri} was made by an earlier version of avatar-dataset, whose results this "
            "one cannot read: give another storage.root, or delete it (the videos in its datasets/ are whole)"
        )
    return False


def claim_layout(storage: Storage) -> None:
    """As `check_layout`, and a new store says from now on that it is ours."""
    if not check_layout(storage):
        storage.write_bytes(_PATH, json.dumps({"layout": LAYOUT}).encode())
