"""Make a word LMDB from the archives of SynthText (word boxes in gt.mat) or MJSynth (labels in the file names)."""

import functools
import itertools
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from tools import support
from tools.create_lmdb_dataset import words_of_list
from tools.support import RejectedError, Word
from utils import UserError, first_line, run_command_line

EXAMPLE = """  python tools/crop_by_word_bb.py SynthText/gt.mat data/training/ST
  python tools/crop_by_word_bb.py mnt/ramdisk/max/90kDICT32px/annotation_train.txt data/training/MJ/MJ_train"""

MIN_SIDE = 2.0  # pixels; smaller boxes hold no letter
MIN_VISIBLE = 0.5  # share of a box that must lie inside the image
JPEG_QUALITY = 95
_MJSYNTH_NAME = re.compile(r"[^_]*_(?P<label>.+)_[^_]*\.[^.]+")


def read_synthtext(gt_file: str | os.PathLike) -> list[tuple[Any, Any, Any]]:
    """Return the raw (imname, wordBB, txt) of every image in a gt.mat; the large `charBB` is not read."""
    from scipy import io

    fields = ("imnames", "wordBB", "txt")
    try:
        with ProcessPoolExecutor(1) as process:  # scipy's reader can crash on a damaged file
            content = process.submit(io.loadmat, gt_file, variable_names=fields).result()
    except Exception as error:  # the reader raises almost anything for a damaged file
        cause = "MATLAB 7.3: save it as version 7" if isinstance(error, NotImplementedError) else first_line(error)
        raise UserError(f"{gt_file}: cannot be read as a MATLAB file ({cause}); name SynthText's gt.mat") from error
    missing = [field for field in fields if field not in content]
    if missing:
        raise UserError(f"{gt_file}: has no {', '.join(missing)}; name SynthText's gt.mat")
    names, boxes, texts = (content[field].ravel() for field in fields)
    if not len(names) == len(boxes) == len(texts):
        raise UserError(f"{gt_file}: imnames, wordBB and txt have {len(names)}, {len(boxes)} and {len(texts)} entries")
    return list(zip(names, boxes, texts, strict=True))


def parse_scene(raw: tuple[Any, Any, Any]) -> tuple[str, np.ndarray, list[str]]:
    """Return name, corners and words of an image: x and y of N boxes (2, 4, N), from the text's top left on, N words.

    Published entries with a single word have boxes of shape 2 x 4.
    """
    raw_name, raw_boxes, raw_texts = raw
    name = str(np.ravel(raw_name)[0]) if np.size(raw_name) else ""
    boxes = np.asarray(raw_boxes)
    words = [word for text in np.ravel(raw_texts) for word in _text(text).split()]
    return name, boxes[..., None] if boxes.ndim == 2 else boxes, words


def _text(value: Any) -> str:
    """Return a string of MATLAB, which may be wrapped in arrays of one element."""
    return " ".join(map(_text, np.ravel(value))) if isinstance(value, np.ndarray) else str(value)


def crop_scene(raw: tuple[Any, Any, Any], *, folder: str) -> list[Word]:
    """Cut every word out of one image of SynthText; runs in a worker."""
    name, boxes, words = parse_scene(raw)
    if not boxes.size and not words:
        return []
    is_sound = boxes.ndim == 3 and boxes.shape[:2] == (2, 4) and boxes.dtype.kind in "fiu"
    try:
        if not is_sound:
            raise RejectedError("boxes are not 2 x 4 x N", f"shape {boxes.shape} of {boxes.dtype}")
        if boxes.shape[2] != len(words):
            raise RejectedError("boxes and words differ in number", f"{boxes.shape[2]} boxes, {len(words)} words")
        image = support.checked_image(support.read_file(support.find_image(folder, name)))
    except RejectedError as error:
        count = max(1, len(words), boxes.shape[2] if is_sound else 0)
        return [Word(name, reason=error.reason, detail=error.detail, words=count)]
    found = []
    for number, (box, label) in enumerate(zip(boxes.transpose(2, 1, 0).astype(np.float32), words, strict=True), 1):
        place = f"{name}#{number}"
        try:
            found.append(Word(place, image=crop_word(image, box), label=label))
        except RejectedError as error:
            found.append(Word(place, reason=error.reason, detail=f"corners {np.round(box, 1).tolist()}"))
    return found


def crop_word(image: np.ndarray, box: np.ndarray) -> bytes:
    """Return the part of an image (H, W, 3) in the upright rectangle around the corners `box` (4, 2), as a JPEG."""
    check_box(box, image.shape[1], image.shape[0])
    rows, columns = support.pixel_slices((*box.min(axis=0), *box.max(axis=0)), image.shape)
    done, encoded = cv2.imencode(".jpg", image[rows, columns, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise RejectedError("too large for the format")
    return encoded.tobytes()


def check_box(box: np.ndarray, width: int, height: int) -> None:
    """Raise RejectedError when the corners `box` (4, 2) cannot be cut out of a width x height image."""
    if not np.isfinite(box).all():
        raise RejectedError("box is not finite")
    low, high = box.min(axis=0), box.max(axis=0)
    if (high - low).min() < MIN_SIDE or cv2.contourArea(cv2.convexHull(box)) < MIN_SIDE**2:
        raise RejectedError("degenerate box")
    visible = np.minimum(high, (width, height)) - np.maximum(low, 0)
    if visible.min() <= 0 or visible.prod() < MIN_VISIBLE * (high - low).prod():
        raise RejectedError("box outside the image")


def split_mjsynth_line(line: str) -> Iterator[tuple[str, str]]:
    """Yield path and label of an annotation line, `./2425/1/115_Lube_45484.jpg 45484` or the path alone."""
    name = (line.rsplit(maxsplit=1) or [""])[0]
    match = _MJSYNTH_NAME.fullmatch(name.rpartition("/")[2])
    if match is None:
        raise RejectedError("no label in the file name")
    yield name, match["label"]


def words_of(options: Any) -> Iterator[Word]:
    """Yield the words of the archive that the command line names, in its order, with a progress bar."""
    annotation = options.annotation
    folder = options.images or os.path.dirname(os.path.abspath(annotation))
    if annotation.endswith(".mat"):
        scenes = read_synthtext(annotation)
        crop = functools.partial(crop_scene, folder=folder)
        results = support.map_in_processes(crop, scenes, workers=options.workers, chunk_size=8)
        bar = support.progress(results, total=len(scenes), unit="image", description="SynthText")
        yield from itertools.chain.from_iterable(bar)
    elif annotation.endswith(".txt"):
        yield from words_of_list(folder, annotation, workers=options.workers, split=split_mjsynth_line)
    else:
        raise UserError(f"{annotation}: is neither SynthText's gt.mat nor MJSynth's annotation_*.txt")


def main(arguments: list[str] | None = None) -> int:
    parser = support.make_parser(__doc__, EXAMPLE)
    parser.add_argument("annotation", metavar="ANNOTATION", help="SynthText's gt.mat or MJSynth's annotation_*.txt")
    parser.add_argument("output", metavar="OUTPUT_LMDB", help="folder to make")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the images' paths (default: ANNOTATION's)")
    support.add_run_arguments(parser)
    options = parser.parse_args(arguments)
    support.store_words(words_of(options), options.output, overwrite=options.overwrite)
    return 0


if __name__ == "__main__":
    run_command_line(main)
