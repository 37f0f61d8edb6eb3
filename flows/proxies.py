"""Proxies of the environment. Servers of this machine are reached without them, by every client library:
httpx and websockets (Prefect), aiohttp and botocore (buckets) all read the same variables."""

import importlib.util
import ipaddress
import os
from collections.abc import Iterator

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def reach_directly(*hosts: str) -> None:
    """Adds to what the user excepts from proxies, in both spellings: some libraries read only one, and each
    may list other hosts."""
    given = {name: os.environ.get(name, "") for name in _EXCEPTIONS}
    for name, value in given.items():
        listed = _entries(value or next(filter(None, given.values()), ""))
        os.environ[name] = ",".join([*listed, *(host for host in hosts if host not in listed)])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unusable_proxies() -> list[str]:
    """Variables with which httpx does not even make a client, whatever host that is for."""
    return [name for name in _set_proxies() if not _is_usable(os.environ[name])]


def leave_out_unusable_proxies() -> None:
    """For a process whose server is on this machine: no proxy would be asked anyway."""
    for name in unusable_proxies():
        del os.environ[name]
    for name in filter(os.environ.get, _EXCEPTIONS):
        os.environ[name] = ",".join(filter(_is_readable, _entries(os.environ[name])))


def _set_proxies() -> Iterator[str]:
    return (name for name in list(os.environ) if name.lower() in _PROXIES and os.environ[name])


def _is_usable(proxy: str) -> bool:
    import httpx

    try:
        scheme = httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}").url.scheme
    except (ValueError, httpx.InvalidURL):
        return False
    return not scheme.startswith("socks") or importlib.util.find_spec("socksio") is not None


def _is_readable(entry: str) -> bool:
    """`[::1]` is what others write for `::1`, and an error to httpx."""
    import httpx

    try:
        httpx.URL(entry if "://" in entry or entry == "*" or _is_address(entry) else f"all://*{entry}")
    except httpx.InvalidURL:
        return False
    return True


def _is_address(entry: str) -> bool:
    try:
        ipaddress.ip_address(entry.partition("/")[0])
    except ValueError:
        return False
    return True


def _entries(value: str) -> list[str]:
    return [entry for part in value.split(",") if (entry := part.strip())]
