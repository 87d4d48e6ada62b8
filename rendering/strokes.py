"""The part of the letters that is text: the fill, or the line, dots or stencil that they are drawn with."""

from functools import lru_cache

import cv2
import numpy as np

from rendering.letters import Letters

_BRIDGED = frozenset("ABCDGOPQRSUabdegopq0689")  # letters that a stencil holds together by bridges


def hollow(letters: Letters, width: float) -> np.ndarray:
    """Return the outlines of letters, `width` heights of a capital letter wide, uint8 (h, w)."""
    radius = max(1, round(width * letters.unit / 2))
    return cv2.dilate(letters.fill, disc(radius)) - cv2.erode(letters.fill, disc(radius))


def dotted(letters: Letters, rows: float) -> np.ndarray:
    """Return the letters as dots in a grid with `rows` rows to a capital letter, uint8 (h, w).

    Letters stay whole where the grid is too coarse for them.
    """
    pitch = max(3, round(letters.unit / rows))
    height, width = letters.fill.shape
    cells = cv2.resize(letters.fill, (max(1, width // pitch), max(1, height // pitch)), interpolation=cv2.INTER_AREA)
    lit = (cells > 105).astype(np.uint8)
    missed = np.abs(cells.astype(np.float32) - 255 * lit).sum()
    if missed > 0.5 * cells.sum(dtype=np.float32):
        return letters.fill
    dots = np.zeros((height, width), np.uint8)
    grid = np.kron(lit, _dot(pitch))
    dots[: grid.shape[0], : grid.shape[1]] = grid[:height, :width]
    return dots


def stencilled(letters: Letters, text: str, width: float) -> np.ndarray:
    """Cut the bridges of a stencil, `width` heights of a capital letter wide, out of letters: uint8 (h, w)."""
    cut = letters.fill.copy()
    half = max(1, round(width * letters.unit)) / 2
    for character, (left, right) in zip(text, letters.spans, strict=True):
        if character in _BRIDGED and right - left > 6 * half:
            middle = (left + right) / 2
            cut[:, round(middle - half) : round(middle + half)] = 0
    return cut


@lru_cache(maxsize=64)
def disc(radius: int) -> np.ndarray:
    """Return a round kernel for dilation and erosion."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


@lru_cache(maxsize=64)
def _dot(pitch: int) -> np.ndarray:
    """Return a dot in a cell of the grid, uint8 (pitch, pitch)."""
    detail = 8
    large = np.zeros((pitch * detail, pitch * detail), np.uint8)
    cv2.circle(large, (pitch * detail // 2, pitch * detail // 2), round(0.43 * pitch * detail), 255, -1)
    return cv2.resize(large, (pitch, pitch), interpolation=cv2.INTER_AREA)
