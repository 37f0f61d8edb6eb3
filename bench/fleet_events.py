"""What happens to a fleet during a drill."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from flows.postgres import running_postgres
from tests.flows.fleet import Machine
from tests.processes import kill_tree, until

if TYPE_CHECKING:
    from fleet_drill import Course, Drill

STOPPED_S = 120.0
RETURN_S = 180.0
SETTLE_S = 0.4
"""For what a lane that was stopped has just told the server."""
AT_WORK_S = 20.0
"""To wait for a lane to have a shard at work before it is struck."""


@dataclass
class Event:
    """`at_s` is when it struck the lane of `queue`, where it struck one."""

    kind: str
    at_s: float
    queue: str = ""
    notes: list[str] = field(default_factory=list)


Act = Callable[["Drill", "Course"], Event]


def kill_lane(drill: "Drill", course: "Course") -> Event:
    machine, number, pid = _halted(drill, course)
    event = Event("lane killed", time.time(), f"{machine.name}-gpu-{number}")
    _kill(pid)
    return event


def kill_child(drill: "Drill", course: "Course") -> Event:
    machine, number = _at_work(drill, course)
    pid = machine.child(number)
    event = Event("child killed", time.time(), f"{machine.name}-gpu-{number}")
    _kill(pid)
    return event


def kill_dispatcher(drill: "Drill", course: "Course") -> Event:
    event = Event("dispatcher killed", time.time())
    kill_tree(course.process)
    course.start()
    return event


def kill_server(drill: "Drill", course: "Course") -> Event:
    """It is started again by what serves the queues of its machine."""
    event = Event("server killed", time.time())
    _kill(drill.server_pid)
    _await_return(drill, course, event)
    return event


def kill_postgres(drill: "Drill", course: "Course") -> Event:
    event = Event("PostgreSQL killed", time.time())
    _kill(running_postgres(drill.fleet.here.folder / "state"))
    _await_return(drill, course, event)
    return event


def _await_return(drill: "Drill", course: "Course", event: Event) -> None:
    def is_back() -> bool:
        course.watch(0)
        with suppress(httpx.HTTPError, OSError, ValueError):
            drill.fleet.api.queue(f"{drill.fleet.here.name}-gpu-0")
            return True
        return False

    time.sleep(0.3)
    until(is_back, patience_s=RETURN_S, every_s=0.2)
    event.notes.append(f"back after {time.time() - event.at_s:.1f} s")


def stop_lane(drill: "Drill", course: "Course") -> Event:
    """As a machine that is suspended, or hangs."""
    machine, number, pid = _halted(drill, course)
    event = Event("lane stopped", time.time(), f"{machine.name}-gpu-{number}")
    if pid:
        try:
            course.watch(STOPPED_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        event.notes.append(f"resumed after {time.time() - event.at_s:.0f} s")
    return event


def pause_queue(drill: "Drill", course: "Course") -> Event:
    machine, number = _at_work(drill, course)
    queue = f"{machine.name}-gpu-{number}"
    event = Event("queue paused", time.time(), queue)
    drill.fleet.api.pause(queue)
    try:
        course.watch(drill.random.uniform(3.0, 8.0))
    finally:
        drill.fleet.api.pause(queue, paused=False)
    return event


def join_machine(drill: "Drill", course: "Course") -> Event:
    event = Event("gamma joined", time.time())
    drill.fleet.join("gamma", 1)
    event.notes.append(f"served after {time.time() - event.at_s:.1f} s")
    return event


def _at_work(drill: "Drill", course: "Course") -> tuple[Machine, int]:
    """A GPU that has a shard at work, any one if none is."""
    places = [(machine, n) for machine in drill.fleet.machines for n in range(drill.gpus_of(machine))]
    drill.random.shuffle(places)

    def busy() -> tuple[Machine, int] | None:
        course.watch(0)
        running = _running(drill)
        return next(((m, n) for m, n in places if f"{m.name}-gpu-{n}" in running and m.lane(n)), None)

    with suppress(AssertionError):
        return until(busy, patience_s=AT_WORK_S, every_s=0.05) or places[0]
    return places[0]


def _halted(drill: "Drill", course: "Course") -> tuple[Machine, int, int | None]:
    """A lane that was stopped with a shard at work, which might else end before it is struck."""

    def halted() -> tuple[Machine, int, int] | None:
        machine, number = _at_work(drill, course)
        if pid := machine.lane(number):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(SETTLE_S)
            if f"{machine.name}-gpu-{number}" in _running(drill):
                return machine, number, pid
            os.kill(pid, signal.SIGCONT)
        return None

    with suppress(AssertionError):
        return until(halted, patience_s=AT_WORK_S, every_s=0.05) or (*_at_work(drill, course), None)
    return (*_at_work(drill, course), None)


def _running(drill: "Drill") -> set[str]:
    with suppress(httpx.HTTPError):
        state = {"state": {"type": {"any_": ["RUNNING"]}}}
        return {run["work_queue_name"] for run in drill.fleet.api.shards(flow_runs=state)}
    return set()


def _kill(pid: int | None) -> None:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def moments(generator: random.Random, count: int, clips: int) -> Sequence[int]:
    """Numbers of clips through the GPU stage at which something happens."""
    return sorted(generator.randint(max(1, clips // 20), int(clips * 0.8)) for _ in range(count))
