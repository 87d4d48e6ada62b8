"""The training loop: batches, steps, devices, precision, hooks, resume. It knows nothing about text.

A batch has `inputs()` for the network, `targets()` for the criterion, `to(device)` and `split(parts)` (dataset.py). A
criterion returns named terms and, for batches in parts, `counts` (losses.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from engine import distributed
from engine.averaging import AveragedWeights, running_statistics
from engine.checkpoints import restore_optimizer
from engine.distributed import Process
from engine.optimization import frozen_parts
from engine.precision import channels_last, training_arithmetic
from engine.provenance import Provenance
from utils import UserError, first_line

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # steps in a row that are not finite, or unreadable batches; then the run ends
STOP_CHECK_ITERATIONS = 10  # several processes agree on a stop signal only this often, since that costs a message
LOSS_SCALE = 2.0**10  # initial scale of fp16; torch doubles it every 2,000 finite steps
SECOND_SIGNAL_AFTER = 2.0  # seconds; before that it is the same Ctrl-C, from the terminal and from the launcher


@dataclass
class Step:
    """Results of one optimisation step; the tensors are detached scalars on the device."""

    terms: dict[str, Tensor]  # every loss term, and `total`
    gradient_norm: Tensor  # before clipping
    finite: Tensor  # whether terms and norm are finite; if not, the weights did not change
    learning_rate: float  # of this step, without factors of parameter groups
    samples: int  # of the global batch
    data_wait: float  # seconds that this step waited for its batch
    duration: float  # seconds from the end of the step before, its callbacks left out, to the end of this one

    def wait(self) -> None:
        """Wait for the GPU and count that time as part of this step's duration."""
        device = self.gradient_norm.device
        if device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(device)
            self.duration += time.perf_counter() - started


@dataclass(eq=False, kw_only=True)
class Trainer:
    """Fits a network; everything optional is a callback."""

    model: nn.Module  # on `device`; it stays the plain network, whatever wraps it (data parallelism, compilation)
    criterion: nn.Module  # called `(output, *targets)`, returns named terms and `total`
    optimizer: Optimizer  # fused, so that the scaler can cancel a step on the device
    learning_rate_factor: Callable[[int], float]  # of an iteration, counted from 0
    data: DataLoader  # endless; iterating over it starts at `data.batch_sampler.set_position(epoch, batch)`
    batches_per_epoch: int
    iterations: int  # steps of the whole run
    device: torch.device
    process: Process
    callbacks: Sequence[Any] = ()  # called by name at each hook of `callbacks.Callback`
    precision: str = "fp32"  # or bf16 (autocast), or fp16 (autocast and gradient scaling)
    accumulation: int = 1  # parts of a batch; only batch norms see that they are parts
    clip_grad: float | None = 20.0  # largest gradient norm; None: no clipping
    ema_decay: float | None = None  # of the averaged weights that are evaluated and saved; None: no average
    compile_mode: str | None = None  # of torch.compile; None: not compiled
    # Some get no gradient, as a loss term has weight 0; several processes then look for them at every step.
    find_unused_parameters: bool = False
    extra_state: dict[str, Any] = field(default_factory=dict)  # part of every checkpoint (config, charset)

    def __post_init__(self) -> None:
        self.provenance = Provenance(self.device, self.process.world_size)
        # In every precision it decides whether the optimiser steps; its scale stays 1 unless that is fp16.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=LOSS_SCALE if self.scales_loss else 1.0)
        self.ema = AveragedWeights(self.model, decay=self.ema_decay) if self.ema_decay else None
        self.iteration = 0  # steps done
        self.epoch = 0
        self.batch_in_epoch = 0  # batches of this epoch done
        self.stop_signal: signal.Signals | None = None  # that ended the run, or will end it after this step
        self._empty_in_a_row = 0
        self._signalled_at = -math.inf
        self._skipped_in_a_row = 0
        self._waiting: tuple[Step, Any, int, Tensor, Any] | None = None  # to be checked
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._statistics = running_statistics(self.model)
        self._frozen = frozen_parts(self.model)
        unused = self.find_unused_parameters
        self._network = distributed.parallel(self.model, self.device, find_unused_parameters=unused)
        self._compiled = None if self.compile_mode is None else torch.compile(self._network, mode=self.compile_mode)

    @property
    def epochs_done(self) -> int:
        """Return the number of finished epochs; `epoch` counts one only after the hooks of its last step."""
        return self.epoch + self.batch_in_epoch // self.batches_per_epoch

    @property
    def scales_loss(self) -> bool:
        """Return whether the loss is scaled, as the small gradients of fp16 require."""
        return self.precision == "fp16"

    @property
    def evaluation_model(self) -> nn.Module:
        """Return the network to evaluate and save: the averaged one if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def fit(self) -> None:
        """Train from the current position to the last iteration, a stop signal or a failure."""
        with self._stop_signals():
            self.call("on_fit_start")
            try:
                if self.iteration < self.iterations:
                    self._run()
                self._check_waiting()
            except BaseException as error:
                self.call("on_fit_failed")
                if self.data.num_workers and is_dead_worker(error):
                    remedy = "free memory or lower dataset.num_workers, then continue with --resume"
                    raise UserError(f"a loader worker died ({first_line(error)}); {remedy}") from error
                raise
            if self.stop_signal:
                name = self.stop_signal.name
                logger.info("stopped by %s after iteration %d; continue with --resume", name, self.iteration)
            self.call("on_fit_end")

    def _run(self) -> None:
        """Make steps until the last iteration or a stop signal."""
        for batch, waited in self._batches():
            self.call("on_batch_loaded", batch)
            if len(batch) < (self.accumulation if distributed.is_distributed() else 1):
                self._pass_over(batch)
            else:
                self._advance(batch, waited)
            if self.iteration >= self.iterations or self._should_stop():
                break

    # --- one step ----------------------------------------------------------------------------------------------------

    def _advance(self, batch: Any, waited: float) -> None:
        """Make one step and count it."""
        started = time.perf_counter()
        step = self.train_step(batch, waited)
        self._empty_in_a_row = 0
        self.iteration += 1
        self.provenance.samples += step.samples
        self.batch_in_epoch += 1
        self._check(step, batch)  # on a GPU this waits for the step before
        step.duration = waited + time.perf_counter() - started
        self.call("on_step_end", step)
        self._count_epoch()

    def _pass_over(self, batch: Any) -> None:
        """Leave out a batch of which nothing could be read; with several processes, which share every step, fail."""
        self._empty_in_a_row += 1
        if distributed.is_distributed() or self._empty_in_a_row >= MAX_SKIPPED:
            raise UserError(
                f"only {len(batch)} samples of a batch could be read after iteration {self.iteration} (named above); "
                "check the data with tools/check_lmdb.py, or raise dataset.train.batch_size"
            )
        logger.warning("a batch after iteration %d is left out: nothing of it could be read", self.iteration)
        self.batch_in_epoch += 1
        self._count_epoch()

    def _count_epoch(self) -> None:
        if self.batch_in_epoch == self.batches_per_epoch:
            self.epoch, self.batch_in_epoch = self.epoch + 1, 0
            self.call("on_epoch_end")

    def train_step(self, batch: Any, waited: float = 0.0) -> Step:
        """Run forward, backward and update; the device skips the update if anything is not finite.

        Args:
            batch: of words, spellings or segmentation samples; on any device.
            waited: seconds for which the batch was waited for.
        """
        self.model.train()
        for part in self._frozen:
            part.eval()
        rate = self._set_learning_rate()
        statistics = distributed.flattened(self._statistics) if self._statistics else None
        terms = self._forward_backward(batch.to(self.device))
        scale = self.scaler.scale(torch.ones((), device=self.device))
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True) / scale
        finite = torch.isfinite(torch.stack([*terms.values(), norm])).all()
        self._update(norm, finite)
        if statistics is not None:  # a bad batch spoils the running statistics as well
            kept = torch.where(finite, distributed.flattened(self._statistics), statistics)
            distributed.put_back(kept, self._statistics)
        if self.ema is not None:
            self.ema.update(self.model)
        samples = len(batch) * self.process.world_size
        return Step(terms, norm.detach(), finite, rate, samples, data_wait=waited, duration=0.0)

    def _forward_backward(self, batch: Any) -> dict[str, Tensor]:
        """Accumulate the gradients of the batch's parts and return the loss terms of the global batch."""
        parts = batch.split(self.accumulation)
        # A batch with skipped samples has another size, for which the network would be compiled anew, for minutes.
        network = self._network if self._compiled is None or getattr(batch, "skipped", None) else self._compiled
        whole = self._whole_counts(parts, network) if len(parts) > 1 else None
        collected: list[dict[str, Tensor]] = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            sync = contextlib.nullcontext() if last or not distributed.is_distributed() else self._network.no_sync()
            with sync:
                with training_arithmetic(self.device, self.precision):
                    output = network(*map(channels_last, part.inputs()))
                    terms = self.criterion(output, *part.targets(), whole=whole)
                self.scaler.scale(terms["total"]).backward()
            collected.append({name: term.detach() for name, term in terms.items()})
        return distributed.summed(collected, distributed.average)

    @torch.no_grad()
    def _whole_counts(self, parts: Sequence[Any], network: Callable) -> dict[str, Tensor]:
        """Return the divisors of the criterion's means, over all parts and processes, before any gradient.

        If the criterion counts pixels of the output, each part takes an additional forward pass, which changes neither
        random states nor batch norms.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers] if self.criterion.counts_outputs else []
        counts = []
        with torch.random.fork_rng(devices), training_arithmetic(self.device, self.precision):
            for part in parts:
                output = network(*map(channels_last, part.inputs())) if self.criterion.counts_outputs else None
                counts.append(self.criterion.counts(output, *part.targets()))
        if before:
            torch._foreach_copy_(buffers, before)
        return distributed.summed(counts)

    def _update(self, norm: Tensor, finite: Tensor) -> None:
        """Clip and step the optimiser if loss and gradient norm are finite; the decision stays on the device.

        If not, clipping makes the gradients NaN, and the scaler then leaves weights and optimiser as they are.
        """
        clipped_by = torch.where(finite, norm, math.nan)
        nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad or math.inf, clipped_by, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scales_loss else 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def _set_learning_rate(self) -> float:
        factor = self.learning_rate_factor(self.iteration)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return self.optimizer.defaults["lr"] * factor

    def share_statistics(self) -> None:
        """Average the running statistics of the processes, so that all evaluate and save the same network."""
        distributed.average_buffers(self._statistics)
        if self.ema is not None:
            distributed.average_buffers(running_statistics(self.ema.module))

    # --- batches -----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Yield batches from the current position on, each with the seconds that it was waited for."""
        self.data.batch_sampler.set_position(self.epoch, self.batch_in_epoch)
        iterator = iter(self.data)
        # The loader would raise a worker's death in the middle of a step; its queue notices within seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            started = time.perf_counter()
            batch = next(iterator)
            yield batch, time.perf_counter() - started

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _should_stop(self) -> bool:
        if not distributed.is_distributed():
            return self.stop_signal is not None
        if self.iteration % STOP_CHECK_ITERATIONS:
            return False
        number = max(distributed.gather([int(self.stop_signal or 0)]))
        if number:
            self.stop_signal = signal.Signals(number)
        return bool(number)

    @contextlib.contextmanager
    def _stop_signals(self):
        """End the run after the current step at SIGTERM, Ctrl-C or SIGUSR1; at a second, later Ctrl-C at once.

        Schedulers send SIGUSR1 before the time of a job is over.
        """

        def remember(number, frame):
            now = time.monotonic()
            if self.stop_signal is None:
                self._signalled_at = now
            elif number == signal.SIGINT and now > self._signalled_at + SECOND_SIGNAL_AFTER:
                raise KeyboardInterrupt
            self.stop_signal = signal.Signals(number)

        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = [signal.signal(number, remember) for number in handled]
        try:
            yield
        finally:
            for number, handler in zip(handled, before, strict=True):
                signal.signal(number, handler)

    # --- steps that are not finite -----------------------------------------------------------------------------------

    def _check(self, step: Step, batch: Any) -> None:
        """Report a step that was not finite: on a CPU this one, on a GPU the one before it, so as not to wait."""
        self._check_waiting()
        flag, copied = step.finite, None
        if flag.device.type == "cuda":
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting = (step, batch, self.iteration, flag, copied)
        if copied is None:
            self._check_waiting()

    def _check_waiting(self) -> None:
        """Report the step that waits for its check, if any."""
        if self._waiting is None:
            return
        (step, batch, iteration, flag, copied), self._waiting = self._waiting, None
        if copied is not None:
            copied.synchronize()
        self._skipped_in_a_row = 0 if bool(flag) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row:
            self._report_skipped(step, batch, iteration)

    def _report_skipped(self, step: Step, batch: Any, iteration: int) -> None:
        names = [name for name, term in step.terms.items() if not bool(torch.isfinite(term))]
        in_a_row, is_last = self._skipped_in_a_row, self._skipped_in_a_row >= MAX_SKIPPED
        if self.scales_loss and not names and not is_last:
            # Normal in fp16: the scale grows until it is too large, and is halved then.
            logger.info("iteration %d skipped: the scaled gradient is out of fp16's range", iteration)
            return
        what, samples = ", ".join(names or ["gradient"]), batch.indices.tolist()
        message = "iteration %d skipped: %s not finite, %d in a row; samples %s"
        logger.warning(message, iteration, what, in_a_row, samples)
        if is_last:
            raise UserError(
                f"{in_a_row} steps in a row were not finite ({what}; samples {samples[:8]}...); "
                "lower optimizer.lr, or use training.precision=fp32"
            )

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs; `model` are the weights to evaluate. Every process must call it."""
        self._check_waiting()
        self.share_statistics()
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        training = {
            "iteration": self.iteration,
            "epoch": self.epoch,
            "batch_in_epoch": self.batch_in_epoch,
            "batches_per_epoch": self.batches_per_epoch,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scales_loss else {},
            "skipped_in_a_row": self._skipped_in_a_row,
            "random": distributed.gather([random]),
            "callbacks": {type(each).__name__: each.state_dict() for each in self.callbacks},
        }
        if self.ema is not None:
            training |= {"model": self.model.state_dict(), "ema_steps": self.ema.steps}
        return self.weights() | {"training": training}

    def weights(self) -> dict[str, Any]:
        """Return the weights to evaluate, as `model`, with what belongs to them: `extra_state` and `provenance`."""
        provenance = {"provenance": self.provenance.state_dict()}
        return {"model": self.evaluation_model.state_dict(), **self.extra_state, **provenance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            UserError: the run had more or fewer training data.
            KeyError, RuntimeError, ValueError: the run had another network or optimiser.
        """
        training = state["training"]
        if (batches := training["batches_per_epoch"]) != self.batches_per_epoch:
            raise UserError(
                f"dataset.train.roots: an epoch of the run to resume has {batches} batches, not "
                f"{self.batches_per_epoch}; resume with the same data, or start from its weights with --checkpoint"
            )
        self.model.load_state_dict(training.get("model", state["model"]))
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model"])
            self.ema.steps = training.get("ema_steps", 0)  # none, if that run had no average
        restore_optimizer(self.optimizer, training["optimizer"])
        if training["scaler"] and self.scales_loss:  # empty unless that run had fp16
            self.scaler.load_state_dict(training["scaler"])
        self._skipped_in_a_row = training["skipped_in_a_row"]
        self.iteration = training["iteration"]
        # A checkpoint of the last step of an epoch was taken before that epoch was counted.
        finished, self.batch_in_epoch = divmod(training["batch_in_epoch"], self.batches_per_epoch)
        self.epoch = training["epoch"] + finished
        self.provenance.resume(state.get("provenance", {}), self.iteration)
        for callback in self.callbacks:
            callback.load_state_dict(training["callbacks"].get(type(callback).__name__, {}))
        before, now = len(training["random"]), self.process.world_size
        if before != now:
            logger.warning("resumed with %d processes after %d: dropout draws other numbers than before", now, before)
            return
        random = training["random"][self.process.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def call(self, hook: str, *arguments: Any) -> None:
        """Run one hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)


def is_dead_worker(error: BaseException) -> bool:
    """Return whether one of the loader's processes is gone; an exception inside one is another matter."""
    if isinstance(error, EOFError | ConnectionError):  # it was killed before it had handed over its batch
        return "DataLoader worker process" not in str(error)
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
