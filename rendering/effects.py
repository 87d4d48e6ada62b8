"""What is done to the letters: how they are filled, and what lies under them.

The letters of the mask are `stroke`: the fill, or the line where letters are drawn by their outline alone. What lies
under them (an outline of another colour, shadow, sides, glow) is no text. Lengths are in heights of a capital letter.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from rendering.colours import draw_contrasting, luminance, with_luminance
from rendering.config import EffectsConfig
from rendering.letters import PADDING, Letters


@dataclass(frozen=True)
class Style:
    """The effects of one word; 0 or None where there is none."""

    outline: float = 0.0
    hollow: float = 0.0
    shadow: tuple[float, float, float, float] | None = None  # x, y, softness, opacity
    extrusion: tuple[float, float] | None = None  # x, y
    glow: float = 0.0
    emboss: float = 0.0
    gradient: float = 0.0  # angle, radians
    two_colours: str = ""  # "lines" or "letters"
    worn: float = 0.0

    @property
    def has_under(self) -> bool:
        """Whether anything lies under the letters."""
        return bool(self.outline or self.shadow or self.extrusion or self.glow)

    @property
    def has_one_colour(self) -> bool:
        """Whether every pixel of the letters has the same colour."""
        return not (self.emboss or self.gradient or self.two_colours or self.worn)


def draw_style(config: EffectsConfig, rng: np.random.Generator) -> Style:
    """Random effects by the probabilities of `config`."""
    chance = rng.random(9)
    size = rng.random(9)
    angle = rng.uniform(0, 2 * np.pi, size=2)
    reach = 0.04 + 0.12 * size[2]
    hollow = 0.06 + 0.05 * size[1] if chance[1] < config.hollow else 0.0
    shadow = None
    if chance[2] < config.shadow:
        softness = 0.0 if size[7] < 0.4 else 0.02 + 0.1 * size[7]
        shadow = (reach * np.cos(angle[0]), reach * abs(np.sin(angle[0])), softness, 0.4 + 0.6 * size[8])
    extrusion = None
    if chance[3] < config.extrusion and shadow is None:
        depth = 0.06 + 0.16 * size[3]
        extrusion = (depth * np.cos(angle[0]), depth * np.sin(angle[0]))
    return Style(
        outline=0.03 + 0.07 * size[0] if chance[0] < config.outline and not hollow else 0.0,
        hollow=hollow,
        shadow=shadow,
        extrusion=extrusion,
        glow=0.08 + 0.15 * size[4] if chance[4] < config.glow else 0.0,
        emboss=0.25 + 0.5 * size[5] if chance[5] < config.emboss and not hollow else 0.0,
        gradient=angle[1] if chance[6] < config.gradient else 0.0,
        two_colours=("lines" if size[7] < 0.4 else "letters") if chance[7] < config.two_colours else "",
        worn=0.15 + 0.35 * size[8] if chance[8] < config.worn else 0.0,
    )


def letter_stroke(letters: Letters, style: Style) -> np.ndarray:
    """What counts as text, uint8 (h, w), 255 = text: the fill, or the line of hollow letters."""
    if not style.hollow:
        return letters.fill
    width = max(1, round(style.hollow * letters.unit / 2))
    return cv2.dilate(letters.fill, _disc(width)) - cv2.erode(letters.fill, _disc(width))


def paint_fill(
    letters: Letters, style: Style, colour: np.ndarray, texture: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Colours of the letters, float32, (h, w, 3), defined outside the letters too, so that a warp mixes nothing in.

    Args:
        texture: uneven paint, float32 in [0, 1], at least as large as the letters.
    """
    height, width = letters.fill.shape
    left, top, right, bottom = letters.box
    second = _second_colour(colour, rng)
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = colour
    if style.gradient:
        x = (np.arange(width, dtype=np.float32) - left) / max(right - left, 1)
        y = (np.arange(height, dtype=np.float32) - top) / max(bottom - top, 1)
        share = 0.5 + (x - 0.5) * np.cos(style.gradient) + (y[:, None] - 0.5) * np.sin(style.gradient)
        canvas += np.clip(share, 0, 1)[..., None] * (second - colour).astype(np.float32)
    if style.two_colours == "lines":
        canvas[int(top + (0.35 + 0.3 * rng.random()) * (bottom - top)) :] = second
    elif style.two_colours == "letters":
        start = 0
        for number, end in enumerate(letters.ends):
            if number % 2:
                canvas[:, start : round(end)] = second
            start = round(end)
    if style.worn:
        shade = 1 - style.worn * texture[:height, :width, None]
        canvas *= shade
    if style.emboss:
        step = max(1, round(0.04 * letters.unit))
        fill = letters.fill.astype(np.float32)
        edge = style.emboss * 0.6 * (fill - np.roll(fill, (step, step), (0, 1)))
        edge -= style.emboss * 0.6 * (fill - np.roll(fill, (-step, -step), (0, 1)))
        canvas += edge[..., None]
    return np.clip(canvas, 0, 255)


def paint_under(letters: Letters, style: Style, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What lies under the letters: RGB times opacity from 0 to 255, and the opacity from 0 to 1; float32, (h, w, 4)."""
    unit = letters.unit
    fill = letters.fill
    layer = np.zeros((*fill.shape, 4), np.float32)
    edge = draw_contrasting(colour, rng)
    dark = with_luminance(edge, 0.1 * float(rng.random()))
    side = with_luminance(colour, float(luminance(colour)) * (0.25 + 0.4 * float(rng.random())))
    body = cv2.dilate(fill, _disc(max(1, round(style.outline * unit)))) if style.outline else fill
    if style.glow:
        halo = cv2.dilate(body, _disc(max(1, round(0.4 * style.glow * unit))))
        _lay(layer, edge, _softened(halo, style.glow * unit / 2) * 0.8)
    if style.shadow:
        x, y, softness, opacity = style.shadow
        _lay(layer, dark, _softened(_moved(body, x * unit, y * unit), softness * unit) * opacity)
    if style.extrusion:
        _lay(layer, side, _swept(body, style.extrusion[0] * unit, style.extrusion[1] * unit) / np.float32(255))
    if style.outline:
        _lay(layer, edge, body / np.float32(255))
    return layer


def _second_colour(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that goes with `colour` and is about as bright."""
    other = rng.permutation(colour) if rng.random() < 0.5 else colour * rng.uniform(0.5, 1.2, size=3)
    ground = float(luminance(colour))
    return with_luminance(np.clip(other, 1, 255), float(np.clip(ground + rng.uniform(-0.15, 0.15), 0, 1)))


def _lay(layer: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> None:
    """Put `colour` with `opacity` (h, w), 0 to 1, on top of `layer`, in place."""
    layer *= 1 - opacity[..., None]
    layer += opacity[..., None] * np.append(colour, 1.0).astype(np.float32)


def _softened(alpha: np.ndarray, sigma: float) -> np.ndarray:
    """`alpha` (uint8) as opacity from 0 to 1, blurred by `sigma` pixels."""
    opacity = alpha.astype(np.float32) / 255
    return cv2.GaussianBlur(opacity, (0, 0), sigma) if sigma > 0.3 else opacity


def _moved(alpha: np.ndarray, x: float, y: float) -> np.ndarray:
    """`alpha` moved by (x, y) pixels; the padding is wider than any move."""
    limit = PADDING * 0.9
    height, width = alpha.shape
    assert abs(x) < limit * width and abs(y) < limit * height
    return np.roll(alpha, (round(y), round(x)), (0, 1))


def _swept(alpha: np.ndarray, x: float, y: float) -> np.ndarray:
    """All that `alpha` covers on its way by (x, y) pixels."""
    steps = max(1, round(max(abs(x), abs(y))))
    swept = alpha
    for step in range(1, steps + 1):
        swept = np.maximum(swept, _moved(alpha, x * step / steps, y * step / steps))
    return swept


@lru_cache(maxsize=64)
def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
