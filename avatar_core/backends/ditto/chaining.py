"""Motion of any length from clips of 80 frames: each begins `overlap` frames before the last one ends, is
conditioned on the frame before, and is faded in over what was there.

The offline driver knows the whole recording; the online one gives frames while features arrive, a block of
`valid_frames` per clip, and each block once the next clip has been faded into it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatar_core.backends.ditto.condition import Condition
from avatar_core.backends.ditto.motion_vector import MOTION_DIM, WIDTHS, Array, smooth
from avatar_core.errors import ConfigError

Sample = Callable[[Array, Array], Array]
"""One clip [1, 80, 265] from the frame before it [1, 265] and its condition [1, 80, 1103]."""

SEQ_FRAMES = 80
_SMOOTHED = MOTION_DIM - WIDTHS["exp"]  # every component but the expression


@dataclass(frozen=True)
class ChainSettings:
    """`smooth_k`: frames that are averaged (1: none). `fix_kp_cond`: every so many clips (0: never) the next
    one is conditioned on the source's own motion, but for the components `fix_kp_cond_dims` (first, end),
    which go on. Raises `ConfigError`."""

    overlap: int = 10
    online: bool = False
    smooth_k: int = 3
    fix_kp_cond: int = 0
    fix_kp_cond_dims: tuple[int, int] | None = None
    seq_frames: int = SEQ_FRAMES

    def __post_init__(self) -> None:
        if not 1 <= self.overlap < self.seq_frames:
            raise ConfigError(f"overlap={self.overlap}; allowed are 1 to {self.seq_frames - 1} frames")

    @property
    def valid_frames(self) -> int:
        return self.seq_frames - self.overlap

    @property
    def fuse_frames(self) -> int:
        return min(self.overlap, self.valid_frames) if self.online else self.overlap


class ClipChain:
    """`motion` [1, n, 265] is what has been made so far, `kp_cond` [1, 265] what the next clip follows."""

    def __init__(self, settings: ChainSettings, source: Array) -> None:
        self.settings = settings
        self.kp_cond = self._source = source
        self.motion: Array = np.zeros((1, 0, MOTION_DIM), np.float32)
        self._clips = 0

    def append(self, prediction: Array) -> None:
        valid, fuse, overlap = self.settings.valid_frames, self.settings.fuse_frames, self.settings.overlap
        if not self._clips:
            self.motion = prediction.copy()
            self._smooth(0, self.settings.seq_frames)
        else:
            share = (np.arange(fuse, dtype=np.float32) / np.float32(fuse))[:, None]
            old, new = self.motion[:, -fuse:], prediction[:, overlap - fuse : overlap]
            fused = (1 - share) * old + share * new
            self.motion = np.concatenate([self.motion[:, :-fuse], fused, prediction[:, overlap:]], axis=1)
            end = self.motion.shape[1] - valid
            self._smooth(end - fuse, end + 1)
        self._clips += 1
        self.kp_cond = self._next_condition()

    def _next_condition(self) -> Array:
        last = self.motion[:, -self.settings.overlap - 1]
        every = self.settings.fix_kp_cond
        if every <= 0 or self._clips % every:
            return last
        fixed = self._source.copy()
        if self.settings.fix_kp_cond_dims is not None:
            kept = slice(*self.settings.fix_kp_cond_dims)
            fixed[:, kept] = last[:, kept]
        return fixed

    def _smooth(self, start: int, end: int) -> None:
        self.motion[0, start:end] = smoothed(self.motion[0], self.settings.smooth_k, start, end)

    def drop(self, frames: int) -> None:
        """Forget the first frames."""
        self.motion = self.motion[:, frames:]


def smoothed(motion: Array, width: int, start: int = 0, end: int | None = None) -> Array:
    """The frames start..end of [n, 265], smoothed but for the expression; those around are only read."""
    end = len(motion) if end is None else end
    rows = motion[start:end].copy()
    if width > 1:
        first = max(0, start - width // 2)
        around = motion[first : end + width // 2, :_SMOOTHED]
        rows[:, :_SMOOTHED] = smooth(around, width)[start - first : end - first]
    return rows


def offline_motion(
    features: Array, condition: Condition, source: Array, sample: Sample, settings: ChainSettings
) -> Array:
    """[n, 265] for speech features [n, 1024]; `source` [1, 265] is the motion that the first clip follows."""
    rows = condition.rows(features, 0)
    chain = ClipChain(settings, source)
    for start in range(0, len(rows), settings.valid_frames):
        window = rows[start : start + settings.seq_frames]
        chain.append(sample(chain.kp_cond, padded(window, settings.seq_frames)[None]))
    return smoothed(chain.motion[0, : len(rows)], settings.smooth_k)


def padded(rows: Array, length: int) -> Array:
    """Filled up with copies of the last row."""
    return np.concatenate([rows, np.repeat(rows[-1:], length - len(rows), axis=0)])


class OnlineMotion:
    """Motion while features arrive. `silence` [overlap, 1024] are features of silence that the first clip
    hears before the speech. `reference` [265] is set with the first clip: what motion is relative to.

    With `parity`, the end is that of the reference, which gives more frames than there were features, and an
    overlap below half a clip leaves out the first frames.
    """

    def __init__(
        self,
        condition: Condition,
        source: Array,
        sample: Sample,
        settings: ChainSettings,
        silence: NDArray[np.float32],
        *,
        parity: bool = False,
    ) -> None:
        if not settings.online or len(silence) != settings.overlap:
            raise ConfigError(
                f"got online={settings.online} and {len(silence)} frames of silence; motion while speech "
                f"arrives needs online=true and as many as overlap ({settings.overlap})"
            )
        self.reference: Array | None = None
        self._condition, self._sample, self._settings = condition, sample, settings
        self._parity = parity
        self._chain = ClipChain(settings, source)
        self._features: Array = np.asarray(silence, np.float32)
        self._index = -settings.overlap  # of the frame of the first feature
        # The next frame to give, in the chain's motion.
        self._start = settings.seq_frames - settings.fuse_frames if parity else settings.overlap
        self._num_given = self._num_features = 0

    def feed(self, features: Array) -> Iterator[Array]:
        """Frames [k, 265] as soon as they are settled."""
        self._num_features += len(features)
        self._features = np.concatenate([self._features, features])
        while len(self._features) >= self._settings.seq_frames:
            self._clip()
            self._features = self._features[self._settings.valid_frames :]
            self._index += self._settings.valid_frames
            yield self._given(self._chain.motion.shape[1] - self._settings.fuse_frames)

    def finish(self, num_frames: int | None = None) -> Iterator[Array]:
        """The rest, `num_frames` in all (as many as there were features)."""
        wanted = self._num_features if num_frames is None else num_frames
        left = wanted - self._num_given
        if self._num_features and (self._parity or left > 0):
            self._clip()
            end = self._chain.motion.shape[1]
            yield self._given(end if self._parity else self._start + left)

    def _clip(self) -> None:
        window = padded(self._features[: self._settings.seq_frames], self._settings.seq_frames)
        rows = self._condition.rows(window, self._index)
        self._chain.append(self._sample(self._chain.kp_cond, rows[None]))
        if self.reference is None:
            self.reference = self._chain.motion[0, 0].copy()

    def _given(self, end: int) -> Array:
        frames = self._chain.motion[0, self._start : max(self._start, end)].copy()
        self._num_given += len(frames)
        self._start += len(frames)
        spare = self._chain.motion.shape[1] - 2 * self._settings.seq_frames
        if spare > 0:
            self._chain.drop(spare)
            self._start -= spare
        return frames
