"""What the rows of a batch name or say: pictures, footage, recordings and texts, each taken in once.

The clips of a row can be planned as soon as its sources are known, so that work begins with the first ones.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from avatar_core.config import Config
from avatar_core.errors import InputError
from avatar_core.media.documents import SILENCE
from avatar_core.media.row_sources import Speech, source_names, speeches_of
from avatar_core.media.source import SourceStat, stat_sources
from avatar_core.media.table import TableRows
from avatar_core.planning.clip import Source
from avatar_core.stages.base import Asset, ItemSpec
from avatar_core.stages.ingest import IngestStage, Kind, ingest_config, source_policy
from avatar_core.stages.speech import SpeechStage, prepare, speech_item
from avatar_core.store.keys import config_values, digest, item_key, new_id
from avatar_core.store.results import StageResults

_PER_ROW = 3  # sources at most: a picture and two recordings


class SourceItems(Sequence[ItemSpec]):
    """Items of ingest or speech: they consume nothing."""

    inputs: frozenset[str] = frozenset()

    def __init__(self, specs: Sequence[ItemSpec]) -> None:
        self._specs = specs

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> ItemSpec: ...

    @overload
    def __getitem__(self, index: slice) -> "SourceItems": ...

    def __getitem__(self, index: int | slice) -> "ItemSpec | SourceItems":
        return SourceItems(self._specs[index]) if isinstance(index, slice) else self._specs[index]

    @property
    def work(self) -> NDArray[np.float64]:
        return np.array([spec.work for spec in self._specs], np.float64)

    def places(self, keys: Collection[str]) -> dict[str, int]:
        """Where the items of these keys stand, for those that are among them."""
        wanted = set(keys)
        return {spec.key: place for place, spec in enumerate(self._specs) if spec.key in wanted}


class Sources(Mapping[str, Source]):
    """Sources by name (`<column>:<uri>`, `speech:...`), as far as they are known."""

    def __init__(self, rows: TableRows, config: Config, results: Mapping[str, StageResults]) -> None:
        """Raises `ConfigError` or `WeightsError` where texts are to be said and nobody here can speak."""
        self._results = results
        self._errors: dict[str, str] = {}
        texts = speeches_of(rows)
        if texts:
            prepare(config, sorted({voice for speech in texts.values() for voice in speech[1]}))
        items = {IngestStage.name: dict(self._ingest_items(rows, config))}
        if texts:
            items[SpeechStage.name] = dict(self._speech_items(texts, config))
        self._names = [*chain.from_iterable(items.values()), *self._errors]
        self._specs = [spec for specs in items.values() for spec in specs.values()]
        ends = np.cumsum([len(specs) for specs in items.values()]).tolist()
        self._spans = {
            stage: range(start, end) for stage, start, end in zip(items, [0, *ends], ends, strict=False)
        }
        self._number = {name: number for number, name in enumerate(self._names)}
        self._by_key = {spec.key: number for number, spec in enumerate(self._specs)}
        self._of_row = self._numbers_of(rows)
        self._found: dict[str, Source] = {}
        self._known: NDArray[np.bool_] = np.ones(len(self._names) + 1, bool)  # the last stands for none
        self.look_again()

    def look_again(self) -> None:
        """Only what the store holds is known; the rest is to be taken in."""
        self._found.clear()
        # A failure may pass when the file was mended in place, so only successes are reused.
        for stage, span in self._spans.items():
            has = self._results[stage].has
            self._known[span.start : span.stop] = [has(self._specs[number].key) for number in span]

    def settle(self, key: str) -> None:
        """The item of this key has a row, ok or failed."""
        if (number := self._by_key.get(key)) is not None:
            self._known[number] = True

    @property
    def all_known(self) -> bool:
        return bool(self._known.all())

    def known_rows(self) -> NDArray[np.bool_]:
        """Whether all sources of a row are known, shape (rows,)."""
        known: NDArray[np.bool_] = np.logical_and.reduce(self._known[self._of_row], axis=1)
        return known

    @property
    def stages(self) -> Sequence[str]:
        return list(self._spans)

    def counts(self, stage: str) -> tuple[int, int]:
        """Items of a stage, and how many of them the store holds."""
        span, has = self._spans[stage], self._results[stage].has
        return len(span), sum(has(self._specs[number].key) for number in span)

    def to_do(self, stage: str) -> SourceItems:
        return SourceItems([self._specs[number] for number in self._spans[stage] if not self._known[number]])

    def label(self, key: str) -> str:
        """What an item takes in: `audio a.wav`."""
        return self._names[self._by_key[key]].replace(":", " ", 1)

    def first_row(self, key: str) -> int:
        """The position of the first row that names what an item takes in."""
        return int(np.argmax((self._of_row == self._by_key[key]).any(axis=1)))

    def warnings(self) -> Iterator[str]:
        """What the probes found odd about accepted sources."""
        for name, source in self.items():
            if text := source.columns.get("warning"):
                yield f"{name.replace(':', ' ', 1)}: {text}"

    def __getitem__(self, name: str) -> Source:
        """Raises `KeyError` for a source that is not known yet."""
        if (found := self._found.get(name)) is None:
            found = self._found[name] = self._look_up(name)
        return found

    def _look_up(self, name: str) -> Source:
        if name in self._errors:
            return Source(error=self._errors[name])
        number = self._number[name]
        if not self._known[number]:
            raise KeyError(name)
        stage = next(stage for stage, span in self._spans.items() if number in span)
        key = self._specs[number].key
        row = self._results[stage].ok(key)
        if row is not None:
            return Source(Asset(key, row["sha256"], row["data"], stage), row)
        failure = self._results[stage].failure(key)
        assert failure is not None
        return Source(error=failure["error"])

    def __iter__(self) -> Iterator[str]:
        return (name for name, known in zip(self._names, self._known, strict=False) if known)

    def __len__(self) -> int:
        return int(self._known[:-1].sum())

    def _ingest_items(self, rows: TableRows, config: Config) -> Iterator[tuple[str, ItemSpec]]:
        kinds: dict[str, tuple[Kind, str]] = {}
        for image, video, audio, audio_2, error in rows.columns(
            "image", "video", "audio", "audio_2", "error"
        ):
            if not error:
                kinds |= (
                    {f"image:{image}": ("image", image)} if image else {f"video:{video}": ("video", video)}
                )
                kinds |= {f"audio:{uri}": _recording(uri) for uri in (audio, audio_2) if uri}
        settings = {kind: ingest_config(kind, config) for kind, _ in kinds.values()}
        digests = {kind: digest(config_values(values)) for kind, values in settings.items()}
        policy = source_policy(ingest_config("image", config))
        stats = stat_sources([uri for _, uri in kinds.values()], policy)
        for name, (kind, uri) in kinds.items():
            yield name, ItemSpec(_ingest_key(uri, stats[uri], digests[kind]), settings[kind], source=uri)

    def _speech_items(self, texts: Mapping[str, Speech], config: Config) -> Iterator[tuple[str, ItemSpec]]:
        for name, speech in texts.items():
            try:
                yield name, speech_item(*speech, config)
            except InputError as error:
                self._errors[name] = f"column 'voice': {error}"

    def _numbers_of(self, rows: TableRows) -> NDArray[np.intc]:
        """The sources of each row, shape (rows, 3), -1 for none."""
        numbers = np.full((len(rows), _PER_ROW), -1, np.intc)
        for position, names in enumerate(source_names(rows)):
            numbers[position, : len(names)] = [self._number[name] for name in names]
        return numbers


def _recording(uri: str) -> tuple[Kind, str]:
    return ("silence", uri.removeprefix(SILENCE)) if uri.startswith(SILENCE) else ("audio", uri)


def _ingest_key(uri: str, stat: SourceStat | InputError, settings: str) -> str:
    if isinstance(stat, InputError):
        identity = [uri, str(stat)]  # as for other failures of ingest, each run looks at it anew
    else:
        # A server that tells no version may serve another file next time: such a source is read every time.
        identity = [stat.uri, str(stat.size), stat.version or new_id()]
    return item_key(IngestStage.name, IngestStage.version, settings, "", {"source": identity})
