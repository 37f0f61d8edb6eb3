"""A table becomes a dataset, work is done once, and what breaks is mended."""

import csv
import shutil
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from avatar_core.config import Config, parse
from avatar_core.errors import ConfigError, InputError, StoreError
from avatar_core.pipeline import render, rerun
from tests.sample_rows import (
    PREVIEW_STAGES,
    Rendered,
    Watcher,
    attempts,
    expect_same,
    only_video,
    read_video,
    render_table,
    speech,
    videos,
    write_picture,
    write_recording,
    write_table,
    write_wav,
)

pytestmark = pytest.mark.timeout(120)

FPS = 25


def read_rows(table: Path) -> list[dict[str, Any]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def duration_s(recording: Path) -> float:
    with av.open(str(recording)) as container:
        return float((container.duration or 0) / av.time_base)


# --- what comes out


def test_every_row_becomes_a_video_as_long_as_its_recording(rendered: Rendered) -> None:
    metadata = rendered.result.metadata
    assert metadata["status"].tolist() == ["ok"] * 4
    assert rendered.result.failures.empty
    assert metadata["file_name"].tolist() == [f"videos/{name}.mp4" for name in metadata["name"]]
    for clip in metadata.to_dict("records"):
        frames = read_video(Path(rendered.result.dataset) / clip["file_name"])
        recording_s = duration_s(rendered.table.parent / clip["audio"])
        assert abs(len(frames) / FPS - recording_s) <= 1 / FPS
        assert frames.shape == (clip["num_frames"], clip["height"], clip["width"], 3)


def test_a_video_plays_anywhere_and_says_what_it_is(rendered: Rendered) -> None:
    for clip in rendered.result.metadata.to_dict("records"):
        path = Path(rendered.result.dataset) / clip["file_name"]
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")
        with av.open(str(path)) as container:
            picture, sound = container.streams.video[0], container.streams.audio[0]
            assert (picture.codec_context.name, picture.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert sound.codec_context.name == "aac"
            tags = container.metadata
        assert tags["backend"] == "preview"
        assert tags["clip_key"] == clip["decode_key"]
        assert len(tags["config_digest"]) == 64
        assert tags["ai_generated"] == "true"
        assert "AI-generated" in tags["comment"]


def test_the_sound_of_a_video_is_its_recording(rendered: Rendered) -> None:
    with av.open(str(Path(rendered.result.dataset) / "videos" / "portrait-hello.mp4")) as container:
        rate = container.streams.audio[0].codec_context.sample_rate
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    said, said_rate = speech()
    assert rate == said_rate
    spoken = said.astype(np.float32) / 32768
    lags = np.correlate(heard[: len(spoken)], spoken, "full")
    lag = int(np.argmax(lags)) - (len(spoken) - 1)
    assert abs(lag) <= rate // FPS
    norm = float(np.linalg.norm(heard) * np.linalg.norm(spoken))
    assert lags.max() / norm > 0.9


def test_pictures_times_recordings_cost_each_picture_and_recording_once(rendered: Rendered) -> None:
    counts = {stage: len(attempts(rendered.store, stage)) for stage in ("ingest", *PREVIEW_STAGES)}
    assert counts == {"ingest": 4, "face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}


def test_the_same_run_in_a_fresh_store_gives_the_same_bytes(rendered: Rendered, tmp_path: Path) -> None:
    again = render_table(rendered.table, tmp_path / "elsewhere")
    assert videos(again.dataset) == videos(rendered.result.dataset)


# --- nothing is done twice


def stage_files(store: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (store / "stages").rglob("*") if path.is_file()}


def test_a_second_run_does_nothing(rendered: Rendered, store: Path) -> None:
    before = stage_files(store)
    watcher = Watcher()
    result = render_table(rendered.table, store, watcher)
    assert watcher.ended == []
    assert set(watcher.to_do.values()) == {0}
    assert watcher.cached == {"ingest": 4, "face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}
    assert stage_files(store) == before
    assert videos(result.dataset) == videos(rendered.result.dataset)


def test_places_may_be_path_objects(rendered: Rendered, store: Path, tmp_path: Path) -> None:
    result = render({"table": rendered.table, "storage": {"root": store}})
    assert result.dataset == str(store / "datasets/batch")
    assert videos(result.dataset) == videos(rendered.result.dataset)
    row = {"image": rendered.table.parent / "portrait.jpg", "audio": rendered.table.parent / "hello.wav"}
    values = {"rows": [row], "storage": {"root": store}, "runtime": {"cache_dir": tmp_path / "cache"}}
    assert render(values).metadata["status"].tolist() == ["ok"]


def test_one_more_row_costs_only_its_new_items(rendered: Rendered, store: Path, tmp_path: Path) -> None:
    rows = read_rows(rendered.table)
    for row in rows:
        row |= {column: str(rendered.table.parent / row[column]) for column in ("image", "audio")}
    new = write_recording(tmp_path / "new.wav", start_s=2.0)
    table = write_table(tmp_path / "batch.csv", [*rows, {**rows[0], "audio": str(new)}])
    watcher = Watcher()
    result = render_table(table, store, watcher)
    assert watcher.counts == {"ingest": 1, "audio": 1, "denoise": 1, "decode": 1}
    assert len(result.metadata) == 5


def test_rows_of_equal_content_share_one_clip(inputs: Path, tmp_path: Path) -> None:
    for copy in ("one.jpg", "two.jpg"):
        shutil.copy(inputs / "portrait.jpg", tmp_path / copy)
    shutil.copy(inputs / "hello.wav", tmp_path)
    rows = [{"image": "one.jpg", "audio": "hello.wav"}, {"image": "two.jpg", "audio": "hello.wav"}]
    watcher = Watcher()
    result = render_table(write_table(tmp_path / "t.csv", rows), tmp_path / "store", watcher)
    assert watcher.counts == {"ingest": 3, "face": 1, "audio": 1, "reference": 1, "denoise": 1, "decode": 1}
    first, second = videos(result.dataset).values()
    assert first == second


def test_order_limit_and_only_do_not_change_what_is_rendered(rendered: Rendered, store: Path) -> None:
    rows = read_rows(rendered.table)
    table = write_table(rendered.table.parent / "reversed.csv", rows[::-1])
    for options in ({}, {"limit": 2}, {"only": ["closeup-again"]}):
        watcher = Watcher()
        render_table(table, store, watcher, name="batch", **options)
        assert watcher.counts == {}


def test_names_and_unknown_columns_cost_nothing(rendered: Rendered, store: Path) -> None:
    rows = read_rows(rendered.table)
    changed = [{**row, "name": f"clip {i}", "mood": "calm"} for i, row in enumerate(rows)]
    watcher = Watcher()
    result = render_table(write_table(rendered.table.parent / "renamed.csv", changed), store, watcher)
    assert watcher.counts == {}
    assert sorted(videos(result.dataset)) == [f"clip-{i}.mp4" for i in range(4)]


def test_another_prompt_is_another_row_unless_the_row_has_its_own_seed(inputs: Path, tmp_path: Path) -> None:
    row = {"image": "portrait.jpg", "audio": "hello.wav"}

    def counts(name: str, **cells: Any) -> dict[str, int]:
        watcher = Watcher()
        render_table(write_table(inputs / name, [{**row, **cells}]), tmp_path / "store", watcher)
        return watcher.counts

    counts("first.csv", prompt="Calm.")
    assert counts("prompt.csv", prompt="Cheerful.") == {"denoise": 1, "decode": 1}
    assert counts("seeded.csv", prompt="Calm.", seed=7) == {"denoise": 1, "decode": 1}
    assert counts("seeded_prompt.csv", prompt="Cheerful.", seed=7) == {}


# --- what a video depends on


@pytest.fixture(scope="module")
def original(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    table = write_table(inputs / "original.csv", [{"image": "portrait.jpg", "audio": "hello.wav", "seed": 1}])
    return read_video(only_video(render_table(table, tmp_path_factory.mktemp("original") / "store")))


@pytest.mark.parametrize(
    "cells",
    [{"image": "closeup.jpg"}, {"audio": "later.wav"}, {"seed": 2}, {"params": '{"mouth_gain": 0.2}'}],
)
def test_each_input_changes_the_frames(
    inputs: Path, original: np.ndarray[Any, Any], tmp_path: Path, cells: dict[str, Any]
) -> None:
    write_recording(tmp_path / "later.wav", start_s=1.7)
    row = {"image": "portrait.jpg", "audio": "hello.wav", "seed": 1, **cells}
    for column in ("image", "audio"):
        folder = tmp_path if row[column] == "later.wav" else inputs
        row[column] = str(folder / row[column])
    frames = read_video(only_video(render_table(write_table(tmp_path / "t.csv", [row]), tmp_path / "store")))
    assert frames.shape != original.shape or (frames != original).mean() > 0.01


def test_takes_show_different_movement(rendered: Rendered, store: Path) -> None:
    watcher = Watcher()
    result = render_table(rendered.table, store, watcher, takes=3, only=["portrait-hello"])
    assert watcher.counts == {"denoise": 2, "decode": 2}
    names = ["portrait-hello", "portrait-hello-take2", "portrait-hello-take3"]
    assert result.metadata["name"].tolist() == names
    assert result.metadata["seed"].nunique() == 3
    shown = [read_video(Path(result.dataset) / "videos" / f"{name}.mp4") for name in names]
    assert (shown[0] != shown[1]).any()
    assert (shown[1] != shown[2]).any()


# --- failed rows


@pytest.fixture
def mixed(inputs: Path, tmp_path: Path) -> Path:
    """A good row beside a picture of nobody, a cut picture, a cut recording and silence."""
    for name in ("portrait.jpg", "hello.wav", "landscape.png"):
        shutil.copy(inputs / name, tmp_path)
    whole = write_picture(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    whole = (tmp_path / "hello.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    write_wav(tmp_path / "silence.wav", np.zeros(9600, np.int16), 16_000)
    rows = [
        {"name": "good", "image": "portrait.jpg", "audio": "hello.wav"},
        {"name": "nobody", "image": "landscape.png", "audio": "hello.wav"},
        {"name": "cut_picture", "image": "cut.png", "audio": "hello.wav"},
        {"name": "cut_recording", "image": "portrait.jpg", "audio": "cut.wav"},
        {"name": "silence", "image": "portrait.jpg", "audio": "silence.wav"},
    ]
    return write_table(tmp_path / "mixed.csv", rows)


def test_bad_rows_fail_with_their_reason_and_the_rest_is_rendered(mixed: Path, tmp_path: Path) -> None:
    result = render_table(mixed, tmp_path / "store")
    failed = result.failures.set_index("name")
    assert result.metadata.set_index("name").loc["good", "status"] == "ok"
    assert result.failed_fraction == pytest.approx(4 / 5)
    expected = {
        "nobody": ("reference", "no face"),
        "cut_picture": ("face", "broken PNG"),
        "cut_recording": ("ingest", "truncated"),
        "silence": ("audio", "is silent"),
    }
    assert dict(failed["failed_stage"]) == {name: stage for name, (stage, _) in expected.items()}
    for name, (_, fragment) in expected.items():
        assert fragment in str(failed.loc[name, "error"])
        assert failed.loc[name, "error_type"] == "InputError"


def test_failed_rows_are_tried_again_only_on_request(mixed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    render_table(mixed, store)
    watcher = Watcher()
    render_table(mixed, store, watcher)
    assert watcher.counts == {"ingest": 1}  # a failed ingest may have been mended outside
    watcher = Watcher()
    result = render_table(mixed, store, watcher, retry_failed=True)
    assert watcher.counts == {"ingest": 1, "face": 1, "audio": 1, "reference": 1}
    assert len(result.failures) == 4


def test_rerun_tries_failed_rows_again(mixed: Path, tmp_path: Path) -> None:
    render_table(mixed, tmp_path / "store")
    config = parse(Config, {"storage": {"root": str(tmp_path / "store")}})
    watcher = Watcher()
    result = rerun(config, "mixed", only_failed=True, observer=watcher)
    assert watcher.counts == {"ingest": 1, "face": 1, "audio": 1, "reference": 1}
    assert len(result.metadata) == 5


def test_a_mended_input_is_rendered_by_the_same_command(mixed: Path, tmp_path: Path) -> None:
    render_table(mixed, tmp_path / "store")
    write_picture(tmp_path / "cut.png", "closeup")
    write_recording(tmp_path / "cut.wav", start_s=1.0)
    write_recording(tmp_path / "silence.wav", start_s=2.0)
    write_picture(tmp_path / "landscape.png")
    watcher = Watcher()
    result = render_table(mixed, tmp_path / "store", watcher)
    assert result.failures.empty
    assert watcher.counts["decode"] == 4


def test_a_picture_of_nobody_is_rendered_where_no_face_is_required(inputs: Path, tmp_path: Path) -> None:
    table = write_table(inputs / "nobody.csv", [{"image": "landscape.png", "audio": "hello.wav"}])
    assert len(render_table(table, tmp_path).failures) == 1
    result = render_table(table, tmp_path, face={"required": False})
    assert result.failures.empty
    assert len(read_video(only_video(result))) == 15


# --- rerun


@pytest.mark.parametrize(
    ("stage", "counts"),
    [
        ("decode", {"decode": 4}),
        ("denoise", {"denoise": 4, "decode": 4}),
        ("face", {"face": 2, "audio": 2, "reference": 2, "denoise": 4, "decode": 4}),
    ],
)
def test_rerun_computes_a_stage_and_all_after_it(
    rendered: Rendered, store: Path, stage: str, counts: dict[str, int]
) -> None:
    watcher = Watcher()
    config = parse(Config, {"storage": {"root": str(store)}})
    expect_same(rerun(config, "batch", stage=stage, observer=watcher), rendered)
    assert watcher.counts == counts
    for name in PREVIEW_STAGES:
        done = attempts(store, name)
        assert (done["status"] == "ok").sum() == len(attempts(rendered.store, name)) + counts.get(name, 0)


@pytest.mark.parametrize(
    ("run_name", "stage", "kind", "fragments"),
    [
        ("batch", "decoed", ConfigError, ["unknown stage `decoed`", "did you mean `decode`"]),
        ("batsh", None, StoreError, ["no run `batsh`", "did you mean `batch`"]),
    ],
)
def test_rerun_names_what_it_does_not_know(
    store: Path, run_name: str, stage: str | None, kind: type[Exception], fragments: list[str]
) -> None:
    config = parse(Config, {"storage": {"root": str(store)}})
    with pytest.raises(kind) as caught:
        rerun(config, run_name, stage=stage)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_rerun_finds_its_table_from_any_folder(
    rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rendered.table.parent)
    render_table(Path(rendered.table.name), tmp_path / "store", limit=1)
    monkeypatch.chdir(tmp_path)
    result = rerun(parse(Config, {"storage": {"root": str(tmp_path / "store")}}), "batch")
    assert result.failures.empty


# --- rows from Python


def test_rows_may_hold_what_a_data_frame_gives(rendered: Rendered, store: Path) -> None:
    """Paths, numpy numbers, dates, missing values; all of it comes back in the dataset."""
    folder = rendered.table.parent
    row = {
        "image": folder / "portrait.jpg",
        "audio": str(folder / "hello.wav"),
        "prompt": "A person talks.",
        "fps": np.float64(25),
        "seed": float("nan"),
        "recorded": pd.Timestamp("2026-01-02"),
        "count": np.int64(3),
    }
    watcher = Watcher()
    result = render({"rows": [row], "storage": {"root": str(store)}}, watcher)
    assert watcher.counts == {}
    assert result.failures.empty
    assert result.metadata["count"].tolist() == [3]
    assert "2026-01-02" in str(result.metadata["recorded"].tolist())


def test_a_batch_is_found_by_the_name_it_was_given(rendered: Rendered, store: Path) -> None:
    render_table(rendered.table, store, name="My first batch")
    assert rerun(parse(Config, {"storage": {"root": str(store)}}), "My first batch").failures.empty


# --- whole batches that cannot be read


def test_a_batch_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to render"):
        render({"storage": {"root": str(tmp_path)}})


def test_only_names_the_nearest_row(rendered: Rendered, store: Path) -> None:
    with pytest.raises(ConfigError, match="no row is called `portrait-helo`; did you mean `portrait-hello`"):
        render_table(rendered.table, store, only=["portrait-helo"])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv: no such file"):
        render_table(tmp_path / "absent.csv", tmp_path / "store")


# --- object storage


@pytest.mark.drill
def test_a_batch_on_s3_renders_and_is_not_rendered_again(
    inputs: Path, s3_root: str, s3_options: dict[str, Any], tmp_path: Path
) -> None:
    files = fsspec.filesystem("s3", **s3_options)
    for name in ("portrait.jpg", "hello.wav"):
        files.put_file(str(inputs / name), f"{s3_root}/in/{name}")
    files.pipe_file(f"{s3_root}/in/batch.csv", b"image,audio\nportrait.jpg,hello.wav\n")
    config = {
        "table": f"{s3_root}/in/batch.csv",
        "storage": {"root": f"{s3_root}/store", "options": s3_options},
        "runtime": {"cache_dir": str(tmp_path / "cache")},
    }
    first, second = Watcher(), Watcher()
    result = render(config, first)
    assert result.failures.empty, result.failures["error"].tolist()
    assert first.counts["decode"] == 1
    render(config, second)
    assert second.counts == {}
    files.invalidate_cache()
    video = files.cat_file(f"{s3_root}/store/datasets/batch/videos/portrait-hello.mp4")
    (tmp_path / "video.mp4").write_bytes(video)
    assert len(read_video(tmp_path / "video.mp4")) == 15
    written = [path for path in files.find(f"{s3_root}/store") if path.endswith((".yaml", ".csv"))]
    assert all(s3_options["secret"].encode() not in files.cat_file(path) for path in written)


def test_metadata_on_disk_is_what_render_returns(rendered: Rendered) -> None:
    table = pq.read_table(Path(rendered.result.dataset) / "metadata.parquet")
    assert table["name"].to_pylist() == rendered.result.metadata["name"].tolist()
    assert table["decode_key"].to_pylist() == rendered.result.metadata["decode_key"].tolist()
