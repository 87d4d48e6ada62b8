"""Make the language model's training and validation words from text corpora, or from a word-frequency list.

Both outputs are tab-separated with the columns `inp` and `gt` (the same word twice: dataset.use_sm makes misspellings
during training). No word of one output is in the other, in upper or lower case.
"""

import functools
import hashlib
import itertools
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from evaluation.tables import csv_text
from loading.charset import Charset
from tools.support import RejectionLog, make_parser, positive, print_summary, progress, refuse_existing, seed_number
from utils import UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/create_language_data.py data/language_train.csv data/language_test.csv
  python tools/create_language_data.py data/WikiText-103.csv data/WikiText-103_eval_d1.csv --corpus wikitext-103/
  python tools/create_language_data.py train.csv test.csv --corpus words.txt --temperature inf"""

DEFAULT_COUNT = 1_000_000  # rows drawn from the word-frequency list
CORPUS_SUFFIXES = (".txt", ".tokens", ".raw")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zip")
MARKERS = frozenset({"<unk>", "<eos>", "<pad>", "@-@", "@,@", "@.@"})  # of WikiText
APOSTROPHES = "'\u2019\u02bc"
COMMON_WORDS = 1000  # stay in training: `the` missing there would cost more than it could measure in validation
NUMBERS_PER_SHAPE = 200
VALIDATION_SHARE = 0.05  # of the distinct words

_FOREIGN = "\0"  # marks a letter or digit that the charset lacks
_NOT_UTF8 = "\ufffd"  # stands for bytes that are no UTF-8


class WordRule:
    """Tells which words are kept: those of the charset's characters. Training leaves out those that are too long."""

    def __init__(self, charset: Charset) -> None:
        self.charset = charset
        self._normalize = functools.cache(self._normalized)

    def words(self, token: str) -> tuple[list[str], str]:
        """Return the words in `token` as the charset writes them, and the reason why there are none.

        A sign that the charset lacks separates words (`well-known` is two), an apostrophe is left out (`don't` is
        `dont`), a letter or digit that it lacks rejects the whole token: the rest would not be a word.
        """
        if token in MARKERS:
            return [], "marker"
        text = "".join(map(self._normalize, token))
        if _FOREIGN in text:
            return [], "outside the charset"
        words = text.split()
        return words, "" if words else "no letter or digit"

    def _normalized(self, character: str) -> str:
        if character.isalnum() or character == _NOT_UTF8:
            return self.charset.normalize(character) or _FOREIGN
        return self.charset.normalize(character) or ("" if character in APOSTROPHES else " ")


def find_corpora(paths: Iterable[str]) -> list[Path]:
    """Return the files that `paths` name; of a folder, every text file below it. Raises UserError if there is none."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; --corpus names text files or folders")
        texts = (each for each in path.rglob("*") if each.suffix in CORPUS_SUFFIXES and each.is_file())
        found = sorted(texts) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: holds no {', '.join(CORPUS_SUFFIXES)} file; name the corpus files")
        files += found
    return files


def read_corpora(files: list[Path]) -> Counter[str]:
    """Count the tokens (separated by white space) of UTF-8 text files.

    Lines that begin with # before the first other line are a header.
    """
    tokens: Counter[str] = Counter()
    for path in progress(files, total=len(files), unit="file", description="corpora"):
        try:
            with open(path, encoding="utf-8", errors="replace") as lines:
                for line in itertools.dropwhile(lambda line: line.startswith("#"), lines):
                    if "\0" in line or path.suffix in PACKED_SUFFIXES:
                        raise UserError(f"{path}: is not a UTF-8 text; unpack it first, or convert it")
                    tokens.update(line.split())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
    return tokens


def frequency_list(seed: int) -> dict[str, float]:
    """Return the English words of the installed word-frequency list with their frequencies.

    The list has only the shapes of long numbers (`0000` stands for all of four digits); a shape is filled with random
    digits here, NUMBERS_PER_SHAPE times if it has digits only, else once.
    """
    import wordfreq  # takes a second

    words = dict(wordfreq.get_frequency_dict("en", wordlist="best"))
    generator = random.Random(seed)
    for shape in sorted(word for word in words if "00" in word):
        frequency = words.pop(shape)
        fillings = NUMBERS_PER_SHAPE if shape.isdigit() else 1
        for _ in range(fillings):
            number = "".join(generator.choice("0123456789") if c == "0" else c for c in shape)
            words[number] = words.get(number, 0) + frequency / fillings
    return words


def select_words(tokens: dict[str, float], rule: WordRule, log: RejectionLog) -> dict[str, float]:
    """Return the words that `rule` finds in `tokens` with their summed frequencies, sorted by word."""
    words: Counter[str] = Counter()
    for token, frequency in progress(tokens.items(), total=len(tokens), unit="token", description="words"):
        found, reason = rule.words(token)
        if not found:
            log.add(token, reason, f"frequency {frequency:g}")
        for word in found:
            words[word] += frequency
    if not words:
        raise UserError("no usable word in the input; check --corpus and --charset")
    return dict(sorted(words.items()))


def split_words(words: dict[str, float], share: float, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Split `words` into training and validation words; forms of a word that differ in case stay together.

    `share` of the distinct words go to validation, never the COMMON_WORDS most frequent (or a tenth, of few words). The
    choice depends on the word and the seed only, so that a larger corpus keeps the split of a smaller one.
    """
    groups: Counter[str] = Counter()
    for word, frequency in words.items():
        groups[word.lower()] += frequency
    common = {word for word, _ in groups.most_common(min(COMMON_WORDS, len(groups) // 10))}

    def is_held_back(word: str) -> bool:
        digest = hashlib.blake2b(f"{seed}:{word}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    validation = {group for group in groups if group not in common and is_held_back(group)}
    training_words = {word: frequency for word, frequency in words.items() if word.lower() not in validation}
    validation_words = {word: frequency for word, frequency in words.items() if word.lower() in validation}
    return training_words, validation_words


def draw_rows(words: dict[str, float], count: int, temperature: float, seed: int) -> list[str]:
    """Draw `count` words in random order, each in proportion to frequency ** (1 / temperature), to within one row.

    Systematic sampling: with a count equal to the sum of whole frequencies each word comes exactly as often as it did,
    and with equal frequencies no word comes a second time before each has come once.
    """
    if not words or count == 0:
        return []
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(words))
    weights = np.fromiter(words.values(), np.float64, len(words))[order] ** (1 / temperature)
    edges = np.cumsum(weights)
    if not 0 < edges[-1] < np.inf:
        raise UserError(f"--temperature {temperature:g}: is too small for these frequencies; 1 takes them as they are")
    edges = np.floor(edges * (count / edges[-1]) + generator.uniform(0.01, 0.99)).astype(np.int64)
    edges[-1] = count
    repeats = np.diff(edges, prepend=0)
    rows = np.repeat(order, repeats)
    generator.shuffle(rows)
    names = list(words)
    return [names[row] for row in rows]


def write_rows(path: str | os.PathLike, rows: list[str]) -> None:
    """Write the language CSV, all of it or nothing."""
    write_atomically(Path(path), csv_text([("inp", "gt"), *zip(rows, rows, strict=True)], delimiter="\t"))


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("train", metavar="TRAIN_CSV", help="file to make")
    parser.add_argument("validation", metavar="VALIDATION_CSV", help="file to make")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="PATH", help="UTF-8 text files, or folders of them")
    parser.add_argument("--charset", default="data/charset_36.txt", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 keeps frequencies, inf ignores them (1)")
    rows = f"rows in all (default: those of the corpus, or {DEFAULT_COUNT}; at temperature inf each word once)"
    parser.add_argument("--count", type=positive, help=rows)
    parser.add_argument("--seed", type=seed_number, default=0, help="same seed, same files (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the outputs when they exist")
    options = parser.parse_args(arguments)
    refuse_existing(options.train, options.validation, overwrite=options.overwrite)
    if os.path.abspath(options.train) == os.path.abspath(options.validation):
        raise UserError(f"{options.train}: named for training and validation; give two files")
    if not options.temperature > 0:
        raise UserError(f"--temperature {options.temperature:g}: is not above 0; 1 keeps frequencies")
    rule = WordRule(Charset.from_file(options.charset))
    if rule.charset.has_upper_case and not options.corpus:
        raise UserError(f"--charset {options.charset}: the word-frequency list has lower case only; name a --corpus")
    temperature, count = options.temperature, options.count
    with RejectionLog.beside(os.path.splitext(options.train)[0]) as log:
        tokens = read_corpora(find_corpora(options.corpus)) if options.corpus else frequency_list(options.seed)
        words = select_words(tokens, rule, log)
        if not options.corpus and not math.isinf(temperature):
            count = count or DEFAULT_COUNT
        parts = split_words(words, VALIDATION_SHARE, options.seed)
        if count is not None:
            held_back = round(count * len(parts[1]) / len(words))
            sizes = [count - held_back, held_back]
        elif math.isinf(temperature):
            sizes = [len(part) for part in parts]
        else:
            sizes = [int(sum(part.values())) for part in parts]
        rows = [draw_rows(part, size, temperature, options.seed) for part, size in zip(parts, sizes, strict=True)]
        write_rows(options.train, rows[0])
        write_rows(options.validation, rows[1])
    counts = {"distinct words": len(words)}
    for name, part in zip(("training", "validation"), rows, strict=True):
        counts |= {f"{name} rows": len(part), f"{name} words": len(set(part))}
    print_summary(f"wrote {options.train} and {options.validation}", counts, log)
    return 0


if __name__ == "__main__":
    run_command_line(main)
