"""Bring text segmentation sets, as their owners ship them, into the form that SSN is trained from.

The result holds pairs of an image and a grey mask: 255 = text, 0 = background, 128 = not known, to be ignored (set
dataset.segmentation.ignore_level to 128).
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

import cv2
import numpy as np
from PIL import Image

from loading.decoding import MAX_PIXELS, BrokenImageError, decode_image
from loading.lmdb_io import PARTIAL_SUFFIX, LmdbWriter
from tools.support import IMAGE_ERRORS, RejectionLog, make_parser, print_summary, progress
from utils import UserError, explain_full_disk, run_command_line

EXAMPLE = """  python tools/create_segmentation_data.py --format totaltext --source Total-Text --split Train \\
    --output data/segmentation/totaltext/train
  python tools/create_segmentation_data.py --format icdar13 --source ICDAR13 --output data/segmentation/icdar13 --words

what is expected below --source (folders may lie deeper):
  icdar13    images NAME.jpg; NAME_GT.bmp (or png), each character in a colour of its own on white; NAME_GT.txt
  totaltext  Images/Train, groundtruth_pixel/Train of the same names; for --words also poly_gt_NAME.txt (polygons)
  coco_ts    COCO_TS_labels/NAME.png and images NAME.jpg
  mlt_s      a folder *labels or *masks with NAME.png and images NAME.jpg
  textseg    image/NAME.jpg, semantic_label/NAME_maskfg.png; for --words also annotation/NAME_anno.json"""

TEXT, BACKGROUND, IGNORED = 255, 0, 128
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
VALUES_SCANNED = 200  # masks looked at to find out which values a set uses

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels, right and bottom not included


class UnusableError(ValueError):
    """Why one image of a set cannot be used: a short reason, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass(frozen=True)
class Truth:
    """What is known of an image: the classes of its pixels, and the boxes of its words where the set has them."""

    mask: np.ndarray  # (H, W) uint8: TEXT, BACKGROUND or IGNORED
    boxes: list[Box] | None = None


@dataclass(frozen=True)
class Entry:
    """An image of a set and how to read what is known of it."""

    name: str
    image: Path
    read: Callable[[], Truth] = field(repr=False)


# --- files -----------------------------------------------------------------------------------------------------------


def files_below(source: Path, suffixes: set[str]) -> list[Path]:
    """Every file below `source` with one of these endings (lower case), sorted."""
    return sorted(each for each in source.rglob("*") if each.suffix.lower() in suffixes and each.is_file())


def in_split(path: Path, source: Path, split: str | None) -> bool:
    """Whether a folder between `source` and the file bears the name of the split."""
    return split is None or split.lower() in (part.lower() for part in path.relative_to(source).parts[:-1])


class ImageIndex:
    """Finds the image that belongs to a mask: the same stem, outside of the masks' folders, of the same split."""

    def __init__(self, source: Path, is_mask: Callable[[Path], bool]) -> None:
        self.by_stem: dict[str, list[Path]] = {}
        for each in files_below(source, IMAGE_SUFFIXES):
            if not is_mask(each):
                self.by_stem.setdefault(each.stem, []).append(each)

    def find(self, stem: str, mask: Path) -> Path | None:
        """The image of `mask`; of several the one whose folder has the same name, None when there is none."""
        found = self.by_stem.get(stem, [])
        return next((each for each in found if each.parent.name == mask.parent.name), found[0] if found else None)


def read_values(path: Path, *, colours: bool = False) -> np.ndarray:
    """The stored values of a mask, (H, W) or (H, W, 3): palette indices stay indices, unless `colours` are wanted."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UnusableError("mask too large", f"{path.name}: {opened.width} x {opened.height} pixels")
            if colours and opened.mode == "P":
                return np.asarray(opened.convert("RGB"))
            return np.asarray(opened if opened.mode in ("P", "L", "RGB") else _flattened(opened))
    except IMAGE_ERRORS as error:
        raise UnusableError("damaged mask", f"{path.name}: {error}") from error


def _flattened(opened: Image.Image) -> Image.Image:
    return opened.convert("RGB" if opened.mode in ("RGBA", "CMYK", "YCbCr", "PA") else "L")


def one_channel(values: np.ndarray) -> np.ndarray:
    """(H, W) of a mask that was stored with three equal channels."""
    return values if values.ndim == 2 else values.max(axis=2)


def entries_of(
    masks: list[Path], images: ImageIndex, stem_of: Callable[[Path], str], read: Callable[[Path], Truth]
) -> Iterator[Entry | tuple[str, str]]:
    """An entry for each mask, or (mask, reason) where its image is missing."""
    names: set[str] = set()
    for mask in masks:
        stem = stem_of(mask)
        image = images.find(stem, mask)
        if image is None:
            yield str(mask), "image missing"
            continue
        name = stem if stem not in names else f"{mask.parent.name}_{stem}"
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        name = next(each for each in itertools.chain([name], numbered) if each not in names)
        names.add(name)
        yield Entry(name, image, lambda mask=mask: read(mask))


# --- ICDAR 2013, focused scene text ----------------------------------------------------------------------------------

_CHARACTER = re.compile(r'^(#?)\s*((?:-?\d+(?:\.\d+)?[\s,]+){9})"(.*)"\s*$')


@dataclass(frozen=True)
class Character:
    """A line of an ICDAR 2013 text file."""

    color: tuple[int, int, int]
    box: Box
    ignored: bool


def parse_icdar13(text: str) -> list[list[Character]]:
    """Characters of each word: lines `R G B  x y  x1 y1 x2 y2  "c"`, `#` before those to ignore, blank between words.

    Raises:
        UnusableError: a line that is neither such a line nor a comment.
    """
    words: list[list[Character]] = [[]]
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        match = _CHARACTER.match(line.strip())
        if match:
            values = [float(value) for value in re.split(r"[\s,]+", match[2].strip(" ,\t"))]
            left, top, right, bottom = values[5:]
            color = tuple(int(value) for value in values[:3])
            words[-1].append(Character(color, (left, top, right + 1, bottom + 1), bool(match[1])))
        elif not line.strip():
            words.append([])
        elif not line.lstrip().startswith("#"):
            raise UnusableError("damaged text file", f"line {number}: {line[:40]!r}")
    return [word for word in words if word]


def read_icdar13(mask_path: Path) -> Truth:
    """Coloured pixels are text; those of the characters to ignore, and the white ones in their boxes, are ignored."""
    colors = read_values(mask_path, colours=True)
    if colors.ndim == 2:
        colors = np.repeat(colors[..., None], 3, axis=2)
    white = (colors == 255).all(axis=2)
    mask = np.where(white, BACKGROUND, TEXT).astype(np.uint8)
    text_path = next(iter(sorted(mask_path.parent.glob(f"{mask_path.stem}.[tT][xX][tT]"))), None)
    if text_path is None:
        return Truth(mask)
    words = parse_icdar13(text_path.read_text(encoding="utf-8", errors="replace"))
    for character in itertools.chain.from_iterable(words):
        if character.ignored:
            rows, columns = pixel_slices(character.box, mask.shape)
            own = (colors[rows, columns] == character.color).all(axis=2) | white[rows, columns]
            mask[rows, columns][own] = IGNORED
    known = [[each.box for each in word if not each.ignored] for word in words]
    return Truth(mask, [enclosing(boxes) for boxes in known if boxes])


def icdar13_entries(source: Path, split: str | None) -> Iterator[Entry | tuple[str, str]]:
    """Images of ICDAR 2013 focused scene text, tasks 2.1 and 2.2."""

    def is_mask(path: Path) -> bool:
        return path.stem.endswith("_GT")

    masks = [each for each in files_below(source, {".bmp", ".png"}) if is_mask(each) and in_split(each, source, split)]
    return entries_of(masks, ImageIndex(source, is_mask), lambda mask: mask.stem.removesuffix("_GT"), read_icdar13)


# --- Total-Text ------------------------------------------------------------------------------------------------------

LONGEST_RECORD = 4096  # characters of one polygon; the published ones have up to 400
_RECORD = re.compile(r"(?=x:\s{0,9}\[\[)")
_POLYGON = re.compile(r"x:\s*\[\[([^\]]*)\]\].*?y:\s*\[\[([^\]]*)\]\].*?transcriptions:\s*\[(.*?)\]\s*$", re.S | re.M)


def read_totaltext(mask_path: Path, polygons: dict[str, Path]) -> Truth:
    """Grey from 128 is text (the masks are JPEGs or PNGs); words marked `#` are ignored."""
    mask = np.where(one_channel(read_values(mask_path)) >= 128, TEXT, BACKGROUND).astype(np.uint8)
    if mask_path.stem not in polygons:
        return Truth(mask)
    boxes = []
    records = _RECORD.split(polygons[mask_path.stem].read_text(encoding="utf-8", errors="replace"))
    if max(map(len, records)) > LONGEST_RECORD:
        raise UnusableError("damaged polygons", f"{polygons[mask_path.stem].name}: a record without an end")
    for match in filter(None, map(_POLYGON.search, records)):
        try:
            points = np.array([match[axis].replace(",", " ").split() for axis in (1, 2)], dtype=float).T  # (points, 2)
            if not len(points):
                continue
        except ValueError as error:
            raise UnusableError("damaged polygons", f"{polygons[mask_path.stem].name}: {match[0][:60]!r}") from error
        if match[3].strip().strip("u'\"") == "#":
            cv2.fillPoly(mask, [points.astype(np.int32)], IGNORED)
        else:
            boxes.append((*points.min(axis=0).tolist(), *(points.max(axis=0) + 1).tolist()))
    return Truth(mask, boxes)


def totaltext_entries(source: Path, split: str | None) -> Iterator[Entry | tuple[str, str]]:
    """Images of Total-Text: `groundtruth_pixel/SPLIT` beside `Images/SPLIT`."""

    def is_mask(path: Path) -> bool:
        return any(part.lower().startswith("groundtruth") for part in path.relative_to(source).parts[:-1])

    def has_pixels(path: Path) -> bool:  # the set ships masks of whole regions as well
        return any(part.lower().startswith("groundtruth_pixel") for part in path.relative_to(source).parts[:-1])

    polygons = {re.sub("^(poly_)?gt_", "", each.stem): each for each in files_below(source, {".txt"})}
    found = files_below(source, IMAGE_SUFFIXES)
    masks = [each for each in found if has_pixels(each) and in_split(each, source, split)]
    index = ImageIndex(source, is_mask)
    return entries_of(masks, index, lambda mask: mask.stem, lambda mask: read_totaltext(mask, polygons))


# --- COCO_TS and MLT_S -----------------------------------------------------------------------------------------------


def read_index_mask(mask_path: Path, *, binary: bool) -> Truth:
    """A mask of class numbers (1 = text, 0 = background, every other value, 255 above all, ignored), or a binary one.

    Binary: 0 = background, 255 = text, what lies between (a blurred rim) is ignored.
    """
    values = one_channel(read_values(mask_path))
    mask = np.full(values.shape, IGNORED, np.uint8)
    mask[values == 0] = BACKGROUND
    mask[values == (255 if binary else 1)] = TEXT
    return Truth(mask)


def label_folder_entries(source: Path, split: str | None) -> Iterator[Entry | tuple[str, str]]:
    """Images of COCO_TS or MLT_S: PNG masks in a folder whose name ends in `labels` or `masks`.

    A set in whose first masks nothing has the value 1, but some have 255, is taken for binary.
    """

    def is_mask(path: Path) -> bool:
        return any(part.lower().endswith(("labels", "masks")) for part in path.relative_to(source).parts[:-1])

    masks = [each for each in files_below(source, {".png"}) if is_mask(each) and in_split(each, source, split)]
    seen: set[int] = set()
    for mask in masks[:VALUES_SCANNED]:
        try:
            seen.update(np.unique(one_channel(read_values(mask))).tolist())
        except UnusableError:
            continue  # counted when its turn comes
    binary = 1 not in seen and 255 in seen
    index = ImageIndex(source, is_mask)
    return entries_of(masks, index, lambda mask: mask.stem, lambda mask: read_index_mask(mask, binary=binary))


# --- TextSeg ---------------------------------------------------------------------------------------------------------

TEXTSEG_TEXT = 100  # 200 = effects (shadows, glows) and 255 = not known are ignored, 0 = background


def read_textseg(mask_path: Path, annotation: Path | None) -> Truth:
    """Semantic labels: text is text; effects, and every other value but 0, are ignored."""
    values = one_channel(read_values(mask_path))
    mask = np.full(values.shape, IGNORED, np.uint8)
    mask[values == 0] = BACKGROUND
    mask[values == TEXTSEG_TEXT] = TEXT
    if annotation is None:
        return Truth(mask)
    try:
        words = json.loads(annotation.read_text(encoding="utf-8"))
        boxes = [_box_of_numbers(word["bbox"]) for word in (words.values() if isinstance(words, dict) else words)]
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableError("damaged annotation", f"{annotation.name}: {error}") from error
    return Truth(mask, boxes)


def _box_of_numbers(numbers: Sequence[float]) -> Box:
    """The box around x, y, x, y, ...: two corners or four."""
    points = np.array(numbers, dtype=float).reshape(-1, 2)
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{numbers} are no corners")
    return (*points.min(axis=0).tolist(), *(points.max(axis=0) + 1).tolist())


def textseg_entries(source: Path, split: str | None) -> Iterator[Entry | tuple[str, str]]:
    """Images of TextSeg: `image`, `semantic_label`, `annotation`."""

    def is_mask(path: Path) -> bool:
        return any(part.lower().endswith("_label") for part in path.relative_to(source).parts[:-1])

    def stem_of(mask: Path) -> str:
        return re.sub("_mask(fg)?$", "", mask.stem)

    semantic = [each for each in files_below(source, {".png"}) if "semantic_label" in each.relative_to(source).parts]
    masks = [each for each in semantic if in_split(each, source, split)]
    annotations = {each.stem.removesuffix("_anno"): each for each in files_below(source, {".json"})}
    return entries_of(
        masks,
        ImageIndex(source, is_mask),
        stem_of,
        lambda mask: read_textseg(mask, annotations.get(stem_of(mask))),
    )


FORMATS = {
    "icdar13": icdar13_entries,
    "totaltext": totaltext_entries,
    "coco_ts": label_folder_entries,
    "mlt_s": label_folder_entries,
    "textseg": textseg_entries,
}

# --- boxes -----------------------------------------------------------------------------------------------------------


def enclosing(boxes: Sequence[Box]) -> Box:
    """The smallest box around some boxes."""
    edges = np.array(boxes)
    return (*edges[:, :2].min(axis=0).tolist(), *edges[:, 2:].max(axis=0).tolist())


def pixel_slices(box: Box, shape: tuple[int, ...], *, margin: float = 0.0) -> tuple[slice, slice]:
    """Rows and columns of a box, `margin` times its shorter side wider on each side, cut at the image's border."""
    left, top, right, bottom = box
    extra = margin * min(right - left, bottom - top)
    rows = slice(max(0, int(top - extra)), max(0, min(shape[0], int(np.ceil(bottom + extra)))))
    columns = slice(max(0, int(left - extra)), max(0, min(shape[1], int(np.ceil(right + extra)))))
    return rows, columns


# --- output ----------------------------------------------------------------------------------------------------------


class PairFolder:
    """Writes `images/NAME.*` and `masks/NAME.png`; the folder takes its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)

    def __enter__(self) -> "PairFolder":
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        for name in ("images", "masks"):
            try:
                (self.partial / name).mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be made ({error.strerror}); choose another output") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, suffix: str, image: bytes, mask: bytes) -> None:
        """Store one pair."""
        with explain_full_disk(self.path):
            (self.partial / "images" / f"{name}{suffix}").write_bytes(image)
            (self.partial / "masks" / f"{name}.png").write_bytes(mask)


class PairLmdb:
    """Writes `image-%09d` and `mask-%09d`; `label-%09d` is the name of the pair."""

    def __init__(self, path: Path) -> None:
        self.writer = LmdbWriter(path)

    def __enter__(self) -> "PairLmdb":
        return self

    def __exit__(self, *details: object) -> None:
        self.writer.__exit__(*details)

    def add(self, name: str, suffix: str, image: bytes, mask: bytes) -> None:
        """Store one pair."""
        self.writer.append(image, name, mask)


def pairs_of(entry: Entry, *, words: bool, margin: float) -> Iterator[tuple[str, str, bytes, bytes] | tuple[str, str]]:
    """(name, file ending, encoded image, encoded mask) of a whole image or of each of its words.

    A word that cannot be cut out is (name, reason).

    Raises:
        UnusableError: the image or what is known of it cannot be used.
    """
    try:
        data = entry.image.read_bytes()
        image = decode_image(data)
    except OSError as error:
        raise UnusableError("image cannot be read", str(error.strerror)) from error
    except BrokenImageError as error:
        raise UnusableError("damaged image", str(error)) from error
    truth = entry.read()
    if truth.mask.shape != image.shape[:2]:
        sizes = f"image {image.shape[1]} x {image.shape[0]}, mask {truth.mask.shape[1]} x {truth.mask.shape[0]}"
        raise UnusableError("mask of another size", sizes)
    if not words:
        yield entry.name, entry.image.suffix.lower(), data, _png(truth.mask)
        return
    if truth.boxes is None:
        raise UnusableError("no word boxes")
    for number, box in enumerate(truth.boxes, start=1):
        rows, columns = pixel_slices(box, image.shape, margin=margin)
        crop = image[rows, columns]
        name = f"{entry.name}_{number:03d}"
        if crop.size:
            yield name, ".png", _png(crop[..., ::-1]), _png(truth.mask[rows, columns])
        else:
            yield name, "box outside the image"


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="the set, as its owners ship it")
    parser.add_argument("--source", required=True, metavar="FOLDER", help="where the set was unpacked")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="what to make")
    parser.add_argument("--split", metavar="NAME", help="only masks below a folder of this name, such as Train")
    parser.add_argument("--lmdb", action="store_true", help="make an LMDB instead of folders images/ and masks/")
    parser.add_argument("--words", action="store_true", help="cut out words instead of keeping whole images")
    parser.add_argument(
        "--margin", type=float, default=0.1, help="around words, in shorter sides of their boxes (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    options = parse_arguments(arguments)
    source, output = Path(options.source), Path(options.output)
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; name the one that the set was unpacked to")
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another output or remove it")
    if not options.margin >= 0:
        raise UserError(f"--margin {options.margin}: is negative; give 0 or more")
    entries = list(FORMATS[options.format](source, options.split))
    if not entries:
        where = f" below a folder {options.split}" if options.split else ""
        raise UserError(
            f"--source {source}: holds no masks of {options.format}{where}; see --help for what is expected"
        )
    kept = 0
    with RejectionLog.beside(output) as rejected, (PairLmdb if options.lmdb else PairFolder)(output) as writer:
        for entry in progress(entries, total=len(entries), unit="image", description=options.format):
            if not isinstance(entry, Entry):
                rejected.add(*entry)
                continue
            try:
                for pair in pairs_of(entry, words=options.words, margin=options.margin):
                    if len(pair) == 2:
                        rejected.add(*pair)
                        continue
                    writer.add(*pair)
                    kept += 1
            except UnusableError as error:
                rejected.add(entry.name, str(error), error.detail)
        if not kept:
            raise UserError(f"--source {source}: none of {len(entries)} could be used ({dict(rejected.counts)})")
    print_summary(f"{output}: made of {options.format}", {"images read": len(entries), "pairs": kept}, rejected)
    return 0


if __name__ == "__main__":
    run_command_line(main)
