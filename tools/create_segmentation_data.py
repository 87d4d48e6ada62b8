"""Convert published text segmentation sets to the form that SSN is trained from.

The result holds pairs of an image and a grey mask: 255 = text, 0 = background, 128 = not known, to be ignored
(dataset.segmentation.ignore_level).
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np
from PIL import Image

from loading.decoding import IMAGE_ERRORS, MAX_PIXELS
from loading.lmdb_io import PARTIAL_SUFFIX, LmdbWriter
from tools.support import (
    RejectedError,
    RejectionLog,
    checked_image,
    make_parser,
    print_summary,
    progress,
    read_file,
)
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


class Truth(NamedTuple):
    """The ground truth of an image: the classes of its pixels, and the boxes of its words where the set has them."""

    mask: np.ndarray  # (H, W) uint8: TEXT, BACKGROUND or IGNORED
    boxes: list[Box] | None = None


class Entry(NamedTuple):
    """An image of a set (None where it is missing), its mask, and the function that reads the ground truth."""

    name: str
    image: Path | None
    mask: Path
    read: Callable[[Path], Truth]


# --- files -----------------------------------------------------------------------------------------------------------


def files_below(source: Path, suffixes: set[str]) -> list[Path]:
    """Return every file below `source` with one of these endings (lower case), sorted."""
    return sorted(each for each in source.rglob("*") if each.suffix.lower() in suffixes and each.is_file())


def folders_of(path: Path, source: Path) -> list[str]:
    """Return the names, in lower case, of the folders between `source` and a file."""
    return [part.lower() for part in path.relative_to(source).parts[:-1]]


def find_entries(
    source: Path,
    split: str | None,
    read: Callable[[Path], Truth],
    *,
    suffixes: set[str],
    is_mask: Callable[[Path], bool],
    is_other: Callable[[Path], bool] | None = None,
    stem_of: Callable[[Path], str] = lambda mask: mask.stem,
) -> list[Entry]:
    """Return an entry for each mask of a split: its image has the same stem.

    Args:
        split: folder that masks lie below; None takes all masks.
        suffixes: of masks.
        is_mask: whether a file with such a suffix is a mask.
        is_other: whether a file belongs to masks of any kind, so that it is no image; None: `is_mask` tells.
        stem_of: mask -> stem of its image.
    """
    images: dict[str, list[Path]] = {}
    for each in files_below(source, IMAGE_SUFFIXES):
        if not (is_other or is_mask)(each):
            images.setdefault(each.stem, []).append(each)
    entries: list[Entry] = []
    names: set[str] = set()
    for mask in files_below(source, suffixes):
        if not is_mask(mask) or (split is not None and split.lower() not in folders_of(mask, source)):
            continue
        stem = stem_of(mask)
        found = images.get(stem, [])  # of several images, the one whose folder has the name of the mask's
        image = next((each for each in found if each.parent.name == mask.parent.name), found[0] if found else None)
        candidates = itertools.chain([stem, f"{mask.parent.name}_{stem}"], (f"{stem}_{n}" for n in itertools.count(2)))
        name = next(each for each in candidates if each not in names)
        if image is not None:
            names.add(name)
        entries.append(Entry(name, image, mask, read))
    return entries


def read_values(path: Path, *, colours: bool = False) -> np.ndarray:
    """Return the values of a mask, (H, W) or with `colours` (H, W, 3): palette indices stay indices without them."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise RejectedError("mask too large", f"{path.name}: {opened.width} x {opened.height} pixels")
            if opened.mode == "P" and not colours:
                return np.asarray(opened)
            values = np.asarray(opened.convert("RGB"))
            return values if colours else values.max(axis=2)  # three equal channels
    except RejectedError:
        raise
    except IMAGE_ERRORS as error:
        raise RejectedError("damaged mask", f"{path.name}: {error}") from error


def classes_of(values: np.ndarray, *, text: int) -> np.ndarray:
    """Return the mask of stored values of which 0 is background, `text` is text and every other one unknown."""
    mask = np.full(values.shape, IGNORED, np.uint8)
    mask[values == 0] = BACKGROUND
    mask[values == text] = TEXT
    return mask


# --- ICDAR 2013, focused scene text ----------------------------------------------------------------------------------

_CHARACTER = re.compile(r'^(#?)\s*((?:-?\d+(?:\.\d+)?[\s,]+){9})"(.*)"\s*$')


class Character(NamedTuple):
    """One line of an ICDAR 2013 text file."""

    color: tuple[int, ...]
    corners: np.ndarray  # (2, 2): x and y of the top left and the bottom right pixel
    ignored: bool


def parse_icdar13(text: str) -> list[list[Character]]:
    """Read the characters of each word: lines `R G B  x y  x1 y1 x2 y2  "c"`, `#` before ignored ones, words apart.

    Raises:
        RejectedError: a line that is neither such a line nor a comment.
    """
    words: list[list[Character]] = [[]]
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        match = _CHARACTER.match(line.strip())
        if match:
            values = [float(value) for value in match[2].replace(",", " ").split()]
            color, corners = tuple(map(int, values[:3])), np.reshape(values[5:], (2, 2))
            words[-1].append(Character(color, corners, bool(match[1])))
        elif not line.strip():
            words.append([])
        elif not line.lstrip().startswith("#"):
            raise RejectedError("damaged text file", f"line {number}: {line[:40]!r}")
    return [word for word in words if word]


def read_icdar13(mask_path: Path) -> Truth:
    """Take coloured pixels as text; those of characters to ignore, and the white ones in their boxes, are ignored."""
    colors = read_values(mask_path, colours=True)
    white = (colors == 255).all(axis=2)
    mask = np.where(white, BACKGROUND, TEXT).astype(np.uint8)
    text_path = next(iter(sorted(mask_path.parent.glob(f"{mask_path.stem}.[tT][xX][tT]"))), None)
    if text_path is None:
        return Truth(mask)
    words = parse_icdar13(text_path.read_text(encoding="utf-8", errors="replace"))
    for character in itertools.chain.from_iterable(words):
        if character.ignored:
            rows, columns = pixel_slices(box_around(character.corners), mask.shape)
            own = (colors[rows, columns] == character.color).all(axis=2) | white[rows, columns]
            mask[rows, columns][own] = IGNORED
    known = [[each.corners for each in word if not each.ignored] for word in words]
    return Truth(mask, [box_around(np.concatenate(corners)) for corners in known if corners])


def icdar13_entries(source: Path, split: str | None) -> list[Entry]:
    """Return the images of ICDAR 2013 focused scene text, tasks 2.1 and 2.2."""
    return find_entries(
        source,
        split,
        read_icdar13,
        suffixes={".bmp", ".png"},
        is_mask=lambda path: path.stem.endswith("_GT"),
        stem_of=lambda mask: mask.stem.removesuffix("_GT"),
    )


# --- Total-Text ------------------------------------------------------------------------------------------------------

LONGEST_RECORD = 4096  # characters of one polygon; the published ones have up to 400
_RECORD = re.compile(r"(?=x:\s{0,9}\[\[)")
_POLYGON = re.compile(r"x:\s*\[\[([^\]]*)\]\].*?y:\s*\[\[([^\]]*)\]\].*?transcriptions:\s*\[(.*?)\]\s*$", re.S | re.M)


def read_totaltext(mask_path: Path, polygons: dict[str, Path]) -> Truth:
    """Take grey from 128 as text (the masks are JPEGs or PNGs); words marked `#` are ignored."""
    mask = np.where(read_values(mask_path) >= 128, TEXT, BACKGROUND).astype(np.uint8)
    if mask_path.stem not in polygons:
        return Truth(mask)
    boxes = []
    records = _RECORD.split(polygons[mask_path.stem].read_text(encoding="utf-8", errors="replace"))
    if max(map(len, records)) > LONGEST_RECORD:
        raise RejectedError("damaged polygons", f"{polygons[mask_path.stem].name}: a record without an end")
    for match in filter(None, map(_POLYGON.search, records)):
        try:
            points = np.array([match[axis].replace(",", " ").split() for axis in (1, 2)], dtype=float).T  # (points, 2)
        except ValueError as error:
            raise RejectedError("damaged polygons", f"{polygons[mask_path.stem].name}: {match[0][:60]!r}") from error
        if not len(points):
            continue
        if match[3].strip().strip("u'\"") == "#":
            cv2.fillPoly(mask, [points.astype(np.int32)], IGNORED)
        else:
            boxes.append(box_around(points))
    return Truth(mask, boxes)


def totaltext_entries(source: Path, split: str | None) -> list[Entry]:
    """Return the images of Total-Text: `groundtruth_pixel/SPLIT` beside `Images/SPLIT`."""

    def below(path: Path, start: str) -> bool:
        return any(folder.startswith(start) for folder in folders_of(path, source))

    polygons = {re.sub("^(poly_)?gt_", "", each.stem): each for each in files_below(source, {".txt"})}
    return find_entries(
        source,
        split,
        lambda mask: read_totaltext(mask, polygons),
        suffixes=IMAGE_SUFFIXES,
        is_mask=lambda path: below(path, "groundtruth_pixel"),
        is_other=lambda path: below(path, "groundtruth"),  # the set has masks of whole regions as well
    )


# --- COCO_TS and MLT_S -----------------------------------------------------------------------------------------------


def label_folder_entries(source: Path, split: str | None) -> list[Entry]:
    """Return the images of COCO_TS or MLT_S: PNG masks in a folder whose name ends in `labels` or `masks`.

    Masks hold class numbers: 1 = text, 0 = background, every other value, 255 above all, is ignored. A set in whose
    first masks nothing has the value 1, but some have 255, is binary: 255 = text, what lies between (a blurred
    boundary) is ignored.
    """

    def is_mask(path: Path) -> bool:
        return any(folder.endswith(("labels", "masks")) for folder in folders_of(path, source))

    def read(mask: Path) -> Truth:
        return Truth(classes_of(read_values(mask), text=text))

    entries = find_entries(source, split, read, suffixes={".png"}, is_mask=is_mask)
    seen: set[int] = set()
    for entry in entries[:VALUES_SCANNED]:
        with contextlib.suppress(RejectedError):  # counted when its turn comes
            seen.update(np.unique(read_values(entry.mask)).tolist())
    text = 255 if 1 not in seen and 255 in seen else 1
    return entries


# --- TextSeg ---------------------------------------------------------------------------------------------------------

TEXTSEG_TEXT = 100  # 200 = effects (shadows, glows) and 255 = not known are ignored, 0 = background


def read_textseg(mask_path: Path, annotation: Path | None) -> Truth:
    """Read semantic labels: effects, and every value but text and background, are ignored."""
    mask = classes_of(read_values(mask_path), text=TEXTSEG_TEXT)
    if annotation is None:
        return Truth(mask)
    try:
        words = json.loads(annotation.read_text(encoding="utf-8"))
        boxes = [
            box_around(np.array(word["bbox"], dtype=float).reshape(-1, 2))  # two corners or four
            for word in (words.values() if isinstance(words, dict) else words)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise RejectedError("damaged annotation", f"{annotation.name}: {error}") from error
    return Truth(mask, boxes)


def textseg_entries(source: Path, split: str | None) -> list[Entry]:
    """Return the images of TextSeg: `image`, `semantic_label`, `annotation`."""

    def stem_of(mask: Path) -> str:
        return re.sub("_mask(fg)?$", "", mask.stem)

    annotations = {each.stem.removesuffix("_anno"): each for each in files_below(source, {".json"})}
    return find_entries(
        source,
        split,
        lambda mask: read_textseg(mask, annotations.get(stem_of(mask))),
        suffixes={".png"},
        is_mask=lambda path: "semantic_label" in folders_of(path, source),
        is_other=lambda path: any(folder.endswith("_label") for folder in folders_of(path, source)),
        stem_of=stem_of,
    )


FORMATS = {
    "icdar13": icdar13_entries,
    "totaltext": totaltext_entries,
    "coco_ts": label_folder_entries,
    "mlt_s": label_folder_entries,
    "textseg": textseg_entries,
}

# --- boxes -----------------------------------------------------------------------------------------------------------


def box_around(points: np.ndarray) -> Box:
    """Return the smallest box around pixels, (N, 2) of x and y; raises RejectedError if there is none."""
    if not len(points) or not np.isfinite(points).all():
        raise RejectedError("damaged box", f"corners {points.tolist()}")
    return (*points.min(axis=0).tolist(), *(points.max(axis=0) + 1).tolist())


def pixel_slices(box: Box, shape: tuple[int, ...], *, margin: float = 0.0) -> tuple[slice, slice]:
    """Return rows and columns of a box, `margin` times its shorter side wider on each side, clipped to the image."""
    left, top, right, bottom = box
    extra = margin * min(right - left, bottom - top)
    rows = slice(max(0, int(top - extra)), max(0, min(shape[0], int(np.ceil(bottom + extra)))))
    columns = slice(max(0, int(left - extra)), max(0, min(shape[1], int(np.ceil(right + extra)))))
    return rows, columns


# --- output ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pair_folder(path: Path) -> Iterator[Callable[[str, str, bytes, bytes], None]]:
    """Give a function that stores `images/NAME.*` and `masks/NAME.png`; the folder takes its name at the end."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)

    def add(name: str, suffix: str, image: bytes, mask: bytes) -> None:
        with explain_full_disk(path):
            (partial / "images" / f"{name}{suffix}").write_bytes(image)
            (partial / "masks" / f"{name}.png").write_bytes(mask)

    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        for name in ("images", "masks"):
            try:
                (partial / name).mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{path}: cannot be made ({error.strerror}); choose another output") from error
        yield add
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def pair_lmdb(path: Path) -> Iterator[Callable[[str, str, bytes, bytes], None]]:
    """Give a function that stores `image-%09d` and `mask-%09d`; `label-%09d` is the name of the pair."""
    with LmdbWriter(path) as writer:
        yield lambda name, suffix, image, mask: writer.append(image, name, mask)


def pairs_of(
    entry: Entry, rejected: RejectionLog, *, words: bool, margin: float
) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Yield (name, file ending, encoded image, encoded mask) of a whole image or of each of its words.

    Raises:
        RejectedError: the image or its ground truth cannot be used.
    """
    if entry.image is None:
        raise RejectedError("image missing")
    data = read_file(entry.image)
    image = checked_image(data)
    truth = entry.read(entry.mask)
    if truth.mask.shape != image.shape[:2]:
        raise RejectedError("mask of another size", f"(height, width) {truth.mask.shape}, image {image.shape[:2]}")
    if not words:
        yield entry.name, entry.image.suffix.lower(), data, _png(truth.mask)
        return
    if truth.boxes is None:
        raise RejectedError("no word boxes")
    for number, box in enumerate(truth.boxes, start=1):
        rows, columns = pixel_slices(box, image.shape, margin=margin)
        name, crop = f"{entry.name}_{number:03d}", image[rows, columns]
        if crop.size:
            yield name, ".png", _png(crop[..., ::-1]), _png(truth.mask[rows, columns])
        else:
            rejected.add(name, "box outside the image")


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="which published set it is")
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
    """Run the tool and return its exit status."""
    options = parse_arguments(arguments)
    source, output = Path(options.source), Path(options.output)
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; name the one that the set was unpacked to")
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another output or remove it")
    if not options.margin >= 0:
        raise UserError(f"--margin {options.margin}: is negative; give 0 or more")
    entries = FORMATS[options.format](source, options.split)
    if not entries:
        where = f" below a folder {options.split}" if options.split else ""
        raise UserError(
            f"--source {source}: holds no masks of {options.format}{where}; see --help for what is expected"
        )
    kept = 0
    with RejectionLog.beside(output) as rejected, (pair_lmdb if options.lmdb else pair_folder)(output) as add:
        for entry in progress(entries, total=len(entries), unit="image", description=options.format):
            try:
                for pair in pairs_of(entry, rejected, words=options.words, margin=options.margin):
                    add(*pair)
                    kept += 1
            except RejectedError as error:
                rejected.add(entry.name if entry.image else str(entry.mask), error.reason, error.detail)
        if not kept:
            raise UserError(f"--source {source}: none of {len(entries)} could be used ({dict(rejected.counts)})")
    print_summary(f"{output}: made of {options.format}", {"images read": len(entries), "pairs": kept}, rejected)
    return 0


if __name__ == "__main__":
    run_command_line(main)
