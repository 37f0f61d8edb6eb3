"""Colours of pictures: from the profile that a picture carries to sRGB."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20

_GREY = ("1", "L", "LA", "La", "I", "F")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode by the colour space of a profile."""
_ROUNDING = 2
"""Levels by which a profile of sRGB may miss it: vendors round its curve differently."""


@dataclass(frozen=True)
class Colours:
    """What a picture says of its colours. `profile`: ICC, None for sRGB; `warning`: what is not obeyed."""

    profile: bytes | None = None
    warning: str | None = None


class ToSrgb:
    """Converts a picture of Pillow's `mode`. A profile that is broken or made for other pictures is left out,
    with a `warning`; one of sRGB is left out, so that pixels stay exactly as they are."""

    def __init__(self, colours: Colours, mode: str) -> None:
        self.warning = colours.warning
        self._transform: ImageCms.ImageCmsTransform | None = None
        if colours.profile is not None:
            try:
                self._transform, self._mode = _transform(colours.profile, mode)
            except Exception as error:  # a broken profile makes Pillow raise nearly anything
                reason = " ".join(str(error).split()) or type(error).__name__
                self.warning = f"its colour profile is ignored: {reason}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB; transparency over white."""
        if image.mode not in _TRANSPARENT and "transparency" not in image.info:
            return self._converted(image)
        colours = image.convert("RGBA")
        picture = self._converted(colours.convert("RGB"))
        picture.putalpha(colours.getchannel("A"))
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")

    def _converted(self, image: Image.Image) -> Image.Image:
        if self._transform is None:
            return image.convert("RGB")
        image = image if image.mode == self._mode else image.convert(self._mode)
        return self._transform.apply(image)


def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """None for sRGB, and the mode that it takes. A grey picture may have the profile of a colour picture."""
    if len(profile) > MAX_PROFILE_BYTES:
        raise ValueError(f"allowed are {MAX_PROFILE_BYTES} bytes")
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    wanted = _MODES.get(space)
    is_grey = mode in _GREY or mode.startswith("I;")
    if (wanted == "CMYK") != (mode == "CMYK") or wanted is None or (wanted == "L" and not is_grey):
        raise ValueError(f"it is one of {space} pictures, this one is {mode}")
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        wanted,
        "RGB",
        ImageCms.Intent.PERCEPTUAL,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return (None if _changes_nothing(transform, wanted) else transform), wanted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 1 if mode == "L" else 15, dtype=np.uint8)
    grid = (
        levels[:, None]
        if mode == "L"
        else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    )
    before = Image.fromarray(grid)
    after = np.asarray(transform.apply(before), int)
    return bool(np.abs(after - np.asarray(before.convert("RGB"), int)).max() <= _ROUNDING)
