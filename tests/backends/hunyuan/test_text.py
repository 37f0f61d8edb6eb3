"""Prompts through small random models in the files of the official ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from avatar_core.backends.hunyuan.picture import llava_pixels
from avatar_core.backends.hunyuan.text import (
    CLIP_MAX_TOKENS,
    CROP_START,
    MAX_TOKENS,
    TEMPLATE,
    ClipEncoder,
    LlavaEncoder,
    TextEncoder,
    handed_on_mask,
)
from avatar_core.errors import InputError, WeightsError

PICTURE_TOKENS, CHANNELS = 9, 24
TEMPLATE_WORDS = (TEMPLATE.format(" ") + " \nThe person looks like").split()


def save_tokenizer(folder, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Words of the template and a few more; every other word is unknown."""
    words = [*special.values(), "<image>", "<unk>", *dict.fromkeys(TEMPLATE_WORDS), "a", "man", "sings"]
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    start, end = special.get("bos_token"), special.get("eos_token")
    frame = f"{start} $A {end}" if end else f"{start} $A"
    tokenizer.post_processor = TemplateProcessing(
        single=frame, special_tokens=[(word, ids[word]) for word in (start, end) if word]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<image>"], **special
    )
    fast.save_pretrained(folder)
    return fast


def vision(image_size: int) -> dict[str, int | str]:
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return {**sides, "image_size": image_size, "patch_size": 14, "projection_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoint")
    words = save_tokenizer(root / "llava_llama_image", {"bos_token": "<s>", "pad_token": "<pad>"})
    sides = {
        "hidden_size": CHANNELS,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    }
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision(42)},
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "max_position_embeddings": 512,
            **sides,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    LlavaForConditionalGeneration(config).save_pretrained(root / "llava_llama_image")
    words = save_tokenizer(
        root / "text_encoder_2", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    )
    text = {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    CLIPModel(CLIPConfig(text_config={**text, **ids}, vision_config=vision(42))).save_pretrained(
        root / "text_encoder_2"
    )
    return root


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder(folder, "cpu", torch.float32)


def picture(level: int = 0) -> np.ndarray:
    return np.full((64, 128, 3), level, np.uint8)


def num_text_tokens(folder, prompt: str) -> int:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "llava_llama_image")
    return len(tokenizer(TEMPLATE.format(prompt) + "\nThe person looks like<image>").input_ids)


def test_shapes_and_the_mask(encoder, folder):
    out = encoder.encode("a man sings " * 30, picture())
    length = MAX_TOKENS - CROP_START + PICTURE_TOKENS - 1
    assert out["prompt_embeds"].shape == (1, length, CHANNELS)
    assert out["pooled_prompt_embeds"].shape == (1, 12)
    valid = num_text_tokens(folder, "a man sings " * 30) - CROP_START
    wanted = [1] * valid + [0] * (256 - valid) + [1] * (PICTURE_TOKENS - 1)
    assert out["prompt_mask"].tolist() == [wanted]


def test_states_are_those_two_layers_before_the_end_of_the_ordinary_model(encoder, folder):
    """On the rows that are no padding, which transformers treats otherwise."""
    prompt = "a man sings " * 30
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava_llama_image").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "llava_llama_image")
    pictures = "<image>" * PICTURE_TOKENS
    tokens = tokenizer(TEMPLATE.format(prompt) + f"\nThe person looks like{pictures}", return_tensors="pt")
    pixels = torch.from_numpy(llava_pixels(picture(90), 42)).float()
    with torch.no_grad():
        wanted = llava(**tokens, pixel_values=pixels, output_hidden_states=True).hidden_states[-3]
    states = encoder.encode(prompt, picture(90))["prompt_embeds"]
    valid = wanted.shape[1] - CROP_START
    assert valid > 60
    assert (states[:, :valid] - wanted[:, CROP_START:]).abs().max() < 1e-5


def test_picture_and_prompt_both_count(encoder):
    first = encoder.encode("a man sings", picture(0))
    other_picture = encoder.encode("a man sings", picture(200))
    other_prompt = encoder.encode("a man", picture(0))
    assert not torch.equal(first["prompt_embeds"], other_picture["prompt_embeds"])
    assert torch.equal(first["pooled_prompt_embeds"], other_picture["pooled_prompt_embeds"])
    assert not torch.equal(first["prompt_embeds"], other_prompt["prompt_embeds"])
    assert not torch.equal(first["pooled_prompt_embeds"], other_prompt["pooled_prompt_embeds"])


def test_the_mask_handed_on_is_right_by_its_sum_only():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert handed_on_mask(mask, 4, 2).tolist() == [[1, 1, 1, 0, 0, 1, 1, 1]]


def test_a_prompt_that_leaves_no_room_for_the_picture(encoder, folder):
    allowed = MAX_TOKENS - num_text_tokens(folder, "")
    with pytest.raises(InputError, match=rf"has 400 tokens, allowed are {allowed}; shorten it"):
        encoder.encode("a " * 400, picture())
    encoder.encode("a " * allowed, picture())


def test_a_prompt_with_the_picture_s_token(encoder):
    with pytest.raises(InputError, match="<image>"):
        encoder.encode("a <image> sings", picture())


def test_clip_gives_the_row_at_the_end_of_the_prompt_and_cuts_long_ones(folder):
    clip = ClipEncoder(folder / "text_encoder_2", "cpu", torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "text_encoder_2")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval()
    tokens = tokenizer("a man sings", return_tensors="pt")
    with torch.no_grad():
        wanted = model(input_ids=tokens.input_ids).last_hidden_state[:, -1]
    assert (clip.encode("a man sings") - wanted).abs().max() < 1e-5
    shortest_cut = "a " * (CLIP_MAX_TOKENS - 2)
    assert torch.equal(clip.encode(shortest_cut), clip.encode(shortest_cut + "man sings"))


def copied(folder, target):
    return shutil.copytree(folder / "llava_llama_image", target)


def test_ids_of_configuration_and_tokenizer_must_agree(folder, tmp_path):
    changed = copied(folder, tmp_path / "llava")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "image_token_index": 3}))
    with pytest.raises(WeightsError, match=r"image_token_index is 3 .* and 2 in the tokenizer"):
        LlavaEncoder(changed, "cpu", torch.float32)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "mis-shaped"])
def test_weights_that_do_not_fit(folder, tmp_path, problem):
    changed = copied(folder, tmp_path / "llava")
    state = load_file(changed / "model.safetensors")
    name = next(name for name in state if name.endswith("linear_1.weight"))
    tensor = state.pop(name)
    if problem == "unexpected":
        state |= {name: tensor, "extra.weight": tensor.clone()}
    elif problem == "mis-shaped":
        state[name] = tensor[1:].clone()
    save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"{problem}: .*weight"):
        LlavaEncoder(changed, "cpu", torch.float32)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_of_torch_is_read_for_tensors_alone(folder, tmp_path):
    changed = shutil.copytree(folder / "text_encoder_2", tmp_path / "clip")
    state = load_file(changed / "model.safetensors")
    (changed / "model.safetensors").unlink()
    torch.save(state, changed / "pytorch_model.bin")
    official = ClipEncoder(folder / "text_encoder_2", "cpu", torch.float32)
    assert torch.equal(ClipEncoder(changed, "cpu", torch.float32).encode("a man"), official.encode("a man"))
    torch.save({**state, "logit_scale": Touch(tmp_path / "made")}, changed / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot be read"):
        ClipEncoder(changed, "cpu", torch.float32)
    assert not (tmp_path / "made").exists()
