"""A dataset's clips are not lost to those of another table, pair or list of rows without a word."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from avatar_core.errors import ConfigError
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.shard_call import in_this_thread
from avatar_core.execution.worker import InProcess
from avatar_core.pipeline import batch_run, begin_run, finish_run, render
from avatar_core.planning.batch import Batch, open_batch
from avatar_core.planning.runs import RunRecord, list_runs
from avatar_core.result import Result
from avatar_core.store.storage import Storage
from avatar_core.store.tables import put_table
from tests.sample_rows import RunAvatar, Watcher, videos, write_picture, write_recording, write_table

ROWS = [{"image": "face.jpg", "audio": "speech.wav"}]
TWO = [*ROWS, {"image": "face.jpg", "audio": "again.wav"}]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with pictures and recordings of equal names, not of equal content."""
    for name, sample in (("A", "portrait"), ("B", "closeup")):
        (tmp_path / name).mkdir()
        write_picture(tmp_path / name / "face.jpg", sample)
        write_recording(tmp_path / name / "speech.wav", duration_s=0.4)
        write_recording(tmp_path / name / "again.wav", start_s=1.5, duration_s=0.4)
        write_table(tmp_path / name / "t.csv", ROWS)
    return tmp_path / "A", tmp_path / "B"


def config(folder: Path, **options: Any) -> dict[str, Any]:
    return {"storage": {"root": str(folder.parent / "store")}, **options}


def of_table(table: Path, watcher: Watcher | None = None, /, **options: Any) -> Result:
    return render(config(table.parent, table=str(table), **options), watcher)


def of_rows(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Result:
    rows = [{name: folder / value for name, value in row.items()} for row in rows]
    return render(config(folder, rows=rows, **options))


def state(result: Result) -> tuple[bytes, dict[str, bytes]]:
    return (Path(result.dataset) / "metadata.parquet").read_bytes(), videos(result.dataset)


def refused(old: str, new: str, name: str, dataset: str) -> str:
    return (
        f"dataset `{name}` holds the clips of {old}, which would go if those of {new} took their place; "
        f"give `name=...` to keep both, or delete {dataset} first"
    )


def test_a_table_of_the_same_name_is_refused_before_any_work(folders: tuple[Path, Path]) -> None:
    first = of_table(folders[0] / "t.csv")
    before = state(first)
    watcher = Watcher()
    with pytest.raises(ConfigError) as caught:
        of_table(folders[1] / "t.csv", watcher)
    old, new = (str(folder / "t.csv") for folder in folders)
    assert str(caught.value) == refused(old, new, "t", first.dataset)
    assert {stage for stage, _ in watcher.ended} == {"ingest"}
    assert state(first) == before
    assert len(list_runs(Storage(str(folders[0].parent / "store")))) == 1
    second = of_table(folders[1] / "t.csv", name="other")
    assert (state(first), len(videos(second.dataset))) == (before, 1)


@pytest.mark.parametrize("options", [{"limit": 1}, {"only": ["face-speech"]}, {"takes": 2}])
def test_a_part_of_another_table_is_refused(folders: tuple[Path, Path], options: dict[str, Any]) -> None:
    before = state(of_table(folders[0] / "t.csv", name="shared"))
    write_table(folders[1] / "u.csv", TWO)
    with pytest.raises(ConfigError, match=r"holds the clips of .*A/t\.csv, which would go if .*B/u\.csv"):
        of_table(folders[1] / "u.csv", name="shared", **options)
    assert state(of_table(folders[0] / "t.csv", name="shared")) == before


def test_a_pair_of_the_same_names_is_refused(folders: tuple[Path, Path], avatar: RunAvatar) -> None:
    first = of_rows(folders[0], ROWS)
    before = state(first)
    old, new = (f"{folder}/face.jpg with {folder}/speech.wav" for folder in folders)
    message = refused(old, new, "face-speech", first.dataset)
    pair = [folders[1] / "face.jpg", folders[1] / "speech.wav"]
    root = f"storage.root={folders[0].parent / 'store'}"
    for name in ([], ["name=face-speech"]):
        code, output = avatar("render", *pair, root, *name)
        assert code == 2
        assert f"error: {message}\n" in output
    code, output = avatar("plan", *pair, root)
    assert code == 0
    assert f"error: {message}\n" in output
    assert state(first) == before
    assert len(videos(of_rows(folders[0], ROWS, video={"crf": 30}).dataset)) == 1
    assert len(videos(of_rows(folders[1], ROWS, name="second").dataset)) == 1
    shutil.rmtree(first.dataset)
    code, output = avatar("render", *pair, root)
    assert code == 0
    assert "1 of 1 clips in" in output


def test_an_edited_table_replaces_its_clips(folders: tuple[Path, Path]) -> None:
    of_table(folders[0] / "t.csv")
    write_table(folders[0] / "t.csv", [{"image": "face.jpg", "audio": "again.wav"}])
    watcher = Watcher()
    result = of_table(folders[0] / "t.csv", watcher, video={"crf": 30})
    assert list(videos(result.dataset)) == ["face-again.mp4"]
    assert watcher.warnings == []


@pytest.mark.parametrize("way", ["dots", "link", "linked_folder", "relative", "scheme"])
def test_a_table_reached_another_way_is_the_same(
    folders: tuple[Path, Path], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = folders[0] / "t.csv"
    of_table(table)
    (folders[1] / "t.csv").unlink()
    (folders[1] / "t.csv").symlink_to(table)
    (folders[0].parent / "linked").symlink_to(folders[0])
    monkeypatch.chdir(folders[1])
    other = {
        "dots": f"{folders[1]}/../A/t.csv",
        "link": str(folders[1] / "t.csv"),
        "linked_folder": str(folders[0].parent / "linked/t.csv"),
        "relative": "../A/t.csv",
        "scheme": f"file://{table}",
    }[way]
    write_table(table, [{"image": "face.jpg", "audio": "again.wav"}])
    watcher = Watcher()
    result = render(config(folders[0], table=other), watcher)
    assert list(videos(result.dataset)) == ["face-again.mp4"]
    assert watcher.warnings == []


def test_a_table_in_a_bucket(
    folders: tuple[Path, Path], tmp_path: Path, s3_root: str, s3_options: dict[str, Any]
) -> None:
    bucket = Storage(s3_root, s3_options)
    for place, folder in zip(("A", "B"), folders, strict=True):
        table = pd.DataFrame({"image": [folder / "face.jpg"], "audio": [folder / "speech.wav"]})
        bucket.write_bytes(f"{place}/t.csv", table.to_csv(index=False).encode())
    storage = {"root": str(tmp_path / "store"), "options": s3_options}
    render({"storage": storage, "table": f"{s3_root}/A/t.csv"})
    bucket.write_bytes("A/t.csv", b"image,audio\nabsent.jpg,absent.wav\n")
    watcher = Watcher()
    render({"storage": storage, "table": f"{s3_root}/A/t.csv".replace("s3:", "s3a:")}, watcher)
    assert watcher.warnings == []
    other = {"storage": storage, "table": f"{s3_root}/B/t.csv"}
    with pytest.raises(ConfigError, match=r"clips of s3a:.*/A/t\.csv, which would .* of s3:.*/B/t"):
        render(other)
    bucket.delete(["A/t.csv"])
    assert render(other, watcher).failures.empty
    assert len(watcher.warnings) == 1


def test_a_table_that_was_moved_takes_its_dataset_along(folders: tuple[Path, Path]) -> None:
    of_table(folders[0] / "t.csv")
    moved = folders[0].rename(folders[0].parent / "C")
    write_table(moved / "t.csv", [{"image": "face.jpg", "audio": "again.wav"}])
    watcher = Watcher()
    result = of_table(moved / "t.csv", watcher)
    assert list(videos(result.dataset)) == ["face-again.mp4"]
    assert watcher.warnings == [
        f"dataset `t` was made from {folders[0]}/t.csv and now becomes that of {moved}/t.csv; "
        "give `name=...` to keep both"
    ]
    watcher = Watcher()
    of_table(moved / "t.csv", watcher)
    assert watcher.warnings == []


def test_a_pair_that_was_moved_takes_its_dataset_along(folders: tuple[Path, Path]) -> None:
    of_rows(folders[0], ROWS, takes=2)
    moved = folders[0].rename(folders[0].parent / "C")
    watcher = Watcher()
    rows = [{name: moved / value for name, value in ROWS[0].items()}]
    result = render(config(moved, rows=rows), watcher)
    assert list(videos(result.dataset)) == ["face-speech.mp4"]
    (warning,) = watcher.warnings
    assert warning.startswith(f"dataset `face-speech` was made from {folders[0]}/face.jpg with ")


@pytest.mark.parametrize("rows", [ROWS, [TWO[1], TWO[0]]])
def test_a_copy_that_makes_all_clips_again_loses_none(
    folders: tuple[Path, Path], rows: list[dict[str, Any]]
) -> None:
    before = videos(of_table(folders[0] / "t.csv").dataset)
    copy = Path(shutil.copytree(folders[0], folders[0].parent / "copy"))
    write_table(copy / "t.csv", rows)
    result = of_table(copy / "t.csv")
    assert before.items() <= videos(result.dataset).items()
    write_table(copy / "t.csv", TWO[1:])  # its own dataset by now
    assert list(videos(of_table(copy / "t.csv").dataset)) == ["face-again.mp4"]


def test_a_copy_that_lacks_a_clip_is_refused(folders: tuple[Path, Path]) -> None:
    write_table(folders[0] / "t.csv", TWO)
    of_table(folders[0] / "t.csv")
    copy = Path(shutil.copytree(folders[0], folders[0].parent / "copy"))
    write_table(copy / "t.csv", TWO[1:])
    with pytest.raises(ConfigError, match="which would go"):
        of_table(copy / "t.csv")


def test_a_dataset_that_was_deleted_protects_nothing(folders: tuple[Path, Path]) -> None:
    shutil.rmtree(of_table(folders[0] / "t.csv").dataset)
    assert len(videos(of_table(folders[1] / "t.csv").dataset)) == 1


# --- rows that are given as such


def test_a_single_row_names_its_dataset(folders: tuple[Path, Path]) -> None:
    assert Path(of_rows(folders[0], ROWS).dataset).name == "face-speech"
    assert Path(of_rows(folders[0], TWO[1:]).dataset).name == "face-again"
    named = {"image": folders[0] / "face.jpg", "audio": folders[0] / "speech.wav", "name": "Anna 1"}
    assert Path(render(config(folders[0], rows=[named])).dataset).name == "Anna-1"
    assert Path(of_rows(folders[0], TWO).dataset).name == "clips"


def test_a_list_that_keeps_a_row_is_an_edit(folders: tuple[Path, Path]) -> None:
    of_rows(folders[0], TWO)
    edited = render(
        config(
            folders[0],
            rows=[
                {"image": folders[0] / "face.jpg", "audio": folders[0] / "again.wav", "prompt": "Softly."},
                {"image": folders[1] / "face.jpg", "audio": folders[1] / "speech.wav"},
            ],
        )
    )
    assert list(videos(edited.dataset)) == ["face-again.mp4", "face-speech.mp4"]
    longer = of_rows(folders[1], [*TWO, TWO[0]])
    assert len(videos(longer.dataset)) == 3


def test_a_list_without_a_common_row_is_refused(folders: tuple[Path, Path]) -> None:
    first = of_rows(folders[0], TWO)
    before = state(first)
    with pytest.raises(ConfigError) as caught:
        of_rows(folders[1], [*TWO, TWO[0]])
    assert str(caught.value) == refused("a list of 2 rows", "a list of 3 rows", "clips", first.dataset)
    assert state(first) == before
    assert len(of_rows(folders[0], TWO, limit=1, only=["face-again"]).clips) == 1
    assert len(state(first)[1]) == 2


def test_a_list_does_not_take_the_place_of_a_table(folders: tuple[Path, Path]) -> None:
    of_table(folders[0] / "t.csv", name="x")
    with pytest.raises(ConfigError, match=r"clips of .*A/t\.csv, which .* those of a list of 2 rows took"):
        of_rows(folders[1], TWO, name="x")
    of_rows(folders[0], TWO, name="y")
    with pytest.raises(ConfigError, match=r"clips of a list of 2 rows, which .* those of .*B/t\.csv took"):
        of_table(folders[1] / "t.csv", name="y")


# --- several runs


def drive(batch: Batch, record: RunRecord) -> None:
    run = batch_run(batch, record, Watcher(), lambda: False, in_this_thread)
    Coordinator({"here": InProcess(gpu=False)}).drive(run)


def test_of_two_runs_at_once_the_second_to_end_is_refused(folders: tuple[Path, Path]) -> None:
    first, second = (open_batch(config(folder, table=str(folder / "t.csv"))) for folder in folders)
    records = [begin_run(batch) for batch in (first, second)]
    watcher = Watcher()
    drive(second, records[1])
    published = finish_run(first, records[0], partial(drive, first, records[0]), watcher)
    with pytest.raises(ConfigError, match=r"give `name=\.\.\.` to keep both"):
        finish_run(second, records[1], lambda: None, watcher)
    table = pd.read_parquet(Path(published.dataset) / "metadata.parquet")
    assert table["run_id"].tolist() == [records[0].id]
    of_table(folders[1] / "t.csv", watcher := Watcher(), name="second")
    assert {stage for stage, _ in watcher.ended} == set()


def test_credentials_of_a_table_are_not_told(folders: tuple[Path, Path]) -> None:
    result = of_table(folders[0] / "t.csv", name="x")
    table = pq.read_table(Path(result.dataset) / "metadata.parquet")
    origin = {b"avatar_table": b"https://user:secret@127.0.0.1:9/t.csv?token=secret"}
    put_table(Storage(result.dataset), "metadata.parquet", table.schema.with_metadata(origin), [table])
    with pytest.raises(ConfigError) as caught:
        of_table(folders[1] / "t.csv", name="x")
    assert "holds the clips of https://127.0.0.1:9/t.csv, which" in str(caught.value)
