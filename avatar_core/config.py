"""What a run is asked to do, as typed, frozen values.

A plain mapping (from Hydra, YAML or a Python caller) becomes a `Config`; all unknown keys and bad values
are reported together. Defaults stand here; `conf/config.yaml` shows them and a test keeps both equal.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from avatar_core.errors import ConfigError, shown
from avatar_core.option_types import choices, described, is_text, option_type

_WINDOWS_PATH = re.compile(r"([A-Za-z]):[\\/]")


def check_place(place: str) -> str:
    """A path or URI, as it is. Raises `ValueError` for what no file here can be called."""
    if found := _WINDOWS_PATH.match(place):
        rest = place[found.end() :].replace("\\", "/")
        raise ValueError(
            f"{place} is a Windows path; give a POSIX path, in WSL /mnt/{found[1].lower()}/{rest}"
        )
    if "\0" in place:
        raise ValueError(f"{place!r} holds a character that no file name can have")
    if place.startswith("~"):
        try:
            Path(place).expanduser()
        except RuntimeError:
            user = place.partition("/")[0]
            raise ValueError(f"{place}: there is no user {user[1:]}; write ./{place} for a name") from None
    return place


def _as_text(value: Any) -> Any:
    """Paths as text, and whole numbers, which is what YAML makes of a name such as 2024."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_encoding(text: str) -> str:
    if text.encode(errors="replace") != text.encode(errors="surrogatepass"):
        raise ValueError(f"{text!r} is not UTF-8; give it, or the file, another name")
    return text


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1), AfterValidator(_check_encoding)]
Place = Annotated[Text, AfterValidator(check_place)]
"""A path or URI."""
Positive = Annotated[float, Field(gt=0)]
FRAME_RATE = Field(ge=1, le=120)

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _lossy(crf: int) -> int:
    if crf == 0:
        raise ValueError("0 is lossless, which most players cannot show; use 1, the least allowed")
    return crf


@dataclass(frozen=True)
class InputConfig:
    """What a table may point at. Roots are folders or URIs; empty means anywhere on this machine."""

    __pydantic_config__ = _STRICT
    allow_network: bool = False
    allowed_roots: tuple[Place, ...] = ()
    max_bytes: Annotated[int, Field(gt=0)] = 2 * 1024**3
    max_pixels: Annotated[int, Field(gt=0)] = 50_000_000
    max_duration_s: Positive = 3600.0
    min_side: Annotated[int, Field(ge=2)] = 32


@dataclass(frozen=True)
class AudioConfig:
    """Recordings longer than `max_duration_s` are split into equal parts, refused, or trimmed."""

    __pydantic_config__ = _STRICT
    min_duration_s: Positive = 0.2
    max_duration_s: Annotated[float, Field(ge=1)] | None = None
    long: Literal["split", "refuse", "trim"] = "split"
    silence_db: Annotated[float, Field(le=0)] = -60.0


@dataclass(frozen=True)
class TtsConfig:
    """Which weights say the texts of a table; `kokoro-tiny` are random ones."""

    __pydantic_config__ = _STRICT
    checkpoint: Literal["kokoro", "kokoro-tiny"] = "kokoro"


@dataclass(frozen=True)
class FaceConfig:
    """`rule` picks the speaker where a picture has several faces and the table gives no `bbox`."""

    __pydantic_config__ = _STRICT
    required: bool = True
    rule: Literal["largest", "leftmost", "most_confident"] = "largest"
    min_face: Annotated[int, Field(ge=12)] = 40


@dataclass(frozen=True)
class VideoConfig:
    """`fps` applies to rows without their own. Pictures larger than `max_side` are scaled down to it."""

    __pydantic_config__ = _STRICT
    fps: Annotated[float, FRAME_RATE] = 25.0
    max_side: Annotated[int, Field(ge=64, le=8192)] = 1280
    crf: Annotated[int, AfterValidator(_lossy), Field(ge=1, le=51)] = 20
    x264_preset: Literal[
        "ultrafast",
        "superfast",
        "veryfast",
        "faster",
        "fast",
        "medium",
        "slow",
        "slower",
        "veryslow",
    ] = "veryfast"


@dataclass(frozen=True)
class StorageConfig:
    """`options` go to fsspec (endpoint, credentials, profile) and are never written anywhere."""

    __pydantic_config__ = _STRICT
    root: Place = "./avatar-store"
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class RuntimeConfig:
    """How this machine does the work; nothing here changes a result.

    `gpus` are numbers as `CUDA_VISIBLE_DEVICES` counts them; with `pretend` their queues run on the CPU.
    `cpus` is the number of processes for the rest (None: one per usable core). `memory` is the level at
    which the models of a backend that has levels are loaded; where it runs out, the next lower one is tried.
    A GPU that had nothing to do for `idle_s` is let go, so that another render of this machine can have it.
    Where renders share the queues of a server, shards of higher `priority` are taken first.
    """

    __pydantic_config__ = _STRICT
    gpus: tuple[Annotated[int, Field(ge=0)], ...] | Literal["auto"] = "auto"
    pretend: bool = False
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: str = "auto"
    item_timeout_s: Positive = 1800.0
    idle_s: Positive = 60.0
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    retries: Annotated[int, Field(ge=0)] = 2
    cache_dir: Place | None = None
    cache_bytes: Annotated[int, Field(gt=0)] = 20 * 1024**3
    shard_seconds: Positive = 10.0


@dataclass(frozen=True)
class Config:
    """One batch. `table` is a path or URI; `rows` may hold the rows themselves instead."""

    __pydantic_config__ = _STRICT
    table: Place | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    name: Text | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    takes: Annotated[int, Field(ge=1, le=1000)] = 1
    limit: Annotated[int, Field(ge=1)] | None = None
    only: tuple[Text, ...] = ()
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    budget_hours: Positive | None = None
    retry_failed: bool = False
    input: InputConfig = InputConfig()
    audio: AudioConfig = AudioConfig()
    tts: TtsConfig = TtsConfig()
    face: FaceConfig = FaceConfig()
    video: VideoConfig = VideoConfig()
    storage: StorageConfig = field(default_factory=StorageConfig)
    runtime: RuntimeConfig = RuntimeConfig()
    backend: Mapping[str, Any] = field(default_factory=lambda: {"name": "preview"})

    def __post_init__(self) -> None:
        if self.table and self.rows:
            raise ConfigError("give either `table` or `rows`, not both")


T = TypeVar("T")


def parse(kind: type[T], values: Any, where: str = "", also: Sequence[str] = ()) -> T:
    """Build the dataclass `kind` from plain values, e.g. "fps": "25" becomes 25.0.

    Raises `ConfigError` listing every problem; `where` is the path of `values` in the whole configuration,
    `also` are further names that an unknown option may have been meant to be.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for entry in error.errors():
            name, text = _problem(kind, values, f"{where}." if where else "", dict(entry), also)
            problems.setdefault(name, text)
        raise ConfigError("; ".join(problems.values()), problems) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a configuration, without `storage.options`: those may hold credentials."""
    values = dataclasses.asdict(config)
    values.get("storage", {}).pop("options", None)
    return values


def share_options(config: Any, shared: Mapping[str, Any]) -> None:
    """In the frozen configuration of a backend, sets the options `shared` in every stage that has them.
    Raises `ConfigError` where a stage says otherwise."""
    for stage in dataclasses.fields(config):
        options = getattr(config, stage.name)
        if not dataclasses.is_dataclass(options) or isinstance(options, type):
            continue
        changes = {}
        for option in dataclasses.fields(options):
            if option.name not in shared:
                continue
            value, wanted = getattr(options, option.name), shared[option.name]
            if value not in (option.default, wanted):
                name = f"{stage.name}.{option.name}"
                raise ConfigError(f"backend.{name}={value}: set backend.{option.name} for all stages")
            changes[option.name] = wanted
        object.__setattr__(config, stage.name, dataclasses.replace(options, **changes))


def option_names(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of every option of a dataclass."""
    names = []
    for option in dataclasses.fields(kind):
        name = f"{prefix}{option.name}"
        names.append(name)
        if dataclasses.is_dataclass(option.type):
            names += option_names(option.type, f"{name}.")
    return names


def nearest(name: str, allowed: Sequence[str]) -> str:
    """A hint ", did you mean ...?" or nothing."""
    leaf = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, allowed, 1, 0.6) or [
        option for option in allowed if option.rpartition(".")[2] == leaf
    ]
    return f"; did you mean `{close[0]}`?" if close else ""


def _problem(
    kind: Any, values: Any, prefix: str, error: dict[str, Any], also: Sequence[str]
) -> tuple[str, str]:
    """The option that an error of pydantic is about, and a sentence on it."""
    path: list[str] = []
    for part in map(str, error["loc"]):
        if not dataclasses.is_dataclass(option_type(kind, ".".join(path)) if path else kind):
            break  # the rest says which alternative or item it is
        path.append(part)
        values = values.get(part) if isinstance(values, Mapping) else getattr(values, part, None)
    name = prefix + ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return name, f"unknown option `{name}`{nearest(name, [*option_names(kind, prefix), *also])}"
    if not path:
        return name, f"a configuration is a mapping such as {{'table': 'batch.csv'}} (got {shown(values)})"
    return name, f"option `{name}`: {_advice(option_type(kind, '.'.join(path)), values, name, error)}"


def _advice(annotation: Any, value: Any, name: str, error: dict[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    quoting = ", in quotes" if is_text(annotation) else ""
    quoting = quoting if isinstance(value, bool | int | float) else ""
    hint = nearest(value, choices(annotation)) if isinstance(value, str) else ""
    secret = name == "storage" or name.startswith("storage.options")
    got = f" (got {shown(value)})" if not secret and not isinstance(value, Mapping) else ""
    return f"give {described(annotation)}{quoting}{got}{hint}"
