"""Deletes what no run refers to any more: the only place where a store loses files."""

import time
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from avatar_core.store.attempts import Attempts, catalog_folder, read_attempts
from avatar_core.store.catalog import Catalog, hide
from avatar_core.store.claims import claim_folder
from avatar_core.store.disk import PARTIAL_SUFFIX, FileInfo
from avatar_core.store.manifest import ASSETS, data_folder, manifest_folder
from avatar_core.store.storage import Storage

MIN_AGE_S = 7 * 86400.0
TASKS = "tasks"
"""What a flow engine keeps of shards; see `tasks/shard.py`."""


@dataclass
class GcReport:
    """Files and bytes that were deleted, or would be, by kind: data, assets, manifests, catalog, claims,
    tasks, partial.
    """

    dry_run: bool
    files: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)

    def add(self, kind: str, path: str, info: FileInfo) -> None:
        self.files[kind] += 1
        self.bytes[kind] += info.size
        self.paths.append(path)


def gc(
    storage: Storage,
    roots: Mapping[str, Set[str]],
    asset_roots: Set[str],
    *,
    min_age_s: float = MIN_AGE_S,
    dry_run: bool = True,
    now: float | None = None,
) -> GcReport:
    """Keeps what the winning attempts of the keys `roots[stage]` name, and assets of these SHA-256s.

    Only files older than `min_age_s` go; `now` is in seconds since the epoch. A result whose file
    goes is hidden by a dropped row first, so that later runs make it again rather than look for it.
    """
    listed = storage.list(partial=True)
    newest = (time.time() if now is None else now) - min_age_s
    old = {path: info for path, info in listed.items() if info.mtime <= newest}
    stages = {path.split("/")[1] for path in listed if path.startswith(("stages/", "catalog/"))}
    attempts = {stage: read_attempts(storage, stage) for stage in sorted(stages)}
    catalogs = {stage: Catalog(stage, attempts[stage].table()) for stage in attempts}

    kept = _kept_paths(catalogs, roots)
    redundant = {stage: _redundant_paths(stage, attempts[stage]) for stage in attempts}
    report = GcReport(dry_run)
    for path, info in sorted(old.items()):
        kind = _kind(path, redundant)
        unused = kind not in ("data", "assets") or not (
            path in kept or PurePosixPath(path).stem in asset_roots
        )
        if kind and unused:
            report.add(kind, path, info)
    if not dry_run:
        for catalog in catalogs.values():
            hide(storage, catalog.stage, catalog.attempts_with_data(report.paths))
        storage.delete(report.paths)
    return report


def _kept_paths(catalogs: Mapping[str, Catalog], roots: Mapping[str, Set[str]]) -> set[str]:
    kept: set[str] = set()
    for stage, catalog in catalogs.items():
        keys = sorted(roots.get(stage, set()) & catalog.ok_keys())
        kept.update(path for path in catalog.select(keys)["data"].to_pylist() if path)
    return kept


def _redundant_paths(stage: str, attempts: Attempts) -> dict[str, str]:
    """Files whose rows are all in a catalog file that was read just now, with their kind."""
    manifests = {f"{manifest_folder(stage)}/{attempt}.parquet": "manifests" for attempt in attempts.covered}
    catalogs = {f"{catalog_folder(stage)}/{name}.parquet": "catalog" for name in attempts.superseded}
    return manifests | catalogs


def _kind(path: str, redundant: Mapping[str, Mapping[str, str]]) -> str | None:
    top, *rest = path.split("/")
    if path.endswith(PARTIAL_SUFFIX):
        return "partial"
    if top == ASSETS:
        return "assets"
    if top == TASKS or (top == "runs" and rest[1:2] == ["jobs"]):
        return "tasks"  # results and orders of shards, which nobody waits for so long
    if top not in ("stages", "catalog"):
        return None
    stage = rest[0]
    if path.startswith(f"{claim_folder(stage)}/"):
        return "claims"
    return "data" if path.startswith(f"{data_folder(stage)}/") else redundant[stage].get(path)
