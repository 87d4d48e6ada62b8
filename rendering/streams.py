"""Random numbers of a word: every concern has a stream of its own.

The same index with another kind of background keeps everything else.
"""

from enum import IntEnum


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
