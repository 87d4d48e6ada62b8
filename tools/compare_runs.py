"""Compare two evaluations word by word: is B better than A, by how much, and on which words?

A and B are work folders of `main.py --phase test` on the same words. For each data set and for all words together: the
accuracies, the difference B - A with its 95 % interval (paired, Bonett and Price 2012), the words that only one of them
predicts correctly, and the p-value of McNemar's exact test. An HTML page in B's report shows every word that flipped.
"""

import argparse
import base64
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np
from scipy.stats import binomtest, norm

from evaluation.report import MARGIN, render_page
from evaluation.tables import markdown_table
from loading.charset import PROTOCOLS, Charset
from tools.support import make_parser
from utils import UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/compare_runs.py workdir/train-abinet workdir/train
  python tools/compare_runs.py workdir/train workdir/train --model_eval vision alignment"""

LEVEL = norm.ppf(0.975)  # of a 95 % interval


@dataclass(frozen=True)
class TestedRun:
    """What a test left in its work folder: data set -> (label, prediction) of each word, in order."""

    folder: Path
    model_eval: str
    protocol: Charset
    words: dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Flip:
    """A word that one of two evaluations gets right and the other wrong; `image` is a data URI, or empty."""

    dataset: str
    label: str
    first: str
    second: str
    gained: bool
    image: str = ""


@dataclass(frozen=True)
class Comparison:
    """One line of the table: counts of words, and what follows from them."""

    name: str
    words: int
    right: tuple[int, int]
    lost: int  # only A reads them right
    gained: int  # only B does

    @property
    def accuracies(self) -> tuple[float, float]:
        return self.right[0] / self.words, self.right[1] / self.words

    @property
    def difference(self) -> float:
        """Return the accuracy of B minus that of A."""
        return (self.gained - self.lost) / self.words

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the difference between paired shares (Bonett and Price, 2012)."""
        gained, lost = (self.gained + 1) / (self.words + 2), (self.lost + 1) / (self.words + 2)
        half = LEVEL * np.sqrt((gained + lost - (gained - lost) ** 2) / (self.words + 2))
        return max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)

    @property
    def p_value(self) -> float:
        """Return the p-value of McNemar's exact test: the chance of flips as uneven if both are equally good."""
        flips = self.gained + self.lost
        return binomtest(self.gained, flips).pvalue if flips else 1.0


def load_evaluation(folder: Path, model_eval: str | None = None) -> TestedRun:
    """Read the scores and predictions of a test.

    Args:
        model_eval: sub-model; None takes the one that was tested last.

    Raises:
        UserError: there is no test of it in the folder, or a file is damaged.
    """
    path = folder / ("metrics.json" if model_eval is None else f"metrics-{model_eval}.json")
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        model_eval, datasets = scores["model_eval"], scores["datasets"]
        # Older tests have the number only.
        protocol = Charset(scores.get("characters") or PROTOCOLS[scores["protocol"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        test = "--phase test" + (f" --model_eval {model_eval}" if model_eval else "")
        raise UserError(f"{path}: no scores of recognised words; run main.py {test} first") from error
    words = {}
    for name in datasets:
        path = folder / f"{name}-{model_eval}" / f"{model_eval}.txt"
        try:
            lines = path.read_bytes().decode("utf-8").split("\n")[:-1]  # labels may hold other ends of lines
            words[name] = [(label, text) for label, text in (line.split("\t") for line in lines)]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: missing or damaged; run main.py --phase test again") from error
    return TestedRun(folder, model_eval, protocol, words)


def check_same_words(first: TestedRun, second: TestedRun) -> None:
    """Raise `UserError` where two evaluations are not of the same words."""
    for name in sorted({*first.words, *second.words}):
        labels = [[label for label, _ in each.words.get(name, [])] for each in (first, second)]
        if labels[0] != labels[1]:
            raise UserError(f"{first.folder} and {second.folder}: other words in {name}; test both on the same sets")


def compare(
    first: TestedRun, second: TestedRun, protocol: Charset, images: dict[str, list[tuple[str, str]]]
) -> tuple[list[Comparison], list[Flip]]:
    """Return a row for each data set, for several one for all words too, and the words that flipped, in order.

    Args:
        protocol: characters that count; words of which nothing counts are left out.
        images: those of a report, as `report_images` gives them.
    """
    normalize = protocol.normalize
    rows, flips = [], []
    for name in first.words:
        pairs = zip(first.words[name], second.words[name], strict=True)
        words = [(label, here, there) for (label, here), (_, there) in pairs if normalize(label)]
        right = [[normalize(each[i]) == normalize(each[0]) for each in words] for i in (1, 2)]
        seen = images.get(name, [])
        if [label for label, _ in seen] != [label for label, *_ in words]:  # the report is of another test
            seen = [("", "")] * len(words)
        changed = [
            Flip(name, *word, gained=after, image=image)
            for word, before, after, (_, image) in zip(words, *right, seen, strict=True)
            if before != after
        ]
        gained = sum(each.gained for each in changed)
        rows.append(Comparison(name, len(words), (sum(right[0]), sum(right[1])), len(changed) - gained, gained))
        flips += changed
    rows = [row for row in rows if row.words]
    if not rows:
        raise UserError(f"{first.folder}: no word has one of the {len(protocol)} characters that are compared")
    if len(rows) > 1:
        sums = [sum(column) for column in zip(*((r.words, *r.right, r.lost, r.gained) for r in rows), strict=True)]
        rows.append(Comparison("all words", sums[0], (sums[1], sums[2]), sums[3], sums[4]))
    return rows, flips


def format_rows(rows: Sequence[Comparison]) -> str:
    """Return the rows for the terminal."""
    lines = [("data set", "words", "A %", "B %", "B - A", "95 % interval", "only A", "only B", "p")]
    for row in rows:
        low, high = row.interval
        accuracies = [f"{100 * each:.2f}" for each in row.accuracies]
        difference = f"{100 * row.difference:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}"
        lines.append((row.name, row.words, *accuracies, *difference, row.lost, row.gained, shown_p(row)))
    return markdown_table(lines)


def shown_p(row: Comparison) -> str:
    """Return the p-value as people write it."""
    return f"{row.p_value:.3f}" if row.p_value >= 0.001 else f"{row.p_value:.0e}"


def verdict(row: Comparison) -> str:
    """Return what the test says, in a sentence."""
    if row.p_value >= 0.05:
        return "The difference may be due to chance (p ≥ 0.05)."
    return f"{'B' if row.difference > 0 else 'A'} is better (p {'< 0.001' if row.p_value < 0.001 else '< 0.05'})."


def report_images(report: Path) -> dict[str, list[tuple[str, str]]]:
    """Return data set -> (label, image as a data URI) of each word in a report, in order; empty where there is none."""
    found: dict[str, list[tuple[str, str]]] = {}
    try:
        text = (report / "index.html").read_text(encoding="utf-8")
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
        height, width = data["layout"]["height"], data["layout"]["width"]
        sheets: dict[int, np.ndarray | None] = {}
        for dataset, _number, label, *_, sprite, row, _vision, _language, _alignment, _confusions in data["words"]:
            if sprite not in sheets:
                sheets[sprite] = cv2.imread(str(report / "images" / f"words-{data['sprites'][sprite]}.jpg"))
            top = row * (height + 2 * MARGIN) + MARGIN
            tile = sheets[sprite][top : top + height, MARGIN : MARGIN + width]
            encoded = base64.b64encode(cv2.imencode(".jpg", tile)[1]).decode()
            found.setdefault(data["datasets"][dataset], []).append((label, f"data:image/jpeg;base64,{encoded}"))
    except (OSError, TypeError, KeyError, ValueError, IndexError, cv2.error):  # no report, or an older one
        return {}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    scored = (options.model_eval or [None]) * 2
    first = load_evaluation(Path(options.first), scored[0])
    second = load_evaluation(Path(options.second), scored[1])
    check_same_words(first, second)
    if options.protocol is None and {*first.protocol.characters} != {*second.protocol.characters}:
        protocols = f"{len(first.protocol)} and {len(second.protocol)} different characters"
        raise UserError(f"{first.folder} and {second.folder}: scored on {protocols}; choose with --protocol")
    protocol = Charset(PROTOCOLS[options.protocol]) if options.protocol else first.protocol
    images = report_images(second.folder / "report") or report_images(first.folder / "report")
    rows, flips = compare(first, second, protocol, images)
    sides = {name: f"{each.folder} ({each.model_eval})" for name, each in (("A", first), ("B", second))}
    bound = max(abs(each) for row in rows for each in row.interval)
    page = render_page(
        "compare.html.j2",
        title=f"{sides['B']} against {sides['A']}",
        rows=rows,
        bound=bound,
        flips=[
            (f"Correct only in {side}", [each for each in flips if each.gained == gained])
            for side, gained in (("B", True), ("A", False))
        ],
        sides=sides,
        protocol=len(protocol),
        verdict=verdict(rows[-1]),
        shown_p=shown_p,
    )
    default = second.folder / "report" / f"compare-{first.folder.resolve().name}-{first.model_eval}.html"
    output = Path(options.output or default)
    write_atomically(output, page)
    print(*(f"{name} = {side}" for name, side in sides.items()), "", format_rows(rows), "", verdict(rows[-1]), sep="\n")
    print(f"\nthe words that only one of them gets right, with images: {output}")
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("first", metavar="A", help="work folder of a test")
    parser.add_argument("second", metavar="B", help="work folder of another test, of the same words")
    parser.add_argument("--model_eval", nargs="+", metavar="NAME", help="sub-model, or A's and B's (default: the last)")
    parser.add_argument("--protocol", type=int, choices=PROTOCOLS, help="characters that count (default: the tests')")
    parser.add_argument("--output", metavar="FILE", help="HTML page (default: B/report/compare-A-MODEL_EVAL.html)")
    options = parser.parse_args(arguments)
    if options.model_eval and len(options.model_eval) > 2:
        parser.error("--model_eval takes one or two names")
    return options


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    run_command_line(main)
