"""Measure how much accuracy depends on the background: checkpoints read the same rendered words on every kind of it.

A word has the same letters, colours and degradation on every background. Checkpoints with the same NAME count as
trainings of one network with different seeds. Their mean is reported with a 95 % interval from a bootstrap over words
and seeds, and each checkpoint also with Wilson's interval. Differences (from plain, and from the first NAME) are taken
within each bootstrap sample, so they compare the same words.

Networks that take masks are scored with each kind of --masks:
  ssn    masks predicted by the checkpoint's SSN (or by --ssn), as in use
  exact  the renderer's masks, which a perfect SSN would predict
  none   empty masks
  full   masks that call every pixel text
  other  the exact mask of another word

The output folder receives table.md, scores.csv (each checkpoint), results.json (all numbers) and plot.png.
"""

import argparse
import csv
import functools
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

import cv2
import matplotlib
import numpy as np
from scipy.stats import binomtest

from bundle import load_ssn
from engine.distributed import pick_device
from inference.segmenter import Segmenter
from loading.charset import PROTOCOLS, protocol_normalizer
from reader import Reader
from rendering import RenderConfig, RenderedWord, WordRenderer, load_render_config
from rendering.config import BACKGROUND_KINDS
from tools.support import make_parser, map_in_processes, positive, progress, seed_number, usable_cores
from utils import UserError, run_command_line, write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot

EXAMPLE = """  python tools/background_study.py --checkpoint binet=a/best-a.pth --checkpoint binet=b/best-b.pth \\
      --checkpoint abinet=c/best-c.pth --ssn ssn/best-ssn.pth --count 2000 --seed 7 --output workdir/background-study"""

MASKS = {  # kind -> name in table and plot
    "ssn": "SSN's masks",
    "exact": "exact masks",
    "none": "empty masks",
    "full": "all-text masks",
    "other": "another word's masks",
}
NO_MASKS = "-"  # for a network that takes none
PLAIN = "plain"
RESAMPLES = 2000
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Run:
    """Words that one checkpoint predicted correctly with one kind of masks: `right` is bool (kinds, words)."""

    name: str
    checkpoint: str
    masks: str
    right: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval; fractions."""

    value: float
    low: float
    high: float


# --- words ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _renderer(settings: str) -> WordRenderer:
    cv2.setNumThreads(1)  # the workers share the cores already
    return WordRenderer(RenderConfig.model_validate_json(settings))


def render_word(index: int, *, settings: str, seed: int, kinds: tuple[str, ...]) -> dict[str, RenderedWord]:
    """Return word `index` of `seed` on every kind of background; runs in a worker."""
    return _renderer(settings).render_on_backgrounds(seed, index, kinds)


def render_words(
    config: RenderConfig, count: int, *, seed: int, kinds: Sequence[str], protocol: int, max_length: int, workers: int
) -> list[dict[str, RenderedWord]]:
    """Return the first `count` words of `seed` that can be scored, each on every kind of background."""
    settings = config.model_dump_json()
    _renderer(settings)  # reports mistakes in the settings before any worker starts
    normalize = protocol_normalizer(protocol)
    render = functools.partial(render_word, settings=settings, seed=seed, kinds=tuple(kinds))
    rendered = map_in_processes(render, range(4 * count + 100), workers=workers, chunk_size=16)
    usable = (word for word in rendered if 0 < len(normalize(word[kinds[0]].text)) <= max_length)
    usable = itertools.islice(usable, count)
    words = list(progress(usable, total=count, unit="word", description="words"))
    if len(words) < count:
        raise UserError(f"only {len(words)} of {count} words can be scored; check the render settings' words")
    return words


def masks_for(words: Sequence[RenderedWord], kind: str) -> list[np.ndarray | None]:
    """Return a mask for each word, uint8 of its image's size, or None where the reader is to predict it."""
    if kind == "ssn":
        return [None] * len(words)
    if kind == "exact":
        return [word.mask for word in words]
    if kind == "other":
        following = [*words[1:], words[0]]
        return [
            cv2.resize(other.mask, (word.mask.shape[1], word.mask.shape[0]))
            for word, other in zip(words, following, strict=True)
        ]
    return [np.full_like(word.mask, 255 if kind == "full" else 0) for word in words]


def segment_words(
    words: Sequence[dict[str, RenderedWord]], kinds: Sequence[str], ssn: str, device: str | None
) -> dict[str, list[np.ndarray]]:
    """Return the masks that one SSN predicts for all words, by kind of background; all checkpoints share them."""
    network, areas = load_ssn(ssn)
    segmenter = Segmenter(network, areas, device=pick_device(name=device))
    return {kind: segmenter([word[kind].image for word in words]) for kind in kinds}


def score_checkpoint(
    name: str,
    checkpoint: str,
    words: Sequence[dict[str, RenderedWord]],
    *,
    kinds: Sequence[str],
    masks: Sequence[str],
    protocol: int,
    segmented: dict[str, list[np.ndarray]] | None = None,
    device: str | None = None,
) -> Iterator[Run]:
    """Predict all words on all backgrounds, once for each kind of masks if the network takes masks.

    `segmented` are the masks of the kind ssn, by background; with None, the checkpoint's own SSN predicts them.
    """
    normalize = protocol_normalizer(protocol)
    reader = Reader(checkpoint, device=device, masks="none", precision="fp32")
    if reader.takes_masks and "ssn" in masks and segmented is None:
        reader = Reader(checkpoint, device=device, precision="fp32")
    for mask_kind in masks if reader.takes_masks else (NO_MASKS,):
        right = np.zeros((len(kinds), len(words)), bool)
        for row, kind in enumerate(kinds):
            chosen = [word[kind] for word in words]
            if mask_kind == "ssn" and segmented is not None:
                given = segmented[kind]
            else:
                given = None if mask_kind == NO_MASKS else masks_for(chosen, mask_kind)
            predictions = reader.read([word.image for word in chosen], masks=given)
            right[row] = [
                normalize(prediction.text) == normalize(word.text)
                for prediction, word in zip(predictions, chosen, strict=True)
            ]
        yield Run(name, checkpoint, mask_kind, right)


# --- statistics -------------------------------------------------------------------------------------------------------


def wilson(right: int, count: int) -> Estimate:
    """Return a share with Wilson's 95 % interval, which is all of [0, 1] for 0 words."""
    if not count:
        return Estimate(0.0, 0.0, 1.0)
    interval = binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return Estimate(right / count, float(interval.low), float(interval.high))


def resampled_accuracies(
    groups: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[np.ndarray]:
    """Bootstrap the mean accuracies of groups of runs on the same words.

    Words and seeds are resampled with replacement. All groups and kinds share the words of a sample, so their
    differences within a sample are paired.

    Args:
        groups: bool (seeds, kinds, words) for each group: the words that its runs predicted correctly.

    Returns:
        float (resamples, kinds) for each group.
    """
    random = np.random.default_rng(seed)
    count = groups[0].shape[2]
    weights = random.multinomial(count, np.full(count, 1 / count), size=resamples) / count  # (resamples, words)
    results = []
    for right in groups:
        seeds = right.shape[0]
        by_seed = np.einsum("rw,skw->rsk", weights, right.astype(np.float64), optimize=True)
        shares = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds  # (resamples, seeds)
        results.append(np.einsum("rs,rsk->rk", shares, by_seed))
    return results


def estimate(value: float, samples: np.ndarray) -> Estimate:
    """Return a value with the percentile interval of its bootstrap samples."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def summarise(runs: Sequence[Run], kinds: Sequence[str]) -> list[dict]:
    """Return for each network and kind of masks the accuracy, its change from plain and its lead over the first row.

    Each is a list of estimates in the order of `kinds`, followed by that of the mean over the backgrounds; the mean of
    the change leaves plain out.
    """
    members: dict[tuple[str, str], list[np.ndarray]] = {}
    for run in runs:
        members.setdefault((run.name, run.masks), []).append(run.right)
    groups = [np.stack(each) for each in members.values()]
    samples = resampled_accuracies(groups)
    values = [group.mean(axis=(0, 2)) for group in groups]  # (kinds,)
    plain = kinds.index(PLAIN) if PLAIN in kinds else 0
    restless = [place for place in range(len(kinds)) if place != plain] or [plain]
    rows = []
    for (name, masks), group, value, sample in zip(members, groups, values, samples, strict=True):
        change, changes = value - value[plain], sample - sample[:, [plain]]
        lead, leads = value - values[0], sample - samples[0]
        rows.append(
            {
                "name": name,
                "masks": masks,
                "seeds": len(group),
                "accuracy": [*map(estimate, value, sample.T), estimate(value.mean(), sample.mean(1))],
                "change": [
                    *map(estimate, change, changes.T),
                    estimate(change[restless].mean(), changes[:, restless].mean(1)),
                ],
                "lead": [*map(estimate, lead, leads.T), estimate(lead.mean(), leads.mean(1))],
            }
        )
    return rows


# --- results ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[dict], kinds: Sequence[str], *, words: int) -> str:
    """Return three tables: accuracy, change from plain, lead over the first network."""
    first = label_of(rows[0])
    parts = [
        ("accuracy", f"Word accuracy, %, with 95 % intervals ({words:,} words on each background)", "mean"),
        ("change", f"Change from {PLAIN if PLAIN in kinds else kinds[0]}, points", "mean of the others"),
        ("lead", f"Lead over {first}, points", "mean"),
    ]
    blocks = []
    for field, heading, last in parts:
        if field == "lead" and len(rows) == 1:
            continue
        lines = [f"**{heading}**", "", "| network | masks | seeds | " + " | ".join([*kinds, last]) + " |"]
        lines.append("| --- | --- | ---: |" + " ---: |" * (len(kinds) + 1))
        for row in rows:
            cells = [f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in row[field]]
            lines.append(f"| {row['name']} | {row['masks']} | {row['seeds']} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def label_of(row: dict) -> str:
    """Return the name of a network together with its masks."""
    return row["name"] if row["masks"] == NO_MASKS else f"{row['name']} ({MASKS[row['masks']]})"


def scores_csv(runs: Sequence[Run], kinds: Sequence[str]) -> str:
    """Return a line for each checkpoint, kind of masks and background, with Wilson's interval; fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "checkpoint", "masks", "background", "words", "right", "accuracy", "low", "high"])
    for run in runs:
        for kind, right in zip(kinds, run.right, strict=True):
            share = wilson(int(right.sum()), right.size)
            bounds = [f"{each:.6f}" for each in (share.value, share.low, share.high)]
            writer.writerow([run.name, run.checkpoint, run.masks, kind, right.size, int(right.sum()), *bounds])
    return file.getvalue()


def draw_plot(rows: Sequence[dict], kinds: Sequence[str]) -> bytes:
    """Draw accuracy against background with error bars, one line for each network; returns a PNG."""
    figure, axes = pyplot.subplots(figsize=(1.5 * len(kinds) + 3, 4.5), layout="constrained")
    for number, row in enumerate(rows):
        estimates = row["accuracy"][: len(kinds)]
        values = np.array([100 * each.value for each in estimates])
        bounds = np.array([[100 * (e.value - e.low), 100 * (e.high - e.value)] for e in estimates]).clip(min=0).T
        places = np.arange(len(kinds)) + 0.06 * (number - (len(rows) - 1) / 2)
        axes.errorbar(places, values, yerr=bounds, marker="o", capsize=3, linewidth=1.5, label=label_of(row))
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("word accuracy, %")
    axes.set_xlabel("background of the same words")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def as_json(rows: Sequence[dict], kinds: Sequence[str], facts: dict) -> str:
    """Return all numbers together with the settings that they were measured with."""
    fields = ("accuracy", "change", "lead")
    networks = [
        {key: [vars(each) for each in value] if key in fields else value for key, value in row.items()} for row in rows
    ]
    return json.dumps({**facts, "backgrounds": list(kinds), "networks": networks}, indent=2) + "\n"


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    checkpoints = [named_checkpoint(each) for each in options.checkpoint]
    config = load_render_config(options.config, options.overrides)
    if options.photos is not None:
        config = config.model_copy(update={"photos": options.photos})
    kinds = options.backgrounds or [kind for kind in BACKGROUND_KINDS if kind != "photo" or config.photos]
    limits = {"protocol": options.protocol, "max_length": options.max_length}
    words = render_words(config, options.count, seed=options.seed, kinds=kinds, workers=options.workers, **limits)
    segmented = None
    if options.ssn is not None and "ssn" in options.masks:
        segmented = segment_words(words, kinds, options.ssn, options.device)
    runs: list[Run] = []
    for name, path in progress(checkpoints, total=len(checkpoints), unit="checkpoint", description="read"):
        runs += score_checkpoint(
            name,
            path,
            words,
            kinds=kinds,
            masks=options.masks,
            protocol=options.protocol,
            segmented=segmented,
            device=options.device,
        )
    rows = summarise(runs, kinds)
    table = markdown(rows, kinds, words=len(words))
    facts = {"words": len(words), "seed": options.seed, "protocol": options.protocol, "render": config.model_dump()}
    output = Path(options.output)
    contents = {
        "table.md": table.encode(),
        "scores.csv": scores_csv(runs, kinds).encode(),
        "results.json": as_json(rows, kinds, facts).encode(),
        "plot.png": draw_plot(rows, kinds),
    }
    for file_name, content in contents.items():
        write_atomically(output / file_name, lambda file, content=content: file.write(content))
    print(table)
    print(f"wrote {', '.join(contents)} to {output}")
    return 0


def named_checkpoint(text: str) -> tuple[str, str]:
    """Split NAME=FILE; a FILE without a name gets its own."""
    name, equals, path = text.partition("=")
    path = path if equals else text
    if not Path(path).is_file():
        raise UserError(f"--checkpoint {text}: {path} does not exist; give NAME=FILE")
    return (name if equals else Path(path).stem), path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """See `--help`."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--checkpoint", required=True, action="append", metavar="NAME=FILE", help="recogniser; repeatable"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--ssn", metavar="FILE", help="predicts the masks (default: the SSN in each checkpoint)")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["exact"], help="kinds of masks (default: exact)")
    parser.add_argument("--backgrounds", nargs="+", choices=BACKGROUND_KINDS, help="kinds of background (default: all)")
    parser.add_argument("--photos", metavar="FOLDER", help="photographs for the background `photo`")
    parser.add_argument("--count", type=positive, default=1000, help="number of words (default: %(default)s)")
    parser.add_argument(
        "--seed", type=seed_number, default=1_000_003, help="seed of the words; use none of the training data's"
    )
    parser.add_argument("--config", metavar="YAML", help="render settings (default: the renderer's own)")
    parser.add_argument(
        "--protocol", type=int, choices=PROTOCOLS, default=36, help="characters compared (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=positive, default=25, help="longest word (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument(
        "--workers", type=positive, default=usable_cores(), help="rendering processes (default: all cores)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the render settings")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_command_line(main)
