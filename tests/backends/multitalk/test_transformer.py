from dataclasses import replace

import pytest
import torch
from torch import Tensor

from avatar_core.backends.multitalk.lrope import attention_map, query_positions
from avatar_core.backends.multitalk.sampling import ClipInputs
from avatar_core.backends.multitalk.transformer import (
    MultiTalkTransformer,
    TransformerConfig,
    parameter_dtype,
    token_masks,
)
from tests.toy_multitalk import HEIGHT, TOY, WIDTH, T, masks, toy_inputs, toy_transformer

TOKENS = HEIGHT * WIDTH // 4


@pytest.fixture(scope="module")
def transformer() -> MultiTalkTransformer:
    return toy_transformer()


def answer(model: MultiTalkTransformer, inputs: ClipInputs, time: float = 700.0) -> Tensor:
    noise = torch.randn(1, TOY.out_dim, T, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    conditions = model.prepare(inputs.prompt_embeds, inputs.clip_features, inputs.audio, inputs.speaker_masks)
    velocity: Tensor = model(torch.cat([noise, inputs.condition], dim=1), torch.tensor([time]), conditions)
    return velocity


@pytest.mark.parametrize("persons", [1, 2])
def test_every_condition_makes_a_difference(transformer, persons):
    inputs = toy_inputs(persons)
    plain = answer(transformer, inputs)
    assert plain.shape == (1, TOY.out_dim, T, HEIGHT, WIDTH)
    assert plain.dtype == torch.float32
    for name in ("prompt_embeds", "clip_features", "condition", "audio"):
        changed = replace(inputs, **{name: getattr(inputs, name).flip(-1)})
        assert (answer(transformer, changed) - plain).abs().max() > 1e-4, name
    assert not torch.allclose(answer(transformer, inputs, time=699.0), plain, atol=1e-6)


def test_two_speakers_are_told_apart_by_the_masks_and_one_is_not(transformer):
    for persons, differs in ((1, False), (2, True)):
        inputs = toy_inputs(persons)
        turned = replace(inputs, speaker_masks=masks()[torch.tensor([1, 0, 2])])
        other = answer(transformer, turned)
        assert (not torch.allclose(other, answer(transformer, inputs), atol=1e-5)) == differs
    inputs = toy_inputs(2)
    speakers = replace(inputs, audio=inputs.audio.flip(0))
    assert not torch.allclose(answer(transformer, speakers), answer(transformer, inputs), atol=1e-5)


def test_sound_reaches_its_own_moment_only(transformer):
    inputs = toy_inputs(1)
    tokens = transformer.audio_proj(inputs.audio)
    later = inputs.audio.clone()
    later[:, -1] += 1
    changed = (transformer.audio_proj(later) - tokens).abs().amax(dim=(0, 2, 3))
    assert changed[:-1].max() == 0
    assert changed[-1] > 0
    attention = transformer.blocks[0].audio_cross_attn
    states = torch.randn(1, T * TOKENS, TOY.dim)
    heard = [attention(states, sound[0], None) for sound in (tokens, transformer.audio_proj(later))]
    moved = (heard[0] - heard[1]).abs().amax(dim=2)[0].unflatten(0, (T, TOKENS)).amax(dim=1)
    assert moved[:-1].max() == 0
    assert moved[-1] > 0


def test_the_map_is_the_mean_weight_of_a_class():
    torch.manual_seed(4)
    query, key = torch.randn(2, 1, 10, 3, 8)
    classes = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    seen = attention_map(query, key, classes)
    weights = torch.einsum("blhd,bshd->bhls", query, key[:, :4]).div(8**0.5).softmax(dim=-1).mean(dim=1)[0]
    assert torch.allclose(seen[0], weights[:, :2].mean(dim=1), atol=1e-6)
    assert torch.allclose(seen[1:], weights[:, 2:].T, atol=1e-6)


def test_positions_follow_who_is_seen_most():
    seen = torch.tensor([[0.5, 0.2, 0.1, 0.1], [0.1, 0.3, 0.2, 0.1], [0.2, 0.1, 0.6, 0.05]])
    assert torch.allclose(query_positions(seen), torch.tensor([4.0, 24.0, 12.0, 0.0]), atol=1e-4)


def test_a_token_takes_the_mask_at_its_upper_left():
    mask = torch.zeros(3, HEIGHT, WIDTH)
    mask[0, 2, 4] = 0.5
    mask[0, 1, 1] = 1.0  # no token begins here
    labelled = token_masks(mask)
    assert labelled.shape == (3, TOKENS)
    assert labelled[0].nonzero().tolist() == [[1 * (WIDTH // 2) + 2]]


def test_a_prompt_that_fills_the_context_is_not_padded(transformer):
    inputs = toy_inputs(1)
    padded = replace(inputs, prompt_embeds=torch.cat([inputs.prompt_embeds, torch.zeros(507, TOY.text_dim)]))
    assert torch.equal(answer(transformer, padded), answer(transformer, inputs))


def test_half_precision_stays_near_float32(transformer):
    model = MultiTalkTransformer(TOY).requires_grad_(False)
    state = transformer.state_dict()
    model.load_state_dict(
        {name: value.to(parameter_dtype(name, torch.bfloat16)) for name, value in state.items()}, assign=True
    )
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    assert {name.split(".")[0] for name in kept} == {
        "condition_embedder",
        "blocks",
        "proj_out",
        "scale_shift_table",
    }
    assert all("time_" in name or "scale_shift" in name or "proj_out" in name for name in kept)
    for persons in (1, 2):
        exact, rounded = (answer(each, toy_inputs(persons)) for each in (transformer, model))
        assert rounded.dtype == torch.float32
        assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1


@pytest.mark.drill
@pytest.mark.parametrize("persons", [1, 2])
def test_blocks_compile_whole_and_share_their_code(persons):
    torch.compiler.reset()
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    model, inputs = toy_transformer(), toy_inputs(persons)
    plain = answer(model, inputs)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    assert torch.allclose(answer(model, inputs), plain, atol=1e-6)
    assert len(compiled) == 1
    torch.compiler.reset()


def test_configuration_from_official_names():
    official = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 5120,
        "eps": 1e-6,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 36,
        "model_type": "i2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }
    assert TransformerConfig.from_official(official) == TransformerConfig()
    assert TransformerConfig.from_official(TOY.to_official()) == TOY
    with pytest.raises(TypeError):
        TransformerConfig.from_official({"hidden_size": 1})
