"""Statistics, tables and plots of a study of backgrounds, from the files that `background_study.py` measured.

Every number has a 95 % interval of a bootstrap over words and seeds. Rows share the words of a bootstrap sample, and
its seeds where their checkpoints are the same, so that differences are paired. A bootstrap of S seeds makes their
variance too small by (S - 1) / S; the sampled seeds are spread by the root of S / (S - 1) to make up for it. The
interval of a single seed says nothing about other seeds, and that of a cell all right or all wrong has no width.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from evaluation.tables import markdown_table
from utils import UserError, write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot

RENDERED, NO_MASKS = "rendered", "-"  # the group of rendered words; the masks of a network that takes none
CONTRASTS = ("low", "middle", "high")
MASKS = ("ssn", "exact", "none", "full", "other")
ABLATIONS = ("eroded-1", "eroded-2", "dilated-1", "dilated-2", "shifted-2", "shifted-4", "ssn-0.75", "ssn-1.5")
RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True, eq=False)
class Row:
    """A network with one kind of masks: `right` and `quality` are float (seeds, items), NaN where there is none."""

    name: str
    masks: str
    checkpoints: tuple[str, ...]
    right: np.ndarray
    quality: np.ndarray

    @property
    def label(self) -> str:
        """Return the name, with the kind of masks."""
        return self.name if self.masks == NO_MASKS else f"{self.name} ({self.masks})"


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (round(100 * each, 1) + 0.0 for each in (self.value, self.low, self.high))  # no -0.0
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class Sampled:
    """Means of some cells, (cells,), and their bootstrap samples, (RESAMPLES, cells); differences are paired."""

    values: np.ndarray
    samples: np.ndarray

    def __sub__(self, other: "Sampled") -> "Sampled":
        return Sampled(self.values - other.values, self.samples - other.samples)

    def __matmul__(self, forms: np.ndarray) -> "Sampled":
        return Sampled(self.values @ forms, self.samples @ forms)

    def estimates(self) -> list[Estimate | None]:
        """Return each value with the percentile interval of its samples; None where it was not measured."""
        bounds = np.quantile(self.samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return [
            None if np.isnan(each[0]) else Estimate(*map(float, each))
            for each in zip(self.values, *bounds, strict=True)
        ]


def bootstrap(numbers: np.ndarray, checkpoints: Sequence[str], cells: np.ndarray, stream: int = 0) -> Sampled:
    """Return the means of cells over seeds and words.

    Args:
        numbers: float (seeds, items); the checkpoints name the seeds, and those of the same names share their draws.
        cells: int (cells, words), items; a column is one word, resampled in all cells together.
        stream: cells of other words need another stream.
    """
    seeds, words = len(numbers), cells.shape[1]
    shares = np.random.default_rng([*"\0".join(checkpoints).encode()])
    shares = shares.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds  # (RESAMPLES, seeds)
    shares = 1 / seeds + (shares - 1 / seeds) * np.sqrt(seeds / max(seeds - 1, 1))
    weights = np.random.default_rng(stream).multinomial(words, np.full(words, 1 / words), size=RESAMPLES) / words
    by_seed = np.tensordot(weights, numbers[:, cells], (1, 2))  # (RESAMPLES, seeds, cells)
    return Sampled(numbers[:, cells].mean((0, 2)), np.einsum("rs,rsc->rc", shares, by_seed))


class Study:
    """What was measured: the words, and a row for each network and kind of masks."""

    def __init__(self, folder: Path) -> None:
        try:
            study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
            items = _read(folder / "items.csv")
        except FileNotFoundError as error:
            raise UserError(f"{folder}: holds no study ({error.filename} is missing); measure one first") from error
        self.settings = study["settings"]
        members: dict[tuple[str, str], list[tuple[str, np.ndarray]]] = {}
        for table in filter(None, map(_read, sorted((folder / "predictions").glob("*.csv")))):
            numbers = np.full((2, len(items)), np.nan)
            for each in table:
                numbers[:, int(each["item"])] = float(each["right"]), float(each["quality"] or "nan")
            members.setdefault((table[0]["name"], table[0]["masks"]), []).append((table[0]["checkpoint"], numbers))
        if not members:
            raise UserError(f"{folder}: no checkpoint has been measured yet")
        order = [each.partition("=")[0] for each in study["checkpoints"]]
        kinds = (NO_MASKS, *MASKS, *ABLATIONS)
        self.rows = []
        for (name, masks), runs in sorted(members.items(), key=lambda e: (order.index(e[0][0]), kinds.index(e[0][1]))):
            right, quality = np.stack([numbers for _, numbers in runs], 1)
            self.rows.append(Row(name, masks, tuple(checkpoint for checkpoint, _ in runs), right, quality))
        self.backgrounds = self.settings["backgrounds"]
        rendered = [place for place, item in enumerate(items) if item["group"] == RENDERED]
        self.rendered = np.reshape(rendered, (len(CONTRASTS) * len(self.backgrounds), -1))  # as they are sorted
        self.complexity = np.array([float(item["complexity"]) for item in items])
        real = np.array([place for place, item in enumerate(items) if item["group"] != RENDERED], int)
        by_complexity = real[np.argsort(self.complexity[real], kind="stable")]
        self.quartiles = np.array_split(by_complexity, 4) if len(real) > 3 else []

    def on_rendered(self, row: Row, *, quality: bool = False) -> Sampled:
        """Return accuracy, or quality of the masks, by contrast and background, background changing first."""
        return bootstrap(row.quality if quality else row.right, row.checkpoints, self.rendered)

    def on_real(self, row: Row) -> Sampled:
        """Return accuracy on the quartiles of real words, their mean, and by how much it grows from first to last."""
        each = [bootstrap(row.right, row.checkpoints, q[None], stream=i) for i, q in enumerate(self.quartiles, 1)]
        values, samples = np.concatenate([e.values for e in each]), np.concatenate([e.samples for e in each], 1)
        return Sampled(values, samples) @ np.column_stack([np.eye(4), np.full(4, 1 / 4), [-1, 0, 0, 1]])

    def baseline(self, name: str | None) -> Row | None:
        """Return the row that differences are from: without masks, else network `name` with SSN's, else with none."""
        rows = [row for row in self.rows if name in (None, row.name)]
        if not rows:
            raise UserError(f"--baseline {name}: no such network; there are {', '.join({r.name for r in self.rows})}")
        kinds = (NO_MASKS, "none") if name is None else (NO_MASKS, "ssn", "none")
        found = next((row for kind in kinds for row in rows if row.masks == kind), None)
        if name and not found:
            raise UserError(f"--baseline {name}: measured only with the masks {', '.join(row.masks for row in rows)}")
        return found


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_tables(study: Study, baseline: Row | None) -> dict[str, dict]:
    """Return by key: title, columns, and rows of (Row, estimates)."""
    kinds, tables = study.backgrounds, {}
    rows = [row for row in study.rows if row.masks not in ABLATIONS]
    others = [row for row in rows if row is not baseline] if baseline else []
    count = len(kinds)
    first, mean = np.eye(count)[0], np.full(count, 1 / count)
    growth = (1 - first) / max(count - 1, 1) - first  # from the first background to the mean of the others
    forms = np.column_stack([np.eye(count), mean, growth])  # (backgrounds, columns)
    columns = [*kinds, "mean", f"others minus {kinds[0]}"]

    def add(key: str, title: str, columns: Sequence[str], content: dict) -> None:
        if content:
            tables[key] = {"title": title, "columns": list(columns), "rows": [*content.items()]}

    accuracy = {row: study.on_rendered(row) for row in rows}
    for number, contrast in enumerate(CONTRASTS):
        at_contrast = np.kron(np.eye(len(CONTRASTS))[:, [number]], forms)  # (contrasts * backgrounds, columns)
        estimates = {row: (each @ at_contrast).estimates() for row, each in accuracy.items()}
        title = f"Accuracy on rendered words, {contrast} contrast, % ({study.rendered.shape[1]:,} words)"
        add(f"accuracy_{contrast}", title, columns, estimates)
    average = np.full((len(CONTRASTS), 1), 1 / len(CONTRASTS))
    means = {row: each @ np.kron(average, forms) for row, each in accuracy.items()}
    add("accuracy", "Mean of the contrasts, %", columns, {row: each.estimates() for row, each in means.items()})
    content = {row: (means[row] - means[baseline]).estimates() for row in others}
    add("difference", f"Difference from {baseline and baseline.label}, mean of the contrasts, points", columns, content)
    if study.quartiles:
        edges = [f"{study.complexity[each].max():.4f}" for each in study.quartiles]
        columns = [*(f"Q{i + 1} (to {edge})" for i, edge in enumerate(edges)), "mean", "Q4 minus Q1"]
        real = {row: study.on_real(row) for row in rows if row.masks != "exact"}
        title = f"real words by complexity of the background ({sum(map(len, study.quartiles)):,} words)"
        add("real", f"Accuracy on {title}, %", columns, {row: each.estimates() for row, each in real.items()})
        content = {row: (each - real[baseline]).estimates() for row, each in real.items() if row in others}
        add("real_difference", f"Difference from {baseline and baseline.label} on {title}, points", columns, content)
    content, mean = {}, np.full((len(study.rendered), 1), 1 / len(study.rendered))
    for row in [row for row in study.rows if row.masks != NO_MASKS]:
        own = {each.masks: each for each in study.rows if each.name == row.name}
        content[row] = (study.on_rendered(row, quality=True) @ mean).estimates()
        measures = [("exact", lambda each: study.on_rendered(each) @ mean)]
        if study.quartiles:
            measures.append(("ssn", lambda each: study.on_real(each) @ np.eye(6)[:, [4]]))
        for best, measure in measures:
            accuracy = measure(row)
            change = (accuracy - measure(own[best])).estimates() if best in own else [None]
            content[row] += accuracy.estimates() + change
    columns = ["quality (IoU)", "rendered words", "minus exact masks", "real words", "minus SSN's masks"]
    add("masks", "Accuracy by masks, %, means over all words", columns[: 5 if study.quartiles else 3], content)
    return tables


def markdown(tables: dict[str, dict]) -> str:
    """Return the tables, values with 95 % intervals."""
    blocks = []
    for table in tables.values():
        lines = [["network", "masks", "seeds", *table["columns"]]]
        for row, cells in table["rows"]:
            lines.append([row.name, row.masks, len(row.checkpoints), *("" if cell is None else cell for cell in cells)])
        blocks.append(f"**{table['title']}**\n\n{markdown_table(lines, left=2)}")
    return "\n\n".join(blocks) + "\n"


def results_json(study: Study, tables: dict[str, dict]) -> str:
    """Return the settings and all numbers of the tables, fractions, each with its interval; null: not measured."""
    content: dict = {"settings": study.settings, "tables": {}}
    for key, table in tables.items():
        rows = [
            {
                "name": row.name,
                "masks": row.masks,
                "checkpoints": row.checkpoints,
                "cells": [e and vars(e) for e in cells],
            }
            for row, cells in table["rows"]
        ]
        content["tables"][key] = {"title": table["title"], "columns": table["columns"], "rows": rows}
    return json.dumps(content, indent=2) + "\n"


def _draw(axes: pyplot.Axes, places: np.ndarray, cells: Sequence[Estimate], label: str, **style: object) -> None:
    """Draw estimates, in percent, with their intervals."""
    values = 100 * np.array([[cell.value, cell.value - cell.low, cell.high - cell.value] for cell in cells])
    axes.errorbar(places, values[:, 0], yerr=values[:, 1:].clip(0).T, capsize=3, elinewidth=1, label=label, **style)


def draw_plots(study: Study, tables: dict[str, dict]) -> dict[str, pyplot.Figure]:
    """Return figures by file name: accuracy by contrast, differences by complexity, accuracy by mask quality."""

    def drawn(key: str) -> list[tuple[Row, list[Estimate]]]:
        rows = tables[key]["rows"] if key in tables else []
        return [pair for pair in rows if pair[0].masks in (NO_MASKS, "ssn", "exact")] or rows

    kinds, figures = study.backgrounds, {}
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(2.4 * len(kinds) + 1, 4), sharey=True, layout="constrained", squeeze=False
    )
    by_contrast = [drawn(f"accuracy_{contrast}") for contrast in CONTRASTS]
    for number, (axes, kind) in enumerate(zip(panels[0], kinds, strict=True)):
        for line, row in enumerate(row for row, _ in by_contrast[0]):
            places = np.arange(len(CONTRASTS)) + 0.06 * line
            _draw(axes, places, [rows[line][1][number] for rows in by_contrast], row.label, marker="o")
        axes.set(title=kind, xlabel="contrast", xticks=range(len(CONTRASTS)), xticklabels=CONTRASTS)
    panels[0, 0].set_ylabel("word accuracy, %")
    figures["accuracy_by_contrast.png"] = figure
    if drawn("real_difference"):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for line, (row, cells) in enumerate(drawn("real_difference")):
            _draw(axes, np.arange(4) + 0.06 * line, cells[:4], row.label, marker="o")
        axes.axhline(0, color="grey", linewidth=1)
        title = tables["real_difference"]["title"]
        axes.set(xlabel="complexity of the background, quartiles of real words", xticks=range(4))
        axes.set(xticklabels=tables["real_difference"]["columns"][:4], ylabel=f"{title.partition(' on ')[0]}, points")
        figures["difference_by_complexity.png"] = figure
    points = [(row, cells) for row, cells in tables.get("masks", {"rows": []})["rows"] if cells[0]]
    if points:
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        for number, name in enumerate(dict.fromkeys(row.name for row, _ in points)):
            of_one = [(row.masks, cells) for row, cells in points if row.name == name]
            quality = 100 * np.array([[c[0].value, c[0].value - c[0].low, c[0].high - c[0].value] for _, c in of_one])
            style = {"linestyle": "none", "marker": "o", "color": f"C{number}", "xerr": quality[:, 1:].clip(0).T}
            _draw(axes, quality[:, 0], [cells[1] for _, cells in of_one], name, **style)
            for place, (masks, cells) in enumerate(sorted(of_one, key=lambda each: each[1][0].value)):
                offset = ((5, 5), (-5, -11), (5, -11), (-5, 5))[(place - number) % 4]  # neighbours on other sides
                style = {"fontsize": 8, "color": f"C{number}", "ha": "left" if offset[0] > 0 else "right"}
                point = 100 * cells[0].value, 100 * cells[1].value
                axes.annotate(masks, point, xytext=offset, textcoords="offset points", **style)
        place = tables["accuracy"]["columns"].index("mean")
        to_beat = [(row.label, cells[place]) for row, cells in tables["accuracy"]["rows"] if row.masks == NO_MASKS]
        for number, (label, mean) in enumerate(to_beat):
            axes.axhline(100 * mean.value, linestyle="--", linewidth=1, color=f"C{9 - number}", label=label)
            axes.axhspan(100 * mean.low, 100 * mean.high, color=f"C{9 - number}", alpha=0.15, linewidth=0)
        axes.set(
            xlabel="overlap of the masks with the exact ones (IoU), %", ylabel="word accuracy on rendered words, %"
        )
        figures["accuracy_by_mask_quality.png"] = figure
    for figure in figures.values():
        for axes in figure.axes:
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[-1].legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figures


def write_report(folder: Path, baseline: str | None = None) -> str:
    """Write table.md, results.json and the plots into the folder of a study; returns the tables.

    Raises:
        UserError: nothing has been measured there, or there is no network `baseline`.
    """
    study = Study(folder)
    tables = make_tables(study, study.baseline(baseline))
    table = markdown(tables)
    write_atomically(folder / "table.md", table)
    write_atomically(folder / "results.json", results_json(study, tables))
    for name, figure in draw_plots(study, tables).items():
        write_atomically(folder / name, lambda file, figure=figure: figure.savefig(file, dpi=150, format="png"))
        pyplot.close(figure)
    return table
