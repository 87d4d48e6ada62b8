"""Command lines, errors, logging and files written all or nothing: shared by every part."""

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

logger = logging.getLogger(__name__)

LONGEST_LINE = 1000  # characters of an error message
LOG_FORMAT = "%(asctime)s %(levelname).1s %(message)s"
RENDER_SCHEME = "render://"  # begins a data root that is no file but a renderer's YAML


class UserError(ValueError):
    """A mistake of the user: the message names the key or file at fault and the remedy, in one or two lines.

    It may quote anything that a file holds: long lines are shortened, and unprintable characters are escaped.
    """

    def __str__(self) -> str:
        return "\n".join(map(printable, super().__str__().split("\n")))


def printable(line: str) -> str:
    """Return a line with characters that cannot be printed escaped and, if it is long, its middle left out."""
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE * 2 // 3]} ... {line[-LONGEST_LINE // 3 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def is_folder_name(text: str) -> bool:
    """Return whether a text is the name of one folder, without any path."""
    return text not in ("", ".", "..") and "/" not in text and "\\" not in text


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that an error on the command line is one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def run_command_line(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C status 130.

    If one of several processes fails, it exits at once: leaving the group in order would wait for the others, which
    wait for its share of the step (NCCL).
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output (head, less) is gone; that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status or 0)


def setup_logging(path: Path | None = None, *, level: int = logging.INFO) -> None:
    """Log to stderr and, if `path` is given, append the same lines with dates to that file."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter(LOG_FORMAT, "%H:%M:%S"))
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter(LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=handlers, force=True)


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explain_full_disk(path: Path):
    """Turn a full disk (or quota, or file-size limit) while writing `path` into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a failed write as a RuntimeError that no longer holds the errno.
        code = getattr(error, "errno", None)
        lost_errno = isinstance(error, RuntimeError) and re.search(r"file write failed|unexpected pos", str(error))
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or lost_errno:
            raise UserError(f"{path}: no space left to write it; free some disk; older files are intact") from error
        raise


def write_atomically(path: Path, content: str | bytes | Callable[[Any], None]) -> None:
    """Write a file or nothing: a temporary file beside `path` is filled, flushed to disk and renamed.

    Args:
        content: bytes; text, in UTF-8 with lone surrogates escaped; or a function that writes to the binary file.
    """
    path = Path(path)
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                data(file) if callable(data) else file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def read_text(path: Path | str, what: str, remedy: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: it is missing or not UTF-8; the message says what the file is for, and the remedy.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"{path}: cannot read the {what} ({reason}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def __getattr__(name: str) -> Any:
    """Return `utils.load_checkpoint`, a public name that is defined in `engine.checkpoints`; imported on first use."""
    if name != "load_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine.checkpoints import load_checkpoint

    return load_checkpoint
