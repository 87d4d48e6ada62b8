"""What the command-line tools share: arguments, worker processes, the list of rejected entries, the summary."""

import argparse
import itertools
import multiprocessing
import os
import struct
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from utils import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # 8192 x 8192: no word is larger, and a decoded picture of it still fits a worker's memory

# What Pillow's decoders raise on damaged or hostile files.
PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    AttributeError,
    Image.DecompressionBombError,
)

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns first; check_picture refuses by the header instead


def make_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose `--help` ends with `example`, kept as it is laid out."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`, `--overwrite` and `--rejected`, the same in all tools that write an LMDB."""
    parser.add_argument(
        "--workers", type=positive, default=usable_cores(), help="worker processes (default: the cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it exists")
    parser.add_argument(
        "--rejected", metavar="FILE", help="where to list what was left out and why (default: OUTPUT-rejected.tsv)"
    )


def progress(items: Iterable[Item], *, total: int | None, unit: str, description: str) -> Iterator[Item]:
    """`items` with a progress bar on stderr, redrawn rarely where stderr is a file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, unit=unit, desc=description, mininterval=interval, dynamic_ncols=True)


class RejectionLog:
    """Counts what a tool leaves out, by reason, and lists every entry in a tab-separated file (entry, reason, detail).

    A context manager: the file takes its name at the end; when nothing was left out there is none.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file: Any = None

    @classmethod
    def beside(cls, output: str | os.PathLike, chosen: str | None = None) -> "RejectionLog":
        """The log of an output folder: `chosen`, or `<output>-rejected.tsv`."""
        return cls(chosen or f"{os.path.abspath(output)}-rejected.tsv")

    def __enter__(self) -> "RejectionLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: Any) -> None:
        if self._file is not None:
            self._file.close()
            if kind is None:
                os.replace(self._partial, self.path)
            else:
                self._partial.unlink()
        elif kind is None:
            self.path.unlink(missing_ok=True)  # of an earlier run

    def add(self, entry: str, reason: str, detail: str = "") -> None:
        """Note that `entry` was left out."""
        self.counts[reason] += 1
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write("entry\treason\tdetail\n")
            self._file.write(f"{_one_field(entry)}\t{reason}\t{_one_field(detail)}\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room or name another") from error


def _one_field(text: str) -> str:
    """`text` with the characters that would break a line of a tab-separated file written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


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
    if log is not None and log.counts:
        print(f"  each one is listed in {log.path}")


def _show(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)


def check_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """Decode an encoded picture fully; None when it is whole, else (reason, detail).

    A picture of more than `max_pixels` is refused by its header, before it is decoded.
    """
    if not data:
        return "empty file", ""
    try:
        with Image.open(BytesIO(data), formats=PICTURE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return "too large", f"{width} x {height} pixels"
            image.load()
    except Image.UnidentifiedImageError:
        return "not a picture", f"begins with {data[:8]!r}"
    except PICTURE_ERRORS as error:
        return "damaged picture", f"{type(error).__name__}: {error}"
    return None


def inside(folder: str, name: str) -> str | None:
    """The path of `name` below `folder`, or None when it climbs out (`..`, or an absolute path elsewhere).

    Decided by the names alone: links that the user placed inside the folder may lead where they like.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    return path if path.startswith(root.rstrip(os.sep) + os.sep) else None


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
    executor = ProcessPoolExecutor(workers, initializer=_watch_parent)
    waiting: deque[Future[list[Result]]] = deque()
    try:
        while True:
            while len(waiting) < 4 * workers and (chunk := list(itertools.islice(remaining, chunk_size))):
                waiting.append(executor.submit(_map_chunk, function, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory; run with fewer --workers") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _map_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _watch_parent() -> None:
    """End this worker when its parent is gone, even by SIGKILL, so that no orphan holds files or locks."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
