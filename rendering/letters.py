"""Letters set in a line: a flat image of the word before any warp."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from rendering.config import LettersConfig, RenderConfig
from rendering.fonts import Face

PADDING = 0.75  # heights of a capital letter, on each side: room for shadows, outlines and glow
MAX_HEIGHT = 80.0  # pixels, of a capital letter
_MIN_HEIGHT = 11.0
_WIDEST_SPACING = 0.5


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

    `spacing` is added after each letter; `drops`: by how much each letter sits below the baseline, or None; `initial`:
    size of the first letter over that of the others; it hangs a little below the baseline.
    """

    spacing: float = 0.0
    drops: np.ndarray | None = None
    initial: float = 1.0


def sample_layout(text: str, config: RenderConfig, rng: np.random.Generator) -> Layout:
    """Sample a layout."""
    chances, size, drops = rng.random(3), rng.random(2), rng.random(len(text))
    spacing, initial = 0.0, 1.0
    if chances[0] < config.chance("spacing"):
        # Mostly a little wider; sometimes tighter, so that letters nearly touch.
        spacing = _WIDEST_SPACING * size[0] ** 3 - 0.04
    if chances[1] < config.chance("initial") and len(text) > 2 and text[0].isupper():
        initial = 1.15 + 0.45 * size[1]
    return Layout(spacing, 0.3 * (drops - 0.5) if chances[2] < config.chance("bounce") else None, initial)


def sample_height(config: LettersConfig, rng: np.random.Generator) -> float:
    """Sample the height of a capital letter in the image, pixels."""
    height = config.height * math.exp(config.height_spread * rng.standard_normal())
    return min(max(height, _MIN_HEIGHT), MAX_HEIGHT)


_PLAIN = Layout()


def set_letters(face: Face, text: str, height: float, layout: Layout = _PLAIN) -> Letters:
    """Draw `text` in one line.

    Args:
        text: the face draws something of it.
        height: of a capital letter, pixels; at most the one that the face is drawn in.
    """
    placed: list[tuple[np.ndarray, int, int]] = []
    pen, before = 0.0, ""
    for number, character in enumerate(text):
        glyph = face.glyph(character)
        factor = layout.initial if number == 0 else 1.0
        fill, left, top = glyph.fill, glyph.left, glyph.top
        if factor != 1.0:
            fill = cv2.resize(fill, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
            left, top = round(left * factor), round((top + 0.3 * (1 - 1 / factor) * face.unit) * factor)
        if before:
            pen += face.kerning(before + character)
        drop = 0 if layout.drops is None else round(float(layout.drops[number]) * face.unit)
        placed.append((fill, round(pen) + left, top + drop))
        pen += glyph.advance * factor + layout.spacing * face.unit
        before = character
    inked = [each for each in placed if each[0].size > 1]
    low_x, low_y = min(x for _, x, _ in inked), min(y for _, _, y in inked)
    high_x = max(x + fill.shape[1] for fill, x, _ in inked)
    high_y = max(y + fill.shape[0] for fill, _, y in inked)
    line = np.zeros((high_y - low_y, high_x - low_x), np.uint8)
    for fill, x, y in inked:
        area = line[y - low_y : y - low_y + fill.shape[0], x - low_x : x - low_x + fill.shape[1]]
        cv2.max(area, fill, dst=area)
    scale = min(height / face.unit, 1.0)
    if scale < 1:
        size = max(1, round(line.shape[1] * scale)), max(1, round(line.shape[0] * scale))
        line = cv2.resize(line, size, interpolation=cv2.INTER_AREA)
    pad = int(PADDING * face.unit * scale) + 1
    box = (pad, pad, pad + line.shape[1], pad + line.shape[0])
    spans = tuple(((x - low_x) * scale + pad, (x - low_x + fill.shape[1]) * scale + pad) for fill, x, _ in placed)
    line = cv2.copyMakeBorder(line, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    return Letters(line, face.unit * scale, box, spans)
