"""Small real pictures and recordings, and ways to look at what became of them."""

import csv
import wave
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from avatar_core.config import Config
from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import run_settings
from avatar_core.execution.shard_call import in_this_thread
from avatar_core.execution.worker import InProcess
from avatar_core.pipeline import render
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.progress import Silent
from avatar_core.result import Result

SAMPLES = Path(__file__).parents[1] / "data" / "samples"

PREVIEW_STAGES = ("face", "audio", "reference", "denoise", "decode")

RunAvatar = Callable[..., tuple[int, str]]
"""`run("render", table, ...)` gives the exit code and what was printed."""


@dataclass(frozen=True)
class Rendered:
    """A finished batch: `table` names two pictures with two recordings each."""

    table: Path
    store: Path
    result: Result


class Watcher(Silent):
    """What a run did: `to_do` and `cached` by stage, the rows of its items as they ended."""

    def __init__(self) -> None:
        self.to_do: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.ended: list[tuple[str, dict[str, Any]]] = []
        self.published: list[str] = []
        self.warnings: list[str] = []

    def stage_started(self, stage: str, *, items: int, cached: int, to_do: int) -> None:
        self.to_do[stage] = to_do
        self.cached[stage] = cached

    def item_ended(self, stage: str, row: dict[str, Any]) -> None:
        self.ended.append((stage, row))

    def clip_published(self, name: str, path: str) -> None:
        self.published.append(name)

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    @property
    def counts(self) -> dict[str, int]:
        """Items that were computed, by stage."""
        return dict(Counter(stage for stage, _ in self.ended))


def write_picture(path: Path, sample: str = "portrait", side: int = 160, **options: Any) -> Path:
    """A sample scaled to `side`; `options` go to Pillow's `save`."""
    with Image.open(SAMPLES / f"{sample}.jpg") as picture:
        scale = side / max(picture.size)
        picture.resize((round(picture.width * scale), round(picture.height * scale))).save(path, **options)
    return path


def write_landscape(path: Path) -> Path:
    """A picture that shows nobody."""
    y, x = np.mgrid[0:96, 0:128]
    Image.fromarray(np.stack([x, y + x, 255 - y], axis=2).astype(np.uint8)).save(path)
    return path


def speech(start_s: float = 0.5, duration_s: float = 0.6) -> tuple[NDArray[np.int16], int]:
    """A stretch of real speech, mono, and its sample rate."""
    with wave.open(str(SAMPLES / "hello.wav")) as file:
        rate = file.getframerate()
        file.setpos(round(start_s * rate))
        return np.frombuffer(file.readframes(round(duration_s * rate)), np.int16), rate


def write_recording(path: Path, start_s: float = 0.5, duration_s: float = 0.6) -> Path:
    samples, rate = speech(start_s, duration_s)
    return write_wav(path, samples, rate)


def write_wav(path: Path, samples: NDArray[np.int16], rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def render_table(table: Path, store: Path, watcher: Watcher | None = None, **options: Any) -> Result:
    return render({"table": str(table), "storage": {"root": str(store)}, **options}, watcher)


def read_video(path: Path) -> NDArray[np.uint8]:
    """Decoded frames [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def videos(dataset: str | Path) -> dict[str, bytes]:
    """The published videos by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(dataset).glob("videos/*"))}


def only_video(result: Result) -> Path:
    (path,) = Path(result.dataset).glob("videos/*.mp4")
    return path


def attempts(store: Path, stage: str) -> pd.DataFrame:
    """Every row that was ever committed for a stage."""
    paths = sorted((store / "stages" / stage / "manifests").glob("*.parquet"))
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


def data_files(store: Path, stage: str) -> list[Path]:
    return sorted(path for path in (store / "stages" / stage / "data").rglob("*") if path.is_file())


def flip_byte(path: Path) -> None:
    """Damage that leaves the size as it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def expect_same(result: Result, rendered: Rendered) -> None:
    assert result.failures.empty
    assert videos(result.dataset) == videos(rendered.result.dataset)


def open_known(values: Config | Mapping[str, Any]) -> Batch:
    """A batch whose sources are taken in, so that all its clips are known."""
    batch = open_batch(values)
    run = BatchRun(batch, run_settings(batch.config), Silent(), submit=in_this_thread, sources_only=True)
    Coordinator({"here": InProcess(gpu=False)}).drive(run)
    return batch
