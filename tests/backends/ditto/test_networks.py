"""The six networks: official names and sizes, what is folded on loading, precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatar_core.backends.ditto.appearance import AppearanceConfig, AppearanceExtractor
from avatar_core.backends.ditto.layers import channels_last, fold_norms
from avatar_core.backends.ditto.lmdm import LmdmConfig, MotionDecoder
from avatar_core.backends.ditto.motion_extractor import MotionExtractor, MotionExtractorConfig
from avatar_core.backends.ditto.official import (
    NETWORKS,
    dtype_on,
    fold_spectral_norms,
    load_network,
    official_shapes,
)
from avatar_core.backends.ditto.spade_decoder import DecoderConfig, SpadeDecoder
from avatar_core.backends.ditto.stitching import StitchingConfig, StitchingNetwork
from avatar_core.backends.ditto.tiny import NETWORKS as TINY
from avatar_core.backends.ditto.tiny import random_state
from avatar_core.backends.ditto.warp import WarpConfig, WarpingNetwork
from avatar_core.errors import WeightsError

OFFICIAL: dict[str, tuple[Callable[[Any], nn.Module], Any, int, int]] = {
    "appearance": (AppearanceExtractor, AppearanceConfig(), 107, 836_224),
    "motion": (MotionExtractor, MotionExtractorConfig(), 212, 28_118_728),
    "warp": (WarpingNetwork, WarpConfig(), 97, 45_529_829),
    "decoder": (SpadeDecoder, DecoderConfig(), 182, 55_365_388),
    "stitch": (StitchingNetwork, StitchingConfig(), 8, 45_249),
    "lmdm": (MotionDecoder, LmdmConfig(), 249, 47_788_297),
}
"""Class, sizes, tensors of the published file, and how many numbers were trained."""


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_defaults_are_the_published_sizes(name: str) -> None:
    network, config, num_tensors, num_parameters = OFFICIAL[name]
    with torch.device("meta"):
        model = network(config)
    shapes = official_shapes(model)
    assert len(shapes) == num_tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    state = {each: torch.empty(shape, device="meta") for each, shape in shapes.items()}
    if name == "decoder":
        state = {each: tensor for each, tensor in state.items() if not each.endswith(("_u", "_v"))}
        state = {each.removesuffix("_orig"): tensor for each, tensor in state.items()}
    assert type(config).from_state(state) == config


def tiny_state(name: str) -> dict[str, Tensor]:
    return random_state(name, TINY[name], seed=2)


def toy_inputs(name: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "appearance": [(1, 3, 64, 64)],
        "motion": [(1, 3, 64, 64)],
        "warp": [(2, 4, 2, 8, 8), (2, 21, 3), (2, 21, 3)],
        "decoder": [(2, 8, 8, 8)],
        "stitch": [(1, 21, 3), (1, 21, 3)],
    }
    return tuple(0.3 * torch.randn(shape, generator=generator) for shape in shapes[name])


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.inference_mode():
        result = model(*inputs)
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


@pytest.mark.parametrize("name", ["appearance", "warp", "decoder"])
@pytest.mark.parametrize("change", [fold_norms, channels_last])
def test_a_faster_network_computes_the_same(name: str, change: Callable[[nn.Module], None]) -> None:
    model = NETWORKS[name](tiny_state(name))
    expected = outputs(model, toy_inputs(name))
    change(model)
    for got, wanted in zip(outputs(model, toy_inputs(name)), expected, strict=True):
        assert wanted.std() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_batch_norms_that_follow_a_convolution_are_gone() -> None:
    model = NETWORKS["appearance"](tiny_state("appearance"))
    before = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    fold_norms(model)
    assert before == 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["appearance", "motion", "decoder"])
def test_half_precision_is_near_full_precision(name: str) -> None:
    """The warping network pools volumes, which a CPU does in float32 only."""
    model, inputs = NETWORKS[name](tiny_state(name)), toy_inputs(name)
    expected = outputs(model, inputs)
    model.bfloat16()
    cast = (inputs[0].bfloat16(), *inputs[1:])
    for got, wanted in zip(outputs(model, cast), expected, strict=True):
        error = (got.float() - wanted).abs().mean() / wanted.abs().mean()
        assert error < 0.05
        assert got.isfinite().all()


def test_the_stored_vectors_scale_a_spectral_norm() -> None:
    """They are not estimated anew."""
    generator = torch.Generator().manual_seed(0)
    weight, u, v = (torch.randn(size, generator=generator) for size in ((3, 2, 1, 1), (3,), (2,)))
    state = {"conv_s.weight_orig": weight, "conv_s.weight_u": u, "conv_s.weight_v": v, "fc.bias": u}
    folded = fold_spectral_norms(state)
    assert set(folded) == {"conv_s.weight", "fc.bias"}
    torch.testing.assert_close(folded["conv_s.weight"], weight / (u @ weight.flatten(1) @ v))


def test_a_spectral_norm_needs_its_vectors() -> None:
    state = tiny_state("decoder")
    del state["up_0.conv_1.weight_v"]
    with pytest.raises(WeightsError, match=r"SpadeDecoder; missing: up_0\.conv_1\.weight_v"):
        NETWORKS["decoder"](state)


def test_the_stitching_network_is_one_of_those_in_its_file(tmp_path: Path) -> None:
    state = tiny_state("stitch")
    both = {
        "retarget_shoulder": {f"module.{name}": tensor for name, tensor in state.items()},
        "retarget_mouth": {"module.mlp.0.weight": torch.zeros(1)},
    }
    torch.save(both, tmp_path / "stitch_network.pth")
    loaded = load_network("stitch", tmp_path / "stitch_network.pth")
    torch.testing.assert_close(loaded.mlp[0].weight, state["mlp.0.weight"])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_another_network_is_refused(name: str, tmp_path: Path) -> None:
    torch.save({"something.weight": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match="missing"):
        load_network(name, tmp_path / "wrong.pth")


def test_a_name_too_many_is_refused(tmp_path: Path) -> None:
    state = tiny_state("warp") | {"fifth.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "warp.pth")
    with pytest.raises(WeightsError, match=r"unexpected: fifth\.weight"):
        load_network("warp", tmp_path / "warp.pth")


def test_a_cpu_computes_in_float32() -> None:
    assert [dtype_on("cpu", precision) for precision in ("fp16", "bf16", "fp32")] == [torch.float32] * 3
    assert dtype_on("cuda:1", "fp16") == torch.float16
