"""A stream from a checkpoint and the backend's options: models loaded side by side, online chunk settings."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np

from avatar_core.backends.ditto.audio import HubertEncoder
from avatar_core.backends.ditto.clip_motion import chain_settings, emotion, stitch_settings
from avatar_core.backends.ditto.config import DittoConfig, chosen
from avatar_core.backends.ditto.config_reader import OfficialConfig
from avatar_core.backends.ditto.files import model_file
from avatar_core.backends.ditto.official import dtype_on, load_network
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.stream import StreamModels, StreamSettings

ONLINE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"overlap_v2": 70, "sampling_timesteps": 10, "fix_kp_cond": 1, "fix_kp_cond_dim": (0, 202)}
)
"""In place of what a configuration for whole recordings says."""


def stream_settings(config: DittoConfig, official: OfficialConfig, seed: int = 0) -> StreamSettings:
    """Options given count before the published ones, of which those for chunks come from an online
    configuration only."""
    online = official.defaults.get("online_mode", False)
    defaults = (
        {**ONLINE_DEFAULTS, **official.defaults} if online else {**official.defaults, **ONLINE_DEFAULTS}
    )
    options = chosen(config.denoise, defaults)
    parity = config.mode == "parity"
    limits = official.arrays.get("v_min_max_for_clip")
    return StreamSettings(
        chain=chain_settings(options, online=True),
        stitch=stitch_settings(options, parity=parity),
        num_inference_steps=options["sampling_timesteps"],
        guidance_scale=config.denoise.guidance_scale,
        seed=seed,
        emotion=emotion(config.denoise, official),
        eye_f0_mode=options["eye_f0_mode"],
        limits=None if limits is None else np.asarray(limits[:2], np.float32),
        delta_eye_arr=official.arrays.get("delta_eye_arr"),
        character=official.character if config.denoise.character else None,
        condition=official.condition,
        crop_size=config.decode.image_size,
        batch_frames=config.decode.batch_frames,
        parity=parity,
    )


def load_stream_models(config: DittoConfig, official: OfficialConfig, device: str = "cpu") -> StreamModels:
    """All at once: reading files and copying to the GPU take most of the time until the first frame."""

    def network(part: str, precision: str = "fp32") -> Callable[[], Any]:
        path = model_file(config.checkpoint, part)
        return lambda: load_network(part, path, device, dtype_on(device, precision))

    stitched = chosen(config.decode, official.defaults)["flag_stitching"]
    hubert_path = model_file(config.checkpoint, "hubert")
    loaders: dict[str, Callable[[], Any]] = {
        "decoder": network("decoder", config.precision),
        "warp": network("warp", config.precision),
        "hubert": lambda: HubertEncoder(hubert_path, device),
        "lmdm": network("lmdm"),
        "stitch": network("stitch") if stitched else lambda: None,
    }
    with ThreadPoolExecutor(len(loaders)) as pool:
        loading = {part: pool.submit(load) for part, load in loaders.items()}
        models = {part: future.result() for part, future in loading.items()}
    renderer = Renderer(models["stitch"], models["warp"], models["decoder"])
    return StreamModels(models["hubert"], models["lmdm"], renderer)
