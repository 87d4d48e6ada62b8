"""The renderer: word `index` of seed `seed`, as a picture with its exact mask.

Every concern draws from a random stream of its own: the same index with another kind of background, or with another
salt for one stream, keeps the letters, their place and everything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np

from rendering.backgrounds import Backgrounds
from rendering.blending import blend
from rendering.colours import draw_letter_colour
from rendering.config import BACKGROUND_KINDS, RenderConfig
from rendering.degradation import degrade
from rendering.effects import Style, draw_style, lay_under, letter_stroke, paint_fill
from rendering.fonts import FontBook, Typeface, find_families
from rendering.geometry import Warp, draw_warp
from rendering.letters import Letters, set_letters
from rendering.words import WordSource
from utils import UserError

_DETAIL = 1.25  # the flat word is at least this much larger than the final one, so that the warp seldom enlarges
# Ems in pixels that fonts are opened at: few, as a font's first word at a new size costs several times a later one.
_FONT_SIZES = np.array([20, 28, 40, 56, 80, 112, 156])


class Stream(IntEnum):
    """The concerns that draw by themselves; the numbers are part of what a seed means."""

    WORD = 0
    FONT = 1
    LAYOUT = 2
    GEOMETRY = 3
    EFFECTS = 4
    COLOURS = 5
    BACKGROUND_KIND = 6
    BACKGROUND = 7
    DEGRADATION = 8


@dataclass(frozen=True)
class RenderedWord:
    """A word: `image` uint8 RGB (h, w, 3); `mask` uint8 (h, w), 255 = text; `text` as drawn, case kept."""

    image: np.ndarray
    mask: np.ndarray
    text: str
    family: str
    background: str


@dataclass(frozen=True)
class _Drawing:
    """The letters of a word before they meet a background. `alpha`: their share of each pixel, uint8 (h, w)."""

    text: str
    family: str
    letters: Letters
    style: Style
    warp: Warp
    alpha: np.ndarray


class WordRenderer:
    """Renders words. May be pickled and used in any process: a word depends on config, seed and index alone.

    Args:
        config: how words look.

    Raises:
        UserError: no font, no word, no photograph where they are asked for.
    """

    def __init__(self, config: RenderConfig | None = None) -> None:
        self.config = config or RenderConfig()
        self.fonts = FontBook(find_families(self.config.fonts))
        self.words = WordSource(self.config.words)
        self.backgrounds = Backgrounds(self.config, self.fonts, self.words)

    def render(
        self,
        seed: int,
        index: int,
        *,
        text: str | None = None,
        background: str | None = None,
        salts: Mapping[Stream, int] | None = None,
        difficulty: float | None = None,
    ) -> RenderedWord:
        """Render word `index` of `seed`.

        Args:
            text: write this instead of a drawn text.
            background: use this kind instead of a drawn one; the letters stay.
            salts: another number for a stream draws that concern anew and leaves the others.
            difficulty: of this word, 0 to 1; None: the one of the config.

        Raises:
            UserError: no font can draw `text`, or `background` is no kind.
            ValueError: `difficulty` is not between 0 and 1.
        """
        salts, config = salts or {}, self.config
        if difficulty is not None:
            config = config.with_difficulty(difficulty)
        drawing = self._draw_letters(seed, index, text, salts, config)
        kind = background or self.backgrounds.draw_kind(_stream(seed, index, Stream.BACKGROUND_KIND, salts))
        return self._finish(drawing, kind, seed, index, salts, config)

    def render_on_backgrounds(
        self, seed: int, index: int, kinds: Sequence[str] | None = None, *, text: str | None = None
    ) -> dict[str, RenderedWord]:
        """The same word, with the same letters in the same place, on each kind of background.

        Args:
            kinds: kinds to use; None: all, `photo` only where there are photographs.
        """
        if kinds is None:
            kinds = [kind for kind in BACKGROUND_KINDS if kind != "photo" or self.config.photos]
        drawing = self._draw_letters(seed, index, text, {}, self.config)
        return {kind: self._finish(drawing, kind, seed, index, {}, self.config) for kind in kinds}

    def _draw_letters(
        self, seed: int, index: int, text: str | None, salts: Mapping[Stream, int], config: RenderConfig
    ) -> _Drawing:
        word_rng = _stream(seed, index, Stream.WORD, salts)
        font_rng = _stream(seed, index, Stream.FONT, salts)
        text = self.words.draw(word_rng) if text is None else text
        typeface = self.fonts.choose(text, font_rng)
        height, letters = self._set(text, typeface, _stream(seed, index, Stream.LAYOUT, salts))
        style = draw_style(config.effects, _stream(seed, index, Stream.EFFECTS, salts))
        warp = draw_warp(letters, height, config, _stream(seed, index, Stream.GEOMETRY, salts))
        alpha = warp.apply(letter_stroke(letters, style))
        return _Drawing(text, typeface.family, letters, style, warp, alpha)

    def _set(self, text: str, typeface: Typeface, rng: np.random.Generator) -> tuple[float, Letters]:
        """The height of a capital letter that the picture should have, and the flat word."""
        settings = self.config.letters
        height = settings.height * np.exp(settings.height_spread * rng.normal())
        height = float(np.clip(height, settings.min_height, settings.max_height))
        chances, spread = rng.random(3), rng.random(len(text))
        share = self.fonts.capital_height(typeface)
        wanted = _DETAIL * height / share
        size = int(_FONT_SIZES[min(int(np.searchsorted(_FONT_SIZES, wanted)), len(_FONT_SIZES) - 1)])
        unit = size * share
        spacing = 0.0
        if chances[0] < settings.spacing:
            # Mostly a little wider; sometimes tighter, so that letters nearly touch.
            spacing = unit * (settings.widest_spacing * chances[1] ** 3 - 0.04)
        bounce = 0.3 * unit * (spread - 0.5) if chances[2] < settings.bounce else None
        letters = set_letters(self.fonts.open(typeface, size), text, unit=unit, spacing=spacing, bounce=bounce)
        return height, letters

    def _finish(
        self,
        drawing: _Drawing,
        kind: str,
        seed: int,
        index: int,
        salts: Mapping[Stream, int],
        config: RenderConfig,
    ) -> RenderedWord:
        if kind not in BACKGROUND_KINDS:
            raise UserError(f"background: {kind!r} is none of {', '.join(BACKGROUND_KINDS)}")
        picture = self.backgrounds.make(kind, drawing.warp, _stream(seed, index, Stream.BACKGROUND, salts))
        picture = _paint(drawing, picture, config, _stream(seed, index, Stream.COLOURS, salts))
        rng = _stream(seed, index, Stream.DEGRADATION, salts)
        image = degrade(picture, drawing.warp.unit, config, rng)
        mask = drawing.alpha
        if config.output.mask == "binary":
            mask = np.where(mask > 127, np.uint8(255), np.uint8(0))
        return RenderedWord(image, mask, drawing.text, drawing.family, kind)


def _paint(drawing: _Drawing, picture: np.ndarray, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """The letters, and what lies under them, on the background."""
    letters, style, warp = drawing.letters, drawing.style, drawing.warp
    share = drawing.alpha * np.float32(1 / 255)
    picture, darkest, lightest = _make_room(picture, drawing.alpha, config.colours.min_contrast)
    colour = draw_letter_colour(darkest, lightest, config, rng)
    if style.has_under:
        picture = lay_under(picture, letters, style, warp, colour, rng)
    fill = paint_fill(letters, style, warp, colour, rng)
    return blend(picture, fill, share)


def _make_room(picture: np.ndarray, alpha: np.ndarray, contrast: float) -> tuple[np.ndarray, float, float]:
    """Flatten a background so restless that no colour would differ by `contrast` from all that is behind the letters.

    Returns:
        the background, and the luminance between which nine tenths of it lie behind the letters.
    """
    behind = np.sort(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[alpha > 127][::3]) / 255
    if not behind.size:
        behind = np.array([float(picture.mean()) / 255])
    darkest, lightest = float(behind[behind.size // 20]), float(behind[-1 - behind.size // 20])
    # Flattening towards the middle of the range leaves room on the larger side.
    middle, spread = (darkest + lightest) / 2, (lightest - darkest) / 2
    allowed = max(max(middle, 1 - middle) - contrast, 0.02)
    if spread > allowed:
        factor = allowed / spread
        picture = np.float32(255 * middle * (1 - factor)) + np.float32(factor) * picture
        darkest, lightest = middle - allowed, middle + allowed
    return picture, min(max(darkest, 0.0), 1.0), min(max(lightest, 0.0), 1.0)


def _stream(seed: int, index: int, stream: Stream, salts: Mapping[Stream, int]) -> np.random.Generator:
    # A counter-based generator: other keys and counters are other streams, and making one costs microseconds.
    counter = np.array([0, 0, int(stream), salts.get(stream, 0)], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=counter))
