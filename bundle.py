"""Checkpoints that need no other file: a recogniser with its config and characters, and the SSN for its masks.

Keys of such a file: `model` (weights), `config` (plain data, as `Config.to_dict`), `charset` (the characters in order
of their classes), `provenance` if the checkpoint had it (engine/provenance.py), and for images without masks `ssn`:
{`model`, `config`, `provenance`} in the same forms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builders import build_carried_ssn, build_charset, build_model, load_described, ssn_part, with_checkpoint
from config import Config
from engine.checkpoints import checkpoint_weights, read_checkpoint, save_atomically
from engine.provenance import without_folders
from inference.prepare import float32_names
from loading.charset import Charset
from modules.ssn import SSN
from utils import UserError


@dataclass(frozen=True)
class Bundle:
    """The networks of a checkpoint file, in eval mode and on the CPU."""

    model: torch.nn.Module
    config: Config
    charset: Charset
    ssn: SSN | None  # None if the file has none
    areas: tuple[int, ...]  # its scales: sides of square areas, pixels; empty without one


def load_bundle(path: Path | str, config: Config | None = None) -> Bundle:
    """Build the networks of a checkpoint.

    Args:
        config: describes the network; None: the config that the checkpoint carries.

    Raises:
        UserError: the file is missing or damaged, carries no config and none is given, or holds no network that reads
            images.
    """
    return _built(read_checkpoint(path), path, config)


def _built(state: Mapping[str, Any], path: Path | str, config: Config | None = None) -> Bundle:
    config = with_checkpoint(config or _carried_config(state, path), None)
    if config.model.kind not in ("vision", "recogniser"):
        raise UserError(f"checkpoint {path} holds {config.model.name}, which reads no images; give a recogniser's")
    charset = Charset(state["charset"]) if "charset" in state else build_charset(config)
    model = build_model(config, charset)
    load_described(model, state, path, config)
    ssn, areas = build_carried_ssn(state, path) or (None, ())
    return Bundle(model.eval().requires_grad_(False), config, charset, ssn, areas)


def load_ssn(path: Path | str) -> tuple[SSN, tuple[int, ...]]:
    """Return the SSN of its own checkpoint, or of one that bundles it with a recogniser, and its areas.

    Raises:
        UserError: the file is missing, damaged, or holds no SSN with its config.
    """
    carried = build_carried_ssn(read_checkpoint(path), path)
    if carried is None:
        raise UserError(f"checkpoint {path} holds no SSN with its config; give one that main.py trained")
    return carried


def save_bundle(
    output: Path | str,
    recogniser: Path | str,
    ssn: Path | str | None = None,
    *,
    areas: Sequence[int] = (),
    half: bool = False,
) -> dict[str, Any]:
    """Write the recogniser of one checkpoint and the SSN of another to one file, and return what was written.

    It lacks the state of their training, and paths of the machines that trained them.

    Args:
        areas: those that the recogniser's masks were made with; empty: those in the SSN's checkpoint.
        half: store matrices and kernels in 16 bits, which about halves the file. Vectors, and the layers that the fast
            form computes in float32, keep 32 bits.

    Raises:
        UserError: a file is missing, damaged, or carries no config.
    """
    state = read_checkpoint(recogniser)
    config = _carried_config(state, recogniser)
    charset = state["charset"] if "charset" in state else build_charset(config).characters
    weights = _stored(state, config, Charset(charset), half)
    content = {"model": weights, "config": portable(config), "charset": charset}
    content |= {name: state[name] for name in ("iteration", "scores") if name in state} | _provenance(state)
    if ssn is not None:
        state = ssn_part(read_checkpoint(ssn))
        config = _carried_config(state, ssn)
        config.model.ssn.areas = list(areas) or config.model.ssn.areas
        weights = _stored(state, config, None, half)
        content["ssn"] = {"model": weights, "config": portable(config)} | _provenance(state)
    # A file that cannot be read is found here, not by its receiver.
    if _built(content, recogniser).ssn is None and ssn is not None:
        raise UserError(f"--ssn {ssn}: holds no SSN; give a checkpoint that main.py trained with model.name=ssn")
    save_atomically(content, Path(output))
    return content


def portable(config: Config) -> dict[str, Any]:
    """Return a config as plain data without what belongs to one machine or user: paths, checkpoints, projects."""
    config, fresh = with_checkpoint(config, None), Config()
    config.model.ssn.checkpoint = config.dataset.masks.root = config.dataset.cache_dir = None
    config.run.workdir = fresh.run.workdir
    config.dataset.train.roots = config.dataset.valid.roots = config.dataset.test.roots = []
    config.dataset.train.shares = config.dataset.train.difficulty = None
    config.dataset.valid.lexicon = config.dataset.test.lexicon = config.training.wandb = None
    config.dataset.charset_path = fresh.dataset.charset_path  # the checkpoint carries the characters themselves
    return config.to_dict()


def _carried_config(state: Mapping[str, Any], path: Path | str) -> Config:
    if not isinstance(state.get("config"), Mapping):
        raise UserError(f"checkpoint {path} carries no config; give the one that it was trained with (--config YAML)")
    return Config.from_dict(state["config"], source=f"{path} (config)", drop_unknown=True)


def _provenance(state: Mapping[str, Any]) -> dict[str, Any]:
    carried = state.get("provenance")
    return {"provenance": without_folders(carried)} if isinstance(carried, Mapping) else {}


def _stored(state: Mapping[str, Any], config: Config, charset: Charset | None, half: bool) -> dict[str, Tensor]:
    """Return weights as they are written: if `half`, in 16 bits what the fast form computes in 16 bits.

    Vectors (norms, biases) stay as they are: they are small and need their range.
    """
    weights = checkpoint_weights(state)
    kept = float32_names(build_model(with_checkpoint(config, None), charset)) if half else set(weights)

    def is_halved(name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dim() > 1 and name not in kept

    return {name: tensor.half() if is_halved(name, tensor) else tensor.clone() for name, tensor in weights.items()}
