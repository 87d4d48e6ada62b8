"""Which fonts there are, which characters each can draw, and the opened fonts of this process.

A font draws a character when its image is neither empty nor the one of a character that no font has. Fonts whose
small letters are capitals again (all capitals, small capitals) do not draw small letters: the label would lie.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rendering.config import FontsConfig
from rendering.letters import Glyph
from utils import UserError

logger = logging.getLogger(__name__)

SUFFIXES = (".ttf", ".otf", ".ttc")
SYSTEM_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
ENTRY_POINTS = "fontpkg.family"  # each names a package with FAMILY and ROOT, its fonts in ROOT / "files"
_NO_CHARACTER = "\uffff"  # a code point that is no character: every font draws its sign for a missing one
_PROBE_SIZE = 32  # pixels; for looking at glyphs, not for words
_CASE_PROBES = "abdeghnqr"  # small letters of another shape than their capitals
_LIGHTEST = 250  # least weight of a variable font; hairlines are rare on signs
_OPEN_FONTS = 1200
# Sizes of flat words, pixels to the em. A letter is drawn by its font once, at the largest, which costs more than all
# else of a word, and shrunk to the others.
EMS = (24, 36, 50, 72)
_KEPT_GLYPHS = 40000  # of all sizes, kept by a process: some 50 MB
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


def find_families(config: FontsConfig) -> list[FontFamily]:
    """The families of all sources that `config` allows, sorted by name.

    Raises:
        UserError: a folder is missing, or no family is left.
    """
    found: dict[str, set[str]] = {}
    if config.packages:
        _add_packages(found)
    for folder in config.folders:
        if not Path(folder).is_dir():
            raise UserError(f"fonts.folders: {folder}: no such folder; name a folder of .ttf or .otf files")
        _add_folder(found, Path(folder))
    if config.system or (config.packages and not found):
        if not config.system:
            logger.warning("no fontpkg-* package is installed; using the system's fonts")
        for folder in SYSTEM_FOLDERS:
            _add_folder(found, Path(folder).expanduser())
    excluded = {name.casefold() for name in config.exclude}
    families = [
        FontFamily(name, tuple(sorted(files)))
        for name, files in sorted(found.items())
        if name.casefold() not in excluded and in_split(name, config.split, config.held_out_share)
    ]
    if not families:
        raise UserError(
            f"fonts: no family is left of {len(found)} (split {config.split}, {len(excluded)} excluded); install "
            "fontpkg-* packages as in requirements.txt, or name a folder in fonts.folders"
        )
    return families


def in_split(family: str, split: str, held_out_share: float) -> bool:
    """Whether `family` is on that side (all, train, held-out) of the split; the same on every machine."""
    place = int.from_bytes(hashlib.sha256(family.casefold().encode()).digest()[:8], "big") / 2**64
    return split == "all" or (place < held_out_share) == (split == "held-out")


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
    """Chooses typefaces and keeps their letters; what is opened stays with the process and is not pickled.

    Args:
        families: from `find_families`, not empty.
    """

    def __init__(self, families: list[FontFamily]) -> None:
        self.families = families
        self._forget()

    def _forget(self) -> None:
        self._fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}
        self._coverage: dict[str, dict[str, bool]] = {}
        self._missing: dict[str, np.ndarray] = {}
        self._axes: dict[str, list[dict[str, Any]]] = {}
        self._capital: dict[str, float] = {}
        self._glyphs: dict[tuple[Typeface, str, int], Glyph] = {}
        self._kerning: dict[tuple[Typeface, str], float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"families": self.families}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.families = state["families"]
        self._forget()

    def choose(self, text: str, rng: np.random.Generator) -> Typeface:
        """A typeface that can draw every character of `text`: families are equally likely, then their files.

        Raises:
            UserError: none can.
        """
        for number in rng.permutation(len(self.families)):
            family = self.families[int(number)]
            start = int(rng.integers(len(family.files)))
            for path in family.files[start:] + family.files[:start]:
                if self.covers(path, text):
                    return Typeface(family.name, path, self._draw_axes(path, rng))
        raise UserError(f"fonts: none can draw all of {text!r}; add a font that can, or narrow words.characters")

    def covers(self, path: str, text: str) -> bool:
        """Whether the font draws every character of `text` as what it is."""
        known = self._coverage.get(path)
        if known is None:
            known = self._coverage[path] = self._first_look(path)
        for character in text:
            if character not in known:
                known[character] = self._draws(path, character)
            if not known[character]:
                return False
        return True

    def open(self, typeface: Typeface, size: int) -> ImageFont.FreeTypeFont:
        """The opened font at `size` pixels to the em, its axes set; valid until the next call."""
        font = self._fonts.get((typeface.path, size))
        if font is None:
            if len(self._fonts) >= _OPEN_FONTS:
                self._fonts.clear()
            font = self._fonts[typeface.path, size] = ImageFont.truetype(typeface.path, size)
        if typeface.axes:
            font.set_variation_by_axes(list(typeface.axes))
        return font

    def face(self, typeface: Typeface, height: float) -> "SizedFace":
        """The letters of a typeface at the least size whose capitals are `height` pixels high, or at the largest."""
        wanted = height / self.capital_height(typeface.path)
        return SizedFace(self, typeface, next((em for em in EMS if em >= wanted), EMS[-1]))

    def capital_height(self, path: str) -> float:
        """Height of a capital letter over the em, with the axes as they come."""
        height = self._capital.get(path)
        if height is None:
            em = EMS[-1]
            _, top, _, bottom = ImageFont.truetype(path, em).getbbox("H", anchor="ls")
            height = self._capital[path] = max(bottom - top, em / 4) / em
        return height

    def glyph(self, typeface: Typeface, character: str, em: int) -> Glyph:
        """A letter at `em` pixels to the em, one of EMS."""
        glyph = self._glyphs.get((typeface, character, em))
        if glyph is None:
            if em == EMS[-1]:
                glyph = _draw_glyph(self.open(typeface, em), character)
            else:
                glyph = _shrunk(self.glyph(typeface, character, EMS[-1]), em / EMS[-1])
            if len(self._glyphs) >= _KEPT_GLYPHS:
                self._glyphs.clear()
            self._glyphs[typeface, character, em] = glyph
        return glyph

    def kerning(self, typeface: Typeface, pair: str) -> float:
        """What the font moves the second of two letters by, in ems."""
        if pair[0] not in _KERNED or pair[1] not in _KERNED[pair[0]]:
            return 0.0
        kerning = self._kerning.get((typeface, pair))
        if kerning is None:
            if len(self._kerning) >= _KEPT_GLYPHS:
                self._kerning.clear()
            em = EMS[-1]
            apart = sum(self.glyph(typeface, character, em).advance for character in pair)
            kerning = self._kerning[typeface, pair] = (self.open(typeface, em).getlength(pair) - apart) / em
        return kerning

    def _draw_axes(self, path: str, rng: np.random.Generator) -> tuple[float, ...]:
        """Values for the axes of a variable font: weight and width by chance, in few steps, the others as they come."""
        axes = self._axes.get(path)
        if axes is None:
            font = ImageFont.truetype(path, _PROBE_SIZE)
            try:
                axes = font.get_variation_axes()
            except OSError:  # what Pillow raises for a font without axes
                axes = []
            self._axes[path] = axes
        values = []
        for axis in axes:
            low, share = axis["minimum"], int(rng.integers(_AXIS_STEPS + 1)) / _AXIS_STEPS
            if axis["name"] == b"Weight":
                low = min(max(low, _LIGHTEST), axis["maximum"])
            free = axis["name"] in (b"Weight", b"Width")
            values.append(float(round(low + share * (axis["maximum"] - low)) if free else axis["default"]))
        return tuple(values)

    def _first_look(self, path: str) -> dict[str, bool]:
        """What is known of a font at once: without small letters of their own, all of those are missing."""
        font = self.open(Typeface("", path), _PROBE_SIZE)
        self._missing[path] = _draw_glyph(font, _NO_CHARACTER).fill
        likeness = [_likeness(_draw_glyph(font, c).fill, _draw_glyph(font, c.upper()).fill) for c in _CASE_PROBES]
        if np.mean(likeness) < 0.8:
            return {}
        return {chr(code): False for code in range(ord("a"), ord("z") + 1)}

    def _draws(self, path: str, character: str) -> bool:
        glyph = _draw_glyph(self.open(Typeface("", path), _PROBE_SIZE), character).fill
        return bool(glyph.any()) and not np.array_equal(glyph, self._missing[path])


@dataclass(frozen=True)
class SizedFace:
    """A typeface at `em` pixels to the em, as `letters.set_letters` takes it."""

    book: FontBook
    typeface: Typeface
    em: int

    @property
    def unit(self) -> float:
        """Height of a capital letter, pixels."""
        return self.em * self.book.capital_height(self.typeface.path)

    def glyph(self, character: str) -> Glyph:
        """A letter."""
        return self.book.glyph(self.typeface, character, self.em)

    def kerning(self, pair: str) -> float:
        """What the second letter is moved by, pixels."""
        return self.em * self.book.kerning(self.typeface, pair)


def _draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Glyph:
    """The character without space around it; `fill` is (1, 1) of 0 when it is empty."""
    # Asking a font for the extents costs as much as drawing, so the canvas is first taken large enough.
    room = int(font.size)
    while True:
        image = Image.new("L", (5 * room // 2, 2 * room))
        ImageDraw.Draw(image).text((room, 3 * room // 2), character, fill=255, font=font, anchor="ls")
        box = image.getbbox()
        if box is None:
            return Glyph(np.zeros((1, 1), np.uint8), 0, 0, font.getlength(character))
        if box[0] > 0 and box[1] > 0 and box[2] < image.width and box[3] < image.height:
            break
        room *= 2
    return Glyph(np.asarray(image.crop(box)), box[0] - room, box[1] - 3 * room // 2, font.getlength(character))


def _shrunk(glyph: Glyph, factor: float) -> Glyph:
    """The glyph in a smaller size; its edges are rounded from the pen, so that letters keep their base line."""
    height, width = glyph.fill.shape
    left, top = round(glyph.left * factor), round(glyph.top * factor)
    right, bottom = round((glyph.left + width) * factor), round((glyph.top + height) * factor)
    size = max(1, right - left), max(1, bottom - top)
    fill = cv2.resize(glyph.fill, size, interpolation=cv2.INTER_AREA)
    return Glyph(fill, left, top, glyph.advance * factor)


def _likeness(small: np.ndarray, capital: np.ndarray) -> float:
    """1 for images of one shape, whatever their size; about 0.5 for different letters."""
    size = (24, 24)
    difference = cv2.absdiff(cv2.resize(small, size), cv2.resize(capital, size))
    return 1 - float(difference.mean()) / 255
