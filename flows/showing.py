"""A run at work, and beside it the flow that shows it on a Prefect server.

The work waits for no server, and neither does its end: one that went away gets `REPORT_S` and is then left
behind, however long Prefect's own client would go on trying.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from avatar_core.errors import AvatarError, ConfigError
from flows.execution import Execution
from flows.server import answers, server_environment

if TYPE_CHECKING:
    from avatar_core.batch import Batch
    from avatar_core.pipeline import Result
    from flows.terminal import View

HEAD_START_S = 2.0
REPORT_S = 10.0
_THREAD = "showing"


def run_shown(batch: "Batch", run_id: str, view: "View", stopped: Callable[[], bool]) -> "Result":
    """Begins the work at once; Prefect shows it from when it is there.

    Raises what the work ended with, and `ConfigError` where the user's own server does not answer.
    """
    with Execution(batch, run_id, view, stopped) as execution:
        showing = _Showing(execution, view)
        showing.start()
        try:
            result = execution.result()
        except Exception:
            showing.end(stopped)
            raise
        showing.end(stopped)
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
            with self._server() as missing:
                if missing:
                    self._view.warning(f"{missing}; the batch goes on without it")
                else:
                    self._show()
        except AvatarError as error:
            self._refusal = error
            self._execution.stop()

    def _show(self) -> None:
        from flows.render import flow_parameters, handed_over, render_dataset

        execution = self._execution
        try:
            with handed_over(execution):
                named = render_dataset.with_options(flow_run_name=execution.run_id)
                named(**flow_parameters(execution.batch.config, execution.run_id), return_state=True)
        except Exception as error:
            lost = "was not told of the end" if execution.ended else "does not show this run, which goes on"
            self._view.warning(f"the Prefect server {lost}: {error}")

    @contextmanager
    def _server(self) -> Iterator[AvatarError | None]:
        """That of the user, of `avatar up`, or one for this run alone; gives why that one is missing."""
        from flows.prefect_client import load_prefect
        from flows.temporary_server import TemporaryServer
        from tasks import set_prefect_defaults

        os.environ.update(server_environment())
        set_prefect_defaults()
        if (
            "PREFECT_API_URL" in os.environ
        ):  # soon there: on few cores it would slow down the start of the queues
            self._execution.wait_until_under_way(HEAD_START_S)
        try:
            load_prefect()
        except AvatarError as error:
            yield error
            return
        from prefect.settings import PREFECT_API_URL, temporary_settings

        # Its own log goes to its server; here the view shows what counts.
        logging.getLogger("prefect").propagate = logging.getLogger().isEnabledFor(logging.INFO)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        if url := PREFECT_API_URL.value():
            self._url = url
            _check_server(url)
            yield None
            return
        with TemporaryServer() as server:
            import flows.render  # takes as long as the server does

            try:
                self._url = server.wait()
            except AvatarError as error:
                yield error
                return
            with temporary_settings({PREFECT_API_URL: self._url}):
                yield None
                flows.render.send_what_is_left()

    def end(self, stopped: Callable[[], bool]) -> None:
        """Waits while the server answers, and `REPORT_S` for one that does not. Ctrl-C ends the waiting."""
        was_stopped, deadline_s = stopped(), time.monotonic() + REPORT_S
        while self.is_alive() and time.monotonic() < deadline_s and stopped() == was_stopped:
            self.join(0.2)
            if self._url is None or answers(self._url):  # None: it is being started
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
