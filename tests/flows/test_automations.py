"""What the Prefect server does by itself: whom it tells, and which shards it gives up."""

import json
import queue
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from avatar_core.errors import ConfigError
from flows.automations import BACKSTOP, ensure_backstop, set_notifications
from flows.deploy import FLOW, register_host
from flows.prefect_client import prefect_client
from tests.flows.conftest import PrefectServer
from tests.processes import until

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = pytest.mark.timeout(240)

TOLD_OF = ["avatar: a render crashed", "avatar: a render failed", "avatar: a render is late"]
TOKEN = "T0ken-hunter2"
TOLD_S = 90.0
"""From what happens to the message of it, on a busy machine; a run is late after 15 s."""

Messages = queue.Queue[dict[str, Any]]


@pytest.fixture
def client(prefect_server: PrefectServer) -> "Iterator[SyncPrefectClient]":
    with prefect_client(f"{prefect_server.address}/api") as client:
        yield client
        set_notifications(client, None)


@pytest.fixture
def listener() -> Iterator[tuple[str, Messages]]:
    """An address that somebody reads, and what arrives there."""
    messages: Messages = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            messages.put({"path": self.path, **body})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *about: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook/{TOKEN}", messages
        server.shutdown()


def automations(server: PrefectServer) -> dict[str, dict[str, Any]]:
    found = server.post("automations/filter", {})
    ours = [each for each in found if each["name"].startswith("avatar: ")]
    assert len(ours) == len({each["name"] for each in ours})
    return {each["name"]: each for each in ours}


def blocks(server: PrefectServer) -> list[dict[str, Any]]:
    found = server.post("block_documents/filter", {})
    return [each for each in found if each["name"] == "avatar-notify"]


def run_in(client: "SyncPrefectClient", flow: str, state: Any, name: str) -> str:
    """A run of that flow, on the server only."""
    client.create_flow_from_name(flow)
    from prefect import Flow
    from prefect.states import Pending, Running

    run = client.create_flow_run(Flow(lambda: None, name=flow), name=name, state=Pending())
    client.set_flow_run_state(run.id, Running())
    client.set_flow_run_state(run.id, state)
    return str(run.id)


def test_notifications_are_set_changed_and_removed(
    prefect_server: PrefectServer, client: "SyncPrefectClient"
) -> None:
    set_notifications(client, f"https://example.org/hook?token={TOKEN}")
    first = automations(prefect_server)
    assert sorted(set(first) - {BACKSTOP}) == TOLD_OF
    set_notifications(client, f"https://example.org/hook?token={TOKEN}")
    assert automations(prefect_server) == first
    (kept,) = blocks(prefect_server)
    assert kept["block_type"]["slug"] == "custom-webhook"
    set_enabled(prefect_server, first[TOLD_OF[0]]["id"], False)
    set_notifications(client, "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ")
    second = automations(prefect_server)
    assert {name: each["id"] for name, each in second.items()} == {n: each["id"] for n, each in first.items()}
    assert second[TOLD_OF[0]]["enabled"]  # asked for again
    (kept,) = blocks(prefect_server)
    assert kept["block_type"]["slug"] == "slack-webhook"
    assert {second[name]["actions"][0]["block_document_id"] for name in TOLD_OF} == {kept["id"]}
    set_notifications(client, "")
    assert not set(automations(prefect_server)) & set(TOLD_OF)
    assert blocks(prefect_server) == []


def set_enabled(server: PrefectServer, automation: str, enabled: bool) -> None:
    url = f"{server.address}/api/automations/{automation}"
    httpx.patch(url, json={"enabled": enabled}, timeout=90).raise_for_status()


def test_the_address_is_nowhere_in_plain_text(
    prefect_server: PrefectServer, client: "SyncPrefectClient"
) -> None:
    for url in (f"https://example.org/hook?token={TOKEN}", f"json://me:{TOKEN}@example.org/hook"):
        set_notifications(client, url)
        shown = [blocks(prefect_server), automations(prefect_server)]
        assert TOKEN not in json.dumps(shown)
        database = [path.read_bytes() for path in Path(prefect_server.folder).rglob("prefect.db*")]
        assert database
        assert not any(TOKEN.encode() in content for content in database)


@pytest.mark.parametrize("url", ["example.org", "carrier-pigeon://example.org", "mailto://"])
def test_an_address_that_nobody_reads(client: "SyncPrefectClient", url: str) -> None:
    with pytest.raises(ConfigError, match="nobody can be told"):
        set_notifications(client, url)


@pytest.mark.drill
@pytest.mark.parametrize("through", ["a webhook", "Apprise"])
def test_somebody_is_told(
    prefect_server: PrefectServer,
    client: "SyncPrefectClient",
    listener: tuple[str, Messages],
    through: str,
) -> None:
    from prefect.states import Crashed, Failed, Scheduled

    url, messages = listener
    set_notifications(client, url if through == "a webhook" else url.replace("http://", "json://"))
    time.sleep(1)  # the server hears of its own automations a moment later
    run_in(client, "some-other-flow", Failed(message="not ours"), "other")
    failed = run_in(client, FLOW, Failed(message='3 of 5 clips "failed"'), "night-1")
    crashed = run_in(client, FLOW, Crashed(message="killed"), "night-2")
    deployment = register_host(client, "nobody")
    due = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(minutes=1))
    late = client.create_flow_run_from_deployment(deployment, name="night-3", state=due)
    texts = [_text(messages.get(timeout=TOLD_S)) for _ in range(3)]
    texts.sort()
    assert texts[0].startswith('night-1 failed\n3 of 5 clips "failed"')
    assert f"{prefect_server.address}/v2/runs/flow-run/{failed}" in texts[0]
    assert texts[1].startswith("night-2 crashed\nkilled")
    assert crashed in texts[1]
    assert texts[2].startswith("night-3 is late")
    assert str(late.id) in texts[2]
    assert messages.empty()
    set_notifications(client, "")
    client.delete_flow_run(late.id)
    run_in(client, FLOW, Failed(), "night-4")
    time.sleep(3)
    assert messages.empty()


def _text(message: dict[str, Any]) -> str:
    assert TOKEN in message["path"]
    return str(message.get("text") or f"{message['title']}\n{message['message']}")


# --- shards


def test_the_backstop_is_set_once_and_stays_off(
    prefect_server: PrefectServer, client: "SyncPrefectClient"
) -> None:
    ensure_backstop(client)
    made = automations(prefect_server)[BACKSTOP]
    assert made["trigger"]["within"] == 90
    ensure_backstop(client)
    assert automations(prefect_server)[BACKSTOP] == made
    set_enabled(prefect_server, made["id"], False)
    ensure_backstop(client)
    assert not automations(prefect_server)[BACKSTOP]["enabled"]
    set_enabled(prefect_server, made["id"], True)


@pytest.mark.drill
def test_a_shard_without_heartbeat_crashes(
    prefect_server: PrefectServer, client: "SyncPrefectClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that ended, whatever its state is called, or is of another flow, does not."""
    from prefect.states import Completed, Failed, Running

    monkeypatch.setattr("flows.automations.WITHOUT_HEARTBEAT", timedelta(seconds=12))
    ensure_backstop(client)
    time.sleep(1)
    runs = {
        name: run_in(client, flow, Running(), name)
        for name, flow in {"lost": "shard", "done": "shard", "bad": "shard", "render": FLOW}.items()
    }
    for name, run in runs.items():
        heartbeat(client, run, FLOW if name == "render" else "shard")
    client.set_flow_run_state(runs["done"], Completed())
    client.set_flow_run_state(runs["bad"], Failed(name="RowsFailed"))
    heartbeat(client, runs["done"], "shard")  # of a thread that had not heard of it
    until(lambda: state(prefect_server, runs["lost"]) == "CRASHED", patience_s=TOLD_S, every_s=0.5)
    time.sleep(5)
    ended = {name: state(prefect_server, run) for name, run in runs.items()}
    assert ended == {"lost": "CRASHED", "done": "COMPLETED", "bad": "FAILED", "render": "RUNNING"}
    monkeypatch.undo()
    ensure_backstop(client)
    assert automations(prefect_server)[BACKSTOP]["trigger"]["within"] == 90


def heartbeat(client: "SyncPrefectClient", run: str, flow: str) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [
            {
                "prefect.resource.id": f"prefect.flow.{client.create_flow_from_name(flow)}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": flow,
            }
        ],
        "id": str(uuid4()),
    }
    client.request("POST", "/events", json=[event])


def state(server: PrefectServer, run: str) -> str:
    return str(server.get(f"flow_runs/{run}")["state_type"])
