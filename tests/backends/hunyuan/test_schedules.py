import pytest
import torch

from avatar_core.backends.hunyuan.schedules import (
    ClipWindows,
    cached_steps,
    euler_step,
    flow_sigmas,
    guidance_at,
)

REFERENCE_FULL = {*range(16), 20, 25, 30, 35, *range(40, 50)}


def full_steps(step_cache, num_steps):
    return {step for step, cached in enumerate(cached_steps(step_cache, num_steps)) if not cached}


def test_sigmas_fall_from_one_to_zero():
    sigmas = flow_sigmas(4, 5.0)

    assert sigmas.dtype == torch.float32
    assert torch.allclose(sigmas, torch.tensor([1, 15 / 16, 10 / 12, 5 / 8, 0]))


def test_a_step_moves_by_the_change_of_sigma_in_single_precision():
    latents = torch.ones(2, dtype=torch.float16)

    moved = euler_step(latents, torch.full((2,), 4.0), torch.tensor(0.5), torch.tensor(0.25))

    assert moved.dtype == torch.float32
    assert moved.tolist() == [0, 0]


def test_guidance_begins_anew_when_the_texts_change():
    scales = [guidance_at(step, 50, 7.5) for step in (0, 9, 10, 49)]

    assert scales == pytest.approx([7.5, 0.82 * 5.5 + 2, 0.8 * 3 + 3.5, 0.02 * 3 + 3.5])


def test_the_reference_caches_by_absolute_step():
    assert full_steps("reference", 50) == REFERENCE_FULL
    assert full_steps("reference", 80) == REFERENCE_FULL
    assert full_steps("reference", 12) == set(range(12))


def test_the_scaled_schedule_is_that_of_the_reference_for_as_many_steps():
    assert full_steps("scaled", 50) == REFERENCE_FULL


@pytest.mark.parametrize("num_steps", [20, 25, 30, 75, 100, 200])
def test_the_scaled_schedule_caches_as_large_a_share_in_the_same_places(num_steps):
    cached = [step / num_steps for step, flag in enumerate(cached_steps("scaled", num_steps)) if flag]

    assert 0.2 < len(cached) / num_steps < 0.5
    assert min(cached) >= 0.3
    assert max(cached) < 0.82


@pytest.mark.parametrize("num_steps", range(1, 130))
def test_the_scaled_schedule_begins_in_full_and_changes_texts_in_full(num_steps):
    full = full_steps("scaled", num_steps)

    assert 0 in full
    assert num_steps <= 10 or 10 in full
    assert num_steps - 1 in full


def test_the_cache_can_be_off():
    assert full_steps("off", 60) == set(range(60))


def literal_windows(num_audio_frames, step):
    """Index lists as the published loop makes them."""
    kept = (num_audio_frames // 4 * 4) // 4 + 1
    length = (num_audio_frames // 128 + 1) * 32 + 1
    offset = 10
    if kept == 33:
        length, offset = 33, 0
    shift = 0
    for _ in range(step):
        shift = (shift + offset) % 33
    starts = [start - shift for start in range(0, length, 33)]
    return [
        (
            [k % length for k in range(start, start + 33)],
            [k % (4 * length) for k in range(4 * start, 4 * (start + 33) - 3)],
        )
        for start in starts
    ]


@pytest.mark.parametrize("num_audio_frames", [129, 135, 205, 255, 256, 383, 405, 405 + 128, 1000])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 34])
def test_windows_are_those_of_the_published_loop(num_audio_frames, step):
    windows = ClipWindows.of(num_audio_frames).at(step)

    found = [(window.frames.tolist(), window.audio_frames.tolist()) for window in windows]
    assert found == literal_windows(num_audio_frames, step)


@pytest.mark.parametrize(
    ("num_audio_frames", "num_frames", "num_kept_frames", "num_windows"),
    [(129, 33, 33, 1), (136, 65, 35, 2), (255, 65, 64, 2), (256, 97, 65, 3), (405, 129, 102, 4)],
)
def test_a_longer_clip_has_more_windows(num_audio_frames, num_frames, num_kept_frames, num_windows):
    windows = ClipWindows.of(num_audio_frames)

    assert (windows.num_frames, windows.num_kept_frames) == (num_frames, num_kept_frames)
    assert len(windows.at(7)) == num_windows
    seen = torch.cat([window.frames for window in windows.at(7)])
    assert sorted(set(seen.tolist())) == list(range(num_frames))
