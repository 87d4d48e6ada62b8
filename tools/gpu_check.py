"""Check the GPU path on this machine: tests (losses in every precision, exact resume) and speed, in one table.

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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import torch
import torchvision

from builders import with_checkpoint
from config import load_config
from engine.distributed import pick_device
from evaluation.tables import markdown_table
from tools import benchmark, render_words
from tools.support import make_parser, positive, usable_cores
from utils import first_line, run_command_line, write_atomically

EXAMPLE = """  python tools/gpu_check.py
  python tools/gpu_check.py --seconds 1800 --output gpu-check.md"""

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"small": "small", "full size": "train", "small SSN": "small_ssn", "SSN": "train_ssn"}
RUN_TESTS = {
    "two equal runs": "test_deterministic_runs_are_equal",
    "kill and resume": "test_a_deterministic_run_killed_and_resumed_equals_uninterrupted",
}
RENDERED = {"cuda": 2048, "cpu": 48}  # words
BATCHES = {  # words of a batch of each task
    "cuda": {"training": 96, "loading": 96, "masks": 16, "reading": 256},
    "cpu": {"training": 8, "loading": 8, "masks": 4, "reading": 16},
}

Result = tuple[str, str]  # what a part found, and its verdict: ok, failed, measured or left out
Row = tuple[str, str, str, str]  # of the table: part, form, result, verdict

NO_TIME: Result = ("no time was left; give more --seconds", "left out")


@dataclass
class GpuCheck:
    """Runs the parts one after another; a part that fails does not stop the others."""

    device: torch.device
    folder: Path
    deadline: float  # of time.monotonic()
    rows: list[Row] = field(default_factory=list)

    def run(self) -> list[Row]:
        """Run all parts, those that need no compiler first."""
        words = ["--output", str(self.folder), "--name", "made", "--count", str(RENDERED[self.device.type])]
        with contextlib.redirect_stdout(sys.stderr):
            render_words.main([*words, "--config", str(ROOT / "configs" / "render.yaml"), "--workers", "1"])
        large, ssn = ("full size", "SSN") if self.device.type == "cuda" else ("small", "small SSN")
        self.part("tests that need a GPU", "eager", self.tests, "-m", "gpu", "-k", "not compiled", gpu=True)
        for name, test in RUN_TESTS.items():
            self.part(name, "deterministic", self.tests, f"tests/test_resume.py::{test}")
        for network in dict.fromkeys(("small", large)):
            self.part(f"training, {network}", "bf16", self.speed, "training", network, "bf16")
        self.part(f"training, {large}", "fp16", self.speed, "training", large, "fp16", gpu=True)
        self.part("masks", ssn, self.speed, "masks", ssn, "bf16")
        for workers in dict.fromkeys((1, max(1, min(usable_cores() - 1, 16)))):
            settings = f"dataset.num_workers={workers}", "dataset.data_aug=true"
            self.part("loading", f"workers: {workers}", self.speed, "loading", "small", "bf16", *settings)
        self.part("reading", "bf16", self.speed, "reading", large, "bf16")
        # The rest needs a compiler, and minutes for each network.
        form, compiled = "bf16, compiled", {"gpu": True, "compiler": True}
        for network, mode in (large, "default"), (large, "reduce-overhead"), ("small", "default"):
            name, key = f"training, {network}", f"training.compile_mode={mode}"
            self.part(name, f"{form}, {mode}", self.speed, "training", network, form, key, **compiled)
        self.part("reading", form, self.speed, "reading", large, form, **compiled)
        self.part("tests that need a GPU", "compiled", self.tests, "-m", "gpu", "-k", "compiled", **compiled)
        return self.rows

    def part(
        self,
        name: str,
        form: str,
        work: Callable[..., Result],
        *arguments: str,
        gpu: bool = False,
        compiler: bool = False,
    ) -> None:
        """Do one part, which may need a GPU and a compiler, and add its line."""
        print(f"{name}, {form} ...", file=sys.stderr, flush=True)
        try:
            if gpu and self.device.type != "cuda":
                result, verdict = "needs a GPU", "left out"
            elif compiler and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
                result, verdict = "needs a C compiler", "left out"
            elif time.monotonic() > self.deadline:
                result, verdict = NO_TIME
            else:
                result, verdict = work(*arguments)
        except subprocess.TimeoutExpired:  # of tests, which end with the time that was given
            result, verdict = NO_TIME
        except Exception as error:  # whatever it is, the other parts are worth knowing
            result, verdict = f"{type(error).__name__}: {first_line(error)}", "failed"
        finally:
            torch.compiler.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.rows.append((name, form, result, verdict))

    # --- parts --------------------------------------------------------------------------------------------------------

    def tests(self, *selected: str) -> Result:
        """Run some tests."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
        seconds = max(1.0, self.deadline - time.monotonic())
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return "; ".join([lines[-1].strip("= "), *failed]), "failed" if done.returncode else "ok"

    def speed(self, task: str, network: str, form: str, *overrides: str) -> Result:
        """Measure a task of tools/benchmark.py; `form` is a precision, and whether networks are compiled."""
        settings = {
            "dataset.charset_path": str(ROOT / "data" / "charset_36.txt"),
            "dataset.train.roots": [str(self.folder / "images")],
            "dataset.train.batch_size": BATCHES[self.device.type][task],
            "dataset.train.shares": None,
            "dataset.masks.source": "lmdb",
            "dataset.masks.root": str(self.folder / "masks"),
            "dataset.cache_dir": str(self.folder / "cache"),
        }
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        config = load_config(ROOT / "configs" / f"{CONFIGS[network]}.yaml", [*given, *overrides])
        precision, _, compiled = form.partition(", ")
        measured = benchmark.Benchmark(
            with_checkpoint(config, None),
            self.device,
            precision=precision,
            compile=bool(compiled),
            batch_size=BATCHES[self.device.type][task],
            runs=3,
        )
        getattr(measured, task)()
        return "; ".join(map(shown, measured.rows)), "measured"


def shown(row: dict[str, Any]) -> str:
    """Return a row of the benchmark in words."""
    text = f"{row['task']}, {row['form']}: {row['rate']:.3g} words/s"
    if row["matrix_share"] is not None:
        text += f", {row['matrix_share']:.0%} of the matrix rate"
    if row["launches"] is not None:
        text += f", {row['launches']} launches, host {1000 * row['host']:.1f} of {1000 * row['seconds']:.1f} ms"
    return text


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
    facts = benchmark.describe_machine(device) | {"torchvision": torchvision.__version__, "cores": usable_cores()}
    facts |= {"cuDNN": torch.backends.cudnn.version(), "compiler": shutil.which("cc") or "none"}
    with TemporaryDirectory() as folder:
        rows = GpuCheck(device, Path(folder), time.monotonic() + options.seconds).run()
    head = f"`make gpu-check`, {time.monotonic() - started:.0f} s. "
    head += ", ".join(f"{name}: {value}" for name, value in facts.items())
    cells = [[cell.replace("|", "/") for cell in row] for row in rows]
    text = f"{head}\n\n{markdown_table([['part', 'form', 'result', 'verdict'], *cells], left=4)}\n"
    write_atomically(Path(options.output), text)
    print(text, end="")
    return int(any(verdict == "failed" for *_, verdict in rows))


if __name__ == "__main__":
    run_command_line(main)
