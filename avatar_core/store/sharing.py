"""Several runs on one store: each takes over what others have finished, and leaves alone what they are at."""

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from avatar_core.errors import StoreError
from avatar_core.store.arrivals import Arrivals, Row
from avatar_core.store.catalog import Catalog
from avatar_core.store.claims import LEASE_S, Claim, Claims
from avatar_core.store.storage import Storage

log = logging.getLogger(__name__)

WATCH_S, REMOTE_WATCH_S = 0.5, 3.0
"""How often the store is looked at for what other runs are at, on the average."""
REMOTE_AGE_S = 5.0
"""A listing costs on a remote store: a run that met no other lately, and lost no worker, is content with one
so old."""
COMPANY_S = 60.0
POLL_S = 0.2
NOTHING: Mapping[str, str] = MappingProxyType({})

OnSettled = Callable[[str, Mapping[str, Row], Set[str]], None]
"""`on_settled(stage, rows, free)`: awaited items are finished, or nobody's any longer."""


@dataclass(frozen=True)
class Taken:
    """Of a shard's items: those `found` in the store, those that others are at; the rest is claimed."""

    found: Mapping[str, Row]
    elsewhere: Set[str]
    claim: Claim | None

    @cached_property
    def others(self) -> Set[str]:
        return self.found.keys() | self.elsewhere


class Sharing:
    """One run's view of the others. While it is entered, a thread renews claims and calls `on_settled`.

    A store that cannot be reached is the shard's matter, which tells of it; here it only means to be alone.
    """

    def __init__(
        self,
        storage: Storage,
        catalogs: Mapping[str, Catalog],
        on_settled: OnSettled,
    ) -> None:
        self._claims = Claims(storage)
        self._arrivals = {stage: Arrivals(storage, catalog) for stage, catalog in catalogs.items()}
        self._on_settled = on_settled
        self._is_local = storage.is_local
        self._company_s = float("-inf")
        self._awaited: dict[str, set[str]] = {}
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Sharing":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(StoreError):
            self._claims.release_all()

    def take(self, stage: str, keys: Collection[str], continued: Mapping[str, str] = NOTHING) -> Taken:
        """To be called before a shard is run, and `release` once its results are committed.

        `continued` is the SHA-256 of the result that an item continues: none that others made from another
        counts, now or while the item is awaited.
        """
        claim: Claim | None = None
        found: dict[str, Row] = {}
        elsewhere: set[str] = set()
        self._arrivals[stage].expect(continued)
        with suppress(StoreError):
            claim = self._claims.claim(stage, keys)
            # What is released by now was committed before, so claims come first.
            held = self._held(stage)
            found = self._arrivals[stage].take(keys, self._max_age_s())
            elsewhere = held.intersection(keys) - found.keys()
            rest = frozenset(keys) - found.keys() - elsewhere
            if not rest:
                self._claims.release(claim)
                claim = None
            elif elsewhere:
                self._claims.reduce(claim, rest)
        return Taken(found, elsewhere, claim)

    def release(self, taken: Taken) -> None:
        if taken.claim:
            with suppress(StoreError):
                self._claims.release(taken.claim)

    def look_closely(self) -> None:
        """A worker was lost, which may have committed more than it has told."""
        self._company_s = time.monotonic()

    def committed(self, stage: str, keys: Iterable[str]) -> None:
        """This run has done these."""
        self._arrivals[stage].leave_out(keys)

    def watch(self, stage: str, keys: Collection[str]) -> None:
        """These are now awaited."""
        with self._changing:
            self._awaited.setdefault(stage, set()).update(keys)

    def _watch(self) -> None:
        mean_s = WATCH_S if self._is_local else REMOTE_WATCH_S
        reached_s = time.monotonic()
        # By chance, lest two runs that gave way to each other meet again and again.
        while not self._over.wait(random.uniform(0.5, 1.5) * mean_s):
            with self._changing:
                awaited = {stage: frozenset(keys) for stage, keys in self._awaited.items() if keys}
            try:
                self._claims.renew()
                for stage, keys in awaited.items():
                    self._look_for(stage, keys)
                reached_s = time.monotonic()
            except Exception as error:
                log.debug("what other runs do is not known", exc_info=error)
                if time.monotonic() - reached_s > LEASE_S:
                    for stage, keys in awaited.items():
                        self._settle(stage, {}, keys)

    def _look_for(self, stage: str, keys: Set[str]) -> None:
        held = self._held(stage)
        rows = self._arrivals[stage].take(keys)
        self._settle(stage, rows, keys - held - rows.keys())

    def _settle(self, stage: str, rows: Mapping[str, Row], free: Set[str]) -> None:
        with self._changing:
            self._awaited[stage] -= rows.keys() | free
        if rows or free:
            self._on_settled(stage, rows, free)

    def _held(self, stage: str) -> set[str]:
        held = self._claims.held(stage)
        if held:
            self._company_s = time.monotonic()
        return held

    def _max_age_s(self) -> float:
        alone = time.monotonic() - self._company_s > COMPANY_S
        return REMOTE_AGE_S if alone and not self._is_local else 0.0
