"""The renderer: word `index` of seed `seed`, as an image with its exact mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from loading.sampling import PlacedGenerator
from rendering.backgrounds import Backgrounds
from rendering.config import BACKGROUND_KINDS, RenderConfig
from rendering.degradation import degrade
from rendering.effects import letter_stroke, sample_style
from rendering.fonts import FontBook, Typeface, find_families, open_face
from rendering.geometry import Warp, sample_warp
from rendering.letters import Letters, sample_height, sample_layout, set_letters
from rendering.painting import Drawing, paint
from rendering.surroundings import occlude, place_neighbours
from rendering.words import WordSource
from utils import UserError

_DETAIL = 1.5  # size of the flat word over that of the final one, so that the warp seldom enlarges
_SAME_FACE = 0.85  # share of neighbouring text in the word's own face, size and colour


class Stream(IntEnum):
    """The concerns that have a random stream of their own, so that another background leaves the letters as they are.

    Changed numbers give other words for the same seed.
    """

    WORD = 0
    FONT = 1
    LAYOUT = 2
    GEOMETRY = 3
    EFFECTS = 4
    COLOURS = 5
    BACKGROUND_KIND = 6
    BACKGROUND = 7
    DEGRADATION = 8
    NEIGHBOURS = 9
    OCCLUSION = 10


@dataclass(frozen=True)
class RenderedWord:
    """A rendered word: `image` uint8 RGB (h, w, 3); `mask` uint8 (h, w), 255 = text; `text` as drawn, case kept.

    `rotation` and `arc` (from the first to the last letter) in degrees, as sampled.
    """

    image: np.ndarray
    mask: np.ndarray
    text: str
    family: str
    background: str
    rotation: float
    arc: float


class WordRenderer:
    """Renders words. May be pickled and used in any process: a word depends on config, seed and index alone.

    One renderer serves one thread at a time.

    Args:
        config: how words look.

    Raises:
        UserError: no font, word or photograph is found where the config asks for one.
    """

    def __init__(self, config: RenderConfig | None = None) -> None:
        self.config = config or RenderConfig()
        self.fonts = FontBook(find_families(self.config.fonts))
        self.words = WordSource(self.config.words)
        self.backgrounds = Backgrounds(self.config, self.fonts, self.words)
        self.generator = PlacedGenerator()

    def render(
        self,
        seed: int,
        index: int,
        *,
        text: str | None = None,
        background: str | None = None,
        difficulty: float | None = None,
    ) -> RenderedWord:
        """Render word `index` of `seed`.

        Args:
            text: write this instead of a sampled text.
            background: use this kind instead of a sampled one; the letters stay.
            difficulty: of this word, 0 to 1; None: the one of the config.

        Raises:
            UserError: no font can draw `text`, or there is no such kind of background.
        """
        config = self.config if difficulty is None else self.config.model_copy(update={"difficulty": difficulty})
        word = _Word(self, config, seed, index)
        kind = background or self.backgrounds.sample_kind(word.stream(Stream.BACKGROUND_KIND))
        return word.finish(word.draw(text), kind)

    def render_on_backgrounds(
        self, seed: int, index: int, kinds: Sequence[str], *, text: str | None = None
    ) -> dict[str, RenderedWord]:
        """Render the same letters in the same place on each of some kinds of background."""
        word = _Word(self, self.config, seed, index)
        drawing = word.draw(text)
        return {kind: word.finish(drawing, kind) for kind in kinds}


@dataclass(frozen=True)
class _Word:
    """A word that is being rendered, with its random streams."""

    renderer: WordRenderer
    config: RenderConfig
    seed: int
    index: int

    def stream(self, stream: Stream) -> np.random.Generator:
        """Return the generator of a concern, valid until the next call."""
        return self.renderer.generator.at((self.seed, self.index), (0, stream, 0))

    def draw(self, text: str | None) -> Drawing:
        """Draw the letters and warp them."""
        fonts, words, config = self.renderer.fonts, self.renderer.words, self.config
        text = words.sample(self.stream(Stream.WORD)) if text is None else text
        typeface = fonts.choose(text, self.stream(Stream.FONT))
        layout = sample_layout(text, config, self.stream(Stream.LAYOUT))
        style = sample_style(config, self.stream(Stream.EFFECTS))
        rng = self.stream(Stream.GEOMETRY)
        height = sample_height(config.letters, rng)
        letters = set_letters(open_face(typeface), text, _DETAIL * height, layout)
        warp = sample_warp(letters, height, config, rng)
        stroke = letter_stroke(letters, text, style)
        neighbours, own_colour = self._draw_neighbours(typeface, letters, warp)
        return Drawing(text, typeface.family, letters, stroke, style, warp, warp.apply(stroke), neighbours, own_colour)

    def _draw_neighbours(self, typeface: Typeface, letters: Letters, warp: Warp) -> tuple[np.ndarray | None, bool]:
        """Draw other text as uint8 (h, w) or None, and say whether it has the letters' colour."""
        rng = self.stream(Stream.NEIGHBOURS)
        chance, same, size = rng.random(3)
        if chance >= self.config.chance("neighbours"):
            return None, False
        fonts = self.renderer.fonts
        text, scale, own = self.renderer.words.sample(rng), 1.0, same < _SAME_FACE
        if not own or not fonts.covers(typeface.path, text):
            typeface, scale = fonts.choose(text, rng), 0.5 + size
        other = set_letters(open_face(typeface), text, scale * letters.unit)
        space = np.array(warp.margins) / warp.unit
        return warp.apply(*place_neighbours(letters, other, space, rng)), own

    def finish(self, drawing: Drawing, kind: str) -> RenderedWord:
        """Draw the letters on a background and degrade the image."""
        if kind not in BACKGROUND_KINDS:
            raise UserError(f"background: {kind!r} no such kind; the kinds are {', '.join(BACKGROUND_KINDS)}")
        config, warp = self.config, drawing.warp
        image = self.renderer.backgrounds.make(kind, warp, self.stream(Stream.BACKGROUND))
        image = paint(drawing, image, config, self.stream(Stream.COLOURS))
        mask = drawing.alpha
        rng = self.stream(Stream.OCCLUSION)
        if rng.random() < config.chance("occlusion"):
            image, mask = occlude(image, mask, warp.unit, rng)
        rng = self.stream(Stream.DEGRADATION)
        image = degrade(image, mask, warp.unit, config, rng, faint=drawing.style.relief is not None)
        return RenderedWord(image, mask, drawing.text, drawing.family, kind, warp.rotation, warp.arc)
