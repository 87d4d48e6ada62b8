"""How cost grows: opening word lists of many sizes, loading with some workers, and whether a step is worse than linear.

A step leads from one size to the next. Its number is the ratio of the costs over the ratio of the sizes: 1 is linear,
less means that a part of the cost is fixed. With workers the cost is the time of all processes that load: at 1 another
worker gained nothing, above it the worker made loading slower.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
from torch.utils.data import DataLoader

from dataset import WordDataset
from loading.batches import LabelRule
from loading.lmdb_io import LmdbWriter
from loading.transforms import ResizeWord
from tools.measuring import Measurement, Timing

FROM_CACHE = "second opening"  # which reads no word, so that words a second say nothing
OPENINGS = ("first opening", FROM_CACHE)
PREFETCHED = 2  # batches that a worker of a data loader makes ahead: torch's default
MARGIN = 1.1  # a step up to here counts as linear: medians of a few rounds differ by as much


@dataclass(kw_only=True)
class Point(Measurement):
    """What one size costs; `task` and `form` name the curve that this is a point of.

    Fields:
        size: what the cost grows with: words in a batch, words in a list, or workers.
        step: cost ratio over size ratio since the point before; None at the first.
        exponent: slope of the logarithms of cost and size since the point before; None where the size did not grow.
    """

    size: int
    step: float | None = None
    exponent: float | None = None

    @property
    def extent(self) -> int:
        """The size as it counts: without workers one process loads, with one worker as well."""
        return max(1, self.size)

    @property
    def cost(self) -> float:
        """Seconds of a batch or of a list; with workers the seconds that all of them together spend on a word."""
        return self.extent / self.rate


class Axes(NamedTuple):
    """How the growth of a task is drawn."""

    size: str
    cost: str
    size_scale: str
    rate_scale: str


AXES = {
    "growth-batch": Axes("words in a batch", "seconds of a batch", "log", "linear"),
    "growth-words": Axes("words in the list", "seconds to open it", "log", "linear"),
    "growth-workers": Axes("workers", "process-seconds a word", "linear", "linear"),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def make_curve(task: str, form: str, measured: Mapping[int, tuple[int, Timing]]) -> list[Point]:
    """The points of one curve from size -> (words, timing), sizes ascending, with the steps between them."""
    points = [
        Point(task, form, words, timing.median, timing.spread, size=size) for size, (words, timing) in measured.items()
    ]
    for before, point in pairwise(points):
        growth = point.extent / before.extent
        point.step = point.cost / before.cost / growth
        if growth > 1:
            point.exponent = math.log(point.cost / before.cost) / math.log(growth)
    return points


def time_openings(
    folder: Path, sizes: Sequence[int], *, labels: LabelRule, runs: int
) -> dict[str, dict[int, tuple[int, Timing]]]:
    """Make word lists in `folder` and open each twice in every round, with an empty cache and with the one this left.

    The files were just written, so the disk takes no part. The first round is not counted.
    """
    for size in sizes:
        write_word_list(folder / str(size), size)
    times: dict[str, dict[int, list[float]]] = {form: defaultdict(list) for form in OPENINGS}
    for _ in range(runs + 1):
        for size in sizes:
            with TemporaryDirectory(dir=folder) as cache:
                for form in OPENINGS:
                    start = time.perf_counter()
                    WordDataset(folder / str(size), labels=labels, transform=ResizeWord(), cache_dir=cache)
                    times[form][size].append(time.perf_counter() - start)
    return {form: {size: (size, Timing(times[form][size][1:])) for size in sizes} for form in OPENINGS}


def write_word_list(path: Path, count: int) -> None:
    """An LMDB of `count` words with different labels and the smallest image."""
    image = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes()
    with LmdbWriter(path) as writer:
        for number in range(count):
            writer.append(image, f"word{number}")


def write_rendered_words(folder: Path, count: int, render_config: str) -> None:
    """Rendered words, JPEG images in the LMDB folder/images/made and their masks in folder/masks/made."""
    from rendering import load_render_config  # the engine is only needed here
    from tools.render_words import render_words, store_words

    words = render_words(load_render_config(render_config), count, seed=0, workers=1)
    store_words(words, folder, "made", overwrite=False)


def time_workers(
    make_loader: Callable[[int], DataLoader], workers: Iterable[int], *, batches: int, runs: int
) -> dict[int, tuple[int, Timing]]:
    """Load with each number of workers once in every round: number -> (words, timing).

    Args:
        make_loader: number of workers -> an endless loader.
        batches: of one round; rounded up so that all workers make equally many.
    """
    loaders = {number: make_loader(number) for number in workers}
    times: dict[int, list[float]] = defaultdict(list)
    words: dict[int, int] = {}
    for _ in range(runs):
        for number, loader in loaders.items():
            each = max(1, number)
            seconds, words[number] = time_loading(loader, -(-batches // each) * each, skip=PREFETCHED * each)
            times[number].append(seconds)
    return {number: (words[number], Timing(times[number])) for number in loaders}


def time_loading(loader: DataLoader, batches: int, *, skip: int) -> tuple[float, int]:
    """Seconds and words of so many batches, brought into the network's form, after `skip` that wait for the workers."""
    iterator = iter(loader)
    for _ in islice(iterator, skip):
        pass
    start = time.perf_counter()
    words = sum(len(batch.inputs()[0]) for batch in islice(iterator, batches))
    return time.perf_counter() - start, words


# --- output -----------------------------------------------------------------------------------------------------------


def largest_steps(points: Iterable[Point]) -> dict[str, float]:
    """Task and form -> the largest step of the curve, of those that have one."""
    largest: dict[str, float] = {}
    for point in points:
        if point.step is not None:
            name = f"{point.task}, {point.form}"
            largest[name] = max(point.step, largest.get(name, 0.0))
    return largest


def growth_table(points: Sequence[Point]) -> list[str]:
    """Lines of Markdown: every point, then the largest step of every curve."""
    lines = ["| task | form | size | seconds | words/s | spread | exponent | x linear |", "|---|---|" + "---:|" * 6]
    for point in points:
        cells = (
            point.task,
            point.form,
            f"{point.size}",
            f"{point.seconds:.4f}",
            "" if point.form == FROM_CACHE else f"{point.rate:.1f}",
            f"{100 * point.spread:.0f} %",
            "" if point.exponent is None else f"{point.exponent:.2f}",
            "" if point.step is None else f"{point.step:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, step in largest_steps(points).items():
        verdict = "no worse than linear" if step <= MARGIN else "worse than linear"
        lines.append(f"largest step of {name}: {step:.2f} x linear, {verdict} (up to {MARGIN} counts as linear)")
    return lines


def plot_growth(points: Sequence[Point], path: Path) -> None:
    """Draw the curves of one task: cost against size beside the straight line from the first point, words a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = AXES[points[0].task]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for form in dict.fromkeys(point.form for point in points):
        curve = [point for point in points if point.form == form]
        sizes = [point.size for point in curve]
        (line,) = left.plot(sizes, [point.cost for point in curve], marker="o", label=form)
        linear = [curve[0].cost * point.extent / curve[0].extent for point in curve]
        left.plot(sizes, linear, linestyle=":", color=line.get_color(), label=f"linear from {sizes[0]}")
        if form != FROM_CACHE:
            right.plot(sizes, [point.rate for point in curve], marker="o", label=form)
    left.set(xlabel=axes.size, ylabel=axes.cost, xscale=axes.size_scale, yscale=axes.size_scale)
    right.set(xlabel=axes.size, ylabel="words a second", xscale=axes.size_scale, yscale=axes.rate_scale)
    for axis in (left, right):
        if axis.get_yscale() == "linear":
            axis.set_ylim(0, None)
        if axes.size_scale == "linear":
            axis.set_xticks([point.size for point in points])
        axis.grid(alpha=0.3)
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
