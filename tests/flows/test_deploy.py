"""Deployments that this project makes on a Prefect server by itself."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from avatar_core.errors import AvatarError, ConfigError
from flows.deploy import deploy_batch, next_dates, planned_runs, register_host, remove_batch
from flows.deploy_command import filled_form, local_timezone
from flows.prefect_client import prefect_client
from flows.run_form import RunForm
from tests.flows.conftest import PrefectServer
from tests.sample_rows import Rendered, RunAvatar

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def client(prefect_server: PrefectServer) -> "Iterator[SyncPrefectClient]":
    with prefect_client(f"{prefect_server.address}/api") as client:
        yield client


@pytest.fixture
def deploying(
    avatar: RunAvatar, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunAvatar]:
    """The command, on a machine of that name whose server is this one."""
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    api_url, pages = f"{prefect_server.address}/api", f"{prefect_server.address}/v2"
    monkeypatch.setenv("PREFECT_API_URL", api_url)
    monkeypatch.setenv("AVATAR_HOST", "here")
    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_UI_URL: pages}):
        yield avatar


def deployment(server: PrefectServer, name: str) -> dict[str, Any]:
    found = server.get(f"deployments/name/render-dataset/{name}")
    assert isinstance(found, dict)
    return found


def count_requests(client: "SyncPrefectClient") -> list[str]:
    seen: list[str] = []
    client._client.event_hooks["request"].append(lambda request: seen.append(request.method))
    return seen


# --- each machine's own


def test_a_machine_is_registered_once(
    prefect_server: PrefectServer, client: "SyncPrefectClient", tmp_path: Path
) -> None:
    first = register_host(client, "alpha", tmp_path)
    found = deployment(prefect_server, "alpha")
    assert (found["work_pool_name"], found["work_queue_name"]) == ("avatar", "alpha-render")
    assert (found["entrypoint"], found["enforce_parameter_schema"]) == ("flows.render.render_dataset", True)
    assert found["job_variables"] == {"working_dir": str(tmp_path)}
    assert str(tmp_path) in found["description"]
    assert "high" in found["parameter_openapi_schema"]["properties"]["preset"]["enum"]
    queue = prefect_server.get("work_pools/avatar/queues/alpha-render")
    assert (queue["concurrency_limit"], queue["is_paused"]) == (None, False)
    pool = prefect_server.get("work_pools/avatar")
    assert pool["type"] == "process"
    assert pool["base_job_template"]["variables"]["properties"]["command"]["default"] == "avatar execute"
    seen = count_requests(client)
    assert register_host(client, "alpha") == first
    assert register_host(client, "alpha", tmp_path) == first
    assert seen == ["GET"] * 4
    assert deployment(prefect_server, "alpha")["updated"] == found["updated"]


def test_what_somebody_changed_stays_and_what_is_ours_comes_back(
    prefect_server: PrefectServer, client: "SyncPrefectClient", tmp_path: Path
) -> None:
    from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolUpdate
    from prefect.client.schemas.schedules import CronSchedule

    made = register_host(client, "beta", tmp_path)
    client.create_deployment_schedules(made, [(CronSchedule(cron="0 2 * * *"), True)])
    changes = {"parameters": {"preset": "draft"}, "entrypoint": "old.flow", "tags": ["mine"]}
    client.update_deployment(made, DeploymentUpdate.model_validate(changes))
    template = client.read_work_pool("avatar").base_job_template
    variables = template["variables"]["properties"]
    variables["env"]["default"], variables["command"]["default"] = {"A": "b"}, None
    client.update_work_pool("avatar", WorkPoolUpdate(base_job_template=template))
    assert register_host(client, "beta", tmp_path / "moved") == made
    found = deployment(prefect_server, "beta")
    assert (found["entrypoint"], found["tags"]) == ("flows.render.render_dataset", ["on-demand"])
    assert (found["parameters"], len(found["schedules"])) == ({"preset": "draft"}, 1)
    assert found["job_variables"] == {"working_dir": str(tmp_path / "moved")}
    variables = client.read_work_pool("avatar").base_job_template["variables"]["properties"]
    assert (variables["env"]["default"], variables["command"]["default"]) == ({"A": "b"}, "avatar execute")


def test_the_form_is_what_the_server_holds_runs_to(
    prefect_server: PrefectServer, client: "SyncPrefectClient"
) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    made = register_host(client, "gamma")
    with pytest.raises(PrefectHTTPStatusError, match="Validation failed for field 'preset'"):
        client.create_flow_run_from_deployment(made, parameters={"table": "a.csv", "preset": "drafty"})
    whole = {name: field["default"] for name, field in _fields(prefect_server, "gamma").items()}
    run = client.create_flow_run_from_deployment(made, parameters={**whole, "table": "a.csv"})
    assert (run.work_queue_name, run.parameters["only"]) == ("gamma-render", [])
    client.delete_flow_run(run.id)


def _fields(server: PrefectServer, name: str) -> dict[str, Any]:
    fields = deployment(server, name)["parameter_openapi_schema"]["properties"]
    assert isinstance(fields, dict)
    return fields


# --- one's own batches


def test_what_the_scheduler_writes_of_a_replaced_schedule_is_dropped(
    client: "SyncPrefectClient", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[UUID] = []

    def meanwhile(seconds: float) -> None:
        next_dates(client, made)
        late.extend(run.id for run in planned_runs(client, made))

    made = deploy_batch(client, "alpha", "late", RunForm(table="/data/a.csv"), tmp_path, cron="0 2 * * *")
    monkeypatch.setattr("flows.deploy.sleep", meanwhile)
    deploy_batch(client, "alpha", "late", RunForm(table="/data/a.csv"), tmp_path, cron="0 3 * * *")
    assert late
    assert not {run.id for run in planned_runs(client, made)}.intersection(late)
    assert {date.hour for date in next_dates(client, made)} == {3}


def test_a_batch_is_deployed_again_in_its_place(
    prefect_server: PrefectServer, client: "SyncPrefectClient", tmp_path: Path
) -> None:
    form = RunForm(table="/data/a.csv", preset="draft", overrides=("video.fps=30",))
    first = deploy_batch(client, "alpha", "again", form, tmp_path, cron="0 2 * * *", timezone="Europe/Berlin")
    dates = next_dates(client, first)
    assert len(dates) == 3
    assert {date.astimezone(ZoneInfo("Europe/Berlin")).hour for date in dates} == {2}
    assert dates == sorted(dates)
    found = deployment(prefect_server, "again")
    assert found["parameters"] == {"table": "/data/a.csv", "preset": "draft", "overrides": ["video.fps=30"]}
    assert found["work_queue_name"] == "alpha-render"
    again = deploy_batch(client, "alpha", "again", RunForm(table="/data/b.csv"), tmp_path, cron="30 4 * * 1")
    assert again == first
    found = deployment(prefect_server, "again")
    assert [each["schedule"]["cron"] for each in found["schedules"]] == ["30 4 * * 1"]
    assert found["parameters"] == {"table": "/data/b.csv"}
    assert {(date.weekday(), date.hour) for date in next_dates(client, again)} == {(0, 4)}
    deploy_batch(client, "alpha", "again", form, tmp_path, cron="0 2 * * *", paused=True)
    assert deployment(prefect_server, "again")["paused"]
    deploy_batch(client, "alpha", "again", form, tmp_path)
    found = deployment(prefect_server, "again")
    assert (found["paused"], found["schedules"]) == (False, [])


def test_what_is_not_ours_stays(client: "SyncPrefectClient", tmp_path: Path) -> None:
    form = RunForm(table="/data/a.csv")
    register_host(client, "alpha")
    with pytest.raises(ConfigError, match="is what a machine is called"):
        deploy_batch(client, "alpha", "alpha", form, tmp_path)
    deploy_batch(client, "alpha", "taken", form, tmp_path)
    with pytest.raises(ConfigError, match="of queue alpha-render in work pool avatar"):
        deploy_batch(client, "beta", "taken", form, tmp_path)
    with pytest.raises(ConfigError, match="of queue alpha-render in work pool avatar"):
        remove_batch(client, "beta", "taken")
    with pytest.raises(ConfigError, match=r"no deployment is called `takne`; those there are: .*taken"):
        remove_batch(client, "alpha", "takne")
    remove_batch(client, "alpha", "taken")
    with pytest.raises(ConfigError, match="no deployment"):
        remove_batch(client, "alpha", "taken")


@pytest.mark.parametrize(
    ("cron", "zone", "complaint"),
    [
        ("every night", "UTC", "--cron 'every night': give minute, hour"),
        ("0 2 * * *", "Berlin", "--timezone Berlin: no such time zone"),
    ],
)
def test_schedules_that_cannot_be(
    client: "SyncPrefectClient", tmp_path: Path, cron: str, zone: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        deploy_batch(client, "alpha", "never", RunForm(table="a"), tmp_path, cron=cron, timezone=zone)


def test_a_pool_of_another_type_is_named(
    client: "SyncPrefectClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    client.create_work_pool(WorkPoolCreate(name="other", type="docker"))
    monkeypatch.setattr("flows.deploy.POOL", "other")
    with pytest.raises(AvatarError, match="`other` of the Prefect server is of type docker"):
        register_host(client, "alpha")


# --- words of the command


def test_words_fill_in_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVATAR_CONFIG_DIR", raising=False)
    words = ["t.csv", "preset=draft", "backend=preview", "storage.root=it's here", "video.fps=30"]
    assert filled_form(words, None) == RunForm(
        table=str(tmp_path / "t.csv"),
        preset="draft",
        backend="preview",
        overrides=(f"storage.root='{tmp_path}/it\\'s here'", "video.fps=30"),
    )
    assert filled_form(["night.yaml", "preset=mine"], Path("own")) == RunForm(
        batch=str(tmp_path / "night.yaml"), overrides=("preset=mine",), config_dir=str(tmp_path / "own")
    )
    assert filled_form(["batch=night", "table=s3://b/t.csv", "storage.root=s3://b/x"], None) == RunForm(
        table="s3://b/t.csv", batch="night", overrides=("storage.root='s3://b/x'",)
    )
    monkeypatch.setenv("AVATAR_CONFIG_DIR", "conf")
    assert filled_form(["batch=./n.yaml"], None) == RunForm(
        batch=str(tmp_path / "n.yaml"), config_dir=str(tmp_path / "conf")
    )


@pytest.mark.parametrize(
    "words",
    [
        ["t.csv", "storage.options.key=hunter2"],
        ["t.csv", "+storage.options={key: hunter2}"],
        ["t.csv", "storage={root: x, options: {key: hunter2}}"],
        ["https://me:hunter2@host/t.csv"],
        ["table=https://host/t.csv?signature=hunter2"],
        ["t.csv", "storage.root=s3://hunter2@bucket/x"],
    ],
)
def test_credentials_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="Prefect keeps and shows all parameters") as caught:
        filled_form(words, None)
    assert "hunter2" not in str(caught.value)


def test_the_time_zone_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    assert local_timezone() == "Europe/Berlin"
    monkeypatch.setenv("TZ", "nowhere/at all")
    assert ZoneInfo(local_timezone())


def test_the_command(
    deploying: RunAvatar,
    prefect_server: PrefectServer,
    rendered: Rendered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(rendered.table, tmp_path / "Night talks.csv")  # noqa: PTH211
    cron = ["--cron", "0 2 * * *", "--timezone", "Europe/Berlin"]
    code, output = deploying("deploy", "Night talks.csv", "preset=draft", *cron)
    assert code == 0, output
    found = deployment(prefect_server, "Night-talks")
    assert f"{prefect_server.address}/v2/deployments/deployment/{found['id']}" in output
    dates = [line for line in output.splitlines() if line.startswith("next: ")]
    assert dates[0].count(" 02:00") == 3
    assert f"{datetime.now():%Y}" in dates[0]
    assert found["parameters"] == {"table": str(tmp_path / "Night talks.csv"), "preset": "draft"}
    assert found["job_variables"] == {"working_dir": str(tmp_path)}
    code, output = deploying("deploy", "Night talks.csv", "--paused")
    assert (code, "paused: resume it on its page" in output) == (0, True)
    code, output = deploying("deploy", "Night talks.csv", "--remove")
    assert (code, output.strip()) == (0, "removed `Night-talks`; what it rendered stays")


@pytest.mark.drill
def test_a_deployed_batch_renders_where_it_was_deployed(
    deploying: RunAvatar,
    client: "SyncPrefectClient",
    prefect_server: PrefectServer,
    rendered: Rendered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Prefect's own worker, which alone would run it in a folder that it deletes."""
    (tmp_path / "batch").mkdir()
    settings = f"table: {rendered.table}\nlimit: 1\nstorage: {{root: ./store}}\n"
    (tmp_path / "batch/small.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    code, output = deploying("deploy", "batch=small", "preset=draft", "--config-dir", ".")
    assert code == 0, output
    made = client.read_deployment_by_name("render-dataset/small")
    run = client.create_flow_run_from_deployment(made.id)
    programs = Path(sys.executable).parent
    search = os.pathsep.join([str(programs), os.environ["PATH"]])
    done = subprocess.run(
        [programs / "prefect", "worker", "start", "--pool=avatar", "--work-queue=here-render", "--run-once"],
        env={**prefect_server.environment, "PATH": search},
        cwd=programs,
        capture_output=True,
        text=True,
        check=False,
    )
    found = prefect_server.get(f"flow_runs/{run.id}")
    assert found["state_type"] == "COMPLETED", done.stdout + done.stderr
    assert len(list(tmp_path.glob("store/datasets/*/videos/*.mp4"))) == 1
    assert found["parameters"] == {"batch": "small", "preset": "draft", "config_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give a TABLE or a BATCH.yaml"),
        (["a.png", "b.wav"], "give one TABLE, or one BATCH.yaml; got 2 files"),
        (["missing.csv"], "missing.csv"),
        (["missing.yaml"], "no such file"),
        (["TABLE", "vidoe.fps=3"], "did you mean"),
        (["TABLE", "--timezone", "UTC"], "--timezone goes with --cron"),
        (["TABLE", "--name", "a/b"], "holds none of"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    deploying: RunAvatar, rendered: Rendered, words: list[str], complaint: str
) -> None:
    code, output = deploying("deploy", *(str(rendered.table) if word == "TABLE" else word for word in words))
    assert code == 2
    assert complaint in " ".join(output.split())


def test_deploying_needs_a_server(
    avatar: RunAvatar, rendered: Rendered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, output = avatar("deploy", str(rendered.table))
    assert code == 2
    assert "there is no Prefect server: start one with `avatar up`, or set PREFECT_API_URL" in output
