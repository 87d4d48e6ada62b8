"""The texts: words by frequency, numbers and random strings, with their case and punctuation."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rendering.config import WordsConfig
from utils import UserError, read_text

SUFFIXES = (".", ",", "!", "?", ":", ";", "'s", "-", "...", "*", "%", "&")
PREFIXES = ("#", "*", "-", "@", "'", "$", "&")
PAIRS = (("(", ")"), ('"', '"'), ("'", "'"), ("[", "]"), ("<", ">"))


class WordSource:
    """Samples texts.

    Raises:
        UserError: the word file cannot be read, or holds no usable word.
    """

    def __init__(self, config: WordsConfig) -> None:
        self.config = config
        self._allowed = frozenset(config.characters)
        counted = read_words(Path(config.file)) if config.file else english_words(config.vocabulary)
        usable = [(word, count) for word, count in counted if self._fits(word)]
        if not usable:
            raise UserError(f"{config.file or 'English'}: has no word that words.characters and words.max_length allow")
        self._words, counts = zip(*usable, strict=True)
        chances = np.array(counts, np.float64) ** (1 / config.temperature)
        if not 0 < chances.sum() < np.inf:
            raise UserError(
                f"words.temperature: {config.temperature:g} is too small for these counts; 1 takes them as is"
            )
        self._cumulated = np.cumsum(chances / chances.sum())
        cases = config.cases
        weights = np.array([cases.upper, cases.title, cases.lower, cases.mixed])
        if weights.sum() == 0:
            raise UserError("words.cases: every weight is 0; give at least one case a weight")
        self._cases = np.cumsum(weights / weights.sum())

    def sample(self, rng: np.random.Generator) -> str:
        """Sample a text of 1 to max_length allowed characters."""
        for _ in range(100):
            text = self._sample_once(rng)
            if 0 < len(text) <= self.config.max_length and self._allowed.issuperset(text):
                return text
        # Every attempt had a character that is not allowed.
        return self.config.characters[int(rng.integers(len(self.config.characters)))]

    def _sample_once(self, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < self.config.numbers:
            return sample_number(rng)
        if kind < self.config.numbers + self.config.random:
            return self._random_string(rng)
        word = self._cased(self._words[int(np.searchsorted(self._cumulated, rng.random(), side="right"))], rng)
        return punctuated(word, rng) if rng.random() < self.config.punctuation else word

    def _cased(self, word: str, rng: np.random.Generator) -> str:
        kind = int(np.searchsorted(self._cases, rng.random(), side="right"))
        if kind == 0:
            return word.upper()
        if kind == 1:
            return word[:1].upper() + word[1:].lower()
        if kind == 2:
            return word.lower()
        flips = rng.random(len(word)) < 0.5
        return "".join(c.upper() if flip else c.lower() for c, flip in zip(word, flips, strict=True))

    def _random_string(self, rng: np.random.Generator) -> str:
        pools = (string.ascii_uppercase, string.ascii_uppercase + string.digits, string.ascii_letters + string.digits)
        pool = [c for c in pools[int(rng.integers(3))] if c in self._allowed] or self.config.characters
        length = min(int(rng.integers(1, 9)), self.config.max_length)
        return "".join(pool[int(number)] for number in rng.integers(len(pool), size=length))

    def _fits(self, word: str) -> bool:
        """Return whether `word` can be written in any case."""
        return 0 < len(word) <= self.config.max_length and any(
            self._allowed.issuperset(form) for form in (word.lower(), word.upper(), word)
        )


def english_words(count: int) -> Iterator[tuple[str, float]]:
    """Yield the most frequent English words with their frequencies."""
    # Imported here: the word lists take a second to load, and a word file needs none of them.
    from wordfreq import get_frequency_dict, top_n_list

    frequencies = get_frequency_dict("en", wordlist="best")
    return ((word, frequencies[word]) for word in top_n_list("en", count) if not word.isdigit())


def read_words(path: Path) -> Iterator[tuple[str, float]]:
    """Yield (word, count) of each line of a word list; blank lines and lines that begin with `#` are skipped.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or a count is not a positive number.
    """
    lines = read_text(path, "word list", "name a UTF-8 file with a word a line").splitlines()
    for number, line in enumerate(lines, start=1):
        word, _, count = line.strip().partition("\t")
        if not word or line.startswith("#"):
            continue
        try:
            value = float(count or 1)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"{path}:{number}: {count!r} is not a positive count; write `word<TAB>count`")
        yield word, value


def punctuated(word: str, rng: np.random.Generator) -> str:
    """Add punctuation after a word (mostly), before it, around it or inside."""
    kind = rng.random()
    if kind < 0.65:
        return word + SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    if kind < 0.75:
        return PREFIXES[int(rng.integers(len(PREFIXES)))] + word
    if kind < 0.9:
        left, right = PAIRS[int(rng.integers(len(PAIRS)))]
        return left + word + right
    middle = int(rng.integers(len(word) + 1))
    return word[:middle] + "-'&./"[int(rng.integers(5))] + word[middle:]


def sample_number(rng: np.random.Generator) -> str:
    """Sample a number as on signs and labels."""
    return _NUMBER_FORMS[int(rng.integers(len(_NUMBER_FORMS)))](rng)


def _digits(rng: np.random.Generator, low: int, high: int) -> str:
    """Sample `low` to `high` digits, the first seldom 0."""
    digits = rng.integers(10, size=int(rng.integers(low, high + 1)))
    digits[0] = digits[0] or rng.integers(10)
    return "".join(map(str, digits))


def _price(rng: np.random.Generator) -> str:
    currency = ("$", "", "", "$")[int(rng.integers(4))]
    cents = ("99", "00", "50", "95", f"{int(rng.integers(100)):02d}")[int(rng.integers(5))]
    return f"{currency}{_digits(rng, 1, 3)}.{cents}"


_NUMBER_FORMS: tuple[Callable[[np.random.Generator], str], ...] = (
    lambda rng: _digits(rng, 1, 2),
    lambda rng: _digits(rng, 1, 4),
    lambda rng: _digits(rng, 3, 6),
    lambda rng: _digits(rng, 1, 3),
    lambda rng: _digits(rng, 2, 3),
    lambda rng: str(int(rng.integers(1850, 2040))),
    _price,
    lambda rng: f"{int(rng.integers(1, 24))}:{int(rng.integers(60)):02d}",
    lambda rng: f"{_digits(rng, 3, 3)}-{_digits(rng, 4, 4)}",
    lambda rng: (
        f"{int(rng.integers(1, 13))}/{int(rng.integers(1, 32))}"
        + ("", f"/{int(rng.integers(100)):02d}")[int(rng.integers(2))]
    ),
    lambda rng: f"{_digits(rng, 1, 2)}%",
    lambda rng: (
        f"{_digits(rng, 1, 3)}" + ("km", "m", "th", "g", "ml", "am", "pm", "A", "B", "x")[int(rng.integers(10))]
    ),
    lambda rng: f"#{_digits(rng, 1, 3)}",
    lambda rng: string.ascii_uppercase[int(rng.integers(26))] + _digits(rng, 1, 3),
)
