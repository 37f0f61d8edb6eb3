import pytest

from avatar_core.errors import StoreError
from avatar_core.store.layout import LAYOUT, check_layout, claim_layout
from avatar_core.store.storage import Storage
from tests.sample_rows import Rendered, RunAvatar


def test_a_new_store_says_what_it_is(storage: Storage) -> None:
    assert not check_layout(storage)
    claim_layout(storage)
    assert check_layout(storage)
    claim_layout(storage)
    assert storage.read_bytes("store.json") == b'{"layout": %d}' % LAYOUT


@pytest.mark.parametrize("trace", ["runs/old/config.yaml", "catalog/face/x.parquet", "stages/face/data/x"])
def test_a_store_of_an_earlier_version_is_refused(storage: Storage, trace: str) -> None:
    storage.write_bytes(trace, b"of before")
    for look in (check_layout, claim_layout):
        with pytest.raises(StoreError, match=r"earlier version .* give another storage.root, or delete it"):
            look(storage)


def test_a_folder_of_other_things_may_become_a_store(storage: Storage) -> None:
    storage.write_bytes("notes/today.txt", b"mine")
    claim_layout(storage)
    assert check_layout(storage)


def test_a_store_of_a_later_version_is_refused(storage: Storage) -> None:
    storage.write_bytes("store.json", b'{"layout": 99}')
    with pytest.raises(StoreError, match=f"has layout 99, this version of avatar-dataset reads {LAYOUT}"):
        check_layout(storage)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_mark_is_told(storage: Storage, content: bytes) -> None:
    storage.write_bytes("store.json", content)
    with pytest.raises(StoreError, match=r"store.json in .* is damaged"):
        check_layout(storage)


@pytest.mark.parametrize("command", ["render", "plan", "status", "gc", "verify", "rerun"])
def test_every_command_refuses_an_older_store(
    avatar: RunAvatar, rendered: Rendered, tmp_path: str, command: str
) -> None:
    Storage(str(tmp_path)).write_bytes("runs/batch-20250101T000000Z-abcd/config.yaml", b"{}")
    word = {"render": rendered.table, "plan": rendered.table, "verify": "batch", "rerun": "batch"}.get(
        command
    )
    code, output = avatar(command, *([word] if word else []), f"storage.root={tmp_path}")
    assert code == 2
    assert "was made by an earlier version of avatar-dataset" in output
