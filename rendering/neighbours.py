"""Other text around the word, on the same surface: it is warped with the word and cut by the crop."""

from dataclasses import dataclass

import numpy as np

from rendering.blending import overlap
from rendering.letters import Letters

_REACH = 1.6  # heights of a capital letter around the word
_SIDES = np.array([0.3, 0.6, 0.3, 0.6])  # chance of text left, above, right, below


@dataclass(frozen=True)
class Neighbours:
    """`fill`: grey uint8 (h, w), as in `Letters`; `centre`: the middle of the word's letters in it."""

    fill: np.ndarray
    centre: tuple[float, float]


def place_neighbours(letters: Letters, other: Letters, space: np.ndarray, rng: np.random.Generator) -> Neighbours:
    """Set pieces of `other` around the word.

    Args:
        space: left, top, right, bottom space in the image, heights of a capital letter: most of the other text
            begins within it and is seen.
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
    return Neighbours(canvas, (reach + width / 2, reach + height / 2))
