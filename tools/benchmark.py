"""Measure speed: reading, training, loading, rendering and mask making, with resnet50 beside the networks.

How cost grows is measured by the tasks growth-batch (reading), growth-words (opening a word list) and growth-workers
(loading).
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from builders import (
    build_charset,
    build_criterion,
    build_model,
    build_optimizer,
    build_ssn,
)
from builders import image_size as image_size_of
from config import Config, load_config
from engine.distributed import Process
from engine.precision import PRECISIONS
from inference.prepare import prepare_for_inference
from inference.segmenter import Segmenter
from loading.batches import normalize_images, stack_images
from modules.mask_refinement import EPSILON
from run_builders import build_label_rule, build_training_data
from tools.growth import (
    Point,
    growth_table,
    largest_steps,
    make_curve,
    plot_growth,
    time_openings,
    time_workers,
    write_rendered_words,
)
from tools.measuring import (
    BlockClock,
    Measurement,
    Timing,
    count_flops,
    matrix_rate,
    peak_memory,
    shares,
    time_interleaved,
)
from tools.support import make_parser, positive
from utils import UserError, run_command_line, seed_everything, write_atomically

EXAMPLE = """  python tools/benchmark.py reading training --config configs/train.yaml --threads 2 --json speed.json
  python tools/benchmark.py growth-batch --config configs/small.yaml --precision fp32 --no-compile --plot plots
  python tools/benchmark.py growth-words growth-workers --plot plots
  python tools/benchmark.py loading --config configs/small.yaml dataset.num_workers=1
  python tools/benchmark.py rendering --render-config configs/render.yaml
  python tools/benchmark.py masks --config configs/small_ssn.yaml"""

GROWTH_TASKS = ("growth-batch", "growth-words", "growth-workers")
TASKS = ("reading", "training", "loading", "rendering", "masks", *GROWTH_TASKS)
WITHOUT_CONFIG = {"rendering", "growth-words", "growth-workers"}  # tasks that need none
YARDSTICK = "resnet50 224x224 fp32"
YARDSTICK_SIZE = 224
BATCH_SIZES = tuple(2**power for power in range(9))  # 1 to 256
LIST_SIZES = (1_000, 10_000, 100_000, 1_000_000)
WORKERS = (0, 1, 2, 3, 4)
MADE_WORDS = 1000  # rendered for growth-workers where the config names no data
TEXT_LENGTH = 8  # characters and end of the texts that training learns: the mean of the real training words is near
WORD_HEIGHTS, WORD_ASPECT = (24, 96), 3  # pixels, and width over height, of the images that masks are made of


@dataclass
class Row(Measurement):
    """One form of one task. `words` are what one call works on; memory in MiB; `flops` of one call."""

    memory: float | None = None
    flops: int | None = None
    matrix_share: float | None = None  # of the measured rate of the form's own precision
    ratio: float | None = None  # words a second over the yardstick's images a second


@dataclass
class Form:
    """A way to do a task: `call` works on `words` words, its products are in `dtype`."""

    call: Callable[[], object]
    words: int
    dtype: torch.dtype = torch.float32
    flops: int | None = None


@dataclass
class Report:
    """Everything that one run of the tool found out."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    blocks: dict[str, dict[str, float]] = field(default_factory=dict)
    growth: list[Point] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report for a file."""
        rows = {name: [asdict(row) | {"rate": row.rate} for row in getattr(self, name)] for name in ("rows", "growth")}
        return {"machine": self.machine, **rows, "blocks": self.blocks, "largest_steps": largest_steps(self.growth)}


class FullResolutionSimilarity(nn.Module):
    """Cosine to the text prototype as it is written down: with features resized to every pixel. The slow way.

    Args:
        image_size: height and width, pixels.
    """

    def __init__(self, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, feature: Tensor, mask: Tensor) -> Tensor:
        """feature (N, E, h, w), mask (N, 1, H, W) -> (N, 1, H, W)."""
        pixels = F.interpolate(feature.float(), size=self.image_size, mode="bilinear", align_corners=False)
        prototype = (pixels * mask).sum(dim=(2, 3), keepdim=True)  # (N, E, 1, 1)
        return F.cosine_similarity(pixels, prototype, dim=1, eps=EPSILON)[:, None]


def straightforward(model: nn.Module) -> nn.Module:
    """Copy a network and take the shortcut out of its mask refinement, so that it computes as the paper writes it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "similarity"):
            module.similarity = FullResolutionSimilarity(image_size=module.image_size)
    return model


def one_by_one(ssn: nn.Module, areas: Sequence[int], images: Sequence[np.ndarray]) -> list[Tensor]:
    """Masks (H, W) as the published procedure is written down: float32, one word and one area after another."""
    device = next(ssn.parameters()).device
    ssn.eval()
    with torch.no_grad():
        tensors = (normalize_images(stack_images([each]).to(device)) for each in images)  # (1, 3, H, W)
        return [ssn.text_probability(each, areas=areas)[0] for each in tensors]


# --- tasks ------------------------------------------------------------------------------------------------------------


class Bench:
    """Measures the tasks for one config on one device; every task adds its rows to `report`."""

    def __init__(self, options: argparse.Namespace, config: Config | None) -> None:
        self.options = options
        self.config = config
        self.device = torch.device(options.device)
        self.dtype = PRECISIONS[options.precision]
        self.report = Report(machine=describe_machine(self.device))
        self.matrix_rates: dict[torch.dtype, float] = {}

    def run(self) -> Report:
        """All tasks that were asked for."""
        for task in self.options.tasks:
            getattr(self, task.replace("-", "_"))()
        return self.report

    def reading(self) -> None:
        """Eager float32, eager under autocast, prepared; a batch and one word; the straightforward way beside them."""
        model = self._network().eval().requires_grad_(False)
        batch = self.options.batch_size
        for words in dict.fromkeys((batch, 1)):
            forms = self._reading_forms(model, words)
            if words == batch:
                forms[YARDSTICK] = Form(self._yardstick(words), words)
            with torch.no_grad():
                self._measure("reading" if words == batch else "latency", forms)
        with torch.no_grad():
            clock, call = BlockClock(model, self.device), self._reading_forms(model, batch, ("autocast",))["autocast"]
            self.report.blocks["reading"] = shares(clock, call.call, self.device, runs=self.options.runs)

    def _reading_forms(self, model: nn.Module, words: int, names: Sequence[str] | None = None) -> dict[str, Form]:
        options = self.options
        inputs = self._inputs(words)
        with torch.no_grad():
            flops = count_flops(lambda: model(*inputs))
        slow = straightforward(model)
        makers: dict[str, Callable[[], Form]] = {
            "straightforward": lambda: Form(lambda: slow(*inputs), words, torch.float32, flops),
            "eager": lambda: Form(lambda: model(*inputs), words, torch.float32, flops),
            "autocast": lambda: Form(lambda: self._with_autocast(model, inputs), words, self.dtype, flops),
            "prepared": lambda: Form(lambda: self._prepared(model)(*inputs), words, self.dtype, flops),
        }
        return {name: makers[name]() for name in names or options.forms}

    def _prepared(self, model: nn.Module) -> nn.Module:
        """The fast form, made once: compiling takes minutes."""
        if not hasattr(self, "_fast"):
            self._fast = prepare_for_inference(model, precision=self.options.precision, compile=self.options.compile)
        return self._fast

    def training(self) -> None:
        """One optimisation step: forward, loss, backward, clipping, Adam."""
        words = self.options.training_batch_size
        model = self._network().train()
        forms = {
            "eager": Form(self._training_step(model, words, torch.float32), words),
            "autocast": Form(self._training_step(model, words, self.dtype), words, self.dtype),
        }
        if self.options.straightforward:
            forms["straightforward"] = Form(self._training_step(straightforward(model), words, torch.float32), words)
        if self.options.compile:
            compiled = self._training_step(torch.compile(model), words, self.dtype)
            forms["compiled"] = Form(compiled, words, self.dtype)
        flops = count_flops(forms["eager"].call)
        for form in forms.values():
            form.flops = flops
        forms[YARDSTICK] = Form(self._yardstick_step(words), words)
        self._measure("training", forms)
        clock = BlockClock(model, self.device)
        self.report.blocks["training"] = shares(clock, forms["autocast"].call, self.device, runs=self.options.runs)

    def _training_step(self, model: nn.Module, words: int, dtype: torch.dtype) -> Callable[[], object]:
        criterion = build_criterion(self.config)
        optimizer = build_optimizer(self.config, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        inputs, targets = self._inputs(words), self._targets(words)

        def step() -> None:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = criterion(model(*inputs), *targets)["total"]
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip_grad or float("inf"))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def loading(self) -> None:
        """The training data of the config: decoded, augmented, collated; rendered words where it names none."""
        with TemporaryDirectory() as folder:
            config = self._with_data(self.config, Path(folder))
            workers = max(1, config.dataset.num_workers)
            words, timing = self._time_workers(config, [workers])[workers]
        self._add("loading", "1 worker" if workers == 1 else f"{workers} workers", Form(list, words), timing)

    def rendering(self) -> None:
        """The renderer in one process; on several cores that many times as much."""
        from rendering.endless import RenderedWords  # the engine is only needed here

        words = RenderedWords(self.options.render_config, length=1 << 30)
        count = self.options.rendered
        words[0]
        runs = []
        for run in range(self.options.runs):
            start = time.perf_counter()
            for index in range(count):
                words[1 + run * count + index]
            runs.append(time.perf_counter() - start)
        self._add("rendering", "one process", Form(list, count), Timing(runs))

    def masks(self) -> None:
        """SSN at the config's areas on images of the sizes that words have."""
        areas = self.config.model.ssn.areas
        ssn = build_ssn(self.config).to(self.device)
        segmenter = Segmenter(ssn, areas, device=self.device, precision=self.options.precision)
        images = word_images(self.options.batch_size)
        name = f"areas {', '.join(map(str, areas))}"
        forms = {name: Form(lambda: segmenter(images), len(images), self.dtype)}
        if self.options.straightforward:
            slow = straightforward(ssn)
            forms["straightforward"] = Form(lambda: one_by_one(slow, areas, images), len(images))
        forms[YARDSTICK] = Form(self._yardstick(len(images)), len(images))
        self._measure("masks", forms)

    def growth_batch(self) -> None:
        """Reading with the prepared network against the size of the batch."""
        network = self._prepared(self._network().eval().requires_grad_(False))
        inputs = {words: self._inputs(words) for words in BATCH_SIZES}
        calls = {str(words): lambda words=words: network(*inputs[words]) for words in BATCH_SIZES}
        timings = time_interleaved(calls, device=self.device, runs=self.options.runs)
        measured = {words: (words, timings[str(words)]) for words in BATCH_SIZES}
        self._add_growth("growth-batch", {"prepared": measured})

    def growth_words(self) -> None:
        """Opening a word list, filtered and then from the cache, against the number of its words."""
        config = self.config or Config()
        labels = build_label_rule(config, case_sensitive=config.dataset.case_sensitive)
        with TemporaryDirectory() as folder:
            openings = time_openings(Path(folder), LIST_SIZES, labels=labels, runs=self.options.runs)
        self._add_growth("growth-words", openings)

    def growth_workers(self) -> None:
        """Loading against the number of workers: the training data of the config, rendered words where it has none."""
        with TemporaryDirectory() as folder:
            config = self._with_data(self.config or Config(), Path(folder))
            measured = self._time_workers(config, WORKERS)
        self._add_growth("growth-workers", {"loading": measured})

    # --- parts --------------------------------------------------------------------------------------------------------

    def _with_data(self, config: Config, folder: Path) -> Config:
        """A config that names training data: words rendered into `folder` where it names none."""
        config = config.model_copy(deep=True)
        if not config.dataset.train.roots and config.model.kind in ("vision", "recogniser"):
            write_rendered_words(folder, MADE_WORDS, self.options.render_config)
            config.dataset.train.roots = [str(folder / "images")]
            config.dataset.masks.source, config.dataset.masks.root = "lmdb", str(folder / "masks")
            config.dataset.cache_dir = str(folder / "cache")
        return config

    def _time_workers(self, config: Config, workers: Sequence[int]) -> dict[int, tuple[int, Timing]]:
        """Load the training data of a config with each number of workers: number -> (words, timing)."""

        def make_loader(number: int) -> DataLoader:
            changed = config.model_copy(deep=True)
            changed.dataset.num_workers = number
            return build_training_data(changed, device=self.device, process=Process())

        return time_workers(make_loader, workers, batches=self.options.batches, runs=self.options.runs)

    def _add_growth(self, task: str, forms: dict[str, dict[int, tuple[int, Timing]]]) -> None:
        """Report the curves of a task, and draw them if asked."""
        points = [point for form, measured in forms.items() for point in make_curve(task, form, measured)]
        self.report.growth += points
        if self.options.plot:
            plot_growth(points, Path(self.options.plot) / f"{task}.png")

    def _measure(self, task: str, forms: dict[str, Form]) -> None:
        """Time the forms of a task side by side, then the memory of each."""
        calls = {name: form.call for name, form in forms.items()}
        timings = time_interleaved(calls, device=self.device, runs=self.options.runs)
        yardstick = timings.get(YARDSTICK)
        for name, form in forms.items():
            memory = peak_memory(form.call, self.device) if self.options.memory else None
            self._add(task, name, form, timings[name], memory, yardstick and forms[YARDSTICK].words / yardstick.median)

    def _add(
        self,
        task: str,
        name: str,
        form: Form,
        timing: Timing,
        memory: float | None = None,
        yardstick_rate: float | None = None,
    ) -> None:
        row = Row(task, name, form.words, timing.median, timing.spread, memory, form.flops)
        if form.flops:
            if form.dtype not in self.matrix_rates:
                self.matrix_rates[form.dtype] = matrix_rate(self.device, form.dtype)
            row.matrix_share = form.flops / timing.median / self.matrix_rates[form.dtype]
        if yardstick_rate:
            row.ratio = row.rate / yardstick_rate
        self.report.rows.append(row)

    def _network(self) -> nn.Module:
        if self.config.model.kind != "recogniser":
            raise UserError(f"{self.options.config}: is of kind {self.config.model.kind}; name a recogniser's config")
        return build_model(self.config).to(self.device)

    def _inputs(self, words: int) -> tuple[Tensor, Tensor | None]:
        height, width = image_size_of(self.config)
        image = torch.randn(words, 3, height, width, device=self.device)
        mask = torch.rand(words, 1, height, width, device=self.device) if self.config.model.takes_masks else None
        return image, mask

    def _targets(self, words: int) -> tuple[Tensor, Tensor]:
        steps, classes = self.config.dataset.max_length + 1, build_charset(self.config).num_classes
        lengths = torch.full((words,), min(TEXT_LENGTH, steps), device=self.device)
        labels = torch.randint(1, classes, (words, steps), device=self.device)
        labels[torch.arange(steps, device=self.device) >= lengths[:, None] - 1] = 0
        return labels, lengths

    def _with_autocast(self, model: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> object:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return model(*inputs)

    def _yardstick_network(self) -> nn.Module:
        from torchvision.models import resnet50

        return resnet50().to(self.device)

    def _yardstick(self, images: int) -> Callable[[], object]:
        network = self._yardstick_network().eval().requires_grad_(False)
        image = torch.randn(images, 3, YARDSTICK_SIZE, YARDSTICK_SIZE, device=self.device)
        return lambda: network(image)

    def _yardstick_step(self, images: int) -> Callable[[], object]:
        network = self._yardstick_network().train()
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        image = torch.randn(images, 3, YARDSTICK_SIZE, YARDSTICK_SIZE, device=self.device)
        target = torch.zeros(images, dtype=torch.int64, device=self.device)

        def step() -> None:
            F.cross_entropy(network(image), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def word_images(count: int) -> list[np.ndarray]:
    """Images (H, W, 3) uint8 of noise, of a few sizes that words have."""
    random = np.random.default_rng(0)
    heights = np.linspace(*WORD_HEIGHTS, num=min(count, 8)).astype(int)
    sizes = [(height, height * WORD_ASPECT) for height in heights]
    return [random.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(count)]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    name = capabilities.get("cpu_name", platform.processor())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "native 16 bits": [key for key in ("amx_bf16", "avx512_bf16", "amx_fp16") if capabilities.get(key)],
        "load before": os.getloadavg()[0],
        "torch": torch.__version__,
    }


# --- output -----------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """The rows, the growth and the blocks as Markdown."""
    head = "| task | form | words | ms a word | words/s | spread | x resnet50 | MiB | GFLOP a word | of matrix rate |"
    lines = [", ".join(f"{key}: {value}" for key, value in report.machine.items())]
    if report.rows:
        lines += ["", head, "|---|---|" + "---:|" * 8]
    for row in report.rows:
        cells = (
            row.task,
            row.form,
            str(row.words),
            f"{1000 * row.seconds / row.words:.2f}",
            f"{row.rate:.1f}",
            f"{100 * row.spread:.0f} %",
            _cell(row.ratio, "{:.2f}"),
            _cell(row.memory, "{:.0f}"),
            _cell(row.flops and row.flops / row.words / 1e9, "{:.1f}"),
            _cell(row.matrix_share and 100 * row.matrix_share, "{:.0f} %"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    if report.growth:
        lines += ["", *growth_table(report.growth)]
    for task, blocks in report.blocks.items():
        lines += ["", f"| {task}: block | share |", "|---|---:|"]
        lines += [f"| {name} | {100 * share:.1f} % |" for name, share in blocks.items()]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# --- the command line -------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Tasks and config overrides share the positional arguments: an override has an equals sign."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("tasks", nargs="+", metavar="TASK|key=value", help=f"{', '.join(TASKS)}; config overrides")
    parser.add_argument("--config", metavar="YAML", help="the network and its data")
    parser.add_argument("--render-config", default="configs/render.yaml", help="how rendered words look (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="of autocast and prepared")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=("straightforward", "eager", "autocast", "prepared"),
        default=("straightforward", "eager", "autocast", "prepared"),
        help="ways of reading to compare (default: all)",
    )
    parser.add_argument(
        "--straightforward", action="store_true", help="training, masks: the straightforward way as well"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="words of reading and of masks")
    parser.add_argument("--training-batch-size", type=positive, default=16)
    parser.add_argument("--batches", type=positive, default=10, help="of loading and growth-workers, in each run")
    parser.add_argument("--rendered", type=positive, default=100, help="words of rendering, in each run")
    parser.add_argument("--runs", type=positive, default=5, help="rounds; medians are reported (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    parser.add_argument("--plot", metavar="FOLDER", help="draw each growth task there, as FOLDER/TASK.png")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [each for each in options.tasks if "=" in each]
    options.tasks = [each for each in options.tasks if "=" not in each]
    unknown = [each for each in options.tasks if each not in TASKS]
    if unknown:
        raise UserError(f"{unknown[0]}: is no task; choose from {', '.join(TASKS)}")
    if options.plot and not set(options.tasks) & set(GROWTH_TASKS):
        raise UserError(f"--plot: draws only {', '.join(GROWTH_TASKS)}; name one of them")
    if options.config is None and set(options.tasks) - WITHOUT_CONFIG:
        raise UserError("--config: name the YAML of the network to measure, such as configs/train.yaml")
    return options


def without_checkpoints(config: Config) -> Config:
    """The config with random weights: how fast a network is does not depend on them."""
    config = config.model_copy(deep=True)
    for part in (config.model, config.model.vision, config.model.language, config.model.ssn):
        part.checkpoint = None
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    seed_everything(0)
    config = without_checkpoints(load_config(options.config, options.overrides)) if options.config else None
    report = Bench(options, config).run()
    print(table(report))
    if options.json:
        content = json.dumps(report.to_dict(), indent=2)
        write_atomically(Path(options.json), lambda file: file.write(content.encode()))
    return 0


if __name__ == "__main__":
    run_command_line(main)
