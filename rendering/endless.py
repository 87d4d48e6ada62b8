"""The renderer as an endless training set: every epoch has new words."""

from pathlib import Path

import numpy as np

from loading.sampling import SampleKey, as_key
from rendering.config import load_render_config
from rendering.engine import WordRenderer


class RenderedWords:
    """Returns (image uint8 RGB (h, w, 3), mask uint8 (h, w), text) for `words[SampleKey(epoch, index)]`.

    Sample i of epoch e is word e * length + i of (seed, split, stream) in every process. May be pickled.

    Args:
        path: YAML file of render settings.
        length: words in an epoch; None: as in the file.
        seed: of the run.
        split, stream: distinguish training from test and the data sets of one run, so that they share no word.
        difficulty: at the start and at the end of the run, 0 to 1; None: as in the file.

    Raises:
        UserError: the file, a font folder, a word list or a folder of photographs is missing or wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        length: int | None = None,
        seed: int = 0,
        split: int = 0,
        stream: int = 0,
        difficulty: tuple[float, float] | None = None,
    ) -> None:
        config = load_render_config(path)
        self.length = length or config.length
        self.seed = int(np.random.SeedSequence((seed, split, stream)).generate_state(1, np.uint64)[0])
        self.difficulty = difficulty
        self.renderer = WordRenderer(config)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey | int) -> tuple[np.ndarray, np.ndarray, str]:
        epoch, index, progress = as_key(key)
        if not 0 <= index < self.length:
            raise IndexError(f"word {index} of {self.length}")
        difficulty = None if self.difficulty is None else float(np.interp(progress, (0, 1), self.difficulty))
        word = self.renderer.render(self.seed, epoch * self.length + index, difficulty=difficulty)
        return word.image, word.mask, word.text
