"""Shared by the command-line tools: arguments, worker processes, the list of rejected entries, the summary."""

import argparse
import contextlib
import functools
import itertools
import math
import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from inference.pipeline import in_order
from loading.decoding import MAX_PIXELS, BrokenImageError, ImageArray, decode_image
from loading.lmdb_io import LmdbReader, LmdbWriter, image_key, label_key
from loading.workers import use_one_thread
from utils import ArgumentParser, UserError, printable, write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_FILE_SIZE = 8 * MAX_PIXELS  # bytes of an image file

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels, right and bottom not included


def make_parser(description: str, example: str) -> ArgumentParser:
    """Return a parser whose `--help` ends with `example` in its own layout."""
    return ArgumentParser(
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def seed_number(text: str) -> int:
    """Parse an integer that every generator takes as a seed, for argparse."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return number


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all tools on LMDBs of words share."""
    parser.add_argument("--workers", type=positive, default=usable_cores(), help="processes (default: the cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it exists")


def refuse_existing(*outputs: str | os.PathLike | None, overwrite: bool) -> None:
    """Raise UserError if an output exists and is not to be replaced; None is no output."""
    for output in outputs:
        if output is not None and not overwrite and os.path.exists(output):
            raise UserError(f"{output}: exists already; choose another output or replace it with --overwrite")


def progress(
    items: Iterable[Item], *, total: int | None, unit: str, description: str, disable: bool = False
) -> Iterator[Item]:
    """Show a progress bar on stderr while `items` are gone through; it is rarely redrawn where stderr is a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        items, total=total, unit=unit, desc=description, mininterval=interval, dynamic_ncols=True, disable=disable
    )


class RejectedError(ValueError):
    """Tells why an entry of the input is left out: a reason, by which it is counted, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Word:
    """A word to store (`reason` empty) or an entry to reject; `name` says where it is in the input.

    `words` is how many words an entry stands for: an image that is rejected as a whole takes all of its words with it.
    """

    name: str
    image: bytes = b""
    label: str = ""
    reason: str = ""
    detail: str = ""
    words: int = 1


class RejectionLog:
    """Counts what a tool leaves out, by reason, and lists every entry in a tab-separated file (entry, reason, detail).

    A context manager: the file is written at the end; there is none when nothing was left out or `path` is None.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self.counts: Counter[str] = Counter()
        self._rows: list[str] = []

    @classmethod
    def beside(cls, output: str | os.PathLike) -> "RejectionLog":
        """Return the log of an output: `<output>-rejected.tsv`."""
        return cls(f"{os.path.abspath(output)}-rejected.tsv")

    def __enter__(self) -> "RejectionLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: Any) -> None:
        if kind is None and self._rows:
            text = "entry\treason\tdetail\n" + "".join(self._rows)
            write_atomically(self.path, text)
        elif kind is None and self.path is not None:
            self.path.unlink(missing_ok=True)  # of an earlier run

    def add(self, entry: str, reason: str, detail: str = "", words: int = 1) -> None:
        """Note that `entry`, which stands for so many words, was left out."""
        self.counts[reason] += words
        if self.path is not None:
            self._rows.append(f"{printable(entry)}\t{reason}\t{printable(detail)}\n")


def print_summary(heading: str, counts: dict[str, Any], log: RejectionLog | None = None) -> None:
    """Print the tool's result on stdout: `counts` as given, then what was left out by reason."""
    rows = [(name, _show(value)) for name, value in counts.items()]
    if log is not None:
        rows.append(("rejected", _show(log.counts.total())))
        rows += [(f"  {reason}", _show(count)) for reason, count in log.counts.most_common()]
    width = max(len(name) for name, _ in rows)
    print(heading)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    if log is not None and log.counts and log.path is not None:
        print(f"  each one is listed in {log.path}")


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)


def checked_image(data: bytes) -> ImageArray:
    """Decode an image as training does; raises RejectedError."""
    try:
        return decode_image(data)
    except BrokenImageError as error:
        raise RejectedError("damaged image", str(error)) from error


def decoded_words(path: str | os.PathLike, numbers: Iterable[int]) -> Iterator[tuple[int, ImageArray, str]]:
    """Yield number, image and label of some words of an LMDB; those whose image cannot be decoded are left out."""
    reader = LmdbReader(path)
    for number in numbers:
        label = (reader.get(label_key(number)) or b"").decode("utf-8", "replace").strip()
        with contextlib.suppress(BrokenImageError):
            yield number, decode_image(reader.get(image_key(number)) or b""), label


def pixel_slices(box: Box, shape: tuple[int, ...], *, margin: float = 0.0) -> tuple[slice, slice]:
    """Return rows and columns of a box, `margin` times its shorter side wider on each side, clipped to the image."""
    left, top, right, bottom = box
    extra = margin * min(right - left, bottom - top)
    rows = slice(max(0, int(top - extra)), max(0, min(shape[0], math.ceil(bottom + extra))))
    columns = slice(max(0, int(left - extra)), max(0, min(shape[1], math.ceil(right + extra))))
    return rows, columns


def inside(folder: str, name: str) -> str | None:
    """Return the path of `name` below `folder`, or None when it leaves it (`..`, or an absolute path elsewhere).

    Names alone decide: links that the user placed inside the folder may lead anywhere.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    return path if path.startswith(root.rstrip(os.sep) + os.sep) else None


def find_image(folder: str, name: str) -> str:
    """Find the path of image `name`, even when the list writes accents or the folder separator differently.

    Raises RejectedError when there is none, or when it lies outside the folder.
    """
    if not name:
        raise RejectedError("no path")
    for spelling in (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))):
        for candidate in (spelling, spelling.replace("\\", "/")):
            path = inside(folder, candidate)
            if path is not None and os.path.lexists(path):
                return path
    raise RejectedError("no such file" if inside(folder, name) else "path leaves the folder")


def read_file(path: str | os.PathLike) -> bytes:
    """Return the bytes of an image file; raises RejectedError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            raise RejectedError("not a file")
        if status.st_size > MAX_FILE_SIZE:
            raise RejectedError("too large", f"{status.st_size} bytes")
        return Path(path).read_bytes()
    except OSError as error:
        raise RejectedError("cannot be read", str(error.strerror)) from error


def store_words(words: Iterable[Word], output: str, *, overwrite: bool = False) -> None:
    """Store `words` in the LMDB `output` in their order, list the rejected ones, and print the summary.

    Nothing is taken from `words` before the output is known to be free. Raises UserError when no word is usable; then
    there is no LMDB, and the message counts the reasons.
    """
    with LmdbWriter(output, overwrite=overwrite) as writer, RejectionLog.beside(output) as log:
        for word in words:
            if word.reason:
                log.add(word.name, word.reason, word.detail, word.words)
            else:
                writer.append(word.image, word.label)
        if not writer.count:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in log.counts.most_common())
            raise UserError(f"{output}: not written, the input has no usable word ({reasons or 'it is empty'})")
    print_summary(f"wrote {output}", {"words": writer.count}, log)


def map_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, chunk_size: int
) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed by `workers` processes (one: in this process).

    Only a few chunks are under way at once, so `items` may be endless. `function` must be importable by name (or a
    partial of such a function). Raises UserError when a worker is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    chunks = iter(lambda: list(itertools.islice(remaining, chunk_size)), [])
    try:
        with ProcessPoolExecutor(workers, initializer=use_one_thread) as executor:
            for results in in_order(functools.partial(_map_chunk, function), chunks, executor, ahead=4 * workers):
                yield from results
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps out of memory; run with fewer --workers") from error


def _map_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return list(map(function, chunk))
