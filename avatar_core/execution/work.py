"""What is to do in a plan, as arrays for the schedule."""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from avatar_core.execution.graph import StageInfo
from avatar_core.execution.schedule import Shard
from avatar_core.planning.batch import Batch
from avatar_core.planning.estimate import seconds_per_work
from avatar_core.planning.plan import Items, StagePlan
from avatar_core.stages.base import ItemSpec


class Work:
    """The items of a plan that are to do, numbered through all stages, as arrays for the schedule."""

    def __init__(self, plan: Mapping[str, StagePlan]) -> None:
        self._to_do = {stage: stage_plan.to_do for stage, stage_plan in plan.items() if stage_plan.to_do}
        counts = [len(to_do) for to_do in self._to_do.values()]
        ends = np.cumsum(counts, dtype=int).tolist()
        self._first = dict(zip(self._to_do, [0, *ends], strict=False))
        self.stage_of = np.repeat(np.arange(len(counts), dtype=np.intc), counts)

    @property
    def stages(self) -> list[str]:
        return list(self._to_do)

    @property
    def work(self) -> NDArray[np.float64]:
        return np.concatenate([np.empty(0), *(to_do.work for to_do in self._to_do.values())])

    @property
    def edges(self) -> NDArray[np.intc]:
        """Producer and consumer, shape (m, 2)."""
        edges = [np.empty((0, 2), np.intc)]
        of_clips = {stage: items for stage, items in self._to_do.items() if isinstance(items, Items)}
        for stage, to_do in of_clips.items():
            consumed = to_do.inputs
            for upstream in (name for name in of_clips if name in consumed):
                places = to_do.places_in(of_clips[upstream])
                consumers = np.flatnonzero(places >= 0)
                pair = places[consumers] + self._first[upstream], consumers + self._first[stage]
                edges.append(np.stack(pair, axis=1).astype(np.intc))
        return np.concatenate(edges)

    def specs(self, shard: Shard) -> list[ItemSpec]:
        to_do, first = self._to_do[shard.stage], self._first[shard.stage]
        return [to_do[item - first] for item in shard.items]

    def numbers(self, stage: str, keys: Collection[str]) -> dict[str, int]:
        """Those of the items of these keys, as far as they are to do."""
        if stage not in self._to_do or not keys:
            return {}
        places = self._to_do[stage].places(keys)
        return {key: self._first[stage] + place for key, place in places.items()}

    def stage_infos(self, batch: Batch) -> list[StageInfo]:
        """What the schedule must know of each stage."""
        return [self._stage_info(batch, name) for name in self.stages]

    def _stage_info(self, batch: Batch, name: str) -> StageInfo:
        stage = batch.stages[name]
        has_model = bool(stage.weights(self._to_do[name][0].config))
        return StageInfo(
            name,
            stage.device_kind,
            name if has_model else "",
            seconds_per_work(batch, name),
            stage.max_items,
            opens_clips=name in batch.sources.stages,
        )
