import pytest
import torch
from torch import nn

from avatar_core.backends.multitalk.quantised import (
    DTYPES,
    QuantisedLinear,
    cast_weights,
    quantise,
    quantise_weight,
    read_quantised,
)
from avatar_core.memory import get_level, place
from tests.backends.multitalk.test_transformer import answer
from tests.toy_multitalk import toy_inputs, toy_transformer


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.5 / 127), ("fp8", 0.04)])
def test_rows_keep_their_own_scale(kind, error):
    torch.manual_seed(0)
    weight = torch.randn(5, 40) * torch.tensor([[1e-3], [1.0], [50.0], [1.0], [0.0]])
    data, scale = quantise_weight(weight, kind)
    assert data.dtype == DTYPES[kind]
    off = (data.float() * scale - weight).abs().amax(dim=1)
    assert (off <= 1.01 * error * weight.abs().amax(dim=1)).all()


@pytest.mark.parametrize("kind", DTYPES)
def test_a_layer_computes_in_the_dtype_of_its_input(kind):
    torch.manual_seed(0)
    plain = nn.Linear(8, 6)
    linear = QuantisedLinear(8, 6, bias=True, dtype=DTYPES[kind])
    linear.weight.data, linear.scale.data = quantise_weight(plain.weight.data, kind)
    linear.bias.data = plain.bias.data
    states = torch.randn(2, 8)
    exact = states @ (linear.weight.float() * linear.scale).T + plain.bias
    assert torch.allclose(linear(states), exact, atol=1e-6)
    assert linear(states.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(linear(states.bfloat16()).float(), exact, atol=0.05)


@pytest.mark.parametrize("kind", DTYPES)
def test_cast_blocks_answer_nearly_the_same_and_may_wait_elsewhere(kind):
    plain, cast = toy_transformer(), toy_transformer()
    cast_weights(cast, kind)
    linears = [module for module in cast.blocks.modules() if isinstance(module, nn.Linear)]
    assert not linears
    exact, rounded = (answer(model, toy_inputs(2)) for model in (plain, cast))
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.1
    offloaded = place(cast, get_level("10gb"), "cpu", ("blocks",))
    assert torch.equal(answer(offloaded, toy_inputs(2)), rounded)


def test_the_official_format_goes_both_ways():
    state = {"a.weight": torch.randn(4, 6), "a.bias": torch.randn(4), "norm.weight": torch.randn(6)}
    stored, modules = quantise(state, "fp8")
    assert modules == {"a": {"weights": "qfloat8_e4m3fn", "activations": "none"}}
    assert set(stored) == {
        "a.weight._data",
        "a.weight._scale",
        "a.input_scale",
        "a.output_scale",
        "a.bias",
        "norm.weight",
    }
    read = read_quantised(stored, modules)
    assert set(read) == {"a.weight", "a.scale", "a.bias", "norm.weight"}
    bits = {**stored, "a.weight._data": stored["a.weight._data"].view(torch.uint8)}
    assert torch.equal(read_quantised(bits, modules)["a.weight"].float(), read["a.weight"].float())
