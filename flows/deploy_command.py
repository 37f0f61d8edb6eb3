"""`avatar deploy`: a batch of the user's own becomes a deployment on the Prefect server."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args
from zoneinfo import ZoneInfo

import typer
from rich.console import Console
from rich.text import Text

from avatar_core.errors import ConfigError
from flows.environment import create_console

if TYPE_CHECKING:
    from uuid import UUID

    from flows.overrides import Override
    from flows.run_form import RunForm

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TABLE | BATCH.yaml] [OVERRIDE ...]",
        help="A table or a batch file, then options such as preset=draft, batch=mine: as for avatar render.",
        show_default=False,
    ),
]
Cron = Annotated[
    str | None,
    typer.Option(help="When it renders by itself, such as '0 2 * * *': every night at two.", metavar="CRON"),
]
TimeZone = Annotated[
    str | None, typer.Option(help="Of --cron, such as Europe/Berlin; else this machine's.", metavar="ZONE")
]
Name = Annotated[
    str | None, typer.Option(help="What it is called; else as the table or batch file.", metavar="NAME")
]
ConfigDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with your own batch/, preset/, ... files; else what AVATAR_CONFIG_DIR names.",
        metavar="DIR",
    ),
]
Paused = Annotated[bool, typer.Option("--paused", help="Scheduled runs wait until it is resumed.")]
Remove = Annotated[bool, typer.Option("--remove", help="Remove the deployment; nothing rendered is lost.")]

_LOGIN_OR_QUERY = re.compile(r"://[^/\s]*@|://.*\?")


def deploy(
    words: Words = None,
    cron: Cron = None,
    timezone: TimeZone = None,
    name: Name = None,
    config_dir: ConfigDir = None,
    paused: Paused = False,
    remove: Remove = False,
) -> None:
    """Put a batch on the Prefect server: rendered on this machine, by schedule or when started there."""
    from avatar_core.planning.batch import open_batch
    from flows.deploy import deploy_batch, next_dates, remove_batch
    from flows.names import host_name
    from flows.prefect_client import connect, prefect_client
    from flows.run_form import run_config

    console = create_console()
    host, folder = host_name(), Path.cwd()
    form = filled_form(words or [], config_dir)
    name = _checked(name) if name else _name_of(form)
    if timezone and not cron:
        raise ConfigError("--timezone goes with --cron")
    if not remove:
        open_batch(run_config(form))  # what is wrong is said now, not at night
    connect()
    with prefect_client() as client:
        if remove:
            remove_batch(client, host, name)
            _print(console, f"removed `{name}`; what it rendered stays")
            return
        zone = timezone or local_timezone()
        deployment = deploy_batch(client, host, name, form, folder, cron=cron, timezone=zone, paused=paused)
        dates = next_dates(client, deployment) if cron and not paused else []
        _print(console, f"`{name}` renders on {host}: {_page(deployment)}")
    if dates:
        shown = ", ".join(f"{date.astimezone(_zone(zone)):%a %Y-%m-%d %H:%M}" for date in dates)
        _print(console, f"next: {shown} ({zone})")
    else:
        waits = "paused: resume it" if paused else "no schedule: start it"
        _print(console, f"{waits} on its page, or `prefect deployment run 'render-dataset/{name}'`")
    _print(console, "`avatar up` or `avatar worker` on this machine renders what is due")


def filled_form(words: Sequence[str], config_dir: Path | None) -> "RunForm":
    """The run form as the words of the command fill it in, paths absolute. Raises `ConfigError`."""
    from flows.compose import is_override
    from flows.config_files import CONFIG_DIR, SUFFIXES
    from flows.overrides import read_override
    from flows.run_form import RunForm

    files = [word for word in words if not is_override(word)]
    if len(files) > 1:
        raise ConfigError(f"give one TABLE, or one BATCH.yaml; got {len(files)} files: {', '.join(files)}")
    fields: dict[str, Any] = {}
    for file in files:
        _check_address("table", file)
        fields["batch" if file.endswith(SUFFIXES) else "table"] = _absolute(file)
    overrides = []
    for override in [read_override(word) for word in words if is_override(word)]:
        _check_no_credentials(override)
        if (field := _field_of(override)) and field not in fields:
            fields[field] = _absolute(_value(override)) if _is_path(override) else override.value
        else:
            overrides.append(_with_absolute_root(override))
    own = config_dir or os.environ.get(CONFIG_DIR)
    return RunForm(
        **fields,
        overrides=tuple(overrides),
        config_dir=_absolute(str(own)) if own else "",
    )


def local_timezone() -> str:
    """The name of this machine's time zone, UTC where it has none."""
    names = [os.environ.get("TZ", "").removeprefix(":"), str(Path("/etc/localtime").resolve())]
    for name in names:
        name = name.rpartition("zoneinfo/")[2]
        if name and not name.startswith("/") and _zone(name):
            return name
    return "UTC"


def _field_of(override: "Override") -> str | None:
    """The field of the form that says the same."""
    from flows.run_form import BackendChoice, PresetChoice

    choices = {"backend": BackendChoice, "preset": PresetChoice}
    if override.option in choices:
        allowed = get_args(get_args(choices[override.option])[0])
        return override.option if override.value in allowed else None
    plain = _value(override) not in ("", "null") and _value(override)[0] not in "[{'\""
    return override.option if override.option in ("batch", "table") and plain else None


def _is_path(override: "Override") -> bool:
    from flows.config_files import SUFFIXES

    return override.option == "table" or (override.option == "batch" and _value(override).endswith(SUFFIXES))


def _with_absolute_root(override: "Override") -> str:
    from flows.compose import quoted

    if override.option != "storage.root" or _value(override).startswith(("'", '"')):
        return override.word
    return f"storage.root={quoted(_absolute(_value(override)))}"


def _value(override: "Override") -> str:
    return override.value or ""


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _check_no_credentials(override: "Override") -> None:
    sets_options = override.option == "storage" and "options" in _value(override)
    if sets_options or override.option.startswith("storage.options"):
        raise ConfigError(
            f"`{override.option}=...` may hold credentials, and Prefect keeps and shows all parameters: "
            "write it in a batch or storage file, or give the credentials to the worker by its environment"
        )
    _check_address(override.option, _value(override))


def _check_address(what: str, place: str) -> None:
    if _LOGIN_OR_QUERY.search(place):
        raise ConfigError(
            f"the address of `{what}` holds a login or a query, and Prefect keeps and shows all parameters: "
            "write it in a batch file, or give the credentials to the worker by its environment"
        )


def _name_of(form: "RunForm") -> str:
    from avatar_core.planning.clip_names import slug

    file = form.batch or form.table
    if not file:
        raise ConfigError("give a TABLE or a BATCH.yaml, or with --name what the deployment is called")
    return slug(Path(file).stem)


def _checked(name: str) -> str:
    if re.search("[/%&<>]", name):
        raise ConfigError(f"--name {name}: a deployment's name holds none of / % & < >")
    return name


def _page(deployment: "UUID") -> str:
    from prefect.utilities.urls import url_for

    return url_for("deployment", obj_id=deployment) or str(deployment)


def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
