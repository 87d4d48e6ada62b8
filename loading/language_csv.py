"""Reading tables of spellings: tab-separated, a column `inp` with a spelling and a column `gt` with the right one.

A table may have a hundred million rows, so that nothing here is done row by row: pieces of the file become arrays of
code points, in which separators are found, characters normalised and texts judged all at once.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from loading.batches import EMPTY, TOO_LONG, LabelRule
from utils import UserError

FIELDS = "fields"  # another number of fields than the header has

_PIECE = 1 << 22  # bytes that are read at once
_TAB, _NEWLINE, _RETURN, _QUOTE = map(ord, '\t\n\r"')
_CODES = 0x110000  # of Unicode


class TextArray:
    """A list of texts in two arrays: workers that are forked share them, as they would not share text objects."""

    def __init__(self) -> None:
        self._data: Any = bytearray()
        self._ends: Any = array("q", [0])

    def extend(self, codes: np.ndarray, lengths: np.ndarray) -> None:
        """Add texts: their code points one after the other, and how many each of them has."""
        if not codes.size or codes.max() < 128:
            self._data += codes.astype(np.uint8).tobytes()
        else:
            self._data += codes.astype("<u4").tobytes().decode("utf-32-le").encode()
            widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
            lengths = np.add.reduceat(widths, np.cumsum(lengths) - lengths)  # no text is empty
        self._ends.frombytes((self._ends[-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())

    def freeze(self) -> "TextArray":
        """Turn into arrays; nothing can be added any more."""
        self._data = np.frombuffer(self._data, np.uint8)
        self._ends = np.frombuffer(self._ends, np.int64)
        return self

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self._data[self._ends[index] : self._ends[index + 1]].tobytes().decode()


def read_pairs(path: Path, labels: LabelRule) -> tuple[TextArray, TextArray, dict[str, int]]:
    """Read the usable pairs of a table: spellings and right ones, normalised, and reason -> rows left out.

    A field that begins and ends with a quotation mark is quoted, as CSV writers do: both go, and pairs of them inside
    stand for one. A tab or a line's end always parts fields.

    Raises:
        UserError: the file cannot be read, has other columns, or is not UTF-8.
    """
    inputs, targets, reasons = TextArray(), TextArray(), Counter()
    normalizer = _Normalizer(labels)
    try:
        with open(path, "rb") as file:
            names = file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
            columns = [name.strip('"') for name in names]
            if "inp" not in columns or "gt" not in columns:
                raise UserError(
                    f"{path}: the first line is {names}, not a tab-separated header with inp and gt; "
                    "make the file with tools/create_language_data.py"
                )
            for piece in _pieces(file):
                codes = _code_points(piece)
                firsts, ends = _fields(codes, len(columns), reasons)
                kept = normalizer(codes)
                before = np.concatenate([[0], np.cumsum(kept > 0, dtype=np.int32)])
                chosen = [columns.index("inp"), columns.index("gt")]
                lengths = (before[ends] - before[firsts])[:, chosen]  # (rows, 2)
                usable = _judged(lengths, labels.max_length, reasons)
                for texts, column, length in zip((inputs, targets), chosen, lengths[usable].T, strict=True):
                    inside = _spans(len(codes), firsts[usable, column], ends[usable, column])
                    texts.extend(kept[inside & (kept > 0)], length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check dataset roots") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); a language root is a CSV file") from error
    return inputs.freeze(), targets.freeze(), dict(reasons)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file in pieces of whole lines, each of which ends with a line's end."""
    rest = b""
    while data := file.read(_PIECE):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if end:
            yield data[:end]
        rest = data[end:]
    if rest:
        yield rest + b"\n"


def _code_points(piece: bytes) -> np.ndarray:
    if piece.isascii():
        return np.frombuffer(piece, np.uint8)
    return np.frombuffer(piece.decode("utf-8").encode("utf-32-le"), "<u4")


def _fields(codes: np.ndarray, columns: int, reasons: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """First place and place behind the last of each field (rows, columns); rows of another number are counted."""
    ends = np.flatnonzero((codes == _TAB) | (codes == _NEWLINE))
    firsts = np.concatenate([[0], ends[:-1] + 1])
    last_fields = np.flatnonzero(codes[ends] == _NEWLINE)
    whole = np.diff(last_fields, prepend=-1) == columns
    if lost := int(np.count_nonzero(~whole)):
        reasons[FIELDS] += lost
    fields = last_fields[whole][:, None] + np.arange(1 - columns, 1)
    return firsts[fields], ends[fields]


def _judged(lengths: np.ndarray, max_length: int, reasons: Counter[str]) -> np.ndarray:
    """Which rows (n,) can be used, by the lengths of both texts (n, 2); the others are counted by the first reason."""
    empty, too_long = lengths == 0, lengths > max_length
    usable = ~(empty | too_long).any(axis=1)
    by_first = np.where((empty | too_long)[:, 0], empty[:, 0], empty[:, 1])[~usable]
    for reason, count in ((EMPTY, by_first.sum()), (TOO_LONG, (~by_first).sum())):
        if count:
            reasons[reason] += int(count)
    return usable


def _spans(size: int, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of `size` places lie in one of some spans, none of which is empty or touches another."""
    steps = np.zeros(size + 1, np.int8)
    steps[firsts] = 1
    steps[ends] = -1
    return np.cumsum(steps[:-1], dtype=np.int8).view(bool)


class _Normalizer:
    """Code points -> those that the network reads, 0 where it reads none; quotation marks around fields are none."""

    def __init__(self, labels: LabelRule) -> None:
        self._labels = labels
        self._table = np.zeros(_CODES, np.uint32)
        self._known = np.zeros(_CODES, bool)
        self._learn(np.arange(128))

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        if codes.dtype != np.uint8:
            seen = np.zeros(_CODES, bool)
            seen[codes] = True
            self._learn(np.flatnonzero(seen & ~self._known))
            kept = self._table[codes]
        else:
            kept = self._table[:128].astype(np.uint32 if self._table[:128].max() > 255 else np.uint8)[codes]
        if self._table[_QUOTE]:
            kept[_quotes(codes)] = 0
        return kept

    def _learn(self, codes: np.ndarray) -> None:
        for code in codes.tolist():
            self._table[code] = ord(self._labels.normalize(chr(code)) or "\0")
        self._known[codes] = True


def _quotes(codes: np.ndarray) -> np.ndarray:
    """Places of the quotation marks that quote a field or another quotation mark."""
    places = np.flatnonzero(codes == _QUOTE)
    if not places.size:
        return places
    separators = np.flatnonzero((codes == _TAB) | (codes == _NEWLINE))
    fields = np.searchsorted(separators, places)  # the field of each mark
    ends = separators[fields]
    firsts = np.where(fields > 0, separators[fields - 1] + 1, 0)
    ends = ends - (codes[ends - 1] == _RETURN)
    start, stop = np.searchsorted(fields, fields), np.searchsorted(fields, fields, side="right")
    number, count = np.arange(len(places)) - start, stop - start  # which of how many in its field
    quoted = (codes[firsts] == _QUOTE) & (codes[ends - 1] == _QUOTE) & (count % 2 == 0)
    return places[quoted & ((number % 2 == 0) | (number == count - 1))]
