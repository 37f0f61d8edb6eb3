"""Rows become clips: which items of which stages a row needs, and the identity of each. Pure.

This is the one place that knows how stages hang together. A row gives one clip per take and part; clips
that need the same picture or recording share its items, because their keys are equal.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, cast

from avatar_core import weights
from avatar_core.backends.base import Backend, WindowedBackend
from avatar_core.config import Config, nearest, parse
from avatar_core.errors import InputError
from avatar_core.media.row_sources import combination_of, picture_of, recordings_of
from avatar_core.media.speakers import combined_duration_s
from avatar_core.media.table import TableRow
from avatar_core.media.video import AAC_SAMPLE_RATES, aac_sample_rate
from avatar_core.planning.clip import STAGES, Clip, Source
from avatar_core.planning.clip_names import numbered_name
from avatar_core.stages.audio import AudioStageConfig, Combination, Segment
from avatar_core.stages.base import Asset, ItemSpec, Stage
from avatar_core.stages.decode import DecodeStageConfig
from avatar_core.stages.denoise import DenoiseStageConfig
from avatar_core.stages.face import FaceStageConfig
from avatar_core.stages.reference import ReferenceStageConfig
from avatar_core.stages.text import TextStageConfig
from avatar_core.store.keys import (
    canonical_json,
    config_values,
    derive_seed,
    digest,
    item_key,
    row_content,
)

RECENT = 4096  # items kept for the rows that follow


class ClipBuilder:
    """Builds the clips of a batch. `sources` maps `<column>:<uri>` of each picture, video and recording,
    as the table names it, to what ingest made of it.

    Building is pure, and quick enough to be done again whenever a clip is looked at.
    """

    def __init__(
        self, config: Config, backend: Backend, stages: Mapping[str, Stage], sources: Mapping[str, Source]
    ) -> None:
        self.config = config
        self.backend = backend
        self.stages = stages
        self.sources = sources
        self.windowed = backend if isinstance(backend, WindowedBackend) else None
        self.clip_stages = [stage for stage in STAGES if stage in stages]
        self.chained = frozenset({"denoise"} if self.windowed else ())
        # Neighbouring rows share pictures, recordings and options.
        self._settings = lru_cache(RECENT)(self._backend_settings)
        self._face = lru_cache(RECENT)(self._face_item)
        self._text = lru_cache(RECENT)(self._text_item)
        self._audio = lru_cache(RECENT)(self._audio_item)
        self._reference = lru_cache(RECENT)(self._reference_item)
        self._cut = lru_cache(RECENT)(self._cut_segments)
        self._decode = lru_cache(RECENT)(self._decode_config)
        self._digest = lru_cache(RECENT)(lambda config: digest(config_values(config)))
        self._fingerprint = cache(self._weights_fingerprint)

    def clips(self, row: TableRow, name: str) -> list[Clip]:
        """All takes and parts of a row; a single rejected clip if something is wrong with it."""
        try:
            if row.error:
                raise InputError(row.error)
            return list(self._takes(row, name))
        except InputError as error:
            return [Clip(row, name, error=str(error))]

    def _takes(self, row: TableRow, name: str) -> Iterator[Clip]:
        if row.video and not getattr(self.backend, "takes_video", False):
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
        segments = self._segments(row)
        seed = row.seed if row.seed is not None else derive_seed(self.config.seed, self._content(row))
        for take in range(self.config.takes):
            take_seed = seed if take == 0 else derive_seed(seed, take)
            for part, segment in enumerate(segments):
                part_seed = take_seed if part == 0 else derive_seed(take_seed, "part", part)
                part_name = numbered_name(name, take, part if len(segments) > 1 else None)
                items, windows = self._items(row, segment, part_seed)
                yield Clip(row, part_name, take, part, part_seed, items, windows=windows)

    def _items(
        self, row: TableRow, segment: Segment, seed: int
    ) -> tuple[dict[str, ItemSpec], tuple[ItemSpec, ...]]:
        params = canonical_json(dict(row.params)) if row.params else "{}"
        picture, recordings = picture_of(row), recordings_of(row)
        fps = row.fps or self.config.video.fps
        face = self._face(picture)
        audio = self._audio(recordings, segment, fps, params)
        footage_fps = fps if row.video else None
        reference = self._reference(picture, len(recordings), row.bbox or (), params, footage_fps)
        conditions = {"audio": (audio,), "reference": (reference,)}
        if "text" in self.stages:
            conditions["text"] = (self._text(picture, row.prompt or "", row.negative_prompt, params),)

        settings = self._settings(params)
        denoise_config = DenoiseStageConfig(fps, settings.get("denoise"), seed)
        windows: tuple[ItemSpec, ...] = ()
        if self.windowed:
            count = self.windowed.num_windows(segment.duration_s, fps)
            windows = self._windows(denoise_config, conditions, count, audio.work / count)
        denoise = windows or (self._item("denoise", denoise_config, conditions, seed=seed, work=audio.work),)
        decode_config = self._decode(recordings, segment, fps, params)
        assets = {**reference.assets, **audio.assets}
        inputs = {"reference": (reference,), "denoise": denoise}
        decode = self._item("decode", decode_config, inputs, assets, work=audio.work)
        items = {"face": face} | {stage: item for stage, (item,) in conditions.items()}
        return {**items, "denoise": denoise[-1], "decode": decode}, windows

    def _windows(
        self,
        config: DenoiseStageConfig,
        conditions: Mapping[str, tuple[ItemSpec, ...]],
        count: int,
        work: float,
    ) -> tuple[ItemSpec, ...]:
        """Each continues the one before; none knows how many there are."""
        windows: list[ItemSpec] = []
        for window in range(count):
            inputs = {**conditions, "denoise": (windows[-1],)} if windows else conditions
            in_window = replace(config, window=window)
            item = self._item("denoise", in_window, inputs, seed=config.seed, window=window, work=work)
            windows.append(item)
        return tuple(windows)

    def _face_item(self, picture: str) -> ItemSpec:
        limits = self.config.input
        config = FaceStageConfig(self.config.face.min_face, limits.max_pixels, limits.min_side)
        return self._item("face", config, assets=self._pictures(picture))

    def _audio_item(self, recordings: tuple[str, ...], segment: Segment, fps: float, params: str) -> ItemSpec:
        settings = self._settings(params).get("audio")
        config = AudioStageConfig(segment, fps, self.config.audio.silence_db, settings)
        assets = {"audio": tuple(map(self._asset, recordings))}
        return self._item("audio", config, assets=assets, work=segment.duration_s)

    def _text_item(self, picture: str, prompt: str, negative_prompt: str | None, params: str) -> ItemSpec:
        settings = self._settings(params).get("text")
        if not self.backend.text_sees_picture:
            return self._item("text", TextStageConfig(prompt, negative_prompt, backend=settings))
        config = TextStageConfig(prompt, negative_prompt, self.config.video.max_side, settings)
        return self._item("text", config, assets=self._pictures(picture))

    def _reference_item(
        self,
        picture: str,
        speakers: int,
        boxes: tuple[tuple[float, ...], ...],
        params: str,
        footage_fps: float | None,
    ) -> ItemSpec:
        config = ReferenceStageConfig(
            max_side=self.config.video.max_side,
            fps=footage_fps,
            speakers=speakers,
            boxes=boxes,
            rule=self.config.face.rule,
            required=self.config.face.required,
            min_face=self.config.face.min_face,
            backend=self._settings(params).get("reference"),
        )
        face = self._face(picture)
        return self._item("reference", config, {"face": (face,)}, face.assets)

    def _decode_config(
        self, recordings: tuple[str, ...], segment: Segment, fps: float, params: str
    ) -> DecodeStageConfig:
        sample_rate, channels = _sound_format(list(map(self._source, recordings)))
        video = self.config.video
        return DecodeStageConfig(
            segment=segment,
            fps=fps,
            max_side=video.max_side,
            sample_rate=sample_rate,
            channels=channels,
            num_frames=self.backend.num_frames(segment.duration_s, fps),
            crf=video.crf,
            x264_preset=video.x264_preset,
            backend=self._settings(params).get("decode"),
        )

    def _item(
        self,
        name: str,
        config: Any,
        inputs: Mapping[str, tuple[ItemSpec, ...]] | None = None,
        assets: Mapping[str, tuple[Asset, ...]] | None = None,
        *,
        seed: int | None = None,
        window: int | None = None,
        work: float = 1.0,
    ) -> ItemSpec:
        stage = self.stages[name]
        keys = {stage_name: tuple([s.key for s in specs]) for stage_name, specs in (inputs or {}).items()}
        consumed = keys | {column: tuple(a.sha256 for a in found) for column, found in (assets or {}).items()}
        if seed is not None:
            consumed["seed"] = (str(seed),)
        if window is not None:
            consumed["window"] = (str(window),)
        owner = f"{name}/{self.backend.name}" if name in self.backend.versions else name
        fingerprint = self._fingerprint(stage.weights(config))
        key = item_key(owner, stage.version, self._digest(config), fingerprint, consumed)
        return ItemSpec(key, config, keys, assets or {}, work)

    def _pictures(self, picture: str) -> dict[str, tuple[Asset, ...]]:
        return {picture.partition(":")[0]: (self._asset(picture),)}

    def _asset(self, name: str) -> Asset:
        asset = self._source(name).asset
        assert asset is not None
        return asset

    def _source(self, name: str) -> Source:
        source = self.sources[name]
        if source.asset is None:
            raise InputError(source.error)
        return source

    def _segments(self, row: TableRow) -> tuple[Segment, ...]:
        self._source(picture_of(row))
        fps = row.fps or self.config.video.fps
        return self._cut(recordings_of(row), cast(Combination, combination_of(row)), fps)

    def _cut_segments(self, recordings: tuple[str, ...], combine: Any, fps: float) -> tuple[Segment, ...]:
        durations = [self._source(name).columns["duration_s"] for name in recordings]
        return tuple(cut(combined_duration_s(durations, combine), combine, self.config, fps))

    def _content(self, row: TableRow) -> str:
        return row_content(
            pictures=[self._asset(picture_of(row)).sha256],
            recordings=[self._asset(name).sha256 for name in recordings_of(row)],
            prompt=row.prompt,
            negative_prompt=row.negative_prompt,
            fps=row.fps or self.config.video.fps,
            audio_type=row.audio_type,
            bbox=row.bbox,
            params=self._row_settings(row.params),
        )

    def _row_settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A row's `params` as the backend understands them, so that 1 and 1.0 are one value."""
        if not params:
            return {}
        settings = self._settings(canonical_json(dict(params)))
        values = {name: value for stage in settings.values() for name, value in vars(stage).items()}
        return {name: values[name] for name in params}

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


def _sound_format(recordings: Sequence[Source]) -> tuple[int, int]:
    """Sample rate and channels of the clip's sound: the recordings' own where AAC players take it."""
    rates = {int(r.columns["sample_rate"]) for r in recordings}
    rate = rates.pop() if len(rates) == 1 else max(AAC_SAMPLE_RATES)
    channels = max(int(r.columns["channels"]) for r in recordings)
    return aac_sample_rate(rate), min(channels, 2)
