"""A small tokenizer of UMT5's kind: pieces of words with scores, bytes for what has none."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from avatar_core.backends.multitalk.config import NEGATIVE_PROMPT
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import PreTrainedTokenizerFast  # noqa: E402 - after the broken are hidden

_PAD, _END, _START, _UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"
_SPACE = "▁"

_ENGLISH = """
a man woman girl boy child person people speaks talks sings says tells looks smiles stands sits in on at
to into the and of with is are his her their from by for it that this face camera microphone studio
recording room street garden outdoors indoors sunny warm soft light dark close up portrait story song
costume folk dress shirt hair wearing calm happy sad angry young old while front natural two other
"""


def save_tokenizer(folder: Path) -> int:
    """Writes it; gives the number of its tokens."""
    words = dict.fromkeys(f"{_ENGLISH} {NEGATIVE_PROMPT}".replace(",", " ").split())
    letters = [chr(code) for code in range(33, 127)]
    special = [(token, 0.0) for token in (_PAD, _END, _START, _UNKNOWN)]
    pieces = [*letters, _SPACE, *(_SPACE + word for word in words)]
    scores = [(piece, -float(1 + number / 100)) for number, piece in enumerate(reversed(pieces))]
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary = [*special, *bytes_, *scores]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        bos_token=_START,
        unk_token=_UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"tokenizer_class": "T5Tokenizer"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)
