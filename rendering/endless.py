"""The renderer as a training set without end: every epoch has other words."""

from pathlib import Path
from typing import Protocol

import numpy as np

from rendering.config import load_render_config
from rendering.engine import WordRenderer


class EpochKey(Protocol):
    """Which sample of which epoch is asked for, such as `dataset.SampleKey`."""

    epoch: int
    index: int


class RenderedWords:
    """`words[SampleKey(epoch, index)]` -> (picture uint8 RGB (h, w, 3), mask uint8 (h, w), text).

    Sample i of epoch e is word e * length + i of the seed, whichever process draws it. May be pickled.

    Args:
        path: YAML file of render settings.
        length: words in an epoch; None: the file's own number.
        seed: another seed, other words.

    Raises:
        UserError: the file, a font folder, a word list or a folder of photographs is missing or wrong.
    """

    def __init__(self, path: str | Path, *, length: int | None = None, seed: int = 0) -> None:
        config = load_render_config(path)
        self.length = length or config.length
        self.seed = seed
        self.renderer = WordRenderer(config)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: EpochKey | int) -> tuple[np.ndarray, np.ndarray, str]:
        epoch, index = (0, key) if isinstance(key, int) else (key.epoch, key.index)
        if not 0 <= index < self.length:
            raise IndexError(f"word {index} of {self.length}")
        word = self.renderer.render(self.seed, epoch * self.length + index)
        return word.image, word.mask, word.text
