"""The parameters of a run of `render_dataset`, as Prefect's run form in the browser shows them, and the
configuration that they ask for.

Prefect makes the form of the types: a `Literal` is a drop-down, and a type that allows None has two tabs.
Texts and choices therefore have a value that stands for none.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler

from avatar_core.config import Config, parse
from avatar_core.errors import ConfigError
from avatar_core.planning.batch import batch_name, open_storage
from avatar_core.planning.rerun import rerun_config
from avatar_core.planning.runs import find_run
from flows.compose import compose_config
from flows.overrides import read_override

AS_CONFIGURED = "as configured"
NO_STAGE = "none"


@dataclass(frozen=True)
class About:
    """What the form says beside a field. Prefect drops the description of a pydantic `Field`."""

    text: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "description": self.text}


def _or(empty: Any) -> BeforeValidator:
    """null is the same as what a field that was left alone holds."""
    return BeforeValidator(lambda value: empty if value is None else value)


Table = Annotated[
    str,
    _or(""),
    About(
        "Path or URI of a table with a row per video: CSV, Parquet or JSON Lines. Give this, a batch, or "
        "both. Prefect keeps all parameters and shows them to everybody: no passwords, keys or signed "
        "addresses here or below; they belong in the environment of the machine that renders."
    ),
]
BatchFile = Annotated[
    str,
    _or(""),
    About(
        "A batch file with table and options: its path on the machine that renders, such as "
        "/data/night.yaml, or its name in the folder of config_dir. What is filled in here comes before what "
        "the file says."
    ),
]
BackendChoice = Annotated[
    Literal["as configured", "preview", "hunyuan", "multitalk", "ditto"],
    _or(AS_CONFIGURED),
    About("What renders. As configured: what the batch file says, else preview."),
]
PresetChoice = Annotated[
    Literal["as configured", "draft", "fusionx", "high", "lightx2v", "tiny"],
    _or(AS_CONFIGURED),
    About(
        "A set of options; fusionx and lightx2v go with multitalk. One of your own is given under overrides, "
        "as preset=NAME or preset=/path/to/NAME.yaml."
    ),
]
Limit = Annotated[int | None, Field(ge=1), About("Only the first rows of the table, so many. None: all.")]
Only = Annotated[Sequence[str], _or(()), About("Only the rows of these names. Empty: all.")]
StageChoice = Annotated[
    Literal["none", "face", "audio", "text", "reference", "denoise", "decode"],
    _or(NO_STAGE),
    About(
        "Compute this stage and all after it again, once, for the clips of the latest run of the same name, "
        "or of the run given below. With retry_failed only for clips that failed."
    ),
]
RetryFailed = Annotated[bool, _or(False), About("Try rows again that failed for good in an earlier run.")]
MaxFailedFraction = Annotated[
    float | None,
    Field(ge=0, le=1),
    About("The run fails if more of its rows fail, 0 to 1. None: as configured, else 0."),
]
BudgetHours = Annotated[
    float | None,
    Field(gt=0),
    About("Start nothing that would end later than after so many hours. None: as configured, else no limit."),
]
Overrides = Annotated[
    Sequence[str],
    _or(()),
    About(
        "Any other options, one each, as on the command line: video.fps=30, storage.root=/data/store. "
        "No credentials."
    ),
]
RecordedRun = Annotated[
    str,
    _or(""),
    About(
        "Id or name of a recorded run to go on with: its options count, and of this form only table, batch, "
        "stage, retry_failed, and storage.* and runtime.* under overrides."
    ),
]
ConfigDir = Annotated[
    str,
    _or(""),
    About(
        "Folder with batch and preset files of your own. Empty: what AVATAR_CONFIG_DIR of the worker names."
    ),
]


@dataclass(frozen=True)
class RunForm:
    """Filled in. `flows.render.render_dataset` has the same parameters."""

    table: Table = ""
    batch: BatchFile = ""
    backend: BackendChoice = "as configured"
    preset: PresetChoice = "as configured"
    limit: Limit = None
    only: Only = ()
    stage: StageChoice = "none"
    retry_failed: RetryFailed = False
    max_failed_fraction: MaxFailedFraction = None
    budget_hours: BudgetHours = None
    overrides: Overrides = ()
    run: RecordedRun = ""
    config_dir: ConfigDir = ""

    def filled_in(self) -> dict[str, Any]:
        """The parameters that are not left alone."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        filled = {name: value for name, value in values.items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in filled.items()}


def run_config(form: RunForm, *, again: bool = False) -> Config:
    """What the form asks for; `again` is a retry, which takes up what failed and goes on with a stage that
    the first attempt began to compute again.

    Raises `ConfigError` where two fields contradict one another, or there is nothing to render.
    """
    folder = Path(form.config_dir).expanduser() if form.config_dir else None
    if form.run:
        _check_goes_with_run(form)
        words = [*form.overrides, *_words(form, "batch")]
        return _recorded(form, compose_config(words, folder), again)
    given = {name: value for name, value in form.filled_in().items() if name in _GIVEN}
    given |= {"retry_failed": True} if again else {}
    words = [*form.overrides, *_words(form, "batch", "backend", "preset")]
    _check_said_once(form, *_GIVEN, *_GROUPS)
    config = compose_config(words, folder, given)
    if not config.table and not config.rows:
        raise ConfigError("nothing to render: fill in `table`, `batch` or `run`")
    if form.stage == NO_STAGE:
        return config
    if not again:
        rerun_config(config, batch_name(config), stage=form.stage, only_failed=form.retry_failed)
    return dataclasses.replace(config, retry_failed=True)


_GIVEN = ("table", "limit", "only", "retry_failed", "max_failed_fraction", "budget_hours")
"""Fields that are options of the same name."""
_GROUPS = ("batch", "backend", "preset")
_OF_A_RECORDED_RUN = ("backend", "preset", "limit", "only", "max_failed_fraction", "budget_hours")


def _recorded(form: RunForm, config: Config, again: bool) -> Config:
    recorded = find_run(open_storage(config), form.run)
    if form.stage != NO_STAGE and not again:
        rerun_config(config, recorded.id, stage=form.stage, only_failed=form.retry_failed)
    changes: dict[str, Any] = {"storage": config.storage, "retry_failed": True}
    changes |= {"table": form.table, "rows": ()} if form.table else {}
    if any(read_override(word).option.startswith("runtime") for word in form.overrides):
        changes["runtime"] = config.runtime
    return parse(Config, {**recorded.config, **changes})


def _words(form: RunForm, *groups: str) -> list[str]:
    values: Mapping[str, Any] = form.filled_in()
    return [f"{group}={values[group]}" for group in groups if group in values]


def _check_said_once(form: RunForm, *names: str) -> None:
    fields = form.filled_in().keys() & {*names}
    for word in map(read_override, form.overrides):
        name = word.option.removesuffix(".name") if word.is_choice else word.option
        if name in fields or (name == "rows" and form.table):
            field = "table" if name == "rows" else name
            raise ConfigError(
                f"{word.shown} under overrides and the field `{field}` say the same: fill in one of them"
            )


def _check_goes_with_run(form: RunForm) -> None:
    filled = [name for name in _OF_A_RECORDED_RUN if name in form.filled_in()]
    if filled:
        raise ConfigError(
            f"the options of `{form.run}` are recorded: leave {', '.join(filled)} alone, or `run` empty for "
            "a run with other options, which keeps what stays the same"
        )
    for word in map(read_override, form.overrides):
        if word.option.partition(".")[0] not in ("storage", "runtime", "batch"):
            raise ConfigError(
                f"{word.shown} would change what is recorded of `{form.run}`, with which only storage.*, "
                "runtime.* and batch go; leave `run` empty for a run with other options"
            )
    _check_said_once(form, "batch")
