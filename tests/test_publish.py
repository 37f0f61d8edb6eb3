"""The dataset folder: one row per clip, the videos, the failures."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from avatar_core.errors import StoreError
from avatar_core.pipeline import render
from avatar_core.publish import SCHEMA
from avatar_core.result import Result
from tests.sample_rows import Rendered, Watcher, data_files, videos, write_table

GOOD = {"image": "portrait.jpg", "audio": "hello.wav", "seed": 1}
BAD = {**GOOD, "image": "landscape.png"}


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("publish")


def publish(
    inputs: Path,
    store: Path,
    name: str,
    rows: list[dict[str, Any]],
    watcher: Watcher | None = None,
    /,
    **options: Any,
) -> Result:
    table = write_table(inputs / f"{name}.csv", rows)
    return render({"table": str(table), "storage": {"root": str(store)}, **options}, watcher)


def metadata(result: Result) -> pd.DataFrame:
    return pd.read_parquet(Path(result.dataset) / "metadata.parquet").set_index("name", drop=False)


def test_every_clip_is_a_row_with_our_columns_first(rendered: Rendered) -> None:
    table = metadata(rendered.result)
    assert table.columns[: len(SCHEMA.names)].tolist() == SCHEMA.names
    assert table["row"].tolist() == [0, 1, 2, 3]
    assert set(table["backend"]) == {"preview"}
    assert set(table["run_id"]) == {rendered.result.run_id}
    assert table["prompt"].tolist() == ["A person talks."] * 4
    for clip in table.to_dict("records"):
        path = Path(rendered.result.dataset) / clip["file_name"]
        assert path.stat().st_size == clip["bytes"]
        assert clip["fps"] == 25.0
        assert clip["duration_s"] == clip["num_frames"] / 25
        assert len(clip["sha256"]) == len(clip["decode_key"]) == 64


def test_columns_of_the_table_are_kept(inputs: Path, shared_store: Path) -> None:
    row = {**GOOD, "mood": "calm", "status": "draft", "fps": 25, "width": "wide", "name": "a"}
    clip = metadata(publish(inputs, shared_store, "kept", [row])).loc["a"]
    assert clip["mood"] == "calm"
    assert (clip["image"], clip["audio"]) == ("portrait.jpg", "hello.wav")
    assert (clip["status"], clip["input_status"]) == ("ok", "draft")
    assert (clip["width"], clip["input_width"]) == (160, "wide")
    assert (clip["seed"], clip["input_seed"]) == (1, "1")
    assert (clip["name"], clip["input_name"]) == ("a", "a")


def test_a_column_that_is_called_like_a_renamed_one_is_not_lost(inputs: Path, shared_store: Path) -> None:
    row = {**GOOD, "name": "a", "status": "draft", "input_status": "checked"}
    (clip,) = metadata(publish(inputs, shared_store, "doubly", [row])).to_dict("records")
    assert {"draft", "checked"} <= {str(value) for value in clip.values()}


def test_typed_columns_keep_their_type(inputs: Path, shared_store: Path) -> None:
    good = {**GOOD, "image": str(inputs / "portrait.jpg"), "audio": str(inputs / "hello.wav")}
    rows = [
        {**good, "age": 30, "tags": ["a", "b"], "size": 1.5},
        {**good, "age": None, "tags": [], "size": None},
    ]
    result = render({"rows": rows, "name": "typed", "storage": {"root": str(shared_store)}})
    table = pd.read_parquet(Path(result.dataset) / "metadata.parquet", dtype_backend="numpy_nullable")
    assert table["age"].tolist() == [30, pd.NA]
    assert table["size"].tolist() == [1.5, pd.NA]
    assert table["tags"].tolist() == ['["a", "b"]', "[]"]


def test_a_table_written_in_pieces_is_the_same(
    inputs: Path, shared_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {**GOOD, "image": str(inputs / "portrait.jpg"), "audio": str(inputs / "hello.wav")}
    values: list[dict[str, Any]] = [
        {"age": 30, "mixed": 1, "empty": None},
        {"age": 2.5, "mixed": "a"},
        {"late": True},
    ]
    config = {"rows": [{**good, **row} for row in values], "storage": {"root": str(shared_store)}}
    whole = metadata(render({**config, "name": "whole"}))
    monkeypatch.setattr("avatar_core.store.tables.PIECE_ROWS", 1)
    pieces = metadata(render({**config, "name": "pieces"}))
    pd.testing.assert_frame_equal(pieces.drop(columns="run_id"), whole.drop(columns="run_id"))
    assert pieces["age"].tolist()[:2] == [30.0, 2.5]
    assert pieces["mixed"].tolist()[:2] == ["1", "a"]
    again = metadata(render({**config, "name": "pieces"}))
    assert again["run_id"].tolist() == pieces["run_id"].tolist()


def test_failed_rows_are_listed_without_a_video(inputs: Path, shared_store: Path) -> None:
    rows = [{**GOOD, "name": "good", "mood": "calm"}, {**BAD, "name": "bad", "mood": "sad"}]
    result = publish(inputs, shared_store, "failing", rows)
    table = metadata(result)
    assert table["status"].tolist() == ["ok", "failed"]
    assert table.isna().loc["bad", "file_name"]
    assert table.isna().loc["bad", "sha256"]
    assert table.isna().loc["good", "error"]
    assert table.loc["bad", "failed_stage"] == "reference"
    assert "no face" in str(table.loc["bad", "error"])
    assert list(videos(result.dataset)) == ["good.mp4"]
    listed = pd.read_csv(Path(result.dataset) / "failures.csv")
    assert listed["name"].tolist() == ["bad"]
    assert listed["mood"].tolist() == ["sad"]
    assert listed["error"].tolist() == [table.loc["bad", "error"]]


def test_failures_disappear_once_they_are_mended(inputs: Path, shared_store: Path) -> None:
    publish(inputs, shared_store, "mended", [{**BAD, "name": "a"}])
    result = publish(inputs, shared_store, "mended", [{**GOOD, "name": "a"}])
    assert pd.read_csv(Path(result.dataset) / "failures.csv").empty
    assert metadata(result).loc["a", "status"] == "ok"


def test_a_video_of_a_row_that_fails_now_is_withdrawn(inputs: Path, shared_store: Path) -> None:
    publish(inputs, shared_store, "withdrawn", [{**GOOD, "name": "a"}])
    result = publish(inputs, shared_store, "withdrawn", [{**BAD, "name": "a"}])
    assert videos(result.dataset) == {}


@pytest.mark.parametrize("options", [{"only": ["b"]}, {"limit": 1}])
def test_rows_outside_only_and_limit_stay(inputs: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [{**GOOD, "name": "a"}, {**GOOD, "name": "b", "image": "closeup.jpg"}, {**BAD, "name": "c"}]
    whole = publish(inputs, tmp_path, "part", rows)
    before = metadata(whole)
    result = publish(inputs, tmp_path, "part", rows, **options)
    assert len(result.metadata) == 1
    after = metadata(result)
    assert after["name"].tolist() == ["a", "b", "c"]
    assert after["sha256"].fillna("").tolist() == before["sha256"].fillna("").tolist()
    assert sorted(videos(result.dataset)) == ["a.mp4", "b.mp4"]
    assert pd.read_csv(Path(result.dataset) / "failures.csv")["name"].tolist() == ["c"]


def test_a_row_that_left_the_table_leaves_the_dataset(inputs: Path, shared_store: Path) -> None:
    rows = [{**GOOD, "name": "stays"}, {**GOOD, "name": "leaves", "image": "closeup.jpg"}]
    publish(inputs, shared_store, "leaving", rows)
    result = publish(inputs, shared_store, "leaving", rows[:1])
    assert metadata(result)["name"].tolist() == ["stays"]
    assert list(videos(result.dataset)) == ["stays.mp4"]


def test_a_file_that_is_not_ours_stays(inputs: Path, shared_store: Path) -> None:
    result = publish(inputs, shared_store, "foreign", [{**GOOD, "name": "a"}])
    note = Path(result.dataset) / "videos" / "note.txt"
    note.write_text("mine")
    publish(inputs, shared_store, "foreign", [{**GOOD, "name": "b"}])
    assert sorted(videos(result.dataset)) == ["b.mp4", "note.txt"]


def test_a_published_video_is_a_copy_of_its_own(rendered: Rendered, store: Path) -> None:
    stored = {path: path.read_bytes() for path in data_files(store, "decode")}
    for path in (store / "datasets/batch/videos").iterdir():
        with path.open("r+b") as file:
            file.write(b"edited")
    assert {path: path.read_bytes() for path in stored} == stored


def test_an_unchanged_dataset_is_not_written_again(rendered: Rendered, store: Path) -> None:
    config = {"table": str(rendered.table), "storage": {"root": str(store)}}
    render(config)
    folder = store / "datasets/batch/videos"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    watcher = Watcher()
    render(config, watcher)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(watcher.published) == 4


def test_a_dataset_of_another_table_is_warned_about(inputs: Path, shared_store: Path) -> None:
    publish(inputs, shared_store, "first", [GOOD], name="shared")
    watcher = Watcher()
    publish(inputs, shared_store, "second", [GOOD], watcher, name="shared")
    (warning,) = watcher.warnings
    assert "first.csv" in warning
    assert "second.csv" in warning
    assert "name=" in warning


def test_unreadable_metadata_says_what_to_do(rendered: Rendered, store: Path) -> None:
    (store / "datasets/batch/metadata.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(StoreError, match=r"metadata\.parquet .* cannot be read .* delete it and run again"):
        render({"table": str(rendered.table), "storage": {"root": str(store)}})
