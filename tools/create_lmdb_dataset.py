"""Make a word LMDB from a folder of images and a list of labels."""

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
from PIL import ExifTags, Image

from loading.decoding import IMAGE_ERRORS, decode_image
from tools import support
from tools.support import RejectedError, Word
from utils import UserError, run_command_line

EXAMPLE = """  python tools/create_lmdb_dataset.py words/ words/gt.txt data/training/words

each line of GT_FILE is `path<TAB>label`, `path,label` or `path, "label"`; paths are relative to IMAGE_FOLDER"""

JPEG_QUALITY = 95  # of images that are turned
LONGEST_PATH = 4096  # bytes, of any system

Split = Callable[[str], Iterator[tuple[str, str]]]


def read_entries(gt_file: str | os.PathLike) -> Iterator[bytes]:
    """Yield the lines of a list of labels that are not blank; a byte order mark is dropped.

    Raises UserError when the file is missing or is UTF-16.
    """
    try:
        with open(gt_file, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise UserError(f"{gt_file}: is UTF-16; save it as UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield line
    except OSError as error:
        raise UserError(f"{gt_file}: cannot be read ({error.strerror}); name the list of labels") from error


def split_line(line: str) -> Iterator[tuple[str, str]]:
    """Yield every way to take `line` apart into (path, label), the likeliest first.

    The separator is the first tab, or the first comma where there is no tab. Later ones are tried too, for paths that
    hold it. A label in double quotes after a comma loses the quotes (ICDAR's form).
    """
    separator = "\t" if "\t" in line else ","
    for place in (i for i, character in enumerate(line[:LONGEST_PATH]) if character == separator):
        name, label = line[:place].strip(), line[place + 1 :].strip()
        if separator == "," and len(label) >= 2 and label[0] == label[-1] == '"':
            label = label[1:-1].replace('\\"', '"')
        yield name, label


def upright(data: bytes) -> bytes:
    """Return a valid image file turned as its EXIF orientation says, and without it; all others unchanged.

    Data sets are read as stored, since masks and boxes are those of the stored pixels, but `Reader` turns images.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9):
                return data
            is_jpeg = image.format in ("JPEG", "MPO")  # the latter is how some telephones call theirs
        pixels = decode_image(data, oriented=True)
    except IMAGE_ERRORS:  # of formats and tags that only Pillow minds
        return data
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if is_jpeg else []
    return cv2.imencode(".jpg" if is_jpeg else ".png", pixels[..., ::-1], options)[1].tobytes()


def word_of_entry(entry: bytes, *, folder: str, split: Split) -> Word:
    """Return the word of an entry of a list, or why there is none; runs in a worker."""
    line = name = entry.decode(errors="backslashreplace")
    missing = None
    try:
        for name, label in split(entry.decode()):
            try:
                path = support.find_image(folder, name)
            except RejectedError as error:
                missing = missing or Word(name or line, reason=error.reason)
                continue
            if not label:
                raise RejectedError("empty label")
            if "\t" in label:
                raise RejectedError("tab in label", label)
            image = support.read_file(path)
            support.checked_image(image)
            return Word(name, image=upright(image), label=label)
    except UnicodeDecodeError as error:
        return Word(line, reason="line is not UTF-8", detail=str(error))
    except RejectedError as error:
        return Word(name, reason=error.reason, detail=error.detail)
    return missing or Word(line, reason="no separator", detail="neither tab nor comma between path and label")


def words_of_list(folder: str, entries: str, *, workers: int, split: Split = split_line) -> Iterator[Word]:
    """Yield the words of a list in its order, with a progress bar.

    `split` yields every way to take a line apart into (path in `folder`, label); it may raise RejectedError.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name the one that the paths of {entries} are relative to")
    total = sum(1 for _ in read_entries(entries))
    word = functools.partial(word_of_entry, folder=os.path.abspath(folder), split=split)
    words = support.map_in_processes(word, read_entries(entries), workers=workers, chunk_size=64)
    yield from support.progress(words, total=total, unit="word", description="images")


def main(arguments: list[str] | None = None) -> int:
    parser = support.make_parser(__doc__, EXAMPLE)
    parser.add_argument("image_folder", metavar="IMAGE_FOLDER", help="folder that the paths in GT_FILE are relative to")
    parser.add_argument("gt_file", metavar="GT_FILE", help="UTF-8 text, one image and label a line")
    parser.add_argument("output", metavar="OUTPUT_LMDB", help="folder to make")
    support.add_run_arguments(parser)
    options = parser.parse_args(arguments)
    words = words_of_list(options.image_folder, options.gt_file, workers=options.workers)
    support.store_words(words, options.output, overwrite=options.overwrite)
    return 0


if __name__ == "__main__":
    run_command_line(main)
