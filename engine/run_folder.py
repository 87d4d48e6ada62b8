"""The folder of a run: its lock, renaming that of an earlier run, the log file."""

import contextlib
import errno
import fcntl
import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine import distributed
from engine.distributed import Process
from utils import UserError, setup_logging

logger = logging.getLogger(__name__)

LOG = "log.txt"


@contextlib.contextmanager
def claimed(folder: Path, process: Process, *, keep: bool) -> Iterator[None]:
    """Lock the work folder for this run; unless `keep` is set, rename the folder of an earlier run first.

    A run that is refused leaves no folder, and the earlier run gets its name back.

    Raises:
        UserError: another run has locked it.
    """
    if not process.is_main:
        distributed.barrier()
        yield
        return
    with _open_lock(folder) as lock:
        try:
            # Not flock: forked loader workers would inherit it and keep it for seconds after a kill.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder} is in use by another run; give this one another --name") from error
            remedy = "start no second run in this folder, or set global.workdir to another disk"
            logger.warning("%s: its file system has no locks (%s): %s", folder, error.strerror, remedy)
        moved = None
        if not keep and (folder / "history.jsonl").exists():
            names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
            moved = folder.rename(next(name for name in names if not name.exists()))
            print(f"an earlier run was in {folder}; it is now {moved} (to go on with it, use --resume)")
        folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        try:
            with dropped_if_refused(folder, process):
                yield
        except UserError:
            if moved is not None and not folder.exists():
                moved.rename(folder)
                print(f"{folder} is the earlier run again")
            raise


@contextlib.contextmanager
def dropped_if_refused(folder: Path, process: Process) -> Iterator[None]:
    """Remove the work folder of a run that a `UserError` ends before it has written more than its log."""
    try:
        yield
    except UserError:
        if process.is_main and [each.name for each in folder.glob("*")] == [LOG]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _open_lock(folder: Path):
    """Open the lock file beside the folder, where it stays when the folder is renamed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written ({error.strerror}); set global.workdir") from error


def log_to(folder: Path, process: Process, *, debug: bool = False) -> None:
    """Log to the terminal and `log.txt`; processes other than the main one only warn."""
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            setup_logging(folder / LOG, level=logging.DEBUG if debug else logging.INFO)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); set global.workdir") from error
    else:
        setup_logging(level=logging.WARNING)
