from dataclasses import replace

import pytest
import torch

from avatar_core.backends.hunyuan.audio_adapter import tokens_per_latent_frame
from avatar_core.backends.hunyuan.rope import rotary_tables
from avatar_core.backends.hunyuan.transformer import (
    Conditions,
    HunyuanAvatarTransformer,
    Output,
    TextConditions,
    TransformerConfig,
    parameter_dtype,
)
from avatar_core.errors import BackendError

CONFIG = TransformerConfig(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=4,
    num_single_layers=3,
    rope_axes_dim=(4, 6, 6),
    text_embed_dim=10,
    pooled_projection_dim=6,
    audio_window=(3, 2, 5),
    audio_inner_dim=12,
    adapter_inner_dim=8,
    adapter_layers=(1, 3),
)
FRAMES, HEIGHT, WIDTH, TEXT = 3, 4, 8, 7
TOKENS = HEIGHT * WIDTH // 4


@pytest.fixture(scope="module")
def transformer() -> HunyuanAvatarTransformer:
    torch.manual_seed(1)
    model = HunyuanAvatarTransformer(CONFIG).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # twice the usual gain: every input makes a difference that can be measured
            parameter.mul_(2 if "norm" in name else 1.5)
    return model


def make_conditions(batch_size: int = 2, seed: int = 2) -> Conditions:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator)

    return Conditions(
        text=TextConditions(
            randn(TEXT, CONFIG.text_embed_dim),
            torch.ones(batch_size, TEXT, dtype=torch.int64),
            randn(CONFIG.pooled_projection_dim),
        ),
        ref_latents=randn(CONFIG.in_channels, FRAMES, HEIGHT, WIDTH),
        audio=randn(4 * FRAMES - 3, *CONFIG.audio_window),
        face_masks=torch.ones(batch_size, 1, 1, HEIGHT, WIDTH),
        motion_exp=torch.full((batch_size, 4), 30),
        motion_pose=torch.full((batch_size, 4), 25),
        fps=torch.full((batch_size,), 25.0),
    )


def make_latents(batch_size: int = 2, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, CONFIG.in_channels, FRAMES, HEIGHT, WIDTH, generator=generator)


def run(transformer: HunyuanAvatarTransformer, conditions: Conditions, time: float = 700.0) -> Output:
    batch_size = len(conditions.fps)
    timestep = torch.full((batch_size,), time)
    return transformer(make_latents(batch_size), timestep, transformer.prepare(conditions))


def one_of(conditions: Conditions, index: int) -> Conditions:
    rows = slice(index, index + 1)
    text = TextConditions(*(value[rows] for value in vars(conditions.text).values()))
    rest = {name: value[rows] for name, value in vars(conditions).items() if name != "text"}
    return Conditions(text=text, **rest)


def test_the_last_block_on_kept_rows_ends_where_the_full_step_did(transformer):
    prepared = transformer.prepare(make_conditions())
    timestep = torch.tensor([700.0, 700.0])
    full = transformer(make_latents(), timestep, prepared)
    other_latents = torch.zeros_like(make_latents())
    assert torch.equal(transformer(other_latents, timestep, prepared, full.cache).sample, full.sample)
    later = transformer(make_latents(), timestep - 400, prepared, full.cache)
    assert (later.sample - full.sample).abs().max() > 0.01  # modulated by the time of the step itself


def test_rows_kept_for_another_text_length_are_refused(transformer):
    conditions = make_conditions()
    full = run(transformer, conditions)
    mask = conditions.text.prompt_mask.clone()
    mask[:, -1] = 0
    shorter = transformer.prepare(replace(conditions, text=replace(conditions.text, prompt_mask=mask)))
    with pytest.raises(BackendError, match=r"7 tokens, .* 6; run a full step"):
        transformer(make_latents(), torch.tensor([700.0, 700.0]), shorter, full.cache)


def test_texts_of_different_length_do_not_touch_each_other(transformer):
    conditions = make_conditions()
    conditions.text.prompt_mask[0, 2:5] = 0  # the refiner leaves these out, attention the last three
    together = run(transformer, conditions).sample
    for index, length in enumerate([TEXT - 3, TEXT]):
        prepared = transformer.prepare(one_of(conditions, index))
        assert prepared.text.length == length
        latents = make_latents()[index : index + 1]
        alone = transformer(latents, torch.tensor([700.0]), prepared).sample
        assert torch.allclose(alone, together[index : index + 1], atol=1e-5)
    conditions.text.prompt_mask[0, 2:5] = 1
    assert (run(transformer, conditions).sample - together)[0].abs().max() > 1e-3


def test_sound_reaches_the_face_only(transformer):
    conditions = make_conditions()
    silent = replace(conditions, audio=torch.zeros_like(conditions.audio))
    spoken, unspoken = run(transformer, conditions), run(transformer, silent)
    assert (spoken.sample - unspoken.sample).abs().max() > 0.01
    nowhere = torch.zeros_like(conditions.face_masks)
    spoken, unspoken = (run(transformer, replace(c, face_masks=nowhere)) for c in (conditions, silent))
    assert torch.equal(spoken.sample, unspoken.sample)


def test_a_token_takes_the_face_mask_at_its_upper_left(transformer):
    mask = torch.zeros(1, 1, 1, HEIGHT, WIDTH)
    mask[..., 2, 4] = 0.5
    mask[..., 1, 1] = 1.0  # no token begins here
    gate = transformer.prepare_face_masks(mask)
    assert gate.shape == (1, 1, TOKENS, 1)
    assert gate.flatten().nonzero().tolist() == [[1 * (WIDTH // 2) + 2]]


def test_one_picture_and_mask_serve_the_whole_batch(transformer):
    conditions = make_conditions()
    first = {"ref_latents": conditions.ref_latents[:1], "face_masks": conditions.face_masks[:1] * 0.6}
    repeated = {name: value.expand(2, -1, -1, -1, -1) for name, value in first.items()}
    shared, whole = (run(transformer, replace(conditions, **given)) for given in (first, repeated))
    assert torch.allclose(shared.sample, whole.sample, atol=1e-5)


def test_the_first_video_frame_fills_the_first_latent_frame():
    audio_tokens = torch.arange(9.0).view(1, 9, 1, 1).expand(1, 9, 2, 1)
    frames = tokens_per_latent_frame(audio_tokens)[0, :, ::2, 0]
    assert frames.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_the_reference_picture_stands_one_frame_before_the_video():
    cosines, sines = rotary_tables(2, 2, 3, (4, 2, 2), theta=100.0)
    assert cosines.shape == sines.shape == ((2 + 1) * 2 * 3, 8)
    time, row, column = -1, 1, 2  # the last token of the reference picture
    angles = torch.tensor([time, time, time / 10, time / 10, row, row, column, column])
    assert torch.allclose(cosines[5], angles.cos())
    assert torch.allclose(sines[5], angles.sin())
    assert torch.allclose(cosines[6, :4], torch.ones(4))  # the first video frame is at time 0


def test_patches_return_to_their_places(transformer):
    model = HunyuanAvatarTransformer(CONFIG).requires_grad_(False)
    model.load_state_dict(transformer.state_dict())
    model.proj_out.weight.zero_()
    model.proj_out.bias.copy_(torch.arange(12.0))  # channel, then row, then column of the patch
    sample = run(model, make_conditions()).sample
    assert sample.shape == make_latents().shape
    assert sample[1, 2, 1, :2, 2:4].tolist() == [[8, 9], [10, 11]]
    assert torch.equal(sample[:, :, :, ::2, ::2], sample[:, :, :1, :1, :1].expand(-1, -1, 3, 2, 4))


def test_float32_weights_ignore_the_callers_autocast(transformer):
    plain = run(transformer, make_conditions()).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(transformer, make_conditions()).sample, plain)


def test_half_precision_stays_near_float32(transformer):
    model = HunyuanAvatarTransformer(CONFIG).requires_grad_(False)
    state = transformer.state_dict()
    half = {name: value.to(parameter_dtype(name, torch.bfloat16)) for name, value in state.items()}
    model.load_state_dict(half, assign=True)
    kept = {name.split(".")[0] for name, value in half.items() if value.dtype == torch.float32}
    assert kept == {"audio_proj", "audio_adapters", "ref_proj", "proj_out"}
    exact, rounded = run(transformer, make_conditions()), run(model, make_conditions())
    assert rounded.sample.dtype == rounded.cache.image.dtype == rounded.cache.text.dtype == torch.bfloat16
    error = (rounded.sample.float() - exact.sample).norm() / exact.sample.norm()
    assert 1e-4 < error < 0.05


def test_configuration_from_official_names():
    settings = {
        "in_channels": 16,
        "out_channels": 16,
        "num_heads": 24,
        "head_dim": 128,
        "depth_double_blocks": 20,
        "depth_single_blocks": 40,
        "refiner_depth": 2,
        "mlp_width_ratio": 4,
        "patch_size": [1, 2, 2],
        "rope_dim_list": [16, 56, 56],
        "rope_theta": 256,
        "text_states_dim": 4096,
        "text_states_dim_2": 768,
        "audio_proj": {
            "seq_len": 10,
            "blocks": 5,
            "channels": 384,
            "intermediate_dim": 1024,
            "context_tokens": 4,
        },
        "adapter_dim_head": 1024,
        "adapter_after_double_blocks": [1, 3, 5, 7, 9, 11, 13, 15, 17, 19],
    }
    assert TransformerConfig.from_official(settings) == TransformerConfig()
