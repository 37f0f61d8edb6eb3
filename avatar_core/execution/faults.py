"""What may go wrong beside the items themselves, and whose fault it is."""

import builtins
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from avatar_core import errors
from avatar_core.errors import BackendError, StoreError
from avatar_core.execution.worker import JobResult
from avatar_core.stages.base import ItemSpec

MAX_DEATHS = 3
"""Deaths of workers that one item may cause, or one worker have outside of any item."""
MAX_GIVEN_UP = 3
"""Shards in a row that no retry could save before the run ends: then nothing works, not only they."""


@dataclass(frozen=True)
class Verdict:
    """On the items that a shard left over: `failed` get a row, those `set_aside` wait for the next pass, the
    others are tried again."""

    failed: Sequence[ItemSpec] = ()
    set_aside: Sequence[ItemSpec] = ()


@dataclass
class Trouble:
    """What went wrong so far, and what is set aside until the next pass."""

    deaths: Counter[str] = field(default_factory=Counter)  # by item key, or worker
    given_up_workers: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)  # why workers were given up
    damaged: set[str] = field(default_factory=set)  # `<stage>:<key>` of stored results
    fatal: errors.AvatarError | None = None
    _given_up: int = 0  # shards, since the last one that went well
    _told: set[str] = field(default_factory=set)

    def judge(self, result: JobResult, left: Sequence[ItemSpec], worker: str) -> Verdict:
        """Whose fault it is that a shard left these items over."""
        self.damaged.update(result.keys)
        damaged = [spec for spec in left if self.damaged.intersection(owners(spec))]
        if result.keys and not damaged:
            return Verdict(set_aside=left)
        failed: Sequence[ItemSpec] = ()
        if result.refused:
            self._leave_out(worker, result.refused)
        elif result.cancelled or result.keys or result.busy:
            pass
        elif result.died or result.hung:
            failed = self._blame(result, left, worker)
        elif result.error is None:
            self._given_up = 0
            for name in (worker, *(row["key"] for row in result.rows)):
                self.deaths.pop(name, None)
        elif passes_by_itself(result):
            failed = self._give_up(result, left)
        else:
            self.fatal = raised(result)
        return Verdict(failed, damaged)

    def tell_once(self, text: str, tell: Callable[[str], None]) -> None:
        if text not in self._told:
            self._told.add(text)
            tell(text)

    def _blame(self, result: JobResult, left: Sequence[ItemSpec], worker: str) -> Sequence[ItemSpec]:
        """An item that hangs, or has killed too many workers, fails; so does a worker that dies of itself."""
        culprit = result.last_item or worker
        self.deaths[culprit] += 1
        too_often = self.deaths[culprit] >= MAX_DEATHS
        if result.last_item is None:
            if too_often:
                self._leave_out(worker, result.error)
            return ()
        if not result.hung and not too_often:
            return ()
        return [spec for spec in left if spec.key == result.last_item]

    def _leave_out(self, worker: str, reason: str | None) -> None:
        if worker not in self.given_up_workers:
            self.given_up_workers.add(worker)
            self.reasons.append(f"worker {worker} is given up: {reason}")

    def _give_up(self, result: JobResult, left: Sequence[ItemSpec]) -> Sequence[ItemSpec]:
        self._given_up += 1
        if self._given_up >= MAX_GIVEN_UP:
            self.fatal = raised(result)
            return ()
        return left


def owners(spec: ItemSpec) -> set[str]:
    """The stored results that an item reads."""
    owners = {f"{stage}:{key}" for stage, keys in spec.inputs.items() for key in keys}
    return owners | {asset.owner for assets in spec.assets.values() for asset in assets}


def passes_by_itself(result: JobResult) -> bool:
    """Trouble with a network or disk; not damage, bad weights, or a fault of the code."""
    if result.error is None or result.keys or result.cancelled or result.died or result.hung:
        return False
    kind = getattr(builtins, result.error_type or "", None)
    return result.error_type == StoreError.__name__ or (isinstance(kind, type) and issubclass(kind, OSError))


def raised(result: JobResult) -> errors.AvatarError:
    kind = getattr(errors, result.error_type or "", BackendError)
    return kind(result.error) if issubclass(kind, errors.AvatarError) else BackendError(result.error)
