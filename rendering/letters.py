"""Letters set in a line: a flat picture of the word before any warp, larger than the final one."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PADDING = 0.75  # heights of a capital letter, on each side: room for shadows, outlines and glow


@dataclass(frozen=True)
class Letters:
    """The flat word.

    `fill`: grey, uint8, (h, w), the share of each pixel that the letters cover, 255 = all; `unit`: height of a capital
    letter in pixels; `ends`: for each character, the x where its advance ends; `box`: left, top, right, bottom of what
    is not 0.
    """

    fill: np.ndarray
    unit: float
    ends: tuple[float, ...]
    box: tuple[int, int, int, int]


def set_letters(
    font: ImageFont.FreeTypeFont, text: str, *, unit: float, spacing: float = 0.0, bounce: np.ndarray | None = None
) -> Letters:
    """Draw `text` in one line.

    Args:
        font: opened at the size at which a capital letter is `unit` pixels high.
        spacing: pixels added after each letter; 0 keeps the font's own setting, kerning and joins included.
        bounce: for each letter the pixels by which it sits lower than the base line, or None.

    Raises:
        ValueError: nothing is drawn for `text`.
    """
    pad = int(PADDING * unit) + 1
    if spacing == 0 and bounce is None:
        pieces = [(text, 0.0, 0.0)]
        ends = [font.getlength(text[:count]) for count in range(1, len(text) + 1)]
    else:
        advances = [font.getlength(character) + spacing for character in text]
        ends = list(np.cumsum(advances))
        drops = np.zeros(len(text)) if bounce is None else bounce
        pieces = [(c, end - advance, drop) for c, end, advance, drop in zip(text, ends, advances, drops, strict=True)]
    boxes = np.array([font.getbbox(piece, anchor="ls") for piece, _, _ in pieces], np.float64)
    shifts = np.array([(x, y, x, y) for _, x, y in pieces])
    left, top = np.floor((boxes + shifts)[:, :2].min(axis=0)) - pad
    right, bottom = np.ceil((boxes + shifts)[:, 2:].max(axis=0)) + pad
    picture = Image.new("L", (int(right - left), int(bottom - top)))
    draw = ImageDraw.Draw(picture)
    for piece, x, y in pieces:
        draw.text((x - left, y - top), piece, fill=255, font=font, anchor="ls")
    box = picture.getbbox()
    if box is None:
        raise ValueError(f"nothing is drawn for {text!r}")
    return Letters(np.array(picture), unit, tuple(float(end - left) for end in ends), box)
