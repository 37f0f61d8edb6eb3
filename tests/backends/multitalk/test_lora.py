import logging

import pytest
import torch

from avatar_core.backends.multitalk.lora import merge_lora
from avatar_core.errors import WeightsError

Q, K = "blocks.0.self_attn.q", "blocks.0.self_attn.k"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"{Q}.weight": torch.randn(4, 6),
        f"{Q}.bias": torch.randn(4),
        f"{K}.weight": torch.randn(4, 6),
        "blocks.0.norm3.weight": torch.randn(6),
    }


def pair(module: str, names: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, torch.Tensor]:
    """Of rank 2."""
    down, up = (f"diffusion_model.{module}.{name}.weight" for name in names)
    return {down: torch.randn(2, 6), up: torch.randn(4, 2)}


def product(lora: dict[str, torch.Tensor]) -> torch.Tensor:
    down, up = list(lora.values())[:2]
    return up @ down


def test_pairs_and_differences_are_added(state):
    lora = pair(Q)
    rest = {
        f"diffusion_model.{Q}.diff_b": torch.ones(4),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(6),
    }
    merged = merge_lora(state, lora | rest, 0.5, parity=False)
    assert torch.allclose(merged[f"{Q}.weight"], state[f"{Q}.weight"] + 0.5 * product(lora))
    assert torch.allclose(merged[f"{Q}.bias"], state[f"{Q}.bias"] + 0.5)
    assert torch.allclose(merged["blocks.0.norm3.weight"], state["blocks.0.norm3.weight"] + 0.5)
    assert merged[f"{K}.weight"] is state[f"{K}.weight"]


def test_alpha_counts_unless_the_published_code_is_followed(state):
    lora = pair(Q)
    alpha = {f"diffusion_model.{Q}.alpha": torch.tensor(8.0)}
    for parity, factor in ((False, 4.0), (True, 1.0)):
        merged = merge_lora(state, lora | alpha, 1.0, parity=parity)[f"{Q}.weight"]
        assert torch.allclose(merged, state[f"{Q}.weight"] + factor * product(lora))


def test_pairs_named_a_and_b_are_merged_unless_the_published_code_is_followed(state):
    lora, other = pair(Q), pair(K, ("lora_A", "lora_B"))
    merged = merge_lora(state, lora | other, 1.0, parity=False)
    assert torch.allclose(merged[f"{K}.weight"], state[f"{K}.weight"] + product(other))
    assert merge_lora(state, lora | other, 1.0, parity=True)[f"{K}.weight"] is state[f"{K}.weight"]


def test_only_the_published_code_computes_in_the_dtype_of_the_model(state):
    lora = pair(Q)
    exact = state[f"{Q}.weight"] + 1.2 * product(lora)
    merged = merge_lora(state, lora, 1.2, parity=False, dtype=torch.bfloat16)[f"{Q}.weight"]
    assert torch.equal(merged, exact.to(torch.bfloat16))
    down, up = (tensor.to(torch.bfloat16) for tensor in lora.values())
    rounded = state[f"{Q}.weight"].to(torch.bfloat16) + 1.2 * (up @ down)
    merged = merge_lora(state, lora, 1.2, parity=True, dtype=torch.bfloat16)[f"{Q}.weight"]
    assert torch.equal(merged, rounded)
    assert not torch.equal(rounded, exact.to(torch.bfloat16))


def test_what_does_not_fit_is_told(state, caplog):
    wider = {f"diffusion_model.{K}.diff": torch.ones(4, 8), "diffusion_model.blocks.9.diff": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        merged = merge_lora(state, pair(Q) | wider, 1.0, parity=False)
    assert merged[f"{K}.weight"] is state[f"{K}.weight"]
    assert f"2 tensors that do not fit, such as {K}.weight" in caplog.text
    with pytest.raises(WeightsError, match=r"nothing for this model: 2 tensors, such as .*give one made for"):
        merge_lora(state, wider, 1.0, parity=False)
    half = dict(list(pair(Q).items())[:1])
    with pytest.raises(WeightsError, match=r"has .*lora_down\.weight without .*lora_up\.weight"):
        merge_lora(state, half, 1.0, parity=True)
