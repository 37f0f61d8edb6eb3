"""Stages are asked for their items by the facts that they say they read."""

from dataclasses import replace
from typing import Any

import pytest

from avatar_core.backends.base import Backend, create_backend
from avatar_core.planning.item_builder import ItemBuilder
from avatar_core.stages.base import Asset, ItemSpec
from avatar_core.stages.subject import Segment, SoundFormat, Subject
from tests.execution.windowed_backend import WindowedBackend, WindowedConfig
from tests.subjects import subject

NAMES = ("preview", "hunyuan", "multitalk", "ditto")


def items(backend: Backend, facts: Subject) -> dict[str, tuple[ItemSpec, ...]]:
    made: dict[str, tuple[ItemSpec, ...]] = {}
    for name, stage in backend.stages().items():
        made[name] = ItemBuilder(stage, lambda names: ",".join(names)).items(facts, made)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_stages_run_after_those_that_they_consume(name: str) -> None:
    before: set[str] = set()
    for stage in create_backend({"name": name}).stages().values():
        assert before.issuperset(stage.inputs)
        assert set(dir(Subject)).issuperset(stage.facts)
        before.add(stage.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_reads_no_more_than_it_says(name: str) -> None:
    backend = create_backend({"name": name})
    for footage in (False, True):
        made = items(backend, subject(backend, footage=footage))
        column = "video" if footage else "image"
        assert list(made["face"][0].assets) == [column]
        assert set(made["decode"][0].assets) == {column, "audio"}


def test_an_undeclared_fact_cannot_be_read() -> None:
    backend = create_backend({"name": "preview"})
    stage = backend.stages()["audio"]
    stage.facts = ("batch", "options", "segment")
    with pytest.raises(AttributeError, match="fps"):
        ItemBuilder(stage, ",".join).items(subject(backend), {})


OTHER = Asset("other", "o" * 64, "assets/other")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 2}, {"denoise", "decode"}),
        ({"prompt": "A dog."}, {"text", "denoise", "decode"}),
        ({"picture": OTHER}, {"face", "text", "reference", "denoise", "decode"}),
        ({"recordings": (OTHER,)}, {"audio", "denoise", "decode"}),
        ({"segment": Segment(0.5)}, {"audio", "denoise", "decode"}),
        ({"boxes": ((0.0, 0.0, 9.0, 9.0),)}, {"reference", "denoise", "decode"}),
        ({"sound": SoundFormat(44_100, 2)}, {"decode"}),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_a_fact_changes_the_keys_of_those_that_read_it(change: dict[str, Any], changed: set[str]) -> None:
    backend = create_backend({"name": "hunyuan"})
    first, second = (items(backend, facts) for facts in (subject(backend), subject(backend, **change)))
    assert {stage for stage in first if first[stage][0].key != second[stage][0].key} == changed


def test_equal_facts_are_one_item() -> None:
    backend = create_backend({"name": "preview"})
    builder = ItemBuilder(backend.stages()["audio"], ",".join)
    facts = subject(backend)
    (item,) = builder.items(facts, {})
    assert builder.items(replace(facts, seed=2, picture=OTHER), {})[0] is item


def test_what_consumes_a_chained_stage_gets_all_windows() -> None:
    backend = WindowedBackend(WindowedConfig())
    made = items(backend, subject(backend, duration_s=0.6))
    keys = tuple(item.key for item in made["denoise"])
    assert [item.inputs.get("denoise") for item in made["denoise"]] == [None, *((key,) for key in keys[:-1])]
    assert [item.config.window for item in made["denoise"]] == [0, 1, 2]
    assert sum(item.work for item in made["denoise"]) == pytest.approx(0.6)
    assert made["decode"][0].inputs["denoise"] == keys
