"""Size of the video, pixels for LLaVA, and where speech moves the face."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from avatar_core.backends.hunyuan.picture import (
    face_mask,
    fit_picture,
    latent_mask,
    llava_pixels,
    video_size,
)
from avatar_core.errors import InputError


@pytest.mark.parametrize(
    ("picture", "image_size", "wanted"),
    [
        ((512, 512), 704, (704, 704)),
        ((1920, 1080), 704, (1216, 704)),
        ((1080, 1920), 704, (704, 1216)),
        ((3000, 500), 704, (2240, 384)),
        ((1000, 1000), 320, (320, 320)),
        ((560, 320), 320, (512, 320)),  # of at most 320 x 480 pixels or so, else 576 wide
    ],
)
def test_a_video_has_the_shape_of_the_picture_in_steps_of_64(picture, image_size, wanted):
    assert video_size(*picture, image_size) == wanted


@pytest.mark.parametrize("width", [288, 224])  # 4.5 and 3.5 steps
def test_half_a_step_goes_to_the_even_one(width):
    assert video_size(width, 192, 192) == (256, 192)


def test_a_picture_too_narrow_for_any_video():
    with pytest.raises(InputError, match="100000x32 pixels, too narrow"):
        video_size(100_000, 32)


def test_a_fitted_picture_is_neither_cut_nor_padded():
    picture = np.zeros((90, 70, 3), np.uint8)
    picture[:, 35:] = 200
    fitted = fit_picture(picture, 256)
    assert fitted.shape == (320, 256, 3)
    assert (fitted[:, :120] < 20).all()
    assert (fitted[:, 136:] > 180).all()


def test_llava_sees_a_normalised_square():
    picture = np.full((128, 64, 3), (255, 0, 0), np.uint8)
    pixels = llava_pixels(picture, 28)
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.dtype == np.float16
    wanted = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.4082107 / 0.27577711]
    assert pixels[0, :, 3, 5].astype(float) == pytest.approx(wanted, abs=2e-3)


def test_the_region_of_the_face_is_three_times_its_box():
    mask = face_mask([70, 50, 87, 71], 192, 128)
    assert mask.shape == (128, 192)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert (rows[0], rows[-1] + 1) == (29, 91)
    assert (columns[0], columns[-1] + 1) == (53, 103)
    assert mask.sum() == (91 - 29) * (103 - 53)


def test_the_region_ends_at_the_border_of_the_picture():
    mask = face_mask([150.5, 90.5, 190.5, 126.5], 192, 128)
    assert mask[-1, -1] == 1
    assert mask[54, 110] == 1
    assert mask[53, 110] == mask[54, 109] == 0


def test_without_a_face_everything_may_move():
    assert face_mask(None, 192, 128).all()


def test_the_latent_mask_is_the_bilinear_reduction():
    mask = face_mask([61.3, 20.7, 80.9, 35.2], 192, 128)
    pixels = torch.from_numpy(mask.astype(np.float32))[None, None]
    wanted = functional.interpolate(pixels, size=(16, 24), mode="bilinear", align_corners=False)
    assert latent_mask(mask).shape == (1, 1, 1, 16, 24)
    assert np.array_equal(latent_mask(mask)[:, :, 0], wanted.numpy())
    assert 0.5 in latent_mask(mask)
