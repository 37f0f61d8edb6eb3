"""The published checkpoint: six networks under their official names, made ready to run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.appearance import AppearanceConfig, AppearanceExtractor
from avatar_core.backends.ditto.conversion import convert as convert
from avatar_core.backends.ditto.layers import channels_last, fold_norms
from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_extractor import MotionExtractor, MotionExtractorConfig
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork
from avatar_core.checkpoint import load_strict, read_checkpoint
from avatar_core.errors import WeightsError

State = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)

_ENTRIES = {"stitch": "retarget_shoulder", "lmdm": "model_state_dict"}
"""Where a file holds more than one state, the one that is used."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NORMED = ("conv_0.weight", "conv_1.weight", "conv_s.weight")
_TRIPLE = ("weight_orig", "weight_u", "weight_v")


def fold_spectral_norms(state: State) -> dict[str, Tensor]:
    """`weight` in place of each triple that the spectral norm keeps: the stored vectors give its scale."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith(_TRIPLE)}
    for name in state:
        if not name.endswith(".weight_orig"):
            continue
        layer = name.removesuffix("_orig")
        try:
            weight, u, v = (state[f"{layer}{part}"] for part in ("_orig", "_u", "_v"))
        except KeyError as error:
            raise WeightsError(
                f"the checkpoint does not fit SpadeDecoder; missing: {error.args[0]}"
            ) from None
        folded[layer] = weight / torch.dot(u, torch.mv(weight.flatten(1), v))
    return folded


def appearance_extractor(state: State) -> AppearanceExtractor:
    return _build(AppearanceExtractor, AppearanceConfig, state)


def motion_extractor(state: State) -> MotionExtractor:
    return _build(MotionExtractor, MotionExtractorConfig, state)


def warping_network(state: State) -> WarpingNetwork:
    return _build(WarpingNetwork, WarpConfig, state)


def spade_decoder(state: State) -> SpadeDecoder:
    return _build(SpadeDecoder, DecoderConfig, fold_spectral_norms(state))


def stitching_network(state: State) -> StitchingNetwork:
    return _build(StitchingNetwork, StitchingConfig, state)


def motion_decoder(state: State, num_heads: int = 8) -> MotionDecoder:
    with _reading(MotionDecoder):
        config = LmdmConfig.from_state(state, num_heads)
    return _filled(MotionDecoder, config, state)


NETWORKS: Mapping[str, Callable[[State], nn.Module]] = {
    "appearance": appearance_extractor,
    "motion": motion_extractor,
    "warp": warping_network,
    "decoder": spade_decoder,
    "stitch": stitching_network,
    "lmdm": motion_decoder,
}
"""By the names of the weights registry."""


def read_state(name: str, path: Path) -> dict[str, Tensor]:
    """The state of one network from its published file."""
    state = read_checkpoint(path, key=_ENTRIES.get(name))
    return {tensor.replace("module.", ""): state[tensor] for tensor in state} if name == "stitch" else state


def load_network(name: str, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """One of `NETWORKS` on its device, in eval mode. Raises `WeightsError`."""
    model = NETWORKS[name](read_state(name, path))
    fold_norms(model)
    model = model.to(device, dtype)
    if device.startswith("cuda"):
        channels_last(model)
    return model


def dtype_on(device: str, precision: str) -> torch.dtype:
    """A CPU computes in float32 whatever the precision."""
    return _DTYPES[precision] if device.startswith("cuda") else torch.float32


def _build(network: type[Network], config_type: Any, state: State) -> Network:
    with _reading(network):
        config = config_type.from_state(state)
    return _filled(network, config, state)


@contextmanager
def _reading(network: type[nn.Module]) -> Iterator[None]:
    """While sizes are read from the state."""
    try:
        yield
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"the checkpoint does not fit {network.__name__}; missing: {error}") from None


def _filled(network: Callable[[Any], Network], config: Any, state: State) -> Network:
    with torch.device("meta"):
        model = network(config)
    load_strict(model, state)
    return model.eval().requires_grad_(False)


def official_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file of a network of this size (not folded)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if isinstance(model, SpadeDecoder) and name.endswith(_NORMED):
            columns = tensor[0].numel()
            shapes |= {f"{name}_orig": shape, f"{name}_u": shape[:1], f"{name}_v": (columns,)}
        else:
            shapes[name] = shape
    return shapes
