"""Every recorded value of `tests/golden`, and that the judge is not blind."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.parity.__main__ import app
from tests.parity.golden import Case, Compare, Tolerance, leaves, without
from tests.parity.judge import Parity, Perturbation, Verdict, compare, judge

FOLDER = Path(__file__).parents[1] / "golden"
HUNYUAN = Parity("hunyuan", FOLDER / "hunyuan")
BACKENDS = ("hunyuan", "multitalk", "ditto")
LARGE = {"ditto": ("net_", "lmdm_step_full", "ddim"), "multitalk": ("stream_",)}
"""Full-size networks and long runs, which the command looks at under a perturbation too; here they would
take too long."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of the recordings were made with one; more would also fight with pytest's other workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def faults(verdicts: list[Verdict]) -> list[str]:
    return [f"{verdict.case} {verdict.result}: {verdict.fault}" for verdict in verdicts if verdict.fault]


def parity_of(backend: str) -> Parity:
    return Parity(backend, FOLDER / backend)


def perturbations(backend: str) -> dict[str, Perturbation]:
    found: dict[str, Perturbation] = importlib.import_module(
        f"tests.parity.{backend}.perturbations"
    ).PERTURBATIONS
    return found


@pytest.mark.parametrize(("backend", "name"), [(b, name) for b in BACKENDS for name in parity_of(b).names])
def test_values_are_those_of_the_reference(backend: str, name: str) -> None:
    verdicts = parity_of(backend).verdicts(name)

    assert faults(verdicts) == []
    assert verdicts or name == "transformer_weights"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_required_case_is_absent(backend: str) -> None:
    assert parity_of(backend).absent() == []


@pytest.mark.drill
@pytest.mark.parametrize(
    ("backend", "perturbation"), [(b, name) for b in BACKENDS for name in perturbations(b)]
)
def test_a_perturbation_fails_the_cases_it_touches_and_no_other(backend: str, perturbation: str) -> None:
    spoilt = perturbations(backend)[perturbation]
    parity = Parity(backend, FOLDER / backend, spoilt.spoil)
    large = LARGE.get(backend, ())
    judged = [name for name in parity.names if not name.startswith(large)]

    with spoilt.applied():
        failed = {name for name in judged if faults(parity.verdicts(name))}

    assert failed == {name for name in judged if name.startswith(spoilt.touches)}


def write_folder(folder: Path, name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(settings))
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


def test_an_absent_required_case_fails_the_command(tmp_path: Path) -> None:
    (tmp_path / "image_sizes.json").write_text(
        json.dumps({"rows": [{"image_size": 704, "in_w": 512, "in_h": 512, "out_w": 704, "out_h": 704}]})
    )

    result = CliRunner().invoke(app, ["hunyuan", str(tmp_path)])

    assert result.exit_code == 1
    assert "rows.0.out_w" in result.output
    assert "loop_*" in result.output
    assert "image_sizes" not in result.output.splitlines()[-1]


def test_a_file_that_no_case_reads_fails(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "surprise", {}, {"out": torch.zeros(1)})

    assert faults(Parity("hunyuan", folder).verdicts("surprise"))


def test_other_sizes_are_taken_from_the_sidecar(tmp_path: Path) -> None:
    settings = {"pairs": [{"index": 7, "steps": 2, "shift": 1.0}]}
    sigmas = torch.tensor([1, 0.5, 0])
    latents = torch.ones(1, 1, 1, 1, 3)
    recorded = {"7.sigmas": sigmas, "7.timesteps": sigmas[:-1] * 1000, "7.x0": latents}
    recorded |= {"7.v0": 2 * latents, "7.x1": 0 * latents}
    folder = write_folder(tmp_path, "scheduler_other", settings, recorded)

    assert faults(Parity("hunyuan", folder).verdicts("scheduler_other")) == []


def test_a_case_sees_no_recorded_result() -> None:
    golden = HUNYUAN.load("loop_short_3steps")
    sizes = HUNYUAN.load("image_sizes")

    assert not any(name.startswith(("mid.", "out.", "sched.")) for name in golden.inputs)
    assert golden.inputs["noise"].shape[2] == 65
    assert "tensors" not in golden.settings
    assert set(sizes.settings["rows"][0]) == {"image_size", "in_w", "in_h"}


def test_leaving_out_goes_by_dotted_path() -> None:
    settings = {"a": 1, "rows": [{"kept": [1, 2], "gone": 3}], "gone": 4}

    assert without(settings, ("rows.*.gone",)) == {"a": 1, "rows": [{"kept": [1, 2]}], "gone": 4}
    assert leaves(settings) == {"a": 1, "rows.0.kept": [1, 2], "rows.0.gone": 3, "gone": 4}


NEAR = Tolerance(1e-3, mean_abs=1e-4)


@pytest.mark.parametrize(
    ("value", "recorded", "right"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00005]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0009]), False),  # on average
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), False),
        (torch.zeros(1, 2), torch.zeros(2), False),
        (Compare(torch.tensor([1.0, 9.0]), rows=[0]), torch.tensor([1.0, 2.0]), True),
        (Compare(torch.tensor([1.0, 9.0]), rows=[]), torch.tensor([1.0, 2.0]), False),
        ("text", "text", True),
        ("text", "other", False),
        ([1, 2], [1, 2], True),
        (None, 1, False),
    ],
)
def test_comparing(value: object, recorded: object, right: bool) -> None:
    assert (compare("case", "result", value, recorded, NEAR).fault == "") == right


def test_every_recorded_value_must_be_computed_and_no_other() -> None:
    case = Case("case", {"*": NEAR})

    verdicts = list(judge("case", case, {"extra": 1}, {"out": torch.zeros(1)}))

    assert {verdict.result for verdict in verdicts if verdict.fault} == {"out", "extra"}
    assert faults(list(judge("case", case, {}, {})))
