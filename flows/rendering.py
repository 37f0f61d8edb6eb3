"""What `avatar render` does with a batch on this machine."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from avatar_core.config import Config
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import has_gpu, run_settings, workers_for
from avatar_core.execution.shard_call import in_this_thread
from avatar_core.execution.worker import InProcess
from avatar_core.origins import is_undecided
from avatar_core.pipeline import batch_run, begin_run, finish_run
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.runs import RunRecord
from avatar_core.progress import Observer
from avatar_core.result import Result
from flows.served import render_served
from flows.server import names_server
from flows.sources import take_in_sources, told_once
from flows.stopping import stoppable
from flows.terminal import create_view
from flows.work import Work

if TYPE_CHECKING:
    from flows.output import Destination


def render_shown(
    config: Config, console: Console, show: Callable[[Result], None], destination: "Destination | None" = None
) -> Result:
    """Where nothing is to do, no other process and no server is waited for. `show` gets the result as soon as
    it is there, whatever a server still has to be told."""
    with stoppable() as stopped, ExitStack() as shown:
        view = shown.enter_context(create_view(console))

        def show_alone(result: Result) -> None:
            shown.close()
            show(result)

        batch = open_batch(config, view)
        if destination or is_undecided(batch):
            take_in_sources(batch, view, stopped)
        if destination:
            destination.place(batch)
        to_do = any(planned.to_do for planned in batch.plan().values())
        is_served = to_do and names_server()
        record = begin_run(batch, elsewhere=is_served)
        if is_served:
            return render_served(Work(batch, record, view, stopped), view, stopped, show_alone)
        result = render_unshown(batch, record, view, stopped) if to_do else publish_again(batch, record, view)
        show_alone(result)
        return result


def render_unshown(
    batch: Batch, record: RunRecord, observer: Observer, cancelled: Callable[[], bool]
) -> Result:
    """In this thread and the processes of this machine: nothing is kept for anybody who might look on."""
    run = batch_run(batch, record, observer, cancelled)

    def drive() -> None:
        with workers_for(batch, run_settings(batch.config)) as workers:
            Coordinator(workers).drive(run)

    with told_once():
        return finish_run(batch, record, drive, observer)


def publish_again(batch: Batch, record: RunRecord, observer: Observer) -> Result:
    """Nothing is to do, unless a stored video turns out damaged."""
    run = batch_run(batch, record, observer, lambda: False, in_this_thread)
    with InProcess(gpu=has_gpu(batch.config)) as here:
        return finish_run(batch, record, partial(Coordinator({"here": here}).drive, run), observer)
