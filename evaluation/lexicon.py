"""Find the most probable words under a network's output, and the most probable or closest one of a word list.

A word's probability is the product over its steps, the end token included; steps after the end do not count. So the
probabilities of all words sum to 1, and words of different lengths can be compared.

Legend: N images, T steps (end token counted), C classes (0 is the end), L words of a list.
"""

import heapq
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from loading.charset import Charset
from loading.lmdb_io import LmdbReader
from modules.outputs import NULL_CLASS
from utils import UserError, read_text

Match = Literal["probability", "distance"]  # how a word of a list is chosen: see Lexicon

LOWEST = -1e4  # log-probability of what is impossible, or no number
SAME = 1e-6  # log-probabilities that differ by less are equal


@dataclass(frozen=True)
class Candidate:
    """A word and its probability."""

    text: str
    confidence: float


def log_probabilities(logits: Tensor) -> np.ndarray:
    """Return the log-probabilities of logits (N, T, C), float64, none below LOWEST; LOWEST where they are NaN."""
    logs = logits.float().log_softmax(-1).cpu().numpy().astype(np.float64)
    return np.nan_to_num(logs, nan=LOWEST).clip(LOWEST)


def most_probable(logs: np.ndarray, charset: Charset, count: int) -> list[Candidate]:
    """Return the most probable words under log-probabilities (T, C), best first; fewer where there are no more.

    Best-first search: steps are independent, so that the best continuation of every start is known, and words are found
    in the order of their probabilities.
    """
    steps = len(logs)
    # A word with a character that comes after `count` others at its step has as many better words beside it.
    ranked = [{NULL_CLASS, *order} for order in np.argsort(-logs, axis=1, kind="stable")[:, :count].tolist()]
    best = [0.0] * (steps + 1)  # best[t]: log-probability of the most probable continuation after t steps
    for step in reversed(range(steps)):
        best[step] = max(logs[step, NULL_CLASS], logs[step, NULL_CLASS + 1 :].max() + best[step + 1])
    logs = logs.tolist()
    found: list[Candidate] = []
    queue: list[tuple[float, bool, tuple[int, ...], float]] = [(-best[0], False, (), 0.0)]
    while queue and len(found) < count:
        _, is_word, classes, total = heapq.heappop(queue)
        if is_word:
            found.append(Candidate(charset.decode(classes), math.exp(total)))
            continue
        step = len(classes)
        for each in ranked[step]:
            sum_so_far = total + logs[step][each]
            ended = each == NULL_CLASS or step + 1 == steps
            longer = classes if each == NULL_CLASS else (*classes, each)
            rest = 0.0 if ended else best[step + 1]
            heapq.heappush(queue, (-(sum_so_far + rest), ended, longer, sum_so_far))
    return found


class Lexicon:
    """Chooses the word of a list that best fits a network's output.

    Args:
        words: the list; characters that the network lacks are left out, and of words that are then equal only the
            first is kept.
        steps: T; longer words cannot be predicted.
        match: "probability" chooses the most probable word, and of equally probable ones the closest to the greedy
            prediction; "distance", as most papers do, the closest one, and of equally close ones the most probable.
        protocol: the characters that an evaluation compares, by default the network's: distances are those of texts as
            it compares them, and the probability of a character is that of all that it holds equal, such as both cases.

    Raises:
        UserError: the network can predict no word of the list.
    """

    def __init__(
        self,
        words: Sequence[str],
        charset: Charset,
        *,
        steps: int,
        match: Match = "probability",
        protocol: Charset | None = None,
    ) -> None:
        self.match = match
        self._normalize = (protocol or charset).normalize
        alike: dict[str, list[int]] = {}  # what is compared of a character, or itself -> classes
        for character in charset.characters:
            alike.setdefault(self._normalize(character) or character, []).extend(charset.encode(character))
        self._alike = [classes for classes in alike.values() if len(classes) > 1]
        shown: dict[str, tuple[str, str]] = {}  # what of a word is told apart -> what the network can read, the word
        for word in words:
            text = charset.normalize(word)
            shown.setdefault("".join(self._normalize(each) or each for each in text), (text, word))
        kept = [each for each in shown.values() if 0 < len(each[0]) < steps]
        readable, self.words = [text for text, _ in kept], [word for _, word in kept]
        if not self.words:
            raise UserError(
                f"lexicon: the network can predict none of its {len(words)} words; check characters and lengths"
            )
        self._compared = [*map(self._normalize, readable)]
        # (L, T): classes up to the end, then C, which stands for "anything": it adds nothing.
        self._classes = np.full((len(self.words), steps), charset.num_classes)
        for row, text in zip(self._classes, readable, strict=True):
            row[: len(text) + 1] = [*charset.encode(text), NULL_CLASS]

    def __call__(self, logs: np.ndarray, greedy: str) -> Candidate:
        """Return the word of the list for log-probabilities (T, C), and its share of the list's probability.

        Args:
            greedy: the prediction without a list.
        """
        padded = np.pad(logs, ((0, 0), (0, 1)))  # (T, C + 1), a copy
        for classes in self._alike:
            padded[:, classes] = np.logaddexp.reduce(padded[:, classes], axis=1, keepdims=True)
        scores = padded[np.arange(len(logs)), self._classes].sum(1)  # (L,)
        shares = np.exp(scores - scores.max())
        is_rival = scores >= (-np.inf if self.match == "distance" else scores.max() - SAME)
        rivals = np.flatnonzero(is_rival).tolist()
        if len(rivals) > 1:
            greedy = self._normalize(greedy)
            rivals.sort(key=lambda each: (Levenshtein.distance(self._compared[each], greedy), -scores[each]))
        return Candidate(self.words[rivals[0]], float(shares[rivals[0]] / shares.sum()))


def read_lexicon(path: str | Path) -> list[str]:
    """Return the words of a text file with one a line, before a tab if there is one; empty lines do not count.

    Raises:
        UserError: the file is missing, or not UTF-8 text.
    """
    text = read_text(path, "lexicon", "name a UTF-8 file with a word a line")
    return [line.partition("\t")[0] for line in text.splitlines()]


@dataclass(frozen=True)
class StoredLexicons:
    """The word lists of an LMDB: number of a word -> its list, stored as `<name>-%09d`."""

    reader: LmdbReader
    name: str  # "lexicon" in the LMDBs of IIIT5K and SVT that go around
    make: Callable[[Sequence[str]], Lexicon]

    def __call__(self, number: int) -> Lexicon:
        """Return the list of a word; raises UserError if it is missing, not UTF-8, or has no word to predict."""
        key = f"{self.name}-{number:09d}"
        data = self.reader.get(key)
        if data is None:
            raise UserError(
                f"{self.reader.path}: has no {key}; store one for each word, or name a file (dataset.test.lexicon)"
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.reader.path}: {key} is not UTF-8; store the words as UTF-8 text") from error
        return self.make(re.split(r"[,\s]+", text))
