"""One small picture of several videos."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from avatar_core.media.video import read_frames

TILE = 160  # px
FRAME = 25  # by then a face speaks; the last of a shorter clip
_QUALITY = 80


def contact_sheet(videos: Sequence[Path]) -> bytes:
    """A JPEG with an early frame of each, side by side."""
    tiles = []
    for path in videos:
        *_, frame = islice(read_frames(path), FRAME)
        height, width = frame.shape[:2]
        scale = TILE / height
        tiles.append(cv2.resize(frame, (max(2, round(width * scale)), TILE), interpolation=cv2.INTER_AREA))
    sheet = np.hstack(tiles)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    assert done
    return data.tobytes()
