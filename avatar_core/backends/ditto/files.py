"""Which file of the published repository holds which model."""

from pathlib import Path

from avatar_core import weights

FILES = {
    "appearance": ("appearance_extractor.pth",),
    "motion": ("motion_extractor.pth",),
    "warp": ("warp_network.pth",),
    "decoder": ("decoder.pth",),
    "stitch": ("stitch_network.pth",),
    "lmdm": ("lmdm_v0.4_hubert.pth",),
    "detector": ("det_10g.onnx",),
    "landmark106": ("2d106det.onnx",),
    "landmark203": ("landmark203.onnx",),
    "landmark478": ("blaze_face.onnx", "face_mesh.onnx"),
    "hubert": ("hubert_streaming_fix_kv.onnx",),
    "config": ("v0.4_hubert_cfg_pytorch.pkl",),
}
"""By the parts of the weights registry."""


def model_files(checkpoint: str, part: str) -> tuple[Path, ...]:
    """Of a part of the weights `ditto` or of another checkpoint. Raises `WeightsError`."""
    folder = weights.locate(f"{checkpoint}/{part}")
    return tuple(folder / name for name in FILES[part])


def model_file(checkpoint: str, part: str) -> Path:
    """Of a part that has one file."""
    (path,) = model_files(checkpoint, part)
    return path
