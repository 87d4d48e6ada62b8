"""Text masks for images of any sizes: SSN over one or several sizes, in batches.

The procedure is the published one (`SSN.text_probability`), with the images that enter the network at one size sharing
a forward pass. A mask holds round(255 * probability): storing it in 8 bits moves a probability by at most 1 / 510.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.precision import PRECISIONS, fastest_precision, without_search
from inference.pipeline import in_order, single_threads
from loading.batches import normalize_images
from modules.functional import resize_aligned
from modules.ssn import PUBLISHED_AREAS, SSN, network_size
from utils import UserError

# Pixels of the network's input in one forward pass: enough to keep a device busy; on a CPU more only leaves the caches.
BATCH_PIXELS = {"cuda": 1 << 23, "cpu": 1 << 19}
IMAGE_PIXELS = 1 << 24  # of the images, at their own size, whose masks are made together


class Segmenter:
    """Gives each image its text mask; an image's mask does not depend on those that it is given with.

    One segmenter may be used by many threads at once.

    Args:
        ssn: the network; a copy of it is used, so that it may go on learning.
        areas: sides of the squares whose areas the resized images have, in pixels; the mean over them is the mask.
        device: where the copy runs.
        precision: of weights and maps: `fp32`, `bf16`, `fp16`, or `auto`, the fastest on the device. Training and test
            make masks in `fp32` on any device, so that all are the same. Softmaxes, attention and everything at the
            images' own size stay in float32.
        batch_pixels: network input pixels in one forward pass, more for a single image that is larger; None chooses.

    Raises:
        ValueError: `areas` is empty or `precision` is unknown.
    """

    def __init__(
        self,
        ssn: SSN,
        areas: Sequence[int] = PUBLISHED_AREAS,
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
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

        if self.device.type == "cpu":
            single_threads(torch.get_num_threads())  # here, where no other thread is likely to start its work

    @without_search()  # hardly any two groups of images have one size
    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return masks, uint8 (H, W), 255 = text, of RGB images, uint8 (H, W, 3).

        Raises:
            ValueError: an image has another type or shape, or is empty.
            UserError: the network overflowed, as fp16 or weights of a training that diverged make it.
        """
        for i, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
                raise ValueError(f"image {i} is {image.dtype} {image.shape}; it must be uint8 (H, W, 3), not empty")
        masks: list[np.ndarray] = []
        while len(masks) < len(images):
            masks += self._segment(_within(images[len(masks) :], IMAGE_PIXELS))
        return masks

    @torch.inference_mode()
    def _segment(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        images = [np.require(each, requirements=["C", "W"]) for each in images]  # as torch can wrap them
        tensors = [torch.from_numpy(each).to(self.device).permute(2, 0, 1)[None] for each in images]  # (1, 3, H, W)
        sizes = [each.shape[-2:] for each in tensors]
        batches = [batch for area in self.areas for batch in self._batches(sizes, area)]

        @torch.inference_mode()  # each thread has a mode of its own
        def text_maps(batch: tuple[tuple[int, int], list[int]]) -> Tensor:
            """Return probabilities of text (N, 1, h, w), float32, of the N images of a batch, at the network's size."""
            size, members = batch
            inputs = torch.cat([resize_aligned(tensors[i].float(), size) for i in members])
            return self._ssn.probability(normalize_images(inputs).to(self._dtype, memory_format=torch.channels_last))

        maps: list[list[Tensor]] = [[] for _ in tensors]
        overflows: list[Tensor] = []  # of each forward pass; a GPU is waited for once, not at each of them
        # Threads that share each operation on maps as small as those of words wait more than they work.
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        pool = single_threads(threads) if len(batches) > 1 else None
        for (_, members), made in zip(batches, in_order(text_maps, batches, pool, ahead=threads), strict=True):
            overflows.append((~made.isfinite()).any())
            for i, each in zip(members, made, strict=True):
                maps[i].append(each[None])  # (1, 1, h, w); in the order of the areas, so that sums are the same always
        if any(torch.stack(overflows).tolist()):
            raise UserError(f"SSN gives numbers that are not finite in {self.precision}; use fp32, or other weights")
        means = (
            sum(resize_aligned(each, size) for each in own) / len(own) for own, size in zip(maps, sizes, strict=True)
        )
        return [(mean * 255).round().byte()[0, 0].cpu().numpy() for mean in means]

    def _batches(self, sizes: Sequence[Sequence[int]], area: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """Yield (network size, indices of images) of each forward pass at this area."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, size in enumerate(sizes):
            groups[network_size(size, area)].append(i)
        for (height, width), members in groups.items():
            step = max(1, self.batch_pixels // (height * width))
            for start in range(0, len(members), step):
                yield (height, width), members[start : start + step]


def _within(images: Sequence[np.ndarray], pixels: int) -> Sequence[np.ndarray]:
    """Return the first images: as many as have at most that many pixels together, but at least one."""
    ends = np.cumsum([image.shape[0] * image.shape[1] for image in images])
    return images[: max(int(np.searchsorted(ends, pixels, side="right")), 1)]


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
