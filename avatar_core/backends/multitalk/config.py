"""Options of the `multitalk` backend, by stage. No model library is imported here."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from avatar_core.config import share_options

Mode = Literal["default", "parity"]
ImageSize = Annotated[int, Field(ge=48, le=960)]

OFFICIAL_QUANTISED = ("int8", "fp8")
FLOW_SHIFTS = {480: 7.0, 720: 11.0}
"""By `image_size`; other sizes have that of the nearest."""

NEGATIVE_PROMPT = (
    "bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
    "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still "
    "picture, messy background, three legs, many people in the background, walking backwards"
)

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_ROW = {"row": True}


@dataclass(frozen=True)
class AudioConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"


@dataclass(frozen=True)
class TextConfig:
    """`negative_prompt` serves rows without their own. `encoder`: bfloat16 or the official int8 file."""

    __pydantic_config__ = _STRICT
    negative_prompt: str = field(default=NEGATIVE_PROMPT, metadata=_ROW)
    encoder: Literal["bf16", "int8"] = "bf16"


@dataclass(frozen=True)
class ReferenceConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 480


@dataclass(frozen=True)
class DenoiseConfig:
    """`flow_shift`: None takes that of the size. With a `text_guidance_scale` of 1 a step has two calls of
    the transformer instead of three. `step_cache`: from the sixth step on, `teacache` repeats what the blocks
    added as long as the time embedding has moved by less than `cache_threshold`. A window has `window_frames`
    frames, the first `motion_frames` of which are the last of the one before; `max_windows` limits a clip's
    length (0: as many as the speech needs). `transformer`: bfloat16 weights, an official quantised file, or
    bfloat16 weights cast when they are loaded. `lora`, merged `lora_scale` times into the weights, lets 4 or
    8 steps do.
    """

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 480
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = field(default=40, metadata=_ROW)
    flow_shift: Annotated[float, Field(gt=0, le=100)] | None = field(default=None, metadata=_ROW)
    text_guidance_scale: Annotated[float, Field(ge=1, le=30)] = field(default=5.0, metadata=_ROW)
    audio_guidance_scale: Annotated[float, Field(ge=1, le=30)] = field(default=4.0, metadata=_ROW)
    apg: bool = False
    apg_momentum: Annotated[float, Field(gt=-1, lt=1)] = -0.75
    apg_norm_threshold: Annotated[float, Field(ge=0)] = 55.0
    step_cache: Literal["off", "teacache"] = "off"
    cache_threshold: Annotated[float, Field(gt=0)] = 0.2
    window_frames: Annotated[int, Field(ge=5, le=201)] = 81
    motion_frames: Annotated[int, Field(ge=1, le=197)] = 25
    max_windows: Annotated[int, Field(ge=0)] = 0
    colour_correction: Annotated[float, Field(ge=0, le=1)] = 1.0
    transformer: Literal["bf16", "int8", "fp8", "int8_cast", "fp8_cast"] = "bf16"
    lora: Literal["none", "fusionx", "lightx2v"] = "none"
    lora_scale: Annotated[float, Field(gt=0, le=4)] = 1.0

    def __post_init__(self) -> None:
        for name in ("window_frames", "motion_frames"):
            if (getattr(self, name) - 1) % 4:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give a multiple of four and one, such as 25, 81"
                )
        if self.motion_frames >= self.window_frames:
            raise ValueError(
                f"motion_frames={self.motion_frames} must be fewer than window_frames={self.window_frames}"
            )
        if self.transformer in OFFICIAL_QUANTISED and self.lora == "lightx2v":
            raise ValueError(
                f"lora=lightx2v cannot be merged into transformer={self.transformer}, whose official files "
                f"are plain or with fusionx; give bf16 or {self.transformer}_cast"
            )

    @property
    def shift(self) -> float:
        if self.flow_shift is not None:
            return self.flow_shift
        return FLOW_SHIFTS[min(FLOW_SHIFTS, key=lambda size: abs(size - self.image_size))]


@dataclass(frozen=True)
class DecodeConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 480


@dataclass(frozen=True)
class MultiTalkConfig:
    """`mode` and `image_size` hold for every stage that has such an option. `checkpoint` names a folder
    below the weights folder. Raises `ConfigError` where a stage says otherwise."""

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    image_size: ImageSize = 480
    checkpoint: Literal["multitalk", "multitalk-tiny"] = "multitalk"
    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    reference: ReferenceConfig = ReferenceConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        share_options(self, {"mode": self.mode, "image_size": self.image_size})
