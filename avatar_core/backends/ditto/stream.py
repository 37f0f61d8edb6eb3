"""Frames while speech arrives.

    with DittoStream(avatar, pictures, models, settings) as stream:
        for frame in stream.frames(pieces_of_speech):
            ...

Three threads work side by side: the first turns speech into key points, the second renders them, the third
fetches what was rendered and sets it back into the source's frames. Only a few frames wait between them, so
that the renderer, the slowest, always has work and memory does not grow; who does not take the frames stops
them all, and `feed` too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avatar_core.backends.ditto.audio import (
    FPS,
    SAMPLE_RATE,
    Hubert,
    Samples,
    StreamingWindows,
    chunk_features,
    num_frames,
    silence,
)
from avatar_core.backends.ditto.chaining import ChainSettings, OnlineMotion
from avatar_core.backends.ditto.channel import Channel
from avatar_core.backends.ditto.condition import NEUTRAL, Emotion
from avatar_core.backends.ditto.lmdm import MotionDecoder
from avatar_core.backends.ditto.motion_stitch import Control, MotionStitch, StitchSettings
from avatar_core.backends.ditto.motion_vector import Array, frame, keypoints, mirror_index, unpack
from avatar_core.backends.ditto.putback import Composer
from avatar_core.backends.ditto.registration import Avatar, Character
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.sampling import ClipSampler
from avatar_core.errors import BackendError, Cancelled, InputError
from avatar_core.media.face import Picture

ONLINE_CHAIN = ChainSettings(overlap=70, online=True, fix_kp_cond=1, fix_kp_cond_dims=(0, 202))
CHUNK_S = 2.0

_PIECE_SAMPLES = SAMPLE_RATE // 5
_WAITING_BATCHES = 2  # between two threads


class StreamModels(NamedTuple):
    hubert: Hubert
    lmdm: MotionDecoder
    renderer: Renderer


@dataclass(frozen=True)
class StreamSettings:
    """`limits` [2, 265], `delta_eye_arr`, `character` and `condition` (what motion is conditioned on:
    `use_emo`, ...) come with the published configuration; `controls` are by frame.
    `batch_frames` are rendered at once; `waiting_frames` that nobody has taken, and `waiting_s` of speech,
    may be ahead. `crop_size`: the face's square alone, of so many pixels."""

    chain: ChainSettings = ONLINE_CHAIN
    stitch: StitchSettings = field(default_factory=StitchSettings)
    num_inference_steps: int = 10
    guidance_scale: float = 2.0
    seed: int = 0
    emotion: Emotion = NEUTRAL
    eye_f0_mode: bool = False
    limits: Array | None = None
    delta_eye_arr: Array | None = None
    character: Character | None = None
    condition: Mapping[str, bool] = field(default_factory=dict)
    controls: Mapping[int, Control] = field(default_factory=dict)
    crop_size: int | None = None
    batch_frames: int = 5
    waiting_frames: int = 10
    waiting_s: float = 10.0
    parity: bool = False


class _KeyPoints(NamedTuple):
    x_s: Array
    x_d: Array
    source_frames: list[int]


class _Rendered(NamedTuple):
    images: Tensor
    source_frames: list[int]
    done: Any  # CUDA event


class DittoStream:
    """One recording. `pictures` are the avatar's frames, RGB [height, width, 3]. Speech may come in pieces of
    any size, and the frames do not depend on them. What goes wrong in a thread is raised by `feed` and by the
    iterator; leaving the `with` block ends everything."""

    def __init__(
        self,
        avatar: Avatar,
        pictures: Sequence[Picture],
        models: StreamModels,
        settings: StreamSettings | None = None,
    ) -> None:
        self._avatar, self._models = avatar, models
        self._settings = settings or StreamSettings()
        self._composer = Composer(pictures, avatar.crop_to_picture, self._settings.crop_size)
        waiting_pieces = max(1, int(self._settings.waiting_s * SAMPLE_RATE / _PIECE_SAMPLES))
        self._speech: Channel[Samples] = Channel(waiting_pieces)
        self._key_points: Channel[_KeyPoints] = Channel(_WAITING_BATCHES)
        self._rendered: Channel[_Rendered] = Channel(_WAITING_BATCHES)
        self._frames: Channel[Picture] = Channel(self._settings.waiting_frames)
        self._stitch: MotionStitch | None = None
        self._num_frames = 0  # of which the key points are made
        self._finished = False
        self._error: BaseException | None = None
        self._threads = [
            self._thread("motion", self._make_motion, self._key_points),
            self._thread("rendering", self._render, self._rendered),
            self._thread("putback", self._compose, self._frames),
        ]
        if models.renderer.device.type == "cuda":
            torch.cuda.synchronize(models.renderer.device)  # the weights, for the threads' own streams
        for thread in self._threads:
            thread.start()

    def feed(self, samples: Samples) -> None:
        """More speech: mono float32 at 16 kHz, full scale 1. Waits while too much is ahead."""
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype != np.float32 or not np.isfinite(samples).all():
            raise InputError(
                f"speech of shape {samples.shape} and type {samples.dtype}; a stream takes finite float32 "
                f"samples of one channel at {SAMPLE_RATE} Hz"
            )
        if self._finished:
            raise BackendError("the stream has been told that the speech is over; begin a new one")
        for start in range(0, len(samples), _PIECE_SAMPLES):
            with self._errors_of_threads():
                self._speech.put(samples[start : start + _PIECE_SAMPLES].copy())

    def finish(self) -> None:
        """The speech is over; the remaining frames follow."""
        self._finished = True
        self._speech.end()

    def __iter__(self) -> Iterator[Picture]:
        """RGB uint8 frames, 25 a second, as they are made: as many as the speech is long."""
        frames = iter(self._frames)
        while True:
            with self._errors_of_threads():
                picture = next(frames, None)
            if picture is None:
                return
            yield picture

    def frames(self, pieces: Iterable[Samples]) -> Iterator[Picture]:
        """All frames for speech that comes from `pieces`, which a thread of its own takes."""
        feeding = self._thread("feeding", lambda: self._feed_all(pieces), self._speech)
        self._threads.append(feeding)
        feeding.start()
        yield from self

    def _feed_all(self, pieces: Iterable[Samples]) -> None:
        for piece in pieces:
            self.feed(piece)
        self.finish()

    def chunks(self, pieces: Iterable[Samples], duration_s: float = CHUNK_S) -> Iterator[list[Picture]]:
        """The frames of every `duration_s`; the last chunk may be shorter."""
        length, chunk = max(1, round(duration_s * FPS)), []
        for picture in self.frames(pieces):
            chunk.append(picture)
            if len(chunk) == length:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def abort(self) -> None:
        """Ends all threads; frames not taken yet are lost."""
        self._cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "DittoStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _cancel(self) -> None:
        for channel in (self._speech, self._key_points, self._rendered, self._frames):
            channel.cancel()

    def _thread(self, name: str, work: Callable[[], None], made: Channel[Any]) -> Thread:
        def run() -> None:
            try:
                with _cuda_stream(self._models.renderer.device):
                    work()
                made.end()
            except Cancelled:
                pass
            except BaseException as error:
                self._error = self._error or error
                self._cancel()

        return Thread(target=run, name=f"ditto-{name}", daemon=True)

    def _errors_of_threads(self) -> "_Reraised":
        return _Reraised(self)

    def _make_motion(self) -> None:
        settings, hubert = self._settings, self._models.hubert
        driver = settings.character or self._avatar
        motion = OnlineMotion(
            driver.condition(settings.emotion, eye_f0_mode=settings.eye_f0_mode, **settings.condition),
            driver.first_vector(),
            self._sampler(),
            settings.chain,
            silence(settings.chain.overlap, hubert),
            parity=settings.parity,
        )
        windows = StreamingWindows()
        for samples in self._speech:
            for window in windows.feed(samples):
                self._add(motion, motion.feed(chunk_features(hubert(window))))
        wanted = num_frames(windows.num_samples, parity=settings.parity)
        for window in windows.finish():
            self._add(motion, motion.feed(chunk_features(hubert(window))), wanted)
        self._add(motion, motion.finish(wanted), wanted)

    def _sampler(self) -> ClipSampler:
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed)
        return ClipSampler(
            self._models.lmdm,
            settings.num_inference_steps,
            settings.guidance_scale,
            generator,
            parity=settings.parity,
        )

    def _add(self, motion: OnlineMotion, blocks: Iterable[Array], wanted: int | None = None) -> None:
        """Key points of the frames, no more than `wanted` in all."""
        for block in blocks:
            left = len(block) if wanted is None else wanted - self._num_frames
            vectors = block[: max(0, left)]
            while len(vectors):
                size = self._settings.batch_frames if self._num_frames else 1  # the first waits for no other
                self._key_points.put(self._pairs(motion, vectors[:size]))
                vectors = vectors[size:]

    def _pairs(self, motion: OnlineMotion, vectors: Array) -> _KeyPoints:
        if self._stitch is None:
            self._stitch = self._motion_stitch(motion)
        driving, pairs, source_frames = unpack(vectors, self._settings.limits), [], []
        for i in range(len(vectors)):
            source_frames.append(mirror_index(self._num_frames, len(self._avatar)))
            control = self._settings.controls.get(self._num_frames)
            pairs.append(self._stitch.pair(frame(driving, i), source_frames[-1], control))
            self._num_frames += 1
        x_s, x_d = (np.stack(points) for points in zip(*pairs, strict=True))
        return _KeyPoints(x_s, x_d, source_frames)

    def _motion_stitch(self, motion: OnlineMotion) -> MotionStitch:
        settings = self._settings
        assert motion.reference is not None
        return MotionStitch(
            settings.stitch,
            self._avatar.motion,
            is_image=self._avatar.is_image,
            delta_eye_arr=settings.delta_eye_arr,
            character=None if settings.character is None else settings.character.motion,
            reference=unpack(motion.reference[None], settings.limits),
            seed=settings.seed,
        )

    def _render(self) -> None:
        renderer = self._models.renderer
        volumes = renderer.volumes(self._avatar.features)
        if renderer.device.type == "cuda":  # kernels are chosen, or compiled, before the speech has come
            for size in (1, self._settings.batch_frames):
                still = np.repeat(keypoints(frame(self._avatar.motion, 0)), size, axis=0)
                renderer.render(volumes, still, still, [0] * size)
        for x_s, x_d, source_frames in self._key_points:
            images = renderer.render(volumes, x_s, x_d, source_frames)
            self._rendered.put(_Rendered(images, source_frames, _event(renderer.device)))

    def _compose(self) -> None:
        for images, source_frames, done in self._rendered:
            if done is not None:
                done.synchronize()
            for image, source_frame in zip(images.cpu().numpy(), source_frames, strict=True):
                self._frames.put(self._composer.compose(image, source_frame))


class _Reraised:
    """Where a channel was broken off because of an error, that error is raised."""

    def __init__(self, stream: DittoStream) -> None:
        self._stream = stream

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        failed = self._stream._error
        if isinstance(error, Cancelled) and failed is not None:
            raise failed


def _cuda_stream(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _event(device: torch.device) -> Any:
    """Recorded behind what the thread has asked of the device so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
