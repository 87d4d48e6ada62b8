"""Make a word LMDB from a folder of pictures and a list of labels."""

import functools
import os
import stat
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

from lmdb_io import LmdbWriter
from tools.support import (
    MAX_PIXELS,
    RejectionLog,
    add_run_arguments,
    check_picture,
    inside,
    make_parser,
    map_in_processes,
    positive,
    print_summary,
    progress,
)
from utils import UserError, run_command_line

EXAMPLE = """  python tools/create_lmdb_dataset.py words/ words/gt.txt data/training/words

each line of GT_FILE is `path<TAB>label`, `path,label` or `path, "label"`; paths are relative to IMAGE_FOLDER"""

SEPARATORS = {"auto": ("\t", ","), "tab": ("\t",), "comma": (",",)}


@dataclass(frozen=True)
class Entry:
    """One line of the list: its number from 1 and its bytes without the line end."""

    line: int
    content: bytes


@dataclass(frozen=True)
class Word:
    """A word to store (`reason` empty) or an entry to reject; `name` is the path, or the line where it has none."""

    name: str
    image: bytes = b""
    label: str = ""
    reason: str = ""
    detail: str = ""


def read_entries(gt_file: str | os.PathLike) -> Iterator[Entry]:
    """The lines of a list of labels that are not blank; a byte order mark is dropped.

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
                    yield Entry(number, line)
    except OSError as error:
        raise UserError(f"{gt_file}: cannot be read ({error.strerror}); name the list of labels") from error


def split_line(line: str, separators: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every way to read `line` as (path, label), the likeliest first.

    The first separator of `separators` that occurs is used. Later places of it are tried too, for paths that hold it.
    Label text in double quotes after a comma loses the quotes (ICDAR's form).
    """
    separator = next((s for s in separators if s in line), None)
    if separator is None:
        return []
    places = [i for i, character in enumerate(line) if character == separator]
    pairs = [(line[:i].strip(), line[i + 1 :].strip()) for i in places]
    if separator == ",":
        pairs = [(name, _unquote(label)) for name, label in pairs]
    return pairs


def _unquote(label: str) -> str:
    if len(label) >= 2 and label[0] == label[-1] == '"':
        return label[1:-1].replace('\\"', '"')
    return label


def find_picture(folder: str, name: str) -> str | None:
    """The path of picture `name`, also when the list writes accents or the folder separator in another way."""
    forms = [] if name.isascii() else [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    for spelling in (name, *forms):
        for candidate in (spelling, spelling.replace("\\", "/")):
            path = inside(folder, candidate) if "\0" not in candidate else None
            if path is not None and os.path.lexists(path):
                return path
    return None


def read_word(entry: Entry, *, folder: str, separators: tuple[str, ...], max_pixels: int) -> Word:
    """Read and check the picture and label of one line; runs in a worker."""
    try:
        line = entry.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Word(entry.content.decode(errors="backslashreplace"), reason="line is not UTF-8", detail=str(error))
    pairs = split_line(line, separators)
    if not pairs:
        return Word(line, reason="no separator", detail="neither tab nor comma between path and label")
    for name, label in pairs:
        path = find_picture(folder, name) if name else None
        if path is None:
            continue
        if not label:
            return Word(name, reason="empty label")
        if "\t" in label:
            return Word(name, reason="tab in label", detail=label)
        return _read_picture(name, path, label, max_pixels)
    name = pairs[0][0]
    climbs = "\0" not in name and inside(folder, name) is None
    return Word(name, reason="path leaves the folder" if climbs else "no such file")


def _read_picture(name: str, path: str, label: str, max_pixels: int) -> Word:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            return Word(name, reason="not a file")
        if status.st_size > 8 * max_pixels:
            return Word(name, reason="too large", detail=f"{status.st_size} bytes")
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return Word(name, reason="cannot be read", detail=str(error.strerror))
    problem = check_picture(data, max_pixels)
    return Word(name, reason=problem[0], detail=problem[1]) if problem else Word(name, image=data, label=label)


def create_lmdb(
    image_folder: str,
    gt_file: str,
    output: str,
    *,
    separator: str = "auto",
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    overwrite: bool = False,
    rejected: str | None = None,
) -> tuple[int, RejectionLog]:
    """Store every usable word of `gt_file` in the LMDB `output`, in the order of the list, pictures as they are.

    Returns the number of words and the log of rejected lines. Raises UserError when nothing is usable; then there is no
    LMDB.
    """
    if not os.path.isdir(image_folder):
        raise UserError(f"{image_folder}: no such folder; IMAGE_FOLDER is where the paths of {gt_file} begin")
    total = sum(1 for _ in read_entries(gt_file))
    read = functools.partial(
        read_word, folder=os.path.abspath(image_folder), separators=SEPARATORS[separator], max_pixels=max_pixels
    )
    with LmdbWriter(output, overwrite=overwrite) as writer, RejectionLog.beside(output, rejected) as log:
        words = map_in_processes(read, read_entries(gt_file), workers=workers, chunk_size=64)
        for word in progress(words, total=total, unit="word", description="pictures"):
            if word.reason:
                log.add(word.name, word.reason, word.detail)
            else:
                writer.append(word.image, word.label)
        if not writer.count:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.most_common()) or "it has no lines"
            raise UserError(f"{gt_file}: no usable word ({reasons}); check IMAGE_FOLDER and the form of the lines")
    return writer.count, log


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("image_folder", metavar="IMAGE_FOLDER", help="folder that the paths in GT_FILE are relative to")
    parser.add_argument("gt_file", metavar="GT_FILE", help="UTF-8 text, one picture and label a line")
    parser.add_argument("output", metavar="OUTPUT_LMDB", help="folder to make")
    parser.add_argument(
        "--separator", choices=SEPARATORS, default="auto", help="between path and label (default: auto)"
    )
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, help="refuse larger pictures (default: %(default)s)"
    )
    add_run_arguments(parser)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    count, log = create_lmdb(**vars(options))
    seconds = time.perf_counter() - start
    rate = (count + log.counts.total()) / seconds
    print_summary(f"wrote {options.output}", {"words": count, "seconds": seconds, "words a second": round(rate)}, log)
    return 0


if __name__ == "__main__":
    run_command_line(main)
