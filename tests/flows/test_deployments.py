"""`prefect.yaml` and the worker that runs what it schedules."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from flows.deploy import register_host
from flows.prefect_client import prefect_client
from tests.flows.conftest import PrefectServer
from tests.processes import until
from tests.sample_rows import Rendered, RunAvatar, write_table

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RUN_S = 150.0
"""From a schedule's turn to the end of its run, on a busy machine."""
OVERRIDES = ["name='été [1]'", "limit=1", "video.fps=20"]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module", autouse=True)
def pool(prefect_server: PrefectServer) -> None:
    with prefect_client(f"{prefect_server.address}/api") as client:
        register_host(client, "here", ROOT)


@pytest.fixture(scope="module")
def deployments(prefect_server: PrefectServer) -> dict[str, Any]:
    """What `prefect deploy --all` makes of our own file, by name."""
    deploy(prefect_server, ROOT)
    return registered(prefect_server)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer, rendered: Rendered
) -> Path:
    """A user's folder with deployments of their own and, by bad luck, packages named as ours."""
    folder = tmp_path_factory.mktemp("user") / "renders"
    folder.mkdir()
    values = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    chosen = [entry for entry in values["deployments"] if entry["name"] == "nightly"]
    chosen[0] |= {
        "name": "often",
        "parameters": {"table": str(rendered.table), "overrides": OVERRIDES},
        "schedules": [{"interval": 5, "active": True}],
    }
    (folder / "prefect.yaml").write_text(yaml.safe_dump({"deployments": chosen}), encoding="utf-8")
    deploy(prefect_server, folder)
    for package in ("flows", "tasks", "avatar_core"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(f"raise RuntimeError('the wrong {package}')\n")
    return folder


@pytest.fixture(scope="module")
def worker(
    prefect_server: PrefectServer, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[bytes]]:
    """Started in that folder, without the environment's programs on PATH."""
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != BIN)
    settings = {"PATH": path, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    log = tmp_path_factory.mktemp("worker") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(BIN / "avatar"), "worker"],
            cwd=folder,
            env={**prefect_server.environment, **settings},
            stdout=output,
            stderr=output,
        )
        yield process
        process.kill()
        process.wait()


def deploy(server: PrefectServer, folder: Path) -> None:
    code, output = deploying(server, folder)
    assert code == 0, output


def deploying(server: PrefectServer, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(BIN / "prefect"), "--no-prompt", "deploy", "--all"],
        cwd=folder,
        env=server.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def registered(server: PrefectServer) -> dict[str, Any]:
    return {found["name"]: found for found in server.post("deployments/filter", {})}


def ended_run(server: PrefectServer, deployment: str) -> dict[str, Any]:
    wanted = {
        "deployments": {"name": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}},
        "sort": "START_TIME_ASC",
    }
    runs: list[dict[str, Any]] = until(
        lambda: server.post("flow_runs/filter", wanted), patience_s=RUN_S, every_s=0.3
    )
    return runs[0]


# --- our own file


@pytest.mark.drill
def test_all_are_registered(deployments: dict[str, Any]) -> None:
    assert {"nightly", "on-demand", "rerun-failures"} <= deployments.keys()
    for name in ("nightly", "on-demand", "rerun-failures"):
        found = deployments[name]
        assert found["entrypoint"] == "flows.render.render_dataset"
        assert (found["work_pool_name"], found["work_queue_name"]) == ("avatar", "default")
        assert not found["paused"]
        steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
        assert found["pull_steps"] == steps


@pytest.mark.drill
def test_schedules_wait_for_a_table(deployments: dict[str, Any]) -> None:
    for name in ("nightly", "rerun-failures"):
        assert deployments[name]["parameters"]["table"] == ""
        (schedule,) = deployments[name]["schedules"]
        assert schedule["active"] is False
        assert schedule["schedule"]["timezone"] == "UTC"
    nightly, rerun = (
        deployments[name]["schedules"][0]["schedule"]["cron"] for name in ("nightly", "rerun-failures")
    )
    assert int(nightly.split()[1]) < int(rerun.split()[1])
    assert deployments["rerun-failures"]["parameters"]["retry_failed"] is True
    forms = [deployments[name]["parameter_openapi_schema"]["properties"] for name in ("nightly", "here")]
    assert forms[0] == forms[1]


@pytest.mark.drill
def test_on_demand_renders_the_samples(deployments: dict[str, Any]) -> None:
    found = deployments["on-demand"]
    assert found["schedules"] == []
    assert (ROOT / found["parameters"]["table"]).exists()


@pytest.mark.drill
@pytest.mark.parametrize("package", ["flows", "tasks", "avatar_core"])
def test_a_folder_with_packages_named_as_ours_is_refused(
    prefect_server: PrefectServer, tmp_path: Path, package: str
) -> None:
    """Prefect reads the flow's parameters there; it must not take them from another program."""
    values = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    values["deployments"] = [values["deployments"][0] | {"name": f"beside-{package}"}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    code, output = deploying(prefect_server, tmp_path)
    assert code == 1
    assert re.search(rf"(No module named|cannot import name .*) '{package}\b", output), output
    assert f"beside-{package}" not in registered(prefect_server)


# --- the worker


@pytest.mark.drill
def test_a_schedule_fires(
    prefect_server: PrefectServer, folder: Path, worker: subprocess.Popen[bytes], rendered: Rendered
) -> None:
    """Runs with our packages, though the folder it runs in has others, and with its parameters intact."""
    run = ended_run(prefect_server, "often")
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert run["auto_scheduled"]
    assert run["parameters"] == {"table": str(rendered.table), "overrides": OVERRIDES}
    metadata = pd.read_parquet(folder / "avatar-store" / "datasets" / "été-1" / "metadata.parquet")
    assert metadata["fps"].tolist() == [20.0]
    assert metadata["status"].tolist() == ["ok"]


@pytest.mark.drill
def test_a_worker_that_is_stopped_lets_its_run_stop(
    prefect_server: PrefectServer, folder: Path, worker: subprocess.Popen[bytes], rendered: Rendered
) -> None:
    often = registered(prefect_server)["often"]["id"]
    prefect_server.post(f"deployments/{often}/pause_deployment", {})
    long = {"table": str(rendered.table), "overrides": ["name=long", "takes=100"]}
    run = prefect_server.post(f"deployments/{often}/create_flow_run", {"parameters": long})
    until(
        lambda: prefect_server.get(f"flow_runs/{run['id']}")["name"].startswith("long-"),
        [worker],
        RUN_S,
        every_s=0.3,
    )
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    state = prefect_server.get(f"flow_runs/{run['id']}")["state"]
    assert (state["type"], state["name"]) == ("CANCELLED", "Cancelled")
    assert not (folder / "avatar-store" / "datasets" / "long").exists()


def test_a_worker_needs_a_server(avatar: RunAvatar, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, output = avatar("worker")
    assert code == 2
    assert "there is no Prefect server: start one with `avatar up`, or set PREFECT_API_URL" in output


# --- one run


def test_execute_is_for_workers(avatar: RunAvatar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    code, output = avatar("execute")
    assert code == 2
    assert "start one with `avatar worker`" in output
    assert "execute" not in avatar("--help")[1]


@pytest.mark.drill
def test_a_run_with_bad_rows_ends_without_a_traceback(
    prefect_server: PrefectServer, deployments: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    rows = [{"image": str(inputs / "landscape.png"), "audio": str(inputs / "hello.wav")}]
    table = write_table(tmp_path / "bad.csv", rows)
    parameters = {"table": str(table), "overrides": [f"storage.root={tmp_path}"]}
    deployment = deployments["on-demand"]["id"]
    wanted = {"parameters": parameters, "state": {"type": "PENDING"}}  # no worker takes it
    run = prefect_server.post(f"deployments/{deployment}/create_flow_run", wanted)
    done = subprocess.run(
        [str(BIN / "avatar"), "execute"],
        env={**prefect_server.environment, "PREFECT__FLOW_RUN_ID": run["id"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert prefect_server.get(f"flow_runs/{run['id']}")["state_type"] == "FAILED"
    assert "1 of 1 clips failed" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.drill
def test_a_run_finds_batch_files_in_the_folder_that_its_worker_names(
    prefect_server: PrefectServer,
    deployments: dict[str, Any],
    rendered: Rendered,
    store: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "own/batch").mkdir(parents=True)
    settings = f"table: {rendered.table}\nname: night\nlimit: 1\nstorage: {{root: {store}}}\n"
    (tmp_path / "own/batch/night.yaml").write_text(settings)
    parameters = {"table": "", "batch": "night"}
    deployment = deployments["on-demand"]["id"]
    wanted = {"parameters": parameters, "state": {"type": "PENDING"}}  # no worker takes it
    run = prefect_server.post(f"deployments/{deployment}/create_flow_run", wanted)
    own = {"PREFECT__FLOW_RUN_ID": run["id"], "AVATAR_CONFIG_DIR": str(tmp_path / "own")}
    done = subprocess.run(
        [str(BIN / "avatar"), "execute"],
        env={**prefect_server.environment, **own},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    state = prefect_server.get(f"flow_runs/{run['id']}")["state_type"]
    assert state == "COMPLETED", done.stdout + done.stderr
    assert len(list(store.glob("datasets/night/videos/*.mp4"))) == 1


def test_a_run_with_another_flows_than_its_worker(tmp_path: Path) -> None:
    """As where a deployment's job variables bring another copy of the project onto the path."""
    for package in ("flows", "avatar_core"):
        shutil.copytree(ROOT / package, tmp_path / package)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PREFECT__FLOW_RUN_ID": "00000000-0000-0000-0000-000000000000",
        "AVATAR_FLOWS_PACKAGE": str(ROOT / "flows"),
    }
    done = subprocess.run(
        [str(BIN / "avatar"), "execute"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"the package `flows` of this run is {tmp_path / 'flows'}" in done.stderr
    assert f"that of its worker {ROOT / 'flows'}" in done.stderr
