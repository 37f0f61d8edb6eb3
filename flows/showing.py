"""A run at work, and beside it the flow that shows it on a Prefect server.

The work waits for no server, and neither does its end: one that went away gets `REPORT_S` and is then left
behind, however long Prefect's own client would go on trying.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from avatar_core.errors import AvatarError, ConfigError
from flows.execution import Execution
from flows.server import answers, server_environment

if TYPE_CHECKING:
    from avatar_core.planning.batch import Batch
    from avatar_core.planning.runs import RunRecord
    from avatar_core.result import Result
    from flows.terminal import View

HEAD_START_S = 2.0
REPORT_S = 10.0
_THREAD = "showing"


def run_shown(
    batch: "Batch",
    record: "RunRecord",
    view: "View",
    stopped: Callable[[], bool],
    show: Callable[["Result"], None],
) -> "Result":
    """Begins the work at once; the Prefect server shows it from when Prefect is imported, and is told of the
    end after `show` had the result.

    Raises what the work ended with, and `ConfigError` where the user's own server does not answer.
    """
    with Execution(batch, record, view, stopped) as execution:
        showing = _Showing(execution, view)
        showing.start()
        try:
            result = execution.result()
        except Exception:
            showing.end(stopped, was_stopped=stopped())
            raise
        was_stopped = stopped()
        show(result)
        showing.end(stopped, was_stopped=was_stopped)
        return result


def is_left_behind() -> bool:
    """Whether a flow still tries to tell a server that went away: it would keep the process from ending."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class _Showing(threading.Thread):
    def __init__(self, execution: Execution, view: "View") -> None:
        super().__init__(name=_THREAD, daemon=True)
        self._execution, self._view = execution, view
        self._refusal: AvatarError | None = None
        self._url: str | None = None

    def run(self) -> None:
        try:
            if missing := self._find_server():
                self._view.warning(f"{missing}; the batch goes on without it")
            else:
                self._show()
        except AvatarError as error:
            self._refusal = error
            self._execution.stop()

    def _show(self) -> None:
        execution = self._execution
        try:
            from flows.render import flow_parameters, handed_over, render_dataset

            with handed_over(execution):
                named = render_dataset.with_options(flow_run_name=execution.run_id)
                named(**flow_parameters(execution.batch.config, execution.run_id), return_state=True)
        except Exception as error:
            lost = "was not told of the end" if execution.ended else "does not show this run, which goes on"
            self._view.warning(f"the Prefect server {lost}: {error}")

    def _find_server(self) -> AvatarError | None:
        """Waits until the user's server, or that of `avatar up`, can be told; gives why it cannot."""
        from flows.prefect_client import load_prefect
        from tasks import set_prefect_defaults

        os.environ.update(server_environment())
        set_prefect_defaults()
        self._execution.wait_until_under_way(HEAD_START_S)  # Prefect would slow down the start of the queues
        try:
            load_prefect()
        except AvatarError as error:
            return error
        from prefect.settings import PREFECT_API_URL

        # Its own log goes to its server; here the view shows what counts.
        logging.getLogger("prefect").propagate = logging.getLogger().isEnabledFor(logging.INFO)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._url = PREFECT_API_URL.value()
        if not self._url:
            return AvatarError("Prefect's settings name no server")
        _check_server(self._url)
        return None

    def end(self, stopped: Callable[[], bool], *, was_stopped: bool) -> None:
        """Waits while the server answers, and `REPORT_S` for one that does not. Ctrl-C ends the waiting,
        unless that `was_stopped` before the work ended."""
        deadline_s = time.monotonic() + REPORT_S
        while self.is_alive() and time.monotonic() < deadline_s and stopped() == was_stopped:
            self.join(0.2)
            if self._url is None or answers(self._url):  # None: Prefect is being imported
                deadline_s = time.monotonic() + REPORT_S
        if self._refusal:
            raise self._refusal
        if self.is_alive():
            self._view.warning("the Prefect server does not answer; its pages miss the end of this run")


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
            f"the Prefect server at {without_login(url)} does not answer ({problem}); start it, or unset "
            "PREFECT_API_URL"
        )
