"""Reads and writes LMDBs of words, masks and segmentation pairs.

An LMDB here is a folder with a `data.mdb`. Keys are text (`num-samples`, `image-%09d`, `label-%09d`, `mask-%09d`,
counting from 1), values are bytes. The writer gives an LMDB its name when it is complete; the reader opens on first
use, so that it can be handed to worker processes that are forked or spawned.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from utils import UserError

NUM_SAMPLES = "num-samples"
DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
PARTIAL_SUFFIX = ".partial"  # of an LMDB that is being written

_IDENTITY_FILE = "identity.txt"
_WRITER_LOCK_FILE = "writer.lock"
_FIRST_MAP_SIZE = 64 << 20  # bytes; grows by doubling when LMDB says that it is full
_COMMIT_BYTES = 32 << 20
_COMMIT_ENTRIES = 4096


def image_key(index: int) -> str:
    """Return the key of the encoded image of sample `index`, counted from 1."""
    return f"image-{index:09d}"


def label_key(index: int) -> str:
    """Return the key of the UTF-8 text of sample `index`, counted from 1."""
    return f"label-{index:09d}"


def mask_key(index: int) -> str:
    """Return the key of the mask of sample `index`, from 1, in an LMDB that holds images and masks together."""
    return f"mask-{index:09d}"


def is_lmdb(path: str | os.PathLike) -> bool:
    """Tell whether `path` is a folder with a finished LMDB in it."""
    path = Path(path)
    return not path.name.endswith(PARTIAL_SUFFIX) and (path / DATA_FILE).is_file()


def find_lmdbs(root: str | os.PathLike) -> list[Path]:
    """Return `root` if it is an LMDB, else every finished one below it, sorted by path.

    Raises UserError when `root` does not exist or holds none.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder; name an LMDB or a folder of LMDBs")
    if is_lmdb(root):
        return [root]
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.endswith(PARTIAL_SUFFIX))
        if DATA_FILE in files:
            found.append(Path(folder))
            subfolders.clear()
    if not found or root.name.endswith(PARTIAL_SUFFIX):
        raise UserError(
            f"{root}: holds no finished LMDB (a folder with {DATA_FILE}); make one with tools/create_lmdb_dataset.py"
        )
    return sorted(found)


@dataclass(eq=False)
class LmdbWriter:
    """Writes an LMDB in batches of transactions to `<path>.partial` and gives it its name when it is complete.

    Used as a context manager. Leaving the block normally commits, flushes to the disk and renames; leaving it by an
    exception removes the partial folder and leaves whatever was at `path` as it was.

    Args:
        path: folder to make; its parents are made too.
        overwrite: replace an LMDB that exists at `path` (in one step, at the end) instead of raising UserError; nothing
            but an LMDB is ever replaced. The partial folder of an earlier run is discarded.
        identity: a text that names input and settings. With one, the partial folder is kept after an interruption, even
            by SIGKILL, and a writer of the same path and identity goes on with what was committed. Each commit is
            flushed to the disk. None: nothing is kept.
        in_order: the keys come in ascending order, each once: LMDB then fills its pages, which makes the file a quarter
            smaller.

    Raises:
        UserError: `path` exists, another process writes it, the partial folder is of another run, the disk is full.
    """

    path: str | os.PathLike
    overwrite: bool = False
    identity: str | None = None
    in_order: bool = False

    def __post_init__(self) -> None:
        self.path = Path(os.path.abspath(self.path))
        self.partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0
        self._environment: lmdb.Environment | None = None
        self._check_target()
        with self._explained_errors():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial / _WRITER_LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise UserError(f"{self.path}: another process is writing it; wait or choose another output") from None
            try:
                self._environment = self._open_partial()
            except BaseException:
                self._leave()
                raise
        with self._environment.begin() as transaction:
            self.count = int(transaction.get(NUM_SAMPLES.encode(), b"0"))  # samples added by `append`

    def __enter__(self) -> "LmdbWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def put(self, key: str, value: bytes | str) -> None:
        """Store `value` (text is encoded as UTF-8) under `key`; a later value replaces an earlier one."""
        self._add({key: value})

    def append(self, image: bytes, label: bytes | str | None = None, mask: bytes | None = None) -> int:
        """Store the next sample and return its index, counted from 1; a commit never cuts a sample in two."""
        self.count += 1
        parts = {image_key(self.count): image, mask_key(self.count): mask, label_key(self.count): label}
        self._add({NUM_SAMPLES: str(self.count)} | {key: part for key, part in parts.items() if part is not None})
        return self.count

    def _add(self, entries: dict[str, bytes | str]) -> None:
        for key, value in entries.items():
            data = value.encode() if isinstance(value, str) else bytes(value)
            self._pending[key.encode()] = data
            self._pending_bytes += len(data)
        if self._pending_bytes >= _COMMIT_BYTES or len(self._pending) >= _COMMIT_ENTRIES:
            self.commit()

    def commit(self) -> None:
        """Write what is pending in one transaction."""
        entries = sorted(self._pending.items())  # LMDB writes neighbours faster
        with self._explained_errors():
            while entries:
                try:
                    with self._environment.begin(write=True) as transaction:
                        for key, value in entries:
                            transaction.put(key, value, append=self.in_order)
                    break
                except lmdb.MapFullError:
                    self._environment.set_mapsize(2 * self._environment.info()["map_size"])
        self._pending.clear()
        self._pending_bytes = 0

    def close(self) -> None:
        """Commit, flush to the disk, and give the LMDB its final name."""
        try:
            self.commit()
            with self._explained_errors():
                self._environment.sync(True)
                self._environment.close()
                self._rename()
        except BaseException:
            self._leave()
            raise
        os.close(self._lock)

    def abort(self) -> None:
        """Stop before the LMDB is finished; with an identity, commit what is pending and keep the partial folder."""
        try:
            if self.identity is not None:
                self.commit()
        finally:
            self._leave()

    def _check_target(self) -> None:
        """Raise UserError unless the result may take the name `path`."""
        if self.path.name.endswith(PARTIAL_SUFFIX):
            raise UserError(f"{self.path}: names that end in {PARTIAL_SUFFIX} are of unfinished LMDBs; choose another")
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path}: exists and is not a folder; choose another output")
        content = set(os.listdir(self.path))
        if content - {DATA_FILE, LOCK_FILE}:
            raise UserError(f"{self.path}: exists and holds other files than an LMDB; choose another output")
        if content and not self.overwrite:
            raise UserError(f"{self.path}: exists already; choose another output or replace it with --overwrite")

    def _open_partial(self) -> lmdb.Environment:
        """Open the LMDB of the partial folder, emptied unless it is the one to go on with."""
        data_file, identity_file = self.partial / DATA_FILE, self.partial / _IDENTITY_FILE
        size = _FIRST_MAP_SIZE
        if self.identity is None or self.overwrite or not data_file.exists():
            data_file.unlink(missing_ok=True)
            identity_file.write_text(self.identity or "", encoding="utf-8")
        else:
            size = max(size, 2 * data_file.stat().st_size)
            found = identity_file.read_text(encoding="utf-8") if identity_file.exists() else ""
            if found != self.identity:
                raise UserError(
                    f"{self.partial}: was begun with other input or settings ({found or 'none named'}); "
                    "remove it or start anew with --overwrite"
                )
        flushed = self.identity is not None
        try:
            return lmdb.open(
                str(self.partial), map_size=size, lock=False, sync=flushed, metasync=False, readahead=False
            )
        except (lmdb.InvalidError, lmdb.CorruptedError) as error:
            raise UserError(f"{self.partial}: is damaged ({error}); remove it and run again") from error

    def _rename(self) -> None:
        """Give the finished file its name; an existing LMDB is replaced in one step."""
        if self.path.is_dir():
            os.replace(self.partial / DATA_FILE, self.path / DATA_FILE)
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.partial)
        else:
            (self.partial / _IDENTITY_FILE).unlink()
            (self.partial / _WRITER_LOCK_FILE).unlink()
            os.rename(self.partial, self.path)

    def _leave(self) -> None:
        """Close everything; the partial folder is kept only when it can be resumed."""
        if self._environment is not None:
            self._environment.close()
        if self.identity is None:
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turn write errors of the system and of LMDB into a UserError that names the output."""
        try:
            yield
        except (OSError, lmdb.Error) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            raise UserError(
                f"{self.path}: cannot be written ({error}); the disk is full or a file size limit was met; make room "
                "and run again"
            ) from error


# The open LMDBs of this process: py-lmdb refuses to open one twice, so readers of one path share it.
_environments: "weakref.WeakValueDictionary[str, lmdb.Environment]" = weakref.WeakValueDictionary()


def _close_inherited() -> None:
    """Close what the parent of a forked process had open: py-lmdb would never free a transaction on it (256 bytes)."""
    for environment in list(_environments.values()):
        environment.close()
    _environments.clear()


os.register_at_fork(after_in_child=_close_inherited)


class LmdbReader:
    """Reads an LMDB; opened on first use, works in forked and spawned processes, cheap to pickle.

    Any number of readers may read one folder at once; they share one map. Raises UserError on first use when the folder
    is missing, is no LMDB or was cut short.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._environment: lmdb.Environment | None = None
        self._process = 0  # that opened it

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_environment": None, "_process": 0}

    def __len__(self) -> int:
        """Return the number stored under `num-samples`."""
        stored = self.get(NUM_SAMPLES)
        mend = "repair it with tools/check_lmdb.py --fix OUTPUT"
        if stored is None:
            raise UserError(f"{self.path}: has no {NUM_SAMPLES}; {mend}")
        if not stored.strip().isdigit() or len(stored) > 18:  # more than `len` can tell
            raise UserError(f"{self.path}: {NUM_SAMPLES} is {stored[:20]!r}, not a number of samples; {mend}")
        return int(stored)

    def get(self, key: str) -> bytes | None:
        """Return the value of `key`, None when it is not there."""
        with self.transaction() as transaction:
            return transaction.get(key.encode())

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Yield every key that begins with `prefix`, in order; bytes that are not UTF-8 are shown escaped."""
        return (key.decode(errors="backslashreplace") for key, _ in self.entries(prefix.encode(), values=False))

    def entries(self, prefix: bytes, *, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of every key that begins with `prefix`, in order; without `values` they are not read."""
        with self.transaction() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(prefix):
                found = cursor.iternext() if values else ((key, b"") for key in cursor.iternext(values=False))
                yield from itertools.takewhile(lambda entry: entry[0].startswith(prefix), found)

    def transaction(self) -> lmdb.Transaction:
        """Begin a read transaction, a context manager."""
        if self._process != os.getpid():
            self._environment, self._process = self._open(), os.getpid()
        return self._environment.begin()

    def _open(self) -> lmdb.Environment:
        name = os.path.realpath(self.path)
        if name in _environments:
            return _environments[name]
        if not (self.path / DATA_FILE).is_file():
            raise UserError(f"{self.path}: is not an LMDB (a folder with {DATA_FILE}); check the path")
        try:
            environment = lmdb.open(
                name, readonly=True, create=False, lock=False, readahead=False, meminit=False, max_spare_txns=16
            )
        except lmdb.Error as error:
            raise UserError(f"{self.path}: cannot be opened as an LMDB ({error}); copy or make it again") from error
        # Reading past the end of a file that was cut short would kill the process with a bus error.
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        size = (self.path / DATA_FILE).stat().st_size
        if size < expected:
            raise UserError(
                f"{self.path}: {DATA_FILE} has {size} of {expected} bytes, it was cut short; copy or make it again"
            )
        _environments[name] = environment
        return environment
