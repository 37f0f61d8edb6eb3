"""Which lanes take part in a render, and what of a store's options the server is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avatar_core.planning.batch import Batch
from flows.lane_info import LaneInfo, read_description
from flows.names import gpu_queue, host_name, host_of, render_queue
from flows.placement import public_options, unfit
from tests.sample_rows import Rendered, open_known

LANE = LaneInfo("alpha", "NVIDIA H200", "alpha-gpu-0.17", weights=("mtcnn", "hunyuan"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_HOST", "alpha")


@pytest.fixture
def batch(rendered: Rendered, tmp_path: Path, here: None) -> Batch:
    return open_known({"table": str(rendered.table), "storage": {"root": str(tmp_path)}})


def test_a_lane_reads_back_what_it_said() -> None:
    for lane in (LANE, replace(LANE, weights=()), replace(LANE, gpu="pretended, computes on the CPU")):
        assert read_description(lane.describe()) == lane


@pytest.mark.parametrize("text", [None, "", "a queue of somebody's", "GPU: H200\nmachine: alpha"])
def test_other_queues_have_no_lane(text: str | None) -> None:
    assert read_description(text) is None


def test_a_lane_of_this_machine_and_version_is_fit(batch: Batch) -> None:
    assert unfit(LANE, batch) is None


def test_why_a_lane_is_left_out(batch: Batch) -> None:
    older = unfit(replace(LANE, package="0.0.1"), batch)
    assert older is not None
    assert older.startswith("it has avatar-dataset 0.0.1, this run ")
    elsewhere = unfit(replace(LANE, host="omega"), batch)
    assert elsewhere is not None
    assert elsewhere.startswith("it is on machine omega, and the store ")


def test_weights_are_those_of_the_stages_with_a_gpu() -> None:
    names = ["hunyuan/vae", "hunyuan/transformer", "multitalk/wan", "hunyuan-tiny/vae"]
    assert LANE.lacks(names) == ["multitalk"]
    assert LANE.lacks(["hunyuan/vae"]) == []


def test_credentials_are_left_out() -> None:
    options: dict[str, Any] = {
        "endpoint_url": "https://me:hunter2@host:9000/x?token=hunter2",
        "key": "hunter2",
        "secret": "hunter2",
        "client_kwargs": {"region_name": "eu", "aws_session_token": "hunter2"},
        "use_ssl": True,
    }
    assert public_options(options) == {
        "endpoint_url": "https://host:9000/x",
        "client_kwargs": {"region_name": "eu"},
        "use_ssl": True,
    }


def test_names_of_queues(here: None) -> None:
    assert host_name() == "alpha"
    assert host_of(gpu_queue("a-gpu-b", 12)) == "a-gpu-b"
    assert host_of(render_queue("alpha")) is None
    assert host_of("default") is None


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "ä", "a" * 64])
def test_names_that_no_machine_can_have(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from avatar_core.errors import ConfigError

    monkeypatch.setenv("AVATAR_HOST", name or " ")
    with pytest.raises(ConfigError, match="a machine cannot be called"):
        host_name()
