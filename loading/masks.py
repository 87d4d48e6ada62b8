"""Reads the masks of words from the mask LMDB that belongs to their LMDB."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loading.decoding import BrokenImageError, ImageArray, Mask, decode_image, decode_mask
from loading.lmdb_io import LmdbReader, find_lmdbs, image_key, is_lmdb, label_key
from utils import UserError

MASK_MISSING = "mask_missing"
MASK_BROKEN = "mask_broken"
MASK_SIZE = "mask_size"  # not the size of its image

PAIRS_CHECKED = 16

MakeMasks = Callable[[list[ImageArray]], Sequence[Mask]]


class LmdbMasks:
    """Masks of a mask LMDB: the keys of the image LMDB, `image-%09d` = 8-bit grey, 255 = text.

    Args:
        key: of the mask of a sample, another one in an LMDB that holds images and masks together.
    """

    def __init__(self, path: str | Path, key: Callable[[int], str] = image_key) -> None:
        self.reader = LmdbReader(path)
        self.key = key

    def check(self, words: LmdbReader, numbers: np.ndarray) -> None:
        """Compare the numbers of samples, and presence, size and label of some samples spread over the set."""
        if len(words) != len(self.reader):
            raise self._mismatch(words, f"{len(words)} samples against {len(self.reader)}")
        chosen = np.linspace(0, len(numbers) - 1, min(PAIRS_CHECKED, len(numbers))).astype(int)
        for number in np.unique(numbers[chosen]).tolist():
            label, copied = words.get(label_key(number)), self.reader.get(label_key(number))
            if copied is not None and copied != label:
                raise self._mismatch(words, f"{label_key(number)} is {label!r} against {copied!r}")
            try:
                mask = self.read(number, decode_image(words.get(image_key(number)) or b""))
            except BrokenImageError:
                continue  # counted when it is read; tools/create_masks.py makes no mask of a broken image
            if isinstance(mask, str) and mask != MASK_BROKEN:
                difference = "has no mask" if mask == MASK_MISSING else "and its mask differ in size"
                raise self._mismatch(words, f"{image_key(number)} {difference}")

    def _mismatch(self, words: LmdbReader, difference: str) -> UserError:
        return UserError(
            f"masks {self.reader.path} do not belong to {words.path}: {difference}; "
            "check dataset.masks.root or make the masks again with tools/create_masks.py"
        )

    def read(self, number: int, image: ImageArray) -> Mask | str:
        """Return the mask of an image, of its size, or the reason why there is none."""
        data = self.reader.get(self.key(number))
        if data is None:
            return MASK_MISSING
        try:
            mask = decode_mask(data)
        except BrokenImageError:
            return MASK_BROKEN
        return mask if mask.shape == image.shape[:2] else MASK_SIZE


def find_mask_lmdb(mask_root: str | Path, image_root: str | Path, image_lmdb: str | Path) -> Path:
    """Find the mask LMDB of an image LMDB that was found below `image_root`: `<mask_root>/X` for `<root of images>/X`.

    The root of images is `image_root`, or its parent (`image_root` is then itself the set, or a folder of a larger
    tree). A `mask_root` that is itself an LMDB serves a single image LMDB.

    Raises:
        UserError: none of these exists; names the first place.
    """
    mask_root, image_root, image_lmdb = Path(mask_root), Path(image_root), Path(image_lmdb)
    relative = image_lmdb.relative_to(image_root)
    named = Path(Path(os.path.abspath(image_root)).name) / relative
    candidates = [mask_root / named] if image_lmdb == image_root else [mask_root / relative, mask_root / named]
    if len(find_lmdbs(image_root)) == 1:
        candidates.append(mask_root)
    for candidate in candidates:
        if is_lmdb(candidate):
            return candidate
    raise UserError(
        f"{candidates[0]}: no mask LMDB for {image_lmdb}; make it with tools/create_masks.py, set "
        "dataset.masks.root, or let an SSN make masks online (dataset.masks.source=online)"
    )
