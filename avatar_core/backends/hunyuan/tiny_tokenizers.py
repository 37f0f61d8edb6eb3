"""Small tokenizers of the official kinds. Bytes are their alphabet, so that any text encodes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from avatar_core.backends.hunyuan.config import PROMPT_PREFIX
from avatar_core.backends.hunyuan.text import CLIP_MAX_TOKENS, IMAGE_TOKEN, PICTURE_WORDS, TEMPLATE
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import CLIPTokenizer, PreTrainedTokenizerFast  # noqa: E402 - after the broken are hidden

_START, _END, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_TURNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Numbers alone, words with the space before them, runs of anything else.
_WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"

_ENGLISH = """
a man woman girl boy child person people speaks talks sings says tells looks smiles stands sits in on at
to into the and of with is are his her their from by for it that this face camera microphone studio
recording room street garden outdoors indoors sunny warm soft light dark close up portrait story song
costume folk dress shirt hair wearing calm happy sad angry young old while background front natural
realistic authentic high quality lens fixed
"""


@dataclass(frozen=True)
class LlavaIds:
    size: int
    image: int
    pad: int


@dataclass(frozen=True)
class ClipIds:
    size: int
    start: int
    end: int


def save_llava_tokenizer(folder: Path) -> LlavaIds:
    """Words and bytes between LLaMA 3's special tokens. What comes before the prompt is as many tokens as the
    official tokenizer makes of it, since states are cropped by number."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = ("\n\n", TEMPLATE, PICTURE_WORDS, PROMPT_PREFIX, f" {' '.join(_ENGLISH.split())}")
    known = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*letters, *sorted(known)]))}
    # A word of the vocabulary is taken whole, as in LLaMA 3; any other falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    special = (_START, _END, *_TURNS, IMAGE_TOKEN, _PAD)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A", special_tokens=[(_START, vocabulary[_START])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return LlavaIds(len(vocabulary), vocabulary[IMAGE_TOKEN], vocabulary[_PAD])


def save_clip_tokenizer(folder: Path) -> ClipIds:
    """CLIP's kind of byte pairs: a word grows letter by letter, its last piece is marked, and the text's end
    has the last id."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = dict.fromkeys(pair for word in _ENGLISH.split() for pair in _growing(word))
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *(a + b for a, b in merges)]
    tokens += [_CLIP_START, _CLIP_END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    options: dict[str, Any] = {"vocab": vocabulary, "merges": list(merges)}  # of wider types than declared
    CLIPTokenizer(**options, model_max_length=CLIP_MAX_TOKENS).save_pretrained(folder)
    return ClipIds(len(vocabulary), vocabulary[_CLIP_START], vocabulary[_CLIP_END])


def _growing(word: str) -> Iterator[tuple[str, str]]:
    for length in range(1, len(word)):
        last = _WORD_END if length == len(word) - 1 else ""
        yield word[:length], word[length] + last
