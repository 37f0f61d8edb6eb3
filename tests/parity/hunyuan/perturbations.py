"""Single things spoilt on purpose: the cases that they touch must fail, all others must still pass."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.parity.golden import Golden
from tests.parity.judge import Perturbation

TRANSFORMER_CASES = ("transformer_forward", "transformer_cache_steps", "loop_")


def change_number(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """By a hundredth, where there is one."""
    return {key: value * 1.01 if key == name else value for key, value in settings.items()}


def change_shift(golden: Golden) -> Golden:
    settings = change_number(golden.settings, "shift")
    if "pairs" in settings:
        settings["pairs"] = [change_number(pair, "shift") for pair in settings["pairs"]]
    return replace(golden, settings=settings)


def change_guidance(golden: Golden) -> Golden:
    return replace(golden, settings=change_number(golden.settings, "cfg_scale"))


def misdirect_row(golden: Golden) -> Golden:
    """Two weights of one shape, of the expression and of the head motion, change places in the name map."""
    one, other = "motion_exp.mlp.0.weight", "motion_pose.mlp.0.weight"
    return replace(golden, wrong_rows={one: other, other: one})


def swap_modulation(golden: Golden) -> Golden:
    """Shift and scale of the output layer change places."""
    layer = "final_layer.adaLN_modulation.1."
    weights = {
        name: torch.cat(tensor.chunk(2)[::-1]) if name.startswith(layer) else tensor
        for name, tensor in golden.weights.items()
    }
    return replace(golden, weights=weights)


PERTURBATIONS: dict[str, Perturbation] = {
    "shift": Perturbation(change_shift, touches=("scheduler", "loop_")),
    "guidance": Perturbation(change_guidance, touches=("loop_",)),
    "name_map": Perturbation(misdirect_row, touches=TRANSFORMER_CASES),
    "modulation": Perturbation(swap_modulation, touches=TRANSFORMER_CASES),
}
