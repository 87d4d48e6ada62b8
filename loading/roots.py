"""Finds the data sets that the roots of a config name, and names them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loading.lmdb_io import find_lmdbs
from utils import RENDER_SCHEME


class Found(NamedTuple):
    """A data set: the number of its root, its LMDB or `render://FILE.yaml`, and a name that no other one has."""

    root: int
    path: Path | str
    name: str


def find_word_sets(roots: Sequence[str | Path]) -> list[Found]:
    """Return every LMDB and renderer of some roots, in the order of the roots and of the paths below them."""
    found: list[tuple[int, Path | str]] = []
    for number, root in enumerate(map(str, roots)):
        paths = [root] if root.startswith(RENDER_SCHEME) else find_lmdbs(root)
        found += [(number, path) for path in paths]
    names = distinct_names([path for _, path in found])
    return [Found(*each, name) for each, name in zip(found, names, strict=True)]


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the last parts of some paths, as many as tell them apart; the same path twice gets a number."""
    parts = [
        Path(path.removeprefix(RENDER_SCHEME)).with_suffix("").parts
        if isinstance(path, str)
        else Path(os.path.abspath(path)).parts
        for path in paths
    ]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(each[-depth:]).strip("/") for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{each[-1]}-{number}" for number, each in enumerate(parts, start=1)]
