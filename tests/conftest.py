"""Storage on a local disk and on an S3 server that lives as long as its test process.

What is heavy is imported by the fixture that needs it: a test of pure code starts neither the command line
nor an S3 server, and shows what the code under test imports by itself.
"""

import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from avatar_core.store.storage import Storage
    from tests.sample_rows import Rendered, RunAvatar

hypothesis.settings.register_profile("shared machine", deadline=None, max_examples=50)
hypothesis.settings.load_profile("shared machine")

_BUCKET = "avatar-test"
_ACCESS = {"key": "test-access", "secret": "test-secret-value"}


@pytest.fixture(scope="session", autouse=True)
def own_prefect(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither use nor fill the Prefect database of whoever runs them."""
    folder = tmp_path_factory.mktemp("prefect_home")
    os.environ["PREFECT_HOME"] = str(folder)
    os.environ["AVATAR_STATE_DIR"] = str(folder / "state")
    os.environ.pop("PREFECT_API_URL", None)


@pytest.fixture(scope="session", autouse=True)
def own_devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests that pretend to have a GPU wait for nobody else who does."""
    os.environ["AVATAR_LOCK_DIR"] = str(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="session", autouse=True)
def signals_arrive() -> None:
    """A shell starts what runs beside a script with SIGINT ignored, which every process passes on to those
    that it starts: these would never get what a test sends them."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=_ACCESS["key"],
        aws_secret_access_key=_ACCESS["secret"],
    )
    client.create_bucket(Bucket=_BUCKET)
    yield {**_ACCESS, "endpoint_url": endpoint}
    server.stop()


@pytest.fixture
def s3_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what this process asks S3 for, such as `head_object`, as it goes on."""
    import fsspec.asyn

    s3, asked = fsspec.get_filesystem_class("s3"), []
    call = s3._call_s3

    async def recorded(files: Any, method: str, *arguments: Any, **named: Any) -> Any:
        asked.append(method)
        return await call(files, method, *arguments, **named)

    monkeypatch.setattr(s3, "_call_s3", recorded)
    monkeypatch.setattr(s3, "call_s3", fsspec.asyn.sync_wrapper(recorded))
    return asked


@pytest.fixture
def s3_root() -> str:
    return f"s3://{_BUCKET}/{uuid.uuid4().hex}"


MakeStorage = Callable[..., "Storage"]


@pytest.fixture(params=["disk", "s3"])
def make_storage(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStorage:
    """Opens one root of this test, anew with each call; keyword arguments go to `Storage`."""
    from avatar_core.store.storage import Storage

    root, options = str(tmp_path / "store"), None
    if request.param == "s3":
        root, options = request.getfixturevalue("s3_root"), request.getfixturevalue("s3_options")

    def make(**arguments: Any) -> Storage:
        return Storage(root, options, **{"cache_dir": tmp_path / "cache", **arguments})

    return make


@pytest.fixture
def storage(make_storage: MakeStorage) -> "Storage":
    return make_storage()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two portraits, a picture of two people, one of nobody, and two recordings; not to be changed."""
    from tests.sample_rows import write_landscape, write_picture, write_recording

    folder = tmp_path_factory.mktemp("inputs")
    write_picture(folder / "portrait.jpg")
    write_picture(folder / "closeup.jpg", "closeup")
    write_picture(folder / "two_people.jpg", "two_people", side=400)
    write_landscape(folder / "landscape.png")
    write_recording(folder / "hello.wav", start_s=0.5)
    write_recording(folder / "again.wav", start_s=1.5, duration_s=0.48)
    return folder


@pytest.fixture(scope="session")
def rendered(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> "Rendered":
    """A finished batch; tests that change the store take their copy of it from `store`."""
    from avatar_core.pipeline import render
    from tests.sample_rows import Rendered, write_table

    rows = [
        {"image": image, "audio": audio, "prompt": "A person talks."}
        for image in ("portrait.jpg", "closeup.jpg")
        for audio in ("hello.wav", "again.wav")
    ]
    table = write_table(inputs / "batch.csv", rows)
    store = tmp_path_factory.mktemp("rendered") / "store"
    return Rendered(table, store, render({"table": str(table), "storage": {"root": str(store)}}))


@pytest.fixture
def store(rendered: "Rendered", tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered.store, tmp_path / "store"))


@pytest.fixture
def avatar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> "RunAvatar":
    """Runs the `avatar` command in this process, which knows of no server: exit code and output, both streams
    joined."""
    from flows.cli import main

    monkeypatch.setenv("AVATAR_STATE_DIR", str(tmp_path / "no-server"))

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["avatar", *map(str, words)])
        # Prefect's handlers keep the streams of the test that configured them.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        return int(str(code or 0)), "".join(capsys.readouterr())

    return run
