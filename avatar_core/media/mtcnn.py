"""The three networks of MTCNN (https://arxiv.org/abs/1604.02878) in NumPy, on the weight files of the
`mtcnn` wheel.

Arrays are [batch, height, width, channels]; pixels are scaled to about -1..1 by `normalise`.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from avatar_core.errors import WeightsError

Array = NDArray[np.float32]

MTCNN_SHA256 = {
    "pnet.lz4": "ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
    "rnet.lz4": "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee",
    "onet.lz4": "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3",
}

CROPS_PER_BATCH = 256


def installed_weights() -> Path:
    """The folder of weight files in the installed `mtcnn` package, which is not imported: that would
    need tensorflow."""
    spec = importlib.util.find_spec("mtcnn")
    if spec is None or spec.origin is None:
        raise WeightsError(
            'the face detector\'s weights are not installed; run: pip install "avatar-dataset[preview]"'
        )
    return Path(spec.origin).parent / "assets" / "weights"


def load_arrays(path: Path, sha256: str) -> list[Array]:
    """The float32 arrays of one joblib/lz4 file, once its SHA-256 has been checked."""
    if not path.is_file():
        raise WeightsError(
            f'no weight file {path}; it comes with mtcnn 1.0.0: pip install "avatar-dataset[preview]"'
        )
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise WeightsError(
            f"{path} is altered or of another version (SHA-256 {got}, expected {sha256}); "
            "run: pip install --force-reinstall --no-deps mtcnn==1.0.0"
        )
    from avatar_core.media.array_pickle import unpickle_arrays  # joblib is slow to import

    return unpickle_arrays(data, path)


def normalise(pixels: NDArray[Any]) -> Array:
    return (pixels.astype(np.float32) - np.float32(127.5)) / np.float32(128)


class MTCNN:
    """Proposal, refinement and output network; every face probability is in 0..1."""

    def __init__(self, weights: Path) -> None:
        self._proposal, self._refinement, self._output = (
            load_arrays(weights / name, sha256) for name, sha256 in MTCNN_SHA256.items()
        )

    def propose(self, picture: Array) -> tuple[Array, Array]:
        """[H, W, 3] -> box offsets [h, w, 4] and face probability [h, w] of the 12 px windows that
        stand 2 px apart."""
        w = self._proposal
        x = max_pool(conv(picture[None], *w[0:3]), 2)
        x = conv(conv(x, *w[3:6]), *w[6:9])[0]
        return x @ w[9][0, 0] + w[10], face_probability(x @ w[11][0, 0] + w[12])

    def refine(self, crops: Array) -> tuple[Array, Array]:
        """[n, 24, 24, 3] -> box offsets [n, 4] and face probability [n]."""
        parts = [self._refine(part) for part in batches(crops)]
        return np.concatenate([offsets for offsets, _ in parts]), np.concatenate([p for _, p in parts])

    def _refine(self, crops: Array) -> tuple[Array, Array]:
        w = self._refinement
        x = max_pool(conv(crops, *w[0:3]), 3)
        x = max_pool(conv(x, *w[3:6]), 3)
        x = dense(conv(x, *w[6:9]), *w[9:12])
        return x @ w[12] + w[13], face_probability(x @ w[14] + w[15])

    def output(self, crops: Array) -> tuple[Array, Array, Array]:
        """[n, 48, 48, 3] -> box offsets [n, 4], the x then the y of five points [n, 10], face
        probability [n]."""
        parts = [self._output_part(part) for part in batches(crops)]
        offsets, points, probability = (np.concatenate(column) for column in zip(*parts, strict=True))
        return offsets, points, probability

    def _output_part(self, crops: Array) -> tuple[Array, Array, Array]:
        w = self._output
        x = max_pool(conv(crops, *w[0:3]), 3)
        x = max_pool(conv(x, *w[3:6]), 3)
        x = max_pool(conv(x, *w[6:9]), 2)
        x = dense(conv(x, *w[9:12]), *w[12:15])
        return x @ w[15] + w[16], x @ w[17] + w[18], face_probability(x @ w[19] + w[20])


def batches(crops: Array) -> list[Array]:
    return [crops[start : start + CROPS_PER_BATCH] for start in range(0, len(crops), CROPS_PER_BATCH)]


def conv(x: Array, kernel: Array, bias: Array, slope: Array) -> Array:
    """Convolution without padding, then PReLU; `kernel` is [height, width, in, out]."""
    height, width, channels, filters = kernel.shape
    x = np.ascontiguousarray(x)
    batch, rows, columns = len(x), x.shape[1] - height + 1, x.shape[2] - width + 1
    # One row of a window is one contiguous run of width * channels numbers.
    windows = as_strided(
        x, (batch, rows, columns, height, width * channels), (*x.strides[:3], x.strides[1], x.strides[3])
    )
    y = windows.reshape(-1, height * width * channels) @ kernel.reshape(-1, filters)
    y += bias
    return prelu(y, slope.reshape(-1)).reshape(batch, rows, columns, filters)


def dense(x: Array, weight: Array, bias: Array, slope: Array) -> Array:
    # The weights count width before height.
    flat = x.transpose(0, 2, 1, 3).reshape(len(x), -1)
    return prelu(flat @ weight + bias, slope)


def prelu(x: Array, slope: Array) -> Array:
    negative = np.minimum(x, 0)
    np.maximum(x, 0, out=x)
    negative *= slope
    x += negative
    return x


def max_pool(x: Array, size: int) -> Array:
    """Windows of `size` with stride 2; a last, partial window counts too."""
    rows, columns = ((side - size + 1) // 2 + 1 for side in x.shape[1:3])
    short = [
        (0, max(0, 2 * (count - 1) + size - side))
        for count, side in zip((rows, columns), x.shape[1:3], strict=True)
    ]
    if any(after for _, after in short):
        x = np.pad(x, [(0, 0), *short, (0, 0)], constant_values=-np.inf)
    pooled = x[:, 0 : 2 * rows : 2, 0 : 2 * columns : 2].copy()
    for dy in range(size):
        for dx in range(size):
            np.maximum(pooled, x[:, dy : dy + 2 * rows - 1 : 2, dx : dx + 2 * columns - 1 : 2], out=pooled)
    return pooled


def face_probability(logits: Array) -> Array:
    """Softmax over (no face, face), second part."""
    difference = np.clip(logits[..., 0] - logits[..., 1], -60, 60)
    return np.asarray(1 / (1 + np.exp(difference)), np.float32)
