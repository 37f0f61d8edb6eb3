import pytest
import torch

from avatar_core.backends.hunyuan.fp8 import (
    Fp8Linear,
    cast_to_fp8,
    check_fp8_weights,
    official_scales,
    store_linears_as_fp8,
)
from avatar_core.backends.hunyuan.name_map import transformer_name_map
from avatar_core.backends.hunyuan.transformer import (
    Conditions,
    HunyuanAvatarTransformer,
    TextConditions,
    TransformerConfig,
)
from avatar_core.checkpoint import load_strict, rename
from avatar_core.errors import WeightsError

CONFIG = TransformerConfig(
    in_channels=2,
    out_channels=2,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    rope_axes_dim=(4, 6, 6),
    text_embed_dim=6,
    pooled_projection_dim=5,
    audio_window=(2, 2, 3),
    audio_inner_dim=8,
    adapter_inner_dim=8,
    adapter_layers=(1,),
)
NAME_MAP = transformer_name_map(CONFIG)
SCALE = 0.125


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    """Random weights under official names, with float32 values that bfloat16 holds."""
    torch.manual_seed(0)
    shapes: dict[str, torch.Size] = {}
    state = HunyuanAvatarTransformer(CONFIG).state_dict()
    for entry in NAME_MAP:
        shape = state[entry.target].shape
        shapes[entry.source] = shape if entry.rows is None else torch.Size([entry.rows.stop, *shape[1:]])
    return {name: torch.randn(shape).mul(0.2).bfloat16().float() for name, shape in shapes.items()}


def as_fp8(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The files as they are published: weights and, by layer, scales."""
    stored = {name: value.bfloat16() for name, value in state.items()}
    scales = {}
    for name, value in state.items():
        if "_blocks." in name and "adapter" not in name and name.endswith(".weight") and value.ndim == 2:
            stored[name] = (value / SCALE).to(torch.float8_e4m3fn)
            scales[name.removesuffix(".weight")] = torch.tensor(SCALE)
    return stored, scales


def build(state: dict[str, torch.Tensor], fp8: bool) -> HunyuanAvatarTransformer:
    with torch.device("meta"):
        model = HunyuanAvatarTransformer(CONFIG)
        if fp8:
            store_linears_as_fp8(model)
    load_strict(model, state)
    return model.requires_grad_(False)


def run(model: HunyuanAvatarTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 2, 2, 4, 4, generator=generator)
    conditions = Conditions(
        text=TextConditions(
            torch.randn(1, 4, 6, generator=generator),
            torch.ones(1, 4, dtype=torch.int64),
            torch.randn(1, 5, generator=generator),
        ),
        ref_latents=latents.flip(0),
        audio=torch.randn(1, 5, 2, 2, 3, generator=generator),
        face_masks=torch.ones(1, 1, 1, 4, 4),
        motion_exp=torch.full((1, 4), 30),
        motion_pose=torch.full((1, 4), 25),
        fps=torch.tensor([25.0]),
    )
    return model(latents, torch.tensor([500.0]), model.prepare(conditions)).sample


def test_a_float8_model_equals_the_half_precision_one_of_its_dequantised_weights(official):
    stored, scales = as_fp8(official)
    model = build(rename(stored, NAME_MAP) | official_scales(scales, NAME_MAP), fp8=True)
    plain = {
        name: value.bfloat16() * SCALE if value.dtype == torch.float8_e4m3fn else value
        for name, value in stored.items()
    }
    other = build(rename(plain, NAME_MAP), fp8=False)
    assert torch.equal(run(model), run(other))
    assert model.transformer_blocks[0].attn.to_k.weight.dtype == torch.float8_e4m3fn
    assert not any(isinstance(module, Fp8Linear) for module in model.context_embedder.modules())


def test_float8_halves_what_the_blocks_take(official):
    stored, scales = as_fp8(official)
    model = build(rename(stored, NAME_MAP) | official_scales(scales, NAME_MAP), fp8=True)
    sizes = {name: value.element_size() for name, value in model.state_dict().items() if value.ndim == 2}
    blocks = {name for name in sizes if "transformer_blocks." in name}
    assert {sizes[name] for name in blocks} == {1}
    assert 1 not in {sizes[name] for name in sizes.keys() - blocks}


def test_layers_of_zeros_and_of_another_type_are_refused(official):
    stored, _ = as_fp8(official)
    state = rename(stored, NAME_MAP)
    check_fp8_weights(state)
    empty, other = "single_transformer_blocks.1.proj_out.weight", "transformer_blocks.0.norm1.linear.weight"
    spoilt = state | {empty: torch.zeros(32, 160).to(torch.float8_e4m3fn), other: state[other].float()}
    with pytest.raises(WeightsError, match=rf"2 layers .* \({empty}, {other}\)"):
        check_fp8_weights(spoilt)


def test_a_scale_of_an_unknown_layer_is_refused(official):
    _, scales = as_fp8(official)
    with pytest.raises(WeightsError, match=r"1 layers .* \(double_blocks\.9\.img_attn_qkv\)"):
        official_scales(scales | {"double_blocks.9.img_attn_qkv": torch.tensor(1.0)}, NAME_MAP)


def test_a_layer_without_its_scale_does_not_load(official):
    stored, scales = as_fp8(official)
    del scales["double_blocks.0.img_mod.linear"]
    state = rename(stored, NAME_MAP) | official_scales(scales, NAME_MAP)
    with pytest.raises(WeightsError, match=r"missing: transformer_blocks\.0\.norm1\.linear\.scale"):
        build(state, fp8=True)


def test_half_precision_weights_are_cast_as_the_official_file_has_them(official):
    state = rename(official, NAME_MAP)
    cast = cast_to_fp8(state)
    model = build(cast, fp8=True)
    scaled = {name.removesuffix(".scale") for name in cast if name.endswith(".scale")}
    stored, scales = as_fp8(official)
    like_official = rename(stored, NAME_MAP) | official_scales(scales, NAME_MAP)
    assert {name for name in like_official if name.endswith(".scale")} == {f"{name}.scale" for name in scaled}
    for name in scaled:
        dequantised = cast[f"{name}.weight"].float() * cast[f"{name}.scale"].float()
        original = state[f"{name}.weight"].float()
        assert (dequantised - original).abs().max() <= original.abs().max() / 16
        assert cast[f"{name}.weight"].float().abs().max() > 400
    assert run(model).isfinite().all()
