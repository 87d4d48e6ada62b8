"""Check the GPU path on this machine: tests, losses in every precision, exact resume and speed, in one table.

It takes less than eight minutes on one GPU and needs no data, as it renders words first. The parts that need a C
compiler (compiled training and inference) come last. Without a GPU, the parts that need one are listed as left out, and
the others use the small network.
"""

import argparse
import json
import os
import shutil
import signal
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

from config import Config, load_config
from engine.distributed import pick_device
from engine.precision import PRECISIONS, choose_algorithms, use_tf32
from engine.trainer import Trainer
from evaluation.tables import markdown_table
from tools import benchmark
from tools.support import make_parser, positive, usable_cores
from utils import run_command_line, write_atomically

EXAMPLE = """  python tools/gpu_check.py
  python tools/gpu_check.py --seconds 1800 --output gpu-check.md"""

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"small": "small", "full size": "train", "small SSN": "small_ssn", "SSN": "train_ssn"}
TOLERANCE = 0.02  # of the mean loss of the last steps, against fp32's
LAST_STEPS = 10
KEPT_BATCHES = 8  # training repeats these, so that loading does not count


@dataclass(frozen=True)
class Scale:
    """How much of each part is done."""

    words: int  # rendered
    small_steps: int
    full_steps: int
    resumed_steps: int
    training_batch: int
    reading_batch: int
    mask_words: int


ON_GPU = Scale(2048, 200, 50, 40, 96, 256, 64)
ON_CPU = Scale(48, 12, 0, 3, 8, 16, 4)


@dataclass
class PartResult:
    """One line of the table; `verdict` is ok, failed, measured or left out."""

    part: str
    form: str
    result: str
    verdict: str


Result = tuple[str, str]  # what a part found, and its verdict


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
    rows: list[PartResult] = field(default_factory=list)
    losses: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {"small": {}, "full size": {}})
    flops: dict[str, float] = field(default_factory=dict)

    def run(self) -> list[PartResult]:
        """Run all parts, those that need no compiler first."""
        benchmark.render_words_to(self.folder, self.scale.words)
        self.part("tests that need a GPU", "pytest -m gpu", self.gpu_tests, gpu=True)
        for form in PRECISIONS:
            self.part("small network", form, self.training, "small", form, gpu=form == "fp16")
        for form in PRECISIONS:
            self.part("full size", form, self.training, "full size", form, gpu=True)
        self.part("two equal runs", "deterministic", self.two_runs)
        self.part("kill and resume", "deterministic", self.kill_and_resume)
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
        self.rows.append(PartResult(name, form, result, verdict))

    # --- parts --------------------------------------------------------------------------------------------------------

    def gpu_tests(self) -> Result:
        """Run the tests that are marked gpu."""
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
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

    def two_runs(self) -> Result:
        """Compare losses and weights of two runs with `training.deterministic`, bit for bit."""
        choose_algorithms(deterministic=True, search=False)
        try:
            found = []
            for _ in range(2):
                trainer, batches = self._trainer("small", "training.precision=bf16", dropout=True)
                steps = range(self.scale.resumed_steps)
                losses = [trainer._step(batches[step % len(batches)], 0.0).terms["total"] for step in steps]
                found.append([*losses, *trainer.model.parameters()])
        finally:
            choose_algorithms(deterministic=False, search=True)
        equal = all(torch.equal(first, second) for first, second in zip(*found, strict=True))
        return f"{len(steps)} steps {'are equal' if equal else 'differ'} bit for bit", "ok" if equal else "failed"

    def kill_and_resume(self) -> Result:
        """Kill and resume `main.py`, and compare every logged loss with those of a run that was left alone."""
        half, whole = self.scale.resumed_steps, 2 * self.scale.resumed_steps
        self._main("whole", whole).wait(self._seconds_left())
        cut = self._main("cut", whole)
        while len(self._history("cut")) <= half and cut.poll() is None and time.monotonic() < self.deadline:
            time.sleep(0.01)
        cut.send_signal(signal.SIGKILL)
        cut.wait()
        killed = len(self._history("cut"))
        self._main("cut", whole, "--resume").wait(self._seconds_left())
        expected, found = self._history("whole"), self._history("cut")
        if len(expected) != whole:
            raise RuntimeError(f"the run did not end; see {self.folder / 'runs' / 'whole' / 'log.txt'}")
        equal = found == expected
        result = f"killed after step {killed} of {whole}: losses {'equal' if equal else 'differ'} bit for bit"
        return result, "ok" if equal else "failed"

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
        settings = [f"dataset.charset_path={json.dumps(str(ROOT / 'data' / 'charset_36.txt'))}"]
        settings += ["dataset.num_workers=0", "dataset.data_aug=false"]
        config = load_config(ROOT / "configs" / f"{CONFIGS[network]}.yaml", [*settings, *overrides])
        config.dataset.train.batch_size = self.scale.training_batch
        config.run.workdir = str(self.folder / "runs")
        return benchmark.trained_on(benchmark.without_checkpoints(config), self.folder)

    def _trainer(
        self, network: str, *overrides: str, compile_mode: str | None = None, dropout: bool = False
    ) -> tuple[Trainer, list]:
        """Return a trainer with fresh weights, the same at each call, and batches on the device."""
        compiling = [] if compile_mode is None else ["training.compile=true", f"training.compile_mode={compile_mode}"]
        rates = [] if dropout else ["model.vision.dropout=0.0", "model.language.dropout=0.0"]
        config = self._config(network, *overrides, *compiling, *rates)
        return benchmark.make_trainer(config, device=self.device, batches=KEPT_BATCHES)

    def _flops_of_a_word(self, network: str) -> float:
        if network not in self.flops:
            trainer, (batch, *_) = self._trainer(network)
            self.flops[network] = benchmark.count_flops(partial(trainer._step, batch, 0.0)) / len(batch)
        return self.flops[network]

    def _main(self, name: str, steps: int, *arguments: str) -> subprocess.Popen:
        """Start `main.py` with the small network, deterministic."""
        path = self.folder / "resumed.yaml"
        if not path.exists():
            path.write_text(self._config("small").to_yaml(), encoding="utf-8")
        settings = ["training.deterministic=true", f"training.iterations={steps}", "training.show_iters=1"]
        settings += ["training.save_iters=3", "training.precision=bf16"]
        command = [sys.executable, str(ROOT / "main.py"), f"--config={path}", f"--name={name}", *settings, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _history(self, name: str) -> list[dict]:
        path = self.folder / "runs" / name / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _seconds_left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def _need_compiler(self) -> None:
        if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
            raise LeftOutError("needs a C compiler")


def report(facts: dict[str, object], rows: Sequence[PartResult], seconds: float) -> str:
    """Return the content of `gpu-check.md`."""
    head = f"`make gpu-check`, {seconds:.0f} s. " + ", ".join(f"{name}: {value}" for name, value in facts.items())
    cells = [[row.part, row.form, row.result.replace("|", "/"), row.verdict] for row in rows]
    return f"{head}\n\n{markdown_table([['part', 'form', 'result', 'verdict'], *cells], left=4)}\n"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """See `--help`."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--output", default="gpu-check.md", metavar="FILE", help="table to write (%(default)s)")
    parser.add_argument("--seconds", metavar="N", type=positive, default=480, help="start no part later (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns 1 if a part failed."""
    options = parse_arguments(arguments)
    started = time.monotonic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it before the first part
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
    text = report(facts, rows, time.monotonic() - started)
    write_atomically(Path(options.output), lambda file: file.write(text.encode()))
    print(text, end="")
    return int(any(row.verdict == "failed" for row in rows))


if __name__ == "__main__":
    run_command_line(main)
