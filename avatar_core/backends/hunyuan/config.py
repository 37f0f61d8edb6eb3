"""Options of the `hunyuan` backend, by stage. No model library is imported here."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from avatar_core.config import share_options

Mode = Literal["default", "parity"]
ImageSize = Annotated[int, Field(ge=64, le=1280)]

PROMPT_PREFIX = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, "
NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
    "teeth, bad eyes, bad limbs, distortion, blurring, Lens changes"
)

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_ROW = {"row": True}


@dataclass(frozen=True)
class AudioConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"


@dataclass(frozen=True)
class TextConfig:
    """`prompt_prefix` goes before every prompt, as the model was used; `negative_prompt` serves rows without
    their own."""

    __pydantic_config__ = _STRICT
    image_size: ImageSize = 704
    prompt_prefix: str = PROMPT_PREFIX
    negative_prompt: str = field(default=NEGATIVE_PROMPT, metadata=_ROW)


@dataclass(frozen=True)
class ReferenceConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 704


@dataclass(frozen=True)
class DenoiseConfig:
    """`step_cache`: most steps in the middle run only the last block on the activations of a full step;
    `scaled` fits the reference's schedule of 50 steps to any number of them, `off` runs every step in full,
    `adaptive` runs one in full whenever the clip has moved by `cache_threshold` since the last.
    `transformer`: bfloat16 weights, the official float8 file, or bfloat16
    weights cast to float8 when they are loaded. `checkpoint_steps`: a clip's state is kept on
    this machine's disk every so many steps, so that a killed clip goes on from there (0: never).
    """

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = field(default=50, metadata=_ROW)
    guidance_scale: Annotated[float, Field(gt=1, le=30)] = field(default=7.5, metadata=_ROW)
    flow_shift: Annotated[float, Field(gt=0, le=30)] = field(default=5.0, metadata=_ROW)
    step_cache: Literal["scaled", "reference", "off", "adaptive"] = "scaled"
    cache_threshold: Annotated[float, Field(gt=0, le=10)] = 0.1
    transformer: Literal["bf16", "fp8", "fp8_cast"] = "bf16"
    checkpoint_steps: Annotated[int, Field(ge=0)] = field(default=5, metadata={"execution": True})


@dataclass(frozen=True)
class DecodeConfig:
    __pydantic_config__ = _STRICT
    image_size: ImageSize = 704


@dataclass(frozen=True)
class HunyuanConfig:
    """`mode` and `image_size` hold for every stage that has such an option. `checkpoint` names a folder
    below the weights folder. Raises `ConfigError` where a stage says otherwise."""

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 704
    checkpoint: Literal["hunyuan", "hunyuan-tiny"] = "hunyuan"
    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    reference: ReferenceConfig = ReferenceConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        share_options(self, {"mode": self.mode, "image_size": self.image_size})
