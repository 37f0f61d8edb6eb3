from dataclasses import replace

import pytest
import torch

from avatar_core.backends.multitalk.chunked_blocks import run_in_chunks
from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, parameter_dtype
from avatar_core.memory import get_level, place
from tests.backends.multitalk.test_transformer import TOKENS, answer
from tests.toy_multitalk import T, toy_inputs, toy_transformer


@pytest.mark.parametrize("num_rows", [1, TOKENS + 3, 2 * TOKENS, 1000])
@pytest.mark.parametrize("persons", [1, 2])
def test_chunks_of_rows_give_what_all_rows_give(num_rows, persons):
    transformer, inputs = toy_transformer(), toy_inputs(persons)
    expected = answer(transformer, inputs)

    run_in_chunks(transformer, num_rows)

    assert torch.allclose(answer(transformer, inputs), expected, atol=2e-6, rtol=1e-5)


def test_no_more_rows_than_told_are_computed_at_a_time():
    transformer = toy_transformer()
    sizes = []
    for name in ("ffn", "attn2", "audio_cross_attn"):
        part = transformer.blocks[1].get_submodule(name)
        part.register_forward_hook(lambda _module, _given, output: sizes.append(output.shape[1]))

    run_in_chunks(transformer, TOKENS + 1)
    answer(transformer, toy_inputs(2))

    assert max(sizes) == TOKENS + 1
    assert sum(sizes) == 3 * T * TOKENS


def half_precision() -> MultiTalkTransformer:
    model = toy_transformer()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16))
    return model


def test_half_precision_rounds_where_the_plain_blocks_round():
    exact, plain, chunked = toy_transformer(), half_precision(), half_precision()
    for name, parameter in exact.named_parameters():
        parameter.data = plain.get_parameter(name).float()

    run_in_chunks(chunked, 7)

    inputs = toy_inputs(2)
    off = (answer(plain, inputs) - answer(exact, inputs)).norm()
    assert (answer(chunked, inputs) - answer(plain, inputs)).norm() < 0.5 * off


def test_chunks_go_with_weights_that_wait_elsewhere():
    transformer, inputs = toy_transformer(), toy_inputs(2)
    expected = answer(transformer, inputs)

    run_in_chunks(transformer, 7)
    place(transformer, replace(get_level("10gb"), prefetch=True), "cpu", ("blocks",))

    assert torch.allclose(answer(transformer, inputs), expected, atol=2e-6, rtol=1e-5)
