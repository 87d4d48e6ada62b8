"""Which samples of a word LMDB can be used: found once, counted by reason, kept in a file.

The scan walks over the label keys and the image keys in the order of the file and works on 65,536 labels at a time.
That an image can be decoded is not part of it: reading 16 million images takes hours; broken ones are found when
they are read.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from loading.batches import EMPTY, TOO_LONG, LabelRule
from loading.lmdb_io import DATA_FILE, LmdbReader

logger = logging.getLogger(__name__)

MISSING = "missing"  # no image or no label under the number of the sample
NOT_UTF8 = "not_utf8"

_FORMAT = 1  # of the files; a new one makes old files unused
_CHUNK = 1 << 16
_STATES = ("kept", MISSING, NOT_UTF8, EMPTY, TOO_LONG)
_KEPT, _MISSING, _NOT_UTF8, _EMPTY, _TOO_LONG = range(5)
_DIGITS = 9


@dataclass
class WordIndex:
    """The usable samples of a word LMDB.

    Fields:
        numbers: (n,) int32, numbers of the usable samples in the LMDB, counted from 1, ascending.
        filtered: reason -> count of the others; all counts and n add up to the LMDB's `num-samples`.
        path: file that `numbers` is mapped from; a copy in another process maps it again instead of carrying it along.
    """

    numbers: np.ndarray
    filtered: dict[str, int] = field(default_factory=dict)
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.path is not None:
            state["numbers"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.numbers = np.load(self.path, mmap_mode="r")


def open_word_index(reader: LmdbReader, labels: LabelRule, *, cache_dir: str | Path | None = None) -> WordIndex:
    """The usable samples of an LMDB: from the file of an earlier scan of the same LMDB and rule, else by a scan.

    Args:
        cache_dir: folder of those files; None scans every time.

    A cache folder that cannot be written costs time, not the run: it is logged.
    """
    if cache_dir is None:
        return scan_words(reader, labels)
    stem = Path(cache_dir) / f"{reader.path.resolve().name}-{_fingerprint(reader, labels)}"
    index = _load(stem)
    if index is None:
        index = scan_words(reader, labels)
        try:
            index = _store(stem, index)
        except OSError as error:
            logger.warning("%s: the index of %s cannot be stored (%s)", cache_dir, reader.path, error)
    return index


def default_cache_dir() -> Path:
    """The user's cache folder for index files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "binet"


def scan_words(reader: LmdbReader, labels: LabelRule) -> WordIndex:
    """Look at every label and at the presence of every image."""
    announced = len(reader)
    with reader.transaction() as transaction:
        last = min(announced, max(_last_number(transaction, b"label-"), 0))
        states = np.full(last + 1, _MISSING, np.uint8)  # by number; 0 is no sample
        judge = _LabelJudge(labels)
        for numbers, texts in _chunks(transaction, b"label-", last, values=True):
            states[numbers] = judge(texts)
        images = np.zeros(last + 1, bool)
        for numbers, _ in _chunks(transaction, b"image-", last, values=False):
            images[numbers] = True
    states[~images] = _MISSING
    counts = np.bincount(states[1:], minlength=len(_STATES))
    counts[_MISSING] += announced - last
    filtered = {name: int(count) for name, count in zip(_STATES[1:], counts[1:], strict=True) if count}
    return WordIndex(np.flatnonzero(states == _KEPT).astype(np.int32), filtered)


class _LabelJudge:
    """Encoded labels -> their states, in array operations where labels are ASCII (each character counts by itself)."""

    def __init__(self, labels: LabelRule) -> None:
        self.labels = labels
        self._counts = np.zeros(256, np.int64)
        self._counts[:128] = [len(labels.normalize(chr(code))) for code in range(128)]

    def __call__(self, texts: list[bytes]) -> np.ndarray:
        ends = np.cumsum([len(text) for text in texts])
        data = np.frombuffer(b"".join(texts), np.uint8)
        states = self._judge_lengths(_sums(self._counts[data], ends))
        for row in np.flatnonzero(_sums(data >= 128, ends)):
            try:
                text = texts[row].decode()
            except UnicodeDecodeError:
                states[row] = _NOT_UTF8
            else:
                states[row] = self._judge_lengths(np.array([len(self.labels.normalize(text))]))[0]
        return states

    def _judge_lengths(self, lengths: np.ndarray) -> np.ndarray:
        return np.select([lengths == 0, lengths > self.labels.max_length], [_EMPTY, _TOO_LONG], _KEPT).astype(np.uint8)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of consecutive parts of `values` that end before `ends`; parts may be empty."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[ends]
    return np.diff(totals, prepend=0)


def _last_number(transaction: lmdb.Transaction, prefix: bytes) -> int:
    """The largest number of a key `prefix%09d`, 0 when there is none."""
    with transaction.cursor() as cursor:
        # ":" follows "9": the entry before it is the last one with the prefix.
        found = cursor.prev() if cursor.set_range(prefix + b":") else cursor.last()
        while found and cursor.key().startswith(prefix):
            number = cursor.key()[len(prefix) :]
            if len(number) == _DIGITS and number.isdigit():
                return int(number)
            found = cursor.prev()  # a stray key
        return 0


def _chunks(
    transaction: lmdb.Transaction, prefix: bytes, last: int, *, values: bool
) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """Numbers (at most `last`) of the keys `prefix%09d` in order, with their values if asked, many at a time."""
    length = len(prefix) + _DIGITS
    powers = 10 ** np.arange(_DIGITS - 1, -1, -1)
    with transaction.cursor() as cursor:
        if not cursor.set_range(prefix):
            return
        if values:
            entries = cursor.iternext(keys=True, values=True)
        else:
            entries = ((key, b"") for key in cursor.iternext(keys=True, values=False))
        while chunk := list(islice(entries, _CHUNK)):
            ended = not chunk[-1][0].startswith(prefix)
            chunk = [each for each in chunk if len(each[0]) == length and each[0].startswith(prefix)]
            if chunk:
                digits = np.frombuffer(b"".join(key for key, _ in chunk), np.uint8).reshape(-1, length)
                digits = digits[:, len(prefix) :].astype(np.int64) - ord("0")
                numbers = digits @ powers
                valid = ((digits >= 0) & (digits <= 9)).all(1) & (numbers >= 1) & (numbers <= last)
                if not valid.all():
                    chunk = [each for each, keep in zip(chunk, valid, strict=True) if keep]
                    numbers = numbers[valid]
                if chunk:
                    yield numbers, [value for _, value in chunk]
            if ended:
                return


# --- files ------------------------------------------------------------------------------------------------------------


def _fingerprint(reader: LmdbReader, labels: LabelRule) -> str:
    """What the usable samples depend on: the file as it is, and the rule."""
    path = (reader.path / DATA_FILE).resolve()
    status = path.stat()
    parts = [_FORMAT, str(path), status.st_size, status.st_mtime_ns]
    parts += [labels.charset.characters, labels.max_length, labels.case_sensitive]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _load(stem: Path) -> WordIndex | None:
    """The stored index, None when there is none or it is damaged."""
    numbers_path, counts_path = stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")
    try:
        counts = json.loads(counts_path.read_text(encoding="utf-8"))
        numbers = np.load(numbers_path, mmap_mode="r")
        if len(numbers) != counts["samples"]:
            return None
        return WordIndex(numbers, counts["filtered"], numbers_path)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is damaged (%s), scanning again", numbers_path, error)
        return None


def _store(stem: Path, index: WordIndex) -> WordIndex:
    """Write an index; the counts come last and make it valid. Returns it mapped from its file."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    numbers_path, counts_path = stem.with_name(stem.name + ".npy"), stem.with_name(stem.name + ".json")
    with _replacing(numbers_path) as file:
        np.save(file, index.numbers)
    with _replacing(counts_path) as file:
        file.write(json.dumps({"samples": len(index), "filtered": index.filtered}).encode())
    return WordIndex(np.load(numbers_path, mmap_mode="r"), index.filtered, numbers_path)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes the name `path` when it is whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
