from typing import Any

import numpy as np
import pytest

from avatar_core.store.packed import CHUNK_ROWS, PackedRows


def rows(count: int) -> list[dict[str, Any]]:
    return [{"key": f"k{n}", "value": n * 0.5, "tags": [n]} for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS, 2 * CHUNK_ROWS, 3 * CHUNK_ROWS + 7])
def test_rows_come_back_as_they_were(count: int) -> None:
    given = rows(count)
    packed = PackedRows(given)
    assert [packed[index] for index in range(len(packed))] == given
    assert packed.column("tags") == [row["tags"] for row in given]


def test_a_stretch_of_a_column_may_cross_chunks() -> None:
    packed = PackedRows(rows(4 * CHUNK_ROWS))
    start, stop = CHUNK_ROWS - 2, 3 * CHUNK_ROWS + 2
    assert packed.column("key", start, stop) == [f"k{n}" for n in range(start, stop)]
    assert packed.column("key", start, start) == []
    assert packed.column("key", len(packed) - 1) == [f"k{len(packed) - 1}"]


def test_values_are_taken_in_any_order() -> None:
    packed = PackedRows(rows(3 * CHUNK_ROWS))
    positions = np.random.default_rng(0).permutation(len(packed))
    assert packed.take("value", positions).tolist() == (positions * 0.5).tolist()


def test_a_row_may_be_completed_after_it_was_added() -> None:
    packed, added = PackedRows(rows(CHUNK_ROWS - 1)), {"key": "late"}
    packed.append(added)
    for row in rows(CHUNK_ROWS - 1):
        packed.append(row)
    added |= {"data": "there"}
    for row in rows(CHUNK_ROWS):
        packed.append(row)
    assert packed[CHUNK_ROWS - 1]["data"] == "there"
    assert packed[0]["data"] is None
    assert packed.column("data")[CHUNK_ROWS:] == [None] * (2 * CHUNK_ROWS - 1)


def test_an_index_outside_is_an_error() -> None:
    with pytest.raises(IndexError):
        PackedRows(rows(3))[3]
