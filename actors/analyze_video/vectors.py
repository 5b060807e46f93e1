"""A picture as a vector of some 900 numbers, by which pictures are compared: 32 × 18 gray values and coarse colours."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from actors.analyze_video.frames import Small

Floats = NDArray[np.float64]

_THUMB: Final = (32, 18)
_COLOUR_THUMB: Final = (16, 9)
_COLOUR_WEIGHT: Final = 3.0
SIZE: Final = _THUMB[0] * _THUMB[1] + 2 * _COLOUR_THUMB[0] * _COLOUR_THUMB[1]
#: Of dot products: a difference of one gray level in all of the picture is 1.
UNIT: Final = 1.0 / (_THUMB[0] * _THUMB[1])


def thumb_of(small: Small) -> NDArray[np.uint8]:
    """The numbers of a picture as they are kept: `SIZE` bytes."""
    return np.concatenate(
        (
            cv2.resize(small.y, _THUMB, interpolation=cv2.INTER_AREA).ravel(),
            cv2.resize(small.u, _COLOUR_THUMB, interpolation=cv2.INTER_AREA).ravel(),
            cv2.resize(small.v, _COLOUR_THUMB, interpolation=cv2.INTER_AREA).ravel(),
        )
    ).astype(np.uint8)


def vector_of(thumb: NDArray[np.uint8]) -> Floats:
    """Gray values without their mean, and colours: what dot products are made of."""
    gray = _THUMB[0] * _THUMB[1]
    made = thumb.astype(np.float64)
    made[:gray] -= round(float(made[:gray].mean()))
    made[gray:] -= 128.0
    made[gray:] *= _COLOUR_WEIGHT
    return made
