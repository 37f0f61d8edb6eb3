"""The encoders' files, read by transformers from local folders: tensors alone, none missing or left over."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from avatar_core.errors import WeightsError
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import (  # noqa: E402 - after the broken packages are hidden
    AutoTokenizer,
    CLIPTextModel,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.utils import logging  # noqa: E402

# States are read two layers before the end.
SKIPPED_LAYERS = 2

# `text_encoder_2` may hold the whole of CLIP, of which the text half is used.
_CLIP_REST = ("vision_model.*", "visual_projection.*", "text_projection.*", "logit_scale")

# Constants that older files carry along.
_CONSTANTS = ("*position_ids", "*rotary_emb.inv_freq")


def load_whisper_encoder(folder: Path, device: str) -> Any:
    # Checkpoints of the whole recogniser may repeat the embedding as its output layer.
    model = _load(WhisperModel, folder, torch.float32, device, ignored=("proj_out.*",))
    return model.get_encoder()


def load_feature_extractor(folder: Path) -> WhisperFeatureExtractor:
    with _as_weights_error(folder):
        return WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with _as_weights_error(folder):
        return AutoTokenizer.from_pretrained(folder, padding_side="right", local_files_only=True)


def load_clip_text(folder: Path, device: str, dtype: torch.dtype) -> Any:
    return _load(CLIPTextModel, folder, dtype, device, ignored=_CLIP_REST)


def load_llava(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """LLaVA without its last layers, final norm and output layer: `last_hidden_state` of its language model
    is what others read as `hidden_states[-3]`."""
    llava = _load(LlavaForConditionalGeneration, folder, dtype, device).model
    language_model = llava.language_model
    del language_model.layers[-SKIPPED_LAYERS:]
    language_model.norm = torch.nn.Identity()
    return llava


def _load(
    model_type: type[PreTrainedModel],
    folder: Path,
    dtype: torch.dtype,
    device: str,
    *,
    ignored: Sequence[str] = (),
) -> Any:
    """Straight onto the device. Raises `WeightsError` that names what is missing, left over (but for the
    `ignored` patterns) or of another shape."""
    with _as_weights_error(folder), _silent():
        load: Any = model_type.from_pretrained  # its type hides the second result
        model, found = load(
            folder,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            weights_only=True,  # where the folder has no safetensors
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    left_out = (*ignored, *_CONSTANTS)
    found["unexpected_keys"] = [
        name for name in found["unexpected_keys"] if not any(fnmatchcase(name, p) for p in left_out)
    ]
    kinds = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "mis-shaped"}
    problems = [f"{kind}: {_listed(found[key])}" for key, kind in kinds.items() if found[key]]
    if problems:
        raise WeightsError(f"the weights in {folder} do not fit {model_type.__name__}; {'; '.join(problems)}")
    return model.eval()


def _listed(found: Sequence[Any]) -> str:
    """Mis-shaped ones come with both shapes."""
    names = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in found)
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


@contextmanager
def _as_weights_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"the model in {folder} cannot be read: {reason}; fetch it again") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bar and its own report of names, which `_load` checks."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
