"""What it costs to take many small recordings into a store, on a disk or on S3.

    python bench/ingest.py [--rows 2000] [--root s3|local] [--latency-ms 50] [--before CHECKOUT] [--runs 3]

The S3 server is moto, in a process of its own on the same cores: so without latency the figures are mostly
those of the server, which each request keeps busy for milliseconds. With `--latency-ms` every request waits
for so long on its way, as it does to a real store. `--before` measures the code of another checkout, too, in
turn with this one. Each run is a process of its own and has a store of its own.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from processor import processor
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BUCKET, SAMPLE_RATE = "bench", 16_000
ACCESS = {"key": "bench", "secret": "bench-secret"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--root", choices=("s3", "local"), default="s3")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--before", metavar="CHECKOUT", help="the code to compare with")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--measure", metavar="CONFIG", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(ingest_seconds(json.loads(arguments.measure)), time.process_time())
        return
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        table = write_inputs(inputs, arguments.rows)
        if arguments.root == "local":
            trials = run_trials(arguments, Path(folder), {"table": str(table)}, f"{folder}/store")
        else:
            with (
                s3_server(Path(folder) / "requests.log") as port,
                delayed(port, arguments.latency_ms) as near,
            ):
                upload(inputs, port)
                options = {**ACCESS, "endpoint_url": f"http://127.0.0.1:{near}"}
                config = {"table": f"s3://{BUCKET}/{table.name}", "storage": {"options": options}}
                trials = run_trials(arguments, Path(folder), config, f"s3://{BUCKET}/store")
    show(arguments, trials)


def ingest_seconds(config: Mapping[str, Any]) -> float:
    """With all that starting the workers takes."""
    from avatar_core.store.catalog import load_catalog

    start = time.perf_counter()
    try:
        from avatar_core.planning.batch import open_batch
    except ModuleNotFoundError:  # checkouts of before took everything in as they opened a batch
        from avatar_core.batch import open_batch  # type: ignore[import-not-found]

        batch = open_batch(config)
    else:
        from avatar_core.progress import Silent
        from flows.sources import take_in_sources

        batch = open_batch(config)
        take_in_sources(batch, Silent(), lambda: False)
    seconds = time.perf_counter() - start
    taken_in = len(load_catalog(batch.storage, "ingest").ok_keys())
    assert taken_in == len(batch.clips.rows) + 1, f"{taken_in} files were taken in"
    return seconds


def run_trials(
    arguments: argparse.Namespace, folder: Path, config: dict[str, Any], root: str
) -> dict[str, list[tuple[float, Counter[str]]]]:
    """Seconds and requests by kind of every run, by `before` and `now`."""
    checkouts = {"before": arguments.before, "now": str(HERE.parent)}
    trials: dict[str, list[tuple[float, Counter[str]]]] = {name: [] for name in checkouts if checkouts[name]}
    for run in range(arguments.runs):
        for name, measured in trials.items():
            storage = {**config.get("storage", {}), "root": f"{root}/{name}-{run}"}
            runtime = {"cache_dir": str(folder / f"cache-{name}-{run}")}
            values = json.dumps({**config, "storage": storage, "runtime": runtime})
            told = requests(folder / "requests.log")
            result = subprocess.run(
                [sys.executable, __file__, "--measure", values],
                env={**os.environ, "PYTHONPATH": checkouts[name]},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            measured.append((float(result.stdout.split()[0]), requests(folder / "requests.log") - told))
    return trials


def show(arguments: argparse.Namespace, trials: Mapping[str, list[tuple[float, Counter[str]]]]) -> None:
    files = arguments.rows + 1
    medians = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in trials.items()}
    table = Table(title=f"{files} files, {arguments.root}, {arguments.latency_ms:g} ms, {processor()}")
    for column in ("code", "seconds", "files/s", "requests/file", "ratio", "requests"):
        table.add_column(column, justify="left" if column in ("code", "requests") else "right")
    for name, runs in trials.items():
        counts = runs[-1][1]
        table.add_row(
            name,
            f"{medians[name]:.2f}",
            f"{files / medians[name]:.0f}",
            f"{counts.total() / files:.2f}",
            f"{medians['before'] / medians[name]:.1f}" if "before" in medians else "",
            ", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
        )
    Console(width=140).print(table)


# --- inputs


def write_inputs(folder: Path, rows: int) -> Path:
    """One picture, `rows` recordings of 0.2 to 1 s, none like another, and the table of them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (128, 128, 3), np.uint8)).save(folder / "face.png")
    for row in range(rows):
        samples = random.normal(0, 3000, int(SAMPLE_RATE * random.uniform(0.2, 1.0))).astype(np.int16)
        with wave.open(str(folder / f"{row:06d}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(samples.tobytes())
    table = folder / "table.csv"
    lines = ["image,audio", *(f"face.png,{row:06d}.wav" for row in range(rows))]
    table.write_text("\n".join(lines))
    return table


def upload(folder: Path, port: int) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=ACCESS["key"],
        aws_secret_access_key=ACCESS["secret"],
    )
    client.create_bucket(Bucket=BUCKET)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: client.upload_file(str(path), BUCKET, path.name), folder.iterdir()))


# --- the server and the way to it


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """Its port. Every request is a line of `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file, stdout=file) as server:
        try:
            while not answers(port):
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def requests(log: Path) -> Counter[str]:
    """How many of each kind there were."""
    text = log.read_text() if log.exists() else ""
    found = re.findall(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP/[\d.]+(?:\x1b\[\d+m)*" \d', text)
    return Counter("LIST" if "list-type" in path else method for method, path in found)


@contextmanager
def delayed(port: int, latency_ms: float) -> Iterator[int]:
    """A port behind which every request is passed on after `latency_ms`; the port itself without any."""
    if not latency_ms:
        yield port
        return
    loop = asyncio.new_event_loop()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            requests_forward(reader, far_writer, latency_ms / 1000), answers_back(far_reader, writer)
        )

    server = loop.run_until_complete(asyncio.start_server(carry, "127.0.0.1", 0, backlog=512))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def requests_forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay_s)
            writer.write(head)
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            left = int(length[1]) if length else 0
            while left:
                block = await reader.read(min(left, 1 << 16))
                writer.write(block)
                await writer.drain()
                left -= len(block) or left
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def answers_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while block := await reader.read(1 << 16):
            writer.write(block)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


if __name__ == "__main__":
    main()
