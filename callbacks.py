"""Callbacks: logging, evaluation and checkpoints beside the training loop, one concern each.

`Callback` has all hooks; a callback overrides the few that it needs. Hooks run on every process in the same order, so a
callback that writes checks `trainer.process.is_main` itself.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.checkpoints import iteration_of, save_atomically, saved_checkpoints, write_list
from engine.writers import Record, Scores, Writer
from evaluation.drawing import draw_words, grid
from evaluation.evaluator import Observer, score_table

if TYPE_CHECKING:
    from engine.trainer import Step, Trainer
    from evaluation.evaluator import Evaluator, ScoredWord
    from modules.outputs import RecogniserOutput

logger = logging.getLogger(__name__)


class Callback:
    """Base of all callbacks. Each hook gets the trainer; the ones here do nothing."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step, and after a resume."""

    def on_batch_loaded(self, trainer: Trainer, batch: Any) -> None:
        """Called after a batch came from the loader, before its step."""

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        """Called after step number `trainer.iteration`, counted from 1; see `Step.finite`."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Called after the last step of an epoch; `trainer.epoch` counts it already."""

    def on_evaluation_start(self, trainer: Trainer) -> None:
        """Called before an evaluation, which may take long, or fail."""

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        """Called after an evaluation; `scores` is what `metrics.json` holds."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last step, or after a stop signal."""

    def on_fit_failed(self, trainer: Trainer) -> None:
        """Called after an exception that ends the run, to release what is open."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resume needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the dict is empty if the checkpoint has none."""


class MetricLog(Callback, Observer):
    """Collects losses, speed and scores, and gives them to the writers each `interval` iterations and at the last one.

    A loss is its mean over the steps since the record before, those that are not finite left out. The steps' tensors
    are read only when a record is due, so that no other step waits for a GPU.
    """

    WORDS = 8  # shown of each evaluation

    def __init__(self, *, writers: Sequence[Writer], interval: int):
        self.writers = list(writers)
        self.interval = interval
        self._names: list[str] = []
        self._rows: list[list[float]] = []  # the terms of each step
        self._unread: list[torch.Tensor] = []
        self._images: list[np.ndarray] = []
        self._sums: Counter[str] = Counter()  # of samples, seconds and seconds waited since the record before

    def on_fit_start(self, trainer: Trainer) -> None:
        if not trainer.process.is_main:
            self.writers = []
        for writer in self.writers:
            writer.open(trainer.iteration)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if not self.writers:
            return
        is_due = trainer.iteration % self.interval == 0 or trainer.iteration == trainer.iterations
        if is_due:
            step.wait()
        if list(step.terms) != self._names:  # the first step, or one after a resume with other losses
            self._names, self._rows, self._unread = list(step.terms), [], []
        self._unread.extend(step.terms.values())
        self._sums.update(samples=step.samples, seconds=step.duration, waited=step.data_wait)
        if is_due:
            self._write(trainer, step)

    def _write(self, trainer: Trainer, step: Step) -> None:
        seconds = max(self._sums["seconds"], 1e-9)
        rate = self._sums["samples"] / seconds
        self._read()
        finite = [row for row in self._rows if all(map(math.isfinite, row))] or [[math.nan] * len(self._names)]
        self._rows = []
        means = {
            name: math.fsum(each) / len(finite)
            for name, each in zip(self._names, zip(*finite, strict=True), strict=True)
        }
        record = Record(
            iteration=trainer.iteration,
            iterations=trainer.iterations,
            epoch=trainer.epoch,
            losses=means,
            learning_rate=step.learning_rate,
            gradient_norm=float(step.gradient_norm),
            samples_per_second=rate,
            data_wait_share=self._sums["waited"] / seconds,
            seconds_left=(trainer.iterations - trainer.iteration) * step.samples / max(rate, 1e-9),
        )
        self._sums.clear()
        for writer in self.writers:
            writer.write(record)

    def _read(self) -> None:
        if self._unread:
            self._rows += torch.stack(self._unread).view(-1, len(self._names)).tolist()
            self._unread = []

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, predictions: Sequence[ScoredWord]) -> None:
        if self.writers and output.vision is not None:
            missing = self.WORDS - len(self._images)
            self._images.extend(itertools.islice(draw_words(batch, output, predictions), missing))

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        words = grid(self._images, columns=2) if self._images else None
        self._images = []
        for writer in self.writers:
            writer.write_scores(Scores(trainer.iteration, scores, score_table(scores), words))

    def on_fit_end(self, trainer: Trainer) -> None:
        for writer in self.writers:
            writer.close()

    def on_fit_failed(self, trainer: Trainer) -> None:
        for writer in self.writers:
            writer.close(failed=True)

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"names": list(self._names), "rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._names, self._rows, self._unread = list(state.get("names", [])), list(state.get("rows", [])), []


@dataclass(eq=False, kw_only=True)
class Periodic(Callback):
    """Base of what is done every `interval` iterations, from iteration `start` on, for run `name` in its folder."""

    folder: Path
    name: str
    interval: int
    start: int = 0

    def is_reached(self, trainer: Trainer) -> bool:
        return trainer.iteration % self.interval == 0 and trainer.iteration >= self.start


@dataclass(eq=False, kw_only=True)
class Evaluation(Periodic):
    """Evaluates periodically and after the last iteration, and saves the best weights as `best-<name>.pth`."""

    evaluator: Evaluator
    observers: Sequence[Any] = ()  # they see every evaluated batch
    best: float = field(default=-math.inf, init=False)
    last_iteration: int = field(default=-1, init=False)

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.iteration:  # the run may have been killed between the checkpoint and its evaluation
            if not (self.folder / f"best-{self.name}.pth").exists():  # set aside, or in another run's folder
                self.best = -math.inf
            self._evaluate_if_due(trainer)

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        self._evaluate_if_due(trainer)

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        is_due = self.is_reached(trainer) or trainer.iteration >= trainer.iterations
        if not is_due or self.last_iteration == trainer.iteration:
            return
        trainer.call("on_evaluation_start")
        self.last_iteration = trainer.iteration
        trainer.share_statistics()
        scores = self.evaluator.evaluate(trainer.evaluation_model, self.observers)
        value = scores["weighted"][self.evaluator.headline]
        if value > self.best:
            self.best = value
            if trainer.process.is_main:
                content = trainer.weights() | {"iteration": trainer.iteration, "scores": scores}
                save_atomically(content, self.folder / f"best-{self.name}.pth")
        trainer.call("on_evaluation_end", scores)

    def state_dict(self) -> dict[str, Any]:
        measure = self.evaluator.measure()
        return {"best": self.best, "last_iteration": self.last_iteration, "measure": measure}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("measure", self.evaluator.measure()) == self.evaluator.measure():
            self.best = state.get("best", self.best)
        else:
            logger.warning("what is evaluated has changed: the next evaluation replaces best-%s.pth", self.name)
        self.last_iteration = state.get("last_iteration", self.last_iteration)


@dataclass(eq=False, kw_only=True)
class Checkpoints(Periodic):
    """Saves `<name>_<epoch>_<iteration>.pth` periodically, at a stop signal and at the end.

    The epoch in a name is the number of finished epochs. The last `keep` checkpoints stay, listed in `checkpoint.yaml`.
    Put this callback last, so that a checkpoint holds what the others did. If an evaluation is due at the same step,
    the checkpoint is saved before it: an evaluation that fails costs no step.
    """

    keep: int
    _saved: int | None = field(default=None, init=False)  # the iteration that was saved, if nothing has changed since

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.process.is_main:
            for temporary in self.folder.glob(".*.tmp"):  # of a run that was killed while it saved
                temporary.unlink(missing_ok=True)
            trainer.provenance.write(self.folder / "provenance.json")

    def on_evaluation_start(self, trainer: Trainer) -> None:
        if self.is_reached(trainer) or trainer.iteration == trainer.iterations:
            self.save(trainer)

    def on_evaluation_end(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        self._saved = None

    def on_step_end(self, trainer: Trainer, step: Step) -> None:
        if self.is_reached(trainer) and trainer.iteration != trainer.iterations:  # the last one is saved at the end
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._saved != trainer.iteration:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        self._saved = trainer.iteration
        state = trainer.state_dict()  # on every process: it gathers
        if not trainer.process.is_main:
            return
        save_atomically(state, self.folder / f"{self.name}_{trainer.epochs_done}_{trainer.iteration}.pth")
        saved = saved_checkpoints(self.folder, self.name)
        names = [each for each in saved if iteration_of(each) <= trainer.iteration]
        for old in names[: -self.keep]:
            (self.folder / old).unlink(missing_ok=True)
        write_list(self.folder, names[-self.keep :])
        trainer.provenance.write(self.folder / "provenance.json")


@dataclass(eq=False)
class UnreadableSamples(Callback):
    """Counts the samples that could not be read, which their batches leave out, and names each of them once."""

    dataset: Any  # that the batches come from; `describe(index)` names a sample
    _reasons: dict[int, str] = field(default_factory=dict, init=False)  # by index

    MAX_NAMED = 100  # the others are only counted

    def on_batch_loaded(self, trainer: Trainer, batch: Any) -> None:
        for index, reason in batch.skipped.items():
            if index not in self._reasons and len(self._reasons) < self.MAX_NAMED:
                logger.warning("%s cannot be read (%s) and is skipped", self.dataset.describe(index), reason)
            self._reasons[index] = reason

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._reasons:
            counts = ", ".join(f"{count} {reason}" for reason, count in Counter(self._reasons.values()).items())
            logger.warning("left out of training as they could not be read: %s", counts)
