"""Letters set in a line: a flat image of the word before any warp."""

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from rendering.config import LettersConfig

PADDING = 0.75  # heights of a capital letter, on each side: room for shadows, outlines and glow


@dataclass(frozen=True)
class Glyph:
    """A letter: `fill` grey uint8 (h, w); its corner is at (left, top) from the pen on the base line, in pixels."""

    fill: np.ndarray
    left: int
    top: int
    advance: float


class Face(Protocol):
    """What letters are set with, such as `fonts.SizedFace`."""

    unit: float

    def glyph(self, character: str) -> Glyph: ...

    def kerning(self, pair: str) -> float: ...


@dataclass(frozen=True)
class Letters:
    """The flat word.

    `fill`: grey, uint8, (h, w), the share of each pixel that the letters cover, 255 = all; `unit`: height of a capital
    letter in pixels; `box`: left, top, right, bottom of what is not 0; `spans`: left and right of each letter.
    """

    fill: np.ndarray
    unit: float
    box: tuple[int, int, int, int]
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Layout:
    """How letters are set; lengths in heights of a capital letter.

    `spacing` is added after each letter; `drops`: for each letter by how much it sits lower than the base line, or
    None; `initial`: size of the first letter over that of the others; it hangs a little below the base line.
    """

    spacing: float = 0.0
    drops: np.ndarray | None = None
    initial: float = 1.0


def draw_layout(text: str, config: LettersConfig, rng: np.random.Generator) -> Layout:
    """A random layout."""
    chances, size, drops = rng.random(3), rng.random(2), rng.random(len(text))
    spacing, initial = 0.0, 1.0
    if chances[0] < config.spacing:
        # Mostly a little wider; sometimes tighter, so that letters nearly touch.
        spacing = config.widest_spacing * size[0] ** 3 - 0.04
    if chances[1] < config.initial and len(text) > 2 and text[0].isupper():
        initial = 1.15 + 0.45 * size[1]
    return Layout(spacing, 0.3 * (drops - 0.5) if chances[2] < config.bounce else None, initial)


def draw_height(config: LettersConfig, rng: np.random.Generator) -> float:
    """A random height of a capital letter in the image, pixels."""
    height = config.height * math.exp(config.height_spread * rng.standard_normal())
    return min(max(height, config.min_height), config.max_height)


_PLAIN = Layout()


def set_letters(face: Face, text: str, layout: Layout = _PLAIN) -> Letters:
    """Draw `text` in one line.

    Raises:
        ValueError: nothing is drawn for `text`.
    """
    unit = face.unit
    placed: list[tuple[np.ndarray, int, int]] = []
    pen, before = 0.0, ""
    for number, character in enumerate(text):
        glyph = face.glyph(character)
        factor = layout.initial if number == 0 else 1.0
        fill, left, top = glyph.fill, glyph.left, glyph.top
        if factor != 1.0:
            fill = cv2.resize(fill, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
            left, top = round(left * factor), round((top + 0.3 * (1 - 1 / factor) * unit) * factor)
        if before:
            pen += face.kerning(before + character)
        drop = 0 if layout.drops is None else round(float(layout.drops[number]) * unit)
        placed.append((fill, round(pen) + left, top + drop))
        pen += glyph.advance * factor + layout.spacing * unit
        before = character
    inked = [(fill, x, y) for fill, x, y in placed if fill.size > 1]
    if not inked:
        raise ValueError(f"nothing is drawn for {text!r}")
    pad = int(PADDING * unit) + 1
    low_x, low_y = min(x for _, x, _ in inked), min(y for _, _, y in inked)
    width = max(x + fill.shape[1] for fill, x, _ in inked) - low_x
    height = max(y + fill.shape[0] for fill, _, y in inked) - low_y
    image = np.zeros((height + 2 * pad, width + 2 * pad), np.uint8)
    for fill, x, y in inked:
        top, left = y - low_y + pad, x - low_x + pad
        area = image[top : top + fill.shape[0], left : left + fill.shape[1]]
        np.maximum(area, fill, out=area)
    spans = tuple((x - low_x + pad, x - low_x + pad + fill.shape[1]) for fill, x, _ in placed)
    return Letters(image, unit, (pad, pad, pad + width, pad + height), spans)
