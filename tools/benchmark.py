"""Measure speed: inference, training, loading and masks, with resnet50 beside the networks.

Tasks:
  reading    predict words with a recogniser: a batch, and one word (latency)
  training   take a training step: forward, backward, clipping, update
  loading    decode, augment and collate the config's training data
  masks      predict masks with an SSN at the config's scales

Training of words renders them; training of SSN and of the language model, and loading, need the config's data.
docs/benchmarks.md explains the forms of a task.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from builders import build_model, build_ssn, with_checkpoint
from config import Config, load_config
from engine.distributed import Process
from engine.precision import PRECISIONS, choose_algorithms, use_tf32
from engine.provenance import device_name, source
from engine.trainer import Trainer
from evaluation.tables import markdown_table
from inference.prepare import prepare_for_inference
from inference.segmenter import Segmenter
from run_builders import build_trainer, build_training_data
from schema import TrainDataConfig
from tools.support import make_parser, positive
from utils import RENDER_SCHEME, UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/benchmark.py reading training --config configs/train.yaml --threads 2 --json speed.json
  python tools/benchmark.py reading --config configs/small.yaml --precision fp32 --no-compile
  python tools/benchmark.py loading --config configs/small.yaml dataset.num_workers=1
  python tools/benchmark.py masks --config configs/small_ssn.yaml"""

YARDSTICK = "resnet50 224x224 fp32"
YARDSTICK_SIZE = 224
RENDERED_WORDS = f"{RENDER_SCHEME}{Path(__file__).resolve().parents[1] / 'configs' / 'render.yaml'}"
ROUND_SECONDS = 0.2  # a round repeats a short call for so long
LOADED_BATCHES = 10  # of a call of the task loading, at least
WORD_HEIGHTS, WORD_ASPECT = (24, 96), 3  # pixels, and width over height, of the images that masks are made of
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")

Call = Callable[[], object]


@dataclass
class Form:
    """A way to do a task: `call` works on `words` words with matrix multiplications in `dtype`."""

    call: Call
    words: int
    dtype: torch.dtype = torch.float32
    flops: int | None = None  # of a call


# --- measuring --------------------------------------------------------------------------------------------------------


def time_in_turns(calls: Mapping[str, Call], *, runs: int = 5) -> dict[str, Measurement]:
    """Time all calls in each of `runs` rounds, so that other load on the machine slows all of them alike.

    Each is called at least once before it is timed, and a GPU is waited for. `median` and `iqr` of a measurement are
    over the calls of all rounds.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    rounds = [
        {name: each.blocked_autorange(min_run_time=ROUND_SECONDS) for name, each in timers.items()} for _ in range(runs)
    ]
    return {name: Measurement.merge([found[name] for found in rounds])[0] for name in calls}


def gpu_costs(call: Call, device: torch.device) -> dict[str, float | None]:
    """Return what a call costs on a GPU; on a CPU each value is None.

    `memory` is in MiB beyond what is allocated before the call, `launches` counts the kernels and graphs that the host
    launches, and `host` is the time until it has done so, in seconds.
    """
    if device.type != "cuda":
        return dict.fromkeys(("memory", "launches", "host"))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    started = timer()  # waits for the GPU
    call()
    host = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        timer()
    launches = sum(event.count for event in found.key_averages() if event.key in LAUNCHES)
    memory = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return {"memory": memory, "launches": launches, "host": host}


def count_flops(call: Call) -> int:
    """Return the FLOPs of matrix multiplications and convolutions; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix multiplication: the best that this machine can do."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_in_turns({"product": lambda: a @ b})["product"].median


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass
class Benchmark:
    """Measures tasks with one config on one device; `rows` collects what was found."""

    config: Config
    device: torch.device
    precision: str = "bf16"  # of all forms but eager
    compile: bool = True  # measure compiled networks
    batch_size: int = 32  # words
    runs: int = 5  # rounds of the medians
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        compute_as_in_training(self.config)

    def reading(self) -> None:
        """Predict the words of a batch, and one word."""
        if self.config.model.kind != "recogniser":
            raise UserError(f"model.name {self.config.model.name}: reading needs a config of abinet or binet")
        model = build_model(self.config).to(self.device).eval().requires_grad_(False)
        prepared = prepare_for_inference(model, precision=self.precision, compile=self.compile)
        networks = {"eager": (model, torch.float32), "prepared": (prepared, PRECISIONS[self.precision])}
        for task, words in (("reading", self.batch_size), ("latency", 1)):
            image = torch.randn(words, 3, *self.config.dataset.image_size, device=self.device)
            inputs = image, torch.rand_like(image[:, :1]) if self.config.model.takes_masks else None
            flops = count_flops(partial(model, *inputs))
            forms = {
                name: Form(partial(network, *inputs), words, dtype, flops)
                for name, (network, dtype) in networks.items()
            }
            if task == "reading":
                forms[YARDSTICK] = self._yardstick(words)
            self._measure(task, forms)

    def training(self) -> None:
        """Take training steps, always with the same batch of rendered words."""
        settings = {"eager": ("fp32", False), "autocast": (self.precision, False), "compiled": (self.precision, True)}
        if not self.compile:
            del settings["compiled"]
        config = self.config.model_copy(deep=True)
        words, config.dataset.num_workers = self.batch_size, 0
        if config.model.kind in ("vision", "recogniser"):
            config.dataset.train = TrainDataConfig(roots=[RENDERED_WORDS], length=words)
            config.dataset.masks.source = "lmdb"  # renderings bring their masks
        config.dataset.train.batch_size = words
        forms: dict[str, Form] = {}
        for name, (precision, compiled) in settings.items():
            config.training.precision, config.training.compile = precision, compiled
            trainer, (batch,) = make_trainer(config, device=self.device, batches=1)
            forms[name] = Form(partial(trainer.train_step, batch), len(batch), PRECISIONS[precision])
        flops = count_flops(forms["eager"].call)
        for form in forms.values():
            form.flops = flops
        self._measure("training", forms)

    def loading(self) -> None:
        """Load batches with the config's number of workers."""
        batches = iter(build_training_data(self.config, device=self.device, process=Process()))
        workers = self.config.dataset.num_workers
        number = -(-LOADED_BATCHES // max(1, workers)) * max(1, workers)  # as many for each worker
        call = lambda: sum(map(len, islice(batches, number)))  # noqa: E731
        self._measure("loading", {f"workers: {workers}": Form(call, call())})

    def masks(self) -> None:
        """Predict the masks of images of the sizes that words have."""
        areas = self.config.model.ssn.areas
        ssn = build_ssn(self.config).to(self.device)
        segmenter = Segmenter(ssn, areas, device=self.device, precision=self.precision)
        number, random = self.batch_size, np.random.default_rng(0)
        heights = np.resize(np.linspace(*WORD_HEIGHTS, num=min(number, 8)).astype(int), number)
        images = [random.integers(0, 256, (each, each * WORD_ASPECT, 3), dtype=np.uint8) for each in heights]
        name = f"scales {', '.join(map(str, areas))}"
        forms = {name: Form(lambda: segmenter(images), len(images)), YARDSTICK: self._yardstick(len(images))}
        self._measure("masks", forms)

    def _measure(self, task: str, forms: dict[str, Form]) -> None:
        """Time the forms of a task in turns, and note a row for each."""
        timings = time_in_turns({name: form.call for name, form in forms.items()}, runs=self.runs)
        rates = {name: form.words / timings[name].median for name, form in forms.items()}
        for name, form in forms.items():
            seconds = timings[name].median
            share = form.flops / seconds / matrix_rate(self.device, form.dtype) if form.flops else None
            row = {"task": task, "form": name, "words": form.words, "seconds": seconds, "rate": rates[name]}
            row |= {"spread": timings[name].iqr / seconds, "flops": form.flops, "matrix_share": share}
            row |= {"ratio": rates[name] / rates[YARDSTICK] if YARDSTICK in rates else None}
            self.rows.append(row | gpu_costs(form.call, self.device))

    def _yardstick(self, images: int) -> Form:
        """Return resnet50 on as many images."""
        from torchvision.models import resnet50

        network = resnet50().to(self.device).eval().requires_grad_(False)
        image = torch.randn(images, 3, YARDSTICK_SIZE, YARDSTICK_SIZE, device=self.device)
        return Form(lambda: network(image), images)


# --- what tools/gpu_check.py shares -----------------------------------------------------------------------------------


def compute_as_in_training(config: Config) -> None:
    """Choose arithmetic and algorithms of a GPU as main.py does."""
    use_tf32(config.training.tf32)
    choose_algorithms(deterministic=config.training.deterministic, search=True)


def make_trainer(config: Config, *, device: torch.device, batches: int) -> tuple[Trainer, list[Any]]:
    """Return a trainer with fresh weights, the same at each call, and the first batches of its data on the device."""
    config = config.model_copy(deep=True)
    config.dataset.test.roots = []
    config.training.iterations = config.training.iterations or 1000
    compute_as_in_training(config)
    torch.manual_seed(0)
    trainer = build_trainer(config, device=device, process=Process())
    trainer.data.batch_sampler.set_position(0, 0)
    return trainer, [batch.to(device) for batch in islice(trainer.data, batches)]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on beside the code."""
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "native 16 bits": [key for key in ("amx_bf16", "avx512_bf16", "amx_fp16") if capabilities.get(key)],
        "load before": os.getloadavg()[0],
        **source()["versions"],
    }


# --- the command line -------------------------------------------------------------------------------------------------


def as_markdown(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return all numbers as Markdown."""
    columns = {  # of a row -> heading and form of its numbers
        "ms": ("ms a word", "{:.2f}"),
        "rate": ("words/s", "{:.1f}"),
        "spread": ("spread", "{:.0%}"),
        "ratio": ("x resnet50", "{:.2f}"),
        "memory": ("MiB", "{:.0f}"),
        "launches": ("launches", "{}"),
        "host": ("s of the host", "{:.4f}"),
        "gflop": ("GFLOP a word", "{:.1f}"),
        "matrix_share": ("of matrix rate", "{:.0%}"),
    }
    table = [["task", "form", "words", *(heading for heading, _ in columns.values())]]
    for row in rows:
        row = row | {"ms": 1000 / row["rate"], "gflop": row["flops"] and row["flops"] / row["words"] / 1e9}
        cells = ["" if row[name] is None else form.format(row[name]) for name, (_, form) in columns.items()]
        table.append([row["task"], row["form"], row["words"], *cells])
    return ", ".join(f"{key}: {value}" for key, value in machine.items()) + "\n\n" + markdown_table(table, left=2)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse tasks and config overrides from the same positional arguments: an override has an equals sign."""
    tasks = ("reading", "training", "loading", "masks")
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("tasks", nargs="+", metavar="TASK|key=value", help="what to measure; config overrides")
    parser.add_argument("--config", required=True, metavar="YAML", help="config of the network and its data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of all forms but eager (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out compiled networks")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=32, help="words in a batch (%(default)s)")
    parser.add_argument("--runs", metavar="N", type=positive, default=5, help="rounds of the medians (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there as well")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [each for each in options.tasks if "=" in each]
    options.tasks = [each for each in options.tasks if "=" not in each]
    unknown = [each for each in options.tasks if each not in tasks]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown task; choose from {', '.join(tasks)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = with_checkpoint(load_config(options.config, options.overrides), None)  # speed does not depend on weights
    config.model.ssn.checkpoint = None
    shared = {name: getattr(options, name) for name in ("precision", "compile", "batch_size", "runs")}
    benchmark = Benchmark(config, torch.device(options.device), **shared)
    machine = describe_machine(benchmark.device)
    for task in options.tasks:
        getattr(benchmark, task)()
    print(as_markdown(machine, benchmark.rows))
    if options.json:
        write_atomically(Path(options.json), json.dumps({"machine": machine, "rows": benchmark.rows}, indent=2))
    return 0


if __name__ == "__main__":
    run_command_line(main)
