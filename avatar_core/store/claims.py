"""Claims: what a run has in flight, told to other runs on the same store so that they leave it alone.

Advice, not locks: a claim that is ignored, lost or outlived costs work done twice and never a result. A run
writes its claim before it looks at those of others, and gives way to any that it sees: of two runs that
claim the same item at the same moment at least one sees the other.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from avatar_core.errors import StoreError
from avatar_core.store.disk import FileInfo
from avatar_core.store.keys import new_id
from avatar_core.store.storage import Storage

LEASE_S = 30.0
"""A claim that was not renewed for so long is void."""
RENEW_S = 8.0


def claim_folder(stage: str) -> str:
    return f"stages/{stage}/claims"


@dataclass(eq=False)
class Claim:
    """`keys` of items that this process has in flight, for the process `asker` if it was given them."""

    path: str
    keys: Set[str]
    asker: str | None = None
    written_s: float = 0.0
    changing: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Foreign:
    """A claim of another run, last renewed at `renewed_s` of this process's monotonic clock."""

    owner: str
    asker: str | None
    keys: Set[str]
    info: FileInfo
    renewed_s: float

    @property
    def holds(self) -> bool:
        return time.monotonic() - self.renewed_s < LEASE_S and not _is_gone(self.owner)


class Claims:
    """Those of one run, whose threads share it. Raises `StoreError` where the store cannot be reached."""

    def __init__(self, storage: Storage, owner: str | None = None) -> None:
        self._storage = storage
        self._owner = owner or this_process()
        self._own: dict[str, Claim] = {}
        self._foreign: dict[str, dict[str, _Foreign]] = {}  # by stage, then path
        self._looking = threading.Lock()

    def claim(self, stage: str, keys: Iterable[str], asker: str | None = None) -> Claim:
        claim = Claim(f"{claim_folder(stage)}/{new_id()}.json", frozenset(keys), asker)
        self._own[claim.path] = claim
        try:
            self._write(claim)
        except StoreError:
            del self._own[claim.path]
            raise
        return claim

    def reduce(self, claim: Claim, keys: Set[str]) -> None:
        """No more than these `keys` are claimed any longer."""
        claim.keys = keys
        self._write(claim)

    def release(self, claim: Claim) -> None:
        with claim.changing:
            try:
                self._storage.delete([claim.path])
            finally:
                self._own.pop(claim.path, None)

    def release_all(self) -> None:
        for claim in list(self._own.values()):
            self.release(claim)

    def renew(self) -> None:
        """What was not written for `RENEW_S` is written again."""
        for claim in list(self._own.values()):
            if time.monotonic() - claim.written_s > RENEW_S:
                self._write(claim)

    def held(self, stage: str) -> set[str]:
        """Keys that other runs have in flight.

        Not those of this process, where the thread that asks may be the one that has to end them, and not
        what others do for it.
        """
        with self._looking:
            before = self._foreign.get(stage, {})
            listed = self._storage.list(claim_folder(stage))
            read = {
                path: self._read(path, info, before.get(path))
                for path, info in listed.items()
                if path not in self._own
            }
            foreign = {path: claim for path, claim in read.items() if claim is not None}
            self._foreign[stage] = foreign
            gone = [path for path, claim in foreign.items() if _is_gone(claim.owner)]
            if gone:
                self._storage.delete(gone)
        others = [
            claim
            for claim in foreign.values()
            if claim.holds and self._owner not in (claim.owner, claim.asker)
        ]
        return {key for claim in others for key in claim.keys}

    def _write(self, claim: Claim) -> None:
        text = json.dumps({"owner": self._owner, "asker": claim.asker, "keys": sorted(claim.keys)})
        with claim.changing:
            if claim.path in self._own:  # not released meanwhile
                self._storage.write_bytes(claim.path, text.encode())
                claim.written_s = time.monotonic()

    def _read(self, path: str, info: FileInfo, before: _Foreign | None) -> _Foreign | None:
        """None for a claim that was released since it was listed, or cannot be read."""
        if before is not None and before.info == info:
            return before
        try:
            values = json.loads(self._storage.read_bytes(path))
            owner, asker, keys = str(values["owner"]), values.get("asker"), frozenset(values["keys"])
        except (StoreError, ValueError, KeyError, TypeError):
            return None
        # Clocks of machines differ: only how old a claim is at first sight is taken from them.
        age_s = max(0.0, time.time() - info.mtime) if before is None else 0.0
        return _Foreign(owner, asker, keys, info, time.monotonic() - age_s)


@contextmanager
def claimed(storage: Storage, stage: str, keys: Iterable[str], asker: str) -> Iterator[None]:
    """Claims what this process was given by another, whose own claim ends with it. A store that cannot be
    reached is for the work itself to tell of."""
    over = threading.Event()

    def hold() -> None:
        claims = Claims(storage)
        with suppress(StoreError):
            claims.claim(stage, keys, asker)
        while not over.wait(RENEW_S):
            with suppress(StoreError):
                claims.renew()
        with suppress(StoreError):
            claims.release_all()

    thread = threading.Thread(target=hold, name="claims", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def this_process() -> str:
    return f"{_this_machine()} {os.getpid()} {_start(str(os.getpid()))}"


def _is_gone(owner: str) -> bool:
    """Whether it was a process of this machine and has ended; of other machines nothing is known."""
    machine, pid, start = (*owner.split(" "), "", "")[:3]
    return machine == _this_machine() and _start(pid) != start


@cache
def _this_machine() -> str:
    """Since when it is up, and the container in which process numbers hold."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return new_id()


def _start(pid: str) -> str | None:
    """When a process was started, in the kernel's ticks; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
