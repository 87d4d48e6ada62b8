"""Command lines, errors, logging, seeds and checkpoint files: what every part needs and no part owns."""

import argparse
import contextlib
import errno
import logging
import os
import pickle
import re
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Tensors that the published networks carry and never use (they are in no forward pass, so ours do not have them).
UNUSED_PUBLISHED = re.compile(
    r"(^|\.)(backbone\.resnet\.side4_1\.0\.(weight|bias)|backbone\.pos_encoder\.pe|project\.(weight|bias))$"
)
# Prefixes that wrappers put before every name: DistributedDataParallel / DataParallel, torch.compile.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# What torch's unpickler meets bytes with that are no pickle, or one of hostile make.
UNPICKLING_ERRORS = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)
NAMES_SHOWN = 5
LONGEST_LINE = 1000  # characters of an error message
LOG_FORMAT = "%(asctime)s %(levelname).1s %(message)s"
FILE_ONLY = "file_only"  # of a log record, see `setup_logging`
RENDER_SCHEME = "render://"  # begins a data root that is no file but a renderer's YAML


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file at fault and the remedy, in one or two lines.

    What it quotes of a file may be anything: long lines show their ends, and signs that cannot be printed are escaped.
    """

    def __str__(self) -> str:
        return "\n".join(map(_printable, super().__str__().split("\n")))


def _printable(line: str) -> str:
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE * 2 // 3]} ... {line[-LONGEST_LINE // 3 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def is_folder_name(text: str) -> bool:
    """Whether a text names one folder, which stays inside the one that it is joined to."""
    return text not in ("", ".", "..") and "/" not in text and "\\" not in text


class ArgumentParser(argparse.ArgumentParser):
    """argparse's own, but a mistake on the command line is told in one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def run_command_line(main: Callable[[], int | None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit status 2, Ctrl-C status 130.

    One process of several that fails ends at once: to leave the group in order it would wait for the others, which wait
    for its share of the step, and nobody would read why (NCCL).
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone; nothing is wrong
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
    """Log to stderr and, where `path` is given, append the same lines with their dates to that file.

    A line logged with `extra={FILE_ONLY: True}` goes to the file alone: the terminal shows a bar in its place.
    """
    terminal = logging.StreamHandler()
    terminal.addFilter(lambda record: not getattr(record, FILE_ONLY, False))
    terminal.setFormatter(logging.Formatter(LOG_FORMAT, "%H:%M:%S"))
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter(LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=handlers, force=True)


def seed_everything(seed: int) -> None:
    """Seed torch on every device. Data draws from generators of its own, one per sample (dataset.py)."""
    torch.manual_seed(seed)


# --- checkpoint files -------------------------------------------------------------------------------------------------


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
            raise UserError(f"{path}: no space left to write it; free some disk, older files are whole") from error
        raise


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Give `write` a temporary binary file beside `path`, flush it to the disk and rename it: all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from error
    finally:
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """`torch.save(state)` to `path`, all or nothing.

    Raises:
        UserError: the disk is full; what stood at `path` before is untouched.
    """
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint file to CPU tensors and plain values; nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give the path of a .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"(?i)unsupported (global|class)|unrecognized function|can only build", str(error))
        reason = "it holds objects other than tensors and plain values" if foreign else "damaged"
        raise UserError(f"checkpoint {path} is refused ({reason}); save a state_dict with torch.save") from error
    except UNPICKLING_ERRORS as error:
        raise UserError(f"checkpoint {path} is damaged or no torch file ({first_line(error)}); use another") from error
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a state_dict; save model.state_dict()")
    return dict(state)


def checkpoint_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: ours and the published form keep them under `model`, a plain one at the top."""
    weights = state.get("model", state)
    weights = weights if isinstance(weights, Mapping) else {}
    return {_strip_wrappers(name): value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}


def load_checkpoint(model: nn.Module, path: Path | str, strict: bool = True) -> dict[str, Any]:
    """Load the weights of `path` into `model`; returns the whole checkpoint (config, charset, ... where it has them).

    Accepts our checkpoints, a plain `state_dict` and the published form `{"model": ..., "opt": ...}`, each with or
    without a `module.` prefix. Tensors of the published networks that no forward pass uses are dropped.

    Args:
        strict: every tensor of the model must be in the file with its shape, and no other. Where False, what fits is
            loaded and the rest is logged.
    Raises:
        UserError: as `read_checkpoint`; or the tensors differ and `strict` is set: the message names them.
    """
    state = read_checkpoint(path)
    load_weights(model, state, path, strict=strict)
    return state


def load_weights(model: nn.Module, state: Mapping[str, Any], path: Path | str, *, strict: bool = True) -> None:
    """Load what a checkpoint holds, as read from `path`, into `model`; all else as `load_checkpoint`."""
    weights = checkpoint_weights(state)
    expected = model.state_dict()
    weights = {k: v for k, v in weights.items() if k in expected or not UNUSED_PUBLISHED.search(k)}
    differences = _differences(weights, expected)
    if differences:
        message = f"checkpoint {path} does not fit the network: " + "; ".join(differences)
        if strict:
            raise UserError(f"{message}. Check the config's model section, or allow it with --model_strict false")
        logger.warning("%s", message)
    fitting = {k: v for k, v in weights.items() if k in expected and v.shape == expected[k].shape}
    if not fitting:
        raise UserError(f"checkpoint {path} has no tensor of the network; it belongs to another model.name")
    model.load_state_dict(fitting, strict=False)


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps `weights` from being `expected`, one phrase per kind."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    reshaped = [
        f"{name} is {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = (("missing", missing), ("not in the network", extra), ("other shapes", reshaped))
    return [f"{len(names)} {kind}: {_shown(names)}" for kind, names in kinds if names]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to a length that fits into one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
