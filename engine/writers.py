"""Writers of logged numbers: console and log.txt, history.jsonl, TensorBoard, Weights & Biases.

`callbacks.MetricLog` collects what they write; only the main process has writers.
"""

import json
import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import UserError, explain_full_disk, first_line, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What is logged of the steps since the record before."""

    iteration: int
    iterations: int  # of the whole run
    epoch: int
    losses: Mapping[str, float]  # mean of each term and of `total`; NaN if no step was finite
    learning_rate: float
    gradient_norm: float  # of the last step, before clipping
    samples_per_second: float
    data_wait_share: float  # of the time, in [0, 1]
    seconds_left: float

    def scalars(self) -> dict[str, float]:
        """Return all numbers under the names that they have on a page of curves."""
        return {f"loss/{name}": mean for name, mean in self.losses.items()} | {
            "optimizer/learning_rate": self.learning_rate,
            "optimizer/gradient_norm": self.gradient_norm,
            "speed/samples_per_second": self.samples_per_second,
            "speed/data_wait_share": self.data_wait_share,
        }


@dataclass(frozen=True)
class Scores:
    """What is logged of an evaluation."""

    iteration: int
    scores: Mapping[str, Any]  # in the form of metrics.json
    table: str
    words: np.ndarray | None  # image (H, W, 3) uint8 of some words

    def scalars(self) -> dict[str, float]:
        """Return every score as `<data set>/<metric>`; weighted and mean are sets as well."""
        means = {name: self.scores[name] for name in ("weighted", "mean")}
        return {
            f"{name}/{metric}": value
            for name, entry in {**self.scores["datasets"], **means}.items()
            for metric, value in entry.items()
            if isinstance(value, int | float)
        }


class Writer:
    """Base of all writers; the methods here do nothing."""

    def open(self, iteration: int) -> None:
        """Start or go on after `iteration`; drop what was written of later ones, which the run repeats."""

    def write(self, record: Record) -> None:
        """Write a record."""

    def write_scores(self, scores: Scores) -> None:
        """Write an evaluation."""

    def close(self, *, failed: bool = False) -> None:
        """Release what is open; may be called twice."""


class Console(Writer):
    """A line per record, in the terminal and log.txt."""

    def write(self, record: Record) -> None:
        place = f"epoch {record.epoch}  iteration {record.iteration}/{record.iterations}"
        terms = "  ".join(f"{name} {mean:.4f}" for name, mean in record.losses.items() if name != "total")
        speed = f"{record.samples_per_second:.0f} samples/s  {tqdm.format_interval(record.seconds_left)} left"
        loss, rate = record.losses["total"], record.learning_rate
        logger.info("%s  loss %.4f  %s  lr %.2e  %s", place, loss, terms, rate, speed)

    def write_scores(self, scores: Scores) -> None:
        logger.info("iteration %d\n%s", scores.iteration, scores.table)


class History(Writer):
    """`history.jsonl`: one JSON object per record, each iteration once, even after a resume."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def open(self, iteration: int) -> None:
        write_atomically(self.path, b"".join(self._lines_up_to(iteration)))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def _lines_up_to(self, iteration: int) -> list[bytes]:
        """Return the valid lines of iterations that a resumed run does not repeat."""
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                logger.warning("%s: a damaged line is dropped (a kill can leave one)", self.path)
        return kept

    def write(self, record: Record) -> None:
        losses = {name: mean if math.isfinite(mean) else None for name, mean in record.losses.items()}
        entry = {"iteration": record.iteration, "epoch": record.epoch, "loss": losses.pop("total"), **losses}
        with explain_full_disk(self.path):
            self._file.write(json.dumps(entry | {"lr": record.learning_rate}) + "\n")

    def close(self, *, failed: bool = False) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard(Writer):
    """TensorBoard events of every number, and words with masks and attention at each evaluation."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._events: SummaryWriter | None = None

    def open(self, iteration: int) -> None:
        self._events = SummaryWriter(str(self.folder), purge_step=iteration + 1 if iteration else None)

    def write(self, record: Record) -> None:
        self._add(record.scalars(), record.iteration)

    def write_scores(self, scores: Scores) -> None:
        self._add(scores.scalars(), scores.iteration)
        if scores.words is not None:
            self._events.add_image("words", scores.words, scores.iteration, dataformats="HWC")
        self._events.flush()

    def _add(self, scalars: Mapping[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, iteration)

    def close(self, *, failed: bool = False) -> None:
        if self._events is not None:
            self._events.close()


def import_wandb() -> ModuleType:
    """Return the package wandb; raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("training.wandb: wandb is not installed; pip install wandb, or set it to null") from error
    return wandb


class WeightsAndBiases(Writer):
    """A run of Weights & Biases with what TensorBoard shows; a resumed run goes on under the same id.

    The id is kept in the run's folder. Steps that a run repeats after a kill are equal to those before, and wandb
    ignores them (online; two offline files may hold them twice).
    """

    def __init__(self, project: str, *, name: str, folder: Path, config: Mapping[str, Any]):
        self._wandb = import_wandb()
        self._id_file = folder / "wandb-id.txt"
        self._settings = {"project": project, "name": name, "dir": str(folder), "config": dict(config)}
        self._run: Any = None

    def open(self, iteration: int) -> None:
        if not self._id_file.exists():
            write_atomically(self._id_file, secrets.token_hex(4))
        number = self._id_file.read_text(encoding="utf-8").strip()
        try:
            self._run = self._wandb.init(id=number, resume="allow", **self._settings)
        except self._wandb.Error as error:
            remedy = "run wandb login, or set WANDB_MODE=offline"
            raise UserError(f"training.wandb: {first_line(error)}; {remedy}") from error

    def write(self, record: Record) -> None:
        self._run.log({"epoch": record.epoch, **record.scalars()}, step=record.iteration)

    def write_scores(self, scores: Scores) -> None:
        image = {} if scores.words is None else {"words": self._wandb.Image(scores.words)}
        self._run.log({**scores.scalars(), **image}, step=scores.iteration)

    def close(self, *, failed: bool = False) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None
