"""Training augmentation of words and of SSN's samples.

Geometry moves image and mask together (loading/transforms.py); everything else touches the image only. All random
decisions come from the generator that is passed in, so that a sample depends on nothing but that.
"""

import functools
import math

import cv2
import numpy as np
from numpy.random import Generator

from loading.decoding import Mask, Picture, Size
from loading.transforms import FROM_OPENCV, MAX_SIDE, TO_OPENCV, ResizeWord, fit_canvas, limit_size, resize, warp_pair

# --- magnitudes -------------------------------------------------------------------------------------------------------


def symmetric(rng: Generator, maximum: float) -> float:
    """A magnitude in (-maximum, maximum), mostly small: 2 (Beta(4, 4) - 0.5) x maximum."""
    return 2.0 * (rng.beta(4.0, 4.0) - 0.5) * maximum


def one_sided(rng: Generator, maximum: float) -> float:
    """A magnitude in (0, maximum), mostly small: Beta(1, 4) x maximum."""
    return rng.beta(1.0, 4.0) * maximum


# --- geometry ---------------------------------------------------------------------------------------------------------

# The published four: nearest, linear, cubic, area; a warp by area is a linear one in OpenCV.
INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LINEAR)


def rotation(rng: Generator, size: Size, *, degrees: float = 45.0) -> np.ndarray:
    """Matrix (3, 3) of a rotation by up to `degrees` either way."""
    return rotation_matrix(symmetric(rng, degrees))


def rotation_matrix(degrees: float) -> np.ndarray:
    """Matrix (3, 3) of a rotation."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def affine(
    rng: Generator,
    size: Size,
    *,
    degrees: float = 45.0,
    scale: tuple[float, float] = (0.5, 2.0),
    shear: tuple[float, float] = (45.0, 15.0),
) -> np.ndarray:
    """Matrix (3, 3) of a scaling, a rotation by up to `degrees` and shears of up to `shear` degrees along x and y."""
    turned = rotation(rng, size, degrees=degrees)
    factor = rng.uniform(*scale)
    along_x = math.tan(math.radians(symmetric(rng, shear[0])))
    along_y = math.tan(math.radians(symmetric(rng, shear[1])))
    # A shear along x, then one along y, then the rotation.
    shears = np.array([[1.0, along_x, 0.0], [along_y, 1.0 + along_x * along_y, 0.0], [0.0, 0.0, 1.0]])
    return np.diag((factor, factor, 1.0)) @ turned @ shears


def perspective(rng: Generator, size: Size, *, distortion: float = 0.5) -> np.ndarray:
    """Matrix (3, 3) that moves every corner inwards by up to `distortion` of half a side along x and y."""
    height, width = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float32)
    moves = rng.beta(1.0, 4.0, (4, 2)).astype(np.float32) * np.float32(distortion / 2) * corners[2]
    return cv2.getPerspectiveTransform(corners, corners + inwards * moves)


# --- deterioration ----------------------------------------------------------------------------------------------------


NOISE_DEVIATION = 30.0  # grey levels of the table; rounding adds less than 0.05 to a deviation of 4.5
NOISE_MIDDLE = 128.0


@functools.cache
def _noise_table() -> np.ndarray:
    """Normal numbers (2^20,) as grey levels: every picture takes a random part of them, which costs no drawing."""
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal(1 << 20, dtype=np.float32)
    return np.clip(np.rint(normal * NOISE_DEVIATION + NOISE_MIDDLE), 0, 255).astype(np.uint8)


def gaussian_noise(picture: Picture, rng: Generator, *, variance: float = 20.0) -> Picture:
    """Add normal noise of a variance of 1 to `variance` (grey levels squared), per pixel and channel."""
    factor = math.sqrt(max(one_sided(rng, variance), 1.0)) / NOISE_DEVIATION
    return cv2.addWeighted(picture, 1.0, _noise_levels(picture.shape, rng), factor, -NOISE_MIDDLE * factor)


def _noise_levels(shape: tuple[int, ...], rng: Generator) -> np.ndarray:
    """A random part of the noise table, in some shape."""
    size, table = math.prod(shape), _noise_table()
    if size * 2 > table.size:
        table = np.resize(table, size * 2)
    start = int(rng.integers(table.size - size))
    return table[start : start + size].reshape(shape)


DIRECTIONS = 36  # of motion blur: steps of 5 degrees


def motion_blur(picture: Picture, rng: Generator, *, length: float = 6.0) -> Picture:
    """Blur along a line of up to `length` pixels in any direction."""
    pixels = round(one_sided(rng, length))
    direction = int(rng.integers(DIRECTIONS))
    if pixels < 2:
        return picture
    return cv2.filter2D(picture, -1, line_kernel(pixels, direction), borderType=cv2.BORDER_REPLICATE)


@functools.cache
def line_kernel(pixels: int, direction: int) -> np.ndarray:
    """Kernel with sum 1: a centred line of `pixels` length, `direction` of DIRECTIONS half-turns from the x axis."""
    angle = math.pi * direction / DIRECTIONS
    radius = pixels // 2 + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    for offset in np.linspace(-(pixels - 1) / 2, (pixels - 1) / 2, 2 * pixels - 1):
        x, y = radius + offset * math.cos(angle), radius + offset * math.sin(angle)
        column, row = int(x), int(y)
        right, below = x - column, y - row
        kernel[row : row + 2, column : column + 2] += np.outer((1 - below, below), (1 - right, right))
    return kernel / kernel.sum()


PYRAMID_BASE = (128, 512)  # height and width of the lowest level


def rescale(picture: Picture, rng: Generator, *, base: Size = PYRAMID_BASE, steps: float = 4.0) -> Picture:
    """Lose detail: to the size `base`, up to `steps` levels of a Gaussian pyramid down, and back to its own size."""
    small = resize(picture, base)
    for _ in range(round(rng.uniform(0.0, steps))):
        small = cv2.pyrDown(small)
    return resize(small, picture.shape[:2])


def deteriorate(picture: Picture, rng: Generator) -> Picture:
    """Noise, motion blur and loss of detail, in random order."""
    kinds = (gaussian_noise, motion_blur, rescale)
    for kind in rng.permutation(len(kinds)):
        picture = kinds[kind](picture, rng)
    return picture


# --- colour -----------------------------------------------------------------------------------------------------------


def color_jitter(
    picture: Picture,
    rng: Generator,
    *,
    brightness: float = 0.5,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.1,
) -> Picture:
    """Change brightness, contrast, saturation (factors 1 - x to 1 + x) and hue (turns -x to x), in random order.

    The factors are uniform, as those of torchvision's operation of this name, which the published recipe calls.
    """
    factors = 1.0 + rng.uniform(-1.0, 1.0, 3) * (brightness, contrast, saturation)
    turn = rng.uniform(-hue, hue)
    for kind in rng.permutation(4):
        if kind == 0:
            picture = _stretch(picture, factors[0], 0.0)
        elif kind == 1:
            picture = _contrast(picture, factors[1])
        elif kind == 2:
            picture = _saturate(picture, factors[2])
        else:
            picture = _turn_hue(picture, turn)
    return picture


def _stretch(picture: Picture, factor: float, offset: float) -> Picture:
    """factor x level + offset, within [0, 255]."""
    return cv2.addWeighted(picture, factor, picture, 0.0, offset)  # saturates, and is faster than a table


def _contrast(picture: Picture, factor: float) -> Picture:
    mean = cv2.mean(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))[0]
    return _stretch(picture, factor, (1.0 - factor) * mean)


def _saturate(picture: Picture, factor: float) -> Picture:
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(picture, factor, grey, 1.0 - factor, 0.0)


def _turn_hue(picture: Picture, turn: float) -> Picture:
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL)  # hue takes the whole range 0-255, so that uint8 wraps rightly
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


# --- words ------------------------------------------------------------------------------------------------------------


class AugmentWord:
    """The published training augmentation, then resizing; kinds and magnitudes are drawn for every sample.

    Args:
        resize: brings the result to the network's size.
        deterioration, color, geometry: probability of each; they come in this order.
    """

    def __init__(
        self,
        resize: ResizeWord | None = None,
        *,
        deterioration: float = 0.25,
        color: float = 0.25,
        geometry: float = 0.5,
    ) -> None:
        self.resize = resize or ResizeWord()
        self.size = self.resize.size
        self.deterioration = deterioration
        self.color = color
        self.geometry = geometry

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator) -> tuple[Picture, Mask | None]:
        draws = rng.random(3).tolist()
        picture, mask = limit_size(picture), None if mask is None else limit_size(mask)
        if draws[0] < self.deterioration:
            picture = deteriorate(picture, rng)
        if draws[1] < self.color:
            picture = color_jitter(picture, rng)
        if draws[2] >= self.geometry:
            return self.resize(picture, mask, rng)
        kind = (rotation, affine, perspective)[rng.integers(3)]
        matrix, canvas = fit_canvas(kind(rng, picture.shape[:2]), picture.shape[:2])
        interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
        size = self.resize.draw_size(canvas, rng)
        if canvas[0] >= size[0] and canvas[1] >= size[1]:
            # The canvas, larger than what the network sees of it, is never made: resizing it down picks bilinear
            # samples without smoothing, so that warping straight to the smaller size takes the same samples for less.
            # A smaller canvas is made: there the warp itself loses detail.
            matrix = np.diag((size[1] / canvas[1], size[0] / canvas[0], 1.0)) @ matrix
            canvas = size
        picture, mask = warp_pair(picture, mask, matrix, canvas, interpolation)
        return self.resize.place(picture, size), None if mask is None else self.resize.place(mask, size)


class RandAugmentWord:
    """RandAugment as PARSeq uses it (Bautista and Atienza, 2022), then resizing.

    `layers` times one of the fifteen operations is drawn, and applied half of the time, at `magnitude` (drawn around it
    with a deviation of 0.5), to either side where it has sides. Rotations and shears enlarge the canvas, so that no
    letter is cut off; borders are replicated.

    Args:
        resize: brings the result to the network's size; a larger image is first brought to four times its area.
        layers: operations that are drawn.
        magnitude: of 10.
        probability: of each operation that is drawn.
    """

    def __init__(
        self,
        resize: ResizeWord | None = None,
        *,
        layers: int = 3,
        magnitude: float = 5.0,
        probability: float = 0.5,
    ) -> None:
        self.resize = resize or ResizeWord()
        self.size = self.resize.size
        self.layers = layers
        self.magnitude = magnitude
        self.probability = probability

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator) -> tuple[Picture, Mask | None]:
        size = self._bounded(picture.shape[:2])
        picture, mask = resize(picture, size), None if mask is None else resize(mask, size)
        pixels, matrices = list(PIXEL_OPERATIONS.values()), list(MATRIX_OPERATIONS.values())
        for _ in range(self.layers):
            number = int(rng.integers(len(pixels) + len(matrices)))
            level = min(max(rng.normal(self.magnitude, 0.5), 0.0), 10.0) / 10
            applied, side = rng.random(2) < (self.probability, 0.5)
            if not applied:
                continue
            level = level if side else -level
            if number < len(pixels):
                picture = pixels[number](picture, level, rng)
                continue
            matrix, canvas = matrices[number - len(pixels)](level, picture.shape[:2]), picture.shape[:2]
            if not matrix[:2, 2].any():
                matrix, canvas = fit_canvas(matrix, canvas)
            size = self._bounded(canvas)
            matrix = np.diag((size[1] / canvas[1], size[0] / canvas[0], 1.0)) @ matrix
            picture, mask = warp_pair(picture, mask, matrix, size, cv2.INTER_LINEAR)
        return self.resize(picture, mask, rng)

    def _bounded(self, size: Size) -> Size:
        """A size of the same shape and at most four times the network's area, which bounds the time of a word."""
        scale = math.sqrt(4 * self.size[0] * self.size[1] / (size[0] * size[1]))
        if scale >= 1:
            return size
        return tuple(min(max(round(side * scale), 1), MAX_SIDE) for side in size)


def _auto_contrast(picture: Picture, level: float, rng: Generator) -> Picture:
    channels = [cv2.normalize(each, None, 0, 255, cv2.NORM_MINMAX) for each in cv2.split(picture)]
    return cv2.merge(channels)


def _equalize(picture: Picture, level: float, rng: Generator) -> Picture:
    return cv2.merge([cv2.equalizeHist(each) for each in cv2.split(picture)])


def _solarize(picture: Picture, level: float, rng: Generator) -> Picture:
    levels = np.arange(256)
    return cv2.LUT(picture, np.where(levels < 256 * (1 - abs(level)), levels, 255 - levels).astype(np.uint8))


def _blur(picture: Picture, level: float, rng: Generator) -> Picture:
    deviation = max(abs(level) * picture.shape[0] / 20, 0.1)  # a twentieth of the height at most
    return cv2.GaussianBlur(picture, (0, 0), deviation, borderType=cv2.BORDER_REPLICATE)


def _poisson_noise(picture: Picture, level: float, rng: Generator) -> Picture:
    """Noise of a variance in proportion to the brightness, of a deviation of up to 30 grey levels in white."""
    deviations = np.sqrt(abs(level) * np.arange(256) / 255).astype(np.float32)  # parts of NOISE_DEVIATION
    noise = _noise_levels(picture.shape, rng).astype(np.float32) - np.float32(NOISE_MIDDLE)
    return cv2.add(picture, cv2.multiply(noise, cv2.LUT(picture, deviations)), dtype=cv2.CV_8U)


# (image, level from -1 to 1, generator) -> image. What has no two sides takes the level's size, or none.
PIXEL_OPERATIONS = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda picture, level, rng: cv2.bitwise_not(picture),
    "posterize": lambda picture, level, rng: picture & np.uint8(256 - (1 << round(7 * abs(level)))),
    "solarize": _solarize,
    "color": lambda picture, level, rng: _saturate(picture, 1 + 0.9 * level),
    "contrast": lambda picture, level, rng: _contrast(picture, 1 + 0.9 * level),
    "brightness": lambda picture, level, rng: _stretch(picture, 1 + 0.9 * level, 0.0),
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


class CropSegmentation:
    """Training sample of SSN: random scale, random crop of a fixed size, colour. Text is not mirrored.

    Args:
        size: height and width of the crop.
        scale_range: smallest and largest factor; drawn log-uniformly.
        ignore_index: label of what lies outside the picture.
        color: probability of colour jitter.
    """

    def __init__(
        self,
        *,
        size: Size = (513, 513),
        scale_range: tuple[float, float] = (0.5, 2.0),
        ignore_index: int = 255,
        color: float = 0.25,
    ) -> None:
        self.size = tuple(size)
        self.scale_range = tuple(scale_range)
        self.ignore_index = ignore_index
        self.color = color

    def __call__(self, picture: Picture, labels: np.ndarray, rng: Generator) -> tuple[Picture, np.ndarray]:
        """Crop a picture and its labels (H, W) uint8; labels keep their values."""
        scale = math.exp(rng.uniform(*(math.log(each) for each in self.scale_range)))
        offsets = []
        for side, crop in zip(picture.shape[:2], self.size, strict=True):
            room = crop - side * scale  # negative: the picture is larger than the crop, a part of it is taken
            offsets.append(rng.uniform(min(room, 0.0), max(room, 0.0)))
        matrix = np.array([[scale, 0.0, offsets[1]], [0.0, scale, offsets[0]], [0.0, 0.0, 1.0]])
        matrix = (TO_OPENCV @ matrix @ FROM_OPENCV)[:2]
        canvas = (self.size[1], self.size[0])
        picture = cv2.warpAffine(picture, matrix, canvas, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        outside = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": self.ignore_index}
        labels = cv2.warpAffine(labels, matrix, canvas, flags=cv2.INTER_NEAREST, **outside)
        if rng.random() < self.color:
            picture = color_jitter(picture, rng)
        return picture, labels
