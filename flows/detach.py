"""`avatar render --detach`: the render is left to this machine's worker, and the terminal is free."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from avatar_core.planning.batch import batch_name, open_batch
from flows.deploy_command import filled_form
from flows.names import host_name, render_queue
from flows.prefect_client import connect, prefect_client
from flows.run_form import run_config


def detach(
    console: Console,
    words: Sequence[str],
    config_dir: Path | None,
    *,
    limit: int | None,
    only: Sequence[str],
    takes: int | None,
) -> None:
    """Raises `ConfigError` for what cannot be rendered, which is looked at now, and where nobody would."""
    words = [*words, *([f"takes={takes}"] if takes is not None else [])]
    form = replace(filled_form(words, config_dir), limit=limit, only=tuple(only))
    config = run_config(form)
    open_batch(config)
    connect()
    from prefect.utilities.urls import url_for

    from flows.deploy import register_host
    from flows.queues import served_queues

    host = host_name()
    with prefect_client() as client:
        deployment = register_host(client, host)
        run = client.create_flow_run_from_deployment(
            deployment,
            parameters=form.filled_in(),
            name=batch_name(config),
            work_queue_name=render_queue(host),
            job_variables={"working_dir": str(Path.cwd())},  # where a store that nobody named is
        )
        is_served = render_queue(host) in served_queues(client)
    name = shlex.quote(batch_name(config))
    store = "".join(f" {shlex.quote(word)}" for word in words if word.startswith(("storage.", "storage=")))
    for line in (
        f"submitted: {url_for(run)}",
        f"`avatar status {name}{store}` and `avatar logs {name} -f` tell how it goes"
        if is_served
        else f"nobody renders on {host} yet: `avatar up` or `avatar worker` there does what waits",
    ):
        console.print(Text(line), soft_wrap=True)
