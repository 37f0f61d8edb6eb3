from collections import Counter

import pytest
import torch

from avatar_core.backends.multitalk.name_map import transformer_name_map
from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, TransformerConfig
from avatar_core.checkpoint import rename
from avatar_core.errors import WeightsError

ADDED = ("audio_proj.", "audio_cross_attn.", "norm_x.")  # by MultiTalk


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return MultiTalkTransformer(TransformerConfig()).state_dict()


def test_every_tensor_of_the_published_model_is_named_once(published):
    entries = transformer_name_map(TransformerConfig())
    assert len({entry.source for entry in entries}) == len(entries) == 1633
    assert Counter(entry.target for entry in entries) == Counter(dict.fromkeys(published, 1))
    added = [entry for entry in entries if any(part in entry.source for part in ADDED)]
    assert len(added) == 330
    assert all(entry.source == entry.target for entry in added)
    assert sum(published[entry.target].numel() for entry in added) == 2_487_168_000
    assert sum(tensor.numel() for tensor in published.values()) == 16_394_878_784 + 2_487_168_000


def test_names_and_shapes_of_the_published_model(published):
    known = {
        "patch_embedding.weight": ("patch_embedding.weight", [5120, 36, 1, 2, 2]),
        "time_projection.1.weight": ("condition_embedder.time_proj.weight", [30720, 5120]),
        "img_emb.proj.4.bias": ("condition_embedder.image_embedder.norm2.bias", [5120]),
        "head.modulation": ("scale_shift_table", [1, 2, 5120]),
        "head.head.weight": ("proj_out.weight", [64, 5120]),
        "audio_proj.proj1_vf.weight": ("audio_proj.proj1_vf.weight", [512, 73728]),
        "audio_proj.proj3.weight": ("audio_proj.proj3.weight", [24576, 512]),
        "blocks.39.modulation": ("blocks.39.scale_shift_table", [1, 6, 5120]),
        "blocks.7.norm3.weight": ("blocks.7.norm2.weight", [5120]),
        "blocks.7.norm_x.weight": ("blocks.7.norm_x.weight", [5120]),
        "blocks.7.self_attn.norm_k.weight": ("blocks.7.attn1.norm_k.weight", [5120]),
        "blocks.7.cross_attn.k_img.weight": ("blocks.7.attn2.add_k_proj.weight", [5120, 5120]),
        "blocks.7.cross_attn.norm_k_img.weight": ("blocks.7.attn2.norm_added_k.weight", [5120]),
        "blocks.7.audio_cross_attn.kv_linear.weight": (
            "blocks.7.audio_cross_attn.kv_linear.weight",
            [10240, 768],
        ),
        "blocks.7.ffn.2.weight": ("blocks.7.ffn.net.2.weight", [5120, 13824]),
    }
    targets = {entry.source: entry.target for entry in transformer_name_map(TransformerConfig())}
    assert {n: (targets[n], list(published[targets[n]].shape)) for n in known} == known


def test_without_the_audio_weights_nothing_is_loaded(published):
    name_map = transformer_name_map(TransformerConfig())
    base = {entry.source: published[entry.target] for entry in name_map}
    base = {name: tensor for name, tensor in base.items() if not any(part in name for part in ADDED)}
    with pytest.raises(WeightsError, match=r"missing: audio_proj.*330 in all"):
        rename(base, name_map)
