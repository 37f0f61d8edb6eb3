import json
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avatar_core.errors import ConfigError
from avatar_core.store import keys

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
    max_leaves=12,
)


@dataclass(frozen=True)
class Sampler:
    steps: int = 50
    shift: float = 7.0
    chunk: int = field(default=1, metadata={"execution": True})


@dataclass(frozen=True)
class Denoise:
    name: str
    guidance_scale: float = 6.0
    size: tuple[int, int] = (512, 512)
    fp8: bool = False
    sampler: Sampler = Sampler(steps=30)
    refiner: Sampler | None = None
    extra: dict[str, float] = field(default_factory=dict)
    offload: str = field(default="none", metadata={"execution": True})


def reversed_order(value):
    if isinstance(value, dict):
        return {name: reversed_order(part) for name, part in reversed(value.items())}
    return [reversed_order(part) for part in value] if isinstance(value, list) else value


@given(plain)
def test_canonical_json_reads_back_and_ignores_the_order_of_names(value):
    text = keys.canonical_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert keys.canonical_json(reversed_order(value)) == text


@given(st.lists(plain, max_size=4))
def test_a_tuple_counts_as_a_list(value):
    assert keys.digest(tuple(value)) == keys.digest(value)


@given(st.integers(-(2**53), 2**53))
def test_integers_floats_and_booleans_stay_apart(number):
    assert keys.digest(number) != keys.digest(float(number))
    assert keys.digest(1) != keys.digest(True)


def test_known_digest_never_changes():
    assert (
        keys.canonical_json({"b": [1, 0.5, None, True], "a": "ü"}) == '{"a":"\\u00fc","b":[1,0.5,null,true]}'
    )
    assert keys.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        {1},
        b"x",
        object,
        Path("x"),
        {1: "x"},
        {"a": [{"b": {2}}]},
    ],
    ids=repr,
)
def test_what_has_no_single_form_is_refused(value):
    with pytest.raises(ConfigError, match="value"):
        keys.digest(value)


def test_the_error_says_where():
    with pytest.raises(ConfigError, match=r"value\.a\[1\]\.b is nan"):
        keys.digest({"a": [1, {"b": float("nan")}]})


def test_defaults_and_execution_fields_are_left_out():
    assert keys.config_values(Denoise("tiny")) == {"name": "tiny"}
    assert keys.config_values(Denoise("tiny", offload="cpu")) == {"name": "tiny"}
    assert keys.config_values(Denoise("tiny", guidance_scale=6)) == {"name": "tiny"}
    assert keys.config_values(Denoise("tiny", size=[512, 512])) == {"name": "tiny"}


def test_a_nested_default_is_the_outer_one():
    assert keys.config_values(Denoise("tiny", sampler=Sampler(steps=30, chunk=9))) == {"name": "tiny"}
    assert keys.config_values(Denoise("tiny", sampler=Sampler())) == {"name": "tiny", "sampler": {}}
    assert keys.config_values(Denoise("tiny", sampler=Sampler(steps=20, chunk=9))) == {
        "name": "tiny",
        "sampler": {"steps": 20},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"name": "full"},
        {"guidance_scale": 6.5},
        {"size": (512, 768)},
        {"size": (512, 512, 1)},
        {"fp8": True},
        {"sampler": Sampler()},
        {"sampler": Sampler(steps=30, shift=5.0)},
        {"sampler": None},
        {"refiner": Sampler()},
        {"extra": {"a": 0.0}},
    ],
    ids=str,
)
def test_each_field_changes_the_key(change):
    base = Denoise("tiny")
    assert keys.item_key("denoise", 1, replace(base, **change), "w", {}) != keys.item_key(
        "denoise", 1, base, "w", {}
    )


def test_true_is_not_one():
    @dataclass
    class Step:
        cache: bool | float = 1.0

    assert keys.config_values(Step(True)) == {"cache": True}


def test_a_configuration_must_be_a_dataclass():
    with pytest.raises(ConfigError, match="dict is not a configuration dataclass"):
        keys.item_key("denoise", 1, {"steps": 3}, "w", {})


inputs = st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3), max_size=4)


@given(inputs)
def test_inputs_are_a_mapping_of_sequences(consumed):
    key = keys.item_key("decode", 2, "config", "weights", consumed)
    turned = {name: tuple(part) for name, part in reversed(consumed.items())}
    assert keys.item_key("decode", 2, "config", "weights", turned) == key
    for name, part in consumed.items():
        other = {**consumed, name: part[::-1]}
        assert (keys.item_key("decode", 2, "config", "weights", other) == key) == (part == part[::-1])


def test_every_part_of_an_item_counts():
    parts = ("decode", 1, Denoise("tiny"), "weights", {"face": ["a"]})
    others = ("score", 2, Denoise("full"), "other", {"audio": ["a"]})
    base = keys.item_key(*parts)
    changed = [keys.item_key(*parts[:at], others[at], *parts[at + 1 :]) for at in range(len(parts))]
    assert len({base, *changed}) == len(parts) + 1


def test_a_precomputed_digest_gives_the_same_key():
    config = Denoise("tiny", fp8=True)
    shared = keys.digest(keys.config_values(config))
    assert keys.item_key("denoise", 1, shared, "w", {}) == keys.item_key("denoise", 1, config, "w", {})


def test_one_key_is_not_taken_for_a_list_of_them():
    with pytest.raises(TypeError, match="face"):
        keys.item_key("denoise", 1, "config", "w", {"face": "abc"})


def test_row_content_parses_the_frame_rate_and_sees_each_part():
    base = {"pictures": ["p"], "recordings": ["r", "s"]}
    assert keys.row_content(**base, fps=25) == keys.row_content(**base, fps=25.0)
    changes = [
        {"pictures": ["q"]},
        {"recordings": ["s", "r"]},
        {"prompt": "a"},
        {"negative_prompt": "a"},
        {"fps": 30},
        {"audio_type": "para"},
        {"bbox": [[0, 0, 1, 1]]},
        {"params": {"steps": 4}},
    ]
    assert len({keys.row_content(**{**base, **change}) for change in [{}, *changes]}) == len(changes) + 1


@given(st.integers(), st.text())
def test_seeds_fit_every_library(seed, content):
    derived = keys.derive_seed(seed, content)
    assert 0 <= derived < 2**63
    assert derived == keys.derive_seed(seed, content)
    assert derived != keys.derive_seed(seed, content, 1)


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert keys.file_sha256(tmp_path / "a").startswith("ba7816bf")


def test_ids_are_ordered_version_7_uuids_of_now():
    ids = [keys.new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))
    first = uuid.UUID(ids[0])
    assert first.version == 7
    assert first.variant == uuid.RFC_4122
    assert abs((first.int >> 80) / 1000 - time.time()) < 60
