"""Random numbers of a word: every concern has a stream of its own.

The same index with another kind of background, or with another salt for one stream, keeps everything else.
"""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The concerns with a stream of their own; changed numbers give other words for the same seed."""

    WORD = 0
    FONT = 1
    LAYOUT = 2
    GEOMETRY = 3
    EFFECTS = 4
    COLOURS = 5
    BACKGROUND_KIND = 6
    BACKGROUND = 7
    DEGRADATION = 8
    NEIGHBOURS = 9
    OCCLUSION = 10


class Streams:
    """The random generators of all words and concerns.

    Key and counter of Philox choose a place in its sequence, so that no two streams share numbers. One generator is
    moved to the place of each stream, which takes a third of the time of making one.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._counter = np.zeros(4, np.uint64)
        self._key = np.zeros(2, np.uint64)
        self._start = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # nothing is left in it
            "has_uint32": 0,
            "uinteger": 0,
        }

    def __reduce__(self) -> tuple[type["Streams"], tuple[()]]:
        return Streams, ()

    def at(self, seed: int, index: int, stream: Stream, salts: Mapping[Stream, int]) -> np.random.Generator:
        """Return the generator of one stream; the next call moves the same object to another."""
        self._key[:] = seed, index
        self._counter[2:] = int(stream), salts.get(stream, 0)
        self._philox.state = self._start
        return self._generator
