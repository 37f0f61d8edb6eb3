"""Runs one shard: reads its inputs, loops over its items, commits what they gave."""

import errno
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import threadpoolctl

from avatar_core import weights
from avatar_core.errors import AvatarError, Cancelled, ConfigError, StoreError, WeightsError
from avatar_core.media.source import is_local
from avatar_core.stages.base import Item, ItemSpec, Output, Report, Stage
from avatar_core.store.manifest import write_data, write_manifest
from avatar_core.store.storage import Storage
from avatar_core.store.tensors import open_item, pack

log = logging.getLogger(__name__)

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Manifest rows of consumed items: stage, then key."""

_Result = tuple[dict[str, Any], Mapping[str, Any]]
"""An item's row and its tensors."""

_models: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_MODELS_KEPT = 4
AUTO = "auto"


Commit = Callable[[], str]
"""Makes results count, and gives the id of the attempt that says so."""


def at_once(commit: Commit) -> None:
    commit()


def run_shard(
    storage: Storage,
    stage: Stage,
    items: Sequence[ItemSpec],
    inputs: Rows,
    *,
    device: str = "cpu",
    memory: str = AUTO,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[str, int, int], None] = lambda key, done, total: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    commit_with: Callable[[Commit], None] = at_once,
) -> list[dict[str, Any]]:
    """Process the items, commit their results in one manifest and return its rows.

    An item's own error becomes its row; one that runs out of memory is tried once more before. Where the
    stage has memory levels, `memory` is the first, and the next lower one is that of the second try and all
    that follows. `StoreError` (with the keys to compute again) and `WeightsError` leave the loop. On any way
    out `commit_with` is given the commit of what is done, which it may make later and in another thread. A
    row that `on_row` gets learns then where its tensors lie. However many items the stage has worked on at
    once, rows come in the order of the items, and everything is told by one thread at a time.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    ladder = _Ladder(stage, device, memory)
    told = _Told(cancelled, on_progress)
    threads = min(stage.concurrency, len(items)) if _is_remote(storage, items) else 1

    def run_item(spec: ItemSpec, scratch: Path) -> _Result:
        item = _resolve(storage, spec, inputs)
        start, loading_s = time.perf_counter(), ladder.loading_s
        output = _process(stage, spec, item, ladder, scratch, partial(told.report, spec.key))
        row = {"key": spec.key, "work": spec.work, "device": device, "memory": ladder.level}
        if isinstance(output, Output):
            row |= {"status": "ok"} | _written(storage, stage, output)
        else:
            row |= output
        seconds = time.perf_counter() - start - (ladder.loading_s - loading_s)
        _clear(scratch)
        row["seconds"] = seconds / threads  # of this process's time, which they share
        return row, output.tensors if isinstance(output, Output) else {}

    def keep(result: _Result) -> None:
        rows.append(result[0])
        if result[1]:
            tensors[rows[-1]["key"]] = result[1]
        with told.telling:
            on_row(rows[-1])

    with _scratch() as scratch, one_thread():
        try:
            if threads > 1:
                _run_at_once(run_item, items, threads, scratch, told, keep)
            else:
                for spec in items:
                    told.begin(spec.key)
                    keep(run_item(spec, scratch))
        finally:
            if rows:
                commit_with(partial(_commit, storage, stage, rows, tensors))
            storage.release()
    return rows


def _run_at_once(
    run_item: Callable[[ItemSpec, Path], _Result],
    items: Sequence[ItemSpec],
    threads: int,
    scratch: Path,
    told: "_Told",
    keep: Callable[[_Result], None],
) -> None:
    """Has the results kept in the order of the items. After an error the items in work end at their next
    report; those that were finished by then are kept before it is raised."""
    own = threading.local()
    errors: list[BaseException] = []  # the first is the reason of all that follow
    results: list[Future[_Result]] = []
    kept = 0

    def start_thread() -> None:
        _limit_to_one_thread()  # OpenMP's limit is each thread's own
        own.scratch = Path(tempfile.mkdtemp(dir=scratch))

    def run(spec: ItemSpec) -> _Result:
        told.check()
        try:
            return run_item(spec, own.scratch)
        except BaseException as error:
            errors.append(error)
            told.stop()
            raise

    with ThreadPoolExecutor(threads, initializer=start_thread) as pool:
        try:
            results = [pool.submit(run, spec) for spec in items]
            for spec, result in zip(items, results, strict=True):
                told.begin(spec.key)
                row = result.result()
                kept += 1
                keep(row)
        except BaseException as error:
            errors.append(error)
            told.stop()
    for result in results[kept:]:
        if result.exception() is None:
            keep(result.result())
    if errors:
        raise errors[0]


def _is_remote(storage: Storage, items: Sequence[ItemSpec]) -> bool:
    """Whether the items wait for a network; beside other processes threads only cost where they do not."""
    return not storage.is_local or any(spec.source and not is_local(spec.source) for spec in items)


class _Told:
    """What the caller is told and asked meanwhile, by one thread at a time.

    Of several items in work only the first is told of: a caller that hears nothing blames that one.
    """

    def __init__(self, cancelled: Callable[[], bool], on_progress: Callable[[str, int, int], None]) -> None:
        self._cancelled, self._on_progress = cancelled, on_progress
        self._first: str | None = None
        self._stopped = False
        self.telling = threading.RLock()

    def begin(self, key: str) -> None:
        self._first = key
        self.report(key, 0, 1)

    def report(self, key: str, done: int, total: int) -> None:
        with self.telling:
            self.check()
            if key == self._first:
                self._on_progress(key, done, total)

    def check(self) -> None:
        with self.telling:
            if self._stopped or self._cancelled():
                raise Cancelled("stopped by the user")

    def stop(self) -> None:
        """From now on everybody is told that the shard is cancelled."""
        self._stopped = True


class _Ladder:
    """A stage's memory levels, most memory first, down which a shard goes; `level` is None without any."""

    def __init__(self, stage: Stage, device: str, memory: str) -> None:
        levels = stage.memory_levels(device)
        if levels and memory != AUTO and memory not in levels:
            raise ConfigError(
                f"{stage.name} has no memory level `{memory}` on {device}; "
                f"choose {AUTO} or one of: {', '.join(levels)}"
            )
        self._levels = levels[levels.index(memory) :] if memory in levels else levels
        self._stage, self._device = stage, device
        self._stamps = cache(lambda names: tuple(map(weights.stamp, names)))
        self._loading = threading.Lock()
        self.loading_s = 0.0

    @property
    def level(self) -> str | None:
        return self._levels[0] if self._levels else None

    def models(self, config: Any) -> Any:
        with self._loading:
            start = time.perf_counter()
            try:
                return _load(
                    self._stage, config, self._stamps(self._stage.weights(config)), self._device, self.level
                )
            finally:
                self.loading_s += time.perf_counter() - start

    def descend(self) -> None:
        """Lets go of all models, so that there is room again even on the lowest level."""
        with self._loading:
            drop_models()
            self._levels = self._levels[1:] or self._levels


def _process(
    stage: Stage, spec: ItemSpec, item: Item, ladder: _Ladder, scratch: Path, report: Report
) -> Output | dict[str, Any]:
    """What the item gave, or the manifest columns of its failure."""
    try:
        return _attempt(stage, spec, item, ladder, scratch, report)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        log.warning("%s ran out of memory (level: %s): once more", stage.name, ladder.level or "the only one")
    # Not within `except`: the error holds what filled the memory.
    ladder.descend()
    _clear(scratch)
    try:
        return _attempt(stage, spec, item, ladder, scratch, report)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _failed(error, stage, spec)


def _attempt(
    stage: Stage, spec: ItemSpec, item: Item, ladder: _Ladder, scratch: Path, report: Report
) -> Output | dict[str, Any]:
    models = ladder.models(spec.config)
    try:
        return stage.process(item, spec.config, models, scratch, report)
    except (Cancelled, StoreError, WeightsError):
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        return _failed(error, stage, spec)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's error or torch's, known by its name since torch may not be there."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint({"MemoryError", "OutOfMemoryError"})


def _resolve(storage: Storage, spec: ItemSpec, inputs: Rows) -> Item:
    outputs: dict[str, list[Output]] = {}
    for stage, keys in spec.inputs.items():
        outputs[stage] = [_open(storage, stage, key, inputs[stage][key]) for key in keys]
    paths: dict[str, list[Path]] = {}
    for column, assets in spec.assets.items():
        paths[column] = [_verified(storage, asset.path, asset.sha256, asset.owner) for asset in assets]
    return Item(spec.key, outputs, paths, spec.source, storage.unfinished_file(spec.key))


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


def _load(stage: Stage, config: Any, files: Hashable, device: str, memory: str | None) -> Any:
    """Models stay loaded for the items that follow; the least recently used go first. `files` are those that
    the models come from."""
    name = (stage.name, stage.version, files, stage.model_options(config), device, memory)
    if name not in _models:
        if _is_half_full(device):
            drop_models()
        _models[name] = stage.load(config, device, memory)
        _limit_to_one_thread()  # libraries that came with the model, too
        while len(_models) > _MODELS_KEPT:
            _models.popitem(last=False)
    _models.move_to_end(name)
    return _models[name]


def _is_half_full(device: str) -> bool:
    """Whether a GPU may have no room for one more model: the text encoder and the transformer of one
    backend, for example, fit beside each other on the largest only."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return False
    free, total = torch.cuda.mem_get_info(device)
    return bool(free < total / 2)


def drop_models() -> None:
    """Those that this process keeps, and the memory of the GPU that they took."""
    _models.clear()
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


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
        "retryable": _is_out_of_memory(error),
        "error_type": type(error).__name__,
        "error": text if expected else f"unexpected {type(error).__name__}: {text}",
    }


def _commit(storage: Storage, stage: Stage, rows: list[dict[str, Any]], tensors: Mapping[str, Any]) -> str:
    if tensors:
        data, sha256 = write_data(storage, stage.name, pack(tensors), ".safetensors")
        for row in rows:
            if row["key"] in tensors:
                row |= {"data": data, "sha256": sha256}
    attempt = write_manifest(storage, stage.name, rows, stage.columns)
    for row in rows:
        if row["status"] == "ok":
            storage.unfinished_file(row["key"]).unlink(missing_ok=True)
    return attempt


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
    torch = sys.modules.get("torch")
    before = cv2.getNumThreads(), torch.get_num_threads() if torch else 1
    limited = _limit_to_one_thread()
    try:
        yield
    finally:
        limited.restore_original_limits()
        cv2.setNumThreads(before[0])
        if torch:
            torch.set_num_threads(before[1])


def _limit_to_one_thread() -> Any:
    cv2.setNumThreads(1)
    limited = _thread_pools(len(sys.modules)).limit(limits=1)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # else the first operation of each thread raises the limit again
    return limited


@lru_cache(1)
def _thread_pools(modules: int) -> threadpoolctl.ThreadpoolController:
    """Scanning all loaded libraries takes milliseconds: done again only once more `modules` are loaded."""
    return threadpoolctl.ThreadpoolController()
