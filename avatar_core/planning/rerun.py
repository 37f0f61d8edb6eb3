"""What of a recorded run is computed again."""

from collections.abc import Sequence

import pandas as pd

from avatar_core.backends.base import create_backend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import ConfigError
from avatar_core.planning.batch import open_storage
from avatar_core.planning.runs import find_run, plan_stages, read_plan, stage_keys
from avatar_core.store.catalog import drop, load_catalog
from avatar_core.store.storage import Storage


def rerun_config(config: Config, run: str, *, stage: str | None = None, only_failed: bool = False) -> Config:
    """The recorded configuration of a run, its failed items to be tried anew. `config` says where the store
    is and how this machine works.

    With `stage` the results of that stage and all after it are hidden first, for every clip or with
    `only_failed` for those that failed.
    """
    storage = open_storage(config)
    recorded = find_run(storage, run)
    if stage is not None:
        clips = read_plan(storage, recorded.id)
        stages = plan_stages(clips) or list(create_backend(recorded.config["backend"]).stages())
        if stage not in stages:
            raise ConfigError(
                f"unknown stage `{stage}`; choose one of: {', '.join(stages)}{nearest(stage, stages)}"
            )
        _drop_stages(storage, clips, stages[stages.index(stage) :], only_failed)
    values = {**recorded.config, "storage": config.storage, "runtime": config.runtime, "retry_failed": True}
    return parse(Config, values)


def _drop_stages(storage: Storage, clips: pd.DataFrame, stages: Sequence[str], only_failed: bool) -> None:
    if clips.empty:
        return
    if only_failed:
        finished = load_catalog(storage, "decode").ok_keys()
        clips = clips[~clips["decode_key"].isin(finished)]
    for stage in stages:
        drop(storage, stage, set(stage_keys(clips, stage)), load_catalog(storage, stage))
