"""The available fonts, the characters that each can draw, and the letters that this process has drawn with them.

A font draws a character when its image is neither empty nor the one of a character that no font has. Fonts whose
small letters are capitals again (all capitals, small capitals) do not draw small letters: the label would be wrong.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageFont

from rendering.config import FontsConfig
from utils import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".ttf", ".otf", ".ttc")
ENTRY_POINTS = "fontpkg.family"  # each names a package with FAMILY and ROOT, its fonts in ROOT / "files"
_NO_CHARACTER = "\uffff"  # a code point that is no character: every font draws its sign for a missing one
_PROBE_SIZE = 32  # pixels; for looking at glyphs, not for words
_CASE_PROBES = "abdeghnqr"  # small letters of another shape than their capitals
_LIGHTEST = 250  # least weight of a variable font; hairlines are rare on signs
_EM = 72  # pixels; every letter is drawn once at this size, and words are shrunk to the size that they need
_KEPT_FACES = 800  # by a process: with all letters of each, some 100 MB
_HELD_OUT = 0.15  # share of families that the split holds out
_AXIS_STEPS = 3
# Letters after a letter that fonts move by more than a hair; the others are not worth asking for.
_KERNED = {"A": "TVWYvwy'\"", "L": "TVWYy'\"", "R": "TVWY"}
_KERNED |= (
    dict.fromkeys("TVWY", "AOacdegmnopqrsuvwxyz.,:;-") | dict.fromkeys("FP7", "Aaeo.,") | dict.fromkeys("rvwy", ".,")
)


@dataclass(frozen=True)
class FontFamily:
    """A family's name and its files."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Typeface:
    """A font file, with the values of its axes when it is a variable one."""

    family: str
    path: str
    axes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Glyph:
    """A letter: `fill` grey uint8 (h, w); its corner is at (left, top) from the pen on the baseline, in pixels."""

    fill: np.ndarray
    left: int
    top: int
    advance: float


def find_families(config: FontsConfig) -> list[FontFamily]:
    """Return the families that `config` allows, sorted by name.

    Raises:
        UserError: a folder is missing, or no family is left.
    """
    found: dict[str, set[str]] = {}
    for folder in config.folders:
        if not Path(folder).is_dir():
            raise UserError(f"fonts.folders: {folder}: no such folder; name a folder of .ttf or .otf files")
        _add_folder(found, Path(folder))
    if not config.folders:
        _add_packages(found)
    excluded = {name.casefold() for name in config.exclude}
    families = [
        FontFamily(name, tuple(sorted(files)))
        for name, files in sorted(found.items())
        if name.casefold() not in excluded and in_split(name, config.split)
    ]
    if not families:
        raise UserError(
            f"fonts: no family is left of {len(found)} (split {config.split}, {len(excluded)} excluded); install "
            "fontpkg-* packages as in requirements.txt, or name a folder in fonts.folders"
        )
    return families


def in_split(family: str, split: str) -> bool:
    """Return whether `family` is on that side (all, train, held-out) of the split; the same on every machine."""
    place = int.from_bytes(hashlib.sha256(family.casefold().encode()).digest()[:8], "big") / 2**64
    return split == "all" or (place < _HELD_OUT) == (split == "held-out")


def _add_packages(found: dict[str, set[str]]) -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        package = import_module(entry.value)
        files = (str(path) for path in sorted(Path(package.ROOT, "files").glob("*")) if path.suffix in SUFFIXES)
        found.setdefault(package.FAMILY, set()).update(files)


def _add_folder(found: dict[str, set[str]], folder: Path) -> None:
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if not name.lower().endswith(SUFFIXES):
                continue
            path = os.path.join(root, name)
            try:
                family = ImageFont.truetype(path, _PROBE_SIZE).getname()[0]
            except OSError as error:
                logger.warning("%s: left out, it cannot be opened as a font (%s)", path, error)
                continue
            found.setdefault(family or name, set()).add(path)


class FontBook:
    """Chooses typefaces and knows which characters each font draws.

    Args:
        families: from `find_families`, not empty.
    """

    def __init__(self, families: list[FontFamily]) -> None:
        self.families = families
        self._coverage: dict[str, dict[str, bool]] = {}
        self._missing: dict[str, np.ndarray] = {}

    def choose(self, text: str, rng: np.random.Generator) -> Typeface:
        """Return a typeface that can draw every character of `text`: any family, then any of its files.

        Raises:
            UserError: none can.
        """
        for number in rng.permutation(len(self.families)):
            family = self.families[int(number)]
            start = int(rng.integers(len(family.files)))
            for path in family.files[start:] + family.files[:start]:
                if self.covers(path, text):
                    return Typeface(family.name, path, _sample_axes(path, rng))
        raise UserError(f"fonts: none can draw all of {text!r}; add a font that can, or narrow words.characters")

    def covers(self, path: str, text: str) -> bool:
        """Return whether the font draws every character of `text`."""
        known = self._coverage.get(path)
        if known is None:
            known = self._coverage[path] = self._first_look(path)
        for character in text:
            if character not in known:
                fill = open_face(Typeface("", path)).glyph(character).fill
                known[character] = bool(fill.any()) and not np.array_equal(fill, self._missing[path])
            if not known[character]:
                return False
        return True

    def _first_look(self, path: str) -> dict[str, bool]:
        """Return what is known of a font at once: without small letters of its own, all of them are missing."""
        face = open_face(Typeface("", path))
        self._missing[path] = face.glyph(_NO_CHARACTER).fill
        likeness = [_likeness(face.glyph(c).fill, face.glyph(c.upper()).fill) for c in _CASE_PROBES]
        if np.mean(likeness) < 0.8:
            return {}
        return {chr(code): False for code in range(ord("a"), ord("z") + 1)}


def _sample_axes(path: str, rng: np.random.Generator) -> tuple[float, ...]:
    """Sample values for the axes of a variable font: weight and width in few steps, the others by default."""
    values = []
    for axis in _axes(path):
        low, share = axis["minimum"], int(rng.integers(_AXIS_STEPS + 1)) / _AXIS_STEPS
        if axis["name"] == b"Weight":
            low = min(max(low, _LIGHTEST), axis["maximum"])
        free = axis["name"] in (b"Weight", b"Width")
        values.append(float(round(low + share * (axis["maximum"] - low)) if free else axis["default"]))
    return tuple(values)


@cache
def _axes(path: str) -> list[dict[str, Any]]:
    """Return the axes of a variable font, none of another one."""
    try:
        return ImageFont.truetype(path, _EM).get_variation_axes()
    except OSError:  # what Pillow raises for a font without axes
        return []


class Face:
    """A typeface with the letters that were drawn of it, at 72 pixels to the em.

    `unit`: height of a capital letter, pixels.
    """

    def __init__(self, typeface: Typeface) -> None:
        self._typeface = typeface
        # For single letters the plain layout engine gives what the other one does, several times faster.
        self._font = self._open(ImageFont.Layout.BASIC)
        self._glyphs: dict[str, Glyph] = {}
        self._kerning: dict[str, float] = {}
        self.unit = float(max(self.glyph("H").fill.shape[0], _EM / 4))

    def _open(self, layout: ImageFont.Layout) -> ImageFont.FreeTypeFont:
        font = ImageFont.truetype(self._typeface.path, _EM, layout_engine=layout)
        if self._typeface.axes:
            font.set_variation_by_axes(list(self._typeface.axes))
        return font

    def glyph(self, character: str) -> Glyph:
        """Return a letter; its `fill` is (1, 1) of 0 when it is empty."""
        glyph = self._glyphs.get(character)
        if glyph is None:
            glyph = self._glyphs[character] = _draw_glyph(self._font, character)
        return glyph

    def kerning(self, pair: str) -> float:
        """Return by how many pixels the font moves the second of two letters."""
        if pair[0] not in _KERNED or pair[1] not in _KERNED[pair[0]]:
            return 0.0
        kerning = self._kerning.get(pair)
        if kerning is None:
            font = self._open(ImageFont.Layout.RAQM)
            kerning = self._kerning[pair] = font.getlength(pair) - font.getlength(pair[0]) - font.getlength(pair[1])
        return kerning


@lru_cache(maxsize=_KEPT_FACES)
def open_face(typeface: Typeface) -> Face:
    """Return the letters of a typeface, which this process keeps."""
    return Face(typeface)


def _draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Glyph:
    """Draw a character without space around it."""
    mask, (left, top) = font.getmask2(character, mode="L", anchor="ls")
    image = Image.new("L", mask.size)
    image.im = mask  # the only way to its pixels that is not slow
    fill = np.asarray(image)
    x, y, width, height = cv2.boundingRect(fill) if fill.size else (0, 0, 0, 0)
    if not width:
        return Glyph(np.zeros((1, 1), np.uint8), 0, 0, font.getlength(character))
    return Glyph(fill[y : y + height, x : x + width], left + x, top + y, font.getlength(character))


def _likeness(small: np.ndarray, capital: np.ndarray) -> float:
    """Return 1 for images of one shape, whatever their size, and about 0.5 for different letters."""
    size = (24, 24)
    difference = cv2.absdiff(cv2.resize(small, size), cv2.resize(capital, size))
    return 1 - float(difference.mean()) / 255
