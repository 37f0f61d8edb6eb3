"""Frames of one clip from one picture: mouths and eyes are redrawn, then the heads sway."""

from collections.abc import Sequence

from avatar_core.backends.preview.axes import FaceAxes
from avatar_core.backends.preview.blink import blinking_eyes
from avatar_core.backends.preview.contours import Contours
from avatar_core.backends.preview.head import HeadSway
from avatar_core.backends.preview.mouth import Mouth
from avatar_core.backends.preview.warp import FloatArray, Picture


class Renderer:
    """Everything that is the same for all frames is computed once, here. Without faces nothing moves."""

    def __init__(self, picture: Picture, faces: Sequence[Contours]) -> None:
        self._picture = picture
        axes = [FaceAxes(contours) for contours in faces]
        self._mouths = [Mouth(picture, contours, face) for contours, face in zip(faces, axes, strict=True)]
        self._eyes = [
            blinking_eyes(picture, contours, face) for contours, face in zip(faces, axes, strict=True)
        ]
        self._sway = HeadSway(picture.shape, axes) if axes else None

    def frame(
        self, mouth_open: FloatArray, mouth_wide: FloatArray, blink: FloatArray, head: FloatArray
    ) -> Picture:
        """One value per face, `head` of shape (faces, 5); see `Motion`. Returns RGB (height, width, 3)."""
        frame = self._picture.copy()
        for index, (mouth, eyes) in enumerate(zip(self._mouths, self._eyes, strict=True)):
            mouth.draw(frame, float(mouth_open[index]), float(mouth_wide[index]))
            for eye in eyes:
                eye.draw(frame, float(blink[index]))
        if self._sway:
            self._sway.draw(frame, head)
        return frame
