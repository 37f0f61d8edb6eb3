"""wav2vec2's files, read by transformers from a local folder: tensors alone, none missing."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from avatar_core.errors import WeightsError
from avatar_core.optional_packages import hide_broken_packages

hide_broken_packages()

from transformers import Wav2Vec2Model  # noqa: E402 - after the broken packages are hidden
from transformers.utils import logging  # noqa: E402


def load_wav2vec2(folder: Path, device: str) -> Any:
    """Raises `WeightsError`. The file may hold all that was pretrained, of which the encoder is used."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is left over is none of the user's concern
    logging.disable_progress_bar()
    try:
        load: Any = Wav2Vec2Model.from_pretrained
        model, found = load(
            folder, dtype=torch.float32, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"the model in {folder} cannot be read: {error}; fetch it again") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"the weights in {folder} do not fit Wav2Vec2Model; missing: {', '.join(missing)}")
    if model.config.do_stable_layer_norm:
        raise WeightsError(
            f"{folder}/config.json: do_stable_layer_norm=true is that of another wav2vec2, whose last layer "
            "is not normalised; MultiTalk hears by chinese-wav2vec2-base"
        )
    return model.to(device).eval().requires_grad_(False)
