"""Ingest: an outside picture, video or recording becomes an asset of the store, hashed and probed by header.

The only stage that meets what a table names; all later stages read the copy it makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from avatar_core.config import Config
from avatar_core.errors import about
from avatar_core.media.audio import AudioLimits, probe_audio, write_silence_like
from avatar_core.media.footage import FootageLimits, probe_footage
from avatar_core.media.image import ImageLimits, check_size, probe_image
from avatar_core.media.source import SourcePolicy, copy_source
from avatar_core.stages.base import Item, Output, Report, Stage

Kind = Literal["image", "video", "audio", "silence"]
"""`silence` is a recording of nothing, as long as the one that its source names."""


@dataclass(frozen=True)
class IngestConfig:
    """Where a source may lie is checked anew by every run (`stat_source`), so it is no part of the key."""

    kind: Kind
    max_bytes: int
    max_pixels: int
    min_side: int
    min_duration_s: float
    max_duration_s: float
    allow_network: bool = field(default=False, metadata={"execution": True})
    allowed_roots: tuple[str, ...] = field(default=(), metadata={"execution": True})
    storage_options: Mapping[str, Any] = field(default_factory=dict, metadata={"execution": True}, repr=False)


def ingest_config(kind: Kind, config: Config) -> IngestConfig:
    source = config.input
    return IngestConfig(
        kind,
        source.max_bytes,
        source.max_pixels,
        source.min_side,
        config.audio.min_duration_s,
        source.max_duration_s,
        source.allow_network,
        source.allowed_roots,
        config.storage.options,
    )


def source_policy(config: IngestConfig) -> SourcePolicy:
    return SourcePolicy(
        allow_network=config.allow_network,
        allowed_roots=config.allowed_roots,
        max_bytes=config.max_bytes,
        storage_options=config.storage_options,
    )


class IngestStage(Stage):
    name = "ingest"
    noun = "file"
    version = 2
    concurrency = 16
    guessed_seconds = 0.05
    folder = "assets"
    columns = pa.schema(
        {
            "kind": pa.string(),
            "format": pa.string(),
            "bytes": pa.int64(),
            "width": pa.int64(),
            "height": pa.int64(),
            "sample_rate": pa.int64(),
            "channels": pa.int64(),
            "duration_s": pa.float64(),
            "fps": pa.float64(),
            "num_frames": pa.int64(),
            "warning": pa.string(),
        }
    )

    def process(
        self, item: Item, config: IngestConfig, models: None, scratch: Path, report: Report
    ) -> Output:
        assert item.source is not None
        copy = scratch / "asset"
        copy_source(item.source, source_policy(config), copy, on_block=partial(report, 0, 1))
        with about(f"{'audio' if config.kind == 'silence' else config.kind} {item.source}"):
            if config.kind == "silence":
                copy = _silent(copy)
            columns = {**_PROBES[config.kind](copy, config), "kind": config.kind}
        columns["bytes"] = copy.stat().st_size
        return Output(columns, file=copy.rename(scratch / f"asset.{columns['format']}"))


def _silent(recording: Path) -> Path:
    path = recording.with_name("silence")
    write_silence_like(recording, path)
    return path


def _probe_picture(path: Path, config: IngestConfig) -> dict[str, Any]:
    probe = probe_image(path)
    check_size(probe.width, probe.height, ImageLimits(config.max_pixels, config.min_side))
    return {
        "format": probe.format,
        "width": probe.width,
        "height": probe.height,
        "warning": probe.warning,
    }


def _probe_footage(path: Path, config: IngestConfig) -> dict[str, Any]:
    picture = ImageLimits(config.max_pixels, config.min_side)
    probe = probe_footage(path, FootageLimits(picture, config.max_duration_s))
    return {
        "format": probe.format,
        "width": probe.width,
        "height": probe.height,
        "duration_s": probe.duration_s,
        "fps": probe.fps,
        "num_frames": probe.num_frames,
        "warning": probe.warning,
    }


def _probe_recording(path: Path, config: IngestConfig) -> dict[str, Any]:
    probe = probe_audio(path, AudioLimits(config.max_duration_s, config.min_duration_s))
    return {
        "format": probe.format,
        "sample_rate": probe.sample_rate,
        "channels": probe.channels,
        "duration_s": probe.duration_s,
    }


_PROBES: Mapping[Kind, Callable[[Path, IngestConfig], dict[str, Any]]] = {
    "image": _probe_picture,
    "video": _probe_footage,
    "audio": _probe_recording,
    "silence": _probe_recording,
}
