"""Rows whose speech is a text, from the table to the video."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avatar_core.backends.base import BACKENDS
from avatar_core.backends.preview.backend import PreviewBackend
from avatar_core.execution.batch_run import BatchRun
from avatar_core.execution.coordinator import Coordinator
from avatar_core.execution.settings import run_settings
from avatar_core.execution.shard_call import ShardCall, in_a_thread
from avatar_core.execution.worker_process import WorkerProcesses
from avatar_core.media.audio import load_mono
from avatar_core.pipeline import render
from avatar_core.planning.batch import open_batch
from avatar_core.result import Result
from tests.sample_rows import PREVIEW_STAGES, RunAvatar, Watcher, flip_byte, read_video, write_picture
from tests.speaking_program import provide

pytestmark = pytest.mark.timeout(120)


class Alone(PreviewBackend):
    """Renders one speaker."""

    max_speakers = 1


TINY = "kokoro-tiny"
HELLO = "Hola, buenos días."
DIALOGUE = "(s1) Hola, amigo. (s2) Buenas tardes. (s1) Adiós."


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield provide(tmp_path_factory.mktemp("speech"), monkeypatch)
    for module in [name for name in sys.modules if name.partition(".")[0] == "kokoro"]:
        del sys.modules[module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_picture(folder / "portrait.jpg")
    write_picture(folder / "closeup.jpg", "closeup")
    write_picture(folder / "two.jpg", "two_people", side=400)
    return folder


def spoken(
    folder: Path, store: Path, rows: list[dict[str, Any]], watcher: Watcher | None = None, **options: Any
) -> Result:
    table = folder / "texts.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    config = {"table": str(table), "storage": {"root": str(store)}, "tts": {"checkpoint": TINY}}
    return render(config | options, watcher)


def one(image: str = "portrait.jpg", **cells: Any) -> dict[str, Any]:
    return {"image": image, "tts_text": HELLO, "voice": "ef_dora", **cells}


def two(**cells: Any) -> dict[str, Any]:
    return {"image": "two.jpg", "tts_text": DIALOGUE, "voice": "ef_dora", "voice_2": "em_alex", **cells}


def speech_rows(watcher: Watcher) -> list[dict[str, Any]]:
    return [row for stage, row in watcher.ended if stage == "speech"]


def recordings(store: Path, watcher: Watcher) -> list[np.ndarray]:
    return [load_mono(store / row["data"], 24_000) for row in speech_rows(watcher)]


def test_a_text_is_said_once_for_all_rows(weights: Path, folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    rows = [one(), one("closeup.jpg"), one(voice="em_alex")]
    result = spoken(folder, tmp_path, rows, watcher)
    assert result.failures.empty, result.failures["error"].tolist()
    assert watcher.counts == {
        "ingest": 2,
        "speech": 2,
        "face": 2,
        "audio": 2,
        "reference": 2,
        "denoise": 3,
        "decode": 3,
    }
    assert result.metadata["name"].tolist()[:2] == ["portrait-Hola-buenos-días", "closeup-Hola-buenos-días"]
    said = speech_rows(watcher)[0]
    assert (said["kind"], said["sample_rate"], said["channels"]) == ("speech", 24_000, 1)
    frames = read_video(Path(result.dataset) / result.metadata["file_name"].iloc[0])
    assert len(frames) == int(np.ceil(said["duration_s"] * 25 - 1e-3))
    again = Watcher()
    assert spoken(folder, tmp_path, rows, again).failures.empty
    assert again.counts == {}


@pytest.mark.drill
def test_two_voices_take_turns(weights: Path, folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    result = spoken(folder, tmp_path, [two()], watcher)
    assert result.failures.empty, result.failures["error"].tolist()
    assert watcher.counts == {"ingest": 1, "speech": 2, **dict.fromkeys(PREVIEW_STAGES, 1)}
    first, second = recordings(tmp_path, watcher)
    assert len(first) == len(second)
    assert not (np.abs(first) * np.abs(second)).any()
    begins = [np.flatnonzero(track)[0] for track in (first, second)]
    ends = [np.flatnonzero(track)[-1] for track in (first, second)]
    assert begins[0] < begins[1] < ends[1] < ends[0]
    video = Path(result.dataset) / result.metadata["file_name"].iloc[0]
    heard = load_mono(video, 24_000)
    both = (first + second)[: len(heard)]
    assert np.sqrt((heard**2).mean()) == pytest.approx(np.sqrt((both**2).mean()), rel=0.2)


@pytest.mark.drill
def test_the_documents_form_is_the_tables(weights: Path, folder: Path, tmp_path: Path) -> None:
    document = {
        "cond_image": "two.jpg",
        "cond_audio": {},
        "tts_audio": {
            "text": DIALOGUE,
            "human1_voice": "weights/Kokoro-82M/voices/ef_dora.pt",
            "human2_voice": "weights/Kokoro-82M/voices/em_alex.pt",
        },
    }
    result = spoken(folder, tmp_path, [document])
    watcher = Watcher()
    same = spoken(folder, tmp_path, [two()], watcher)
    assert watcher.counts == {}
    assert same.metadata["sha256"].tolist() == result.metadata["sha256"].tolist()


@pytest.mark.drill
def test_the_same_text_sounds_the_same_in_another_store(weights: Path, folder: Path, tmp_path: Path) -> None:
    watchers = [Watcher(), Watcher()]
    for number, watcher in enumerate(watchers):
        spoken(folder, tmp_path / str(number), [one(), two()], watcher)
    first, second = ([row["sha256"] for row in speech_rows(watcher)] for watcher in watchers)
    assert first == second


@pytest.mark.drill
def test_another_voice_file_is_another_recording(
    weights: Path, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = weights / "voices" / "em_alex.pt"
    before = path.read_bytes()
    request.addfinalizer(lambda: path.write_bytes(before))
    rows = [one(), one(voice="em_alex")]
    spoken(folder, tmp_path, rows)
    torch.save(torch.load(path, weights_only=True) + 1, path)
    watcher = Watcher()
    assert spoken(folder, tmp_path, rows, watcher).failures.empty
    assert watcher.counts["speech"] == 1
    assert watcher.counts["decode"] == 1


@pytest.mark.drill
def test_a_damaged_recording_is_said_again(weights: Path, folder: Path, tmp_path: Path) -> None:
    first = spoken(folder, tmp_path, [one()])
    (recording,) = (tmp_path / "assets").rglob("*.wav")
    flip_byte(recording)
    for path in (tmp_path / "stages/audio").rglob("*.safetensors"):
        path.unlink()
    for path in (tmp_path / "stages/decode").rglob("*.mp4"):
        path.unlink()
    watcher = Watcher()
    second = spoken(folder, tmp_path, [one()], watcher)
    assert watcher.counts["speech"] == 1
    assert second.metadata["sha256"].tolist() == first.metadata["sha256"].tolist()


def test_a_bad_text_fails_its_row(weights: Path, folder: Path, tmp_path: Path) -> None:
    rows = [
        one(name="good"),
        one(name="voice", voice="ef_dorra"),
        one(name="empty", tts_text="."),
        one(name="short", tts_text=HELLO[:2]),
    ]
    result = spoken(folder, tmp_path, rows, audio={"min_duration_s": 0.3})
    errors = result.metadata.set_index("name")["error"]
    assert result.metadata.set_index("name")["status"].to_dict() == {
        **dict.fromkeys(("voice", "empty", "short"), "failed"),
        "good": "ok",
    }
    assert errors["voice"].startswith(
        "column 'voice': no voice is called `ef_dorra`; weights kokoro-tiny/voices hold: "
    )
    assert errors["voice"].endswith("; did you mean `ef_dora`?")
    assert errors["short"].startswith("tts_text: lasts 0.")
    assert errors["short"].endswith("allowed are 0.3 s or more")


@pytest.mark.drill
def test_two_voices_need_a_backend_for_two(weights: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(BACKENDS, "alone", f"{__name__}:Alone")
        result = spoken(folder, tmp_path, [two()], backend={"name": "alone"})
    assert result.failures["error"].tolist() == [
        "column `voice_2`: backend preview renders 1 speaker; leave it empty or choose a backend for several"
    ]


def test_without_the_weights_the_command_says_what_helps(
    avatar: RunAvatar, weights: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "texts.csv").write_text(f'image,tts_text,voice\nportrait.jpg,"{HELLO}",ef_dora\n')
    code, output = avatar("render", folder / "texts.csv", f"storage.root={tmp_path}")
    assert code == 2
    assert output == (
        f"error: tts_text needs the weights 'kokoro', which are not in {weights.parent / 'kokoro'}; "
        "run: avatar weights fetch kokoro\n"
    )
    assert not (tmp_path / "stages").exists()


def test_an_english_voice_needs_its_tagger(
    avatar: RunAvatar, weights: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "texts.csv").write_text("image,tts_text,voice\nportrait.jpg,Hello.,af_heart\n")
    code, output = avatar("render", folder / "texts.csv", f"storage.root={tmp_path}")
    assert code == 2
    assert output == (
        "error: the English voice af_heart needs spaCy's model en_core_web_sm, which is not installed; "
        "run: python -m spacy download en_core_web_sm\n"
    )


def test_texts_are_said_by_all_workers(weights: Path, folder: Path, tmp_path: Path) -> None:
    """And one that cannot be said is a failure of that stage, like any other."""
    rows = [one(tts_text=f"Frase {number}.") for number in range(5)] + [one(tts_text="?")]
    batch = open_batch(
        {"rows": [{**row, "image": str(folder / row["image"])} for row in rows], "tts": {"checkpoint": TINY}}
        | {"storage": {"root": str(tmp_path)}}
    )
    watcher, said = Watcher(), []

    def submit(call: ShardCall) -> None:
        said.append((call.stage, call.worker_name))
        in_a_thread(call)

    with WorkerProcesses(cpus=2) as workers:
        run = BatchRun(batch, run_settings(batch.config), watcher, submit=submit, sources_only=True)
        Coordinator(workers).drive(run)
    assert {worker for stage, worker in said if stage == "speech"} == {"cpu-0", "cpu-1"}
    assert Counter(row["status"] for row in speech_rows(watcher)) == {"ok": 5, "failed": 1}
    assert (run.tallies["speech"].done, run.tallies["speech"].failed) == (5, 1)
    assert list(batch.clips.rejected) == [5]
