"""Affine warps whose pixels lie exactly where the matrix says; OpenCV 4 rounds to 1/32 pixel."""

import numpy as np
from numpy.typing import NDArray

from avatar_core.media.face import Picture


def warp_square(picture: Picture, matrix: NDArray[np.floating], size: int) -> Picture:
    """[size, size, 3], bilinear, black outside the picture. `matrix` [2, 3] or [3, 3] goes from picture to
    square pixels; RGB [height, width, 3]."""
    import torch
    from torch.nn.functional import grid_sample

    height, width = picture.shape[:2]
    back = np.linalg.inv(np.vstack([np.asarray(matrix, np.float64)[:2], [0, 0, 1]]))
    pixels = np.arange(size, dtype=np.float64)
    x, y = (back[axis, 0] * pixels[None] + back[axis, 1] * pixels[:, None] + back[axis, 2] for axis in (0, 1))
    # grid_sample counts from -1 to 1 between the outer edges of the first and the last pixel.
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], axis=-1)
    sampled = grid_sample(
        torch.from_numpy(picture).permute(2, 0, 1)[None].float(),
        torch.from_numpy(grid)[None].float(),
        align_corners=False,
    )
    return sampled[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
