"""Words of the command line: files or options, and that values arrive as they were typed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from avatar_core.config import Config, parse
from flows.compose import apply_overrides, compose_config, is_override, quoted
from flows.config_files import OptionFiles
from flows.overrides import read_override

NASTY = [
    "été",
    "声 🙂",
    "~/x.csv",
    "/data/a=b",
    "a,b",
    "it's",
    'a "b"',
    "'a' and 'b'",
    "a\\b",
    "end\\",
    "a\\'b",
    "[a, b]",
    "{a: b}",
    "[",
    "${x}",
    "\\${x}",
    "\\\\${x}\\",
    "$a ${",
    " a ",
    "a#b %c &d (e) @f :g ;h !i",
    "true",
    "1e5",
    "007",
    "2024-05-01",
    "???",
    "NULL",
    "range(1,3)",
    "a\nb",
    "-",
]


def applied(*words: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """What overrides make of values that were composed."""
    config = OmegaConf.create({"backend": {"name": "hunyuan"}, **(values or {})})
    return apply_overrides(config, [read_override(word) for word in words], {}, OptionFiles())


def is_special(text: str) -> bool:
    return text.strip() == "null" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text(
    "'\"\\\\${}[]a=,~# ", max_size=12
)


@settings(max_examples=150, deadline=None)
@given(TEXTS.filter(lambda text: not is_special(text)))
@example("\\${a}")
@example("${")
@example("\\")
def test_any_text_arrives_as_it_was_typed(text: str) -> None:
    options = ("name", "storage.root", "table", "backend.text.prompt_prefix")
    values = applied(*(f"{option}={text}" for option in options))
    assert values["name"] == values["table"] == values["storage"]["root"] == text
    assert values["backend"]["text"]["prompt_prefix"] == text


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_survives_quoting(text: str) -> None:
    values = applied(f"name={quoted(text)}", f"only=[{quoted(text)},{quoted('b')}]")
    assert (values["name"], values["only"]) == (text, [text, "b"])


def test_texts_reach_the_configuration() -> None:
    for text in NASTY:
        assert parse(Config, applied(f"name={text}", "backend.text.prompt_prefix=")).name == text
    config = compose_config(["name=it's ${x}, a=b", "table=~/x.csv"], given={"storage.root": "a${b}'c"})
    assert (config.name, config.table, config.storage.root) == ("it's ${x}, a=b", "~/x.csv", "a${b}'c")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("name=null", None),
        ("name='null'", "null"),
        ('name="a b"', "a b"),
        ("name='it\\'s'", "it's"),
        ("name='${table}'", "t.csv"),
        ("only=a", ["a"]),
        ("only=a,b", ["a", "b"]),
        ("only=[a, b]", ["a", "b"]),
        ("only=[]", []),
        ("only='a,b',it's", ["a,b", "it's"]),
        ("only=1,007,1.50", ["1", "007", "1.50"]),
        ("only=a,", ["a"]),
        ("input.allowed_roots=/a,s3://b/c", ["/a", "s3://b/c"]),
        ("runtime.gpus=0,1", [0, 1]),
        ("runtime.gpus=0", [0]),
        ("runtime.gpus=[0]", [0]),
        ("runtime.gpus=auto", "auto"),
        ("input.max_bytes=1e9", 1e9),
        ("audio.max_duration_s=null", None),
        ("face.required=false", False),
        ("rows=[{image: été.png, audio: a b.wav}]", [{"image": "été.png", "audio": "a b.wav"}]),
        ("rows=[{image:a.png,audio:b.wav}]", [{"image": "a.png", "audio": "b.wav"}]),
        ("storage.options.secret=hunter2/a+b==,", "hunter2/a+b==,"),
        ("storage.options.secret=a,b", "a,b"),
        ("+storage.options.secret='a/b+c='", "a/b+c="),
        ("storage.options.use_ssl=false", False),
        ("storage.options.client_kwargs={endpoint_url: 'http://h:1'}", {"endpoint_url": "http://h:1"}),
    ],
)
def test_values_are_read_by_the_option_s_type(word: str, expected: Any) -> None:
    values: Any = applied(word, values={"table": "t.csv", "rows": []})
    for part in word.partition("=")[0].lstrip("+").split("."):
        values = values[part]
    assert values == expected


def test_lists_of_the_backend_need_no_brackets() -> None:
    words = ["emo=3,4", "use_d_keys=exp", "fade_out_keys=exp,t"]
    config = compose_config(["backend=ditto", *(f"backend.denoise.{word}" for word in words)])
    denoise = config.backend["denoise"]
    assert (denoise["emo"], denoise["use_d_keys"], denoise["fade_out_keys"]) == (
        [3, 4],
        ["exp"],
        ["exp", "t"],
    )


def test_an_option_can_be_left_at_its_default() -> None:
    values = applied("~video.fps", "~storage.options.key", values={"video": {"fps": 30, "crf": 1}})
    assert values["video"] == {"crf": 1}
    assert compose_config(["preset=draft", "~preset"]).video.max_side == 1280
    assert compose_config(["preset=draft", "preset=null"]).video.max_side == 1280


def test_a_section_is_merged() -> None:
    config = compose_config(["video={fps:30}", "preset=draft", "backend={name: ditto, denoise: {emo: 3}}"])
    assert (config.video.fps, config.video.crf) == (30.0, 26)
    assert (config.backend["name"], config.backend["denoise"]["emo"]) == ("ditto", 3)
    assert config.backend["denoise"]["guidance_scale"] == 2.0
    assert compose_config(["backend.name=hunyuan"]).backend["image_size"] == 704


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("video.fps=30", True),
        ("+storage.options.key=a", True),
        ("++x=1", True),
        ("~preset", True),
        ("~video.fps", True),
        ("preset=draft", True),
        ("name=a\nb", True),
        (f"name={'x' * 5000}", True),
        ("foo=bar", True),
        ("batch.csv", False),
        ("~/batch.csv", False),
        ("/data/a=b.csv", False),
        ("data/a=b.csv", False),
        ("./a=b.csv", False),
        ("été=1.csv", False),
        ("s3://bucket/a=b.csv", False),
        (r"C:\a=b.csv", False),
    ],
)
def test_overrides_are_told_from_files(word: str, expected: bool) -> None:
    assert is_override(word) == expected


@pytest.mark.parametrize("name", ["fps=30.csv", "~preset"])
def test_a_file_that_looks_like_an_override_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert not is_override(name)
