"""What the motion of a frame is conditioned on: speech, mood, the state of the eyes, the face's shape.

A row is `speech 1024 | emotion 8 | eyes open 2 | gaze 6 | canonical key points 63`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avatar_core.backends.ditto.motion_vector import Array, mirror_index
from avatar_core.errors import ConfigError

EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise", "contempt")
NEUTRAL = EMOTIONS.index("neutral")
_CHOSEN_LOGIT = 8.0

Emotion = int | Sequence[int] | Sequence[Sequence[int]] | Array
"""An index of `EMOTIONS`; several that are mixed; a sequence of such mixtures; or their weights [m, 8]."""


def emotion_weights(emotion: Emotion) -> Array:
    """[m, 8]. Raises `ConfigError`."""
    if isinstance(emotion, np.ndarray):
        if emotion.ndim != 2 or emotion.shape[1] != len(EMOTIONS) or not len(emotion):
            raise ConfigError(f"emotion weights have shape {emotion.shape}; allowed: (m, {len(EMOTIONS)})")
        return np.asarray(emotion, np.float32)
    labels = [emotion] if isinstance(emotion, int) else list(emotion)
    one_mixture = all(isinstance(label, int) for label in labels)
    return np.stack([_mixture(mixed) for mixed in ([labels] if one_mixture else labels)])


def _mixture(labels: object) -> Array:
    known = range(len(EMOTIONS))
    if not isinstance(labels, Sequence) or not labels or any(label not in known for label in labels):
        numbered = ", ".join(f"{index} {name}" for index, name in enumerate(EMOTIONS))
        raise ConfigError(f"unknown emotion {labels!r}; choose one or more of: {numbered}")
    logits = np.zeros(len(EMOTIONS), np.float32)
    logits[list(labels)] = _CHOSEN_LOGIT
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), np.float32)


@dataclass(frozen=True)
class Condition:
    """`eye_open` [m, 2] and `eye_ball` [m, 6] are those of the source's frames, which run forth and back, or
    of its first one throughout (`eye_f0_mode`); `sc` [63] its canonical key points; `emotion` [e, 8] comes
    round again. What is not used (`use_*`) has no columns.
    """

    emotion: Array
    eye_open: Array
    eye_ball: Array
    sc: Array
    eye_f0_mode: bool = False
    use_emo: bool = True
    use_eye_open: bool = True
    use_eye_ball: bool = True
    use_sc: bool = True

    def rows(self, features: Array, index: int) -> Array:
        """Rows [n, 1103] for speech features [n, 1024] of the frames from `index` on; frames before the first
        one are taken for it."""
        frames = [max(0, index + i) for i in range(len(features))]
        eyes = [0 if self.eye_f0_mode else mirror_index(i, len(self.eye_open)) for i in frames]
        columns = [
            features,
            self.emotion[[i % len(self.emotion) for i in frames]] if self.use_emo else None,
            self.eye_open[eyes] if self.use_eye_open else None,
            self.eye_ball[eyes] if self.use_eye_ball else None,
            np.repeat(self.sc[None], len(frames), axis=0) if self.use_sc else None,
        ]
        return np.concatenate([c for c in columns if c is not None], axis=1).astype(np.float32, copy=False)
