"""A random checkpoint in the official layout, small enough to make whole clips on a CPU in seconds.

Every file is of the official kind, with the official names, and is read by the same code. Pictures have the
official sizes (256 in, 512 out), feature maps between them are smaller. What comes out shows nothing, but it
depends on the picture, the sound, the seed and every weight.
"""

import math
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.appearance import AppearanceConfig, AppearanceExtractor
from avatar_core.backends.ditto.config_pickle import read_pickle
from avatar_core.backends.ditto.conversion import write_config
from avatar_core.backends.ditto.files import FILES
from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_extractor import MotionExtractor, MotionExtractorConfig
from avatar_core.backends.ditto.official import official_shapes
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.tiny_config import key_points, tiny_config
from avatar_core.backends.ditto.tiny_onnx import (
    write_blaze_face,
    write_detector,
    write_face_mesh,
    write_landmark106,
    write_landmark203,
    write_speech_model,
)
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork
from avatar_core.errors import WeightsError
from avatar_core.weights import load_registry
from avatar_core.weights.record import Origin, hash_file, write_origin

Writer = Callable[[Sequence[Path], int], object]
"""Writes the files of one part, with a seed."""

_WIDTH = 8

APPEARANCE = AppearanceConfig(channels=(_WIDTH,) * 5, feature_channels=4, depth=2, num_resblocks=1)
MOTION = MotionExtractorConfig(depths=(1, 1, 1, 1), dims=(_WIDTH,) * 4)
WARP = WarpConfig(
    feature_channels=4, depth=2, compress=1, down=(_WIDTH, _WIDTH), up=(_WIDTH, 4), out_channels=_WIDTH
)
DECODER = DecoderConfig(
    feature_channels=_WIDTH, channels=(_WIDTH, _WIDTH, 4), num_middle=1, label_channels=_WIDTH, upscale=8
)
STITCHING = StitchingConfig(hidden_sizes=(16, 16, 16))
LMDM = LmdmConfig(latent_dim=32, ff_size=32, num_layers=1)

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "appearance": lambda: AppearanceExtractor(APPEARANCE),
    "motion": lambda: MotionExtractor(MOTION),
    "warp": lambda: WarpingNetwork(WARP),
    "decoder": lambda: SpadeDecoder(DECODER),
    "stitch": lambda: StitchingNetwork(STITCHING),
    "lmdm": lambda: MotionDecoder(LMDM),
}

_GAINS: Mapping[str, float] = {
    "appearance/*.weight": 2.0,
    "motion/detector.fc_*.weight": 0.1,
    "warp/*conv.weight": 1.6,
    "warp/dense_motion_network.compress.weight": 2.0,
    "warp/dense_motion_network.mask.weight": 16.0,
    "warp/fourth.weight": 3.0,
    "decoder/*.weight": 1.4,
    "decoder/conv_img.0.weight": 0.4,
    "stitch/mlp.6.weight": 0.01,
    "lmdm/cond_projection.weight": 4.0,
    "lmdm/non_attn_cond_projection.*.weight": 2.0,
    "lmdm/seqTransDecoder.*.weight": 1.5,
    "lmdm/final_layer.weight": 0.03,
}
"""By which the usual random weights grow, so that all that a frame depends on shows in it."""

_MARK = "RANDOM_WEIGHTS.txt"
_NOTE = "Random weights in the layout of Ditto's, made by `avatar weights tiny ditto`.\n"
_KEYS = {"stitch": "retarget_shoulder", "lmdm": "model_state_dict"}


def write_tiny_checkpoint(
    folder: Path, *, seed: int = 0, networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS
) -> None:
    """Write all files below `folder`, in place of those of an earlier call. Raises `WeightsError` where the
    folder holds anything else. `networks` may be of another size."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise WeightsError(f"{folder} holds other files; give an empty or absent folder")
    writers: dict[str, Writer] = {name: _network_writer(name, build) for name, build in networks.items()}
    writers |= {
        "detector": lambda paths, _: write_detector(paths[0]),
        "landmark106": lambda paths, seed: write_landmark106(paths[0], np.random.default_rng(seed)),
        "landmark203": lambda paths, seed: write_landmark203(paths[0], np.random.default_rng(seed)),
        "landmark478": _write_landmark478,
        "hubert": lambda paths, seed: write_speech_model(paths[0], np.random.default_rng(seed)),
        "config": lambda paths, seed: paths[0].write_bytes(pickle.dumps(tiny_config(seed), protocol=4)),
    }
    parts = load_registry()["ditto-tiny"].parts
    try:
        for earlier in {part.folder.partition("/")[0] for part in parts.values()} | {"converted"}:
            shutil.rmtree(folder / earlier, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).write_text(_NOTE, encoding="utf-8")
        for number, (part, write) in enumerate(writers.items()):
            home = folder / parts[part].folder
            home.mkdir(parents=True, exist_ok=True)
            write(tuple(home / name for name in FILES[part]), seed * len(writers) + number)
        _convert_config(folder)
    except OSError as error:
        raise WeightsError(f"the checkpoint cannot be written to {folder}: {error}") from error


def _convert_config(folder: Path) -> None:
    """As `avatar weights convert` does in the weights folder."""
    path = folder / load_registry()["ditto-tiny"].parts["config"].folder / FILES["config"][0]
    copy = folder / "converted" / "config"
    write_config(read_pickle(path), copy)
    files = {each.name: hash_file(each) for each in copy.iterdir()}
    write_origin(copy, Origin(files, source={path.relative_to(folder).as_posix(): hash_file(path)}))


def random_state(name: str, build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The state of one of `NETWORKS`, whatever its size, under the names of its published file."""
    with torch.random.fork_rng(devices=[]):
        model = build()
    generator = torch.Generator().manual_seed(seed)
    state = {
        tensor: _random(f"{name}/{tensor}", values, generator)
        for tensor, values in model.state_dict().items()
    }
    if name == "decoder":
        state |= {tensor: _soft(state[tensor]) for tensor in ("conv_img.0.weight", "conv_img.0.bias")}
    published = {}
    for tensor in official_shapes(model):
        if not tensor.endswith((".weight_orig", ".weight_u", ".weight_v")):
            published[tensor] = state[tensor]
        elif tensor.endswith("_orig"):
            published |= _spectral_triple(tensor, state[tensor.removesuffix("_orig")])
    return published


def _random(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """Weights keep the size of what they multiply, but for `_GAINS`."""
    if name.endswith(("num_batches_tracked", "rotary.freqs")):
        return values
    if name in _STILL:
        return _STILL[name]()
    normal = torch.randn(values.shape, generator=generator)
    if name.endswith("running_var"):
        return (0.2 * normal).exp()
    if name.endswith(("bias", "running_mean", "grn.gamma", "grn.beta")):
        return 0.1 * normal
    if values.dim() == 1:
        return 1 + 0.1 * normal
    gain = math.prod(each for pattern, each in _GAINS.items() if fnmatchcase(name, pattern))
    return gain * normal / values[0].numel() ** 0.5


def _soft(values: Tensor) -> Tensor:
    """The pixels that the last layer makes of one cell are nearly equal: a picture, not noise."""
    colours = values.unflatten(0, (3, -1))
    return (colours[:, :1] + 0.1 * colours).flatten(0, 1)


def _spectral_triple(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The weight and the vectors that give its largest singular value."""
    u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    layer = name.removesuffix("_orig")
    return {name: weight, f"{layer}_u": u[:, 0].contiguous(), f"{layer}_v": v[0].contiguous()}


_STILL: Mapping[str, Callable[[], Tensor]] = {
    "motion/detector.fc_kp.bias": lambda: torch.from_numpy(key_points()),
    "motion/detector.fc_scale.bias": lambda: torch.full((1,), 1.4),
}
"""What every face has in common."""


def _network_writer(name: str, build: Callable[[], nn.Module]) -> Writer:
    def write(paths: Sequence[Path], seed: int) -> None:
        state = random_state(name, build, seed)
        key = _KEYS.get(name)
        torch.save({key: state} if key else state, paths[0])

    return write


def _write_landmark478(paths: Sequence[Path], seed: int) -> None:
    blaze_face, face_mesh = paths
    write_blaze_face(blaze_face, np.random.default_rng(seed))
    write_face_mesh(face_mesh, np.random.default_rng(seed))
