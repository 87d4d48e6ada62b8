"""Reads tables of spellings: tab-separated, a column `inp` with a spelling and a column `gt` with the right one."""

import functools
from array import array
from pathlib import Path

import numpy as np

from loading.batches import EMPTY, TOO_LONG, LabelRule
from utils import UserError

FIELDS = "fields"  # the reason of a row with another number of fields than the header
_REASONS = (None, FIELDS, EMPTY, TOO_LONG)


def read_pairs(path: Path, labels: LabelRule) -> tuple[list[tuple[str, str]], np.ndarray, dict[str, int]]:
    """Read the usable rows of a table.

    A field that begins and ends with a quotation mark is quoted, as CSV writers do: both are dropped, and a pair of
    them inside stands for one. A tab or a line feed always ends a field.

    Returns:
        The distinct pairs of a spelling and the right one, normalised; the place in that list of each row's pair (n,)
        int32; and the number of rows left out for each reason. The words of a language repeat hundreds of times: to
        judge and store each pair once is what makes a hundred million rows fast and small.

    Raises:
        UserError: the file cannot be read, has other columns, or is not UTF-8.
    """
    places: dict[tuple[str, str], int] = {}  # of the distinct pairs

    @functools.lru_cache(maxsize=1 << 20)
    def place(line: str) -> int:
        """Return the index of a row's pair, or minus the index in `_REASONS` if the row cannot be used."""
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != len(columns):
            return -_REASONS.index(FIELDS)
        pair = tuple(labels.normalize(unquoted(fields[column])) for column in chosen)
        reason = labels.unusable(pair[0]) or labels.unusable(pair[1])
        return -_REASONS.index(reason) if reason else places.setdefault(pair, len(places))

    rows = array("i")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            columns = [unquoted(name) for name in file.readline().rstrip("\r\n").split("\t")]
            if "inp" not in columns or "gt" not in columns:
                raise UserError(
                    f"{path}: the first line is {columns}, not a tab-separated header with inp and gt; "
                    "make the file with tools/create_language_data.py"
                )
            chosen = columns.index("inp"), columns.index("gt")
            rows.extend(map(place, file))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check dataset roots") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); a language root is a CSV file") from error
    rows = np.frombuffer(rows, np.int32)
    counts = {reason: int(np.count_nonzero(rows == -number)) for number, reason in enumerate(_REASONS) if number}
    return list(places), rows[rows >= 0], {reason: count for reason, count in counts.items() if count}


def unquoted(field: str) -> str:
    """Return the text of a CSV field."""
    if len(field) > 1 and field[0] == field[-1] == '"' and field.count('"') % 2 == 0:
        return field[1:-1].replace('""', '"')
    return field
