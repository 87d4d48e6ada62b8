"""Letters set in a line: a flat picture of the word before any warp, larger than the final one."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PADDING = 0.75  # heights of a capital letter, on each side: room for shadows, outlines and glow
_ROOM = 1.0  # ems around the word on the first canvas


@dataclass(frozen=True)
class Letters:
    """The flat word.

    `fill`: grey, uint8, (h, w), the share of each pixel that the letters cover, 255 = all; `unit`: height of a capital
    letter in pixels; `box`: left, top, right, bottom of what is not 0.
    """

    fill: np.ndarray
    unit: float
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
    if spacing == 0 and bounce is None:
        pieces = [(text, 0.0, 0.0)]
    else:
        advances = [font.getlength(character) + spacing for character in text]
        starts = np.concatenate([[0.0], np.cumsum(advances)])
        drops = np.zeros(len(text)) if bounce is None else bounce
        pieces = list(zip(text, starts[:-1].tolist(), drops.tolist(), strict=True))
    # Asking a font for its extents costs as much as drawing, so the canvas is first taken large enough.
    room = _ROOM
    while True:
        picture = Image.new(
            "L", (int((2 * room + 1.1 * len(text)) * font.size + pieces[-1][1]), int(2 * room * font.size))
        )
        draw = ImageDraw.Draw(picture)
        for piece, x, y in pieces:
            draw.text((room * font.size + x, 1.2 * room * font.size + y), piece, fill=255, font=font, anchor="ls")
        box = picture.getbbox()
        if box is None:
            raise ValueError(f"nothing is drawn for {text!r}")
        if box[0] > 0 and box[1] > 0 and box[2] < picture.width and box[3] < picture.height:
            break
        room *= 2
    pad = int(PADDING * unit) + 1
    fill = np.array(picture.crop((box[0] - pad, box[1] - pad, box[2] + pad, box[3] + pad)))
    return Letters(fill, unit, (pad, pad, pad + box[2] - box[0], pad + box[3] - box[1]))
