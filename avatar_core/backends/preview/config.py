"""Options of the `preview` backend, by stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class ReferenceConfig:
    """`landmarks`: outlines from the 468-point mesh, from the detector's 5 points, or the best present."""

    __pydantic_config__ = _STRICT
    landmarks: Literal["auto", "mesh", "points"] = "auto"


@dataclass(frozen=True)
class DenoiseConfig:
    __pydantic_config__ = _STRICT
    mouth_gain: Annotated[float, Field(ge=0, le=1.5)] = field(default=1.0, metadata={"row": True})
    head_motion: Annotated[float, Field(ge=0, le=2)] = field(default=1.0, metadata={"row": True})
    blinks: bool = field(default=True, metadata={"row": True})


@dataclass(frozen=True)
class PreviewConfig:
    __pydantic_config__ = _STRICT
    reference: ReferenceConfig = ReferenceConfig()
    denoise: DenoiseConfig = DenoiseConfig()
