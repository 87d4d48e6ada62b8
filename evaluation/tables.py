"""Tables as text: Markdown for people, CSV for programs."""

import csv
import io
from collections.abc import Iterable, Sequence


def markdown_table(rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Return rows, the first of which is the heading, as an aligned Markdown table.

    Args:
        left: leading columns that are aligned left; the others, of numbers, are aligned right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    sides = [str.ljust if place < left else str.rjust for place in range(len(widths))]
    lines = [
        [align(cell, width) for align, cell, width in zip(sides, row, widths, strict=True)]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_text(rows: Iterable[Sequence[object]], *, delimiter: str = ",") -> str:
    """Return rows as CSV, quoted where needed."""
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file.getvalue()
