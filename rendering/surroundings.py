"""What is around the letters, which is no text in the mask.

Other text on the same surface is warped with the word and cut by the crop. Objects may stand in front of the letters:
poles, wires, leaves, the edge of something near.
"""

import math

import cv2
import numpy as np

from rendering.blending import blend, full, overlap
from rendering.colours import sample_background_colour, with_luminance
from rendering.letters import Letters
from rendering.textures import cut_texture

_REACH = 1.6  # heights of a capital letter around the word
_SIDES = np.array([0.3, 0.6, 0.3, 0.6])  # chance of text left, above, right, below
_VISIBLE = 0.55  # smallest share of each part of the letters that stays
_TRIES = 4


def place_neighbours(
    letters: Letters, other: Letters, space: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[float, float]]:
    """Set pieces of `other` around the word.

    Args:
        space: left, top, right, bottom space in the image, heights of a capital letter: most of the other text
            begins within it and is seen.

    Returns:
        grey uint8 (h, w), as in `Letters`, and the middle of the word's letters in it.
    """
    unit = letters.unit
    left, top, right, bottom = letters.box
    width, height = right - left, bottom - top
    reach = int(_REACH * unit)
    canvas = np.zeros((height + 2 * reach, width + 2 * reach), np.uint8)
    x, y, x_end, y_end = other.box
    piece = other.fill[y:y_end, x:x_end]
    chances, along, near = rng.random(4), rng.random(4), rng.random(4)
    sides = np.flatnonzero(chances < _SIDES)
    for side in sides if sides.size else [1 if chances[0] < 0.5 else 3]:
        upright = side % 2 == 1
        room = max(float(space[side]), 0.1 if upright else 0.2)
        gap = int(unit * ((0.04 if upright else 0.16) + near[side] * room))
        if upright:
            start = reach + round(width * along[side]) - round(piece.shape[1] * along[3 - side])
            line = reach - gap - piece.shape[0] if side == 1 else reach + height + gap
        else:
            start = reach - gap - piece.shape[1] if side == 0 else reach + width + gap
            line = reach + height - piece.shape[0]
        area, seen = overlap(canvas, piece, start, line)
        np.maximum(area, seen, out=area)
    return canvas, (reach + width / 2, reach + height / 2)


def occlude(
    image: np.ndarray, alpha: np.ndarray, unit: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw something in front of a part of the word; a part of every letter stays visible.

    Args:
        image: float32 RGB (h, w, 3), 0 to 255.
        alpha: share of each pixel that letters cover, uint8 (h, w).
        unit: height of a capital letter, pixels.

    Returns:
        image and alpha, unchanged where nothing fits.
    """
    kind = ("pole", "wires", "leaves", "edge")[int(rng.integers(4))]
    size = 1.0
    for _ in range(_TRIES):
        cover = _draw_cover(kind, alpha.shape, unit * size, rng)
        if _every_part_stays(alpha, cover, unit):
            break
        size *= 0.6
    else:
        return image, alpha
    share = cover * np.float32(1 / 255)
    occluder = _draw_occluder(kind, alpha.shape, rng)
    return blend(image, occluder, share), cv2.multiply(alpha, 255 - cover, scale=1 / 255)


def _draw_cover(kind: str, shape: tuple[int, int], unit: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the shape of the occluder, uint8 (h, w)."""
    height, width = shape
    cover = np.zeros(shape, np.uint8)
    if kind == "pole":
        _draw_bar(cover, rng.uniform(0, width), height / 2, rng.normal(90, 12), unit * rng.uniform(0.1, 0.4))
    elif kind == "wires":
        for _ in range(int(rng.integers(1, 4))):
            place = rng.random(2) * (width, height)
            _draw_bar(cover, *place, rng.uniform(0, 180), max(1.0, unit * rng.uniform(0.03, 0.1)))
    elif kind == "leaves":
        middle = np.array([rng.uniform(0, width), height * (rng.uniform(-0.1, 0.2) + (rng.random() < 0.5) * 0.9)])
        for _ in range(int(rng.integers(4, 14))):
            x, y = middle + rng.normal(0, 0.5, size=2) * unit
            length, angle = unit * rng.uniform(0.12, 0.35), rng.uniform(0, 180)
            cv2.ellipse(cover, ((x, y), (2 * length, length * rng.uniform(0.5, 1.0)), angle), 255, -1, cv2.LINE_AA)
    else:
        depth = unit * rng.uniform(0.15, 0.5)
        side, tilt, far = int(rng.integers(4)), rng.normal(0, 8), 4 * max(width, height)
        x, y = ((depth, height / 2), (width / 2, depth), (width - depth, height / 2), (width / 2, height - depth))[side]
        away = math.radians((180, 270, 0, 90)[side] + tilt)
        _draw_bar(
            cover, x + far / 2 * math.cos(away), y + far / 2 * math.sin(away), math.degrees(away) + 90, float(far)
        )
    return cover


def _draw_bar(cover: np.ndarray, x: float, y: float, degrees: float, thick: float) -> None:
    """Draw a bar `thick` pixels wide through (x, y) across the whole image, in place."""
    length = 4.0 * max(cover.shape)
    corners = cv2.boxPoints(((float(x), float(y)), (length, float(thick)), float(degrees)))
    cv2.fillConvexPoly(cover, np.round(corners * 16).astype(np.int32), 255, cv2.LINE_AA, shift=4)


def _draw_occluder(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw the surface of the occluder, float32 (h, w, 3)."""
    colour = sample_background_colour(rng)
    if kind == "leaves":
        colour = np.array([rng.uniform(30, 130), rng.uniform(80, 180), rng.uniform(20, 80)])
    elif kind == "wires" or rng.random() < 0.5:
        colour = with_luminance(colour, rng.uniform(0.02, 0.3))
    occluder = full(shape, colour)
    if kind == "wires":
        return occluder
    return blend(occluder, full(shape, with_luminance(colour, rng.uniform(0.0, 0.7))), cut_texture(shape, rng))


def _every_part_stays(alpha: np.ndarray, cover: np.ndarray, unit: float) -> bool:
    """Return whether enough is left of each connected part of the letters, and of each piece as wide as a letter."""
    ink = (alpha > 127).astype(np.uint8)
    count, labels = cv2.connectedComponents(ink, ltype=cv2.CV_32S)
    columns = (np.arange(alpha.shape[1]) / max(0.6 * unit, 4)).astype(np.int32)
    pieces = labels * (int(columns[-1]) + 1) + columns
    inked, free = ink > 0, (ink > 0) & (cover < 127)
    for numbers, number in ((labels, count), (pieces, int(pieces.max()) + 1)):
        before = np.bincount(numbers[inked], minlength=number)
        after = np.bincount(numbers[free], minlength=number)
        # Small pieces are dots and ends of letters, which may go.
        counted = before > 0.03 * unit * unit
        if (after[counted] < _VISIBLE * before[counted]).any():
            return False
    return True
