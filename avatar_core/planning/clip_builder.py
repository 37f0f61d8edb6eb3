"""Rows become clips: what is known of each, and the items that its stages then need. Pure.

A row gives one clip per take and part; clips that need the same picture or recording share its items, because
their keys are equal. How stages hang together they say themselves.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, cast

from avatar_core import weights
from avatar_core.backends.base import Backend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import InputError
from avatar_core.media.row_sources import combination_of, picture_of, recordings_of
from avatar_core.media.speakers import combined_duration_s
from avatar_core.media.table import TableRow
from avatar_core.media.video import AAC_SAMPLE_RATES, aac_sample_rate
from avatar_core.planning.clip import Clip, Source
from avatar_core.planning.clip_names import numbered_name
from avatar_core.planning.item_builder import RECENT, ItemBuilder
from avatar_core.stages.base import Asset, ItemSpec
from avatar_core.stages.subject import (
    BackendOptions,
    BatchOptions,
    Combination,
    Segment,
    SoundFormat,
    Subject,
)
from avatar_core.store.keys import canonical_json, derive_seed, digest, row_content


@dataclass(frozen=True, slots=True)
class _Speech:
    """What the recordings of a row are, and the stretches of them that become clips."""

    recordings: tuple[Asset, ...]
    sound: SoundFormat
    segments: tuple[Segment, ...]


class ClipBuilder:
    """Builds the clips of a batch. `sources` maps `<column>:<uri>` of each picture, video and recording,
    as the table names it, to what ingest made of it.

    Building is pure, and quick enough to be done again whenever a clip is looked at.
    """

    def __init__(self, config: Config, backend: Backend, sources: Mapping[str, Source]) -> None:
        self.config = config
        self.backend = backend
        self.stages = backend.stages()
        self.sources = sources
        self.chained = [name for name, stage in self.stages.items() if stage.chained]
        self._owners = _row_options(backend)
        self._batch = BatchOptions(config.input, config.audio, config.face, config.video)
        fingerprint = cache(_weights_fingerprint)
        self._builders = [ItemBuilder(stage, fingerprint) for stage in self.stages.values()]
        # Neighbouring rows share recordings and options.
        self._speech = lru_cache(RECENT)(self._speech_of)
        self._options = lru_cache(RECENT)(self._backend_options)

    def clips(self, row: TableRow, name: str) -> list[Clip]:
        """All takes and parts of a row; a single rejected clip if something is wrong with it."""
        try:
            if row.error:
                raise InputError(row.error)
            return list(self._takes(row, name))
        except InputError as error:
            return [Clip(row, name, error=str(error))]

    def _takes(self, row: TableRow, name: str) -> Iterator[Clip]:
        if row.video and not self.backend.takes_video:
            raise InputError(
                f"column `video`: backend {self.backend.name} renders from pictures only; give `image`, or "
                "choose a backend that takes footage"
            )
        if len(recordings_of(row)) > self.backend.max_speakers:
            column = "voice_2" if row.voice_2 else "audio_2"
            raise InputError(
                f"column `{column}`: backend {self.backend.name} renders {self.backend.max_speakers} "
                "speaker; leave it empty or choose a backend for several"
            )
        picture = self._asset(picture_of(row))
        fps = row.fps or self.config.video.fps
        combine = cast(Combination, combination_of(row))
        speech = self._speech(recordings_of(row), combine, fps)
        params = canonical_json(dict(row.params)) if row.params else "{}"
        seed = row.seed
        if seed is None:
            seed = derive_seed(self.config.seed, self._content(row, picture, speech, params))
        segments = speech.segments
        for take in range(self.config.takes):
            take_seed = seed if take == 0 else derive_seed(seed, take)
            for part, segment in enumerate(segments):
                part_seed = take_seed if part == 0 else derive_seed(take_seed, "part", part)
                part_name = numbered_name(name, take, part if len(segments) > 1 else None)
                subject = Subject(
                    batch=self._batch,
                    options=self._options(params),
                    picture=picture,
                    footage=bool(row.video),
                    recordings=speech.recordings,
                    sound=speech.sound,
                    segment=segment,
                    fps=fps,
                    boxes=row.bbox or (),
                    prompt=row.prompt or "",
                    negative_prompt=row.negative_prompt,
                    seed=part_seed,
                )
                made = self._items(subject)
                items = {stage: found[-1] for stage, found in made.items()}
                windows = {stage: made[stage] for stage in self.chained}
                yield Clip(row, part_name, take, part, part_seed, items, windows=windows)

    def _items(self, subject: Subject) -> dict[str, tuple[ItemSpec, ...]]:
        made: dict[str, tuple[ItemSpec, ...]] = {}
        for builder in self._builders:
            made[builder.stage.name] = builder.items(subject, made)
        return made

    def _asset(self, name: str) -> Asset:
        asset = self._source(name).asset
        assert asset is not None
        return asset

    def _source(self, name: str) -> Source:
        source = self.sources[name]
        if source.asset is None:
            raise InputError(source.error)
        return source

    def _speech_of(self, recordings: tuple[str, ...], combine: Combination, fps: float) -> _Speech:
        sources = [self._source(name) for name in recordings]
        durations = [source.columns["duration_s"] for source in sources]
        segments = cut(combined_duration_s(durations, combine), combine, self.config, fps)
        return _Speech(tuple(map(self._asset, recordings)), _sound_format(sources), tuple(segments))

    def _content(self, row: TableRow, picture: Asset, speech: _Speech, params: str) -> str:
        return row_content(
            pictures=[picture.sha256],
            recordings=[asset.sha256 for asset in speech.recordings],
            prompt=row.prompt,
            negative_prompt=row.negative_prompt,
            fps=row.fps or self.config.video.fps,
            audio_type=row.audio_type,
            bbox=row.bbox,
            params=self._row_values(params) if row.params else {},
        )

    def _row_values(self, params: str) -> dict[str, Any]:
        """A row's `params` as the backend understands them, so that 1 and 1.0 are one value."""
        by_stage = self._options(params).by_stage
        return {name: vars(by_stage[self._owners[name]])[name] for name in json.loads(params)}

    def _backend_options(self, params: str) -> BackendOptions:
        """After a row's `params` (canonical JSON)."""
        by_stage = self.backend.options()
        for name, value in json.loads(params).items():
            if name not in self._owners:
                allowed = ", ".join(sorted(self._owners)) or "none"
                raise InputError(
                    f"column `params`: unknown option `{name}` for backend {self.backend.name}; "
                    f"a row may set: {allowed}{nearest(name, list(self._owners))}"
                )
            stage = self._owners[name]
            try:
                values = {**dataclasses.asdict(by_stage[stage]), name: value}
                by_stage[stage] = parse(type(by_stage[stage]), values)
            except Exception as error:
                raise InputError(f"column `params`: {error}") from None
        return BackendOptions(by_stage)


def _row_options(backend: Backend) -> dict[str, str]:
    """The stage of each option that a row may set."""
    return {
        option.name: stage
        for stage, options in backend.options().items()
        for option in dataclasses.fields(options)
        if option.metadata.get("row")
    }


def _weights_fingerprint(names: tuple[str, ...]) -> str:
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


def _sound_format(recordings: Sequence[Source]) -> SoundFormat:
    """Sample rate and channels of the clip's sound: the recordings' own where AAC players take it."""
    rates = {int(r.columns["sample_rate"]) for r in recordings}
    rate = rates.pop() if len(rates) == 1 else max(AAC_SAMPLE_RATES)
    channels = max(int(r.columns["channels"]) for r in recordings)
    return SoundFormat(aac_sample_rate(rate), min(channels, 2))
