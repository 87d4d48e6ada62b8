"""Training augmentation of words, of SSN's samples and of spellings.

Geometry moves image and mask together (loading/transforms.py); everything else changes the image only. All random
decisions come from the generator that is passed in.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator

from loading.batches import IGNORED
from loading.decoding import ImageArray, Mask, Size
from loading.transforms import (
    MAX_SIDE,
    ResizeWord,
    fit_canvas,
    limit_size,
    resize,
    rotation_matrix,
    warp,
    warp_pair,
)

# --- magnitudes -------------------------------------------------------------------------------------------------------


def symmetric(rng: Generator, maximum: float) -> float:
    """Sample a magnitude in (-maximum, maximum), mostly small: 2 (Beta(4, 4) - 0.5) x maximum."""
    return 2.0 * (rng.beta(4.0, 4.0) - 0.5) * maximum


def one_sided(rng: Generator, maximum: float) -> float:
    """Sample a magnitude in (0, maximum), mostly small: Beta(1, 4) x maximum."""
    return rng.beta(1.0, 4.0) * maximum


# --- geometry ---------------------------------------------------------------------------------------------------------

# The published four: nearest, linear, cubic, area; a warp by area is a linear one in OpenCV.
INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LINEAR)


def rotation(rng: Generator, size: Size, *, degrees: float = 45.0) -> np.ndarray:
    """Sample the matrix (3, 3) of a rotation by up to `degrees` either way."""
    return rotation_matrix(symmetric(rng, degrees))


def affine(
    rng: Generator,
    size: Size,
    *,
    degrees: float = 45.0,
    scale: tuple[float, float] = (0.5, 2.0),
    shear: tuple[float, float] = (45.0, 15.0),
) -> np.ndarray:
    """Sample the matrix (3, 3) of a scaling, a rotation by up to `degrees`, and shears (degrees) along x and y."""
    turned = rotation(rng, size, degrees=degrees)
    factor = rng.uniform(*scale)
    along_x = math.tan(math.radians(symmetric(rng, shear[0])))
    along_y = math.tan(math.radians(symmetric(rng, shear[1])))
    # A shear along x, then one along y, then the rotation.
    shears = np.array([[1.0, along_x, 0.0], [along_y, 1.0 + along_x * along_y, 0.0], [0.0, 0.0, 1.0]])
    return np.diag((factor, factor, 1.0)) @ turned @ shears


def perspective(rng: Generator, size: Size) -> np.ndarray:
    """Sample the matrix (3, 3) that moves every corner inwards by up to a quarter of the side along x and y."""
    height, width = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float32)
    moves = rng.beta(1.0, 4.0, (4, 2)).astype(np.float32) * np.float32(0.25) * corners[2]
    return cv2.getPerspectiveTransform(corners, corners + inwards * moves)


# --- deterioration ----------------------------------------------------------------------------------------------------


NOISE_DEVIATION = 30.0  # grey levels of the table; rounding adds less than 0.05 to a deviation of 4.5
NOISE_MIDDLE = 128.0


@functools.cache
def _noise_table() -> np.ndarray:
    """Return normal numbers (2^20,) as grey levels: an image takes a random part of them, faster than sampling."""
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal(1 << 20, dtype=np.float32)
    return np.clip(np.rint(normal * NOISE_DEVIATION + NOISE_MIDDLE), 0, 255).astype(np.uint8)


def gaussian_noise(image: ImageArray, rng: Generator) -> ImageArray:
    """Add normal noise of a variance of 1 to 20 (grey levels squared), per pixel and channel."""
    factor = math.sqrt(max(one_sided(rng, 20.0), 1.0)) / NOISE_DEVIATION
    return cv2.addWeighted(image, 1.0, _noise_levels(image.shape, rng), factor, -NOISE_MIDDLE * factor)


def _noise_levels(shape: tuple[int, ...], rng: Generator) -> np.ndarray:
    """Return a random part of the noise table, in some shape."""
    size, table = math.prod(shape), _noise_table()
    if size * 2 > table.size:
        table = np.resize(table, size * 2)
    start = int(rng.integers(table.size - size))
    return table[start : start + size].reshape(shape)


DIRECTIONS = 36  # of motion blur: steps of 5 degrees


def motion_blur(image: ImageArray, rng: Generator) -> ImageArray:
    """Blur along a line of up to 6 pixels in any direction."""
    pixels = round(one_sided(rng, 6.0))
    direction = int(rng.integers(DIRECTIONS))
    if pixels < 2:
        return image
    return cv2.filter2D(image, -1, line_kernel(pixels, direction), borderType=cv2.BORDER_REPLICATE)


@functools.cache
def line_kernel(pixels: int, direction: int) -> np.ndarray:
    """Return a kernel with sum 1: a centred line of `pixels` length, at `direction` / DIRECTIONS of a half-turn."""
    angle = math.pi * direction / DIRECTIONS
    radius = pixels // 2 + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    for offset in np.linspace(-(pixels - 1) / 2, (pixels - 1) / 2, 2 * pixels - 1):
        x, y = radius + offset * math.cos(angle), radius + offset * math.sin(angle)
        column, row = int(x), int(y)
        right, below = x - column, y - row
        kernel[row : row + 2, column : column + 2] += np.outer((1 - below, below), (1 - right, right))
    return kernel / kernel.sum()


def rescale(image: ImageArray, rng: Generator) -> ImageArray:
    """Lose detail: resize to 128 x 512 pixels, go down up to 4 levels of a Gaussian pyramid, and resize back."""
    small = resize(image, (128, 512))
    for _ in range(round(rng.uniform(0.0, 4.0))):
        small = cv2.pyrDown(small)
    return resize(small, image.shape[:2])


def deteriorate(image: ImageArray, rng: Generator) -> ImageArray:
    """Apply noise, motion blur and loss of detail in random order."""
    kinds = (gaussian_noise, motion_blur, rescale)
    for kind in rng.permutation(len(kinds)):
        image = kinds[kind](image, rng)
    return image


# --- colour -----------------------------------------------------------------------------------------------------------


COLOR_STRENGTHS = (0.5, 0.5, 0.5, 0.1)  # of brightness, contrast, saturation, hue


def color_jitter(image: ImageArray, rng: Generator, strengths: Sequence[float] = COLOR_STRENGTHS) -> ImageArray:
    """Change brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (turns -x to x), in random order.

    The factors are uniform, as those of torchvision's operation of this name, which the published recipe calls.
    """
    changes = (_brighten, _contrast, _saturate, _turn_hue)
    magnitudes = rng.uniform(-1.0, 1.0, 4) * strengths + (1.0, 1.0, 1.0, 0.0)
    for kind in rng.permutation(4):
        image = changes[kind](image, magnitudes[kind])
    return image


def _brighten(image: ImageArray, factor: float, offset: float = 0.0) -> ImageArray:
    """Return factor x level + offset, within [0, 255]."""
    return cv2.addWeighted(image, factor, image, 0.0, offset)  # saturates, and is faster than a table


def _contrast(image: ImageArray, factor: float) -> ImageArray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _brighten(image, factor, (1.0 - factor) * mean)


def _saturate(image: ImageArray, factor: float) -> ImageArray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1.0 - factor, 0.0)


def _turn_hue(image: ImageArray, turn: float) -> ImageArray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue takes the whole range 0-255, so that uint8 wraps rightly
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


# --- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AugmentWord:
    """Applies the published training augmentation, then resizes; kinds and magnitudes are sampled for every word.

    Args:
        resize: brings the result to the network's size.
        deterioration, color, geometry: probability of each; they come in this order.
    """

    resize: ResizeWord = field(default_factory=ResizeWord)
    deterioration: float = 0.25
    color: float = 0.25
    geometry: float = 0.5

    def __call__(self, image: ImageArray, mask: Mask | None, rng: Generator) -> tuple[ImageArray, Mask | None]:
        draws = rng.random(3).tolist()
        image, mask = limit_size(image), None if mask is None else limit_size(mask)
        if draws[0] < self.deterioration:
            image = deteriorate(image, rng)
        if draws[1] < self.color:
            image = color_jitter(image, rng)
        if draws[2] >= self.geometry:
            return self.resize(image, mask, rng)
        kind = (rotation, affine, perspective)[rng.integers(3)]
        matrix, canvas = fit_canvas(kind(rng, image.shape[:2]), image.shape[:2])
        interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
        size = self.resize.sample_size(canvas, rng)
        if canvas[0] >= size[0] and canvas[1] >= size[1]:
            # The canvas, larger than what the network sees of it, is never made: resizing it down picks bilinear
            # samples without smoothing, so that warping straight to the smaller size takes the same samples for less.
            # A smaller canvas is made: there the warp itself loses detail.
            matrix = np.diag((size[1] / canvas[1], size[0] / canvas[0], 1.0)) @ matrix
            canvas = size
        image, mask = warp_pair(image, mask, matrix, canvas, interpolation)
        return self.resize.place(image, size), None if mask is None else self.resize.place(mask, size)


@dataclass(frozen=True)
class RandAugmentWord:
    """Applies RandAugment as PARSeq uses it (Bautista and Atienza, 2022), then resizes.

    Three times, one of the fifteen operations is sampled, and applied half of the time, at a magnitude of 5 (sampled
    with a deviation of 0.5), in either direction where it has two. Rotations and shears enlarge the canvas, so that
    letters are not cut off; borders are replicated.

    Args:
        resize: brings the result to the network's size; a larger image is first brought to four times its area.
        probability: of each sampled operation.
    """

    resize: ResizeWord = field(default_factory=ResizeWord)
    probability: float = 0.5

    def __call__(self, image: ImageArray, mask: Mask | None, rng: Generator) -> tuple[ImageArray, Mask | None]:
        size = self._bounded(image.shape[:2])
        image, mask = resize(image, size), None if mask is None else resize(mask, size)
        pixels, matrices = list(PIXEL_OPERATIONS.values()), list(MATRIX_OPERATIONS.values())
        for _ in range(3):
            number = int(rng.integers(len(pixels) + len(matrices)))
            level = min(max(rng.normal(5.0, 0.5), 0.0), 10.0) / 10
            applied, side = rng.random(2) < (self.probability, 0.5)
            if not applied:
                continue
            level = level if side else -level
            if number < len(pixels):
                image = pixels[number](image, level, rng)
                continue
            matrix, canvas = matrices[number - len(pixels)](level, image.shape[:2]), image.shape[:2]
            if not matrix[:2, 2].any():
                matrix, canvas = fit_canvas(matrix, canvas)
            size = self._bounded(canvas)
            matrix = np.diag((size[1] / canvas[1], size[0] / canvas[0], 1.0)) @ matrix
            image, mask = warp_pair(image, mask, matrix, size, cv2.INTER_LINEAR)
        return self.resize(image, mask, rng)

    def _bounded(self, size: Size) -> Size:
        """Return a size of the same aspect and at most four times the network's area: it bounds the time of a word."""
        scale = math.sqrt(4 * math.prod(self.resize.size) / math.prod(size))
        if scale >= 1:
            return size
        return tuple(min(max(round(side * scale), 1), MAX_SIDE) for side in size)


def _auto_contrast(image: ImageArray, level: float, rng: Generator) -> ImageArray:
    channels = [cv2.normalize(each, None, 0, 255, cv2.NORM_MINMAX) for each in cv2.split(image)]
    return cv2.merge(channels)


def _equalize(image: ImageArray, level: float, rng: Generator) -> ImageArray:
    return cv2.merge([cv2.equalizeHist(each) for each in cv2.split(image)])


def _solarize(image: ImageArray, level: float, rng: Generator) -> ImageArray:
    levels = np.arange(256)
    return cv2.LUT(image, np.where(levels < 256 * (1 - abs(level)), levels, 255 - levels).astype(np.uint8))


def _blur(image: ImageArray, level: float, rng: Generator) -> ImageArray:
    deviation = max(abs(level) * image.shape[0] / 20, 0.1)  # a twentieth of the height at most
    return cv2.GaussianBlur(image, (0, 0), deviation, borderType=cv2.BORDER_REPLICATE)


def _poisson_noise(image: ImageArray, level: float, rng: Generator) -> ImageArray:
    """Add noise whose variance is proportional to the brightness; its deviation is up to 30 grey levels in white."""
    deviations = np.sqrt(abs(level) * np.arange(256) / 255).astype(np.float32)  # parts of NOISE_DEVIATION
    noise = _noise_levels(image.shape, rng).astype(np.float32) - np.float32(NOISE_MIDDLE)
    return cv2.add(image, cv2.multiply(noise, cv2.LUT(image, deviations)), dtype=cv2.CV_8U)


# (image, level from -1 to 1, generator) -> image. Operations with one direction use the level's size, or nothing.
PIXEL_OPERATIONS = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda image, level, rng: cv2.bitwise_not(image),
    "posterize": lambda image, level, rng: image & np.uint8(256 - (1 << round(7 * abs(level)))),
    "solarize": _solarize,
    "color": lambda image, level, rng: _saturate(image, 1 + 0.9 * level),
    "contrast": lambda image, level, rng: _contrast(image, 1 + 0.9 * level),
    "brightness": lambda image, level, rng: _brighten(image, 1 + 0.9 * level),
    "gaussian_blur": _blur,
    "poisson_noise": _poisson_noise,
}
# (level, height and width) -> matrix (3, 3). A translation keeps the canvas.
MATRIX_OPERATIONS = {
    "rotate": lambda level, size: rotation_matrix(30 * level),
    "shear_x": lambda level, size: np.array([[1, 0.9 * level, 0], [0, 1, 0], [0, 0, 1.0]]),
    "shear_y": lambda level, size: np.array([[1, 0, 0], [0.2 * level, 1, 0], [0, 0, 1.0]]),
    "translate_x": lambda level, size: np.array([[1, 0, 0.1 * level * size[1]], [0, 1, 0], [0, 0, 1.0]]),
    "translate_y": lambda level, size: np.array([[1, 0, 0], [0, 1, 0.3 * level * size[0]], [0, 0, 1.0]]),
}


# --- segmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CropSegmentation:
    """Makes training samples of SSN: random scale, random crop of a fixed size, colour. Text is not mirrored.

    Args:
        size: height and width of the crop.
        scale_range: smallest and largest factor; sampled log-uniformly.
        color: probability of colour jitter.
    """

    size: Size = (513, 513)
    scale_range: tuple[float, float] = (0.5, 2.0)
    color: float = 0.25

    def __call__(self, image: ImageArray, labels: np.ndarray, rng: Generator) -> tuple[ImageArray, np.ndarray]:
        """Crop an image and its labels (H, W) uint8; labels keep their values."""
        scale = math.exp(rng.uniform(*(math.log(each) for each in self.scale_range)))
        offsets = []
        for side, crop in zip(image.shape[:2], self.size, strict=True):
            room = crop - side * scale  # negative: the image is larger than the crop, a part of it is taken
            offsets.append(rng.uniform(min(room, 0.0), max(room, 0.0)))
        matrix = np.array([[scale, 0.0, offsets[1]], [0.0, scale, offsets[0]], [0.0, 0.0, 1.0]])
        image = warp(image, matrix, self.size, cv2.INTER_LINEAR)
        labels = warp(labels, matrix, self.size, cv2.INTER_NEAREST, IGNORED)
        if rng.random() < self.color:
            image = color_jitter(image, rng)
        return image, labels


# --- spellings --------------------------------------------------------------------------------------------------------

_MUTATION_COUNTS = np.cumsum([0.7, 0.15, 0.1, 0.05])  # none, one, two, three characters
_MUTATION_KINDS = np.cumsum([0.7, 0.15, 0.15])  # replace, insert before, delete
SHORT_WORD = 4


def mutate_spelling(text: str, characters: str, rng: Generator, *, max_length: int) -> str:
    """Return a text with a few wrong characters, as a recogniser would read it; never empty, never over `max_length`.

    None, one, two or three characters (0.7, 0.15, 0.1, 0.05), at most one of up to four and at most half of longer
    texts, are each replaced, preceded by another or deleted (0.7, 0.15, 0.15). Texts that are mostly digits are kept.
    """
    count = int(np.searchsorted(_MUTATION_COUNTS, rng.random(), side="right"))
    count = min(count, 1 if len(text) <= SHORT_WORD else len(text) // 2, 3)
    if not count or sum(map(str.isdigit, text)) > len(text) / 2:
        return text
    mutated = list(text)
    for place in rng.choice(len(text), count, replace=False).tolist():
        kind = int(np.searchsorted(_MUTATION_KINDS, rng.random(), side="right"))
        if kind < 2:
            new = characters[rng.integers(len(characters))]
            mutated[place] = new if kind == 0 else new + text[place]
        else:
            mutated[place] = ""
    return "".join(mutated)[:max_length] or text
