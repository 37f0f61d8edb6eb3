"""Ditto's own classes at toy size: renders of 16 x 16 pixels; a fixed matrix makes features of speech."""

import numpy as np
import torch
from numpy.typing import NDArray

from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_vector import WIDTHS
from avatar_core.backends.ditto.registration import Avatar
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.stream import StreamModels
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork

RENDER_SIZE = 16
WARP = WarpConfig(feature_channels=1, depth=1, compress=1, down=(2,), up=(2,), out_channels=8)
DECODER = DecoderConfig(feature_channels=8, channels=(8, 8, 4), num_middle=1, label_channels=4)
WAVES = np.sin(np.outer(np.arange(400), np.arange(1, 1025)) * 1e-3).astype(np.float32)
LMDM = LmdmConfig(latent_dim=16, ff_size=16, num_layers=1, num_heads=2)


def toy_hubert(window: NDArray[np.float32]) -> NDArray[np.float32]:
    """[20, 1024]; loud and quiet, high and low sound differ."""
    pieces = np.stack([window[320 * i : 320 * i + 400] for i in range(20)])
    return pieces @ WAVES


def toy_networks() -> tuple[StitchingNetwork, WarpingNetwork, SpadeDecoder]:
    torch.manual_seed(0)
    networks = StitchingNetwork(StitchingConfig()), WarpingNetwork(WARP), SpadeDecoder(DECODER)
    for network in networks:
        network.eval().requires_grad_(False)
    return networks


def toy_models() -> StreamModels:
    renderer = Renderer(*toy_networks())
    return StreamModels(toy_hubert, MotionDecoder(LMDM).eval().requires_grad_(False), renderer)


def toy_avatar(num_frames: int = 1, seed: int = 0) -> Avatar:
    """Its crop of 512 pixels lies in the upper left quarter of a frame of 96 x 80."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape).astype(np.float32)

    motion = {key: normal(num_frames, width) * np.float32(0.1) for key, width in WIDTHS.items()}
    motion |= {"scale": np.ones((num_frames, 1), np.float32), "kp": normal(num_frames, 63) * np.float32(0.3)}
    matrix = np.array([[48 / 512, 0, 0], [0, 40 / 512, 0], [0, 0, 1]], np.float32)
    side = RENDER_SIZE // 8
    return Avatar(
        motion=motion,
        eye_open=normal(num_frames, 2),
        eye_ball=normal(num_frames, 6),
        sc=motion["kp"][0],
        features=normal(num_frames, WARP.feature_channels, WARP.depth, side, side),
        crop_to_picture=np.repeat(matrix[None], num_frames, axis=0),
        is_image=num_frames == 1,
    )


def toy_pictures(num_frames: int = 1) -> list[NDArray[np.uint8]]:
    return [np.full((80, 96, 3), 40 + 20 * i, np.uint8) for i in range(num_frames)]


def speech(duration_s: float, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(round(duration_s * 16_000)) * 0.1).astype(np.float32)
