"""Corpora become language data: parted by word, drawn by frequency, the same for the same seed."""

import csv
import gzip
import os
from collections import Counter
from pathlib import Path

import pytest

from loading.charset import Charset
from tools import create_language_data
from tools.create_language_data import WordRule, draw_rows, split_words
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT.parent / "shared" / "data" / "words"
CHARSET_36 = str(ROOT / "data" / "charset_36.txt")
SMALL = "0123456789abcdefghijklmnopqrstuvwxyz"


def _read(path):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["inp", "gt"]
    assert all(row[0] == row[1] for row in rows[1:])
    return [row[1] for row in rows[1:]]


def _make(folder, *options, charset=CHARSET_36):
    train, validation = folder / "train.csv", folder / "validation.csv"
    create_language_data.main([str(train), str(validation), "--charset", charset, *map(str, options)])
    return _read(train), _read(validation)


def _corpus(path, words, repeat=1):
    path.write_text("\n".join(words * repeat), encoding="utf-8")
    return path


def _vocabulary(count):
    return ["w" + "".join(chr(97 + (i // 26**k) % 26) for k in range(3)) for i in range(count)]


@pytest.mark.parametrize(
    ("token", "words", "reason"),
    [
        ("Word", ["word"], ""),
        ("don't", ["dont"], ""),
        ("well-known,", ["well", "known"], ""),
        ("(1984)", ["1984"], ""),
        ("café", [], "outside the charset"),
        ("漢字", [], "outside the charset"),
        ("<unk>", [], "marker"),
        ("@-@", [], "marker"),
        ("--", [], "no letter or digit"),
    ],
)
def test_words_of_a_token(token, words, reason):
    assert WordRule(Charset(SMALL)).words(token) == (words, reason)


def test_charset_with_punctuation_and_case_keeps_them():
    rule = WordRule(Charset("".join(map(chr, range(33, 127)))))
    assert rule.words("Don't-(ask)!") == (["Don't-(ask)!"], "")


def test_parts_share_no_word_in_any_case():
    words = {form: 1.0 for word in _vocabulary(2000) for form in (word, word.upper())}
    training, validation = split_words(words, 0.2, seed=0)
    assert {word.lower() for word in training}.isdisjoint(word.lower() for word in validation)
    assert training | validation == words
    assert 0.15 < len(validation) / len(words) < 0.25


def test_common_words_stay_in_training():
    words = dict.fromkeys(_vocabulary(5000), 1.0) | {"the": 1e6}
    for seed in range(20):
        assert "the" in split_words(words, 0.5, seed)[0]


def test_a_larger_corpus_keeps_the_parting():
    small = dict.fromkeys(_vocabulary(500), 1.0)
    large = dict.fromkeys(_vocabulary(1000), 1.0) | {f"common{i}": 9.0 for i in range(100)}
    held_of_large = set(split_words(large, 0.3, seed=1)[1])
    shared = set(split_words(small | {f"common{i}": 9.0 for i in range(50)}, 0.3, seed=1)[1])
    assert shared <= held_of_large


def test_frequencies_are_kept_exactly():
    words = {"a": 5.0, "b": 1.0, "c": 14.0}
    assert Counter(draw_rows(words, 20, 1.0, seed=3)) == words
    assert Counter(draw_rows(words, 200, 1.0, seed=3)) == {"a": 50, "b": 10, "c": 140}


def test_temperature_flattens():
    words = {"rare": 1.0, "common": 10_000.0}
    shares = [Counter(draw_rows(words, 10_100, t, seed=0))["rare"] for t in (1.0, 2.0, float("inf"))]
    assert shares == [1, 100, 5050]


def test_rows_are_the_same_for_the_same_seed_and_mixed_otherwise():
    words = dict.fromkeys(_vocabulary(300), 2.0)
    assert draw_rows(words, 600, 1.0, seed=5) == draw_rows(words, 600, 1.0, seed=5)
    assert draw_rows(words, 600, 1.0, seed=5) != draw_rows(words, 600, 1.0, seed=6)
    assert draw_rows({}, 5, 1.0, seed=0) == []


def test_every_occurrence_is_a_row_and_temperature_inf_has_each_word_once(tmp_path):
    vocabulary = _vocabulary(300)
    corpus = _corpus(tmp_path / "corpus.txt", vocabulary, repeat=3)
    train, validation = _make(tmp_path, "--corpus", corpus)
    assert Counter(train + validation) == dict.fromkeys(vocabulary, 3)
    assert set(train).isdisjoint(validation)
    train, validation = _make(tmp_path, "--corpus", corpus, "--temperature", "inf", "--overwrite")
    assert sorted(train + validation) == sorted(vocabulary)


def test_count_is_met_exactly_and_seed_decides(tmp_path):
    corpus = _corpus(tmp_path / "corpus.txt", _vocabulary(300))
    results = [_make(tmp_path, "--corpus", corpus, "--count", 1000, "--seed", s, "--overwrite") for s in (1, 1, 2)]
    assert [len(train) + len(validation) for train, validation in results] == [1000] * 3
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_corpora_of_every_kind_are_read(tmp_path):
    folder = tmp_path / "corpora"
    folder.mkdir()
    (folder / "a.txt").write_text("# a header\n#\nalpha\n# beta\n", encoding="utf-8")
    (folder / "b.tokens").write_bytes(b" gamma <unk> @-@ \nbr\xff\xfe ken\n delta\n")
    (folder / "c.raw").write_text("epsilon")
    (folder / "d.bin").write_text("not text")
    train, validation = _make(tmp_path, "--corpus", folder)
    assert sorted(train + validation) == ["alpha", "beta", "delta", "epsilon", "gamma", "ken"]
    rejected = (tmp_path / "train-rejected.tsv").read_text(encoding="utf-8")
    for reason in ("outside the charset", "marker"):
        assert f"\t{reason}\t" in rejected


def test_without_a_corpus_the_frequency_list_serves(tmp_path):
    train, validation = _make(tmp_path, "--count", 3000)
    assert len(train) + len(validation) == 3000
    assert set(train).isdisjoint(validation)
    assert Counter(train).most_common(1)[0][0] == "the"
    assert all(set(word) <= set(SMALL) and len(word) <= 25 for word in train)
    assert len({word for word in train if word.isdigit() and len(word) == 4}) > 1


def test_the_frequency_list_is_refused_where_the_charset_has_upper_case(tmp_path):
    with pytest.raises(UserError, match="--corpus"):
        _make(tmp_path, charset=str(ROOT / "data" / "charset_62.txt"))


def test_second_run_is_refused_and_loses_nothing(tmp_path):
    corpus = _corpus(tmp_path / "corpus.txt", _vocabulary(100))
    first = _make(tmp_path, "--corpus", corpus)
    with pytest.raises(UserError, match="--overwrite"):
        _make(tmp_path, "--corpus", corpus, "--seed", 9)
    assert (_read(tmp_path / "train.csv"), _read(tmp_path / "validation.csv")) == first


def test_mistakes_are_named(tmp_path):
    corpus = _corpus(tmp_path / "corpus.txt", ["漢字"])
    with pytest.raises(UserError, match="no usable word"):
        _make(tmp_path, "--corpus", corpus)
    with pytest.raises(UserError, match="gone: no such file or folder"):
        _make(tmp_path, "--corpus", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        _make(tmp_path, "--corpus", tmp_path / "empty", _corpus(tmp_path / "good.txt", ["word"]))
    same = str(tmp_path / "same.csv")
    with pytest.raises(UserError, match="two files"):
        create_language_data.main([same, same])
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "empty", "good.txt"]


@pytest.mark.parametrize(
    ("name", "content"), [("words.txt", gzip.compress(b"word " * 9999)), ("words.txt.bz2", b"without a zero byte")]
)
def test_a_packed_corpus_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*unpack it first"):
        _make(tmp_path, "--corpus", tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not WORDS.is_dir(), reason="shared data is absent")
def test_real_vocabulary_is_complete(tmp_path):
    path = WORDS / "icdar2015_GenericVocabulary_90k.txt"
    listed = {line.lower() for line in path.read_text().splitlines() if line and not line.startswith("#")}
    train, validation = _make(tmp_path, "--corpus", path, "--temperature", "inf")
    assert len(train) + len(validation) == len(listed)


def test_a_corpus_of_one_long_line_is_cut_between_words(tmp_path):
    text = "alpha é beta gamma " * 80_000  # more than is read at once; the cuts fall anywhere
    (tmp_path / "corpus.txt").write_text(" " + text + "delta", encoding="utf-8")
    train, validation = _make(tmp_path, "--corpus", tmp_path / "corpus.txt")
    assert Counter(train + validation) == {"alpha": 80_000, "beta": 80_000, "gamma": 80_000, "delta": 1}
