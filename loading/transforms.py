"""Moves images and masks together, and brings both to the network's size.

Images are RGB, uint8, (H, W, 3); masks are grey, uint8, (H, W), 255 = text, and of the size of their image. Both are
moved with one matrix and one border rule. Matrices map points of the source to points of the result, in continuous
coordinates: an image of W x H pixels covers [0, W] x [0, H], the middle of its first pixel is (0.5, 0.5).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from loading.decoding import ImageArray, Mask, Size

# Makes inputs of the network's size of an image and its mask.
WordTransform = Callable[[ImageArray, Mask | None, Generator], tuple[ImageArray, Mask | None]]

MAX_SIDE = 4096  # pixels; larger images are brought down to it first (OpenCV's warps end at 32,767)


def rotation_matrix(degrees: float) -> np.ndarray:
    """Return the matrix (3, 3) of a rotation."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def fit_canvas(matrix: np.ndarray, size: Size) -> tuple[np.ndarray, Size]:
    """Move the result of `matrix` to the origin and return the size that holds all of it, sides up to MAX_SIDE.

    Args:
        size: height and width of the source.

    Returns:
        The matrix onto the new canvas, and the canvas' height and width.
    """
    height, width = size
    corners = np.array([[(0, 0), (width, 0), (width, height), (0, height)]], np.float64)
    moved = cv2.perspectiveTransform(corners, matrix)[0]
    left, top = moved.min(axis=0).tolist()
    extent_x, extent_y = np.ptp(moved, axis=0).tolist()
    new_width, new_height = (min(max(round(each), 1), MAX_SIDE) for each in (extent_x, extent_y))
    scale_x, scale_y = new_width / extent_x, new_height / extent_y
    onto = np.array([[scale_x, 0.0, -left * scale_x], [0.0, scale_y, -top * scale_y], [0.0, 0.0, 1.0]])
    return onto @ matrix, (new_height, new_width)


# From continuous coordinates to OpenCV's, where the middle of the first pixel is (0, 0), and back.
_TO_OPENCV = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])
_FROM_OPENCV = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])


def warp(
    image: np.ndarray, matrix: np.ndarray, size: Size, interpolation: int, outside: int | None = None
) -> np.ndarray:
    """Warp an image or mask by `matrix` onto a canvas of `size`; beyond it is the level `outside`, else its border."""
    matrix = _TO_OPENCV @ matrix @ _FROM_OPENCV
    border = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    options = {"dsize": (size[1], size[0]), "flags": interpolation, "borderMode": border, "borderValue": outside}
    if matrix[2, 0] or matrix[2, 1]:
        return cv2.warpPerspective(image, matrix, **options)
    return cv2.warpAffine(image, matrix[:2], **options)


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize bilinearly to height and width, without smoothing first, as the published pipeline does."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def warp_pair(
    image: ImageArray, mask: Mask | None, matrix: np.ndarray, size: Size, interpolation: int
) -> tuple[ImageArray, Mask | None]:
    """Warp an image and its mask in the same way, to the last pixel."""
    if mask is None:
        return warp(image, matrix, size, interpolation), None
    both = warp(cv2.merge((image, mask)), matrix, size, interpolation)  # four channels cost what three do
    return cv2.cvtColor(both, cv2.COLOR_RGBA2RGB), cv2.extractChannel(both, 3)


def limit_size(image: np.ndarray) -> np.ndarray:
    """Shrink sides over MAX_SIDE to it, each by itself."""
    height, width = image.shape[:2]
    if max(height, width) <= MAX_SIDE:
        return image
    return cv2.resize(image, (min(width, MAX_SIDE), min(height, MAX_SIDE)), interpolation=cv2.INTER_AREA)


@dataclass(frozen=True, kw_only=True)
class ResizeWord:
    """Resizes to the network's size: all that evaluation does, and the last step of training.

    Args:
        size: height and width.
        fit: "stretch" to it; or keep the aspect, "centre" with the borders replicated, or at the upper "left", the rest
            black and no text.
        random_aspect: half of the time, stretch to the full height and a random width from the height on, centred,
            instead; needs a generator.
    """

    size: Size = (32, 128)
    fit: Literal["stretch", "centre", "left"] = "stretch"
    random_aspect: bool = False

    def __call__(self, image: ImageArray, mask: Mask | None, rng: Generator | None) -> tuple[ImageArray, Mask | None]:
        size = self.sample_size(image.shape[:2], rng)
        return self.place(image, size), None if mask is None else self.place(mask, size)

    def sample_size(self, size: Size, rng: Generator | None) -> Size:
        """Sample height and width that an image of `size` gets inside the network's size."""
        if self.random_aspect and rng.random() < 0.5:
            height, width = self.size
            return height, int(rng.integers(min(height, width), width + 1))
        return self.fitted(size)

    def fitted(self, size: Size) -> Size:
        """Return height and width that an image of `size` gets inside the network's size, without a random aspect."""
        if self.fit == "stretch":
            return self.size
        scale = min(self.size[0] / size[0], self.size[1] / size[1])
        return (
            min(max(round(size[0] * scale), 1), self.size[0]),
            min(max(round(size[1] * scale), 1), self.size[1]),
        )

    def corner(self, size: Size) -> tuple[int, int]:
        """Return row and column of the network's input where an image that got `size` begins."""
        if self.fit != "centre":
            return 0, 0
        return (self.size[0] - size[0] + 1) // 2, (self.size[1] - size[1] + 1) // 2

    def place(self, image: np.ndarray, size: Size) -> np.ndarray:
        """Resize an image or mask to `size` and fill up to the network's."""
        image = resize(image, size)
        below, right = self.size[0] - size[0], self.size[1] - size[1]
        if not below and not right:
            return image
        border = cv2.BORDER_REPLICATE if self.fit == "centre" else cv2.BORDER_CONSTANT
        top, left = self.corner(size)
        return cv2.copyMakeBorder(image, top, below - top, left, right - left, border, value=0)


TURNS = (0, 90, 270)  # degrees counterclockwise


def turn(image: np.ndarray, degrees: int) -> np.ndarray:
    """Turn an image or mask counterclockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, degrees // 90)) if degrees else image


class View(NamedTuple):
    """An image and its mask, turned counterclockwise by some degrees."""

    image: ImageArray
    mask: Mask | None
    turned: int = 0


def views(image: ImageArray, mask: Mask | None, *, turn_tall: float | None = None) -> list[View]:
    """Return the views in which an image is read: as stored and, where it is tall, turned by 90 degrees both ways.

    Args:
        turn_tall: height / width above which an image is tall; None for no image.
    """
    tall = turn_tall is not None and image.shape[0] > turn_tall * image.shape[1]
    turns = TURNS if tall else TURNS[:1]
    return [View(turn(image, each), None if mask is None else turn(mask, each), each) for each in turns]
