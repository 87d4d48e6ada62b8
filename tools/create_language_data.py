"""Make the language model's training and validation words from text corpora, or from a word-frequency list.

Both outputs are tab-separated with the columns `inp` and `gt` (the same word twice: misspellings are made while
training, by dataset.use_sm). No word of one output is in the other, in upper or lower case.
"""

import bz2
import csv
import functools
import gzip
import hashlib
import lzma
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

from loading.charset import Charset
from tools.support import RejectionLog, make_parser, positive, print_summary, progress, seed_number
from utils import UserError, run_command_line

EXAMPLE = """  python tools/create_language_data.py data/language_train.csv data/language_test.csv
  python tools/create_language_data.py data/WikiText-103.csv data/WikiText-103_eval_d1.csv --corpus wikitext-103/
  python tools/create_language_data.py train.csv test.csv --corpus words.txt --flatten --charset data/charset_62.txt"""

DEFAULT_COUNT = 1_000_000  # rows drawn from the word-frequency list, which has no number of its own
CORPUS_SUFFIXES = (".txt", ".tokens", ".raw", ".gz", ".bz2", ".xz")
MARKERS = frozenset({"<unk>", "<eos>", "<pad>", "@-@", "@,@", "@.@"})  # of WikiText
APOSTROPHES = "'\u2019\u02bc"
COMMON_WORDS = 1000  # stay in training: `the` missing there would cost more than it could measure in validation
NUMBERS_PER_SHAPE = 200
CASE_SHARES = (0.5, 0.25, 0.25)  # lower, Capitalised, UPPER, for word lists that know lower case only

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_FOREIGN = "\0"  # marks a letter or digit that the charset lacks
_LINE_LIMIT = 1 << 20  # bytes; a corpus without line ends is read in pieces


class _CharacterTable(dict):
    """For `str.translate`: what becomes of each character, worked out when it is first met."""

    def __init__(self, charset: Charset) -> None:
        self._charset = charset

    def __missing__(self, code: int) -> str:
        character = chr(code)
        foreign = _FOREIGN if character.isalnum() else "" if character in APOSTROPHES else " "
        self[code] = self._charset.normalize(character) or foreign
        return self[code]


@dataclass(frozen=True)
class WordRule:
    """Which words are kept: characters of `charset`, and a length in characters from `shortest` to `longest`."""

    charset: Charset
    shortest: int = 1
    longest: int = 25

    @functools.cached_property
    def _table(self) -> _CharacterTable:
        return _CharacterTable(self.charset)

    def words(self, token: str) -> tuple[list[str], str]:
        """The words in `token` as the charset writes them, and the reason why there are none.

        A sign that the charset lacks parts words (`well-known` is two), an apostrophe is left out (`don't` is `dont`),
        a letter or digit that it lacks rejects the whole token: what is left of it would be no word.
        """
        if token in MARKERS:
            return [], "marker"
        text = token.translate(self._table)
        if _FOREIGN in text:
            return [], "outside the charset"
        words = text.split()
        if not words:
            return [], "no letter or digit"
        fitting = [word for word in words if self.shortest <= len(word) <= self.longest]
        if fitting:
            return fitting, ""
        return [], "too long" if max(map(len, words)) > self.longest else "too short"


def find_corpora(paths: Iterable[str]) -> list[Path]:
    """The files that `paths` name; of a folder, every text file below it, sorted. Raises UserError if there is none."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in CORPUS_SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"{path}: holds no {', '.join(CORPUS_SUFFIXES)} file; name the corpus files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; --corpus names text files or folders of them")
    return files


def read_corpora(files: list[Path], log: RejectionLog) -> Counter[str]:
    """Count the tokens (parted by white space) of UTF-8 text files; lines that are not UTF-8 go to `log`.

    Lines that begin with # before the first other line are a header. Files may be packed (.gz, .bz2, .xz).
    """
    tokens: Counter[str] = Counter()
    bar = progress((), total=sum(file.stat().st_size for file in files), unit="B", description="corpora")
    for path in files:
        header = True
        for number, line in enumerate(_lines(path, bar), start=1):
            header = header and line.startswith(b"#")
            if header:
                continue
            try:
                tokens.update(line.decode("utf-8").split())
            except UnicodeDecodeError as error:
                log.add(f"{path}:{number}", "line is not UTF-8", str(error.reason))
    bar.close()
    return tokens


def _lines(path: Path, bar: tqdm) -> Iterator[bytes]:
    """The lines of a file, packed or not; `bar` follows the position in the file as it lies on the disk."""
    position = 0
    try:
        with open(path, "rb") as raw:
            opener = _OPENERS.get(path.suffix)
            text: BinaryIO = opener(raw) if opener else raw
            rest = b""
            while line := text.readline(_LINE_LIMIT):
                line, rest = _whole_words(rest + line)
                yield line
                if raw.tell() != position:
                    bar.update(raw.tell() - position)
                    position = raw.tell()
            if rest:
                yield rest
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or unpack it again") from error


def _whole_words(line: bytes) -> tuple[bytes, bytes]:
    """A piece of a line that is too long to hold, up to its last blank, and what follows; a whole line stays whole."""
    if line.endswith(b"\n") or len(line) < _LINE_LIMIT:
        return line, b""
    cut = max(line.rfind(blank) for blank in (b" ", b"\t", b"\r")) + 1
    return (line[:cut], line[cut:]) if cut else (line, b"")


def frequency_list(language: str, seed: int) -> dict[str, float]:
    """Words of the installed word-frequency list with their frequencies.

    The list knows long numbers by their shape only (`0000` stands for all of four digits); a shape is filled with
    random digits here, NUMBERS_PER_SHAPE times if it has digits only, else once.
    """
    try:
        import wordfreq
    except ImportError as error:
        raise UserError("no --corpus given and wordfreq is not installed; pip install wordfreq, or name one") from error
    try:
        words = dict(wordfreq.get_frequency_dict(language, wordlist="best"))
    except LookupError as error:
        raise UserError(f"--language {language}: there is no word list of it; give --corpus") from error
    generator = random.Random(seed)
    for shape in sorted(word for word in words if "00" in word):
        frequency = words.pop(shape)
        fillings = NUMBERS_PER_SHAPE if shape.isdigit() else 1
        for _ in range(fillings):
            number = "".join(generator.choice("0123456789") if c == "0" else c for c in shape)
            words[number] = words.get(number, 0) + frequency / fillings
    return words


def vary_case(words: dict[str, float]) -> dict[str, float]:
    """Part each word's frequency among its lower-case, capitalised and upper-case forms."""
    varied: Counter[str] = Counter()
    for word, frequency in words.items():
        for form, share in zip((word, word.capitalize(), word.upper()), CASE_SHARES, strict=True):
            varied[form] += frequency * share
    return varied


def select_words(tokens: dict[str, float], rule: WordRule, log: RejectionLog, *, countable: bool) -> dict[str, float]:
    """The words that `rule` finds in `tokens` with their summed frequencies, sorted by word.

    With `countable`, frequencies are numbers of occurrences and `log` counts these, else it counts distinct tokens.
    """
    words: Counter[str] = Counter()
    for token, frequency in progress(tokens.items(), total=len(tokens), unit="token", description="words"):
        found, reason = rule.words(token)
        if not found:
            log.add(token, reason, f"frequency {frequency:g}", int(frequency) if countable else 1)
        for word in found:
            words[word] += frequency
    if not words:
        raise UserError("no usable word in the input; check --corpus, --charset and the lengths")
    return dict(sorted(words.items()))


def split_words(words: dict[str, float], share: float, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Part `words` into training and validation words; forms of a word that differ in case stay together.

    `share` of the distinct words go to validation, never the COMMON_WORDS most frequent (or a tenth, of few words). The
    choice hangs on the word and the seed only, so that a larger corpus keeps the parting of a smaller one.
    """
    groups: Counter[str] = Counter()
    for word, frequency in words.items():
        groups[word.lower()] += frequency
    common = {word for word, _ in groups.most_common(min(COMMON_WORDS, len(groups) // 10))}
    limit = share * 2**64
    validation = {group for group in groups if group not in common and _hash(group, seed) < limit}
    training_words = {word: frequency for word, frequency in words.items() if word.lower() not in validation}
    validation_words = {word: frequency for word, frequency in words.items() if word.lower() in validation}
    return training_words, validation_words


def _hash(word: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{word}".encode(), digest_size=8).digest(), "big")


def draw_rows(words: dict[str, float], count: int, temperature: float, seed: int) -> list[str]:
    """`count` words in random order; a word comes in proportion to frequency ** (1 / temperature), to within one row.

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
    """Write the language CSV; the file has its name only when it is whole."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(("inp", "gt"))
                writer.writerows(zip(rows, rows, strict=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room or name another") from error


def create_language_data(
    train_output: str,
    validation_output: str,
    *,
    corpora: list[str],
    rule: WordRule,
    language: str = "en",
    temperature: float = 1.0,
    count: int | None = None,
    validation: float = 0.05,
    seed: int = 0,
    rejected: str | None = None,
) -> None:
    """Make both files and print the summary; see main for what the settings mean."""
    with RejectionLog.beside(os.path.splitext(train_output)[0], rejected) as log:
        if corpora:
            words = select_words(read_corpora(find_corpora(corpora), log), rule, log, countable=True)
        else:
            words = select_words(frequency_list(language, seed), rule, log, countable=False)
            words = vary_case(words) if rule.charset.has_upper_case else words
        parts = split_words(words, validation, seed)
        if count is None and not corpora and temperature != float("inf"):
            count = DEFAULT_COUNT
        if count is not None:
            held = round(count * len(parts[1]) / len(words))
            sizes = (count - held, held)
        elif temperature == float("inf"):
            sizes = (len(parts[0]), len(parts[1]))
        else:
            sizes = (int(sum(parts[0].values())), int(sum(parts[1].values())))
        rows = [draw_rows(part, size, temperature, seed) for part, size in zip(parts, sizes, strict=True)]
        write_rows(train_output, rows[0])
        write_rows(validation_output, rows[1])
    counts: dict[str, int] = {"distinct words": len(words)}
    if corpora:
        counts["occurrences of them"] = int(sum(words.values()))
    counts |= {
        "training rows": len(rows[0]),
        "training words": len(set(rows[0])),
        "validation rows": len(rows[1]),
        "validation words": len(set(rows[1])),
    }
    print_summary(f"wrote {train_output} and {validation_output}", counts, log)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("train", metavar="TRAIN_CSV", help="file to make")
    parser.add_argument("validation", metavar="VALIDATION_CSV", help="file to make")
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="PATH",
        help="UTF-8 text files (.gz, .bz2, .xz too) or folders of them",
    )
    parser.add_argument(
        "--language", default="en", help="of the word-frequency list, used without --corpus (default: en)"
    )
    parser.add_argument("--charset", default="data/charset_36.txt", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--min-length", type=positive, default=1, help="in characters (default: 1)")
    parser.add_argument("--max-length", type=positive, default=25, help="in characters (default: 25)")
    frequencies = parser.add_mutually_exclusive_group()
    frequencies.add_argument("--flatten", action="store_true", help="every word equally often")
    frequencies.add_argument(
        "--temperature", type=_temperature, default=1.0, help="1 keeps frequencies, more flattens them (default: 1)"
    )
    parser.add_argument(
        "--count",
        type=positive,
        help="rows of both files together (default: as many as the corpus has words, with --flatten each distinct word "
        f"once; {DEFAULT_COUNT} from the word-frequency list)",
    )
    parser.add_argument("--validation-share", type=_share, default=0.05, help="of the distinct words (default: 0.05)")
    parser.add_argument("--seed", type=seed_number, default=0, help="same seed, same files (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the outputs when they exist")
    parser.add_argument("--rejected", metavar="FILE", help="what was left out (default: TRAIN-rejected.tsv)")
    options = parser.parse_args(arguments)
    for output in (options.train, options.validation):
        if os.path.exists(output) and not options.overwrite:
            raise UserError(f"{output}: exists already; choose another output or replace it with --overwrite")
    if os.path.abspath(options.train) == os.path.abspath(options.validation):
        raise UserError(f"{options.train}: named for training and validation; give two files")
    create_language_data(
        options.train,
        options.validation,
        corpora=options.corpus,
        rule=WordRule(Charset.from_file(options.charset), options.min_length, options.max_length),
        language=options.language,
        temperature=float("inf") if options.flatten else options.temperature,
        count=options.count,
        validation=options.validation_share,
        seed=options.seed,
        rejected=options.rejected,
    )
    return 0


if __name__ == "__main__":
    run_command_line(main)
