"""A render on a Prefect server: the flow runs beside the terminal, which waits for the dataset alone.

What the server still has to be told after that gets `REPORT_S`, and is then left behind, however long
Prefect's own client would go on trying.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from avatar_core.errors import Cancelled, ConfigError
from flows.names import host_name, render_queue
from flows.server import answers
from flows.work import Work, handed_over

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from avatar_core.result import Result
    from flows.terminal import View

REPORT_S = 10.0
ANSWER_S = 2.0
_THREAD = "flow"


def render_served(
    work: Work, view: "View", stopped: Callable[[], bool], show: Callable[["Result"], None]
) -> "Result":
    """`show` gets the result as soon as it is there. Raises what the work ended with, and `ConfigError` where
    the user's own server does not answer."""
    flow = _Flow(work)
    flow.start()
    try:
        result = work.outcome.result()
    except BaseException:
        flow.end(view, stopped, was_stopped=stopped())
        raise
    was_stopped = stopped()
    show(result)
    flow.end(view, stopped, was_stopped=was_stopped)
    return result


def is_left_behind() -> bool:
    """Whether a flow still tries to tell a server that went away: it would keep the process from ending."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class _Flow(threading.Thread):
    def __init__(self, work: Work) -> None:
        super().__init__(name=_THREAD, daemon=True)
        self._work = work
        self._url: str | None = None

    def run(self) -> None:
        try:
            self._connect()
            self._run_flow()
        except BaseException as error:
            self._work.fail(error)

    def _connect(self) -> None:
        from flows.prefect_client import connect

        url = connect()
        # Its own log goes to its server; here the view shows what counts.
        logging.getLogger("prefect").propagate = logging.getLogger().isEnabledFor(logging.INFO)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        logging.raiseExceptions = False  # Prefect would write into the view that its server takes no log
        _check_server(url)
        self._url = url

    def _run_flow(self) -> None:
        from prefect.exceptions import Abort, Pause
        from prefect.flow_engine import run_flow
        from prefect.states import Cancelled as CancelledState

        from flows.prefect_client import prefect_client
        from flows.render import flow_parameters, render_dataset

        with prefect_client() as client:
            flow_run = _create_flow_run(
                client, self._work, flow_parameters(self._work.batch.config, self._work.record.id)
            )
            # Else Prefect would watch, by a thread and a connection, whether the run is to be suspended, as
            # renders are not, and print tracebacks into the view where the server goes away.
            flow_run.deployment_id = None
            with handed_over(self._work), suppress(Abort, Pause):
                run_flow(
                    render_dataset, flow_run=flow_run, parameters=flow_run.parameters, return_type="state"
                )
            if not self._work.outcome.done():  # somebody cancelled it there before it had begun
                self._work.fail(Cancelled("cancelled on the server before it had begun"))
                client.set_flow_run_state(flow_run.id, CancelledState(), force=True)

    def end(self, view: "View", stopped: Callable[[], bool], *, was_stopped: bool) -> None:
        """Waits while the server answers, and `REPORT_S` for one that does not. Ctrl-C ends the waiting,
        unless that `was_stopped` before the work ended."""
        deadline_s = time.monotonic() + REPORT_S
        while self.is_alive() and time.monotonic() < deadline_s and stopped() == was_stopped:
            self.join(0.2)
            if self._url and answers(self._url, ANSWER_S):
                deadline_s = time.monotonic() + REPORT_S
        if self.is_alive():
            view.warning("the Prefect server does not answer; its pages miss the end of this run")


def _create_flow_run(client: Any, work: Work, parameters: dict[str, Any]) -> "FlowRun":
    """Of this machine's deployment, so that it can be retried and copied in the browser."""
    from prefect.states import Pending

    from flows.deploy import register_host

    host = host_name()
    run: FlowRun = client.create_flow_run_from_deployment(
        register_host(client, host),
        parameters=parameters,
        name=work.record.id,
        state=Pending(),
        work_queue_name=render_queue(host),
    )
    return run


def _check_server(url: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.prefect_client import without_login

    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:
        problem = error
    if problem:
        raise ConfigError(
            f"the Prefect server at {without_login(url)} does not answer ({problem}); start it, with `avatar "
            "up` if it is this machine's, or unset PREFECT_API_URL where that names it"
        )
