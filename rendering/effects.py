"""Effects on letters: how they are filled, and what is drawn under them.

`stroke` is the part of the letters that is text in the mask. What is drawn under them (outlines of another colour,
shadow, sides, glow) is not text. Lengths are in heights of a capital letter.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from rendering.blending import blend, full, raised
from rendering.colours import luminance, sample_contrasting_colour, with_luminance
from rendering.config import RenderConfig
from rendering.geometry import Warp
from rendering.letters import PADDING, Letters
from rendering.textures import cut_wear

_BRIDGED = frozenset("ABCDGOPQRSUabdegopq0689")  # letters that a stencil holds together by bridges


@dataclass(frozen=True)
class Style:
    """The effects of one word; 0 or None where there is none."""

    outline: float = 0.0
    second_outline: float = 0.0
    hollow: float = 0.0
    shadow: tuple[float, float, float, float] | None = None  # x, y, softness, opacity
    extrusion: tuple[float, float] | None = None  # x, y
    glow: float = 0.0
    emboss: float = 0.0
    gradient: float = 0.0  # angle, radians
    two_colours: str = ""  # "lines" (upper and lower part) or "parts" (from left to right)
    worn: float = 0.0
    relief: tuple[float, float] | None = None  # strength, angle of the light in radians
    dots: float = 0.0  # rows to a capital letter
    stencil: float = 0.0
    shining: bool = False  # letters shine on a dark background

    @property
    def has_under(self) -> bool:
        """Return whether anything is drawn under the letters."""
        return bool(self.outline or self.shadow or self.extrusion or self.glow)


def sample_style(config: RenderConfig, rng: np.random.Generator) -> Style:
    """Sample effects by the probabilities of `config`."""
    chance, size = rng.random(9), rng.random(9)
    kinds, more = rng.random(5), rng.random(3)
    angle = 2 * np.pi * rng.random(2)
    if kinds[0] < config.chance("relief"):
        return Style(relief=(0.35 + 0.65 * size[0], angle[0]))
    if kinds[1] < config.chance("neon"):
        line = 0.05 + 0.05 * size[1] if more[0] < 0.5 else 0.0
        return Style(hollow=line, glow=0.15 + 0.25 * size[4], shining=True)
    if kinds[2] < config.chance("dots"):
        return Style(dots=9 + 5 * size[0], glow=0.1 if more[0] < 0.4 else 0.0, shining=more[1] < 0.8)
    if kinds[3] < config.chance("jersey"):
        return Style(outline=0.04 + 0.05 * size[0], second_outline=0.03 + 0.05 * size[1])
    reach = 0.04 + 0.12 * size[2]
    line = 0.06 + 0.05 * size[1] if chance[1] < config.chance("hollow") else 0.0
    shadow = None
    if chance[2] < config.chance("shadow"):
        softness = 0.0 if size[7] < 0.4 else 0.02 + 0.1 * size[7]
        shadow = (reach * np.cos(angle[0]), reach * abs(np.sin(angle[0])), softness, 0.4 + 0.6 * size[8])
    extrusion = None
    if chance[3] < config.chance("extrusion") and shadow is None:
        depth = 0.06 + 0.16 * size[3]
        extrusion = (depth * np.cos(angle[0]), depth * np.sin(angle[0]))
    return Style(
        outline=0.03 + 0.07 * size[0] if chance[0] < config.chance("outline") and not line else 0.0,
        hollow=line,
        shadow=shadow,
        extrusion=extrusion,
        glow=0.08 + 0.15 * size[4] if chance[4] < config.chance("glow") else 0.0,
        emboss=0.25 + 0.5 * size[5] if chance[5] < config.chance("emboss") and not line else 0.0,
        gradient=angle[1] if chance[6] < config.chance("gradient") else 0.0,
        two_colours=("lines" if size[7] < 0.4 else "parts") if chance[7] < config.chance("two_colours") else "",
        worn=0.15 + 0.35 * size[8] if chance[8] < config.chance("worn") else 0.0,
        stencil=0.05 + 0.05 * more[2] if kinds[4] < config.chance("stencil") and not line else 0.0,
    )


def letter_stroke(letters: Letters, text: str, style: Style) -> np.ndarray:
    """Return the part of the letters that is text, uint8 (h, w), 255 = text."""
    if style.hollow:
        return _hollow(letters, style.hollow)
    if style.dots:
        return _dotted(letters, style.dots)
    if style.stencil:
        return _stencilled(letters, text, style.stencil)
    return letters.fill


def _hollow(letters: Letters, width: float) -> np.ndarray:
    """Return the outlines of letters, `width` heights of a capital letter wide, uint8 (h, w)."""
    radius = max(1, round(width * letters.unit / 2))
    return cv2.dilate(letters.fill, disc(radius)) - cv2.erode(letters.fill, disc(radius))


def _dotted(letters: Letters, rows: float) -> np.ndarray:
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


def _stencilled(letters: Letters, text: str, width: float) -> np.ndarray:
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


def paint_fill(
    letters: Letters, style: Style, warp: Warp, colour: np.ndarray, ground: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the colours of the letters for the whole image, float32 (h, w, 3), or one colour (3,).

    Args:
        ground: the image before the letters, float32 (h, w, 3); it shows through worn paint.
    """
    size = (warp.size[1], warp.size[0])
    wear = cut_wear(size, rng) if style.worn else None
    fill = np.asarray(colour, np.float32)
    share = _second_share(letters, style, rng)
    if share is not None:
        fill = blend(fill, _second_colour(colour, rng), warp.apply(share))
    if wear is not None:
        fill = blend(fill, ground, np.float32(2 * style.worn) * wear)
    if style.emboss:
        relief = warp.apply(_edges(letters, style.emboss))
        fill = np.clip(raised(full(size, fill) if fill.ndim == 1 else fill, relief), 0, 255)
    return fill


def draw_relief(
    image: np.ndarray, letters: Letters, style: Style, warp: Warp, share: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw raised or engraved letters in the colour of the image, float32 (h, w, 3).

    Args:
        share: of each pixel that letters cover, float32 (h, w).
    """
    strength, angle = style.relief
    unit = letters.unit
    height = cv2.GaussianBlur(letters.fill, (0, 0), max(0.8, 0.035 * unit)).astype(np.float32)
    x, y = np.cos(angle) * 0.05 * unit, np.sin(angle) * 0.05 * unit
    slope = _moved(height, x, y) - _moved(height, -x, -y)
    # Light and shade are only readable on an even surface that is neither black nor white, and thin strokes have a
    # small slope of their own: it is scaled by its largest value.
    mean = image.mean(axis=(0, 1), dtype=np.float64)
    even = with_luminance(mean, min(max(float(luminance(mean)), 0.25), 0.75))
    image = cv2.addWeighted(image, 0.3, full(share.shape, even), 0.7, 0)
    slope = warp.apply(slope)
    peak = max(float(cv2.norm(slope, cv2.NORM_INF)), 1.0)
    inside = raised(image, np.float32(rng.uniform(-16, 16)) * share)
    return np.clip(raised(inside, slope * np.float32((25 + 115 * strength) / peak)), 0, 255)


def draw_under(
    image: np.ndarray,
    letters: Letters,
    stroke: np.ndarray,
    style: Style,
    warp: Warp,
    colour: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw what lies under letters of `colour` on the image, float32 (h, w, 3): glow, shadow, sides, outlines.

    Args:
        stroke: the part of the flat word that is text, from `letter_stroke`.
    """
    unit = letters.unit
    edge = sample_contrasting_colour(colour, rng)
    dark = with_luminance(edge, 0.1 * float(rng.random()))
    side = with_luminance(colour, float(luminance(colour)) * (0.25 + 0.4 * float(rng.random())))
    body = cv2.dilate(letters.fill, disc(max(1, round(style.outline * unit)))) if style.outline else letters.fill
    if style.glow:
        source = stroke if style.shining else body
        halo = cv2.dilate(source, disc(max(1, round(0.4 * style.glow * unit))))
        image = _laid(image, colour, 0.8, _softened(halo, style.glow * unit / 2), warp)
    if style.second_outline:
        second = cv2.dilate(body, disc(max(1, round(style.second_outline * unit))))
        image = _laid(image, colour, 1.0, second, warp)
    if style.shadow:
        x, y, softness, opacity = style.shadow
        image = _laid(image, dark, opacity, _softened(_moved(body, x * unit, y * unit), softness * unit), warp)
    if style.extrusion:
        image = _laid(image, side, 1.0, _swept(body, style.extrusion[0] * unit, style.extrusion[1] * unit), warp)
    if style.outline:
        image = _laid(image, edge, 1.0, body, warp)
    return image


def _second_share(letters: Letters, style: Style, rng: np.random.Generator) -> np.ndarray | None:
    """Return the share of a second colour in each pixel of the flat word, float32 (h, w), 0 to 1, or None."""
    height, width = letters.fill.shape
    left, top, right, bottom = letters.box
    if style.gradient:
        x = (np.arange(width, dtype=np.float32) - left) / max(right - left, 1) - 0.5
        y = (np.arange(height, dtype=np.float32)[:, None] - top) / max(bottom - top, 1) - 0.5
        return np.clip(0.5 + x * np.float32(np.cos(style.gradient)) + y * np.float32(np.sin(style.gradient)), 0, 1)
    if not style.two_colours:
        return None
    share = np.zeros((height, width), np.float32)
    if style.two_colours == "lines":
        share[int(top + (0.35 + 0.3 * rng.random()) * (bottom - top)) :] = 1
    else:
        pieces = int(rng.integers(2, 5))
        edges = np.linspace(left, right, pieces + 1).round().astype(int)
        for start, end in zip(edges[1::2], edges[2::2], strict=False):
            share[:, start:end] = 1
        if pieces % 2 == 0:
            share[:, edges[-2] :] = 1
    return share


def _edges(letters: Letters, strength: float) -> np.ndarray:
    """Return light on the upper left edges and shade on the lower right ones, float32 (h, w), -255 to 255."""
    step = max(1, round(0.04 * letters.unit))
    fill = letters.fill.astype(np.float32)
    return 0.6 * np.float32(strength) * (np.roll(fill, (-step, -step), (0, 1)) - np.roll(fill, (step, step), (0, 1)))


def _second_colour(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample a colour of about the luminance of `colour`."""
    other = rng.permutation(colour) if rng.random() < 0.5 else colour * rng.uniform(0.5, 1.2, size=3)
    ground = float(luminance(colour))
    return with_luminance(np.clip(other, 1, 255), float(np.clip(ground + rng.uniform(-0.15, 0.15), 0, 1)))


def _laid(image: np.ndarray, colour: np.ndarray, opacity: float, alpha: np.ndarray, warp: Warp) -> np.ndarray:
    """Blend `colour` over `image` where the warped flat `alpha` (uint8) covers it."""
    return blend(image, colour, warp.apply(alpha) * np.float32(opacity / 255))


def _softened(alpha: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(alpha, (0, 0), sigma) if sigma > 0.3 else alpha


def _moved(alpha: np.ndarray, x: float, y: float) -> np.ndarray:
    """Move `alpha` by (x, y) pixels; the padding is wider than any move."""
    assert max(abs(x) / alpha.shape[1], abs(y) / alpha.shape[0]) < 0.9 * PADDING
    return np.roll(alpha, (round(y), round(x)), (0, 1))


def _swept(alpha: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return everything that `alpha` covers while it moves by (x, y) pixels."""
    steps = max(1, round(max(abs(x), abs(y))))
    swept = alpha
    for step in range(1, steps + 1):
        swept = np.maximum(swept, _moved(alpha, x * step / steps, y * step / steps))
    return swept
