"""A MultiTalk transformer of a few thousand weights, for tests of what is built round it."""

import torch
from torch import Tensor

from avatar_core.backends.multitalk.sampling import ClipInputs
from avatar_core.backends.multitalk.transformer import MultiTalkTransformer, TransformerConfig

TOY = TransformerConfig(
    dim=24,
    ffn_dim=32,
    freq_dim=16,
    text_dim=8,
    num_heads=2,
    num_layers=2,
    clip_dim=10,
    audio_blocks=2,
    audio_channels=3,
    intermediate_dim=8,
    output_dim=6,
    context_tokens=2,
)
T, HEIGHT, WIDTH = 3, 4, 8
FRAMES = 4 * (T - 1) + 1


def toy_transformer(seed: int = 1) -> MultiTalkTransformer:
    torch.manual_seed(seed)
    return MultiTalkTransformer(TOY).requires_grad_(False).eval()


def masks() -> Tensor:
    """The first speaker on the left, the second on the right, a background between them."""
    regions = torch.zeros(3, HEIGHT, WIDTH)
    regions[0, :, :2] = regions[1, :, 6:] = regions[2, :, 2:6] = 1
    return regions


def toy_inputs(persons: int = 2, seed: int = 2, motion_frames: int = 0) -> ClipInputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    condition = randn(1, 20, T, HEIGHT, WIDTH)
    return ClipInputs(
        prompt_embeds=randn(5, TOY.text_dim),
        negative_prompt_embeds=randn(7, TOY.text_dim),
        clip_features=randn(1, 257, TOY.clip_dim),
        condition=condition,
        audio=randn(persons, FRAMES, TOY.audio_window, TOY.audio_blocks, TOY.audio_channels),
        speaker_masks=masks() if persons > 1 else torch.ones(3, HEIGHT, WIDTH),
        motion_latents=condition[0, 4:, :motion_frames] if motion_frames else None,
    )
