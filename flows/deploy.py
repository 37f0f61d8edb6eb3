"""What is registered on a Prefect server: the work pool, and deployments whose runs render on one machine."""

from contextlib import suppress
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any
from uuid import UUID

from avatar_core.errors import AvatarError, ConfigError
from flows.names import POOL, render_queue
from flows.run_form import RunForm

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

FLOW = "render-dataset"
ENTRYPOINT = "flows.render.render_dataset"
COMMAND = "avatar execute"
"""What a worker starts for each run: see `flows.worker`."""
POOL_TYPE = "process"
SCHEDULER_S = 1.0
"""More than the server's scheduler takes from reading a schedule to writing its runs."""
SCHEDULED_EVERY = timedelta(minutes=1)
"""So often the scheduler writes down what is due next: a run that is due sooner must stay."""
ON_DEMAND = "on-demand"
"""Tag of the deployment that each machine has."""

_ABOUT_HOST = """\
Render a table now, on `{host}`: *Run*, *Custom run*.

Fill in `table` or `batch`; every other field may stay as it is. Paths are those of `{host}`, relative ones
begin in `{folder}`. What was rendered before costs nothing.

Parameters stay in the server's database: no passwords or keys in them.
"""
_ABOUT_BATCH = """\
Renders `{what}` on `{host}`.

Made by `avatar deploy` in `{folder}`, where relative paths begin. The same command changes it, and removes it
with `--remove`.
"""


def register_host(client: "SyncPrefectClient", host: str, folder: Path | None = None) -> UUID:
    """The deployment called as this machine, made or brought up to date where that is needed.

    `folder` is where relative paths of its runs begin. Without it that stays as it is, at first the working
    directory. What somebody changed in the browser, such as default parameters or a schedule, stays too.
    """
    from prefect.client.schemas.actions import DeploymentUpdate

    ensure_pool(client)
    found = _find(client, host)
    if found is None:
        return _create_host(client, host, folder or Path.cwd())
    variables = {**found.job_variables, **({"working_dir": str(folder)} if folder else {})}
    place = variables.get("working_dir", Path.cwd())
    wanted = {
        **_bound(host),
        "tags": [ON_DEMAND],
        "description": _ABOUT_HOST.format(host=host, folder=place),
        "job_variables": {**variables, "working_dir": str(place)},
    }
    if any(getattr(found, name) != value for name, value in wanted.items()):
        client.update_deployment(found.id, DeploymentUpdate.model_validate(wanted))
    return found.id


def remove_host_deployment(client: "SyncPrefectClient", host: str) -> None:
    """What `register_host` made, if it is there."""
    found = _find(client, host)
    if found and ON_DEMAND in found.tags:
        client.delete_deployment(found.id)


def deploy_batch(
    client: "SyncPrefectClient",
    host: str,
    name: str,
    form: RunForm,
    folder: Path,
    *,
    cron: str | None = None,
    timezone: str = "UTC",
    paused: bool = False,
) -> UUID:
    """The deployment `name`, whose runs do on this machine what `form` says.

    One that is there already gets all of this anew, its schedules too. Raises `ConfigError` where that is
    another machine's, or `cron` or `timezone` is wrong.
    """
    schedules = [_schedule(cron, timezone)] if cron else []
    ensure_pool(client)
    before = _find(client, name)
    _check_is_ours(before, name, host)
    what = form.batch or form.table or "rows"
    deployment = client.create_deployment(
        client.create_flow_from_name(FLOW),
        name,
        **_bound(host),
        schedules=schedules,
        parameters=form.filled_in(),
        paused=paused,
        tags=["batch"],
        description=_ABOUT_BATCH.format(what=what, host=host, folder=folder),
        job_variables={"working_dir": str(folder)},
    )
    if before is not None:
        _drop_planned(client, deployment)
    return deployment


def remove_batch(client: "SyncPrefectClient", host: str, name: str) -> None:
    """With the runs that it has scheduled; those that have begun stay. Raises `ConfigError` where there is no
    such deployment of this machine."""
    found = _find(client, name)
    if found is None:
        raise ConfigError(f"no deployment is called `{name}`; those there are: {_known(client)}")
    _check_is_ours(found, name, host)
    client.delete_deployment(found.id)


def _drop_planned(client: "SyncPrefectClient", deployment: UUID) -> None:
    """The server's scheduler may have read the schedule before just now, and writes its runs after the server
    has dropped them. Those of the new one it writes again within a minute."""
    from prefect.exceptions import ObjectNotFound

    sleep(SCHEDULER_S)
    soon = datetime.now(UTC) + 2 * SCHEDULED_EVERY
    for run in planned_runs(client, deployment):
        if run.expected_start_time and run.expected_start_time > soon:
            with suppress(ObjectNotFound):
                client.delete_flow_run(run.id)


def next_dates(client: "SyncPrefectClient", deployment: UUID, count: int = 3) -> list[datetime]:
    """When its next scheduled runs are due."""
    # The server's scheduler would do this within a minute.
    client.request(
        "POST", "/deployments/{id}/schedule", path_params={"id": deployment}, json={"min_runs": count}
    )
    planned = planned_runs(client, deployment)
    dates: list[datetime] = [run.expected_start_time for run in planned if run.expected_start_time]
    return dates[:count]


def planned_runs(client: "SyncPrefectClient", deployment: UUID) -> list["FlowRun"]:
    """The runs that its schedule has made, and that have not begun; the next one first."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}}),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )
    return [run for run in runs if run.auto_scheduled]


def ensure_pool(client: "SyncPrefectClient") -> None:
    """Only the command in its template is ours to keep: what else somebody changed there stays."""
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        _create_pool(client)
        return
    if pool.type != POOL_TYPE:
        raise AvatarError(
            f"the work pool `{POOL}` of the Prefect server is of type {pool.type}, ours is of type "
            f"{POOL_TYPE}: delete that one"
        )
    template = _with_our_command(pool.base_job_template)
    if template != pool.base_job_template:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def _create_pool(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = _with_our_command(ProcessWorker.get_default_base_job_template())
    about = "Renders, and the shards of their GPU stages, on all machines of this server."
    pool = WorkPoolCreate(name=POOL, type=POOL_TYPE, description=about, base_job_template=template)
    with suppress(ObjectAlreadyExists):  # another machine was faster
        client.create_work_pool(pool)


def _with_our_command(template: dict[str, Any]) -> dict[str, Any]:
    changed = deepcopy(template)
    changed["variables"]["properties"]["command"]["default"] = COMMAND
    return changed


def _create_host(client: "SyncPrefectClient", host: str, folder: Path) -> UUID:
    return client.create_deployment(
        client.create_flow_from_name(FLOW),
        host,
        **_bound(host),
        tags=[ON_DEMAND],
        description=_ABOUT_HOST.format(host=host, folder=folder),
        job_variables={"working_dir": str(folder)},
    )


def _bound(host: str) -> dict[str, Any]:
    """What makes a deployment one of the render flow on this machine; its queue is made with it."""
    from prefect.utilities.callables import parameter_schema

    return {
        "work_pool_name": POOL,
        "work_queue_name": render_queue(host),
        "entrypoint": ENTRYPOINT,
        "parameter_openapi_schema": parameter_schema(RunForm).model_dump_for_openapi(),
        "enforce_parameter_schema": True,
    }


def _schedule(cron: str, timezone: str) -> "DeploymentScheduleCreate":
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        schedule = CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        if error.errors()[0]["loc"] == ("timezone",):
            problem = f"--timezone {timezone}: no such time zone; give one such as Europe/Berlin"
        else:
            problem = (
                f"--cron '{cron}': give minute, hour, day, month and day of the week, such as '0 2 * * *' "
                "for every night at two"
            )
        raise ConfigError(problem) from None
    return DeploymentScheduleCreate(schedule=schedule, slug="avatar")


def _find(client: "SyncPrefectClient", name: str) -> "DeploymentResponse | None":
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(f"{FLOW}/{name}")
    except ObjectNotFound:
        return None


def _check_is_ours(found: "DeploymentResponse | None", name: str, host: str) -> None:
    if found is None:
        return
    if ON_DEMAND in found.tags:
        raise ConfigError(f"`{name}` is what a machine is called on the server; choose another --name")
    if (found.work_pool_name, found.work_queue_name) != (POOL, render_queue(host)):
        raise ConfigError(
            f"there is a deployment `{name}` already, of queue {found.work_queue_name} in work pool "
            f"{found.work_pool_name}, which is not this machine's; choose another --name, or delete that one"
        )


def _known(client: "SyncPrefectClient") -> str:
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])))
    return ", ".join(sorted(each.name for each in found if ON_DEMAND not in each.tags)) or "none yet"
