"""Ditto's models at random weights, and a random source and speech for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import HubertConfig, HubertModel

from avatar_core.backends.ditto import tiny
from avatar_core.backends.ditto.appearance import AppearanceConfig, AppearanceExtractor
from avatar_core.backends.ditto.audio import SAMPLE_RATE
from avatar_core.backends.ditto.layers import channels_last, fold_norms
from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_extractor import MotionExtractor, MotionExtractorConfig
from avatar_core.backends.ditto.motion_vector import WIDTHS
from avatar_core.backends.ditto.official import NETWORKS
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork

PICTURE_SIDE = 768
CONDITION_DIM = 1103


@dataclass(frozen=True)
class Size:
    """`volume_side`: of the appearance volume; `hubert` is a stand-in of the published ONNX file's size."""

    appearance: AppearanceConfig
    motion: MotionExtractorConfig
    warp: WarpConfig
    decoder: DecoderConfig
    stitch: StitchingConfig
    lmdm: LmdmConfig
    volume_side: int
    hubert: HubertConfig
    gemm_sides: tuple[int, ...]
    head_dim: int = 64

    def builders(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "appearance": lambda: AppearanceExtractor(self.appearance),
            "motion": lambda: MotionExtractor(self.motion),
            "warp": lambda: WarpingNetwork(self.warp),
            "decoder": lambda: SpadeDecoder(self.decoder),
            "stitch": lambda: StitchingNetwork(self.stitch),
            "lmdm": lambda: MotionDecoder(self.lmdm),
        }


def _hubert(**sizes: Any) -> HubertConfig:
    return HubertConfig(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, **sizes)


FULL = Size(
    appearance=AppearanceConfig(),
    motion=MotionExtractorConfig(),
    warp=WarpConfig(),
    decoder=DecoderConfig(),
    stitch=StitchingConfig(),
    lmdm=LmdmConfig(),
    volume_side=64,
    hubert=_hubert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    gemm_sides=(4096, 8192, 16384),
)

TINY = Size(
    appearance=tiny.APPEARANCE,
    motion=tiny.MOTION,
    warp=tiny.WARP,
    decoder=tiny.DECODER,
    stitch=tiny.STITCHING,
    lmdm=tiny.LMDM,
    volume_side=16,
    hubert=_hubert(
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=4,
    ),
    gemm_sides=(64, 128),
)


def random_network(
    name: str,
    size: Size,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    in_channels_last: bool | None = None,
) -> Any:
    """Built as from its published file: norms are folded, convolutions lie channels-last on a GPU."""
    model = NETWORKS[name](tiny.random_state(name, size.builders()[name], seed=0))
    fold_norms(model)
    model = model.to(device, dtype)
    if device.startswith("cuda") if in_channels_last is None else in_channels_last:
        channels_last(model)
    return model


def random_hubert(size: Size, device: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """As the backend calls it: a window of samples to hidden states in main memory."""
    torch.manual_seed(0)
    model = HubertModel(size.hubert).eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def encode(window: NDArray[np.float32]) -> NDArray[np.float32]:
        states = model(torch.from_numpy(window)[None].to(device)).last_hidden_state
        return np.asarray(states[0].cpu().numpy())

    return encode


def random_avatar(size: Size) -> Avatar:
    """Of a picture whose middle is the face's square."""
    generator = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    motion = {key: normal(1, width, scale=0.1) for key, width in WIDTHS.items()}
    motion |= {"scale": np.full((1, 1), 1.4, np.float32), "kp": tiny.key_points()[None]}
    shape = (size.appearance.feature_channels, size.appearance.depth, size.volume_side, size.volume_side)
    offset = (PICTURE_SIDE - 512) / 2
    return Avatar(
        motion=motion,
        eye_open=normal(1, 2),
        eye_ball=normal(1, 6),
        sc=motion["kp"][0],
        features=normal(1, *shape),
        crop_to_picture=np.array([[[1, 0, offset], [0, 1, offset], [0, 0, 1]]], np.float32),
        is_image=True,
    )


def random_picture() -> NDArray[np.uint8]:
    side = PICTURE_SIDE
    return np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8)


def random_speech(duration_s: float) -> NDArray[np.float32]:
    samples = np.random.default_rng(2).standard_normal(round(duration_s * SAMPLE_RATE))
    return (0.1 * samples).astype(np.float32)


def random_key_points(num_frames: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the source and of driven frames [n, 21, 3]."""
    source = np.repeat(tiny.key_points().reshape(1, 21, 3), num_frames, axis=0)
    moved = 0.02 * np.random.default_rng(3).standard_normal(source.shape)
    return source, (source + moved).astype(np.float32)
