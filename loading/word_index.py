"""Finds the words of a word LMDB that can be used, counts the others by reason, and keeps the result in a file.

Whether an image can be decoded is not part of it: reading 16 million images takes hours. Broken ones are found when
they are read.
"""

import functools
import hashlib
import json
import logging
import os
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loading.batches import EMPTY, TOO_LONG, LabelRule
from loading.lmdb_io import DATA_FILE, LmdbReader
from utils import UserError, write_atomically

logger = logging.getLogger(__name__)

MISSING = "missing"  # no image or no label under the number of the sample
NOT_UTF8 = "not_utf8"

_FORMAT = 4  # of the files; a new one makes old files unused
_STATES = (None, NOT_UTF8, EMPTY, TOO_LONG)  # why a label cannot be used; None: it can


# Numbers of the usable samples in the LMDB, (n,) int32, from 1, ascending; and reason -> count of the others, which add
# up with n to the LMDB's `num-samples`.
WordIndex = tuple[np.ndarray, dict[str, int]]


def open_word_index(reader: LmdbReader, labels: LabelRule, *, cache_dir: str | Path | None = None) -> WordIndex:
    """Return the usable samples of an LMDB: from the file of an earlier scan of the same LMDB and rule, else by a scan.

    Args:
        cache_dir: folder of those files; None scans every time. A folder that cannot be written costs time, not the
            run: it is logged.
    """
    if cache_dir is None:
        return scan_words(reader, labels)
    folder, file = reader.path.resolve(), (reader.path / DATA_FILE).stat()
    parts = [str(folder), file.st_size, file.st_mtime_ns, _FORMAT]
    parts += [labels.charset.characters, labels.max_length, labels.case_sensitive]
    path = Path(cache_dir) / f"{folder.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(path) as stored:
            return stored["numbers"], json.loads(str(stored["filtered"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        if os.path.exists(path):  # Path.exists raises where the folder cannot be read
            logger.warning("%s: is damaged (%s), scanning again", path, error)
    numbers, filtered = scan_words(reader, labels)
    try:
        write_atomically(path, lambda file: np.savez(file, numbers=numbers, filtered=json.dumps(filtered)))
    except (OSError, UserError) as error:
        logger.warning("%s: the index of %s cannot be stored (%s)", cache_dir, reader.path, error)
    return numbers, filtered


def default_cache_dir() -> Path:
    """Return the user's cache folder for index files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "binet"


def scan_words(reader: LmdbReader, labels: LabelRule) -> WordIndex:
    """Look at every label and at the presence of every image."""

    @functools.lru_cache(maxsize=1 << 20)  # most words come many times
    def state(label: bytes) -> int:
        try:
            return _STATES.index(labels.unusable(label.decode()))
        except UnicodeDecodeError:
            return _STATES.index(NOT_UTF8)

    announced = len(reader)
    numbers, states, with_image = array("i"), bytearray(), array("i")
    for number, label in _numbered(reader, b"label-", announced, values=True):
        numbers.append(number)
        states.append(state(label))
    with_image.extend(number for number, _ in _numbered(reader, b"image-", announced, values=False))
    complete = np.isin(numbers, with_image)
    numbers, states = np.array(numbers, np.int32)[complete], np.frombuffer(states, np.uint8)[complete]
    counts = {MISSING: announced - len(numbers)}
    counts |= {name: int(np.count_nonzero(states == place)) for place, name in enumerate(_STATES) if name}
    return numbers[states == 0], {name: count for name, count in counts.items() if count}


def _numbered(reader: LmdbReader, prefix: bytes, last: int, *, values: bool) -> Iterator[tuple[int, bytes]]:
    """Yield number (1 to `last`) and value of each key `prefix%09d` in order; without `values` they are not read."""
    for key, value in reader.entries(prefix, values=values):
        digits = key[len(prefix) :]
        if len(digits) == 9 and digits.isdigit() and 1 <= int(digits) <= last:
            yield int(digits), value
