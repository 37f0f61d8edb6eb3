import numpy as np
import pytest
import torch

from avatar_core.backends.hunyuan.vae import (
    build_vae,
    decode_frames,
    decode_tiles,
    encode_reference,
    encode_still,
    normalised,
    to_pixels,
)
from avatar_core.errors import WeightsError

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 32,
    "sample_tsize": 16,
    "scaling_factor": 0.5,
    "spatial_compression_ratio": 8,
    "time_compression_ratio": 4,
    "mid_block_add_attention": True,
    "mid_block_causal_attn": True,
}
"""Tiles of 32x32 pixels and 16 frames; of latents 4x4 and 4."""


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return build_vae(CONFIG)


@pytest.fixture
def encoder_runs(vae):
    yield from count_runs(vae.encoder)


@pytest.fixture
def decoder_runs(vae):
    yield from count_runs(vae.decoder)


def count_runs(module):
    runs = []
    handle = module.register_forward_hook(lambda *_: runs.append(1))
    yield runs
    handle.remove()


def picture(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def latents(num_frames, side=3):
    return torch.randn(1, 4, num_frames, side, side, generator=torch.Generator().manual_seed(num_frames))


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 4, 5, 6, 7, 8, 10, 13])
def test_pieces_are_the_whole_clip_bit_for_bit(vae, num_frames):
    whole = vae.decode(latents(num_frames)).sample

    pieces = list(decode_tiles(vae, latents(num_frames)))

    assert torch.equal(torch.cat(pieces, dim=2), whole)
    assert whole.shape[2] == 4 * num_frames - 3
    assert max(piece.shape[2] for piece in pieces) <= 17


@torch.no_grad()
def test_pieces_are_the_whole_clip_where_the_picture_is_tiled_too(vae):
    wide = torch.randn(1, 4, 6, 3, 6)

    pieces = torch.cat(list(decode_tiles(vae, wide)), dim=2)

    assert torch.equal(pieces, vae.decode(wide).sample)
    assert pieces.shape == (1, 3, 21, 24, 48)


def test_frames_come_before_the_clip_is_decoded(vae, decoder_runs):
    frames = decode_frames(vae, latents(13), num_frames=49)

    next(frames)

    assert len(decoder_runs) == 1
    assert len(list(frames)) == 48
    assert len(decoder_runs) == 4


def test_frames_that_are_not_wanted_are_not_decoded(vae, decoder_runs):
    frames = list(decode_frames(vae, latents(13), num_frames=13))

    assert len(frames) == 13
    assert len(decoder_runs) == 1


@torch.no_grad()
def test_frames_are_the_decoded_latents(vae):
    whole = vae.decode(latents(5) / CONFIG["scaling_factor"]).sample

    frames = np.stack(list(decode_frames(vae, latents(5), num_frames=17)))

    assert frames.shape == (17, 24, 24, 3)
    assert np.array_equal(frames, to_pixels(whole[0]))
    assert frames.std() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_nearly_the_same_frames(vae, dtype):
    half = build_vae(CONFIG)
    half.load_state_dict(vae.state_dict())
    half = half.to(dtype)

    encoded, rounded = (
        encode_reference(each, picture(40, 48), torch.Generator().manual_seed(0), num_frames=17)
        for each in (vae, half)
    )
    frames, rounded_frames = (
        np.stack(list(decode_frames(each, encoded, 17))).astype(float) for each in (vae, half)
    )

    assert rounded.dtype == dtype
    assert 0 < (encoded - rounded).abs().mean() < 0.02
    assert np.abs(frames - rounded_frames).mean() < 2


def test_levels_are_cut_off_not_rounded():
    levels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])

    assert to_pixels(levels.expand(3, 1, 1, 6))[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [9, 17, 33, 49, 129])
def test_a_still_video_is_encoded_as_if_every_tile_were_new(vae, num_frames):
    pixels = normalised(picture()).float()

    whole = vae.encode(pixels.expand(-1, -1, num_frames, -1, -1)).latent_dist.parameters

    assert torch.equal(encode_still(vae, pixels, num_frames), whole)
    assert whole.shape[2] == (num_frames - 1) // 4 + 1


@torch.no_grad()
def test_a_still_video_is_encoded_as_if_every_tile_were_new_where_the_picture_is_tiled(vae):
    pixels = normalised(picture(40, 48)).float()

    whole = vae.encode(pixels.expand(-1, -1, 33, -1, -1)).latent_dist.parameters

    assert torch.equal(encode_still(vae, pixels, 33), whole)


@torch.no_grad()
def test_equal_tiles_of_a_still_video_are_encoded_once(vae, encoder_runs):
    encode_still(vae, normalised(picture()).float(), 129)

    assert len(encoder_runs) == 2  # ten tiles of 17 frames, one of 9


@torch.no_grad()
def test_reference_latents_are_a_scaled_sample(vae):
    posterior = vae.encode(normalised(picture()).float().expand(-1, -1, 129, -1, -1)).latent_dist

    encoded = encode_reference(vae, picture(), torch.Generator().manual_seed(5))

    sample = posterior.sample(torch.Generator().manual_seed(5))
    assert torch.equal(encoded, sample * CONFIG["scaling_factor"])
    assert encoded.shape == (1, 4, 33, 3, 4)
    assert not torch.equal(encoded, encode_reference(vae, picture(), torch.Generator().manual_seed(6)))
    assert not torch.equal(encoded, encode_reference(vae, picture(seed=1), torch.Generator().manual_seed(5)))


def test_pixels_are_normalised_in_half_precision():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)

    pixels = normalised(levels)

    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    assert pixels.dtype == torch.float16
    assert pixels.shape == (1, 3, 1, 16, 16)
    assert 1e-5 < (pixels[0, 0, 0].flatten() - exact).abs().max() < 1e-3


@torch.no_grad()
def test_the_middle_attention_sees_later_frames_where_the_config_says_so():
    causal, free = (build_vae({**CONFIG, "mid_block_causal_attn": flag}) for flag in (True, False))
    free.load_state_dict(causal.state_dict())

    assert not torch.equal(causal.decode(latents(3)).sample, free.decode(latents(3)).sample)
    assert torch.allclose(causal.decode(latents(1)).sample, free.decode(latents(1)).sample, atol=1e-5)


@torch.no_grad()
def test_the_middle_attention_is_not_causal_where_the_config_is_silent():
    config = {key: value for key, value in CONFIG.items() if key != "mid_block_causal_attn"}
    silent, free = build_vae(config), build_vae({**CONFIG, "mid_block_causal_attn": False})
    free.load_state_dict(silent.state_dict())

    assert torch.equal(silent.decode(latents(3)).sample, free.decode(latents(3)).sample)


def test_tiles_overlap_by_a_quarter(vae):
    official = build_vae({**CONFIG, "sample_size": 256, "sample_tsize": 64})

    assert (official.tile_sample_min_num_frames, official.tile_sample_stride_num_frames) == (64, 48)
    assert (official.tile_sample_min_height, official.tile_sample_stride_width) == (256, 192)
    assert vae.use_tiling


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 4}, "UpDecoderBlock2D"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"sample_tsize": None}, "sample_tsize"),
        ({"sample_size": 30}, "sample_size"),
    ],
)
def test_a_config_of_another_autoencoder_is_refused(change, named):
    with pytest.raises(WeightsError, match=named):
        build_vae({**CONFIG, **change})


@pytest.mark.parametrize("name", ["sample_size", "sample_tsize", "time_compression_ratio"])
def test_a_config_that_leaves_something_open_is_refused(name):
    config = {key: value for key, value in CONFIG.items() if key != name}

    with pytest.raises(WeightsError, match=name):
        build_vae(config)
