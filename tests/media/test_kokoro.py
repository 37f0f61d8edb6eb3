"""Kokoro itself, with random weights; most of it needs the extra `tts`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from avatar_core.errors import ConfigError, InputError, WeightsError
from avatar_core.media import kokoro
from avatar_core.media.dialogue import Turn, split_turns, voice_name
from tests.sample_rows import RunAvatar
from tests.speaking_program import is_installed

needs_kokoro = pytest.mark.skipif(not is_installed(), reason="needs the package kokoro (extra `tts`)")


@pytest.mark.parametrize(
    "value", ["af_heart", "af_heart.pt", " weights/Kokoro-82M/voices/af_heart.pt ", "C/voices/af_heart"]
)
def test_a_voice_is_called_by_its_name_or_its_file(value: str) -> None:
    assert voice_name(value) == "af_heart"


@pytest.mark.parametrize(
    "value", ["", "Adam", "heart", "af_heart.bin", "../af_heart/x", "jf_alpha", "zm_yunxi"]
)
def test_what_is_no_voice_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="is not the name of a Kokoro voice"):
        voice_name(value)


def test_turns() -> None:
    text = "(s1)  Hello,\nyou (there). (s2) Hi (s1)Bye.  "
    assert split_turns(text, 2) == [Turn(0, "Hello,\nyou (there)."), Turn(1, "Hi"), Turn(0, "Bye.")]
    assert split_turns("  Hello (s) there. ", 1) == [Turn(0, "Hello (s) there.")]


@pytest.mark.skipif(is_installed(), reason="the package kokoro is here")
def test_without_the_package_the_command_that_helps_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        kokoro.check_installed(["ef_dora"])
    if sys.version_info >= (3, 13):
        assert "which is made for Python 3.11 and 3.12; this is 3.13" in str(caught.value)
    else:
        assert str(caught.value) == (
            "tts_text needs the package kokoro, which is not installed; run: pip install "
            "'avatar-dataset[tts]'"
        )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from avatar_core.media.kokoro_tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("kokoro") / "tiny"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(weights: Path) -> kokoro.Speaker:
    return kokoro.Speaker(weights, weights / "voices")


@needs_kokoro
def test_one_voice_says_the_whole_text(speaker: kokoro.Speaker) -> None:
    (short,), (long,) = (speaker.tracks(text, ("ef_dora",)) for text in ("Hola.", "Hola, amigo.\nAdiós."))
    assert short.dtype == np.float32
    assert 0.1 < len(short) / kokoro.SAMPLE_RATE < len(long) / kokoro.SAMPLE_RATE < 3
    assert 0.001 < np.abs(short).mean() < 0.5


@pytest.mark.drill
@needs_kokoro
def test_it_sounds_the_same_every_time(weights: Path, speaker: kokoro.Speaker) -> None:
    (first,) = speaker.tracks("Hola.", ("ef_dora",))
    another = kokoro.Speaker(weights, weights / "voices")
    before = torch.random.get_rng_state()
    (again,) = another.tracks("Hola.", ("ef_dora",))
    (other,) = speaker.tracks("Hola.", ("em_alex",))
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other) or not np.array_equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.drill
@needs_kokoro
def test_a_turn_is_silence_for_the_other(speaker: kokoro.Speaker) -> None:
    (first,) = speaker.tracks("Hola.", ("ef_dora",))
    (second,) = speaker.tracks("Adiós.", ("em_alex",))
    both = speaker.tracks("(s1) Hola. (s2) Adiós.", ("ef_dora", "em_alex"))
    np.testing.assert_array_equal(both[0], np.concatenate([first, np.zeros_like(second)]))
    np.testing.assert_array_equal(both[1], np.concatenate([np.zeros_like(first), second]))


@pytest.fixture
def tagger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """spaCy's English model as a package, untrained."""
    spacy = pytest.importorskip("spacy")

    words = spacy.blank("en")
    words.add_pipe("tok2vec")
    words.add_pipe("tagger").add_label("NN")
    words.initialize()
    package, notes = tmp_path / "en_core_web_sm", tmp_path / "en_core_web_sm-0.1.dist-info"
    words.to_disk(package)
    (package / "__init__.py").write_text(
        "from spacy.util import load_model\n\n\n"
        "def load(**options):\n    return load_model(__path__[0], **options)\n"
    )
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: en_core_web_sm\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("en_core_web_sm", None)


@pytest.mark.drill
@needs_kokoro
def test_english_voices(weights: Path, tagger: None) -> None:
    kokoro.check_installed(["af_heart"])
    speaker = kokoro.Speaker(weights, weights / "voices")
    american, british = (speaker.tracks("Hello there.", (voice,))[0] for voice in ("af_heart", "bf_emma"))
    assert min(len(american), len(british)) > 0.1 * kokoro.SAMPLE_RATE
    assert kokoro.versions(("af_heart",))[2] == "en_core_web_sm 0.1"


@needs_kokoro
def test_english_needs_its_tagger() -> None:
    with pytest.raises(ConfigError, match="run: python -m spacy download en_core_web_sm"):
        kokoro.check_installed(["ef_dora", "af_heart"])


@needs_kokoro
def test_a_text_that_cannot_be_said(speaker: kokoro.Speaker) -> None:
    with pytest.raises(InputError, match="the voice ef_dora finds nothing to say in"):
        speaker.tracks("\n\n \u200b", ("ef_dora",))
    with pytest.raises(InputError, match="is too long for one breath; divide it into sentences or lines"):
        speaker.tracks("hola " * 200, ("ef_dora",))


@pytest.mark.drill
@needs_kokoro
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "holds no Kokoro model"),
        ("text", "holds no Kokoro model"),
        ("half", "lacks 3 tensors of predictor"),
    ],
)
def test_a_model_that_is_none(weights: Path, tmp_path: Path, damage: str, message: str) -> None:
    (tmp_path / kokoro.CONFIG).write_bytes((weights / kokoro.CONFIG).read_bytes())
    if damage == "text":
        (tmp_path / kokoro.MODEL).write_text("no model")
    elif damage == "half":
        state = torch.load(weights / kokoro.MODEL, weights_only=True)
        names = sorted(state["predictor"])[:3]
        state["predictor"] = {
            name: tensor for name, tensor in state["predictor"].items() if name not in names
        }
        torch.save(state, tmp_path / kokoro.MODEL)
    with pytest.raises(WeightsError, match=message):
        kokoro.Speaker(tmp_path, weights / "voices")


@pytest.mark.drill
@needs_kokoro
@pytest.mark.parametrize("content", [torch.zeros(3, 256), {"a": torch.zeros(1)}, None])
def test_a_voice_that_is_none(weights: Path, tmp_path: Path, content: object) -> None:
    if content is None:
        (tmp_path / "ef_dora.pt").write_text("no voice")
    else:
        torch.save(content, tmp_path / "ef_dora.pt")
    speaker = kokoro.Speaker(weights, tmp_path)
    with pytest.raises(WeightsError, match=r"ef_dora\.pt is no voice of Kokoro"):
        speaker.tracks("Hola.", ("ef_dora",))


@needs_kokoro
def test_random_weights_in_the_official_layout(weights: Path, tmp_path: Path) -> None:
    from avatar_core.media.kokoro_tiny import write_tiny_checkpoint

    config = json.loads((weights / kokoro.CONFIG).read_text())
    assert config["style_dim"] == 128
    state = torch.load(weights / kokoro.MODEL, weights_only=True)
    assert list(state) == ["bert", "bert_encoder", "predictor", "text_encoder", "decoder"]
    assert all(name.startswith("module.") for part in state.values() for name in part)
    write_tiny_checkpoint(tmp_path / "again")
    for name in (kokoro.CONFIG, kokoro.MODEL, "voices/ef_dora.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (weights / name).read_bytes()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="holds other files; give an empty or absent folder"):
        write_tiny_checkpoint(tmp_path)


@needs_kokoro
def test_the_command_writes_random_weights(
    avatar: RunAvatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVATAR_WEIGHTS", str(tmp_path))
    assert avatar("weights", "tiny", "kokoro")[0] == 0
    assert avatar("weights", "verify", "kokoro-tiny") == (0, "kokoro-tiny: ok\n")


def test_there_is_nothing_to_convert(avatar: RunAvatar) -> None:
    assert avatar("weights", "convert", "kokoro/model") == (
        2,
        "error: weights 'kokoro' are used as they are, there is nothing to convert\n",
    )
