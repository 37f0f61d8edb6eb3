"""Renders a small table with every backend and prints as JSON what each item gave, so that runs can be
compared: `python -m tests.rendered_items FOLDER BACKEND ...`, where the folder holds what the rows name."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from avatar_core.store.tensors import open_item
from tests.sample_rows import attempts, read_video, render_table, write_table
from tests.speaking_program import is_installed

MEASURED = ("seconds", "data")
"""What tells of the run, not of the result. Which items share a file follows from how long they took."""

FACE = {"image": "portrait.jpg", "audio": "hello.wav", "prompt": "A girl speaks.", "seed": 1}
ROWS: dict[str, list[dict[str, Any]]] = {
    "preview": [{**FACE, "audio": "long.wav"}, {**FACE, "image": "closeup.png", "audio": "film.mp4"}],
    "hunyuan": [FACE],
    "multitalk": [{**FACE, "image": "pair.jpg", "audio_2": "again.wav", "audio_type": "para"}],
    "ditto": [FACE, {"video": "film.mp4", "audio": "again.wav", "seed": 1}],
}
SPOKEN = {"image": "portrait.jpg", "tts_text": "Hola, buenos días.", "voice": "ef_dora", "seed": 1}
FEW_STEPS = {"num_inference_steps": 2}
BACKENDS: dict[str, dict[str, Any]] = {
    "preview": {},
    "hunyuan": {"checkpoint": "hunyuan-tiny", "image_size": 64, "denoise": FEW_STEPS},
    "multitalk": {
        "checkpoint": "multitalk-tiny",
        "image_size": 48,
        "denoise": {**FEW_STEPS, "window_frames": 9, "motion_frames": 5},
    },
    "ditto": {"checkpoint": "ditto-tiny", "denoise": FEW_STEPS},
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def described(store: Path, row: dict[str, Any]) -> dict[str, str]:
    """Columns, tensors and file of one item, and the frames if it is a video."""
    found = {name: str(value) for name, value in row.items() if name not in MEASURED}
    path = store / row["data"]
    if path.suffix == ".safetensors":
        del found["sha256"]
        for name, tensor in open_item(path, row["key"]).items():
            found[name] = f"{tensor.dtype} {tensor.shape} {sha256(tensor.tobytes())}"
    elif path.suffix == ".mp4":
        found["frames"] = sha256(read_video(path).tobytes())
    return found


def rendered(backend: str, rows: list[dict[str, Any]], folder: Path, store: Path) -> dict[str, Any]:
    table = write_table(folder / f"{backend}.csv", rows)
    result = render_table(
        table,
        store,
        backend={"name": backend, **BACKENDS[backend]},
        tts={"checkpoint": "kokoro-tiny"},
        runtime={"gpus": [], "cache_dir": str(store / "cache")},
    )
    assert result.failures.empty, result.failures["error"].tolist()
    return {
        f"{backend} {stage} {row['key']}": described(store, row)
        for stage in sorted(folder.name for folder in (store / "stages").iterdir())
        for row in attempts(store, stage).to_dict("records")
    }


def main() -> None:
    folder, backends = Path(sys.argv[1]), sys.argv[2:]
    rows = ROWS | {"preview": ROWS["preview"] + ([SPOKEN] if is_installed() else [])}
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as stores:
        for backend in backends:
            found |= rendered(backend, rows[backend], folder, Path(stores) / backend)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
