"""Prefect and its client, with a sentence where the environment is against them."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from avatar_core.errors import AvatarError, ConfigError, shown
from flows.proxies import is_loopback, leave_out_unusable_proxies, reach_directly, unusable_proxies
from flows.server import names_server, running_server, server_environment
from tasks import set_prefect_defaults

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


def check_named() -> None:
    """Raises `ConfigError` where there is no server, without loading Prefect."""
    if not names_server():
        raise ConfigError("there is no Prefect server: start one with `avatar up`, or set PREFECT_API_URL")


def connect() -> str:
    """Has Prefect use the user's own server, or that of `avatar up`; its API's address. Raises `ConfigError`
    without one, or where a setting or a proxy is wrong."""
    check_named()
    os.environ.update(server_environment())
    set_prefect_defaults()
    load_prefect()
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        raise ConfigError(
            "Prefect's settings name no server: set PREFECT_API_URL, or start one with `avatar up`"
        )
    return str(url)


def load_prefect(api_url: str | None = None) -> None:
    """Imports Prefect and makes sure that its client can be made, for `api_url` or what its settings name.

    Raises `ConfigError` where a setting or a proxy is wrong.
    """
    import_prefect()
    # It tells of each try to reach a server that is away; whoever waits for it says so once.
    logging.getLogger("prefect.events.clients").setLevel(logging.CRITICAL)
    from prefect.settings import get_current_settings

    url = api_url or get_current_settings().api.url
    host = _host(url)
    if host is None or is_loopback(host) or _is_ours(url):
        reach_directly(*filter(None, [host]))
        leave_out_unusable_proxies()
    elif names := unusable_proxies():
        raise ConfigError(
            f"the Prefect server at {host} cannot be reached by the proxy in {', '.join(names)}: such a "
            "proxy is http://HOST:PORT, or socks5://HOST:PORT after `pip install socksio`; mend or unset it"
        )


@contextmanager
def prefect_client(api_url: str | None = None) -> Iterator["SyncPrefectClient"]:
    """A client of that server, or of the one that Prefect's settings name, after `load_prefect`. Whatever
    goes wrong with it, or is raised within, is an `AvatarError`."""
    from prefect.client.orchestration import SyncPrefectClient, get_client

    try:
        with SyncPrefectClient(api_url) if api_url else get_client(sync_client=True) as client:
            yield client
    except AvatarError:
        raise
    except Exception as error:  # of httpx, of Prefect, of TLS
        reason = " ".join(str(error).split()) or type(error).__name__
        place = api_url or os.environ.get("PREFECT_API_URL") or "that the settings name"
        raise AvatarError(f"the Prefect server {without_login(place)} cannot be used: {reason}") from error


def without_login(url: str) -> str:
    """A URL as messages show it."""
    login, separator, place = url.rpartition("@")
    return f"{login.partition('://')[0]}://{place}" if separator else url


def import_prefect() -> None:
    """Raises `ConfigError` where a setting is wrong, in place of the many lines that Prefect prints."""
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates and not Path(certificates).is_file():
        raise ConfigError(f"SSL_CERT_FILE={certificates}: no such file; mend or unset it")
    said = io.StringIO()
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(said):
            import prefect.context  # noqa: F401
    except Exception as error:  # settings come from many places, and each has exceptions of its own
        raise ConfigError(_explained(error)) from error
    sys.stderr.write(said.getvalue())


def _explained(error: Exception) -> str:
    from pydantic import ValidationError

    places = "the PREFECT_... variables, profiles.toml, prefect.toml or .env"
    if not isinstance(error, ValidationError):
        return f"Prefect's settings cannot be read ({' '.join(str(error).split())}); look into {places}"
    problems = [
        f"{_variable(problem)}: {problem['msg']} (got {shown(problem['input'])})"
        if problem["loc"]
        else problem["msg"]
        for problem in error.errors()
        if problem["type"] != "default_factory_not_called"  # follows from another one
    ]
    return f"Prefect's settings are wrong: {'; '.join(problems)}; they come from {places}"


def _variable(problem: Any) -> str:
    """The variable that holds what was refused, else the setting's own name."""
    refused, ending = str(problem["input"]).casefold(), f"_{'_'.join(map(str, problem['loc']))}".upper()
    names = [name for name in os.environ if name.startswith("PREFECT_")]
    holding = [name for name in names if os.environ[name].casefold() == refused]
    return next(iter([name for name in holding if name.endswith(ending)] or holding), ending[1:].lower())


def _host(url: str | None) -> str | None:
    try:
        return urlsplit(url).hostname if url else None
    except ValueError:
        return None


def _is_ours(url: str | None) -> bool:
    server = running_server()
    return server is not None and url == server.api_url
