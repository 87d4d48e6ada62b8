"""Backgrounds of words, float32 RGB (h, w, 3), 0 to 255.

The base colour is sampled first, so that the backgrounds of one word on different kinds resemble each other.
"""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from loading.decoding import IMAGE_SUFFIXES
from rendering.blending import blend, full, overlap, raised
from rendering.colours import luminance, sample_background_colour, sample_contrasting_colour, with_luminance
from rendering.config import BACKGROUND_KINDS, RenderConfig
from rendering.fonts import FontBook, open_face
from rendering.geometry import Warp
from rendering.letters import set_letters
from rendering.textures import cut_texture, ramp
from rendering.words import WordSource
from utils import UserError

_WEIGHTS = {"plain": 0.28, "gradient": 0.2, "texture": 0.2, "scene": 0.1, "photo": 0.1, "clutter": 0.22}
_PHOTO_SIDE = 640  # pixels; photographs are kept at about this size
_PHOTOS_KEPT = 96  # by each process, of about 1 MB each
_NO_PHOTOS = "background: photo needs photographs; name their folder in `photos`"
_NEIGHBOURS = np.array([0.15, 0.35, 0.15, 0.35])  # chance of another text left, above, right, below
_FRAGMENTS = 96
_FRAGMENT_UNIT = 32  # pixels; height of a capital letter in a kept fragment
_FRAGMENT_SEED = 7


class Backgrounds:
    """Draws backgrounds.

    Args:
        config: kind of background, folder of photographs.
        fonts, words: for pieces of other texts.

    Raises:
        UserError: the folder of photographs is missing or empty, or `background` is photo and there is none.
    """

    def __init__(self, config: RenderConfig, fonts: FontBook, words: WordSource) -> None:
        self._fonts, self._words = fonts, words
        self._saturated = config.saturated
        self._photos = find_photos(config.photos) if config.photos else []
        self._kind = config.background
        if self._kind == "photo" and not self._photos:
            raise UserError(_NO_PHOTOS)
        weights = np.array([_WEIGHTS[kind] * (kind != "photo" or bool(self._photos)) for kind in BACKGROUND_KINDS])
        self._cumulated = np.cumsum(weights / weights.sum())
        self._fragments: dict[int, np.ndarray] = {}

    def sample_kind(self, rng: np.random.Generator) -> str:
        """Sample a kind."""
        place = int(np.searchsorted(self._cumulated, rng.random(), side="right"))
        return BACKGROUND_KINDS[min(place, len(BACKGROUND_KINDS) - 1)] if self._kind == "mixed" else self._kind

    def make(self, kind: str, warp: Warp, rng: np.random.Generator) -> np.ndarray:
        """Draw a background of `kind` for an image of `warp.size`, other texts within the warp's margins."""
        base = sample_background_colour(rng, self._saturated)
        size = (warp.size[1], warp.size[0])
        if kind == "photo":
            return self._cut_photo(size, rng)
        if kind != "clutter":
            return _SURFACES[kind](base, size, rng)
        ground = ("plain", "plain", "gradient", "texture", "scene")[int(rng.integers(5))]
        image = _SURFACES[ground](base, size, rng)
        self._draw_shapes(image, base, rng)
        self._draw_texts(image, base, warp, rng)
        return image

    def _cut_photo(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Cut a piece of a photograph in the shape of the image, at full resolution or shrunk."""
        if not self._photos:
            raise UserError(_NO_PHOTOS)
        photo = read_photo(self._photos[int(rng.integers(len(self._photos)))])
        height, width = size
        largest = min(photo.shape[0] / height, photo.shape[1] / width)
        scale = largest ** float(rng.random()) if largest > 1 else largest
        piece_height, piece_width = max(1, int(height * scale)), max(1, int(width * scale))
        top = int(rng.integers(photo.shape[0] - piece_height + 1))
        left = int(rng.integers(photo.shape[1] - piece_width + 1))
        piece = photo[top : top + piece_height, left : left + piece_width]
        shrunk = cv2.resize(piece, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
        return shrunk.astype(np.float32)

    def _draw_shapes(self, image: np.ndarray, base: np.ndarray, rng: np.random.Generator) -> None:
        """Draw lines, frames, bars and discs, in place."""
        height, width = image.shape[:2]
        for _ in range(int(rng.integers(1, 4))):
            colour = sample_contrasting_colour(base, rng) if rng.random() < 0.5 else sample_background_colour(rng)
            colour = tuple(float(c) for c in base + (colour - base) * rng.uniform(0.3, 1.0))
            thick = max(1, round(height * rng.uniform(0.02, 0.1)))
            kind = rng.random()
            x, y = rng.uniform(-0.2, 1.2, size=2) * width, rng.uniform(-0.2, 1.2, size=2) * height
            start, end = (int(x[0]), int(y[0])), (int(x[1]), int(y[1]))
            if kind < 0.3:
                cv2.line(image, start, end, colour, thick, cv2.LINE_AA)
            elif kind < 0.55:  # the edge of the sign and what is beyond it
                _fill_beyond_edge(image, colour, rng)
            elif kind < 0.75:  # a line above or below the word
                edge = int(height * (rng.uniform(0, 0.12) if rng.random() < 0.5 else rng.uniform(0.88, 1)))
                cv2.line(
                    image, (0, edge), (width, edge + int(rng.normal(0, 0.03) * height)), colour, thick, cv2.LINE_AA
                )
            elif kind < 0.88:
                cv2.rectangle(image, start, end, colour, thick if rng.random() < 0.5 else -1)
            else:
                cv2.circle(image, start, int(height * rng.uniform(0.2, 0.9)), colour, thick, cv2.LINE_AA)

    def _draw_texts(self, image: np.ndarray, base: np.ndarray, warp: Warp, rng: np.random.Generator) -> None:
        """Draw pieces of other texts into the margins, in place, as crops of words show their neighbours."""
        height, width = image.shape[:2]
        left, top, right, bottom = (max(margin, 1.0) for margin in warp.margins)
        colour = sample_contrasting_colour(base, rng).astype(np.float32)
        for side in np.flatnonzero(rng.random(4) < _NEIGHBOURS):
            fragment = self._fragment(int(rng.integers(_FRAGMENTS)))
            scale = warp.unit / _FRAGMENT_UNIT * rng.uniform(0.6, 1.3)
            text_size = (max(2, round(fragment.shape[1] * scale)), max(2, round(fragment.shape[0] * scale)))
            fragment = cv2.resize(fragment, text_size, interpolation=cv2.INTER_AREA)
            along_x = int(rng.uniform(-0.5, 0.8) * width)
            along_y = int((height - fragment.shape[0]) / 2 + rng.uniform(-0.1, 0.1) * height)
            reach = rng.uniform(0.5, 1.0)
            x, y = (
                (int(left * reach) - fragment.shape[1], along_y),
                (along_x, int(top * reach) - fragment.shape[0]),
                (width - int(right * reach), along_y),
                (along_x, height - int(bottom * reach)),
            )[side]
            area, alpha = overlap(image, fragment, x, y)
            area += alpha[..., None].astype(np.float32) / 255 * (colour - area)

    def _fragment(self, number: int) -> np.ndarray:
        """Return piece of text `number`, the same in every process: uint8 (h, w) without space around it."""
        fragment = self._fragments.get(number)
        if fragment is None:
            rng = np.random.default_rng([_FRAGMENT_SEED, number])
            text = self._words.sample(rng)
            typeface = self._fonts.choose(text, rng)
            letters = set_letters(open_face(typeface), text, _FRAGMENT_UNIT)
            left, top, right, bottom = letters.box
            fragment = self._fragments[number] = letters.fill[top:bottom, left:right]
        return fragment


def find_photos(folder: str) -> list[str]:
    """Return the images in `folder` and below it, sorted.

    Raises:
        UserError: the folder is missing or holds no image.
    """
    if not Path(folder).is_dir():
        raise UserError(f"photos: {folder}: no such folder; name a folder of images")
    found = sorted(
        str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        raise UserError(f"photos: {folder}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


@lru_cache(maxsize=_PHOTOS_KEPT)
def read_photo(path: str) -> np.ndarray:
    """Read a photograph and shrink its longer side to 640 pixels: RGB, uint8 (h, w, 3).

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (_PHOTO_SIDE, _PHOTO_SIDE))  # JPEG: decodes large ones at a fraction of their size
            photo = np.asarray(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"photos: {path}: cannot be decoded; repair it or remove it from the folder") from error
    scale = _PHOTO_SIDE / max(photo.shape[:2])
    if scale < 1:
        size = max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale))
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    return photo


def _near(base: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Sample a colour like `base`, up to `amount` of luminance lighter or darker, with a slightly different hue."""
    wanted = float(np.clip(float(luminance(base)) + rng.uniform(-amount, amount), 0.02, 0.98))
    return with_luminance(np.clip(base + rng.normal(0, 12, size=3), 1, 254), wanted)


def _gradient(base: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    other = _near(base, rng, 0.3)
    x, y = ramp(width), ramp(height)
    if rng.random() < 0.7:
        angle = rng.uniform(0, 2 * np.pi)
        share = 0.5 + x * np.cos(angle) + y[:, None] * np.sin(angle)
    else:
        centre = rng.uniform(-0.5, 0.5, size=2)
        share = np.sqrt((x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2)
    return blend(base, other, np.clip(share, 0, 1, dtype=np.float32))


def _texture(base: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    strength = rng.beta(1.5, 3.0)
    other = base + (_near(base, rng, 0.5) - base) * (0.3 + strength)
    return blend(base, np.clip(other, 0, 255), cut_texture(size, rng))


def _scene(base: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw surfaces and edges out of focus: small, then enlarged and blurred."""
    height, width = size
    scale = 24 / min(height, width)
    small = full((max(24, round(height * scale)), max(24, round(width * scale))), base)
    for _ in range(int(rng.integers(2, 7))):
        colour = tuple(
            float(c) for c in _near(base if rng.random() < 0.6 else sample_background_colour(rng), rng, 0.25)
        )
        centre = rng.random(2) * (small.shape[1], small.shape[0])
        corners = centre + rng.normal(0, 14, size=(int(rng.integers(3, 6)), 2))
        cv2.fillConvexPoly(small, cv2.convexHull(corners.astype(np.int32)), colour, cv2.LINE_AA)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    sigma = min(height, width) * float(rng.choice([0.01, 0.03, 0.08]))
    image = cv2.GaussianBlur(image, (0, 0), max(0.5, sigma))
    grain = np.float32(rng.uniform(0, 50)) * (cut_texture(size, rng) - np.float32(0.5))
    return np.clip(raised(image, grain), 0, 255)


def _fill_beyond_edge(image: np.ndarray, colour: tuple[float, ...], rng: np.random.Generator) -> None:
    """Fill what lies beyond a nearly straight line along one side, in place."""
    height, width = image.shape[:2]
    depth = rng.uniform(0.02, 0.16, size=2) * height
    corners = (
        [(0, 0), (width, 0), (width, depth[0]), (0, depth[1])],
        [(0, height), (width, height), (width, height - depth[0]), (0, height - depth[1])],
        [(0, 0), (0, height), (depth[0], height), (depth[1], 0)],
        [(width, 0), (width, height), (width - depth[0], height), (width - depth[1], 0)],
    )[int(rng.integers(4))]
    cv2.fillConvexPoly(image, np.array(corners, np.int32), colour, cv2.LINE_AA)


_SURFACES = {
    "plain": lambda base, size, rng: full(size, base),
    "gradient": _gradient,
    "texture": _texture,
    "scene": _scene,
}
