"""Checkpoint files: reading and loading weights, saving, a run's list of them, resuming.

Nothing in a file is executed. Ours hold `model`, `training`, `config` and `charset`; a plain `state_dict` and the
published form `{"model": ..., "opt": ...}` are read as well.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from engine.distributed import Process
from utils import UserError, first_line, write_atomically

if TYPE_CHECKING:
    from engine.trainer import Trainer

logger = logging.getLogger(__name__)

# Tensors that the published networks carry and never use (they are in no forward pass, so ours do not have them).
UNUSED_PUBLISHED = re.compile(
    r"(^|\.)(backbone\.resnet\.side4_1\.0\.(weight|bias)|backbone\.pos_encoder\.pe|project\.(weight|bias))$"
)
# Prefixes that wrappers put before every name: DistributedDataParallel / DataParallel, torch.compile.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# What torch's unpickler raises on bytes that are no pickle, or one of hostile make.
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
    zipfile.BadZipFile,
)
LARGEST_EXPANSION = 16  # times a file's size that its tensors may take; they may share memory in it
NAMES_SHOWN = 5
CHECKPOINT_LIST = "checkpoint.yaml"


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
    most = LARGEST_EXPANSION * path.stat().st_size + (1 << 26)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch stores its entries, and unpacks what is compressed
                if sum(entry.file_size for entry in archive.infolist()) > most:
                    raise ValueError("it unpacks to far more than it holds")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"(?i)unsupported (global|class)|unrecognized function|can only build", str(error))
        reason = "it holds objects other than tensors and plain values" if foreign else "damaged"
        raise UserError(f"checkpoint {path} is refused ({reason}); save a state_dict with torch.save") from error
    except UNPICKLING_ERRORS as error:
        raise UserError(f"checkpoint {path} is damaged or no torch file ({first_line(error)}); use another") from error
    if _bytes_declared(state) > most:
        raise UserError(f"checkpoint {path} is refused: its tensors claim far more than the file holds; use another")
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a state_dict; save model.state_dict()")
    return dict(state)


def _bytes_declared(state: Any) -> int:
    """Bytes that the tensors of nested containers would take if each were copied: a view may claim any size."""
    total, seen, left = 0, set(), [state]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value
    return total


def checkpoint_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: ours and the published form keep them under `model`, a plain one at the top."""
    weights = state.get("model", state)
    weights = weights if isinstance(weights, Mapping) else {}
    tensors = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {_strip_wrappers(name): tensor for name, tensor in tensors.items()}


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
    fitting = {k: v for k, v in weights.items() if k in expected and _fits(v, expected[k])}
    if not fitting:
        raise UserError(f"checkpoint {path} has no tensor of the network; it belongs to another model.name")
    model.load_state_dict(fitting, strict=False)


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps `weights` from being `expected`, one phrase per kind."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    reshaped = [
        f"{name} is {_form(weights[name], tensor)} in the file, {_form(tensor, weights[name])} in the network"
        for name, tensor in expected.items()
        if name in weights and not _fits(weights[name], tensor)
    ]
    kinds = (("missing", missing), ("not in the network", extra), ("other shapes", reshaped))
    return [f"{len(names)} {kind}: {_shown(names)}" for kind, names in kinds if names]


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of a file can become one of the network; floats may have any precision."""
    kinds = [(each.shape, each.is_floating_point(), each.layout, each.is_meta) for each in (tensor, expected)]
    return kinds[0] == kinds[1]


def _form(tensor: Tensor, other: Tensor) -> str:
    """What tells a tensor from another: its shape, else its type."""
    return (
        f"{tuple(tensor.shape)}" if tensor.shape != other.shape else f"{tensor.dtype} {tensor.layout} {tensor.device}"
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


# --- a run's checkpoints ----------------------------------------------------------------------------------------------


def listed_checkpoints(folder: Path, name: str) -> list[str]:
    """Names of run `name` in `checkpoint.yaml` whose files exist, oldest first; behind them files it does not list."""
    listing = folder / CHECKPOINT_LIST
    present = {path.name for path in folder.glob("*")}
    names: list[str] = []
    if listing.exists():
        try:
            listed = yaml.safe_load(listing.read_text(encoding="utf-8"))["checkpoints"]
            names = [each for each in listed if isinstance(each, str) and each in present]
        except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
            logger.warning("%s is damaged; looking at the files themselves", listing)
    form = re.compile(rf"{re.escape(name)}_\d+_\d+\.pth")
    found = sorted(
        (path for path in folder.glob("*.pth") if form.fullmatch(path.name)),
        key=lambda path: (path.stat().st_mtime_ns, path.name),
    )
    newer = [path.name for path in found if path.name not in names]  # written, but killed before it was listed
    return names + newer


def list_as_newest(folder: Path, name: str, file: str, *, keep: int | None = None) -> list[str]:
    """Put `file` last in the list of run `name`'s checkpoints; returns those that `keep` leaves out of it."""
    names = [each for each in listed_checkpoints(folder, name) if each != file] + [file]
    kept = names[-keep:] if keep else names
    content = yaml.safe_dump({"latest": file, "checkpoints": kept})
    write_atomically(folder / CHECKPOINT_LIST, lambda listing: listing.write(content.encode()))
    return names[: len(names) - len(kept)]


def newest_whole_checkpoint(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of run `name` in its work folder; a damaged one is named and the one before it is used.

    Raises:
        UserError: there is none.
    """
    for each in reversed(listed_checkpoints(folder, name)):
        try:
            state = read_checkpoint(folder / each)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
            continue
        if "training" in state:
            return folder / each, state
    raise UserError(f"{folder} has no whole checkpoint to resume from; start without --resume")


def resume_state(folder: Path, name: str, resume: str, process: Process) -> dict[str, Any] | None:
    """Training state to go on from: of a file, or of the folder's newest whole checkpoint; None where it has none.

    A file of the folder itself becomes its newest checkpoint: those after it belong to steps that are taken anew.

    Raises:
        UserError: the file cannot be resumed from, or is no checkpoint of the run that the folder holds.
    """
    if resume:
        state = read_checkpoint(resume)
        if "training" not in state:
            raise UserError(f"--resume {resume}: holds weights only; start from them with --checkpoint")
        path, history = Path(resume), folder / "history.jsonl"
        if path.resolve().parent == folder.resolve() and path.name in listed_checkpoints(folder, name):
            if process.is_main:
                list_as_newest(folder, name, path.name)
        elif history.is_file() and history.stat().st_size:
            raise UserError(
                f"--resume {resume}: no checkpoint of the run in {folder}, whose history it would cut; give this run "
                "another --name, or go on with that one by --resume alone"
            )
        return state
    if not listed_checkpoints(folder, name):
        logger.warning("%s has no checkpoint to resume from: starting from the beginning", folder)
        return None
    path, state = newest_whole_checkpoint(folder, name)
    logger.info("resuming from %s", path)
    return state


def load_training_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Let a run go on from a checkpoint.

    Raises:
        UserError: it is of another network or optimiser, or of other data.
    """
    try:
        trainer.load_state_dict(state)
    except UserError:
        raise
    except UNPICKLING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint to resume from does not fit the run ({type(error).__name__}: {reason}); resume with the "
            "model and the optimizer.type that it was trained with, or start from its weights with --checkpoint"
        ) from error


def weights_to_test(folder: Path, name: str, start: str | None) -> str:
    """Return the best weights of run `name`; if nothing was trained, `start`, the file that a training starts from.

    Raises:
        UserError: there are none, or a run has checkpoints but no best one.
    """
    best = folder / f"best-{name}.pth"
    if best.is_file():
        logger.info("testing %s", best)
        return str(best)
    if saved := listed_checkpoints(folder, name):
        raise UserError(f"{best} does not exist: give the weights to test, such as --checkpoint {folder / saved[-1]}")
    if start is None:
        raise UserError(f"there are no weights to test: give --checkpoint, or train first ({best} does not exist)")
    logger.info("nothing was trained in %s: testing model.checkpoint, %s", folder, start)
    return start
