"""Which lanes may compute a batch, and which are left out of it, by name and with the reason."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from prefect.client.orchestration import get_client

from avatar_core.execution.worker import PACKAGE_VERSION
from avatar_core.planning.batch import Batch
from avatar_core.store.storage import names_secret
from flows.deploy import ensure_pool
from flows.lane_info import LaneInfo
from flows.lanes import Dispatch, Lanes, LaneWorker, ensure_shard_deployment
from flows.names import host_name
from flows.work import Work


@contextmanager
def lanes_for(work: Work, on_lane: Callable[[str, LaneWorker], None]) -> Iterator[Lanes | None]:
    """None where no lane takes part and GPU work is this machine's own matter."""
    batch = work.batch
    if not _has_gpu_work(batch):
        yield None
        return
    with get_client(sync_client=True) as client:
        ensure_pool(client)
        deployment = ensure_shard_deployment(client)
    storage = batch.config.storage
    dispatch = Dispatch(
        work.record.id,
        deployment,
        batch.storage,
        storage.root if "://" in storage.root else str(Path(storage.root).expanduser().resolve()),
        public_options(storage.options),
        batch.clip_of,
        batch.config.runtime.priority,
    )
    with Lanes(dispatch, lambda info: unfit(info, batch), on_lane, work.observer.warning) as lanes:
        yield lanes if lanes.names else None


def unfit(lane: LaneInfo, batch: Batch) -> str | None:
    """Why this lane cannot compute for the batch."""
    if lane.package != PACKAGE_VERSION:
        return (
            f"it has avatar-dataset {lane.package}, this run {PACKAGE_VERSION}; install the same in both and "
            "start the lane anew"
        )
    if batch.storage.is_local and lane.host != host_name():
        return (
            f"it is on machine {lane.host}, and the store {batch.storage.uri} on the disk of {host_name()}; "
            "give a storage.root that both reach, such as s3://BUCKET/FOLDER"
        )
    options = batch.backend.options()
    stages = [stage for stage in batch.backend.own_stages() if stage.device_kind == "gpu"]
    needed = [name for stage in stages for name in stage.weight_names(options.get(stage.name))]
    if missing := lane.lacks(needed):
        return (
            f"its machine lacks the weights {', '.join(missing)}; run `avatar weights fetch` there and start "
            "the lane anew"
        )
    return None


def _has_gpu_work(batch: Batch) -> bool:
    gpu = [name for name, stage in batch.stages.items() if stage.device_kind == "gpu"]
    plan = batch.plan()
    return bool(gpu) and (not batch.is_complete or any(plan[name].to_do for name in gpu if name in plan))


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a store without credentials, which the server would keep: each machine has its own."""
    return {name: _public(value) for name, value in options.items() if not names_secret(name)}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_options(value)
    if isinstance(value, str) and "://" in value:
        url = urlsplit(value)
        place = url.netloc.rpartition("@")[2]
        return urlunsplit((url.scheme, place, url.path, "", ""))
    return value
