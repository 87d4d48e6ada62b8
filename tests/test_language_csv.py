"""Tables of spellings: rows as a plain loop reads them, quotation marks as CSV writers set them, and speed."""

import time
from collections import Counter

import numpy as np
import pytest

from loading.batches import LabelRule
from loading.charset import PROTOCOLS, Charset
from loading.language_csv import read_pairs
from tools.create_language_data import write_rows

RULE_36 = LabelRule(Charset(PROTOCOLS[36]), max_length=25)
RULE_94 = LabelRule(Charset(PROTOCOLS[94]), max_length=9, case_sensitive=True)
RULE_FOREIGN = LabelRule(Charset(PROTOCOLS[36] + "éß漢𝄞"), max_length=9)


def read_row_by_row(path, labels):
    """The same, one row at a time."""
    pairs, reasons = [], Counter()
    header, *lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    columns = header.split("\t")
    for line in lines:
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(columns):
            reasons["fields"] += 1
            continue
        texts = [fields[columns.index(name)] for name in ("inp", "gt")]
        if '"' in labels.charset.characters:
            texts = [unquoted(text) for text in texts]
        reason = labels.unusable(texts[0]) or labels.unusable(texts[1])
        if reason:
            reasons[reason] += 1
        else:
            pairs.append(tuple(map(labels.normalize, texts)))
    return pairs, dict(reasons)


def unquoted(text):
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') % 2 == 0
    return text[1:-1].replace('""', '"') if quoted else text


def read(path, labels):
    pairs, rows, filtered = read_pairs(path, labels)
    assert len(set(pairs)) == len(pairs), "each pair is stored once"
    return [pairs[row] for row in rows], filtered


@pytest.mark.parametrize("labels", [RULE_36, RULE_94, RULE_FOREIGN], ids=["36", "94", "foreign"])
def test_reads_what_a_loop_over_rows_reads(tmp_path, labels):
    random = np.random.default_rng(0)
    alphabet = np.array(list("abcXYZ019 -!'éß漢𝄞İ\t\r"))
    lines = ["more\tgt\tinp"]
    for _ in range(600):
        fields = ["".join(random.choice(alphabet, random.integers(0, 12))) for _ in range(random.choice([3, 3, 3, 2]))]
        lines.append("\t".join(fields))
    path = tmp_path / "words.csv"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8", newline="\n")
    pairs, filtered = read(path, labels)
    assert (pairs, filtered) == read_row_by_row(path, labels)
    assert len(pairs) > 50
    assert set(filtered) == {"empty", "too_long", "fields"} or labels is RULE_36


def test_what_the_writer_quotes_comes_back(tmp_path):
    words = ['"quoted"', '"', '""', 'a"b', '"open', 'close"', '""""', "it's", "plain", '"a""b"', "|,;"]
    write_rows(tmp_path / "words.csv", words)
    assert read(tmp_path / "words.csv", RULE_94) == ([(word, word) for word in words], {})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_that_is_quoted_throughout(tmp_path, end):
    (tmp_path / "words.csv").write_text(end.join(['"inp"\t"gt"', '"helo"\t"hello"', '"say ""hi"""\t"!"']), newline="")
    assert read(tmp_path / "words.csv", RULE_94)[0] == [("helo", "hello"), ('say"hi"', "!")]


def test_an_empty_table(tmp_path):
    for text in ("inp\tgt", "inp\tgt\n"):
        (tmp_path / "words.csv").write_text(text)
        assert read(tmp_path / "words.csv", RULE_36) == ([], {})


def test_reading_is_four_times_faster_than_a_plain_loop(tmp_path):
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghij"), random.integers(2, 12))) for _ in range(1000)]
    path = tmp_path / "words.csv"
    write_rows(path, [words[row] for row in random.integers(1000, size=60_000)])

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.process_time()
            function(path, RULE_36)
            times.append(time.process_time() - start)
        return min(times)

    assert 4 * seconds(read_pairs) < seconds(read_row_by_row)
