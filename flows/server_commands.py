"""The commands that have to do with a Prefect server."""

from typing import Annotated

import typer

from flows.environment import create_console

server_app = typer.Typer()
console = create_console()

Gpus = Annotated[
    str | None,
    typer.Option(help="Numbers of the GPUs to serve, such as 0,1; all if not given.", metavar="N,N"),
]
PretendGpus = Annotated[
    int, typer.Option(help="Serve so many GPUs that are only pretended: they compute on the CPU.", min=0)
]
HostName = Annotated[
    str | None, typer.Option("--name", help="What this machine is called on the server.", metavar="NAME")
]
Renders = Annotated[
    int, typer.Option(help="Scheduled and submitted renders at a time; 0 for none.", min=0, metavar="N")
]


@server_app.command()
def up(
    host: Annotated[
        str | None, typer.Option(help="Listen here; 127.0.0.1 if not given.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="4200 if not given.", min=1, max=65535, show_default=False)
    ] = None,
    gpus: Gpus = None,
    pretend_gpus: PretendGpus = 0,
    name: HostName = None,
    renders: Renders = 1,
    postgres: Annotated[
        bool,
        typer.Option("--postgres", help="Start a PostgreSQL for its records too (extra `postgres`)."),
    ] = False,
    database: Annotated[
        str | None,
        typer.Option(
            help="Keep its records in this database of yours: postgresql://USER:PASSWORD@HOST/NAME or "
            "sqlite:////PATH/TO/FILE. Neither option: SQLite in the state folder.",
            metavar="URL",
            show_default=False,
        ),
    ] = None,
    keep_days: Annotated[
        int | None,
        typer.Option(
            help="Finished runs and events go from the records after N days, 30 if not given; 0: never.",
            min=0,
            max=36500,
            metavar="N",
            show_default=False,
        ),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            help="Tell this webhook or Apprise address of renders that fail, crash or are late; '' for none.",
            metavar="URL",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Start a Prefect server in the background, with a lane for each GPU and a worker for renders."""
    from flows.alive import crash_lost_runs
    from flows.automations import ensure_backstop, set_notifications
    from flows.database import DatabaseOptions
    from flows.prefect_client import import_prefect, load_prefect, prefect_client
    from flows.server import start_server, stop_server
    from flows.status_view import print_server
    from flows.supervisor import Crew, start_supervisor

    crew = Crew.of(gpus, pretend_gpus, name, renders)
    options = DatabaseOptions(postgres, database, keep_days)
    import_prefect()  # a server with settings that are wrong would end with a traceback in its log
    server, fresh = start_server(host, port, options)
    try:
        crash_lost_runs(server.api_url)
        load_prefect(server.api_url)
        with prefect_client(server.api_url) as client:
            ensure_backstop(client)
            if notify is not None:
                set_notifications(client, notify)
        supervisor = start_supervisor(crew, server.api_url, options.environment)
    except BaseException:
        if fresh:
            stop_server()
        raise
    print_server(console, server, fresh, supervisor)


@server_app.command()
def down(
    now: Annotated[
        bool, typer.Option("--now", help="Break off the shards at hand, which would be finished else.")
    ] = False,
) -> None:
    """Stop what `avatar up` started. The server's records stay for the next start."""
    from flows.server import stop_server
    from flows.supervisor import stop_supervisor

    stop_supervisor(console.print, at_once=now)
    server = stop_server()
    console.print(f"stopped {server.address}" if server else "no server runs", highlight=False)


@server_app.command()
def worker(
    gpus: Gpus = None,
    pretend_gpus: PretendGpus = 0,
    name: HostName = None,
    renders: Renders = 1,
    remove: Annotated[
        str | None, typer.Option(help="Forget the queues of a machine that is gone.", metavar="NAME")
    ] = None,
    keep_server: Annotated[bool, typer.Option("--keep-server", hidden=True)] = False,
) -> None:
    """Serve the GPUs and renders of this machine for a server, until Ctrl-C."""
    from flows.prefect_client import check_named, connect
    from flows.supervisor import Crew, supervise

    crew = Crew.of(gpus, pretend_gpus, name, renders)
    if remove is None:
        check_named()  # who only looks after processes does without Prefect
        supervise(crew, keep_server=keep_server)
        return
    connect()
    from flows.prefect_client import prefect_client
    from flows.queues import remove_host

    with prefect_client() as client:
        removed = remove_host(client, remove)
    console.print(f"removed {', '.join(removed)}", highlight=False)


@server_app.command()
def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A dataset's name (its latest run) or a run id.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> None:
    """What the server has in the log of a run, that of its tasks and shards included."""
    from flows.prefect_client import connect

    connect()
    from flows.run_logs import print_logs

    print_logs(console, run, follow=follow)


@server_app.command(hidden=True)
def lane(gpu: int, pretend: Annotated[bool, typer.Option("--pretend")] = False) -> None:
    """Serve the queue of one GPU; started by `avatar up` and `avatar worker`."""
    from flows.prefect_client import connect

    connect()
    from flows.lane import serve_queue

    serve_queue(gpu, pretend=pretend)


@server_app.command(hidden=True)
def renders(limit: Annotated[int, typer.Option(min=1)] = 1) -> None:
    """Run what is scheduled for this machine; started by `avatar up` and `avatar worker`."""
    from flows.worker import run_renders

    run_renders(limit)


@server_app.command(hidden=True)
def execute() -> None:
    """Run one scheduled render; started by `avatar worker`."""
    from flows.worker import execute_run

    execute_run()
