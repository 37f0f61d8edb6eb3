"""The `avatar` command. Heavy imports wait until a command needs them, so `--help` is instant."""

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from avatar_core.errors import AvatarError, Cancelled, ConfigError
from flows import streams
from flows.deploy_command import ConfigDir, deploy
from flows.environment import create_console, settle_environment, working_directory_is_gone
from flows.server_commands import server_app
from flows.weights_commands import weights_app

if TYPE_CHECKING:
    from rich.console import Console

    from avatar_core.config import Config
    from avatar_core.result import Result

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(weights_app, name="weights")
app.add_typer(server_app)
app.command()(deploy)
console = create_console()
errors = create_console(stderr=True)
log = logging.getLogger(__name__)

EXIT_FAILED_ROWS, EXIT_ERROR, EXIT_CANCELLED = 1, 2, 130
HEAD_START_S = 2.0

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TABLE | BATCH.yaml | PICTURE RECORDING] [OVERRIDE ...]",
        help="A table of rows, a batch file, or one picture and one recording; then options such as "
        "video.fps=30, preset=draft, backend=preview, batch=demo. Text is taken as it stands, but for null "
        "and what is in quotes; a list is only=a,b; ~video.fps leaves an option at its default.",
        show_default=False,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Copy the video here (one picture, one recording): a file, a folder, or - for standard output. "
        "Further takes and parts are OUT-take2.mp4, OUT-part1.mp4, ...",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N rows.", metavar="N")]
Only = Annotated[list[str] | None, typer.Option(help="Only rows of this name (repeatable).", metavar="NAME")]
Takes = Annotated[int | None, typer.Option(help="Videos per row, each with another seed.", metavar="N")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A dataset's name (its latest run) or a run id.")]
StatusWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [OVERRIDE ...]",
        help="A dataset's name (its latest run) or a run id.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[OVERRIDE ...]", help="For example storage.root=DIR.")
]


@app.callback(invoke_without_command=True)
def avatar(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, with tracebacks.")
    ] = False,
) -> None:
    """A table of pictures and recordings becomes a dataset of talking-avatar videos."""
    if version:
        from importlib.metadata import version as installed

        console.print(f"avatar-dataset {installed('avatar-dataset')}")
        raise typer.Exit
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(message)s")
    if not verbose:  # what is damaged in the store is everybody's business, tracebacks of items are not
        logging.getLogger("avatar_core.store").setLevel(logging.WARNING)


@app.command()
def render(
    words: Words = None,
    output: Output = None,
    limit: Limit = None,
    only: Only = None,
    takes: Takes = None,
    config_dir: ConfigDir = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it to this machine's worker on the server, and return.")
    ] = False,
) -> None:
    """Render a table, a batch file, or one picture with one recording."""
    if detach:
        from flows.detach import detach as leave_to_worker

        if output is not None:
            raise ConfigError("-o/--output and --detach exclude each other: the videos are in the dataset")
        leave_to_worker(console, words or [], config_dir, limit=limit, only=only or [], takes=takes)
        return
    from flows.output import opened_destination
    from flows.rendering import render_shown
    from flows.terminal import print_result

    config, is_pair = _configured(words or [], limit, only, takes, config_dir)
    if output is not None and not is_pair:
        raise ConfigError(
            "-o/--output goes with one PICTURE and one RECORDING; a table's videos are in its dataset"
        )
    with opened_destination(output, config) as destination:

        def show(result: "Result") -> None:
            print_result(console, result)
            for path in destination.copy_videos(result) if destination else ():
                console.print(Text(f"written to {path}"), soft_wrap=True)

        result = render_shown(config, console, show, destination)
    _exit_for(result)


@app.command()
def plan(
    words: Words = None,
    limit: Limit = None,
    only: Only = None,
    takes: Takes = None,
    config_dir: ConfigDir = None,
) -> None:
    """Say what is cached, what is to do, which rows are rejected, and what it will cost."""
    from avatar_core.planning.batch import open_batch
    from avatar_core.planning.estimate import estimate
    from flows.sources import take_in_sources
    from flows.stopping import stoppable
    from flows.terminal import create_view, print_plan

    config, _ = _configured(words or [], limit, only, takes, config_dir)
    with stoppable() as stopped, create_view(console) as view:
        batch = open_batch(config, view)
        take_in_sources(batch, view, stopped)
    print_plan(console, batch, estimate(batch))


@app.command()
def rerun(
    run: RunName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Compute this stage and all after it again.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only clips that failed.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Run a batch again: what failed, or a stage of it."""
    from avatar_core.planning.rerun import rerun_config
    from flows.compose import compose_config
    from flows.overrides import read_override
    from flows.rendering import render_shown
    from flows.terminal import print_result

    for override in map(read_override, overrides or []):
        if override.option.partition(".")[0] not in ("storage", "runtime", "batch"):
            raise ConfigError(
                f"{override.shown} would change what was recorded; rerun takes storage.* and runtime.* only, "
                "and batch=NAME for those in it: for other options use `avatar render`, which keeps what "
                "stays the same"
            )
    config = compose_config(overrides or [], config_dir)
    again = rerun_config(config, run, stage=stage, only_failed=failed)
    result = render_shown(again, console, partial(print_result, console))
    _exit_for(result)


@app.command()
def verify(
    run: RunName,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Hide what is damaged, so that it is made again.")
    ] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Hash everything of a dataset again: its videos, and what the store holds for them."""
    from avatar_core.maintenance import verify_run
    from avatar_core.planning.batch import open_storage
    from flows.compose import compose_config

    report = verify_run(open_storage(compose_config(overrides or [], config_dir)), run, repair=repair)
    for problem in report.problems:
        console.print(Text(problem, style="red"), soft_wrap=True)
    console.print(f"{report.checked} files checked, {len(report.problems)} damaged or missing")
    if report.problems:
        hint = (
            f"run `avatar rerun {run}`"
            if repair
            else f"`avatar verify {run} --repair`, then `avatar rerun {run}`"
        )
        console.print(Text(f"to mend it: {hint}"))
        raise typer.Exit(EXIT_FAILED_ROWS)


@app.command()
def gc(
    overrides: Overrides = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete; without it only say what would go.")
    ] = False,
    forget: Annotated[
        list[str] | None, typer.Option(help="A run that no longer counts (repeatable).", metavar="RUN")
    ] = None,
    min_age_days: Annotated[float, typer.Option(help="Younger files stay.", min=0)] = 7.0,
    config_dir: ConfigDir = None,
) -> None:
    """Delete what no recorded run needs any more."""
    from avatar_core.maintenance import collect_garbage
    from avatar_core.planning.batch import open_storage
    from flows.compose import compose_config

    storage = open_storage(compose_config(overrides or [], config_dir))
    report = collect_garbage(storage, forget=forget or (), min_age_s=min_age_days * 86400, delete=delete)
    for kind, count in report.files.items():
        console.print(f"{kind}: {count} files, {report.bytes[kind] / 1e6:.1f} MB")
    total = sum(report.bytes.values()) / 1e6
    console.print(f"{total:.1f} MB {'deleted' if delete else 'can go: run again with --delete'}")


@app.command()
def status(
    words: StatusWords = None,
    config_dir: ConfigDir = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every two seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """What became of the recorded runs, or of one: by stage, with the reasons of failures; and what the
    queues of a server's GPUs do."""
    from avatar_core.planning.batch import open_storage
    from avatar_core.status import read_status, summarise_runs
    from flows.compose import compose_config, is_override
    from flows.status_view import print_address, print_run, print_runs
    from flows.status_view import watch as watch_screen

    runs = [word for word in words or [] if not is_override(word)]
    if len(runs) > 1:
        raise ConfigError(f"give one RUN, or none for all of them; got {len(runs)}: {', '.join(runs)}")
    overrides = [word for word in words or [] if is_override(word)]
    storage = open_storage(compose_config(overrides, config_dir))

    def show(screen: "Console") -> None:
        if runs:
            print_run(screen, read_status(storage, runs[0]))
        else:
            print_runs(screen, summarise_runs(storage))
            print_address(screen)

    if watch:
        watch_screen(console, show)
    else:
        show(console)


@app.command()
def doctor(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Check this machine: versions, GPUs, codecs, disk, weights, broken packages."""
    from rich.table import Table

    from flows.compose import compose_config
    from flows.doctor import report

    config = compose_config(overrides or [], config_dir)
    table = Table(header_style="bold", pad_edge=False, box=None)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    findings = report(config.storage.root)
    for section, item, value, ok in findings:
        table.add_row(section, item, Text(value, style="" if ok else "red"))
    console.print(table)
    if not all(finding[3] for finding in findings):
        raise typer.Exit(EXIT_FAILED_ROWS)


def _configured(
    words: Sequence[str],
    limit: int | None,
    only: Sequence[str] | None,
    takes: int | None,
    config_dir: Path | None,
) -> tuple["Config", bool]:
    """The configuration of `render` and `plan`, and whether it is one picture with one recording."""
    from flows.compose import compose_config, is_override
    from flows.config_files import SUFFIXES

    for word in words:
        if word != word.encode(errors="replace").decode():
            raise ConfigError(
                f"`{word}` is not UTF-8, which tables and records are: give the file another name"
            )
    overrides = [word for word in words if is_override(word)]
    overrides += [f"batch={word}" for word in words if not is_override(word) and word.endswith(SUFFIXES)]
    batches = [word for word in overrides if word.startswith("batch=")]
    if len(batches) > 1:
        raise ConfigError(f"give one batch file; got {len(batches)}: {', '.join(batches)}")
    files = [word for word in words if not is_override(word) and not word.endswith(SUFFIXES)]
    given: dict[str, Any] = {}
    if len(files) == 1:
        given["table"] = files[0]
    elif len(files) == 2:
        given["rows"] = [dict(zip(("image", "audio"), files, strict=True))]
    elif files:
        raise ConfigError(
            f"give one TABLE, or one PICTURE and one RECORDING; got {len(files)} files: {files}"
        )
    given |= {"limit": limit} if limit is not None else {}
    given |= {"takes": takes} if takes is not None else {}
    given |= {"only": list(only)} if only else {}
    for word in overrides:
        if (name := word.partition("=")[0].lstrip("+")) in given or (files and name in ("table", "rows")):
            raise ConfigError(f"`{word}` and another word of the command both say `{name}`; give one of them")
    config = compose_config(overrides, config_dir, given)
    if not config.table and not config.rows:
        raise ConfigError("nothing to render: give a TABLE, a PICTURE and a RECORDING, or a batch file")
    return config, len(files) == 2


def _exit_for(result: "Result") -> None:
    if not result.ok:
        failed, total = len(result.failures), len(result.metadata)
        errors.print(
            f"{failed} of {total} clips failed; "
            f"max_failed_fraction={result.max_failed_fraction:g} allows fewer"
        )
        raise typer.Exit(EXIT_FAILED_ROWS)


def main() -> None:
    """Entry point: our own errors, and the system's, are one line and not a traceback."""
    settle_environment()
    with streams.failing_streams_kept():
        code = _run_command()
        if streams.reader_has_left():
            code = streams.EXIT_READER_LEFT
        elif problem := streams.output_problem():
            _print_error(f"standard output takes no more: {problem.strerror or problem}")
            code = code or streams.EXIT_NOT_SHOWN
    if (served := sys.modules.get("flows.served")) and served.is_left_behind():
        os._exit(code)
    sys.exit(code)


def _run_command() -> int:
    """The exit code."""
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else EXIT_ERROR
    except (Cancelled, KeyboardInterrupt):
        errors.print("stopped; what is finished is kept, the same command goes on from here")
        return EXIT_CANCELLED
    except AvatarError as error:
        _print_error(str(error))
    except OSError as error:
        log.info("ended by the system", exc_info=True)
        _print_error(_explained(error))
    return EXIT_ERROR


def _explained(error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and working_directory_is_gone():
        return "the working directory was deleted; change to another one"
    about = error.filename2 or error.filename
    return f"{error.strerror or error}: {about}" if about else str(error.strerror or error)


def _print_error(text: str) -> None:
    errors.print(Text(f"error: {text}", style="red"), soft_wrap=True)


if __name__ == "__main__":
    main()
