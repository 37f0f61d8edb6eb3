"""How many frames the networks see at once on a CPU."""

from dataclasses import replace

import pytest
import torch

from avatar_core.backends.ditto.rendering import Renderer
from avatar_core.backends.ditto.spade_decoder import SpadeDecoder
from avatar_core.backends.ditto.warp import WarpingNetwork
from tests.backends.ditto.toy import DECODER, WARP


@pytest.mark.parametrize(
    ("side", "expected"),
    [(16, [4]), pytest.param(64, [1, 1, 1, 1], marks=pytest.mark.drill), (32, [2, 2])],
)
def test_large_volumes_are_rendered_in_parts(side: int, expected: list[int]) -> None:
    torch.manual_seed(0)
    warping, decoder = WarpingNetwork(replace(WARP, feature_channels=32, depth=16)), SpadeDecoder(DECODER)
    seen: list[int] = []
    decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    renderer = Renderer(None, warping.eval(), decoder.eval())
    volumes, x_s = torch.randn(2, 32, 16, side, side), torch.rand(4, 21, 3) - 0.5
    x_d, source_frames = x_s + 0.1 * torch.randn_like(x_s), [0, 1, 1, 0]

    images = renderer.render(volumes, x_s.numpy(), x_d.numpy(), source_frames)

    assert images.shape == (4, 8 * side, 8 * side, 3)
    assert seen == expected
    for row, source_frame in enumerate(source_frames):
        part = slice(row, row + 1)
        alone = renderer.render(
            volumes[source_frame][None], x_s[part].numpy(), x_d[part].numpy(), [source_frame]
        )
        torch.testing.assert_close(images[part], alone, atol=1e-2, rtol=1e-4)
