"""The renderer: word `index` of seed `seed`, as an image with its exact mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np

from loading.sampling import PlacedGenerator
from rendering.backgrounds import Backgrounds
from rendering.blending import blend
from rendering.colours import sample_contrasting_colour, sample_letter_colour, sample_light_colour
from rendering.config import BACKGROUND_KINDS, RenderConfig
from rendering.degradation import degrade
from rendering.effects import draw_relief, draw_under, letter_stroke, paint_fill, sample_style
from rendering.fonts import FontBook, Typeface, find_families, open_face
from rendering.geometry import sample_warp
from rendering.letters import sample_height, sample_layout, set_letters
from rendering.surroundings import occlude, place_neighbours
from rendering.words import WordSource
from utils import UserError

_DETAIL = 1.5  # size of the flat word over that of the final one, so that the warp seldom enlarges
_PANEL = 0.22  # share of the background's light that is left behind shining letters
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
        word = _Word(self, config, seed, index, text)
        return word.on(background or self.backgrounds.sample_kind(word.stream(Stream.BACKGROUND_KIND)))

    def render_on_backgrounds(self, seed: int, index: int, kinds: Sequence[str]) -> dict[str, RenderedWord]:
        """Render the same letters in the same place on each of some kinds of background."""
        word = _Word(self, self.config, seed, index, None)
        return {kind: word.on(kind) for kind in kinds}


class _Word:
    """A word with its letters drawn and warped, which can be finished on any kind of background.

    `stroke`: the part of the flat word that is text; `alpha`: its share of each pixel of the image, uint8 (h, w);
    `neighbours`: the same for other text, or None; `own_colour`: whether that text has the letters' colour.
    """

    def __init__(self, renderer: WordRenderer, config: RenderConfig, seed: int, index: int, text: str | None) -> None:
        self.renderer, self.config, self.seed, self.index = renderer, config, seed, index
        self.text = renderer.words.sample(self.stream(Stream.WORD)) if text is None else text
        typeface = renderer.fonts.choose(self.text, self.stream(Stream.FONT))
        self.family = typeface.family
        layout = sample_layout(self.text, config, self.stream(Stream.LAYOUT))
        self.style = sample_style(config, self.stream(Stream.EFFECTS))
        rng = self.stream(Stream.GEOMETRY)
        height = sample_height(config.letters, rng)
        self.letters = set_letters(open_face(typeface), self.text, _DETAIL * height, layout)
        self.warp = sample_warp(self.letters, height, config, rng)
        self.stroke = letter_stroke(self.letters, self.text, self.style)
        self.alpha = self.warp.apply(self.stroke)
        self.neighbours, self.own_colour = self._draw_neighbours(typeface)

    def stream(self, stream: Stream) -> np.random.Generator:
        """Return the generator of a concern, valid until the next call."""
        return self.renderer.generator.at((self.seed, self.index), (0, stream, 0))

    def _draw_neighbours(self, typeface: Typeface) -> tuple[np.ndarray | None, bool]:
        """Draw other text as uint8 (h, w) or None, and say whether it has the letters' colour."""
        rng = self.stream(Stream.NEIGHBOURS)
        chance, same, size = rng.random(3)
        if chance >= self.config.chance("neighbours"):
            return None, False
        fonts = self.renderer.fonts
        text, scale, own = self.renderer.words.sample(rng), 1.0, same < _SAME_FACE
        if not own or not fonts.covers(typeface.path, text):
            typeface, scale = fonts.choose(text, rng), 0.5 + size
        other = set_letters(open_face(typeface), text, scale * self.letters.unit)
        space = np.array(self.warp.margins) / self.warp.unit
        return self.warp.apply(*place_neighbours(self.letters, other, space, rng)), own

    def on(self, kind: str) -> RenderedWord:
        """Paint the letters on a background and degrade the image."""
        if kind not in BACKGROUND_KINDS:
            raise UserError(f"background: {kind!r} is unknown; the kinds are {', '.join(BACKGROUND_KINDS)}")
        config, warp, mask = self.config, self.warp, self.alpha
        image = self.renderer.backgrounds.make(kind, warp, self.stream(Stream.BACKGROUND))
        image = self._paint(image, self.stream(Stream.COLOURS))
        rng = self.stream(Stream.OCCLUSION)
        if rng.random() < config.chance("occlusion"):
            image, mask = occlude(image, mask, warp.unit, rng)
        rng = self.stream(Stream.DEGRADATION)
        image = degrade(image, mask, warp.unit, config, rng, faint=self.style.relief is not None)
        return RenderedWord(image, mask, self.text, self.family, kind, warp.rotation, warp.arc)

    def _paint(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Paint the letters, what lies under them and the text beside them on the background, float32 (h, w, 3)."""
        letters, style, warp = self.letters, self.style, self.warp
        share = self.alpha * np.float32(1 / 255)
        image, darkest, lightest = _make_room(image, self.alpha, self.config.contrast)
        if style.shining:
            image = image * np.float32(_PANEL)
            colour = sample_light_colour(rng)
        else:
            colour = sample_letter_colour(darkest, lightest, self.config, rng)
        ground = image
        if self.neighbours is not None:
            other = colour
            if not self.own_colour:
                other = sample_contrasting_colour(np.full(3, 127.5 * (darkest + lightest)), rng)
            image = blend(image, other, self.neighbours * np.float32(1 / 255))
        if style.relief:
            return draw_relief(ground, letters, style, warp, share, rng)
        if style.has_under:
            image = draw_under(image, letters, self.stroke, style, warp, colour, rng)
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
