"""Tables, pictures, recordings and names that are unusual but fine."""

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
from av.audio.stream import AudioStream
from numpy.typing import NDArray
from PIL import Image

from avatar_core.pipeline import render
from tests.sample_rows import SAMPLES, Watcher, read_video, speech, write_table

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many tests here render the same clip, which is done once."""
    return tmp_path_factory.mktemp("unusual_store")


def good_row(inputs: Path) -> dict[str, Any]:
    return {"image": str(inputs / "portrait.jpg"), "audio": str(inputs / "hello.wav"), "seed": 1}


def parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def render_row(folder: Path, image: Path | str, audio: Path | str, **options: Any) -> Path:
    """The video of a single row."""
    result = render(
        {
            "rows": [{"image": str(image), "audio": str(audio)}],
            "storage": {"root": str(folder / "store")},
            **options,
        }
    )
    assert result.failures.empty, result.failures["error"].tolist()
    return Path(result.dataset) / result.metadata["file_name"].iloc[0]


def csv_text(inputs: Path, delimiter: str = ",", end: str = "\n", mark: str = "") -> bytes:
    lines = [["image", "audio", "prompt"], [f"{inputs}/portrait.jpg", f"{inputs}/hello.wav", "Hi"]]
    return (mark + "".join(delimiter.join(line) + end for line in lines)).encode()


GOOD_TABLES: dict[str, Callable[[Path], bytes]] = {
    "bom": lambda inputs: csv_text(inputs, mark="\ufeff"),
    "semicolons": lambda inputs: csv_text(inputs, ";"),
    "tabs": lambda inputs: csv_text(inputs, "\t"),
    "crlf": lambda inputs: csv_text(inputs, end="\r\n"),
    "parquet": lambda inputs: parquet(
        pd.DataFrame(
            {"image": [f"{inputs}/portrait.jpg"], "audio": [f"{inputs}/hello.wav"], "prompt": ["Hi"]}
        )
    ),
    "json_lines": lambda inputs: json.dumps(
        {"image": f"{inputs}/portrait.jpg", "audio": f"{inputs}/hello.wav", "prompt": "Hi"}
    ).encode(),
    "multitalk": lambda inputs: json.dumps(
        {
            "prompt": "Hi",
            "cond_image": f"{inputs}/portrait.jpg",
            "cond_audio": {"person1": f"{inputs}/hello.wav"},
        }
    ).encode(),
}


@pytest.mark.parametrize("case", GOOD_TABLES)
def test_every_kind_of_table_renders_the_same_clip(inputs: Path, shared_store: Path, case: str) -> None:
    table = inputs / f"{case}.table"
    table.write_bytes(GOOD_TABLES[case](inputs))
    storage = {"root": str(shared_store)}
    row = {"image": f"{inputs}/portrait.jpg", "audio": f"{inputs}/hello.wav", "prompt": "Hi"}
    expected = render({"rows": [row], "storage": storage})
    watcher = Watcher()
    result = render({"table": str(table), "storage": storage}, watcher)
    assert watcher.counts == {}
    for column in ("status", "prompt", "seed", "sha256"):
        assert result.metadata[column].tolist() == expected.metadata[column].tolist()
    assert result.failures.empty


def portrait() -> Image.Image:
    with Image.open(SAMPLES / "portrait.jpg") as picture:
        return picture.resize((224, 224))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    portrait().rotate(90).save(path, exif=exif, quality=95)


def sixteen_bit(path: Path) -> None:
    grey = np.asarray(portrait().convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path)


def with_alpha(path: Path) -> None:
    picture = portrait().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda value: max(value, 240)))
    picture.save(path)


def animated(path: Path) -> None:
    portrait().save(path, save_all=True, append_images=[Image.new("RGB", (224, 224))])


GOOD_PICTURES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "turned": ("a.jpg", turned),
    "alpha": ("a.png", with_alpha),
    "palette": ("a.png", lambda path: portrait().convert("P", palette=Image.Palette.ADAPTIVE).save(path)),
    "16_bit": ("a.png", sixteen_bit),
    "cmyk": ("a.jpg", lambda path: portrait().convert("CMYK").save(path, quality=95)),
    "grey": ("a.jpg", lambda path: portrait().convert("L").save(path, quality=95)),
    "animated_webp": ("a.webp", animated),
    "upper_case": ("A.JPG", lambda path: portrait().save(path, format="JPEG")),
    "wrong_extension": ("a.png", lambda path: portrait().save(path, format="WEBP")),
    "odd_size": ("a.png", lambda path: portrait().resize((225, 219)).save(path)),
}


@pytest.mark.parametrize("case", GOOD_PICTURES)
def test_an_unusual_picture_is_shown_upright_in_its_colours(inputs: Path, tmp_path: Path, case: str) -> None:
    name, make = GOOD_PICTURES[case]
    make(tmp_path / name)
    first = read_video(render_row(tmp_path, tmp_path / name, inputs / "hello.wav"))[0].astype(int)
    expected = portrait()
    if case in ("grey", "16_bit"):
        expected = expected.convert("L").convert("RGB")
    expected = expected.resize((first.shape[1], first.shape[0]))
    # H.264 at the default quality, a palette and CMYK each cost a few levels; a turned face costs 60.
    assert np.abs(first - np.asarray(expected, dtype=int)).mean() < 14


def samples(rate: int, channels: int = 1) -> NDArray[np.float32]:
    """Real speech [n, channels] at another rate, by linear interpolation."""
    spoken, own_rate = speech()
    times = np.arange(round(len(spoken) / own_rate * rate)) * own_rate / rate
    track = np.interp(times, np.arange(len(spoken)), spoken / 32768).astype(np.float32)
    return np.repeat(track[:, None], channels, axis=1)


def write_sound(path: Path, rate: int, channels: int, codec: str, container: str) -> Path:
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, AudioStream)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples(rate, channels).T), format="fltp", layout=layout
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(converted))
        file.mux(stream.encode(None))
    return path


GOOD_SOUNDS: dict[str, tuple[str, int, int, str, str]] = {
    "8_bit": ("a.wav", 16_000, 1, "pcm_u8", "wav"),
    "24_bit": ("a.wav", 48_000, 2, "pcm_s24le", "wav"),
    "float": ("a.wav", 44_100, 1, "pcm_f32le", "wav"),
    "6_channels": ("a.wav", 48_000, 6, "pcm_s16le", "wav"),
    "8_khz": ("a.wav", 8_000, 1, "pcm_s16le", "wav"),
    "96_khz": ("a.wav", 96_000, 2, "pcm_s24le", "wav"),
    "mp3": ("a.mp3", 44_100, 2, "libmp3lame", "mp3"),
    "m4a": ("a.m4a", 44_100, 1, "aac", "mp4"),
    "ogg": ("a.ogg", 48_000, 1, "libopus", "ogg"),
    "flac": ("a.flac", 44_100, 2, "flac", "flac"),
    "mov": ("a.mov", 44_100, 1, "pcm_s16le", "mov"),
    "upper_case": ("A.WAV", 16_000, 1, "pcm_s16le", "wav"),
    "wrong_extension": ("a.wav", 44_100, 1, "libmp3lame", "mp3"),
}


@pytest.mark.parametrize("case", GOOD_SOUNDS)
def test_an_unusual_recording_gives_a_video_of_its_length_with_its_sound(
    inputs: Path, tmp_path: Path, case: str
) -> None:
    name, rate, channels, codec, container = GOOD_SOUNDS[case]
    recording = write_sound(tmp_path / name, rate, channels, codec, container)
    video = render_row(tmp_path, inputs / "portrait.jpg", recording)
    assert abs(len(read_video(video)) - 15) <= 1
    with av.open(str(video)) as file:
        heard = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in file.decode(audio=0)])
    assert 0.3 < np.sqrt((heard**2).mean()) / np.sqrt((samples(rate) ** 2).mean()) < 1.5


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("Grüße", "Grüße.mp4"),
        ("two words", "two-words.mp4"),
        ('it\'s "quoted"', "it-s-quoted.mp4"),
        ("a/b\\c", "a-b-c.mp4"),
        ("../../escape", "escape.mp4"),
        ("..", "clip.mp4"),
        ("日本", "日本.mp4"),
        ("x" * 300, "x" * 96 + ".mp4"),
    ],
)
def test_any_name_gives_a_safe_file_name(inputs: Path, shared_store: Path, name: str, file_name: str) -> None:
    rows = [{**good_row(inputs), "name": name}]
    result = render({"rows": rows, "name": "names", "storage": {"root": str(shared_store)}})
    assert [path.name for path in Path(result.dataset).glob("videos/*")] == [file_name]


def test_doubled_names_are_numbered_with_a_warning(inputs: Path, shared_store: Path, tmp_path: Path) -> None:
    rows = [{**good_row(inputs), "name": name} for name in ("Anna", "Anna", "anna", "Anna-2")]
    watcher = Watcher()
    config = {
        "table": str(write_table(tmp_path / "doubled.csv", rows)),
        "storage": {"root": str(shared_store)},
    }
    result = render(config, watcher)
    names = result.metadata["name"].tolist()
    assert names[:2] == ["Anna", "Anna-2"]
    assert len({name.casefold() for name in names}) == 4
    assert len(list(Path(result.dataset).glob("videos/*"))) == 4
    assert len(watcher.warnings) == 3
    assert "row 2: name `Anna` is already used; this clip is called `Anna-2`" in watcher.warnings


def test_files_may_be_called_anything(inputs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "Größe, 'ganz' \"groß\" #1 [a] %20 ${x}.JPG"
    picture.write_bytes((inputs / "portrait.jpg").read_bytes())
    recording = tmp_path / "sub dir" / "höre = zu; jetzt.Wav"
    recording.parent.mkdir()
    recording.write_bytes((inputs / "hello.wav").read_bytes())
    rows = [{"image": picture.name, "audio": f"sub dir/{recording.name}"}]
    result = render(
        {"table": str(write_table(tmp_path / "t.csv", rows)), "storage": {"root": str(tmp_path / "store")}}
    )
    assert result.failures.empty, result.failures["error"].tolist()
