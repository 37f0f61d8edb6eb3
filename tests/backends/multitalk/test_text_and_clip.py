"""Prompts and frames through small random encoders under the official names."""

from pathlib import Path

import pytest
import torch
from torch import nn

from avatar_core.backends.multitalk.clip import (
    build_clip,
    clip_features,
    clip_half,
    clip_name_map,
    clip_pixels,
    whole_clip,
)
from avatar_core.backends.multitalk.text import (
    MAX_TOKENS,
    TextEncoder,
    build_text_encoder,
    clean,
    text_name_map,
)
from avatar_core.backends.multitalk.tiny import CLIP, TEXT
from avatar_core.backends.multitalk.tiny_tokenizer import save_tokenizer
from avatar_core.checkpoint import rename, undo_rename
from avatar_core.errors import WeightsError

WIDTH = TEXT["d_model"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    sizes = {**TEXT, "vocab_size": save_tokenizer(folder)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextEncoder(build_text_encoder(sizes).eval(), folder, "cpu")


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_clip(CLIP).eval().requires_grad_(False)


def frame(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- text


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  A woman \n\t speaks.  ", "A woman speaks."),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("you &amp;amp; me", "you & me"),
        ("\u201cHi\u201d", '"Hi"'),
        ("", ""),
        ("一个女人在说话", "一个女人在说话"),
    ],
)
def test_prompts_are_cleaned(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["A woman speaks.", "", "👩‍🎤 一个女人", "a"])
def test_states_are_of_the_valid_tokens(text: TextEncoder, prompt: str) -> None:
    states = text.encode(prompt)
    assert states.shape[1] == WIDTH
    assert 1 <= len(states) < 40
    assert torch.isfinite(states).all()


def test_the_padding_is_not_seen(text: TextEncoder) -> None:
    states = text.encode("a woman speaks")
    ids = text._tokenizer("a woman speaks", return_tensors="pt").input_ids
    with torch.no_grad():
        alone = text._model(ids).last_hidden_state[0]
    assert states.shape == alone.shape
    assert (states - alone).abs().max() < 1e-5


def test_long_prompts_are_cut_at_their_end(text: TextEncoder) -> None:
    long = text.encode("woman " * 600)
    assert len(long) == MAX_TOKENS
    assert torch.equal(long, text.encode("woman " * 600 + "in a garden"))


def test_words_and_their_order_show(text: TextEncoder) -> None:
    one, other = text.encode("a man and a woman"), text.encode("a woman and a man")
    assert one.shape == other.shape
    assert (one - other).abs().max() > 1e-2
    assert torch.equal(one, text.encode("a  man and\na woman "))


def test_text_names_go_there_and_back() -> None:
    sizes = {**TEXT, "vocab_size": 8}
    state = build_text_encoder(sizes).state_dict()
    official = undo_rename(state, text_name_map(sizes))
    assert {"token_embedding.weight", "blocks.1.pos_embedding.embedding.weight"} <= official.keys()
    back = rename(official, text_name_map(sizes))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert len({entry.source for entry in text_name_map()}) == 242


# --- CLIP


@pytest.mark.parametrize("size", [(64, 96), (224, 224), (640, 640), (33, 1000)])
def test_a_frame_of_any_size_has_257_tokens(clip: nn.Module, size: tuple[int, int]) -> None:
    features = clip_features(clip, frame(*size))
    assert features.shape == (1, 257, CLIP["hidden_size"])
    assert features.std() > 0
    assert (features - clip_features(clip, frame(*size, seed=1))).abs().max() > 1e-3


def test_features_are_those_before_the_last_layer(clip: nn.Module) -> None:
    expected = clip_features(clip, frame())
    changed = build_clip(CLIP).eval()
    changed.load_state_dict(clip.state_dict())
    last = CLIP["num_hidden_layers"] - 1
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if f".{last}." in name or "post_layernorm" in name:
                parameter.mul_(2)
    assert torch.equal(clip_features(changed, frame()), expected)
    with torch.no_grad():
        changed.get_parameter(f"encoder.layers.{last - 1}.mlp.fc2.bias").add_(1)
    assert (clip_features(changed, frame()) - expected).abs().max() > 0.5


def test_pixels_are_neither_smoothed_nor_cut_off() -> None:
    """Of every four columns the inner two count, a little more than wholly."""
    columns = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(224).expand(1, 3, 896, 896)
    value = (2 * -0.09375 - 2 * 0.59375) * 0.5 + 0.5
    pixels = clip_pixels(columns, 224)[0, :, 10:-10, 10:-10]
    for channel, mean, deviation in zip(
        pixels, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True
    ):
        assert (channel - (value - mean) / deviation).abs().max() < 1e-5


def test_clip_names_go_there_and_back() -> None:
    state = build_clip(CLIP).state_dict()
    official = whole_clip(undo_rename(state, clip_name_map(CLIP)))
    width = CLIP["hidden_size"]
    assert official["visual.transformer.0.attn.to_qkv.weight"].shape == (3 * width, width)
    assert official["visual.cls_embedding"].shape == (1, 1, width)
    assert official["visual.pos_embedding"].shape == (1, 257, width)
    back = rename(clip_half({**official, "textual.model.x": torch.zeros(1)}), clip_name_map(CLIP))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert len({entry.source for entry in clip_name_map()}) == 391


def test_a_lacking_tensor_of_clip_is_named() -> None:
    official = whole_clip(undo_rename(build_clip(CLIP).state_dict(), clip_name_map(CLIP)))
    for name in ("visual.pos_embedding", "visual.transformer.1.mlp.0.bias"):
        rest = {each: tensor for each, tensor in official.items() if each != name}
        with pytest.raises(WeightsError, match=f"missing: {name}"):
            rename(clip_half(rest), clip_name_map(CLIP))
