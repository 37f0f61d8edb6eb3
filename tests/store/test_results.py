import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from avatar_core.errors import StoreError
from avatar_core.store.catalog import ABSENT, FAILED, FAILED_FOR_GOOD, OK, load_catalog
from avatar_core.store.key_index import KeyIndex, binary_keys, text_keys
from avatar_core.store.manifest import write_manifest
from avatar_core.store.results import StageResults
from avatar_core.store.storage import Storage

COLUMNS = pa.schema([("faces", pa.int64())])
MANY = 5000


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def failed(number: int, retryable: bool = False) -> dict[str, Any]:
    return {"key": key(number), "status": "failed", "retryable": retryable, "error": "no face"}


def results_of(storage: Storage, *rows: dict[str, Any]) -> StageResults:
    if rows:
        write_manifest(storage, "face", rows, COLUMNS)
    return StageResults(load_catalog(storage, "face"))


def states(results: StageResults, *numbers: int) -> list[int]:
    return results.states(binary_keys(map(key, numbers))).tolist()


def test_what_was_added_hides_what_the_store_held(storage: Storage) -> None:
    results = results_of(storage, {"key": key(1), "status": "ok", "faces": 1}, failed(2), failed(3, True))
    assert states(results, 1, 2, 3, 4) == [OK, FAILED_FOR_GOOD, FAILED, ABSENT]
    results.add(failed(1, retryable=True))
    results.add({"key": key(2), "status": "ok", "faces": 2})
    assert states(results, 1, 2, 3, 4) == [FAILED, OK, FAILED, ABSENT]
    assert [results.has(key(n)) for n in (1, 2, 3, 4)] == [False, True, False, False]
    assert all(type(results.has(key(n))) is bool for n in (1, 2, 3, 4))  # counts of these go into JSON
    assert (results.ok(key(1)), results.failure(key(2)), results.ok(key(4))) == (None, None, None)
    found = results.failure(key(1))
    assert found is not None
    assert found["error"] == "no face"


def test_of_many_rows_each_is_found_and_the_newest_counts(storage: Storage) -> None:
    results = results_of(storage, {"key": key(MANY), "status": "ok", "faces": -1})
    for number in range(MANY):
        results.add(failed(number))
        results.add({"key": key(number), "status": "ok", "faces": number})
    numbers = np.random.default_rng(0).permutation(MANY + 1).tolist()
    keys = binary_keys(map(key, numbers))
    assert set(results.states(keys).tolist()) == {OK}
    columns = results.columns(keys, ["key", "faces"])
    assert columns["key"] == [key(number) for number in numbers]
    assert columns["faces"] == [-1 if number == MANY else number for number in numbers]
    for number in (0, MANY // 2, MANY - 1, MANY):
        row = results.ok(key(number))
        assert row is not None
        assert row["key"] == key(number)


def test_columns_of_what_is_not_there_name_it(storage: Storage) -> None:
    results = results_of(storage, failed(1))
    with pytest.raises(StoreError, match="2 of 2 face results") as caught:
        results.columns(binary_keys([key(1), key(2)]), ["faces"])
    assert caught.value.keys == (key(1), key(2))


def test_keys_that_end_in_zeros_stay_whole() -> None:
    keys = ["ab" * 30 + "0000", "00" * 31 + "01", "ff" * 32]
    binary = binary_keys(keys)
    assert [text.decode() for text in text_keys(binary).tolist()] == keys
    index = KeyIndex(binary, np.arange(3, dtype=np.intc))
    assert index.find(binary_keys([keys[2], "ab" * 32, keys[0], keys[1]])).tolist() == [2, -1, 0, 1]


def test_of_equal_keys_the_one_added_last_counts() -> None:
    keys = binary_keys([key(1), key(2), key(1)])
    index = KeyIndex(keys, np.array([10, 20, 30], np.intc))
    assert index.find(keys).tolist() == [30, 20, 30]
    index.add(binary_keys([key(2)]), np.array([5], np.intc))
    assert index.find(keys).tolist() == [30, 5, 30]
    assert len(index) == 2
