"""Runs one shard: reads its inputs, loops over its items, commits what they gave."""

import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import threadpoolctl

from avatar_core.errors import AvatarError, Cancelled, StoreError, WeightsError
from avatar_core.stages.base import Item, ItemSpec, Output, Report, Stage
from avatar_core.store.manifest import write_data, write_manifest
from avatar_core.store.storage import Storage
from avatar_core.store.tensors import open_item, pack

log = logging.getLogger(__name__)

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Manifest rows of consumed items: stage, then key."""

_models: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_MODELS_KEPT = 4


def run_shard(
    storage: Storage,
    stage: Stage,
    items: Sequence[ItemSpec],
    inputs: Rows,
    *,
    device: str = "cpu",
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, int, int], None] = lambda key, done, total: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_commit: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Process the items, commit their results in one manifest and return its rows.

    An item's own error becomes its row. `StoreError` (with the keys to compute again) and `WeightsError`
    leave the loop. On any way out what is done is committed first; `on_commit` tells that it was. A row
    that `on_row` gets learns at the commit where its tensors lie.
    """

    def report(key: str, done: int, total: int) -> None:
        if cancelled():
            raise Cancelled("stopped by the user")
        on_progress(key, done, total)

    rows: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    with _scratch() as scratch, one_thread():
        try:
            for spec in items:
                report(spec.key, 0, 1)
                item = _resolve(storage, spec, inputs)
                models = _load(stage, spec.config, device)
                start = time.perf_counter()
                row = {"key": spec.key, "work": spec.work, "device": device}
                output = _process(stage, spec, item, models, scratch, partial(report, spec.key))
                if isinstance(output, Output):
                    row |= {"status": "ok"} | _written(storage, stage, output)
                    if output.tensors:
                        tensors[spec.key] = output.tensors
                else:
                    row |= output
                rows.append(row | {"seconds": time.perf_counter() - start})
                on_row(rows[-1])
                _clear(scratch)
        finally:
            if rows:
                _commit(storage, stage, rows, tensors)
                on_commit()
            storage.release()
    return rows


def _process(
    stage: Stage, spec: ItemSpec, item: Item, models: Any, scratch: Path, report: Report
) -> Output | dict[str, Any]:
    """What the item gave, or the manifest columns of its failure."""
    try:
        return stage.process(item, spec.config, models, scratch, report)
    except (Cancelled, StoreError, WeightsError):
        raise
    except Exception as error:
        return _failed(error, stage, spec)


def _resolve(storage: Storage, spec: ItemSpec, inputs: Rows) -> Item:
    outputs: dict[str, list[Output]] = {}
    for stage, keys in spec.inputs.items():
        outputs[stage] = [_open(storage, stage, key, inputs[stage][key]) for key in keys]
    paths: dict[str, list[Path]] = {}
    for column, assets in spec.assets.items():
        paths[column] = [
            _verified(storage, asset.path, asset.sha256, f"ingest:{asset.key}") for asset in assets
        ]
    return Item(spec.key, outputs, paths, spec.source)


def _open(storage: Storage, stage: str, key: str, row: Mapping[str, Any]) -> Output:
    path = _verified(storage, row["data"], row["sha256"], f"{stage}:{key}")
    if path.suffix == ".safetensors":
        return Output(row, tensors=open_item(path, key))
    return Output(row, file=path)


def _verified(storage: Storage, path: str, sha256: str, owner: str) -> Path:
    try:
        return storage.local_path(path, sha256)
    except StoreError as error:
        raise StoreError(str(error), keys=[owner]) from error


def _load(stage: Stage, config: Any, device: str) -> Any:
    """Models stay loaded for the items that follow; the least recently used go first."""
    name = (stage.name, stage.version, stage.weights(config), device)
    if name not in _models:
        _models[name] = stage.load(config, device)
        while len(_models) > _MODELS_KEPT:
            _models.popitem(last=False)
    _models.move_to_end(name)
    return _models[name]


def _written(storage: Storage, stage: Stage, output: Output) -> dict[str, Any]:
    row = dict(output.columns)
    if output.file is not None:
        row["data"], row["sha256"] = write_data(
            storage, stage.name, output.file, output.file.suffix, folder=stage.folder
        )
    return row


def _failed(error: Exception, stage: Stage, spec: ItemSpec) -> dict[str, Any]:
    """The columns of a failed item. A full disk is nobody's row: it stops the shard."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        raise StoreError(f"cannot write the result of {stage.name}: {error}; free some space and run again")
    expected = isinstance(error, AvatarError)
    if not expected:
        log.warning("%s failed on item %s", stage.name, spec.key, exc_info=error)
    text = " ".join(str(error).split()) or "no message"
    return {
        "status": "failed",
        "retryable": isinstance(error, MemoryError),
        "error_type": type(error).__name__,
        "error": text if expected else f"unexpected {type(error).__name__}: {text}",
    }


def _commit(storage: Storage, stage: Stage, rows: list[dict[str, Any]], tensors: Mapping[str, Any]) -> None:
    if tensors:
        data, sha256 = write_data(storage, stage.name, pack(tensors), ".safetensors")
        for row in rows:
            if row["key"] in tensors:
                row |= {"data": data, "sha256": sha256}
    write_manifest(storage, stage.name, rows, stage.columns)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"avatar-{os.getpid()}-") as folder:
        yield Path(folder)


def _clear(folder: Path) -> None:
    """One folder serves all items of a shard: making one for each costs more than a cheap item."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            else:
                Path(entry).unlink()


@contextmanager
def one_thread() -> Iterator[None]:
    """Equal results on machines with different core counts need one thread per library."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with _thread_pools(len(sys.modules)).limit(limits=1):
            yield
    finally:
        cv2.setNumThreads(before)


@lru_cache(1)
def _thread_pools(modules: int) -> threadpoolctl.ThreadpoolController:
    """Scanning all loaded libraries takes milliseconds: done again only once more `modules` are loaded."""
    return threadpoolctl.ThreadpoolController()
