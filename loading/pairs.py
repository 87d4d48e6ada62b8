"""Reads images and their masks of text for training SSN: from a folder, or from LMDBs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from loading.lmdb_io import LmdbReader, find_lmdbs, image_key, mask_key
from loading.masks import LmdbMasks, find_mask_lmdb
from loading.word_index import MISSING
from utils import UserError


class PairFolder:
    """Pairs of a folder: `images/` and `masks/` with equal stems; masks are grey, 255 = text.

    `filtered` counts by reason what has no pair.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        images = {each.stem: each for each in sorted((self.path / "images").iterdir())}
        masks = {each.stem: each for each in sorted((self.path / "masks").iterdir())}
        alone = len(images.keys() ^ masks.keys())
        self.filtered = {MISSING: alone} if alone else {}
        self._pairs = [(images[stem], masks[stem]) for stem in images if stem in masks]

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> tuple[bytes | None, bytes | None]:
        """Return an encoded image and its mask, None where one cannot be read."""
        return tuple(map(_bytes_of, self._pairs[index]))

    def name(self, index: int) -> str:
        """Return a pair's name in messages and results."""
        return self._pairs[index][0].stem


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:  # it has gone, is a folder, or a link that leads nowhere
        return None


class PairLmdb:
    """Pairs of an LMDB with `image-%09d` and `mask-%09d`, or of a word LMDB and its mask LMDB."""

    def __init__(self, path: str | Path, mask_path: str | Path | None = None) -> None:
        self.path = Path(path)
        self.filtered: dict[str, int] = {}
        self._images = LmdbReader(path)
        self._masks = self._images if mask_path is None else LmdbReader(mask_path)
        self._mask_key: Callable[[int], str] = mask_key if mask_path is None else image_key
        self._length = len(self._images)
        if mask_path is not None and self._length:
            LmdbMasks(mask_path).check(self._images, np.arange(1, self._length + 1))
        elif self._length and self._images.get(mask_key(1)) is None:
            raise UserError(
                f"{path}: has no {mask_key(1)}, so it is not segmentation data; "
                "name the masks of a word LMDB in dataset.masks.root"
            )

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[bytes | None, bytes | None]:
        """Return an encoded image and its mask, None where one cannot be read."""
        return self._images.get(image_key(index + 1)), self._masks.get(self._mask_key(index + 1))

    def name(self, index: int) -> str:
        """Return a pair's name in messages and results."""
        return image_key(index + 1)


def find_pairs(root: str | Path, mask_root: str | Path | None = None) -> Iterator[PairFolder | PairLmdb]:
    """Open the pairs of a root.

    Args:
        root: a folder with `images/` and `masks/` (files, not LMDBs), an LMDB with images and masks, or a folder of
            such LMDBs; with `mask_root`, a word LMDB or a folder of them.
        mask_root: root of the mask LMDBs; those of `<root of images>/X` are in `<mask_root>/X`.
    """
    images, masks = Path(root, "images"), Path(root, "masks")
    if images.is_dir() and masks.is_dir() and any(each.is_file() for each in images.iterdir()):
        yield PairFolder(root)
        return
    for path in find_lmdbs(root):
        own_masks = mask_root is None or LmdbReader(path).get(mask_key(1)) is not None
        yield PairLmdb(path, None if own_masks else find_mask_lmdb(mask_root, root, path))
