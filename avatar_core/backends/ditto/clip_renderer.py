"""The frames of a clip: key points are rendered some frames at a time and set back into the source."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatar_core.backends.ditto.putback import Composer
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.stages.base import Picture, Tensors


class _Batch(NamedTuple):
    """Renders on their way to main memory."""

    images: Tensor
    source_frames: list[int]
    arrived: Any  # CUDA event


def rendered_frames(
    renderer: Renderer, composer: Composer, reference: Tensors, motion: Tensors, batch_frames: int
) -> Iterator[Picture]:
    """While the frames of one batch are put back, the GPU is at the next one."""
    volumes = renderer.volumes(np.asarray(reference["features"]))
    waiting: _Batch | None = None
    for start in range(0, len(motion["x_d"]), batch_frames):
        part = slice(start, start + batch_frames)
        source_frames = motion["source_frames"][part].tolist()
        images = renderer.render(volumes, motion["x_s"][part], motion["x_d"][part], source_frames)
        batch = _fetch(images, source_frames)
        if waiting is not None:
            yield from _composed(composer, waiting)
        waiting = batch
    if waiting is not None:
        yield from _composed(composer, waiting)


def _fetch(images: Tensor, source_frames: list[int]) -> _Batch:
    if images.device.type != "cuda":
        return _Batch(images, source_frames, None)
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    arrived: Any = torch.cuda.Event()
    arrived.record()
    return _Batch(host, source_frames, arrived)


def _composed(composer: Composer, batch: _Batch) -> Iterator[Picture]:
    if batch.arrived is not None:
        batch.arrived.synchronize()
    for image, source_frame in zip(batch.images.numpy(), batch.source_frames, strict=True):
        yield composer.compose(image, source_frame)
