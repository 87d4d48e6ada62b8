"""Convert published text segmentation sets to the form that SSN is trained from.

The result holds pairs of an image and a grey mask: 255 = text, 0 = background, 128 = not known, to be ignored
(dataset.segmentation.ignore_level).
"""

import contextlib
import functools
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

from loading.decoding import IMAGE_ERRORS, IMAGE_SUFFIXES, MAX_PIXELS
from loading.lmdb_io import PARTIAL_SUFFIX, LmdbWriter
from tools import support
from tools.support import Box, RejectedError
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
VALUES_SCANNED = 200  # masks looked at to find out which values a set uses


class Truth(NamedTuple):
    """The ground truth of an image: the classes of its pixels, and the boxes of its words where the set has them."""

    mask: np.ndarray  # (H, W) uint8: TEXT, BACKGROUND or IGNORED
    boxes: list[Box] | None = None


class DataSet(NamedTuple):
    """How a published set is laid out and read; patterns match paths below the source, in any case."""

    read: Callable[[Path, Path | None], Truth]  # of a mask, and an annotation or None
    masks: str  # the group `stem` is the stem of the image
    not_images: str  # masks of any kind
    annotations: str = "(?!)"  # of images, with the same group; none


class Entry(NamedTuple):
    """An image of a set (None where it is missing), with its mask and its annotation if it has one."""

    name: str
    image: Path | None
    mask: Path
    annotation: Path | None


def find_entries(data_set: DataSet, source: Path, split: str | None) -> Iterator[Entry]:
    """Yield an entry for each mask below a folder `split` (None: for each mask): its image has the same stem."""
    images: dict[str, list[Path]] = {}
    masks: list[tuple[Path, str]] = []
    annotations: dict[str, Path] = {}
    for path in sorted(each for each in source.rglob("*") if each.is_file()):
        place = path.relative_to(source)
        mask, annotation, not_image = (
            re.fullmatch(f"(.*/)?{pattern}", place.as_posix(), re.IGNORECASE)
            for pattern in (data_set.masks, data_set.annotations, data_set.not_images)
        )
        if mask and (split is None or split.lower() in map(str.lower, place.parts[:-1])):
            masks.append((path, mask["stem"]))
        elif annotation:
            annotations[annotation["stem"]] = path
        elif not not_image and path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.stem, []).append(path)
    names: set[str] = set()
    for mask, stem in masks:
        found = images.get(stem, [None])  # of several images, the one whose folder has the name of the mask's
        image = next((each for each in found if each and each.parent.name == mask.parent.name), found[0])
        candidates = itertools.chain([stem, f"{mask.parent.name}_{stem}"], (f"{stem}_{n}" for n in itertools.count(2)))
        name = next(each for each in candidates if each not in names)
        if image is not None:
            names.add(name)
        yield Entry(name, image, mask, annotations.get(stem))


def read_values(path: Path, *, colours: bool = False) -> np.ndarray:
    """Return the values of a mask, (H, W) or with `colours` (H, W, 3): palette indices stay indices without them."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels")
            if opened.mode == "P" and not colours:
                return np.asarray(opened)
            values = np.asarray(opened.convert("RGB"))
            return values if colours else values.max(axis=2)  # three equal channels
    except IMAGE_ERRORS as error:
        raise RejectedError("damaged mask", f"{path.name}: {error}") from error


def classes_of(values: np.ndarray, *, text: int) -> np.ndarray:
    """Return the mask of stored values of which 0 is background, `text` is text and every other one unknown."""
    return np.select([values == 0, values == text], [BACKGROUND, TEXT], IGNORED).astype(np.uint8)


# --- ICDAR 2013, focused scene text ----------------------------------------------------------------------------------

_CHARACTER = re.compile(r'^(#?)\s*((?:-?\d+(?:\.\d+)?[\s,]+){9})"(.*)"\s*$')


def read_icdar13(mask_path: Path, text_path: Path | None) -> Truth:
    """Take coloured pixels as text; those of characters to ignore, and the white ones in their boxes, are ignored.

    The text has a line `R G B  x y  x1 y1 x2 y2  "c"` for each character, `#` before ignored ones, and words apart.
    """
    colors = read_values(mask_path, colours=True)
    white = (colors == 255).all(axis=2)
    mask = np.where(white, BACKGROUND, TEXT).astype(np.uint8)
    if text_path is None:
        return Truth(mask)
    text = support.read_file(text_path).decode(errors="replace").removeprefix("\ufeff")
    words: list[list[np.ndarray]] = [[]]  # corners of the characters of each word
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _CHARACTER.match(line.strip()):
            values = [float(value) for value in match[2].replace(",", " ").split()]
            color, corners = values[:3], np.reshape(values[5:], (2, 2))  # of the top left and the bottom right pixel
            if match[1]:
                rows, columns = support.pixel_slices(box_around(corners), mask.shape)
                own = (colors[rows, columns] == color).all(axis=2) | white[rows, columns]
                mask[rows, columns][own] = IGNORED
            else:
                words[-1].append(corners)
        elif not line.strip():
            words.append([])
        elif not line.lstrip().startswith("#"):
            raise RejectedError("damaged text file", f"line {number}: {line[:40]!r}")
    return Truth(mask, [box_around(np.concatenate(corners)) for corners in words if corners])


# --- Total-Text ------------------------------------------------------------------------------------------------------

LONGEST_RECORD = 4096  # characters of one polygon; the published ones have up to 400
_RECORD = re.compile(r"(?=x:\s{0,9}\[\[)")
_POLYGON = re.compile(r"x:\s*\[\[([^\]]*)\]\].*?y:\s*\[\[([^\]]*)\]\].*?transcriptions:\s*\[(.*?)\]\s*$", re.S | re.M)


def read_totaltext(mask_path: Path, polygons: Path | None) -> Truth:
    """Take grey from 128 as text (the masks are JPEGs or PNGs); words marked `#` are ignored."""
    mask = np.where(read_values(mask_path) >= 128, TEXT, BACKGROUND).astype(np.uint8)
    if polygons is None:
        return Truth(mask)
    boxes = []
    records = _RECORD.split(support.read_file(polygons).decode(errors="replace"))
    if max(map(len, records)) > LONGEST_RECORD:
        raise RejectedError("damaged polygons", f"{polygons.name}: a record without an end")
    for match in filter(None, map(_POLYGON.search, records)):
        try:
            points = np.array([match[axis].replace(",", " ").split() for axis in (1, 2)], dtype=float).T  # (points, 2)
        except ValueError as error:
            raise RejectedError("damaged polygons", f"{polygons.name}: {match[0][:60]!r}") from error
        if not len(points):
            continue
        if match[3].strip().strip("u'\"") == "#":
            cv2.fillPoly(mask, [points.astype(np.int32)], IGNORED)
        else:
            boxes.append(box_around(points))
    return Truth(mask, boxes)


# --- COCO_TS and MLT_S -----------------------------------------------------------------------------------------------


def read_labels(mask_path: Path, annotation: None, *, text: int = 1) -> Truth:
    """Take `text` as text and 0 as background; every other value, 255 above all, is ignored."""
    return Truth(classes_of(read_values(mask_path), text=text))


def text_value(masks: Sequence[Path]) -> int:
    """Return the value of text in a set: 1, or 255 if its first masks have that value and none has 1.

    Such a set is binary; what lies between (a blurred boundary) is ignored.
    """
    seen: set[int] = set()
    for mask in masks[:VALUES_SCANNED]:
        with contextlib.suppress(RejectedError):  # counted when its turn comes
            seen.update(np.unique(read_values(mask)).tolist())
    return 255 if 1 not in seen and 255 in seen else 1


# --- TextSeg ---------------------------------------------------------------------------------------------------------

TEXTSEG_TEXT = 100  # 200 = effects (shadows, glows) and 255 = not known are ignored, 0 = background


def read_textseg(mask_path: Path, annotation: Path | None) -> Truth:
    """Read semantic labels: effects, and every value but text and background, are ignored."""
    mask = classes_of(read_values(mask_path), text=TEXTSEG_TEXT)
    if annotation is None:
        return Truth(mask)
    try:
        words = json.loads(support.read_file(annotation))
        boxes = [
            box_around(np.array(word["bbox"], dtype=float).reshape(-1, 2))  # two corners or four
            for word in (words.values() if isinstance(words, dict) else words)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise RejectedError("damaged annotation", f"{annotation.name}: {error}") from error
    return Truth(mask, boxes)


LABEL_FOLDERS = DataSet(
    read_labels, r"[^/]*(labels|masks)/(.*/)?(?P<stem>[^/]+)\.png", not_images="[^/]*(labels|masks)/.*"
)
FORMATS = {
    "icdar13": DataSet(
        read_icdar13,
        r"(?P<stem>[^/]+)_gt\.(bmp|png)",
        not_images=r"[^/]+_gt\.\w+",
        annotations=r"(?P<stem>[^/]+)_gt\.txt",
    ),
    "totaltext": DataSet(
        read_totaltext,
        rf"groundtruth_pixel[^/]*/(.*/)?(?P<stem>[^/]+)\.({'|'.join(each[1:] for each in IMAGE_SUFFIXES)})",
        not_images="groundtruth[^/]*/.*",  # the set has masks of whole regions as well
        annotations=r"(poly_)?(gt_)?(?P<stem>[^/]+)\.txt",
    ),
    "coco_ts": LABEL_FOLDERS,
    "mlt_s": LABEL_FOLDERS,
    "textseg": DataSet(
        read_textseg,
        r"semantic_label/(.*/)?(?P<stem>[^/]+?)(_mask(fg)?)?\.png",
        not_images="[^/]*_label/.*",
        annotations=r"(?P<stem>[^/]+?)(_anno)?\.json",
    ),
}

# --- boxes -----------------------------------------------------------------------------------------------------------


def box_around(points: np.ndarray) -> Box:
    """Return the smallest box around pixels, (N, 2) of x and y; raises RejectedError if there is none."""
    if not len(points) or not np.isfinite(points).all():
        raise RejectedError("damaged box", f"corners {points.tolist()}")
    return (*points.min(axis=0).tolist(), *(points.max(axis=0) + 1).tolist())


# --- output ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pair_folder(path: Path) -> Iterator[Callable[[str, str, bytes, bytes], None]]:
    """Give a function that stores `images/NAME.*` and `masks/NAME.png`; the folder takes its name at the end."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)

    def add(name: str, suffix: str, image: bytes, mask: bytes) -> None:
        (partial / "images" / f"{name}{suffix}").write_bytes(image)
        (partial / "masks" / f"{name}.png").write_bytes(mask)

    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with explain_full_disk(path):
            for name in ("images", "masks"):
                (partial / name).mkdir(parents=True)
            yield add
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def pair_lmdb(path: Path) -> Iterator[Callable[[str, str, bytes, bytes], None]]:
    """Give a function that stores `image-%09d` and `mask-%09d`; `label-%09d` is the name of the pair."""
    with LmdbWriter(path) as writer:
        yield lambda name, suffix, image, mask: writer.append(image, name, mask)


def pairs_of(
    entry: Entry, read: Callable[[Path, Path | None], Truth], log: support.RejectionLog, *, words: bool, margin: float
) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Yield (name, file ending, encoded image, encoded mask) of a whole image or of each of its words.

    Raises RejectedError if the image or its ground truth cannot be used.
    """
    if entry.image is None:
        raise RejectedError("image missing")
    data = support.read_file(entry.image)
    image = support.checked_image(data)
    truth = read(entry.mask, entry.annotation)
    if truth.mask.shape != image.shape[:2]:
        raise RejectedError("mask of another size", f"(height, width) {truth.mask.shape}, image {image.shape[:2]}")
    if not words:
        yield entry.name, entry.image.suffix.lower(), data, _png(truth.mask)
        return
    if truth.boxes is None:
        raise RejectedError("no word boxes")
    for number, box in enumerate(truth.boxes, start=1):
        rows, columns = support.pixel_slices(box, image.shape, margin=margin)
        name, crop = f"{entry.name}_{number:03d}", image[rows, columns]
        if crop.size:
            yield name, ".png", _png(crop[..., ::-1]), _png(truth.mask[rows, columns])
        else:
            log.add(name, "box outside the image")


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = support.make_parser(__doc__, EXAMPLE)
    parser.add_argument("--format", required=True, choices=sorted(FORMATS), help="which published set it is")
    parser.add_argument("--source", required=True, type=Path, metavar="FOLDER", help="where the set was unpacked")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="what to make")
    parser.add_argument("--split", metavar="NAME", help="only masks below a folder of this name, such as Train")
    parser.add_argument("--lmdb", action="store_true", help="make an LMDB instead of folders images/ and masks/")
    parser.add_argument("--words", action="store_true", help="cut out words instead of keeping whole images")
    parser.add_argument("--margin", type=float, default=0.1, help="around words, in shorter sides (%(default)s)")
    options = parser.parse_args(arguments)
    source, output = options.source, options.output
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder; name the one that the set was unpacked to")
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another output or remove it")
    if not options.margin >= 0:
        raise UserError(f"--margin {options.margin}: is negative; give 0 or more")
    data_set = FORMATS[options.format]
    entries = list(find_entries(data_set, source, options.split))
    if not entries:
        where = f" below a folder {options.split}" if options.split else ""
        raise UserError(
            f"--source {source}: holds no masks of {options.format}{where}; see --help for what is expected"
        )
    read, kept = data_set.read, 0
    if read is read_labels:
        read = functools.partial(read_labels, text=text_value([entry.mask for entry in entries]))
    with support.RejectionLog.beside(output) as rejected, (pair_lmdb if options.lmdb else pair_folder)(output) as add:
        for entry in support.progress(entries, total=len(entries), unit="image", description=options.format):
            try:
                for pair in pairs_of(entry, read, rejected, words=options.words, margin=options.margin):
                    add(*pair)
                    kept += 1
            except RejectedError as error:
                rejected.add(entry.name if entry.image else str(entry.mask), error.reason, error.detail)
        if not kept:
            raise UserError(f"--source {source}: none of {len(entries)} could be used ({dict(rejected.counts)})")
    support.print_summary(f"{output}: made of {options.format}", {"images read": len(entries), "pairs": kept}, rejected)
    return 0


if __name__ == "__main__":
    run_command_line(main)
