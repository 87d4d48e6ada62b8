"""Tables as text."""

from evaluation.tables import csv_text, markdown_table


def test_text_is_aligned_left_and_numbers_right():
    rows = [["name", "kind", "words"], ["a", "longer", 7], ["b", "", 1234567]]
    assert markdown_table(rows, left=2).splitlines() == [
        "| name | kind   |   words |",
        "| ---- | ------ | ------: |",
        "| a    | longer |       7 |",
        "| b    |        | 1234567 |",
    ]


def test_csv_quotes_what_needs_it():
    assert csv_text([["a", 'b"'], ["c\td", 1]], delimiter="\t") == 'a\t"b"""\n"c\td"\t1\n'
