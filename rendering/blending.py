"""Pixel arithmetic in OpenCV, several times faster than NumPy broadcast over three channels."""

import cv2
import numpy as np


def full(size: tuple[int, int], colour: np.ndarray) -> np.ndarray:
    """Return an image of one colour, float32 (h, w, 3); `size` is (height, width)."""
    pixel = np.asarray(colour, np.float32).reshape(1, 1, 3)
    return cv2.copyMakeBorder(pixel, 0, size[0] - 1, 0, size[1] - 1, cv2.BORDER_REPLICATE)


def blend(lower: np.ndarray, upper: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return `lower` where `share` is 0, `upper` where it is 1, and mixtures between.

    Args:
        lower, upper: float32 (h, w, 3), or a colour (3,).
        share: float32 (h, w), from 0 to 1.
    """
    lower, upper = (full(share.shape, each) if each.ndim == 1 else each for each in (lower, upper))
    return cv2.blendLinear(lower, upper, 1 - share, share)


def scaled(image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Multiply `image`, float32 (h, w, 3), by `factor`, float32 (h, w)."""
    return cv2.multiply(image, cv2.merge([factor, factor, factor]))


def raised(image: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Add `value`, float32 (h, w), to every channel of `image`, float32 (h, w, 3)."""
    return cv2.add(image, cv2.merge([value, value, value]))


def overlap(image: np.ndarray, piece: np.ndarray, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what of `image` and `piece` overlaps if the piece has its corner at (x, y), as views of both."""
    left, top = max(x, 0), max(y, 0)
    right, bottom = (
        max(min(x + piece.shape[1], image.shape[1]), left),
        max(min(y + piece.shape[0], image.shape[0]), top),
    )
    return image[top:bottom, left:right], piece[top - y : bottom - y, left - x : right - x]
