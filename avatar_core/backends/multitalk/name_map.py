"""From the official names of the transformer's tensors to those of diffusers."""

from avatar_core.backends.multitalk.transformer import TransformerConfig
from avatar_core.checkpoint import Rename

_EMBEDDER = "condition_embedder"
_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
    "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
    "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
    "head.head": "proj_out",
    **{
        f"audio_proj.{name}": f"audio_proj.{name}" for name in ("proj1", "proj1_vf", "proj2", "proj3", "norm")
    },
}
_OF_BLOCK = {
    **{f"self_attn.{name}": f"attn1.to_{name}" for name in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    **{f"cross_attn.{name}": f"attn2.to_{name}" for name in "qkv"},
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"audio_cross_attn.{name}": f"audio_cross_attn.{name}" for name in ("q_linear", "kv_linear", "proj")},
    "norm_x": "norm_x",
}
_SCALES = {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}


def transformer_name_map(config: TransformerConfig) -> list[Rename]:
    modules = dict(_MODULES)
    names = {"head.modulation": "scale_shift_table"}
    for number in range(config.num_layers):
        block = f"blocks.{number}."
        modules |= {block + source: block + target for source, target in _OF_BLOCK.items()}
        names |= {f"{block}{source}.weight": f"{block}{target}.weight" for source, target in _SCALES.items()}
        names[f"{block}modulation"] = f"{block}scale_shift_table"
    for source, target in modules.items():
        names |= {f"{source}.{kind}": f"{target}.{kind}" for kind in ("weight", "bias")}
    return [Rename(source, target) for source, target in names.items()]
