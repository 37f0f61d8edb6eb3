"""Frames while speech arrives: the same however it is cut, as many as it is long, and nothing left behind."""

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from avatar_core.backends.ditto.audio import WINDOW_SAMPLES
from avatar_core.backends.ditto.chaining import ChainSettings
from avatar_core.backends.ditto.channel import Channel
from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.stream import DittoStream, StreamModels, StreamSettings
from avatar_core.errors import BackendError, Cancelled, InputError
from tests.backends.ditto.toy import (
    RENDER_SIZE,
    speech,
    toy_avatar,
    toy_hubert,
    toy_models,
    toy_networks,
    toy_pictures,
)

FAST = StreamSettings(num_inference_steps=2, crop_size=RENDER_SIZE)
WIDE = replace(FAST, chain=ChainSettings(overlap=2, online=True), batch_frames=78)


@pytest.fixture(scope="module")
def models() -> StreamModels:
    return toy_models()


def ditto_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ditto-")]


def ragged(samples: NDArray[np.float32], sizes: list[int]) -> Iterator[NDArray[np.float32]]:
    start = 0
    while start < len(samples):
        size = sizes[start % len(sizes)]
        yield samples[start : start + size]
        start += size


def rendered(
    models: StreamModels, settings: StreamSettings, *pieces: NDArray[np.float32]
) -> NDArray[np.uint8]:
    with DittoStream(toy_avatar(), toy_pictures(), models, settings) as stream:
        return np.stack(list(stream.frames(pieces)))


def test_ragged_pieces_give_the_frames_of_one_piece(models: StreamModels) -> None:
    samples = speech(2.5)

    whole = rendered(models, FAST, samples)
    pieces = rendered(models, FAST, *ragged(samples, [1, 37, 640, 4001, 9999]))

    assert np.array_equal(whole, pieces)
    assert len(np.unique(whole.reshape(len(whole), -1), axis=0)) == len(whole)


@pytest.mark.parametrize("overlap", [30, 70, 75])
@pytest.mark.parametrize("num_samples", [1, 640, 641, 3 * 640, 7 * 640, 16_001, 45_000])
def test_as_many_frames_as_the_speech_is_long(models: StreamModels, overlap: int, num_samples: int) -> None:
    settings = replace(FAST, chain=ChainSettings(overlap=overlap, online=True), num_inference_steps=1)

    frames = rendered(models, settings, speech(3)[:num_samples])

    assert len(frames) == -(-num_samples // 640)


def test_no_speech_gives_no_frame(models: StreamModels) -> None:
    with DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream:
        stream.finish()

        assert list(stream) == []
    assert ditto_threads() == []


def test_frames_change_with_speech_seed_and_avatar_only(models: StreamModels) -> None:
    samples, other = speech(0.6), speech(0.6, seed=1)

    first = rendered(models, FAST, samples)

    assert np.array_equal(first, rendered(models, FAST, samples))
    assert not np.array_equal(first, rendered(models, FAST, other))
    assert not np.array_equal(first, rendered(models, replace(FAST, seed=1), samples))
    with DittoStream(toy_avatar(seed=1), toy_pictures(), models, FAST) as stream:
        assert not np.array_equal(first, np.stack(list(stream.frames([samples]))))


def test_frames_come_before_the_speech_is_over(models: StreamModels) -> None:
    """The lead of a block, 10 + 10 + 2 frames, and the three frames of a window that is not full."""
    samples = speech(1.0)
    with DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream:
        stream.feed(samples)
        early = list(islice(stream, 10))
        stream.finish()

        assert len(early) == 10
        assert len(list(stream)) == 15


def test_chunks_of_two_seconds(models: StreamModels) -> None:
    samples = speech(4.4)

    with DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream:
        chunks = list(stream.chunks(ragged(samples, [32_000])))

    assert [len(chunk) for chunk in chunks] == [50, 50, 10]
    assert np.array_equal(np.concatenate(chunks), rendered(models, FAST, samples))


def test_the_render_is_set_back_into_the_frames_of_the_source(models: StreamModels) -> None:
    pictures = toy_pictures(3)
    settings = replace(FAST, crop_size=None)
    with DittoStream(toy_avatar(3), pictures, models, settings) as stream:
        frames = list(stream.frames([speech(0.4)]))

    assert frames[0].shape == pictures[0].shape
    outside = [int(frame[-1, -1, 0]) for frame in frames]
    assert outside == [40, 60, 80, 80, 60, 40, 40, 60, 80, 80]


def test_without_stitching_other_frames(models: StreamModels) -> None:
    samples = speech(0.4)
    loose = models._replace(renderer=Renderer(None, *toy_networks()[1:]))

    assert not np.array_equal(rendered(loose, FAST, samples), rendered(models, FAST, samples))


def test_speech_waits_while_nobody_takes_the_frames(models: StreamModels) -> None:
    settings = replace(FAST, num_inference_steps=1, waiting_s=1.0, waiting_frames=1, batch_frames=1)
    taken = threading.Event()
    with DittoStream(toy_avatar(), toy_pictures(), models, settings) as stream:

        def feed() -> None:
            stream.feed(speech(6.0))
            stream.finish()
            taken.set()

        feeding = threading.Thread(target=feed)
        feeding.start()
        assert not taken.wait(2.0)
        assert len(list(stream)) == 150
        feeding.join(10)
        assert taken.is_set()


@pytest.mark.parametrize("frames_taken", [0, 3])
def test_abort_leaves_no_thread(models: StreamModels, frames_taken: int) -> None:
    stream = DittoStream(toy_avatar(), toy_pictures(), models, FAST)
    frames = stream.frames(repeat(speech(0.2)))
    for _ in range(frames_taken):
        next(frames)
    time.sleep(0.1)

    stream.abort()

    assert ditto_threads() == []
    with pytest.raises(Cancelled):
        list(stream)


def test_an_error_in_a_thread_reaches_both_ends(models: StreamModels) -> None:
    def breaking(window: NDArray[np.float32]) -> NDArray[np.float32]:
        if window.any():
            raise BackendError("the encoder broke")
        return toy_hubert(window)

    with DittoStream(toy_avatar(), toy_pictures(), models._replace(hubert=breaking), FAST) as stream:
        with suppress(BackendError):  # it may break before all is fed
            stream.feed(speech(1.0))
        with pytest.raises(BackendError, match="the encoder broke"):
            next(iter(stream))
        with pytest.raises(BackendError, match="the encoder broke"):
            stream.feed(speech(30.0))
    assert ditto_threads() == []


def test_an_error_of_the_source_of_speech_is_raised(models: StreamModels) -> None:
    def broken() -> Iterator[NDArray[np.float32]]:
        yield speech(0.5)
        raise InputError("the recording is cut off")

    with (
        DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream,
        pytest.raises(InputError, match="cut off"),
    ):
        list(stream.frames(broken()))


@pytest.mark.parametrize(
    "samples",
    [np.zeros(100), np.zeros((100, 2), np.float32), np.array([np.nan], np.float32), np.zeros(10, np.int16)],
)
def test_other_than_float32_mono_is_refused(models: StreamModels, samples: NDArray[np.float32]) -> None:
    with (
        DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream,
        pytest.raises(InputError, match="float32 samples of one channel at 16000 Hz"),
    ):
        stream.feed(samples)


def test_speech_after_its_end_is_refused(models: StreamModels) -> None:
    with DittoStream(toy_avatar(), toy_pictures(), models, FAST) as stream:
        stream.finish()
        with pytest.raises(BackendError, match="begin a new one"):
            stream.feed(speech(0.1))


def held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.drill
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is held")
def test_memory_is_flat_over_ten_minutes(models: StreamModels) -> None:
    """The features alone of nine minutes would take 55 MB."""
    minute = 60 * 25
    settings = replace(WIDE, num_inference_steps=1)
    pieces = (speech(1.0, seed=second % 7) for second in range(600))
    held = []
    with DittoStream(toy_avatar(), toy_pictures(), models, settings) as stream:
        for index, _ in enumerate(stream.frames(pieces)):
            if index in (minute, 10 * minute - 1):
                held.append(held_bytes())

    assert index + 1 == 10 * minute
    assert held[1] - held[0] < 20_000_000


def test_a_channel_gives_what_was_in_it_before_its_end() -> None:
    channel: Channel[int] = Channel(3)
    for item in range(3):
        channel.put(item)
    channel.end()

    assert list(channel) == [0, 1, 2]
    channel.cancel()
    with pytest.raises(Cancelled):
        channel.put(1)


def test_the_silence_before_the_speech_is_heard_once(models: StreamModels) -> None:
    heard = []

    def listening(window: NDArray[np.float32]) -> NDArray[np.float32]:
        heard.append(window)
        return toy_hubert(window)

    with DittoStream(toy_avatar(), toy_pictures(), models._replace(hubert=listening), FAST) as stream:
        list(stream.frames([speech(1.0)]))

    silent = [window for window in heard if not window.any()]
    assert len(silent) == 1
    assert {len(window) for window in heard} == {WINDOW_SAMPLES}
