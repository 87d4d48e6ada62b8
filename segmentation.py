"""Text masks for pictures of any sizes: SSN over one or several sizes, in batches, in the precision that is fastest.

The procedure is the published one (`SSN.text_probability`), with the pictures that
enter the network at one size sharing a forward pass. A mask holds round(255 * probability): storing it in 8 bits moves
a probability by at most 1 / 510.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from batches import normalize_images
from modules.hrnet import resize_aligned
from modules.ssn import PUBLISHED_AREAS, SSN, network_size
from precision import PRECISIONS, fastest_precision
from utils import UserError

# Pixels of the network's input in one forward pass: enough to keep a device busy; on a CPU more only leaves the caches.
BATCH_PIXELS = {"cuda": 1 << 23, "cpu": 1 << 19}

T = TypeVar("T")
R = TypeVar("R")


class Segmenter:
    """Gives each picture its text mask; a picture's mask does not depend on those that it is given with.

    Args:
        ssn: the network; a copy of it is used, so that it may go on learning.
        areas: sides of the squares whose areas the resized pictures have, in pixels; the mean over them is the mask.
        device: where the copy runs.
        precision: of weights and maps: `fp32`, `bf16`, `fp16`; `auto` takes bf16 where the device multiplies it
            natively, else fp32. Softmaxes, attention and everything at the pictures' own size stay in float32.
        batch_pixels: network input pixels in one forward pass, more for a single picture that is larger; None chooses.

    Raises:
        ValueError: `areas` is empty or `precision` is none of the above.
    """

    def __init__(
        self,
        ssn: SSN,
        areas: Sequence[int] = PUBLISHED_AREAS,
        *,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        batch_pixels: int | None = None,
    ) -> None:
        if not areas:
            raise ValueError("areas must name at least one side in pixels, such as 193")
        self.areas = tuple(areas)
        self.device = torch.device(device)
        self.precision = fastest_precision(self.device) if precision == "auto" else precision
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it must be auto, {', '.join(PRECISIONS)}")
        self.batch_pixels = batch_pixels or BATCH_PIXELS.get(self.device.type, BATCH_PIXELS["cpu"])
        self._dtype = PRECISIONS[self.precision]
        network = fold_batch_norms(copy.deepcopy(ssn).eval().requires_grad_(False).float())
        self._ssn: SSN = network.to(self.device, self._dtype, memory_format=torch.channels_last)

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Masks, uint8 (H, W), 255 = text, of RGB pictures, uint8 (H, W, 3)."""
        return [to_8_bits(probability) for probability in self.probabilities(pictures)]

    @torch.inference_mode()
    def probabilities(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Probability of text of every pixel, float32 (H, W), for RGB pictures, uint8 (H, W, 3).

        Raises:
            ValueError: a picture has another type or shape, or no pixel.
            UserError: the network overflowed, as fp16 or weights of a training that diverged make it.
        """
        images = [self._to_device(picture, i) for i, picture in enumerate(pictures)]
        totals = [torch.zeros(image.shape[-2:], device=self.device) for image in images]
        batches = [
            (size, members)
            for area in self.areas
            for size, members in self._batches([image.shape[-2:] for image in images], area)
        ]

        def text_maps(batch: tuple[tuple[int, int], list[int]]) -> list[Tensor]:
            size, members = batch
            return self._text_maps([images[i] for i in members], size)

        for (_, members), maps in zip(batches, self._map(text_maps, batches), strict=True):
            for i, each in zip(members, maps, strict=True):
                totals[i] += each  # (H, W); in the order of the areas, so that the sum is the same every time
        probabilities = [(total / len(self.areas)).cpu().numpy() for total in totals]
        if not all(np.isfinite(each).all() for each in probabilities):
            raise UserError(f"SSN gives numbers that are not finite in {self.precision}; use fp32, or other weights")
        return probabilities

    def _to_device(self, picture: np.ndarray, i: int) -> Tensor:
        """(1, 3, H, W), float32, 0..255."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise ValueError(f"picture {i} is {picture.dtype} {picture.shape}; it must be uint8 (H, W, 3), not empty")
        # Copied: torch cannot wrap an array that is not writable.
        return torch.from_numpy(picture.copy()).to(self.device).permute(2, 0, 1)[None].float()

    def _batches(self, sizes: Sequence[Sequence[int]], area: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """(network size, indices of pictures) of each forward pass at this area."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, size in enumerate(sizes):
            groups[network_size(size, area)].append(i)
        for (height, width), members in groups.items():
            step = max(1, self.batch_pixels // (height * width))
            for start in range(0, len(members), step):
                yield (height, width), members[start : start + step]

    def _map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
        """`map`; on a CPU the items run side by side, one thread each.

        A batch of words is made of small maps: threads that share each operation wait for one another more than they
        work.
        """
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or min(threads, len(items)) < 2:
            yield from map(function, items)
            return
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(function, items)
        finally:
            torch.set_num_threads(threads)  # the pool's setting holds for threads that come later, too

    @torch.inference_mode()
    def _text_maps(self, images: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Probability of text, float32 (H, W) each, of images that enter the network at `size`."""
        batch = torch.cat([resize_aligned(image, size) for image in images])
        batch = normalize_images(batch).to(self._dtype, memory_format=torch.channels_last)
        maps = self._ssn.probability(batch)  # (len(images), 1, h, w)
        return [resize_aligned(each[None], image.shape[-2:])[0, 0] for each, image in zip(maps, images, strict=True)]


def to_8_bits(probability: np.ndarray) -> np.ndarray:
    """round(255 * probability), uint8."""
    return np.rint(probability * 255).astype(np.uint8)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold, in place, each batch norm of a network in eval mode into the convolution that stands before it.

    For networks whose modules are named in the order in which they run, as HRNet and its head; returns the network.
    """
    previous = None
    for name, child in list(network.named_children()):
        convolution = getattr(network, previous) if previous else None
        if isinstance(child, nn.BatchNorm2d) and isinstance(convolution, nn.Conv2d):
            setattr(network, previous, fuse_conv_bn_eval(convolution, child))
            setattr(network, name, nn.Identity())
        else:
            fold_batch_norms(child)
        previous = name
    return network
