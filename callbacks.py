"""Callbacks: what happens beside the training loop, one concern each.

`Callback` names the hooks; a callback fills the few that it needs. Hooks run on every process in the same order, so a
callback that writes checks `trainer.process.is_main` itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.checkpoints import list_as_newest, save_atomically
from evaluation.drawing import draw_words, grid
from utils import FILE_ONLY, explain_full_disk, write_atomically

if TYPE_CHECKING:
    from dataset import SkipLog
    from engine.trainer import Step, Trainer
    from evaluation.evaluator import Evaluator, ScoredWord
    from modules.outputs import RecogniserOutput

logger = logging.getLogger(__name__)


class Callback:
    """Base of all callbacks. Each hook is given the trainer; the ones here do nothing."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def on_batch_loaded(self, trainer: Trainer, batch: Any) -> None:
        """A batch came from the loader; its step is next."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """After step number `trainer.iteration` (counted from 1)."""

    def on_step_skipped(self, trainer: Trainer, batch: Any, iteration: int) -> None:
        """After a step whose loss or gradient was not finite: the weights are as before it."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After the last step of an epoch; `trainer.epoch` counts it already."""

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Before an evaluation, which may take long, or fail."""

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        """After an evaluation; `scores` is what `metrics.json` holds."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last step, or after a stop signal."""

    def on_fit_failed(self, trainer: Trainer) -> None:
        """An exception ends the run: release what is open."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resume needs, of tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; an empty dict where the checkpoint has none."""


class LossMeans:
    """Mean of each loss term over the steps since it was last taken.

    A step with a term that is not finite does not count. The tensors of a step are read when the means are taken, not
    before: a GPU need not be waited for at every step.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[list[float]] = []  # the terms of each step
        self._unread: list[torch.Tensor] = []

    def add(self, step: Step) -> None:
        self._names = list(step.terms)
        self._unread.extend(step.terms.values())

    def take(self) -> dict[str, float]:
        """The means, NaN where no step counts, and a new start."""
        self._read()
        finite = [row for row in self._rows if all(map(math.isfinite, row))] or [[math.nan] * len(self._names)]
        self._rows = []
        return {name: math.fsum(row[place] for row in finite) / len(finite) for place, name in enumerate(self._names)}

    def _read(self) -> None:
        if self._unread:
            self._rows += torch.stack(self._unread).view(-1, len(self._names)).tolist()
            self._unread = []

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"names": list(self._names), "rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._names, self._rows, self._unread = list(state.get("names", [])), list(state.get("rows", [])), []


class Progress(Callback):
    """A line each `interval` iterations; on a terminal a tqdm bar in its place, and the line in the log's file alone.

    A loss is the mean over the steps since the line before.
    """

    def __init__(self, *, interval: int):
        self.interval = interval
        self._means = LossMeans()
        self._bar: tqdm | None = None
        self._samples = 0
        self._since = 0.0

    def on_fit_start(self, trainer: Trainer) -> None:
        self._since, self._samples = time.perf_counter(), 0
        if trainer.process.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=trainer.iterations, initial=trainer.iteration, unit="step", dynamic_ncols=True)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if not trainer.process.is_main:
            return
        self._samples += step.samples
        self._means.add(step)
        if self._bar is not None:
            self._bar.update()
        if trainer.iteration % self.interval == 0 or trainer.iteration == trainer.iterations:
            self._show(trainer, step)

    def _show(self, trainer: Trainer, step: Step) -> None:
        step.wait()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = self._samples / seconds
        terms = self._means.take()
        loss = terms.pop("total")
        left = (trainer.iterations - trainer.iteration) * step.samples / max(rate, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", rate=f"{rate:.0f}/s", epoch=trainer.epoch)
        logger.info(
            "epoch %d  iteration %d/%d  loss %.4f  %s  lr %.2e  %.0f samples/s  %s left",
            trainer.epoch,
            trainer.iteration,
            trainer.iterations,
            loss,
            "  ".join(f"{name} {term:.4f}" for name, term in terms.items()),
            step.learning_rate,
            rate,
            tqdm.format_interval(left),
            extra={FILE_ONLY: self._bar is not None},
        )
        self._since, self._samples = time.perf_counter(), 0

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        self._since, self._samples = time.perf_counter(), 0  # evaluation time is no training time

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()

    on_fit_failed = on_fit_end

    def state_dict(self) -> dict[str, Any]:
        return self._means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state)


class History(Callback):
    """`history.jsonl`: one JSON object per logged iteration, each iteration once, also after a resume.

    Its losses are the means over the steps since the one before.
    """

    def __init__(self, *, path: Path, interval: int):
        self.path = path
        self.interval = interval
        self._means = LossMeans()
        self._file: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        if not trainer.process.is_main:
            return
        kept = self._lines_up_to(trainer.iteration)
        write_atomically(self.path, lambda file: file.writelines(kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def _lines_up_to(self, iteration: int) -> list[bytes]:
        """Whole lines of iterations that a resumed run does not repeat."""
        kept = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                logger.warning("%s: a line that is damaged, as by a kill, is dropped", self.path)
        return kept

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if self._file is None:
            return
        self._means.add(step)
        if trainer.iteration % self.interval and trainer.iteration != trainer.iterations:
            return
        terms = {name: mean if math.isfinite(mean) else None for name, mean in self._means.take().items()}
        entry = {"iteration": trainer.iteration, "epoch": trainer.epoch, "loss": terms.pop("total"), **terms}
        with explain_full_disk(self.path):
            self._file.write(json.dumps(entry | {"lr": step.learning_rate}) + "\n")

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    on_fit_failed = on_fit_end

    def state_dict(self) -> dict[str, Any]:
        return self._means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state)


class TensorBoard(Callback):
    """Events: loss terms, learning rate, gradient norm, speed, share of time spent waiting for data, scores, images.

    Losses and speed are means since the events before. It is an observer of evaluations as well: the first
    `most_images` words of each are shown.
    """

    def __init__(self, *, folder: Path, interval: int, most_images: int = 8):
        self.folder = folder
        self.interval = interval
        self.most_images = most_images
        self._images: list[np.ndarray] = []
        self._writer: SummaryWriter | None = None
        self._means = LossMeans()
        self._waited = self._seconds = 0.0
        self._samples = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.process.is_main:
            purge = trainer.iteration + 1 if trainer.iteration else None
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if self._writer is None:
            return
        self._means.add(step)
        due = trainer.iteration % self.interval == 0
        if due:
            step.wait()
        self._waited += step.data_wait
        self._seconds += step.duration
        self._samples += step.samples
        if not due:
            return
        scalars = {f"loss/{name}": mean for name, mean in self._means.take().items()}
        scalars |= {
            "optimizer/learning_rate": step.learning_rate,
            "optimizer/gradient_norm": float(step.gradient_norm),
            "speed/samples_per_second": self._samples / max(self._seconds, 1e-9),
            "speed/data_wait_share": self._waited / max(self._seconds, 1e-9),
        }
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, trainer.iteration)
        self._waited = self._seconds = 0.0
        self._samples = 0

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, predictions: Sequence[ScoredWord]) -> None:
        if self._writer is not None and output.vision is not None:
            missing = self.most_images - len(self._images)
            self._images.extend(itertools.islice(draw_words(batch, output, predictions), missing))

    def on_end(self, scores: Mapping[str, Any]) -> None:
        """Images are written with the scores."""

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for name, entry in {**scores["datasets"], "weighted": scores["weighted"], "mean": scores["mean"]}.items():
            for metric, value in entry.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{name}/{metric}", value, trainer.iteration)
        if self._images:
            self._writer.add_image("words", grid(self._images, columns=2), trainer.iteration, dataformats="HWC")
        self._images = []
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()

    on_fit_failed = on_fit_end

    def state_dict(self) -> dict[str, Any]:
        return self._means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state)


class Evaluation(Callback):
    """Evaluate each `interval` iterations and at the end; keep the best weights as `best-<name>.pth`.

    Args:
        start: first iteration that is evaluated.
        observers: what looks at every evaluated batch.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator,
        interval: int,
        folder: Path,
        name: str,
        start: int = 0,
        observers: Sequence[Any] = (),
    ):
        self.evaluator = evaluator
        self.observers = list(observers)
        self.interval = interval
        self.start = start
        self.best_path = folder / f"best-{name}.pth"
        self.best = -math.inf
        self.last_iteration = -1

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.iteration and self._is_due(trainer):  # a kill came between the checkpoint and its evaluation
            self._evaluate(trainer)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if self._is_due(trainer):
            self._evaluate(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.iteration >= trainer.iterations and self.last_iteration != trainer.iteration:
            self._evaluate(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        reached = trainer.iteration % self.interval == 0 and trainer.iteration >= self.start
        return reached and self.last_iteration != trainer.iteration

    def _evaluate(self, trainer: Trainer) -> None:
        trainer.call("on_evaluation_start")
        self.last_iteration = trainer.iteration
        trainer.share_statistics()
        scores = self.evaluator.evaluate(trainer.evaluation_model, self.observers)
        value = scores["weighted"][self.evaluator.headline]
        logger.info("iteration %d\n%s", trainer.iteration, self.evaluator.table(scores))
        if value > self.best:
            self.best = value
            if trainer.process.is_main:
                weights = {"model": trainer.evaluation_model.state_dict(), **trainer.extra_state}
                save_atomically(weights | {"iteration": trainer.iteration, "scores": scores}, self.best_path)
        trainer.call("on_evaluation_end", scores)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last_iteration": self.last_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state.get("best", self.best)
        self.last_iteration = state.get("last_iteration", self.last_iteration)


class Checkpoints(Callback):
    """`<name>_<epoch>_<iteration>.pth` each `interval` iterations, at a stop signal, at the end; the last `keep` stay.

    The epoch in a name is the number of whole epochs done. `checkpoint.yaml` lists them, newest last. Put this callback
    last, so that what it saves is what the others did.
    Where an evaluation falls on the same step, it saves before that, too: an evaluation that fails costs no step.
    """

    def __init__(self, *, folder: Path, name: str, interval: int, keep: int, start: int = 0):
        self.folder = folder
        self.name = name
        self.interval = interval
        self.keep = keep
        self.start = start
        self._saved: int | None = None  # the iteration after which nothing has changed since it was saved

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.process.is_main:
            for left in self.folder.glob(".*.tmp"):  # of a run that was killed while it saved
                left.unlink(missing_ok=True)

    def on_evaluation_start(self, trainer: Trainer) -> None:
        if self._is_due(trainer) or trainer.iteration == trainer.iterations:
            self.save(trainer)

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        self._saved = None

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if self._is_due(trainer) and trainer.iteration != trainer.iterations:  # the last one is saved at the end
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._saved != trainer.iteration:
            self.save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.iteration % self.interval == 0 and trainer.iteration >= self.start

    def save(self, trainer: Trainer) -> None:
        self._saved = trainer.iteration
        state = trainer.state_dict()  # on every process: it gathers
        if not trainer.process.is_main:
            return
        path = self.folder / f"{self.name}_{trainer.epochs_done}_{trainer.iteration}.pth"
        save_atomically(state, path)
        for old in list_as_newest(self.folder, self.name, path.name, keep=self.keep):
            (self.folder / old).unlink(missing_ok=True)


class NotFiniteBatches(Callback):
    """Saves the batch of a skipped step for study, as `not-finite-<iteration>-rank<r>.pth`; the last `keep` stay."""

    def __init__(self, *, folder: Path, keep: int = 3):
        self.folder = folder
        self.keep = keep
        self._saved: list[Path] = []

    def on_step_skipped(self, trainer: Trainer, batch: Any, iteration: int) -> None:
        path = self.folder / f"not-finite-{iteration}-rank{trainer.process.rank}.pth"
        save_atomically({"batch": batch.state_dict(), "iteration": iteration}, path)
        self._saved.append(path)
        if len(self._saved) > self.keep:
            self._saved.pop(0).unlink(missing_ok=True)


class UnreadableSamples(Callback):
    """Names and counts the samples that could not be read, which their batches leave out; `log` takes note of them."""

    def __init__(self, *, log: SkipLog):
        self.log = log

    def on_batch_loaded(self, trainer: Trainer, batch: Any) -> None:
        self.log.update(batch.skipped)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.log.counts:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.log.counts.items())
            logger.warning("left out of training as they could not be read: %s", counts)
