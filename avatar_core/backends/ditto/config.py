"""Options of the `ditto` backend, by stage. No model library is imported here.

Where None is the default, the published configuration file says what holds; where it says nothing or is not
used (`official_config`), `CODE_DEFAULTS`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from avatar_core.config import share_options
from avatar_core.errors import ConfigError

Mode = Literal["default", "parity"]
Detector = Literal["insightface", "mtcnn"]
Precision = Literal["fp16", "bf16", "fp32"]
Output = Literal["full", "crop"]
Side = Annotated[int, Field(ge=32, le=512, multiple_of=2)]
EmotionIndex = Annotated[int, Field(ge=0, le=7)]
EmotionName = Literal["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise", "contempt"]
Ratio = Annotated[float, Field(ge=-1, le=1)]
MotionKey = Literal["scale", "pitch", "yaw", "roll", "t", "exp"]

CODE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "crop_scale": 2.3,
        "crop_vx_ratio": 0.0,
        "crop_vy_ratio": -0.125,
        "crop_flag_do_rot": True,
        "smo_k_s": 13,
        "template_n_frames": -1,
        "emo": 4,
        "eye_f0_mode": False,
        "sampling_timesteps": 50,
        "overlap_v2": 10,
        "smo_k_d": 3,
        "fix_kp_cond": 0,
        "fix_kp_cond_dim": None,
        "use_d_keys": None,
        "drive_eye": None,
        "relative_d": True,
        "delta_eye_open_n": 0,
        "fade_type": "",
        "fade_out_keys": ("exp",),
        "overall_ctrl_info": MappingProxyType({}),
        "flag_stitching": True,
    }
)
"""Of the published code, under its names."""

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_ROW = {"row": True}
_RENAMED = {"num_inference_steps": "sampling_timesteps"}


@dataclass(frozen=True)
class AudioConfig:
    __pydantic_config__ = _STRICT
    mode: Mode = "default"


@dataclass(frozen=True)
class ReferenceConfig:
    """`detector`: `mtcnn` in place of InsightFace's two models, whose licence is non-commercial. The crop
    that the networks see is `crop_scale` times the face, moved by parts of its side (`crop_vx_ratio`,
    `crop_vy_ratio`), turned upright (`crop_flag_do_rot`). Of footage: `smo_k_s` frames over which its motion
    is averaged, `template_n_frames` that are used (-1: all)."""

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    precision: Precision = "fp16"
    official_config: bool = True
    detector: Detector = "insightface"
    crop_scale: Annotated[float, Field(ge=1, le=5)] | None = None
    crop_vx_ratio: Ratio | None = None
    crop_vy_ratio: Ratio | None = None
    crop_flag_do_rot: bool | None = None
    smo_k_s: Annotated[int, Field(ge=1, le=999)] | None = None
    template_n_frames: Annotated[int, Field(ge=-1)] | None = None


@dataclass(frozen=True)
class DenoiseConfig:
    """`emo`: an emotion, or several that are mixed. `overlap_v2`: frames that a window of 80 shares with the
    one before; `smo_k_d`: frames over which the motion is averaged; `fix_kp_cond`: every so many windows (0:
    never) begin from the source's motion, but for the components `fix_kp_cond_dim` (first, end).
    `use_d_keys`: the driven parts of the motion, a list or factors (null: all of a picture, the expression of
    footage); `drive_eye` (null: of pictures); `relative_d`: motion counts from the first frame;
    `delta_eye_open_n`: frames between blinks, or a list of them (0: random, -1: no blinks). `fade_in`,
    `fade_out`: so many frames fade from and to the first driven frame (`fade_type` d0) or the source (s).
    `character`: the reference character of the published configuration conditions the motion.
    `cuda_graph`: each step is one launch on a GPU."""

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    official_config: bool = True
    character: bool = True
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = field(default=None, metadata=_ROW)
    guidance_scale: Annotated[float, Field(ge=0, le=30)] = field(default=2.0, metadata=_ROW)
    emo: EmotionIndex | EmotionName | tuple[EmotionIndex, ...] | None = field(default=None, metadata=_ROW)
    eye_f0_mode: bool | None = None
    overlap_v2: Annotated[int, Field(ge=1, le=79)] | None = None
    smo_k_d: Annotated[int, Field(ge=1, le=80)] | None = None
    fix_kp_cond: Annotated[int, Field(ge=0)] | None = None
    fix_kp_cond_dim: tuple[int, int] | None = None
    use_d_keys: tuple[MotionKey, ...] | Mapping[MotionKey, float] | None = None
    drive_eye: bool | None = field(default=None, metadata=_ROW)
    relative_d: bool | None = None
    delta_eye_open_n: int | tuple[int, ...] | None = field(default=None, metadata=_ROW)
    fade_type: Literal["", "d0", "s"] | None = None
    fade_out_keys: tuple[MotionKey, ...] | None = None
    fade_in: Annotated[int, Field(ge=-1)] = -1
    fade_out: Annotated[int, Field(ge=-1)] = -1
    overall_ctrl_info: Mapping[str, float] | None = field(default=None, metadata=_ROW)
    cuda_graph: bool = field(default=True, metadata={"execution": True})


@dataclass(frozen=True)
class DecodeConfig:
    """`flag_stitching`: the stitching network fits the driven face to the picture. `batch_frames` are
    rendered at once. `compile` (GPU only) takes a minute or two at the start of a run."""

    __pydantic_config__ = _STRICT
    precision: Precision = "fp16"
    official_config: bool = True
    output: Output = "full"
    image_size: Side | None = None
    flag_stitching: bool | None = None
    batch_frames: Annotated[int, Field(ge=1, le=64)] = 5
    compile: bool = field(default=True, metadata={"execution": True})


@dataclass(frozen=True)
class DittoConfig:
    """`mode`, `precision` (of the picture networks on a GPU; a CPU computes in float32), `official_config`,
    `output` and `image_size` hold for every stage that has such an option. `output`: the whole picture, or
    the square round the face with `image_size` pixels a side. Raises `ConfigError` where a stage says
    otherwise."""

    __pydantic_config__ = _STRICT
    mode: Mode = "default"
    precision: Precision = "fp16"
    official_config: bool = True
    output: Output = "full"
    image_size: Side = 512
    checkpoint: Literal["ditto", "ditto-tiny"] = "ditto"
    audio: AudioConfig = AudioConfig()
    reference: ReferenceConfig = ReferenceConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        shared = {name: getattr(self, name) for name in ("mode", "precision", "official_config", "output")}
        shared["image_size"] = self.image_size if self.output == "crop" else None
        share_options(self, shared)
        if self.mode == "parity" and self.reference.detector != "insightface":
            raise ConfigError(
                f"backend.reference.detector={self.reference.detector}: mode=parity needs insightface, which "
                "the reference uses; change one of them"
            )


def chosen(config: Any, official: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stage that `CODE_DEFAULTS` knows, under the published names: from the options given,
    else from the `official` configuration, else from the published code."""
    values = {
        _RENAMED.get(option.name, option.name): getattr(config, option.name)
        for option in dataclasses.fields(config)
    }
    known = {name: value for name, value in values.items() if name in CODE_DEFAULTS}
    return {
        name: value if value is not None else official.get(name, CODE_DEFAULTS[name])
        for name, value in known.items()
    }
