from dataclasses import replace

import pytest
import torch

from avatar_core.backends.hunyuan.chunked_blocks import run_in_chunks
from avatar_core.backends.hunyuan.transformer import (
    Conditions,
    HunyuanAvatarTransformer,
    TextConditions,
)
from avatar_core.memory import get_level, place
from tests.toy_transformer import TOY_WITH_THREE_SINGLE

CONFIG = TOY_WITH_THREE_SINGLE


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transformer_of(dtype=torch.float32):
    torch.manual_seed(0)
    return HunyuanAvatarTransformer(CONFIG).to(dtype).eval().requires_grad_(False)


def answer(transformer, lengths=(5, 7)):
    """Of two clips, whose texts have these lengths; then of a step on the first one's activations."""
    size = len(lengths)
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    conditions = Conditions(
        text=TextConditions(random(size, 8, 8, seed=1), mask, random(size, 6, seed=2)),
        ref_latents=random(size, 2, 3, 4, 6, seed=3),
        audio=random(size, 9, *CONFIG.audio_window, seed=4),
        face_masks=random(size, 1, 1, 4, 6, seed=5).sigmoid(),
        motion_exp=torch.full((size, 4), 30.0),
        motion_pose=torch.full((size, 4), 25.0),
        fps=torch.full((size,), 25.0),
    )
    prepared = transformer.prepare(conditions)
    latents = random(size, 2, 3, 4, 6, seed=6)
    full = transformer(latents, torch.full((size,), 700.0), prepared)
    cached = transformer(latents, torch.full((size,), 300.0), prepared, cache=full.cache)
    return torch.stack([full.sample, cached.sample])


@pytest.mark.parametrize("num_rows", [1, 7, 1000])
@pytest.mark.parametrize("lengths", [(5, 7), (6,)], ids=["two texts", "one text"])
def test_chunks_of_rows_give_what_all_rows_give(num_rows, lengths):
    transformer = transformer_of()
    expected = answer(transformer, lengths)

    run_in_chunks(transformer, num_rows)

    assert torch.allclose(answer(transformer, lengths), expected, atol=2e-6, rtol=1e-5)


def test_half_precision_rounds_where_the_plain_blocks_round():
    exact, plain, chunked = transformer_of(), transformer_of(torch.bfloat16), transformer_of(torch.bfloat16)
    for name, parameter in exact.named_parameters():
        parameter.data = plain.get_parameter(name).float()

    run_in_chunks(chunked, 7)

    off = (answer(plain) - answer(exact)).norm()
    assert (answer(chunked) - answer(plain)).norm() < 0.5 * off


def test_chunks_go_with_weights_that_wait_elsewhere():
    transformer = transformer_of()
    expected = answer(transformer)

    run_in_chunks(place(transformer, replace(get_level("10gb"), prefetch=True), "cpu"), 7)

    assert torch.allclose(answer(transformer), expected, atol=2e-6, rtol=1e-5)
