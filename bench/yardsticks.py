"""What the flow is compared with: a bare loop over the stub stages, and a Prefect flow with a task for each.

    python bench/yardsticks.py bare|prefect FOLDER --rows N [--seconds PREP GPU MUX]

Both keep one file per result and skip what is there. A file is synced and then renamed, as the store does it,
so that what counts as finished survives a crash.
"""

import argparse
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

from stub_backend import FEATURES, CallLog

GPU = threading.Lock()


@dataclass(frozen=True)
class Files:
    """Results and the call log of one run of `rows` rows."""

    folder: Path
    rows: int
    seconds: tuple[float, float, float]

    def prepare(self, asset: str) -> Path:
        return self._made("prep", asset, [], self.seconds[0])

    def denoise(self, row: int, conditions: list[Path]) -> Path:
        return self._made("denoise", f"row-{row}", conditions, self.seconds[1])

    def decode(self, row: int, latents: Path) -> Path:
        return self._made("decode", f"row-{row}", [latents], self.seconds[2])

    def _made(self, stage: str, name: str, inputs: list[Path], seconds: float) -> Path:
        path = self.folder / stage / name
        if not path.exists():
            content = b"".join(file.read_bytes() for file in inputs) or os.urandom(4 * FEATURES)
            CallLog(self.folder / "calls.log").call(stage, name, seconds)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                file.write(content[: 4 * FEATURES])
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        return path


def assets(rows: int) -> tuple[int, int]:
    """Numbers of pictures and recordings whose pairs are so many rows, as few of each as possible."""
    pictures = max(1, int(rows**0.5))
    return pictures, -(-rows // pictures)


def pairs(rows: int) -> Iterator[tuple[int, int]]:
    pictures, recordings = assets(rows)
    return islice(product(range(pictures), range(recordings)), rows)


def run_bare(files: Files) -> None:
    for row, (picture, recording) in enumerate(pairs(files.rows)):
        conditions = [files.prepare(f"picture-{picture}"), files.prepare(f"recording-{recording}")]
        files.decode(row, files.denoise(row, conditions))


def run_prefect(files: Files) -> None:
    from tasks import set_prefect_defaults

    set_prefect_defaults()
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE
    from prefect.task_runners import ThreadPoolTaskRunner

    as_task = partial(task, cache_policy=NO_CACHE, persist_result=False)

    def denoise(row: int, conditions: list[Path]) -> Path:
        with GPU:
            return files.denoise(row, conditions)

    tasks = [as_task(function) for function in (files.prepare, denoise, files.decode)]

    @flow(name="task-per-row", task_runner=ThreadPoolTaskRunner(max_workers=4), persist_result=False)  # type: ignore[arg-type]
    def render_rows() -> None:
        prepare, denoise, decode = tasks
        pictures, recordings = assets(files.rows)
        first = [prepare.submit(f"picture-{n}") for n in range(pictures)]
        second = [prepare.submit(f"recording-{n}") for n in range(recordings)]
        last = []
        for row, (picture, recording) in enumerate(pairs(files.rows)):
            latents = denoise.submit(row, [first[picture], second[recording]])
            last.append(decode.submit(row, latents))
        for future in last:
            future.result()

    render_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runner", choices=["bare", "prefect"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seconds", type=float, nargs=3, default=(0.0, 0.0, 0.0))
    options = parser.parse_args()
    for stage in ("prep", "denoise", "decode"):
        (options.folder / stage).mkdir(parents=True, exist_ok=True)
    files = Files(options.folder, options.rows, tuple(options.seconds))
    {"bare": run_bare, "prefect": run_prefect}[options.runner](files)


if __name__ == "__main__":
    main()
