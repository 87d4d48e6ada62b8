"""Checkpoint files: reading, loading weights, saving, the checkpoints of a run, resuming.

Nothing in a file is executed. Ours hold `model`, `training`, `config`, `charset` and `provenance`; a plain `state_dict`
and the published form `{"model": ..., "opt": ...}` are read as well.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import UserError, first_line, write_atomically

if TYPE_CHECKING:
    from engine.trainer import Trainer

logger = logging.getLogger(__name__)

# Tensors of the published networks that no forward pass uses; our networks do not have them.
UNUSED_PUBLISHED = re.compile(
    r"(^|\.)(backbone\.resnet\.side4_1\.0\.(weight|bias)|backbone\.pos_encoder\.pe|project\.(weight|bias))$"
)
# Prefixes of DistributedDataParallel and DataParallel, and of torch.compile.
WRAPPER_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
LARGEST_EXPANSION = 16  # largest size of the tensors over that of their file, in which they may share memory
NAMES_SHOWN = 3  # of each kind of difference: a message stays below the length at which its middle is left out
CHECKPOINT_LIST = "checkpoint.yaml"


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Save `state` to `path` with torch, all or nothing; raises as `write_atomically`."""
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
    except Exception as error:  # what the unpickler runs into depends on the bytes that it takes for a pickle
        raise UserError(f"checkpoint {path} is damaged or no torch file ({first_line(error)}); use another") from error
    if _bytes_declared(state) > most:
        raise UserError(f"checkpoint {path} is refused: its tensors claim far more than the file holds; use another")
    if not isinstance(state, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}, not a state_dict; save model.state_dict()")
    return dict(state)


def _bytes_declared(state: Any) -> int:
    """Return the bytes that the tensors in nested containers would take as copies: a view may claim any size."""
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
    """Return the tensors of a checkpoint: under `model` in ours and the published form, else at the top."""
    weights = state.get("model", state)
    weights = weights if isinstance(weights, Mapping) else {}
    tensors = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {WRAPPER_PREFIXES.sub("", name): tensor for name, tensor in tensors.items()}


def load_checkpoint(model: nn.Module, path: Path | str, strict: bool = True) -> dict[str, Any]:
    """Load the weights of `path` into `model` and return all that the checkpoint holds (config, charset, ...).

    Accepts our checkpoints, a plain `state_dict` and the published form `{"model": ..., "opt": ...}`, each with or
    without a `module.` prefix. Tensors of the published networks that no forward pass uses are dropped.

    Args:
        strict: the file must have every tensor of the model with its shape, and no other. If False, what fits is
            loaded and the rest is logged.

    Raises:
        UserError: as `read_checkpoint`; or the tensors differ and `strict` is set: the message names them.
    """
    state = read_checkpoint(path)
    load_weights(model, state, path, strict=strict)
    return state


def load_weights(model: nn.Module, state: Mapping[str, Any], path: Path | str, *, strict: bool = True) -> None:
    """Load a checkpoint that was read from `path` into `model`; otherwise like `load_checkpoint`."""
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
    """Return how `weights` differ from `expected`, one phrase per kind of difference."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    reshaped = [
        f"{name} {_form(weights[name], tensor)}, not {_form(tensor, weights[name])}"
        for name, tensor in expected.items()
        if name in weights and not _fits(weights[name], tensor)
    ]
    kinds = (("missing", missing), ("not in the network", extra), ("of other shapes in the file", reshaped))
    return [f"{len(names)} {kind}: {', '.join(names[:NAMES_SHOWN])}" for kind, names in kinds if names]


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor of a file fits one of the network; floats may have any precision."""
    kinds = [(each.shape, each.is_floating_point(), each.layout, each.is_meta) for each in (tensor, expected)]
    return kinds[0] == kinds[1]


def _form(tensor: Tensor, other: Tensor) -> str:
    """Return what distinguishes a tensor from another one: its shape, else its type."""
    same_shape = tensor.shape == other.shape
    return f"{tensor.dtype} {tensor.layout} {tensor.device}" if same_shape else f"{tuple(tensor.shape)}"


# --- a run's checkpoints ----------------------------------------------------------------------------------------------


def saved_checkpoints(folder: Path, name: str) -> list[str]:
    """Return the names of the checkpoints of run `name` in its folder, in the order of their iterations."""
    form = re.compile(rf"{re.escape(name)}_\d+_\d+\.pth")
    return sorted((path.name for path in folder.glob("*.pth") if form.fullmatch(path.name)), key=iteration_of)


def iteration_of(file: str) -> int:
    """Return the iteration in the name of a checkpoint."""
    return int(file.removesuffix(".pth").rpartition("_")[2])


def write_list(folder: Path, names: list[str]) -> None:
    """Write `checkpoint.yaml`, for people and scripts; nothing here reads it."""
    write_atomically(folder / CHECKPOINT_LIST, yaml.safe_dump({"latest": names[-1], "checkpoints": names}))


def newest_valid_checkpoint(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Return path and content of the newest checkpoint of run `name`; one that is damaged is named and passed over.

    Raises:
        UserError: there is none.
    """
    for each in reversed(saved_checkpoints(folder, name)):
        try:
            state = read_checkpoint(folder / each)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
            continue
        if "training" in state:
            return folder / each, state
    raise UserError(f"{folder} has no valid checkpoint to resume from; start without --resume")


def resume_state(folder: Path, name: str, resume: str) -> dict[str, Any] | None:
    """Return the state to resume from, of a file or of the newest valid checkpoint; None if there is no checkpoint.

    Raises:
        UserError: the file cannot be resumed from, or is no checkpoint of the run that the folder holds.
    """
    if not resume and not saved_checkpoints(folder, name):
        runs = [each.name for each in sorted(folder.parent.glob("*")) if saved_checkpoints(each, each.name)]
        others = f" (the runs in {folder.parent} that have one: {', '.join(runs[:10])})" if runs else ""
        logger.warning("%s has no checkpoint to resume from: starting from the beginning%s", folder, others)
        return None
    path, state = (Path(resume), read_checkpoint(resume)) if resume else newest_valid_checkpoint(folder, name)
    if "training" not in state:
        raise UserError(f"--resume {resume}: holds weights only; start from them with --checkpoint")
    is_of_run = path.resolve().parent == folder.resolve() and path.name in saved_checkpoints(folder, name)
    history = folder / "history.jsonl"
    if not is_of_run and history.is_file() and history.stat().st_size:
        raise UserError(
            f"--resume {resume}: no checkpoint of the run in {folder}, whose history it would cut; give this run "
            "another --name, or resume that one with --resume alone"
        )
    logger.info("resuming from %s", path)
    return state


def set_aside_later(folder: Path, name: str, iteration: int) -> None:
    """Rename the checkpoints of run `name` after an iteration, whose steps are taken anew, to `superseded-*`.

    The best weights, too: the next evaluation would replace them, however good they are. Those that were set aside
    before stay.
    """
    renamed = {each: f"superseded-{each}" for each in saved_checkpoints(folder, name) if iteration_of(each) > iteration}
    best = f"best-{name}.pth"
    if _stored_iteration(folder / best) > iteration:
        names = (f"superseded-{best}" + (f".{number}" if number else "") for number in itertools.count())
        renamed[best] = next(each for each in names if not (folder / each).exists())
    for later, aside in renamed.items():
        (folder / later).replace(folder / aside)
        logger.warning("%s is renamed to %s: the resumed run repeats its steps", later, aside)


def _stored_iteration(path: Path) -> int:
    """Return the iteration of best weights, whose name has none; -1 if they cannot be read."""
    try:
        iteration = read_checkpoint(path).get("iteration")
    except UserError:
        return -1
    return iteration if isinstance(iteration, int) else -1


def load_training_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore a run from a checkpoint.

    Raises:
        UserError: it is of another network or optimiser, or of other data.
    """
    try:
        trainer.load_state_dict(state)
    except UserError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]  # a damaged state may lack anything
        raise UserError(
            f"the checkpoint to resume from does not fit the run ({type(error).__name__}: {reason}); resume with the "
            "model, its freeze keys, optimizer.type and prefixes of optimizer.lr_groups that it was trained with, or "
            "start from its weights with --checkpoint"
        ) from error


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore momenta and step counts; learning rate, decay and the like stay those of the config.

    Raises:
        ValueError: the state is damaged, or of another type of optimiser or another grouping of the parameters.
    """
    ours, theirs = optimizer.state_dict()["param_groups"], state["param_groups"]
    taken, own = ({"betas", "momentum"} & groups[0].keys() for groups in (theirs, ours))
    if taken != own:
        raise ValueError("it holds the state of another optimizer.type")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
        raise ValueError("it groups the parameters in another way")
    names = {"exp_avg", "exp_avg_sq"} if "betas" in own else {"momentum_buffer"}
    restored = {}
    for place, parameter in enumerate(parameters):
        momenta = {name: value for name, value in state["state"].get(place, {}).items() if value is not None}
        if not momenta:
            continue
        if not all(isinstance(value, Tensor | int | float) for value in momenta.values()):
            raise ValueError("the state of the optimizer is damaged")  # torch would walk through whatever it holds
        found = {name: torch.as_tensor(value).shape for name, value in momenta.items()}
        if found.pop("step", torch.Size()).numel() != 1 or found != dict.fromkeys(names, parameter.shape):
            raise ValueError("the state of the optimizer is damaged")
        for name in names:  # in the memory format of the parameter: torch's fused kernels take it for granted
            momenta[name] = torch.empty_like(parameter, requires_grad=False).copy_(momenta[name])
        restored[place] = momenta
    optimizer.load_state_dict({"state": restored, "param_groups": ours})


def weights_to_test(folder: Path, name: str, start: str | None) -> str:
    """Return the best weights of run `name`; if nothing was trained, `start`, the file that a training starts from.

    Raises:
        UserError: there are none, or a run has checkpoints but no best one.
    """
    best = folder / f"best-{name}.pth"
    if best.is_file():
        logger.info("testing %s", best)
        return str(best)
    if saved := saved_checkpoints(folder, name):
        raise UserError(f"{best} does not exist: give the weights to test, such as --checkpoint {folder / saved[-1]}")
    if start is None:
        raise UserError(f"there are no weights to test: give --checkpoint, or train first ({best} does not exist)")
    logger.info("nothing was trained in %s: testing model.checkpoint, %s", folder, start)
    return start
