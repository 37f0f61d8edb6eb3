"""Rows become clips: which items of which stages a row needs, and the identity of each. Pure.

This is the one place that knows how stages hang together. A row gives one clip per take and part; clips
that need the same picture or recording share its items, because their keys are equal.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

from slugify import slugify

from avatar_core import weights
from avatar_core.backends.base import Backend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import InputError
from avatar_core.media.speakers import combined_duration_s
from avatar_core.media.table import TableRow
from avatar_core.stages.audio import AudioStageConfig, Segment
from avatar_core.stages.base import Asset, ItemSpec, Stage
from avatar_core.stages.decode import DecodeStageConfig
from avatar_core.stages.denoise import DenoiseStageConfig
from avatar_core.stages.face import FaceStageConfig
from avatar_core.stages.reference import ReferenceStageConfig
from avatar_core.store.keys import canonical_json, config_values, derive_seed, digest, item_key

MAX_NAME_BYTES = 120
SOUND_RATES = (16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


@dataclass(frozen=True, slots=True)
class Source:
    """A picture or recording after ingest: an asset with its header's figures, or the reason against it."""

    asset: Asset | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """One video to be. `items` is empty for a rejected row, whose reason is in `error`."""

    row: TableRow
    name: str
    take: int = 0
    part: int = 0
    seed: int | None = None
    items: Mapping[str, ItemSpec] = field(default_factory=dict)
    error: str | None = None


class ClipBuilder:
    """Builds the clips of a batch. `sources` maps each picture and recording of the table, as written
    there, to what ingest made of it."""

    def __init__(
        self, config: Config, backend: Backend, stages: Mapping[str, Stage], sources: Mapping[str, Source]
    ) -> None:
        self.config = config
        self.backend = backend
        self.stages = stages
        self.sources = sources
        # Equal configurations, fingerprints and overrides recur in every row.
        self._config_digest = cache(lambda config: digest(config_values(config)))
        self._fingerprint = cache(self._weights_fingerprint)
        self._settings_of = cache(self._backend_settings)
        self._shared: dict[str, ItemSpec] = {}

    def clips(self, row: TableRow, name: str) -> Iterator[Clip]:
        """All takes and parts of a row; a single rejected clip if something is wrong with it."""
        try:
            if row.error:
                raise InputError(row.error)
            yield from self._takes(row, name)
        except InputError as error:
            yield Clip(row, name, error=str(error))

    def _takes(self, row: TableRow, name: str) -> Iterator[Clip]:
        segments = self._segments(row)
        seed = row.seed if row.seed is not None else derive_seed(self.config.seed, self._content(row))
        for take in range(self.config.takes):
            take_seed = seed if take == 0 else derive_seed(seed, take)
            for part, segment in enumerate(segments):
                part_seed = take_seed if part == 0 else derive_seed(take_seed, "part", part)
                yield Clip(
                    row,
                    _numbered(name, take, part if len(segments) > 1 else None),
                    take,
                    part,
                    part_seed,
                    self._items(row, segment, part_seed),
                )

    def _items(self, row: TableRow, segment: Segment, seed: int) -> dict[str, ItemSpec]:
        config, settings = self.config, self._settings_of(canonical_json(dict(row.params)))
        image = self._source(row.image, "image")
        recordings = [self._source(uri, "audio") for uri in _recordings(row)]
        assets = {"image": (image.asset,), "audio": tuple(r.asset for r in recordings)}
        picture = {"image": assets["image"]}
        fps = row.fps or config.video.fps
        sample_rate, channels = _sound_format(recordings)
        build = partial(self._item, fps=fps, seconds=segment.duration_s)

        face_config = FaceStageConfig(config.face.min_face, config.input.max_pixels, config.input.min_side)
        audio_config = AudioStageConfig(segment, fps, config.audio.silence_db, settings.get("audio"))
        reference_config = ReferenceStageConfig(
            max_side=config.video.max_side,
            speakers=len(recordings),
            boxes=row.bbox or (),
            rule=config.face.rule,
            required=config.face.required,
            backend=settings.get("reference"),
        )
        denoise_config = DenoiseStageConfig(seed, fps, settings.get("denoise"))
        decode_config = DecodeStageConfig(
            segment=segment,
            fps=fps,
            max_side=config.video.max_side,
            sample_rate=sample_rate,
            channels=channels,
            num_frames=self.backend.num_frames(segment.duration_s, fps),
            crf=config.video.crf,
            x264_preset=config.video.x264_preset,
            config_digest="",
            backend=settings.get("decode"),
        )
        configs = (face_config, audio_config, reference_config, denoise_config, decode_config)
        provenance = digest([self.backend.name, *map(self._config_digest, configs)])
        decode_config = dataclasses.replace(decode_config, config_digest=provenance)

        face = build("face", face_config, assets=picture)
        audio = build("audio", audio_config, assets={"audio": assets["audio"]})
        reference = build("reference", reference_config, {"face": face}, picture)
        denoise = build("denoise", denoise_config, {"audio": audio, "reference": reference})
        decode = build("decode", decode_config, {"reference": reference, "denoise": denoise}, assets)
        return {"face": face, "audio": audio, "reference": reference, "denoise": denoise, "decode": decode}

    def _item(
        self,
        name: str,
        config: Any,
        inputs: Mapping[str, ItemSpec] | None = None,
        assets: Mapping[str, tuple[Any, ...]] | None = None,
        *,
        fps: float,
        seconds: float,
    ) -> ItemSpec:
        stage = self.stages[name]
        keys = {stage_name: (spec.key,) for stage_name, spec in (inputs or {}).items()}
        hashes = {column: tuple(a.sha256 for a in values) for column, values in (assets or {}).items()}
        owner = f"{name}/{self.backend.name}" if name in self.backend.versions else name
        fingerprint = self._fingerprint(stage.weights(config))
        key = item_key(owner, stage.version, self._config_digest(config), fingerprint, {**keys, **hashes})
        if key not in self._shared:
            work = seconds if name in ("audio", "denoise", "decode") else 1.0
            self._shared[key] = ItemSpec(key, config, keys, assets or {}, work)
        return self._shared[key]

    def _source(self, uri: str, column: str) -> Source:
        source = self.sources[f"{column}:{uri}"]
        if source.asset is None:
            raise InputError(source.error)
        return source

    def _segments(self, row: TableRow) -> list[Segment]:
        self._source(row.image, "image")
        durations = [self._source(uri, "audio").columns["duration_s"] for uri in _recordings(row)]
        if row.bbox and len(row.bbox) != len(durations):
            raise InputError(
                f"column `bbox` has {len(row.bbox)} box(es) but the row has {len(durations)} recording(s): "
                "give one box per speaker"
            )
        combine: Any = (row.audio_type or "para") if row.audio_2 else None
        return cut(
            combined_duration_s(durations, combine), combine, self.config, row.fps or self.config.video.fps
        )

    def _content(self, row: TableRow) -> list[Any]:
        hashes = [self._source(row.image, "image").asset.sha256]  # type: ignore[union-attr]
        hashes += [self._source(uri, "audio").asset.sha256 for uri in _recordings(row)]  # type: ignore[union-attr]
        fps = row.fps or self.config.video.fps
        return [hashes, row.prompt, row.negative_prompt, fps, row.audio_type, row.bbox, dict(row.params)]

    def _backend_settings(self, params: str) -> dict[str, Any]:
        """The backend's configuration by stage, after a row's `params` (canonical JSON)."""
        config = self.backend.config
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        owners = {
            option.name: stage
            for stage, values in settings.items()
            if dataclasses.is_dataclass(values)
            for option in dataclasses.fields(values)
            if option.metadata.get("row")
        }
        for name, value in json.loads(params).items():
            if name not in owners:
                allowed = ", ".join(sorted(owners)) or "none"
                raise InputError(
                    f"column `params`: unknown option `{name}` for backend {self.backend.name}; "
                    f"a row may set: {allowed}{nearest(name, list(owners))}"
                )
            stage = owners[name]
            try:
                values = {**dataclasses.asdict(settings[stage]), name: value}
                settings[stage] = parse(type(settings[stage]), values)
            except Exception as error:
                raise InputError(f"column `params`: {error}") from None
        return settings

    def _weights_fingerprint(self, names: tuple[str, ...]) -> str:
        return digest([weights.fingerprint(name) for name in names]) if names else ""


def cut(duration_s: float, combine: Any, config: Config, fps: float) -> list[Segment]:
    """The stretches of a recording that become clips: equal parts, cut between frames."""
    limit = config.audio.max_duration_s
    if limit is None or duration_s <= limit:
        return [Segment(duration_s, combine=combine)]
    if config.audio.long == "refuse":
        raise InputError(
            f"the recording lasts {duration_s:.1f} s, allowed are audio.max_duration_s={limit:g} s: "
            "shorten it, raise the limit, or set audio.long=split"
        )
    if config.audio.long == "trim":
        return [Segment(limit, combine=combine)]
    parts = math.ceil(duration_s / limit)
    edges = [round(duration_s * k / parts * fps) / fps for k in range(parts)] + [duration_s]
    return [Segment(stop - start, start, combine) for start, stop in pairwise(edges)]


def clip_names(rows: Sequence[TableRow]) -> tuple[list[str], list[str]]:
    """A file name for each row, unique whatever the case of its letters, and warnings about doubled ones."""
    names: list[str] = []
    warnings: list[str] = []
    taken: set[str] = set()
    for row in rows:
        wanted = slug(row.name) if row.name else slug(f"{_stem(row.image)}-{_stem(row.audio)}")
        name, number = wanted, 1
        while name.casefold() in taken:
            number += 1
            name = f"{_shortened(wanted, 8)}-{number}"
        if name != wanted and row.name:
            warnings.append(
                f"row {row.index + 1}: name `{wanted}` is already used; this clip is called `{name}`"
            )
        taken.add(name.casefold())
        names.append(name)
    return names, warnings


def slug(text: str) -> str:
    """A safe file name: no separators, no leading dots, at most `MAX_NAME_BYTES` minus room for numbers."""
    name = slugify(text, lowercase=False, allow_unicode=True, regex_pattern=r"[^\w.-]+").strip(".-")
    while ".." in name:
        name = name.replace("..", ".")
    return _shortened(name, 24) or "clip"


def _shortened(name: str, reserve: int) -> str:
    return name.encode()[: MAX_NAME_BYTES - reserve].decode(errors="ignore").rstrip(".-")


def _numbered(name: str, take: int, part: int | None) -> str:
    take_suffix = f"-take{take + 1}" if take else ""
    return name + take_suffix + (f"-part{part + 1}" if part is not None else "")


def _stem(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2].rpartition(".")[0] or uri.rpartition("/")[2]


def _recordings(row: TableRow) -> list[str]:
    return [row.audio, row.audio_2] if row.audio_2 else [row.audio]


def _sound_format(recordings: Sequence[Source]) -> tuple[int, int]:
    """Sample rate and channels of the clip's sound: the recordings' own where AAC players take it."""
    rates = {int(r.columns["sample_rate"]) for r in recordings}
    rate = rates.pop() if len(rates) == 1 else SOUND_RATES[-1]
    channels = max(int(r.columns["channels"]) for r in recordings)
    return (rate if rate in SOUND_RATES else SOUND_RATES[-1]), min(channels, 2)
