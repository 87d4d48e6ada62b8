"""Painting of letters on their background, in colours that contrast with it."""

from dataclasses import dataclass

import cv2
import numpy as np

from rendering.blending import blend
from rendering.colours import sample_contrasting_colour, sample_letter_colour, sample_light_colour
from rendering.config import RenderConfig
from rendering.effects import Style, draw_relief, draw_under, paint_fill
from rendering.geometry import Warp
from rendering.letters import Letters

_PANEL = 0.22  # share of the background's light that is left behind shining letters


@dataclass(frozen=True)
class Drawing:
    """The letters of a word before they are painted on a background.

    `stroke`: the part of the flat word that is text; `alpha`: its share of each pixel of the image, uint8 (h, w);
    `neighbours`: the same for other text, or None; `own_colour`: whether that text has the letters' colour.
    """

    text: str
    family: str
    letters: Letters
    stroke: np.ndarray
    style: Style
    warp: Warp
    alpha: np.ndarray
    neighbours: np.ndarray | None
    own_colour: bool


def paint(drawing: Drawing, image: np.ndarray, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Paint the letters, what lies under them and the text beside them on the background.

    Args:
        image: the background, float32 RGB (h, w, 3), 0 to 255.
    """
    letters, style, warp = drawing.letters, drawing.style, drawing.warp
    share = drawing.alpha * np.float32(1 / 255)
    image, darkest, lightest = _make_room(image, drawing.alpha, config.contrast)
    if style.shining:
        image = image * np.float32(_PANEL)
        colour = sample_light_colour(rng)
    else:
        colour = sample_letter_colour(darkest, lightest, config, rng)
    ground = image
    if drawing.neighbours is not None:
        other = (
            colour if drawing.own_colour else sample_contrasting_colour(np.full(3, 127.5 * (darkest + lightest)), rng)
        )
        image = blend(image, other, drawing.neighbours * np.float32(1 / 255))
    if style.relief:
        return draw_relief(ground, letters, style, warp, share, rng)
    if style.has_under:
        image = draw_under(image, letters, drawing.stroke, style, warp, colour, rng)
    fill = paint_fill(letters, style, warp, colour, ground, rng)
    return blend(image, fill, share)


def _make_room(image: np.ndarray, alpha: np.ndarray, contrast: float) -> tuple[np.ndarray, float, float]:
    """Flatten a background where no colour would differ by `contrast` from everything behind the letters.

    Returns:
        the background, and the luminance between which nine tenths of the pixels behind the letters lie.
    """
    behind = np.sort(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[alpha > 127][::3]) / 255
    if not behind.size:
        behind = np.array([float(image.mean()) / 255])
    darkest, lightest = float(behind[behind.size // 20]), float(behind[-1 - behind.size // 20])
    # Flattening towards the middle leaves room on the larger side.
    middle, spread = (darkest + lightest) / 2, (lightest - darkest) / 2
    allowed = max(max(middle, 1 - middle) - contrast, 0.02)
    if spread > allowed:
        factor = allowed / spread
        image = np.float32(255 * middle * (1 - factor)) + np.float32(factor) * image
        darkest, lightest = middle - allowed, middle + allowed
    return image, min(max(darkest, 0.0), 1.0), min(max(lightest, 0.0), 1.0)
