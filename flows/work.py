"""What is to do in a plan, as arrays for the schedule."""

from array import array
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from avatar_core.plan import StagePlan
from avatar_core.schedule import Shard
from avatar_core.stages.base import ItemSpec


class Work:
    """The items of a plan that are to do, numbered through all stages, as arrays for the schedule.

    `edges` has shape (m, 2), producer and consumer.
    """

    def __init__(self, plan: Mapping[str, StagePlan]) -> None:
        self._to_do = {stage: stage_plan.to_do for stage, stage_plan in plan.items() if stage_plan.to_do}
        self._first: dict[str, int] = {}
        keys: dict[str, NDArray[np.int64]] = {}
        work, stage_of, edges = array("d"), array("i"), [np.empty((0, 2), np.int64)]
        for position, (stage, to_do) in enumerate(self._to_do.items()):
            self._first[stage] = len(work)
            columns = _Columns(len(work))
            for spec in to_do:
                columns.add(spec)
            work.extend(columns.work)
            stage_of.extend([position] * len(to_do))
            keys[stage] = np.asarray(columns.keys)
            edges += [columns.edges(upstream, keys[upstream], self._first[upstream]) for upstream in keys]
        self.work, self.stage_of = np.asarray(work), np.asarray(stage_of)
        self.edges = np.concatenate(edges)

    @property
    def stages(self) -> list[str]:
        return list(self._to_do)

    def specs(self, shard: Shard) -> list[ItemSpec]:
        to_do, first = self._to_do[shard.stage], self._first[shard.stage]
        return [to_do[item - first] for item in shard.items]

    def example(self, stage: str) -> ItemSpec:
        return self._to_do[stage][0]


class _Columns:
    """Items of one stage as numbers: a key is its 64-bit hash, since a million strings take memory."""

    def __init__(self, first: int) -> None:
        self.keys, self.work = array("q"), array("d")
        self._first = first
        self._consumers: dict[str, array[int]] = {}
        self._consumed: dict[str, array[int]] = {}

    def add(self, spec: ItemSpec) -> None:
        number = self._first + len(self.keys)
        self.keys.append(hash(spec.key))
        self.work.append(spec.work)
        for stage, keys in spec.inputs.items():
            consumers = self._consumers.setdefault(stage, array("q"))
            consumed = self._consumed.setdefault(stage, array("q"))
            for key in keys:
                consumers.append(number)
                consumed.append(hash(key))

    def edges(self, upstream: str, keys: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        consumed = np.asarray(self._consumed.get(upstream, array("q")))
        consumers = np.asarray(self._consumers.get(upstream, array("q")))
        order = np.argsort(keys)
        places = np.minimum(np.searchsorted(keys, consumed, sorter=order), len(keys) - 1)
        producers = order[places]
        to_do = keys[producers] == consumed
        return np.stack([producers[to_do] + first, consumers[to_do]], axis=1)
