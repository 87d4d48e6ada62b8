"""Check the GPU path on this machine: tests, losses in every precision, exact resume and speed, in one table.

It takes less than eight minutes on one GPU and renders its own data. The parts that need a C compiler come last.
Without a GPU, the parts that need one are listed as left out, and the others use the small network.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import torch
import torchvision
from torch.utils.benchmark import timer

from builders import with_checkpoint
from config import Config, load_config
from engine.distributed import pick_device
from engine.precision import PRECISIONS, choose_algorithms, use_tf32
from engine.trainer import Trainer
from evaluation.tables import markdown_table
from tools import benchmark, render_words
from tools.support import make_parser, positive, usable_cores
from utils import run_command_line, write_atomically

EXAMPLE = """  python tools/gpu_check.py
  python tools/gpu_check.py --seconds 1800 --output gpu-check.md"""

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"small": "small", "full size": "train", "small SSN": "small_ssn", "SSN": "train_ssn"}
TOLERANCE = 0.02  # of the mean loss of the last steps, against fp32's
LAST_STEPS = 10
KEPT_BATCHES = 8  # training repeats these, so that loading does not count
RUN_TESTS = {
    "two equal runs": "test_deterministic_runs_are_equal",
    "kill and resume": "test_a_deterministic_run_killed_and_resumed_equals_uninterrupted",
}


@dataclass(frozen=True)
class Scale:
    """How much of each part is done."""

    words: int  # rendered
    small_steps: int
    full_steps: int
    training_batch: int
    reading_batch: int
    mask_words: int


ON_GPU = Scale(2048, 200, 50, 96, 256, 64)
ON_CPU = Scale(48, 12, 0, 8, 16, 4)

Result = tuple[str, str]  # what a part found, and its verdict: ok, failed, measured or left out
Row = tuple[str, str, str, str]  # of the table: part, form, result, verdict


class LeftOutError(Exception):
    """A part cannot be done here; the message says what it needs."""


@dataclass
class GpuCheck:
    """Runs the parts one after another; a part that fails does not stop the others.

    `losses` holds those of each network in each form, `flops` those of a word in a training step of each network.
    """

    device: torch.device
    scale: Scale
    folder: Path
    deadline: float  # of time.monotonic()
    rows: list[Row] = field(default_factory=list)
    losses: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {"small": {}, "full size": {}})
    flops: dict[str, float] = field(default_factory=dict)

    def run(self) -> list[Row]:
        """Run all parts, those that need no compiler first."""
        words = ["--output", str(self.folder), "--name", "made", "--count", str(self.scale.words)]
        with contextlib.redirect_stdout(sys.stderr):
            render_words.main([*words, "--config", str(ROOT / "configs" / "render.yaml"), "--workers", "1"])
        self.part("tests that need a GPU", "pytest -m gpu", self.tests, "-m", "gpu", gpu=True)
        for form in PRECISIONS:
            self.part("small network", form, self.training, "small", form, gpu=form == "fp16")
        for form in PRECISIONS:
            self.part("full size", form, self.training, "full size", form, gpu=True)
        for name, test in RUN_TESTS.items():
            self.part(name, "deterministic", self.tests, f"tests/test_resume.py::{test}")
        large, ssn = ("full size", "SSN") if self.device.type == "cuda" else ("small", "small SSN")
        self.part("masks", ssn, self.speed, "masks", ssn, "bf16")
        for workers in dict.fromkeys((1, max(1, min(usable_cores() - 1, 16)))):
            settings = f"dataset.num_workers={workers}", "dataset.data_aug=true"
            self.part("loading", f"workers: {workers}", self.speed, "loading", "small", "bf16", *settings)
        for form in ("fp32", "bf16"):
            self.part("reading", form, self.speed, "reading", large, form)
        # The rest needs a compiler.
        self.part("small network", "bf16, compiled", self.training, "small", "bf16", "default", gpu=True)
        self.part("reading", "bf16, compiled", self.speed, "reading", large, "bf16", gpu=True, compiled=True)
        for mode in ("default", "reduce-overhead"):
            self.part("full size", f"bf16, compiled, {mode}", self.training, "full size", "bf16", mode, gpu=True)
        return self.rows

    def part(
        self, name: str, form: str, work: Callable[..., Result], *arguments: str, gpu: bool = False, **named: bool
    ) -> None:
        """Do one part, which may need a GPU, and add its line."""
        print(f"{name}, {form} ...", file=sys.stderr, flush=True)
        try:
            if gpu and self.device.type != "cuda":
                raise LeftOutError("needs a GPU")
            if time.monotonic() > self.deadline:
                raise LeftOutError("no time was left; give more --seconds")
            result, verdict = work(*arguments, **named)
        except LeftOutError as reason:
            result, verdict = str(reason), "left out"
        except Exception as error:  # whatever it is, the other parts are worth knowing
            lines = str(error).strip().splitlines() or [""]
            result, verdict = f"{type(error).__name__}: {lines[0][:200]}", "failed"
        finally:
            torch.compiler.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.rows.append((name, form, result, verdict))

    # --- parts --------------------------------------------------------------------------------------------------------

    def tests(self, *selected: str) -> Result:
        """Run some tests."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=self._seconds_left())
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        return lines[-1].strip("= "), "ok" if done.returncode == 0 else "failed"

    def training(self, network: str, precision: str, mode: str | None = None) -> Result:
        """Train: losses compared with fp32's, words/s, share of the matrix rate, launches and host time of a step."""
        steps = self.scale.small_steps if network == "small" else self.scale.full_steps
        if mode is not None:
            self._need_compiler()
        trainer, batches = self._trainer(network, f"training.precision={precision}", compile_mode=mode)
        form = precision if mode is None else f"{precision}, {mode}"
        losses = self.losses[network][form] = []
        warm = steps // 2
        for step in range(steps):
            if step == warm:
                started = timer()
            losses.append(trainer._step(batches[step % len(batches)], 0.0).terms["total"])
        rate = (steps - warm) * len(batches[0]) / (timer() - started)
        losses[:] = torch.stack(losses).tolist()
        share = rate * self._flops_of_a_word(network) / benchmark.matrix_rate(self.device, PRECISIONS[precision])
        result = [f"{rate:.3g} words/s", f"{100 * share:.0f} % of the matrix rate"]
        if self.device.type == "cuda":
            call = partial(trainer._step, batches[0], 0.0)
            launches, start = benchmark.count_launches(call), timer()
            call()
            host, step = time.perf_counter() - start, timer() - start  # `timer` waits for the GPU
            result += [f"{launches} launches", f"host {1000 * host:.1f} of {1000 * step:.1f} ms a step"]
        reference = self.losses[network].get("fp32")
        if reference is None or precision == "fp32":
            return ", ".join(result), "measured"
        last = min(LAST_STEPS, steps)
        difference = abs(mean(losses[-last:]) / mean(reference[-last:]) - 1)
        result.insert(0, f"loss differs by {100 * difference:.2f} % from fp32's")
        return ", ".join(result), "ok" if difference <= TOLERANCE else "failed"

    def speed(self, task: str, network: str, precision: str, *overrides: str, compiled: bool = False) -> Result:
        """Measure a task of tools/benchmark.py."""
        if compiled:
            self._need_compiler()
        words = self.scale.mask_words if task == "masks" else self.scale.reading_batch
        flags = ["--device", self.device.type, "--precision", precision, "--batch-size", str(words), "--runs", "3"]
        flags += ["--config", network, *([] if compiled else ["--no-compile"])]
        options = benchmark.parse_arguments([task, *flags])
        measured = benchmark.Benchmark(options, self._config(network, *overrides))
        getattr(measured, task)()
        rates = [f"{row['task']}, {row['form']}: {row['rate']:.3g} words/s" for row in measured.rows]
        return "; ".join(rates), "measured"

    # --- what the parts share -----------------------------------------------------------------------------------------

    def _config(self, network: str, *overrides: str) -> Config:
        """Return the config of a network on the rendered words, loaded in this process and without augmentation."""
        settings = {
            "dataset.charset_path": str(ROOT / "data" / "charset_36.txt"),
            "dataset.train.roots": [str(self.folder / "images")],
            "dataset.train.batch_size": self.scale.training_batch,
            "dataset.train.shares": None,
            "dataset.masks.source": "lmdb",
            "dataset.masks.root": str(self.folder / "masks"),
            "dataset.cache_dir": str(self.folder / "cache"),
            "dataset.num_workers": 0,
            "dataset.data_aug": False,
        }
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        config = load_config(ROOT / "configs" / f"{CONFIGS[network]}.yaml", [*given, *overrides])
        return with_checkpoint(config, None)

    def _trainer(self, network: str, *overrides: str, compile_mode: str | None = None) -> tuple[Trainer, list]:
        """Return a trainer with fresh weights, the same at each call, without dropout, and batches on the device."""
        compiling = [] if compile_mode is None else ["training.compile=true", f"training.compile_mode={compile_mode}"]
        config = self._config(network, *overrides, *compiling, "model.vision.dropout=0.0", "model.language.dropout=0.0")
        return benchmark.make_trainer(config, device=self.device, batches=KEPT_BATCHES)

    def _flops_of_a_word(self, network: str) -> float:
        if network not in self.flops:
            trainer, (batch, *_) = self._trainer(network)
            self.flops[network] = benchmark.count_flops(partial(trainer._step, batch, 0.0)) / len(batch)
        return self.flops[network]

    def _seconds_left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def _need_compiler(self) -> None:
        if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
            raise LeftOutError("needs a C compiler")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return 1 if a part failed."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--output", default="gpu-check.md", metavar="FILE", help="table to write (%(default)s)")
    parser.add_argument("--seconds", metavar="N", type=positive, default=480, help="start no part later (%(default)s)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    device = pick_device()
    if device.type == "cpu":  # threads gain nothing with a small network
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    use_tf32(False)
    choose_algorithms(deterministic=False, search=True)
    facts = benchmark.describe_machine(device) | {"torchvision": torchvision.__version__, "cores": usable_cores()}
    facts |= {"cuDNN": torch.backends.cudnn.version(), "compiler": shutil.which("cc") or "none"}
    with TemporaryDirectory() as folder:
        scale = ON_GPU if device.type == "cuda" else ON_CPU
        check = GpuCheck(device, scale, Path(folder), time.monotonic() + options.seconds)
        rows = check.run()
    head = f"`make gpu-check`, {time.monotonic() - started:.0f} s. "
    head += ", ".join(f"{name}: {value}" for name, value in facts.items())
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    text = f"{head}\n\n{markdown_table([['part', 'form', 'result', 'verdict'], *cells], left=4)}\n"
    write_atomically(Path(options.output), lambda file: file.write(text.encode()))
    print(text, end="")
    return int(any(verdict == "failed" for *_, verdict in rows))


if __name__ == "__main__":
    run_command_line(main)
