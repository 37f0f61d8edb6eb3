"""The fields of Prefect's run form, and the configuration that they make."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from avatar_core.backends.base import BACKENDS, create_backend
from avatar_core.errors import AvatarError, ConfigError
from avatar_core.resources import resource
from avatar_core.store.catalog import load_catalog
from avatar_core.store.storage import Storage
from flows.run_form import (
    AS_CONFIGURED,
    NO_STAGE,
    BackendChoice,
    PresetChoice,
    RunForm,
    StageChoice,
    run_config,
)
from tests.sample_rows import Rendered


def choices(kind: Any) -> list[str]:
    return list(get_args(get_args(kind)[0]))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    from flows.render import render_dataset

    return render_dataset.parameters.model_dump_for_openapi()


# --- what the browser is given


def test_the_flow_has_the_fields_of_the_form(schema: dict[str, Any]) -> None:
    from prefect.utilities.callables import parameter_schema

    from flows.render import render_dataset

    parameters = inspect.signature(render_dataset.fn).parameters.values()
    fields = [(field.name, field.type, field.default) for field in dataclasses.fields(RunForm)]
    assert [(each.name, each.annotation, each.default) for each in parameters] == fields
    assert parameter_schema(RunForm).model_dump_for_openapi() == schema


def test_every_field_is_described_and_shown_in_order(schema: dict[str, Any]) -> None:
    from prefect.utilities.schema_tools.validation import is_valid_schema

    is_valid_schema(schema)  # raises
    fields = schema["properties"]
    assert [field["position"] for field in fields.values()] == list(range(len(fields)))
    assert all(len(field["description"]) > 20 for field in fields.values())
    assert "required" not in schema
    assert "no passwords" in fields["table"]["description"]


def test_choices_are_lists(schema: dict[str, Any]) -> None:
    fields = schema["properties"]
    assert fields["backend"]["enum"] == choices(BackendChoice)
    assert fields["preset"]["enum"] == choices(PresetChoice)
    assert fields["stage"]["enum"] == choices(StageChoice)
    for name in ("table", "batch", "backend", "preset", "stage", "only", "overrides", "run", "config_dir"):
        assert "anyOf" not in fields[name]  # would be tabs in the form, for what is null and what is not


def test_all_that_can_be_chosen_is_there() -> None:
    shipped = [name for name, place in BACKENDS.items() if place.startswith("avatar_core.")]
    assert choices(BackendChoice) == [AS_CONFIGURED, *shipped]
    assert choices(PresetChoice) == [
        AS_CONFIGURED,
        *sorted(path.stem for path in (resource("conf") / "preset").glob("*.yaml")),
    ]
    stages = {name for backend in BACKENDS for name in create_backend({"name": backend}).stages()}
    assert {*choices(StageChoice)} == {NO_STAGE, *stages}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"backend": "draft"}, "'draft' is not one of"),
        ({"limit": 0}, "0 is less than the minimum"),
        ({"budget_hours": 0}, "0 is less than or equal to the minimum"),
        ({"max_failed_fraction": 2}, "2 is greater than the maximum"),
        ({"overrides": "a=b"}, "is not of type 'array'"),
    ],
)
def test_the_server_refuses_what_cannot_be(
    schema: dict[str, Any], given: dict[str, Any], complaint: str
) -> None:
    from prefect.utilities.schema_tools.validation import validate

    errors = validate(given, schema)
    messages = [part.message for error in errors for part in (error, *(error.context or ()))]
    assert any(complaint in message for message in messages), messages


def test_null_is_what_was_left_alone() -> None:
    """A retry of `avatar render` names no table where its address may hold credentials."""
    from flows.render import render_dataset

    names = [field.name for field in dataclasses.fields(RunForm)]
    assert RunForm(**render_dataset.validate_parameters(dict.fromkeys(names))) == RunForm()


def test_the_form_imports_no_models() -> None:
    heavy = ["torch", "diffusers", "prefect"]
    code = f"import sys, flows.run_form; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what it asks for


def test_what_is_filled_in_counts(tmp_path: Path) -> None:
    batch = tmp_path / "night.yaml"
    options = [
        "table: a.csv",
        "limit: 5",
        "max_failed_fraction: 0.5",
        "video: {fps: 30}",
        "retry_failed: true",
    ]
    batch.write_text("\n".join(options))
    form = RunForm(batch=str(batch), backend="ditto", limit=2, only=("a", "b"), budget_hours=1.5)
    config = run_config(form)
    assert (config.table, config.limit, config.only, config.budget_hours) == ("a.csv", 2, ("a", "b"), 1.5)
    assert (config.max_failed_fraction, config.video.fps, config.retry_failed) == (0.5, 30.0, True)
    assert config.backend["name"] == "ditto"
    config = run_config(
        RunForm(table="b.csv", batch=str(batch), preset="draft", overrides=("video.crf=3", "name=x"))
    )
    assert (config.table, config.video.crf, config.video.max_side, config.name) == ("b.csv", 3, 512, "x")


def test_a_batch_by_name_and_a_preset_of_ones_own(tmp_path: Path) -> None:
    for name, text in {"batch/night": "table: a.csv", "preset/mine": "video: {fps: 12}"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(text)
    form = RunForm(batch="night", overrides=("preset=mine",), config_dir=str(tmp_path))
    config = run_config(form)
    assert (config.table, config.video.fps) == ("a.csv", 12.0)


def test_a_retry_takes_up_what_failed() -> None:
    assert not run_config(RunForm(table="a.csv")).retry_failed
    assert run_config(RunForm(table="a.csv"), again=True).retry_failed
    assert run_config(RunForm(table="a.csv", retry_failed=True)).retry_failed


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (RunForm(), "nothing to render: fill in `table`, `batch` or `run`"),
        (
            RunForm(table="a.csv", limit=1, overrides=("limit=2",)),
            "`limit=2` under overrides and the field `limit`",
        ),
        (RunForm(table="a.csv", overrides=("table=b.csv",)), "the field `table` say the same"),
        (
            RunForm(table="a.csv", preset="draft", overrides=("preset=high",)),
            "the field `preset` say the same",
        ),
        (RunForm(table="a.csv", backend="ditto", overrides=("backend.name=preview",)), "the field `backend`"),
        (RunForm(run="batch", backend="ditto", limit=3), "are recorded: leave backend, limit alone"),
        (RunForm(run="batch", overrides=("video.fps=30",)), "`video.fps=30` would change what is recorded"),
        (RunForm(table="a.csv", overrides=("vidoe.fps=30",)), "did you mean `video`"),
        (RunForm(table="a.csv", overrides=("fast",)), "`fast` sets no option"),
        (RunForm(batch="nigth"), "unknown batch `nigth`"),
    ],
)
def test_contradictions(form: RunForm, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        run_config(form)


def test_secrets_are_not_repeated() -> None:
    with pytest.raises(AvatarError) as caught:
        run_config(RunForm(table="a.csv", overrides=("storage.nokey=hunter2",)))
    assert "hunter2" not in str(caught.value)


# --- recorded runs


def done(store: Path, stage: str) -> int:
    return len(load_catalog(Storage(str(store)), stage).ok_keys())


def test_a_recorded_run_goes_on(rendered: Rendered, store: Path) -> None:
    root = f"storage.root={store}"
    form = RunForm(run=rendered.result.run_id, overrides=(root,))
    config = run_config(form)
    assert (config.table, config.retry_failed) == (str(rendered.table), True)
    assert config.runtime.cpus != 7
    config = run_config(dataclasses.replace(form, overrides=(root, "runtime.cpus=7")))
    assert config.runtime.cpus == 7


@pytest.mark.parametrize("named", [True, False])
def test_a_stage_is_computed_again_once(rendered: Rendered, store: Path, named: bool) -> None:
    overrides = (f"storage.root={store}",)
    if named:
        form = RunForm(run=rendered.result.run_id, stage="decode", overrides=overrides)
    else:  # the latest run of that table's name
        form = RunForm(table=str(rendered.table), stage="decode", overrides=overrides)
    before = done(store, "decode"), done(store, "denoise")
    assert before[0] > 0
    assert run_config(form, again=True).retry_failed
    assert done(store, "decode") == before[0]  # the first attempt did it
    assert run_config(form).retry_failed
    assert (done(store, "decode"), done(store, "denoise")) == (0, before[1])


def test_only_what_failed_of_a_stage(rendered: Rendered, store: Path) -> None:
    form = RunForm(
        table=str(rendered.table), stage="decode", retry_failed=True, overrides=(f"storage.root={store}",)
    )
    before = done(store, "decode")
    run_config(form)
    assert done(store, "decode") == before


def test_a_stage_needs_a_run(tmp_path: Path) -> None:
    form = RunForm(table="never.csv", stage="decode", overrides=(f"storage.root={tmp_path}",))
    with pytest.raises(AvatarError, match="no run `never`"):
        run_config(form)
