"""Which items a row needs and what each of them is called."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from avatar_core.config import Config, parse
from avatar_core.errors import InputError
from avatar_core.media.table import parse_rows
from avatar_core.planning.clip_builder import cut
from avatar_core.planning.clip_names import clip_names, slug
from tests.sample_rows import PREVIEW_STAGES, open_known

# --- names


def names(*rows: dict[str, Any]) -> list[str]:
    return clip_names(parse_rows([{"image": "in/a.png", "audio": "in/b.c.wav", **row} for row in rows]))[0]


def test_a_clip_is_called_by_its_row_or_its_files() -> None:
    assert names({"name": "Anna"}, {}) == ["Anna", "a-b.c"]


def test_names_differ_in_more_than_case() -> None:
    found = names({"name": "Anna"}, {"name": "ANNA"}, {"name": "anna-2"}, {})
    assert len({name.casefold() for name in found}) == 4
    assert found[:2] == ["Anna", "ANNA-2"]


def test_only_names_that_somebody_gave_are_warned_about() -> None:
    rows = parse_rows([{"image": "a.png", "audio": "a.wav"}] * 2)
    assert clip_names(rows) == (["a-a", "a-a-2"], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Grüße aus Köln", "Grüße-aus-Köln"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("a..b", "a.b"),
        ("///", "clip"),
        ("", "clip"),
        ("a\nb\0c", "a-b-c"),
        ("-rf", "rf"),
    ],
)
def test_a_name_becomes_a_safe_file_name(text: str, expected: str) -> None:
    assert slug(text) == expected


@pytest.mark.parametrize("letter", ["x", "ü", "日"])
def test_a_long_name_is_cut_between_letters(letter: str) -> None:
    short = slug(letter * 300)
    assert len(short.encode()) <= 96
    assert set(short) == {letter}


def test_every_clip_of_a_batch_has_a_name_of_its_own(inputs: Path, tmp_path: Path) -> None:
    """Takes and parts add to a row's name what another row may be called."""
    clips = opened(inputs, tmp_path, [{"name": "a"}, {"name": "a-take2"}], takes=2).clips
    assert len({clip.name for clip in clips}) == 4


# --- long recordings


def segments(duration_s: float, fps: float = 25.0, **audio: Any) -> list[tuple[float, float]]:
    config = parse(Config, {"audio": audio})
    return [(s.start_s, s.duration_s) for s in cut(duration_s, None, config, fps)]


def test_a_recording_within_the_limit_is_one_clip() -> None:
    assert segments(9.0) == [(0.0, 9.0)]
    assert segments(9.0, max_duration_s=9.0) == [(0.0, 9.0)]


@pytest.mark.parametrize("fps", [25.0, 30.0, 23.976, 29.97])
@pytest.mark.parametrize("duration_s", [9.01, 30.0, 61.7])
def test_parts_are_equal_adjoin_and_end_between_frames(duration_s: float, fps: float) -> None:
    parts = segments(duration_s, fps, max_duration_s=9.0)
    assert sum(length for _, length in parts) == pytest.approx(duration_s)
    for (start, length), (following, _) in pairwise(parts):
        assert start + length == pytest.approx(following)
        assert following * fps == pytest.approx(round(following * fps))
    lengths = [length for _, length in parts]
    assert max(lengths) - min(lengths) <= 2 / fps
    assert max(lengths) <= 9.0 + 1 / fps


def test_a_long_recording_may_be_trimmed_or_refused() -> None:
    assert segments(9.0, max_duration_s=2.0, long="trim") == [(0.0, 2.0)]
    with pytest.raises(InputError, match=r"lasts? 9\.0 s.*audio\.max_duration_s=2 s"):
        segments(9.0, max_duration_s=2.0, long="refuse")


# --- keys

ROW = {"image": "portrait.jpg", "audio": "hello.wav"}


def opened(inputs: Path, store: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    """A batch whose inputs are in the store and of which nothing has been computed."""
    placed = [{**ROW, **row} for row in rows]
    for row in placed:
        row |= {name: str(inputs / row[name]) for name in ("image", "audio", "audio_2") if name in row}
    return open_known({"rows": placed, "storage": {"root": str(store)}, **options})


def keys(inputs: Path, store: Path, row: dict[str, Any] | None = None, **options: Any) -> dict[str, str]:
    clip = opened(inputs, store, [row or {}], **options).clips[0]
    assert clip.error is None
    return {stage: spec.key for stage, spec in clip.items.items()}


@pytest.fixture(scope="module")
def key_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


FROM_FACE = {"face", "reference", "denoise", "decode"}
FROM_REFERENCE = FROM_FACE - {"face"}
FROM_AUDIO = {"audio", "denoise", "decode"}
FROM_DENOISE = {"denoise", "decode"}


def case_name(value: Any) -> str:
    """Sets print in any order, which the processes of a test run must agree on."""
    return "-".join(sorted(value)) or "none" if isinstance(value, set) else str(value)


def changed(first: dict[str, str], second: dict[str, str]) -> set[str]:
    assert first.keys() == second.keys() == set(PREVIEW_STAGES)
    return {stage for stage in first if first[stage] != second[stage]}


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"video": {"crf": 21}}, {"decode"}),
        ({"video": {"x264_preset": "fast"}}, {"decode"}),
        ({"video": {"fps": 30}}, FROM_AUDIO),
        ({"video": {"max_side": 96}}, FROM_REFERENCE),
        ({"face": {"min_face": 30}}, FROM_FACE),
        ({"face": {"rule": "leftmost"}}, FROM_REFERENCE),
        ({"face": {"required": False}}, FROM_REFERENCE),
        ({"audio": {"silence_db": -50}}, FROM_AUDIO),
        ({"backend": {"name": "preview", "denoise": {"mouth_gain": 0.5}}}, FROM_DENOISE),
        ({"backend": {"name": "preview", "denoise": {"head_motion": 0.5}}}, FROM_DENOISE),
        ({"backend": {"name": "preview", "denoise": {"blinks": False}}}, FROM_DENOISE),
        ({"seed": 1}, FROM_DENOISE),
        ({"name": "other"}, set()),
        ({"takes": 2}, set()),
        ({"limit": 1}, set()),
        ({"max_failed_fraction": 1}, set()),
        ({"retry_failed": True}, set()),
        ({"runtime": {"shard_seconds": 1}}, set()),
        ({"runtime": {"cache_bytes": 10**9}}, set()),
        ({"audio": {"max_duration_s": 60}}, set()),
        ({"audio": {"min_duration_s": 0.1}}, set()),
        ({"input": {"max_bytes": 10**8}}, set()),
        ({"input": {"max_duration_s": 60}}, set()),
        ({"input": {"allow_network": True}}, set()),
        ({"video": {"crf": 20, "fps": 25}, "seed": 0}, set()),
    ],
    ids=case_name,
)
def test_an_option_changes_the_keys_of_its_stage_and_after(
    inputs: Path, key_store: Path, options: dict[str, Any], stages: set[str]
) -> None:
    assert changed(keys(inputs, key_store), keys(inputs, key_store, **options)) == stages


@pytest.mark.parametrize(
    ("row", "stages"),
    [
        ({"image": "closeup.jpg"}, FROM_FACE),
        ({"audio": "again.wav"}, FROM_AUDIO),
        ({"seed": 6}, FROM_DENOISE),
        ({"fps": 30}, FROM_AUDIO),
        ({"bbox": [50, 20, 90, 60]}, FROM_REFERENCE),
        ({"params": {"mouth_gain": 0.5}}, FROM_DENOISE),
        ({"params": {"mouth_gain": 1}}, set()),
        ({"fps": 25}, set()),
        ({"prompt": "Cheerful."}, set()),
        ({"negative_prompt": "Blurred."}, set()),
        ({"name": "other"}, set()),
        ({"mood": "calm"}, set()),
    ],
    ids=case_name,
)
def test_a_cell_changes_the_keys_of_its_stage_and_after(
    inputs: Path, key_store: Path, row: dict[str, Any], stages: set[str]
) -> None:
    seeded = {"seed": 5}
    found = changed(keys(inputs, key_store, seeded), keys(inputs, key_store, {**seeded, **row}))
    assert found == stages


@pytest.mark.parametrize(
    ("cells", "differs"),
    [
        ({"prompt": "Cheerful."}, True),
        ({"negative_prompt": "Blurred."}, True),
        ({"params": {"blinks": False}}, True),
        ({"fps": 25}, False),
        ({"name": "other"}, False),
        ({"mood": "calm"}, False),
    ],
    ids=str,
)
def test_a_row_without_a_seed_derives_it_from_its_content(
    inputs: Path, key_store: Path, cells: dict[str, Any], differs: bool
) -> None:
    first, second = (opened(inputs, key_store, [row]).clips[0].seed for row in ({}, cells))
    assert (first != second) == differs


def test_the_run_seed_does_not_touch_a_row_with_its_own(inputs: Path, key_store: Path) -> None:
    row = {"seed": 5}
    assert changed(keys(inputs, key_store, row), keys(inputs, key_store, row, seed=9)) == set()


def test_the_order_of_rows_does_not_matter(inputs: Path, key_store: Path) -> None:
    rows: list[dict[str, Any]] = [{}, {"audio": "again.wav"}, {"image": "closeup.jpg"}]

    def found(order: list[dict[str, Any]]) -> set[str]:
        return {clip.items["decode"].key for clip in opened(inputs, key_store, order).clips}

    assert found(rows) == found(rows[::-1])


def test_a_copy_of_a_file_is_the_same_input(inputs: Path, key_store: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jpg").write_bytes((inputs / "portrait.jpg").read_bytes())
    assert (
        changed(keys(inputs, key_store), keys(inputs, key_store, {"image": tmp_path / "other.jpg"})) == set()
    )


def test_swapped_speakers_are_another_clip(inputs: Path, key_store: Path) -> None:
    one = {"image": "two_people.jpg", "audio_2": "again.wav", "audio_type": "para", "seed": 5}
    other = {**one, "audio": "again.wav", "audio_2": "hello.wav"}
    assert changed(keys(inputs, key_store, one), keys(inputs, key_store, other)) == FROM_AUDIO


def test_takes_and_parts_have_seeds_of_their_own(inputs: Path, key_store: Path) -> None:
    clips = opened(inputs, key_store, [{"seed": 5}], takes=3).clips
    assert clips[0].seed == 5
    assert len({clip.seed for clip in clips}) == 3
    assert len({clip.items["reference"].key for clip in clips}) == 1
