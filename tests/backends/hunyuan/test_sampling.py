from dataclasses import replace

import pytest
import torch

from avatar_core.backends.hunyuan.config import DenoiseConfig
from avatar_core.backends.hunyuan.sampling import (
    ClipConditions,
    SamplerSettings,
    WindowCache,
    denoise,
    denoise_steps,
    draw_noise,
    guide,
)
from avatar_core.backends.hunyuan.schedules import (
    ClipWindows,
    Window,
    cached_steps,
    flow_sigmas,
    guidance_at,
)
from avatar_core.backends.hunyuan.transformer import (
    BlockInput,
    Conditions,
    HunyuanAvatarTransformer,
    TextConditions,
)
from avatar_core.errors import Cancelled
from tests.toy_transformer import TOY

CONFIG = TOY
CHANNELS, HEIGHT, WIDTH = CONFIG.in_channels, 2, 4
TEXT_LENGTH, NEGATIVE_LENGTH, PROMPT_LENGTH = 8, 5, 7  # of the mask, of its ones


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return HunyuanAvatarTransformer(CONFIG).eval()


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(length, seed):
    mask = (torch.arange(TEXT_LENGTH) < length).long()[None]
    return TextConditions(random(1, TEXT_LENGTH, 8, seed=seed), mask, random(1, 6, seed=seed + 1))


def conditions_of(num_audio_frames=129, seed=0):
    return ClipConditions(
        prompt=text(PROMPT_LENGTH, seed + 1),
        negative_prompt=text(NEGATIVE_LENGTH, seed + 3),
        ref_latents=random(1, CHANNELS, 33, HEIGHT, WIDTH, seed=seed + 5),
        audio=random(1, num_audio_frames, *CONFIG.audio_window, seed=seed + 6),
        face_mask=random(1, 1, 1, HEIGHT, WIDTH, seed=seed + 7).sigmoid(),
        motion_exp=torch.full((1, 4), 30),
        motion_pose=torch.full((1, 4), 25),
        fps=torch.tensor([25.0]),
    )


def noise_of(num_audio_frames=129, seed=9):
    windows = ClipWindows.of(num_audio_frames)
    generator = torch.Generator().manual_seed(seed)
    return draw_noise(windows, (CHANNELS, HEIGHT, WIDTH), generator, torch.float32)


def silent(done, total):
    pass


def settings_of(**options):
    return SamplerSettings(**{"num_inference_steps": 4, "step_cache": "off"} | options)


class LiteralLoop:
    """The published loop, written down as it is described: both halves in one batch, everything prepared anew
    for every window, reference and text rows copied for every frame."""

    def __init__(self, transformer, conditions, settings):
        self.transformer, self.conditions, self.settings = transformer, conditions, settings
        self.buffers = {}

    @torch.no_grad()
    def run(self, noise):
        num_audio_frames = self.conditions.audio.shape[1]
        kept = (num_audio_frames // 4 * 4) // 4 + 1
        length = (num_audio_frames // 128 + 1) * 32 + 1
        behind = (num_audio_frames // 128 + 1) * 128 + 4 - num_audio_frames
        audio = torch.cat([self.conditions.audio, torch.zeros_like(self.conditions.audio)[:, :behind]], dim=1)
        offset = 10
        if kept == 33:
            length, offset, noise, audio = 33, 0, noise[:, :, :33], audio[:, :132]
        steps = self.settings.num_inference_steps
        sigmas, latents, shift = flow_sigmas(steps, self.settings.flow_shift), noise, 0
        for step in range(steps):
            total, count = torch.zeros_like(latents), torch.zeros(length)
            for start in range(-shift, length - shift, 33):
                frames = [k % length for k in range(start, start + 33)]
                heard = [k % (4 * length) for k in range(4 * start, 4 * (start + 33) - 3)]
                velocity = self.guided(latents[:, :, frames], audio[:, heard], step, frames, length, sigmas)
                total[:, :, frames] += latents[:, :, frames] + velocity * (sigmas[step + 1] - sigmas[step])
                count[frames] += 1
            latents = total / count[:, None, None]
            shift = (shift + offset) % 33
        return latents[:, :, :kept]

    def guided(self, latents, heard, step, frames, length, sigmas):
        num_steps = self.settings.num_inference_steps
        prepared = self.transformer.prepare(self.batch(heard, step))
        cached = cached_steps(self.settings.step_cache, num_steps)[step]
        rows = self.gather(frames) if cached else None
        timestep = (sigmas[step] * 1000).expand(2)
        output = self.transformer(torch.cat([latents, latents]), timestep, prepared, rows)
        if not cached:
            self.scatter(output.cache, frames, length)
        negative, positive = output.sample.chunk(2)
        return negative + guidance_at(step, num_steps, self.settings.guidance_scale) * (positive - negative)

    def batch(self, heard, step):
        given = self.conditions
        negative = given.negative_prompt if step < 10 else given.prompt
        share = 0.6 if step < 10 else 1.0
        texts = [
            torch.cat(pair) for pair in zip(vars(negative).values(), vars(given.prompt).values(), strict=True)
        ]
        return Conditions(
            text=TextConditions(*texts),
            ref_latents=torch.cat([given.ref_latents] * 2),
            audio=torch.cat([torch.zeros_like(heard), heard]),
            face_masks=share * torch.cat([given.face_mask] * 2),
            motion_exp=torch.cat([given.motion_exp] * 2),
            motion_pose=torch.cat([given.motion_pose] * 2),
            fps=torch.cat([given.fps] * 2),
        )

    def scatter(self, rows, frames, length):
        parts = {
            "image": rows.image.unflatten(1, (33, -1)),
            "reference": rows.reference[:, None].expand(-1, 33, -1, -1),
            "text": rows.text[:, None].expand(-1, 33, -1, -1),
        }
        for name, part in parts.items():
            if name not in self.buffers or self.buffers[name].shape[2] != part.shape[2]:
                self.buffers[name] = torch.zeros(2, length, *part.shape[2:])
            self.buffers[name][:, frames] = part

    def gather(self, frames):
        return BlockInput(
            self.buffers["reference"][:, frames[0]],
            self.buffers["image"][:, frames].flatten(1, 2),
            self.buffers["text"][:, frames[0]],
        )


@pytest.mark.parametrize("num_audio_frames", [129, 150, 300, 405])
@pytest.mark.parametrize("num_steps", [3, 18])
def test_it_is_the_loop_as_described(transformer, num_audio_frames, num_steps):
    conditions, noise = conditions_of(num_audio_frames), noise_of(num_audio_frames)
    settings = settings_of(num_inference_steps=num_steps, step_cache="reference")

    latents = denoise(transformer, conditions, noise, settings, silent)

    expected = LiteralLoop(transformer, conditions, settings).run(noise)
    assert latents.shape == (1, CHANNELS, num_audio_frames // 4 + 1, HEIGHT, WIDTH)
    assert torch.allclose(latents, expected, atol=2e-5)


@pytest.mark.parametrize("num_audio_frames", [129, 150])
def test_halves_one_after_the_other_give_the_same(transformer, num_audio_frames):
    conditions, noise = conditions_of(num_audio_frames), noise_of(num_audio_frames)
    settings = settings_of(num_inference_steps=20, step_cache="scaled")

    both, one_by_one = (
        denoise(transformer, conditions, noise, settings, silent, sequential=sequential)
        for sequential in (False, True)
    )

    assert torch.allclose(both, one_by_one, atol=2e-5)


@pytest.mark.drill
@pytest.mark.parametrize("num_audio_frames", [129, 150])
def test_adaptive_steps_run_in_full_once_the_clip_has_moved_enough(transformer, num_audio_frames):
    conditions, noise = conditions_of(num_audio_frames), noise_of(num_audio_frames)

    def run(**options):
        settings = settings_of(num_inference_steps=16, **options)
        steps = list(denoise_steps(transformer, conditions, noise, settings))
        return [step.is_cached for step in steps], steps[-1].latents

    exact = run()[1]
    cached, latents = {}, {}
    for threshold in (1e-9, 1.0, 10.0):
        cached[threshold], latents[threshold] = run(step_cache="adaptive", cache_threshold=threshold)

    assert not any(cached[1e-9])
    assert torch.equal(latents[1e-9], exact)
    assert 0 < sum(cached[1.0]) < sum(cached[10.0])
    assert [step for step, is_cached in enumerate(cached[10.0]) if not is_cached] == [0, 10, 15]
    assert not torch.equal(latents[1.0], exact)


def test_adaptive_steps_save_no_state(transformer):
    settings = settings_of(step_cache="adaptive", cache_threshold=0.3)
    states = []
    denoise(transformer, conditions_of(), noise_of(), settings, silent, save=states.append, save_every=1)
    assert states == []


@pytest.mark.parametrize("num_audio_frames", [129, 150])
def test_a_clip_goes_on_from_any_saved_state_with_an_equal_result(transformer, num_audio_frames):
    conditions, noise = conditions_of(num_audio_frames), noise_of(num_audio_frames)
    settings = settings_of(num_inference_steps=22, step_cache="scaled")
    states = []
    whole = denoise(transformer, conditions, noise, settings, silent, save=states.append, save_every=3)

    reports = []
    resumed = [
        denoise(transformer, conditions, noise, settings, lambda *r: reports.append(r), state=state)
        for state in states[::2]
    ]

    assert all(torch.equal(latents, whole) for latents in resumed)
    assert reports[0] == (int(states[0]["step"]), 22)
    assert reports.count((22, 22)) == len(resumed)


def test_states_are_saved_before_full_steps_alone(transformer):
    settings = settings_of(num_inference_steps=22, step_cache="scaled")
    states = []

    denoise(transformer, conditions_of(), noise_of(), settings, silent, save=states.append, save_every=2)

    saved = [int(state["step"]) for state in states]
    assert len(saved) > 5
    assert not any(cached_steps("scaled", 22)[step] for step in saved)
    assert all(later - earlier >= 2 for earlier, later in zip([0, *saved], saved, strict=False))


def test_a_report_may_stop_the_clip(transformer):
    reports = []

    def stop_at_two(done, total):
        reports.append((done, total))
        if done == 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        denoise(transformer, conditions_of(), noise_of(), settings_of(), stop_at_two)

    assert reports == [(0, 4), (1, 4), (2, 4)]


def test_cached_steps_run_the_last_block_alone(transformer):
    runs = {"first": 0, "last": 0}
    blocks = {
        "first": transformer.transformer_blocks[0],
        "last": transformer.single_transformer_blocks[-1],
    }
    handles = [
        block.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
        for name, block in blocks.items()
    ]

    denoise(
        transformer,
        conditions_of(150),
        noise_of(150),
        settings_of(num_inference_steps=50, step_cache="scaled"),
        silent,
    )

    for handle in handles:
        handle.remove()
    # Of two windows; in ten steps texts differ in length, so that the halves run one by one.
    assert runs == {"first": 2 * (30 + 10), "last": 2 * (50 + 10)}


def test_sound_and_texts_and_face_mask_matter(transformer):
    base = conditions_of()
    others = [
        replace(base, audio=base.audio + 1),
        replace(base, prompt=text(PROMPT_LENGTH, 40)),
        replace(base, negative_prompt=text(NEGATIVE_LENGTH, 40)),
        replace(base, face_mask=0 * base.face_mask),
        replace(base, ref_latents=base.ref_latents + 1),
    ]

    results = [
        denoise(transformer, each, noise_of(), settings_of(num_inference_steps=1), silent)
        for each in (base, *others)
    ]

    assert all(not torch.allclose(results[0], other, atol=1e-4) for other in results[1:])


def test_later_steps_do_not_see_the_negative_prompt(transformer):
    base = conditions_of()
    other = replace(base, negative_prompt=text(NEGATIVE_LENGTH, 40))
    state = {"latents": noise_of()[:, :, :33], "step": torch.tensor(10)}
    settings = settings_of(num_inference_steps=12)

    one, two = (
        denoise(transformer, each, noise_of(), settings, silent, state=state) for each in (base, other)
    )

    assert torch.equal(one, two)


def test_latents_are_rounded_after_every_step_where_asked(transformer):
    settings = settings_of(latents_dtype=torch.bfloat16)
    noise = noise_of()

    steps = list(denoise_steps(transformer, conditions_of(), noise, settings))

    for step in steps:
        assert step.latents.dtype == noise.dtype
        assert torch.equal(step.latents, step.latents.bfloat16().float())
    exact = next(denoise_steps(transformer, conditions_of(), noise, settings_of())).latents
    assert 0 < (exact - steps[0].latents).abs().max() < 0.05


def test_guidance_is_computed_in_the_more_precise_type():
    halves = torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 2.0, dtype=torch.bfloat16)

    assert guide(*halves, 7.3, torch.float32).dtype == torch.float32
    assert guide(*halves, 7.3, torch.float32).tolist() == pytest.approx([8.3, 8.3])
    assert guide(*halves, 7.3, torch.bfloat16).dtype == torch.bfloat16


def test_noise_of_a_short_clip_is_drawn_as_for_a_longer_one():
    short, longer = noise_of(129), noise_of(150)

    assert short.shape == (1, CHANNELS, 65, HEIGHT, WIDTH)
    assert torch.equal(short, longer)
    assert noise_of(256).shape[2] == 97
    assert not torch.equal(short, noise_of(129, seed=10))


def test_the_cache_gives_reference_and_text_of_the_last_window_with_the_first_frame():
    cache = WindowCache(num_frames=40)
    windows = [Window(torch.arange(start, start + 33) % 40, torch.empty(0)) for start in (0, 33)]
    for number, window in enumerate(windows):
        image = window.frames.float().view(1, 33, 1) + 100 * number
        rows = BlockInput(torch.full((1, 1, 1), float(number)), image, torch.full((1, 2, 1), 10.0 + number))
        cache.store(number, window, rows)

    taken = {
        first: cache.take(Window(torch.arange(first, first + 33) % 40, torch.empty(0)))
        for first in (25, 26, 33)
    }

    assert [int(taken[first].reference) for first in (25, 26, 33)] == [1, 0, 1]
    assert [int(taken[first].text[0, 0, 0]) for first in (25, 26, 33)] == [11, 10, 11]
    assert taken[26].image.flatten().tolist() == [
        frame + 100 * (frame not in range(26, 33)) for frame in [*range(26, 40), *range(19)]
    ]


def test_parity_mode_is_the_published_loop():
    parity = SamplerSettings.from_config(DenoiseConfig(mode="parity", flow_shift=4.0))
    default = SamplerSettings.from_config(DenoiseConfig(num_inference_steps=30, step_cache="off"))

    assert (parity.step_cache, parity.latents_dtype, parity.flow_shift) == ("reference", torch.bfloat16, 4.0)
    assert (default.step_cache, default.latents_dtype) == ("off", torch.float32)
    assert default.num_inference_steps == 30
