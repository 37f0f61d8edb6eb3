"""Prompts as the transformer reads them: states of LLaVA, which sees the picture too, and one row of CLIP."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from avatar_core.backends.hunyuan.picture import Picture, llava_pixels
from avatar_core.backends.hunyuan.pretrained import load_clip_text, load_llava, load_tokenizer
from avatar_core.errors import InputError, WeightsError
from avatar_core.memory import LEVELS, Level, place

IMAGE_TOKEN = "<image>"
PICTURE_WORDS = f"\nThe person looks like{IMAGE_TOKEN}"
TEMPLATE: str = DEFAULT_PROMPT_TEMPLATE["template"]  # type: ignore[assignment]
CROP_START: int = DEFAULT_PROMPT_TEMPLATE["crop_start"]  # type: ignore[assignment]
"""Tokens of the template before the prompt, which are left out of the states."""
MAX_TOKENS = 256 + CROP_START
CLIP_MAX_TOKENS = 77


class TextEncoder:
    """`folder` holds the official `llava_llama_image` and `text_encoder_2`."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, level: Level = LEVELS[0]) -> None:
        self._llava = LlavaEncoder(folder / "llava_llama_image", device, dtype, level)
        self._clip = ClipEncoder(folder / "text_encoder_2", device, dtype)

    def encode(self, prompt: str, picture: Picture) -> dict[str, Tensor]:
        """`prompt_embeds` [1, L, channels], `prompt_mask` [1, L] (int64, see `handed_on_mask`) and
        `pooled_prompt_embeds` [1, channels] for one prompt and the fitted picture, RGB [H, W, 3]."""
        prompt_embeds, prompt_mask = self._llava.encode(prompt, picture)
        return {
            "prompt_embeds": prompt_embeds,
            "prompt_mask": prompt_mask,
            "pooled_prompt_embeds": self._clip.encode(prompt),
        }


class LlavaEncoder:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype, level: Level = LEVELS[0]) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._model = load_llava(folder, "cpu" if level.offload else device, dtype)
        place(self._model, level, device, ("language_model.layers",))
        self._check_ids(folder)

    def encode(self, prompt: str, picture: Picture) -> tuple[Tensor, Tensor]:
        """States and the mask handed on with them, from the prompt's first token to the last picture token
        and padding."""
        input_ids, mask = self._tokens(prompt)
        pixels = torch.from_numpy(llava_pixels(picture, self._model.config.vision_config.image_size))
        states = picture_text_states(self._model, input_ids, mask, pixels)
        num_picture_tokens = states.shape[1] - input_ids.shape[1] + 1
        return states[:, CROP_START:], handed_on_mask(mask, num_picture_tokens, CROP_START)

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, [1, MAX_TOKENS] each. Raises `InputError` if they leave no room for the picture."""
        text = self._text(prompt)
        count = len(self._tokenizer(text).input_ids)
        if count > MAX_TOKENS:
            around = len(self._tokenizer(self._text("")).input_ids)
            raise InputError(f"has {count - around} tokens, allowed are {MAX_TOKENS - around}; shorten it")
        tokens = self._tokenizer(text, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        if int((tokens.input_ids == self._model.config.image_token_id).sum()) != 1:
            raise InputError(f"contains {IMAGE_TOKEN}, which stands for the picture; leave it out")
        return tokens.input_ids, tokens.attention_mask

    def _text(self, prompt: str) -> str:
        return TEMPLATE.format(prompt) + PICTURE_WORDS

    def _check_ids(self, folder: Path) -> None:
        """The picture's place and the padding are found by ids of the model's configuration, which must be
        those of the tokenizer."""
        config, tokenizer = self._model.config, self._tokenizer
        ids = {
            "image_token_index": (config.image_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
            "pad_token_id": (getattr(config, "pad_token_id", None), tokenizer.pad_token_id),
        }
        for name, (configured, known) in ids.items():
            if configured is None or configured != known:
                raise WeightsError(
                    f"{folder}: {name} is {configured} in config.json and {known} in the tokenizer; "
                    "they must be equal: fetch the folder again"
                )


def picture_text_states(llava: Any, input_ids: Tensor, mask: Tensor, pixel_values: Tensor) -> Tensor:
    """States [1, L + n - 1, channels] of L tokens, one of which stands for the picture's n tokens.

    Padding is given to the model as zeros at position 1. Its states count: `handed_on_mask` lets some of them
    through.
    """
    language_model, config = llava.language_model, llava.config
    device, dtype = language_model.device, language_model.dtype
    input_ids, mask = input_ids.to(device), mask.to(device)
    place = int((input_ids[0] == config.image_token_id).nonzero())
    with torch.inference_mode():
        (features,) = llava.get_image_features(pixel_values.to(device, dtype)).pooler_output
        text = language_model.embed_tokens(input_ids).masked_fill(
            (input_ids == config.pad_token_id)[..., None], 0
        )
        embeds = torch.cat([text[:, :place], features[None], text[:, place + 1 :]], dim=1)
        seen = mask.new_ones(1, len(features))
        whole_mask = torch.cat([mask[:, :place], seen, mask[:, place + 1 :]], dim=1)
        positions = (whole_mask.cumsum(dim=1) - 1).masked_fill(whole_mask == 0, 1)
        output = language_model(
            inputs_embeds=embeds, attention_mask=whole_mask, position_ids=positions, use_cache=False
        )
    return output.last_hidden_state


def handed_on_mask(mask: Tensor, num_picture_tokens: int, crop_start: int) -> Tensor:
    """The mask of the cropped states as the transformer was trained with it: the tokenizer's, then ones for
    the picture. It is right by its sum but not by position, since the picture's tokens come before the
    padding: the token refiner leaves some of them out and lets padding through."""
    return torch.cat([mask, mask.new_ones(1, num_picture_tokens - 1)], dim=1)[:, crop_start:]


class ClipEncoder:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._model = load_clip_text(folder, device, dtype)

    def encode(self, prompt: str) -> Tensor:
        """[1, channels]; a prompt beyond 77 tokens is cut."""
        tokens = self._tokenizer(
            prompt, padding="max_length", max_length=CLIP_MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            return self._model(**tokens).pooler_output
