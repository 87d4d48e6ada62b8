"""The training loop: batches, steps, devices, precision, hooks, resume. It knows nothing about text.

A batch offers `inputs()` for the network, `targets()` for the criterion, `to(device)` and `split(parts)`; all else is
the data set's business (dataset.py). A criterion gives named terms and, for batches in parts, `counts` (losses.py).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from engine import distributed
from engine.distributed import Process
from engine.optimization import frozen_parts
from engine.precision import channels_last, prefers_channels_last, sum_few_channels, training_arithmetic
from utils import UserError, first_line

logger = logging.getLogger(__name__)

RUNNING_STATISTICS = {"running_mean", "running_var"}
STOP_CHECK_ITERATIONS = 10  # with several processes they agree on a stop signal this often, as agreeing costs a message
LOSS_SCALE = 2.0**10  # of fp16 at the start; torch doubles it every 2,000 good steps
WORKER_RESTARTS = 3  # a loader worker that dies (out of memory, killed) is replaced this many times in a run
# torch 2.13 renamed it and warns of the older name.
BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
SECOND_SIGNAL_AFTER = 2.0  # seconds; sooner it is the same Ctrl-C, from the terminal and from the launcher


class Hooks(Protocol):
    """What the loop asks of a callback, beside the hooks that it calls by name (`callbacks.Callback` has them all)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Step:
    """What one optimisation step left behind; the tensors are detached scalars on the device."""

    terms: dict[str, Tensor]  # every loss term, and `total`
    gradient_norm: Tensor  # before clipping
    finite: Tensor  # whether all of them were; if not, the weights did not change
    learning_rate: float  # of this step, of the first parameter group
    samples: int  # of the global batch
    data_wait: float  # seconds that this step waited for its batch
    duration: float  # seconds from the end of the step before, its callbacks left out, to the end of this one

    def wait(self) -> None:
        """Wait until a GPU has done all that was asked of it; what that takes belongs to this step's duration."""
        device = self.gradient_norm.device
        if device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(device)
            self.duration += time.perf_counter() - started


class Trainer:
    """Fits a network; everything optional is a callback.

    Args:
        model: on `device`; the trainer wraps it (data parallelism, compilation), `self.model` stays the plain network.
        criterion: called `(output, *targets)`, gives named terms and `total`.
        optimizer: a fused one, whose step the scaler can call off on the device.
        learning_rate_factor: iteration (from 0) -> factor of the configured learning rate.
        data: endless batches; iterating over it starts at `data.batch_sampler.set_position(epoch, batch)`.
        batches_per_epoch: batches until the epoch counts one more.
        iterations: steps of the whole run.
        precision: fp32, bf16 (autocast) or fp16 (autocast and gradient scaling).
        accumulation: parts that a batch is worked through in; their terms and gradients add up to those of the whole
            batch. What batch norms normalise with in training is each part's own.
        clip_grad: largest gradient norm; None leaves it.
        ema_decay: decay of the averaged weights that are evaluated and saved; None for none.
        compile_mode: of torch.compile; None leaves the network as it is. A batch of which a sample could not be read
            goes through the plain network.
        find_unused_parameters: some parameters may get no gradient (a loss term has weight 0); several processes then
            look for them at every step.
        max_skipped_steps: steps in a row that are not finite, or batches of which nothing could be read, that stop the
            run.
        extra_state: values that every checkpoint carries (config, charset).
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: Optimizer,
        learning_rate_factor: Callable[[int], float],
        data: DataLoader,
        batches_per_epoch: int,
        iterations: int,
        device: torch.device,
        process: Process,
        callbacks: Sequence[Hooks] = (),
        precision: str = "fp32",
        accumulation: int = 1,
        clip_grad: float | None = 20.0,
        ema_decay: float | None = None,
        compile_mode: str | None = None,
        find_unused_parameters: bool = False,
        max_skipped_steps: int = 10,
        extra_state: dict[str, Any] | None = None,
    ):
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.learning_rate_factor = learning_rate_factor
        self.data = data
        self.batches_per_epoch = batches_per_epoch
        self.iterations = iterations
        self.device = device
        self.process = process
        self.callbacks = list(callbacks)
        self.precision = precision
        self.accumulation = accumulation
        self.clip_grad = clip_grad
        self.max_skipped_steps = max_skipped_steps
        self.extra_state = extra_state or {}
        # It decides for every precision whether the optimiser steps; without fp16 its scale stays 1.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE if self.scales_loss else 1.0)
        self.ema = AveragedWeights(model, decay=ema_decay) if ema_decay else None
        self.iteration = 0  # steps done
        self.epoch = 0
        self.batch_in_epoch = 0  # batches of this epoch done
        self.stop_signal: signal.Signals | None = None  # that ended the run, or is about to
        self._empty_in_a_row = 0
        self._signalled_at = -math.inf
        self._watch = FiniteWatch(max_in_a_row=max_skipped_steps, on_failure=self._report_not_finite)
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._statistics = running_statistics(model)
        self._frozen = frozen_parts(model)
        self._network = self._wrap(find_unused_parameters)
        self._compiled = None if compile_mode is None else torch.compile(self._network, mode=compile_mode)

    @property
    def epochs_done(self) -> int:
        """Whole epochs so far; `epoch` counts the last one only after the hooks of its last step."""
        return self.epoch + self.batch_in_epoch // self.batches_per_epoch

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, as the small gradients of fp16 need it."""
        return self.precision == "fp16"

    @property
    def evaluation_model(self) -> nn.Module:
        """The network to evaluate and save: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def fit(self) -> None:
        """Train from the current position to the last iteration, a stop signal or a failure."""
        with self._stop_signals():
            self.call("on_fit_start")
            try:
                if self.iteration < self.iterations:
                    self._run()
                self._watch.flush()
            except BaseException as error:
                self.call("on_fit_failed")
                if is_dead_worker(error):
                    raise UserError(f"a loader worker died in an evaluation ({first_line(error)}); --resume") from error
                raise
            if self.stop_signal:
                logger.info(
                    "stopped by %s after iteration %d; go on with --resume", self.stop_signal.name, self.iteration
                )
            self.call("on_fit_end")

    def _run(self) -> None:
        """Steps until the last iteration or a stop signal."""
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
        """One step and its place in the run."""
        started = time.perf_counter()
        step = self._step(batch, waited)
        self._empty_in_a_row = 0
        self.iteration += 1
        self.batch_in_epoch += 1
        self._watch.check(step, batch, self.iteration)  # which waits for the step before
        step.duration = waited + time.perf_counter() - started
        self.call("on_step_end", step)
        self._count_epoch()

    def _count_epoch(self) -> None:
        if self.batch_in_epoch == self.batches_per_epoch:
            self.epoch, self.batch_in_epoch = self.epoch + 1, 0
            self.call("on_epoch_end")

    def _pass_over(self, batch: Any) -> None:
        """Leave out a batch of which nothing could be read; several processes would wait for each other's share."""
        self._empty_in_a_row += 1
        if distributed.is_distributed() or self._empty_in_a_row >= self.max_skipped_steps:
            raise UserError(
                f"only {len(batch)} samples of a batch could be read after iteration {self.iteration} (named above); "
                "check the data with tools/check_lmdb.py, or raise dataset.train.batch_size"
            )
        logger.warning("a batch after iteration %d is left out: nothing of it could be read", self.iteration)
        self.batch_in_epoch += 1
        self._count_epoch()

    def _step(self, batch: Any, waited: float) -> Step:
        """Forward, backward and update; the update is left out on the device where anything is not finite."""
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
        """Accumulate the gradients of the batch's parts; returns the loss terms of the global batch."""
        parts = batch.split(self.accumulation)
        network = self._network_for(batch)
        whole = self._whole_counts(parts, network) if len(parts) > 1 else None
        collected: list[dict[str, Tensor]] = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            sync = contextlib.nullcontext() if last or not distributed.is_distributed() else self._network.no_sync()
            with sync:
                with training_arithmetic(self.device, self.precision):
                    output = network(*self._inputs(part))
                    terms = self.criterion(output, *part.targets(), whole=whole)
                self.scaler.scale(terms["total"]).backward()
            collected.append({name: term.detach() for name, term in terms.items()})
        names = list(collected[0])
        stacked = torch.stack([torch.stack([terms[name].float() for name in names]) for terms in collected]).sum(0)
        return dict(zip(names, distributed.average(stacked).unbind(), strict=True))

    @torch.no_grad()
    def _whole_counts(self, parts: Sequence[Any], network: Callable) -> dict[str, Tensor]:
        """What the criterion's means are divided by, over all parts and processes, before the first part's gradient.

        Where pixels of the output are counted, each part goes through the network once more. That draws no number of
        the steps' and leaves no trace in the batch norms.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers] if self.criterion.counts_outputs else []
        counts = []
        with torch.random.fork_rng(devices), training_arithmetic(self.device, self.precision):
            for part in parts:
                output = network(*self._inputs(part)) if self.criterion.counts_outputs else None
                counts.append(self.criterion.counts(output, *part.targets()))
        if before:
            torch._foreach_copy_(buffers, before)
        return distributed.summed_counts(counts)

    def _update(self, norm: Tensor, finite: Tensor) -> None:
        """Clip and step the optimiser where loss and gradient norm are finite; the decision stays on the device.

        Else clipping makes the gradients NaN, for which the scaler leaves weights and state of the optimiser alone.
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
        return self.optimizer.param_groups[0]["lr"]

    def _wrap(self, find_unused_parameters: bool) -> nn.Module:
        """The network, in parallel with those of other processes where there are some."""
        network: Any = self.model
        if self.device.type == "cpu":
            sum_few_channels(network)
        if distributed.is_distributed():
            devices = [self.device] if self.device.type == "cuda" else None
            # A 1x1 kernel's gradient may have other strides than its weight, of the same order in memory.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # Running statistics take no part in training; `share_statistics` makes them equal where they matter.
            network = DistributedDataParallel(
                network,
                device_ids=devices,
                find_unused_parameters=find_unused_parameters,
                gradient_as_bucket_view=True,
                **{BUFFER_SYNC: False},
            )
        return network

    def _network_for(self, batch: Any) -> Callable:
        """The compiled network for a batch of which all could be read, the plain one for another.

        A batch of another size would be compiled anew, for minutes, in the middle of an epoch.
        """
        return self._network if self._compiled is None or getattr(batch, "skipped", None) else self._compiled

    def _inputs(self, part: Any) -> Iterable[Tensor | None]:
        """What the network takes, in the memory format that its convolutions are fastest in."""
        laid_out = prefers_channels_last(self.device, self.precision)
        return map(channels_last, part.inputs()) if laid_out else part.inputs()

    def share_statistics(self) -> None:
        """Average what the processes' batch norms remember, before the network is evaluated or saved.

        Each saw its own part of every batch; all must read alike, and go on alike after a resume.
        """
        distributed.average_buffers(self._statistics)
        if self.ema is not None:
            distributed.average_buffers(running_statistics(self.ema.module))

    # --- batches -----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Batches from the current position on, each with the seconds that it was waited for."""
        restarts = 0
        while True:
            self.data.batch_sampler.set_position(self.epoch, self.batch_in_epoch)
            try:
                iterator = iter(self.data)
                # The loader would raise a worker's death in the middle of a step; its queue notices within seconds.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                while True:
                    started = time.perf_counter()
                    batch = next(iterator)
                    yield batch, time.perf_counter() - started
            except RuntimeError as error:
                if not is_dead_worker(error):
                    raise
                restarts += 1
                if restarts > WORKER_RESTARTS:
                    raise UserError(
                        f"loader workers died {restarts} times ({first_line(error)}); "
                        "free memory or lower dataset.num_workers, then --resume"
                    ) from error
                logger.warning("a loader worker died; going on from iteration %d with new ones", self.iteration)

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _should_stop(self) -> bool:
        if not distributed.is_distributed():
            return self.stop_signal is not None
        if self.iteration % STOP_CHECK_ITERATIONS:
            return False
        number = distributed.largest(self.stop_signal or 0)
        if number:
            self.stop_signal = signal.Signals(number)
        return bool(number)

    @contextlib.contextmanager
    def _stop_signals(self):
        """SIGTERM, Ctrl-C and SIGUSR1 end the run after the current step; a second, later Ctrl-C ends it at once.

        SIGUSR1 is what a scheduler gives notice with, before the time of a job is over.
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

    def _report_not_finite(self, step: Step, batch: Any, iteration: int, in_a_row: int) -> None:
        finite_terms = all(bool(torch.isfinite(term)) for term in step.terms.values())
        if self.scales_loss and finite_terms and in_a_row < self.max_skipped_steps:
            # A part of fp16: the scale grows until it is too large, and is halved then.
            logger.info("iteration %d skipped: scaled gradient over the range of fp16", iteration)
            return
        names = [name for name, term in step.terms.items() if not bool(torch.isfinite(term))] or ["gradient"]
        words = batch.indices.tolist()
        logger.warning(
            "iteration %d skipped: %s not finite, %d in a row; words %s", iteration, ", ".join(names), in_a_row, words
        )
        self.call("on_step_skipped", batch, iteration)
        if in_a_row >= self.max_skipped_steps:
            raise UserError(
                f"{in_a_row} steps in a row were not finite ({', '.join(names)}; words {words[:8]}...); the batch is "
                "saved in the work folder. Lower optimizer.lr, or use training.precision=fp32"
            )

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs; `model` are the weights to read with. Every process must call it."""
        self._watch.flush()
        self.share_statistics()
        training = {
            "iteration": self.iteration,
            "epoch": self.epoch,
            "batch_in_epoch": self.batch_in_epoch,
            "batches_per_epoch": self.batches_per_epoch,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scales_loss else {},
            "skipped_in_a_row": self._watch.in_a_row,
            "random": distributed.gather([self._random_state()]),
            "callbacks": {type(each).__name__: each.state_dict() for each in self.callbacks},
        }
        if self.ema is not None:
            training |= {"model": self.model.state_dict(), "ema_steps": self.ema.steps}
        return {"model": self.evaluation_model.state_dict(), "training": training, **self.extra_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            UserError: it was taken with more or fewer training data.
            KeyError, RuntimeError, ValueError: it was taken of another network or optimiser.
        """
        training = state["training"]
        if (batches := training.get("batches_per_epoch", self.batches_per_epoch)) != self.batches_per_epoch:
            raise UserError(
                f"dataset.train.roots: an epoch of the run to resume has {batches} batches, not "
                f"{self.batches_per_epoch}; resume with the same data, or start from its weights with --checkpoint"
            )
        self.model.load_state_dict(training.get("model", state["model"]))
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model"])
            if "ema_steps" in training:
                self.ema.steps = int(training["ema_steps"])
        self._load_optimizer(training["optimizer"])
        if training["scaler"] and self.scales_loss:  # empty unless that run had fp16
            self.scaler.load_state_dict(training["scaler"])
        self._watch.in_a_row = training.get("skipped_in_a_row", 0)
        self.iteration = training["iteration"]
        # A checkpoint after the last step of an epoch was taken before that epoch was counted.
        finished, self.batch_in_epoch = divmod(training["batch_in_epoch"], self.batches_per_epoch)
        self.epoch = training["epoch"] + finished
        for callback in self.callbacks:
            callback.load_state_dict(training["callbacks"].get(type(callback).__name__, {}))
        if len(training["random"]) == self.process.world_size:
            self._set_random_state(training["random"][self.process.rank])
        else:
            logger.warning(
                "resumed with %d processes after %d: dropout draws other numbers than it would have",
                self.process.world_size,
                len(training["random"]),
            )

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Momenta and steps of a checkpoint; rate, decay and the like stay those of the config."""
        both = state["param_groups"], self.optimizer.param_groups
        taken, own = ({"betas", "momentum"} & groups[0].keys() for groups in both)
        if taken != own:
            raise ValueError("it holds the state of another optimizer.type")
        if len(both[0]) == 1 < len(both[1]):  # of a version that put all in one group where nothing decayed
            state = self._in_our_groups(state)
        entries = [value for entry in state["state"].values() for value in entry.values()]
        if not all(value is None or isinstance(value, Tensor | int | float) for value in entries):
            raise ValueError("the state of the optimizer is damaged")  # torch would walk through whatever it holds
        settings = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, configured in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(configured)
            names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in group else {"momentum_buffer"}
            for parameter in group["params"]:
                momenta = {k: v for k, v in self.optimizer.state.get(parameter, {}).items() if v is not None}
                shapes = {name: each.shape for name, each in momenta.items() if name != "step" or each.numel() != 1}
                if momenta and shapes != dict.fromkeys(names - {"step"}, parameter.shape):
                    raise ValueError("the state of the optimizer is damaged")

    def _in_our_groups(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state whose only group has the parameters in the network's order."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        places = {id(parameter): place for place, parameter in enumerate(learning)}
        entries = {
            ours: state["state"][places[id(parameter)]]
            for ours, parameter in enumerate(self._parameters)
            if places[id(parameter)] in state["state"]
        }
        return {"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]}

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def call(self, hook: str, *arguments: Any) -> None:
        """Run one hook of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)


class AveragedWeights:
    """Exponential moving average of a network's weights and buffers; whole numbers among them are copied.

    The decay of update n, from 0, is min(decay, (1 + n) / (10 + n)), so that the average forgets the first weights in a
    short run, too.

    It counts its steps on the host: torch's `AveragedModel` brings a counter to the device, which stalls a GPU.

    Attributes:
        module: the averaged network.
        steps: updates so far.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network as it is now."""
        ours, theirs = _numbers_and_counts(self.module), _numbers_and_counts(network)
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(ours[0], theirs[0], 1 - decay)
        if ours[1]:
            torch._foreach_copy_(ours[1], theirs[1])
        self.steps += 1


def _numbers_and_counts(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """A network's parameters and buffers: those of fractions, and those of whole numbers."""
    tensors = [*network.parameters(), *network.buffers()]
    numbers = [each for each in tensors if each.is_floating_point()]
    return numbers, [each for each in tensors if not each.is_floating_point()]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of a network's batch norms."""
    return [buffer for name, buffer in network.named_buffers() if name.split(".")[-1] in RUNNING_STATISTICS]


def is_dead_worker(error: BaseException) -> bool:
    """Whether the loader says that one of its processes is gone; an exception inside one is another matter."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


class FiniteWatch:
    """Notices steps that were not finite without stalling the device.

    On a GPU the flag of a step is copied in the background and read after the next step; on a CPU it is read at once.
    """

    def __init__(self, *, max_in_a_row: int, on_failure: Callable[[Step, Any, int, int], None]):
        self.max_in_a_row = max_in_a_row
        self.on_failure = on_failure
        self.in_a_row = 0
        self._waiting: tuple[Step, Any, int, Tensor, Any] | None = None

    def check(self, step: Step, batch: Any, iteration: int) -> None:
        """Take in a step; report it now (CPU) or the one before it (GPU)."""
        self.flush()
        if step.finite.device.type == "cuda":
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(step.finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting = (step, batch, iteration, flag, event)
        else:
            self._judge(step, batch, iteration, step.finite)

    def flush(self) -> None:
        """Report the step that is still waiting, if any."""
        if self._waiting is not None:
            step, batch, iteration, flag, event = self._waiting
            self._waiting = None
            event.synchronize()
            self._judge(step, batch, iteration, flag)

    def _judge(self, step: Step, batch: Any, iteration: int, flag: Tensor) -> None:
        if bool(flag):
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.on_failure(step, batch, iteration, self.in_a_row)
