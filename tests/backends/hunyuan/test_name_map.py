from collections import Counter
from dataclasses import replace

import pytest
import torch

from avatar_core.backends.hunyuan.name_map import transformer_name_map
from avatar_core.backends.hunyuan.transformer import HunyuanAvatarTransformer, TransformerConfig
from avatar_core.checkpoint import Rename, load_strict, rename
from avatar_core.errors import WeightsError
from tests.toy_transformer import TOY

TINY = replace(TOY, mlp_ratio=3.0, audio_inner_dim=7)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return HunyuanAvatarTransformer(TransformerConfig()).state_dict()


def official_shapes(config: TransformerConfig, state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Shapes of the official tensors, as far as the name map tells them: rows of its parts together."""
    shapes: dict[str, list[int]] = {}
    for entry in transformer_name_map(config):
        shape = list(state[entry.target].shape)
        if entry.rows is not None:
            assert entry.rows.stop - entry.rows.start == shape[0]
            assert entry.rows.start == shapes.get(entry.source, [0])[0]  # no gap, no overlap
            shape[0] = entry.rows.stop
        shapes[entry.source] = shape
    return shapes


def test_every_tensor_of_the_published_model_is_named_once(published):
    entries = transformer_name_map(TransformerConfig())
    assert len({entry.source for entry in entries}) == 946
    assert Counter(entry.target for entry in entries) == Counter(dict.fromkeys(published, 1))
    assert sum(tensor.numel() for tensor in published.values()) == 12_991_493_184


def test_official_shapes_of_the_published_model(published):
    shapes = official_shapes(TransformerConfig(), published)
    known = {
        "img_in.proj.weight": [3072, 16, 1, 2, 2],
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight": [9216, 3072],
        "vector_in.in_layer.weight": [3072, 768],
        "motion_pose.mlp.0.weight": [768, 256],
        "double_blocks.19.img_mod.linear.weight": [18432, 3072],
        "double_blocks.19.txt_attn_qkv.bias": [9216],
        "double_blocks.0.img_attn_q_norm.weight": [128],
        "single_blocks.39.linear1.weight": [21504, 3072],
        "single_blocks.39.linear2.weight": [3072, 15360],
        "single_blocks.0.modulation.linear.weight": [9216, 3072],
        "final_layer.linear.weight": [64, 3072],
        "final_layer.adaLN_modulation.1.weight": [6144, 3072],
        "audio_proj.proj1.weight": [1024, 19200],
        "audio_proj.proj3.weight": [12288, 1024],
        "audio_adapter_blocks.9.to_kv.weight": [2048, 3072],
        "before_proj.weight": [3072, 3072],
    }
    assert {name: shapes[name] for name in known} == known


def test_fused_layers_are_cut_and_the_last_modulation_is_turned():
    entries = {(entry.source, entry.target): entry for entry in transformer_name_map(TransformerConfig())}
    expected = [
        ("double_blocks.3.txt_attn_qkv.bias", "transformer_blocks.3.attn.add_k_proj.bias", slice(3072, 6144)),
        ("single_blocks.7.linear1.weight", "single_transformer_blocks.7.attn.to_v.weight", slice(6144, 9216)),
        ("single_blocks.7.linear1.weight", "single_transformer_blocks.7.proj_mlp.weight", slice(9216, 21504)),
    ]
    for source, target, rows in expected:
        assert entries[source, target] == Rename(source, target, rows)
    turned = {entry.target for entry in entries.values() if entry.swap_halves}
    assert turned == {"norm_out.linear.weight", "norm_out.linear.bias"}


def test_official_weights_load_into_a_model_of_any_size():
    torch.manual_seed(0)
    reference = HunyuanAvatarTransformer(TINY)
    shapes = official_shapes(TINY, reference.state_dict())
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    with torch.device("meta"):
        model = HunyuanAvatarTransformer(TINY)
    load_strict(model, rename(official, transformer_name_map(TINY)))
    linear1 = official["single_blocks.1.linear1.weight"]
    block = model.single_transformer_blocks[1]
    parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    assert torch.equal(torch.cat([part.weight for part in parts]), linear1)
    shift, scale = official["final_layer.adaLN_modulation.1.bias"].chunk(2)
    assert torch.equal(model.norm_out.linear.bias, torch.cat([scale, shift]))


def test_a_checkpoint_of_another_model_is_refused():
    shapes = official_shapes(TINY, HunyuanAvatarTransformer(TINY).state_dict())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    del state["before_proj.weight"]
    with pytest.raises(WeightsError, match=r"before_proj\.weight"):
        rename(state, transformer_name_map(TINY))
