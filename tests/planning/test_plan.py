from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.plan import first_failure
from tests.sample_rows import PREVIEW_STAGES, Rendered, open_known


@pytest.fixture
def fresh(rendered: Rendered, tmp_path: Path) -> Batch:
    """Two pictures with two recordings each, ingested and nothing more."""
    return open_known({"table": str(rendered.table), "storage": {"root": str(tmp_path)}})


def mark(batch: Batch, clip: int, stage: str, status: str = "ok", **columns: Any) -> None:
    key = batch.clips[clip].items[stage].key
    batch.results[stage].add({"key": key, "status": status, **columns})


def fail(batch: Batch, clip: int, stage: str, retryable: bool = False) -> None:
    mark(batch, clip, stage, "failed", retryable=retryable, error_type="InputError", error=f"{stage} is bad")


def to_do(batch: Batch, retry_failed: bool = False) -> dict[str, int]:
    batch = replace(batch, config=replace(batch.config, retry_failed=retry_failed))
    return {stage: len(plan.to_do) for stage, plan in batch.plan().items() if stage in PREVIEW_STAGES}


def test_an_empty_store_needs_every_item_once(fresh: Batch) -> None:
    plan = fresh.plan()
    assert list(plan) == ["ingest", *PREVIEW_STAGES]
    assert to_do(fresh) == {"face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}
    assert {stage: p.items for stage, p in plan.items()} == {"ingest": 4, **to_do(fresh)}
    assert {stage: p.cached for stage, p in plan.items() if p.cached} == {"ingest": 4}


def test_a_finished_clip_needs_nothing_upstream(fresh: Batch) -> None:
    for clip in range(4):
        mark(fresh, clip, "decode")
    assert set(to_do(fresh).values()) == {0}


def test_only_what_a_missing_clip_consumes_is_wanted(fresh: Batch) -> None:
    for clip in (1, 2, 3):
        mark(fresh, clip, "decode")
    assert to_do(fresh) == {"face": 1, "audio": 1, "reference": 1, "denoise": 1, "decode": 1}
    mark(fresh, 0, "denoise")
    assert to_do(fresh) == {"face": 1, "audio": 0, "reference": 1, "denoise": 0, "decode": 1}
    mark(fresh, 0, "reference")
    assert to_do(fresh) == {"face": 0, "audio": 0, "reference": 0, "denoise": 0, "decode": 1}


def test_a_lasting_failure_stops_its_clips_alone(fresh: Batch) -> None:
    fail(fresh, 0, "face")  # shared by clips 0 and 1
    assert to_do(fresh) == {"face": 1, "audio": 2, "reference": 1, "denoise": 2, "decode": 2}
    assert to_do(fresh, retry_failed=True)["decode"] == 4


def test_a_failure_that_may_pass_is_tried_again(fresh: Batch) -> None:
    fail(fresh, 0, "decode", retryable=True)
    assert to_do(fresh)["decode"] == 4


def test_the_first_failure_in_running_order_is_the_reason(fresh: Batch) -> None:
    assert first_failure(fresh.clips[0], fresh.results) is None
    fail(fresh, 0, "decode")
    fail(fresh, 0, "audio", retryable=True)
    failure = first_failure(fresh.clips[0], fresh.results)
    assert failure is not None
    assert (failure.stage, failure.error) == ("audio", "audio is bad")
    lasting = first_failure(fresh.clips[0], fresh.results, lasting=True)
    assert lasting is not None
    assert lasting.stage == "decode"


def test_a_finished_video_outweighs_failures_of_its_parts(fresh: Batch) -> None:
    fail(fresh, 0, "face")
    mark(fresh, 0, "decode")
    assert first_failure(fresh.clips[0], fresh.results) is None


def outlook(batch: Batch, retry_failed: bool = False) -> tuple[int, int, int, dict[tuple[str, str], int]]:
    batch = replace(batch, config=replace(batch.config, retry_failed=retry_failed))
    found = batch.outlook()
    return found.done, found.to_do, found.failed, dict(found.reasons)


def test_the_outlook_tells_why_clips_are_not_tried(fresh: Batch) -> None:
    assert outlook(fresh) == (0, 4, 0, {})
    fail(fresh, 0, "face")  # shared by clips 0 and 1
    fail(fresh, 0, "decode")
    fail(fresh, 2, "decode")
    fail(fresh, 3, "decode", retryable=True)
    bad_face, bad_video = ("face", "face is bad"), ("decode", "decode is bad")
    assert outlook(fresh) == (0, 1, 3, {bad_face: 2, bad_video: 1})
    assert {stage: plan.failed for stage, plan in fresh.plan().items() if plan.failed} == {
        "face": 1,
        "decode": 2,
    }
    mark(fresh, 0, "decode")
    assert outlook(fresh) == (1, 1, 2, {bad_face: 1, bad_video: 1})
    assert outlook(fresh, retry_failed=True) == (1, 3, 0, {})
    retried = replace(fresh, config=replace(fresh.config, retry_failed=True))
    assert {plan.failed for plan in retried.plan().values()} == {0}


def test_a_file_that_is_not_there_fails_like_any_other(inputs: Path, tmp_path: Path) -> None:
    picture = str(inputs / "portrait.jpg")
    rows = [{"image": picture, "audio": str(inputs / name)} for name in ("hello.wav", "none.wav")]
    batch = open_known({"rows": rows, "storage": {"root": str(tmp_path)}})
    ingest = batch.plan()["ingest"]
    assert (ingest.items, ingest.cached, len(ingest.to_do), ingest.failed) == (3, 2, 0, 1)
    assert "none.wav: no such file" in batch.clips.rejected[1]
    assert len(open_batch(batch.config).plan()["ingest"].to_do) == 1  # it may be there by then
