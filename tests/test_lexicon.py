"""Words under the distributions of a network: the most probable ones, and the closest one of a list."""

import itertools
import math

import lmdb
import numpy as np
import pytest
import torch

from evaluation.lexicon import LOWEST, Lexicon, StoredLexicons, log_probabilities, most_probable, read_lexicon
from loading.charset import PROTOCOLS, Charset
from loading.lmdb_io import LmdbReader
from utils import UserError

CHARSET = Charset("abcdef")
STEPS = 4


@pytest.fixture
def logs() -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return log_probabilities(torch.randn(1, STEPS, CHARSET.num_classes, generator=generator) * 1.5)[0]


def probability(logs: np.ndarray, text: str) -> float:
    classes = [*CHARSET.encode(text), 0][:STEPS]
    return math.exp(sum(logs[step, each] for step, each in enumerate(classes)))


def every_word() -> list[str]:
    return [
        "".join(word) for length in range(STEPS + 1) for word in itertools.product(CHARSET.characters, repeat=length)
    ]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_most_probable_words_are_those_of_a_search_through_all(logs, count):
    expected = sorted(((probability(logs, word), word) for word in every_word()), reverse=True)[:count]
    found = most_probable(logs, CHARSET, count)
    assert [word.text for word in found] == [word for _, word in expected]
    assert [word.confidence for word in found] == pytest.approx([each for each, _ in expected])


def test_all_words_together_have_probability_one(logs):
    found = most_probable(logs, CHARSET, 10_000)
    assert len(found) == len(every_word())
    assert sum(word.confidence for word in found) == pytest.approx(1)


def test_no_numbers_give_words_without_probability():
    logs = log_probabilities(torch.full((1, STEPS, CHARSET.num_classes), float("nan")))[0]
    assert (logs == LOWEST).all()
    assert [word.confidence for word in most_probable(logs, CHARSET, 2)] == [0, 0]
    assert Lexicon(["abc", "fed"], CHARSET, steps=STEPS)(logs, "fee").text == "fed"


def test_the_word_of_a_list_is_the_most_probable_one(logs):
    words = [word for word in every_word() if 0 < len(word) < STEPS]
    scores = {word: probability(logs, word) for word in words}
    lexicon = Lexicon(words, CHARSET, steps=STEPS)
    best = max(scores, key=scores.get)
    found = lexicon(logs, "f")
    assert found.text == best
    assert found.confidence == pytest.approx(scores[best] / sum(scores.values()))


def test_equal_words_are_told_apart_by_edit_distance():
    logs = np.log(np.full((STEPS, CHARSET.num_classes), 1 / CHARSET.num_classes))
    words = ["fab", "abe", "abc"]
    assert Lexicon(words, CHARSET, steps=STEPS)(logs, "abf").text == "abe"
    assert Lexicon(words, CHARSET, steps=STEPS)(logs, "abc").text == "abc"


def test_by_distance_the_prediction_decides_and_probability_among_equals():
    logs = np.log(np.full((STEPS, CHARSET.num_classes), 0.01))
    logs[0, CHARSET.encode("f")] = np.log(0.9)
    words = ["abd", "fbc", "def"]
    assert Lexicon(words, CHARSET, steps=STEPS)(logs, "abc").text == "fbc"
    assert Lexicon(["abd", "def"], CHARSET, steps=STEPS, match="distance")(logs, "abc").text == "abd"
    assert Lexicon(words, CHARSET, steps=STEPS, match="distance")(logs, "abc").text == "fbc"  # abd is as near


def test_words_are_given_as_they_stand_in_the_list_and_count_once(logs):
    lexicon = Lexicon(["A-B", "ab", "", "abcdef", "123"], CHARSET, steps=STEPS)
    assert lexicon.words == ["A-B"]
    assert lexicon(logs, "").confidence == 1
    with pytest.raises(UserError, match="can predict none of its 2 words"):
        Lexicon(["123", "abcdef"], CHARSET, steps=STEPS)


@pytest.mark.parametrize("match", ["probability", "distance"])
def test_words_are_matched_as_the_protocol_compares_them(match):
    charset, words = Charset(PROTOCOLS[94]), ["HOTEL", "BAR", "Motel", "hotel"]
    logits = torch.zeros(1, 6, charset.num_classes)
    logits[0, range(6), [*charset.encode("Hotel"), 0]] = 20
    logs = log_probabilities(logits)[0]
    found = {
        protocol: Lexicon(words[:last], charset, steps=6, match=match, protocol=Charset(PROTOCOLS[protocol]))
        for protocol, last in ((36, 4), (94, 3))
    }
    assert found[36].words == words[:3]  # "hotel" is equal to the first
    assert found[36](logs, "Hotel").text == "HOTEL"
    assert found[36](logs, "Hotel").confidence == pytest.approx(1)
    assert found[94](logs, "Hotel").text == Lexicon(words[:3], charset, steps=6)(logs, "Hotel").text == "Motel"


def test_the_probability_of_a_letter_is_that_of_both_cases():
    charset = Charset("abAB")
    logs = np.log(np.array([[0.0, 0.3, 0.4, 0.3, 0.0], [1.0, 0, 0, 0, 0]]) + 1e-9)
    before = logs.copy()
    assert Lexicon(["a", "b"], charset, steps=2)(logs, "b").text == "b"
    found = Lexicon(["a", "b"], charset, steps=2, protocol=charset.folded())(logs, "b")
    assert (found.text, found.confidence) == ("a", pytest.approx(0.6))
    assert (logs == before).all()


def test_lists_come_from_files_and_lmdbs(tmp_path):
    (tmp_path / "words.txt").write_text("ab\ncd\t120\n\n", encoding="utf-8-sig")
    assert read_lexicon(tmp_path / "words.txt")[:2] == ["ab", "cd"]
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_lexicon(tmp_path / "latin.txt")
    with lmdb.open(str(tmp_path / "set")) as environment, environment.begin(write=True) as transaction:
        for key, value in {"num-samples": "2", "lexicon-000000001": "ab,CD, ef", "lexicon-000000002": "ab cd"}.items():
            transaction.put(key.encode(), value.encode())
        transaction.put(b"lexicon-000000004", "caf\u00e9".encode("latin-1"))
    lists = StoredLexicons(LmdbReader(tmp_path / "set"), "lexicon", lambda words: words)
    assert (lists(1), lists(2)) == (["ab", "CD", "ef"], ["ab", "cd"])
    with pytest.raises(UserError, match=r"lexicon-000000003.*dataset\.test\.lexicon"):
        lists(3)
    with pytest.raises(UserError, match=r"/set: lexicon-000000004 is not UTF-8"):
        lists(4)
