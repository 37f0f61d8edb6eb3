import copy

import pytest
import torch
from torch import nn

from avatar_core.backends.hunyuan.fp8 import WEIGHT_DTYPE, store_linears_as_fp8
from avatar_core.backends.hunyuan.sampling import ClipConditions, SamplerSettings, denoise
from avatar_core.backends.hunyuan.transformer import (
    HunyuanAvatarTransformer,
    TextConditions,
)
from avatar_core.errors import ConfigError
from avatar_core.memory import (
    BLOCK_STACKS,
    BlockOffload,
    attention,
    attention_kernel,
    compile_blocks,
    fitting_level,
    get_level,
    kernel_problem,
    place,
)
from tests.toy_transformer import TOY_WITH_THREE_SINGLE

CONFIG = TOY_WITH_THREE_SINGLE
SETTINGS = SamplerSettings(num_inference_steps=13, step_cache="scaled")
OFFLOADING = ("24gb", "10gb")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_transformer():
    torch.manual_seed(0)
    return HunyuanAvatarTransformer(CONFIG).eval().requires_grad_(False)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(length, seed):
    mask = (torch.arange(8) < length).long()[None]
    return TextConditions(random(1, 8, 8, seed=seed), mask, random(1, 6, seed=seed + 1))


def latents_of(transformer, num_frames=129, **options):
    conditions = ClipConditions(
        prompt=text(7, 1),
        negative_prompt=text(5, 3),
        ref_latents=random(1, 2, 33, 2, 4, seed=5),
        audio=random(1, num_frames, *CONFIG.audio_window, seed=6),
        face_mask=random(1, 1, 1, 2, 4, seed=7).sigmoid(),
        motion_exp=torch.full((1, 4), 30),
        motion_pose=torch.full((1, 4), 25),
        fps=torch.tensor([25.0]),
    )
    return denoise(
        transformer, conditions, random(1, 2, 65, 2, 4, seed=9), SETTINGS, lambda done, total: None, **options
    )


def addresses(module):
    return {parameter.data_ptr() for parameter in module.parameters()}


@pytest.mark.drill
@pytest.mark.parametrize("name", OFFLOADING)
@pytest.mark.parametrize("num_frames", [129, 160], ids=["one window", "two windows"])
def test_a_clip_does_not_depend_on_where_its_blocks_wait(name, num_frames):
    expected = latents_of(make_transformer(), num_frames, sequential=True)

    transformer = place(make_transformer(), get_level(name), "cpu")

    latents = latents_of(transformer, num_frames, sequential=True, cache_device="cpu")
    assert torch.equal(latents, expected)


def test_guidance_halves_may_run_one_after_the_other():
    transformer = make_transformer()

    both, one_by_one = (latents_of(transformer, sequential=sequential) for sequential in (False, True))

    assert torch.allclose(both, one_by_one, atol=1e-5, rtol=0)


def test_blocks_wait_elsewhere_and_all_else_stays():
    transformer = make_transformer()
    kept = {name: value.clone() for name, value in transformer.state_dict().items()}
    inside = addresses(transformer.audio_proj)

    place(transformer, get_level("24gb"), "cpu")

    assert addresses(transformer.audio_proj) == inside
    assert all(torch.equal(value, kept[name]) for name, value in transformer.state_dict().items())


@pytest.mark.parametrize("prefetch", [True, False])
def test_blocks_compute_in_the_same_few_places(prefetch):
    blocks = [nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(5, 7)]
    waiting = [addresses(block) for block in blocks]
    seen = []
    BlockOffload(blocks, torch.device("cpu"), prefetch=prefetch)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: seen.append(block.weight.data_ptr()))

    for block in blocks * 2:
        block(torch.ones(5))

    assert len(set(seen)) == (2 if prefetch else 1)
    assert not set.union(*waiting, *map(addresses, blocks)) & set(seen)


@pytest.mark.parametrize("prefetch", [True, False])
@torch.inference_mode()
def test_blocks_may_run_in_any_order(prefetch):
    with torch.inference_mode(mode=False):
        plain = [nn.Sequential(nn.Linear(4, 3 + number), nn.ReLU()) for number in range(5)]
        offloaded = copy.deepcopy(plain)
        BlockOffload(offloaded, torch.device("cpu"), prefetch=prefetch)
    rows = random(2, 4, seed=0)

    for number in [0, 1, 2, 3, 4, 4, 4, 0, 3, 1, 1, 0, 2, 4, 3]:
        assert torch.equal(offloaded[number](rows), plain[number](rows))


def test_a_block_that_fails_leaves_its_weights_waiting():
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    expected = [block(torch.ones(4)) for block in blocks]
    BlockOffload(blocks, torch.device("cpu"), prefetch=True)
    waiting = addresses(blocks[0])

    with pytest.raises(RuntimeError):
        blocks[0](torch.ones(5))

    assert addresses(blocks[0]) == waiting
    for block, value in zip(blocks, expected, strict=True):
        assert torch.equal(block(torch.ones(4)), value)


def test_float8_blocks_keep_their_types_and_scales():
    transformer = make_transformer().bfloat16()
    store_linears_as_fp8(transformer)
    for name, parameter in transformer.named_parameters():
        if name.startswith(BLOCK_STACKS):
            values = random(*parameter.shape, seed=len(name)).abs().clamp(0.5, 2)
            parameter.data = values.to(parameter.dtype)
    expected = latents_of(transformer, sequential=True)

    place(transformer, get_level("24gb"), "cpu")

    assert torch.equal(latents_of(transformer, sequential=True), expected)
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == WEIGHT_DTYPE


@pytest.mark.parametrize("kernel", ["_native_math", "native"])
def test_attention_kernels_agree(kernel):
    transformer = make_transformer()

    with attention(kernel):
        latents = latents_of(transformer, sequential=True)

    assert torch.allclose(latents, latents_of(transformer, sequential=True), atol=1e-4, rtol=0)


def test_attention_falls_back_to_what_works():
    assert attention_kernel("cpu", torch.float32, 32) == "native"
    assert kernel_problem("native", "cpu", torch.bfloat16, 32) == ""
    assert "missing package" in kernel_problem("_flash_3", "cpu", torch.bfloat16, 32)
    assert kernel_problem("_native_cudnn", "cpu", torch.bfloat16, 32) != ""


def test_a_kernel_with_wrong_results_is_not_used(monkeypatch):
    monkeypatch.setattr("avatar_core.memory._PROBE_TOLERANCE", 1e-9)

    assert "wrong by" in kernel_problem("native", "cpu", torch.bfloat16, 32)


@pytest.mark.drill
def test_blocks_are_captured_whole():
    """A break in the graph, at the mask or where the kernel is chosen, would cost the fusion."""
    transformer = make_transformer().bfloat16()
    rows, words, vector = torch.ones(1, 6, 24), torch.ones(1, 3, 24), torch.ones(1, 24)
    inputs = [each.bfloat16() for each in (rows, words, vector)]
    rotary = torch.ones(6, 12), torch.zeros(6, 12)

    for stack in BLOCK_STACKS:
        block = transformer.get_submodule(stack)[0]
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), attention("native"):
            for length in (3, 2):
                arguments = (inputs[0], inputs[1][:, :length], inputs[2], None, rotary)
                pairs = zip(compiled(*arguments), block(*arguments), strict=True)
                assert all(torch.equal(one, other) for one, other in pairs)


def test_levels():
    assert fitting_level("cpu").name == "h200"
    assert get_level("24gb").prefetch
    with pytest.raises(ConfigError, match="choose auto or one of: h200, 80gb, 48gb, 24gb, 10gb"):
        get_level("16gb")


def test_nothing_is_compiled_on_a_cpu():
    transformer = make_transformer()

    compile_blocks(transformer, get_level("h200"), "cpu")

    assert transformer.transformer_blocks[0]._compiled_call_impl is None
