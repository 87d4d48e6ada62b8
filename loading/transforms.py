"""What happens to a picture and its mask between decoding and the batch: augmentation and resizing.

Pictures are RGB, uint8, (H, W, 3); masks are grey, uint8, (H, W), 255 = text, and of the size of their picture.
Geometry moves both with one matrix and one border rule; everything else touches the picture only. All random decisions
come from the generator that is passed in, so that a sample depends on nothing but that.

Matrices map points of the source to points of the result, in continuous coordinates: a picture of W x H pixels covers
[0, W] x [0, H], the middle of its first pixel is (0.5, 0.5).
"""

import contextlib
import functools
import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps

from utils import first_line

Picture = np.ndarray  # (H, W, 3) uint8, RGB
Mask = np.ndarray  # (H, W) uint8, 255 = text
Size = tuple[int, int]  # height, width
Fit = Literal["stretch", "centre", "left"]  # how an image gets the network's size: see ResizeWord

TEXT_THRESHOLD = 128  # a mask's pixel from this level on is text

MAX_SIDE = 4096  # pixels; larger pictures are brought down to it first (OpenCV's warps end at 32,767)

MAX_PIXELS = 1 << 26  # of an image that is decoded: its header tells, before memory is taken for it

_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_GREY = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_WITH_ALPHA = (4, 6)  # colour types
_NO_SIZE_IN_JPEG = (0xC4, 0xC8, 0xCC)  # segments among C0 to CF that begin no frame

FLOAT_RANGES = (1, 255, 65535)  # from 0 to each: in which levels of a deep image may lie
INTEGER_RANGES = (255, 65535)

# Silent about images that cannot be decoded: the data set reports them, by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)

# What Pillow's decoders raise on damaged or hostile files.
PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    AttributeError,
    Image.DecompressionBombError,
)


class BrokenPictureError(ValueError):
    """Bytes that are no whole picture."""


def decode_picture(data: bytes | memoryview, *, oriented: bool = False) -> Picture:
    """Decode an image of any depth, colour model and usual format to RGB.

    Deeper samples are scaled to 8 bits (`to_8_bits`), grey is repeated, transparent pixels show a white ground.

    Args:
        oriented: turn the image as its EXIF orientation says. Not in data sets: their masks and boxes are given for the
            stored pixels.

    Raises:
        BrokenPictureError: it is damaged, or has more than MAX_PIXELS.
    """
    return _decode(data, _COLOR, "RGB", oriented)


def decode_mask(data: bytes | memoryview, *, oriented: bool = False) -> Mask:
    """Decode a mask to one 8-bit channel, 255 = text; transparency is dropped. All else as `decode_picture`."""
    return _decode(data, _GREY, "L", oriented)


def _decode(data: bytes | memoryview, flags: int, mode: str, oriented: bool) -> np.ndarray:
    buffer = np.frombuffer(data, dtype=np.uint8)
    if not buffer.size:
        raise BrokenPictureError("empty")
    (height, width), is_opaque = _header(data)
    if height * width > MAX_PIXELS:
        raise BrokenPictureError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if oriented:
        flags &= ~cv2.IMREAD_IGNORE_ORIENTATION
    # OpenCV drops transparency, and decodes floats as such or not at all.
    for depth in (0, cv2.IMREAD_ANYDEPTH) if is_opaque or mode == "L" else ():
        with contextlib.suppress(cv2.error):
            picture = cv2.imdecode(buffer, flags | depth)
            if picture is not None:
                return picture if picture.dtype == np.uint8 else _scaled(picture, FLOAT_RANGES)
    try:  # what OpenCV does not read; PIL also refuses what was cut short
        with Image.open(io.BytesIO(data)) as opened:
            if oriented:
                ImageOps.exif_transpose(opened, in_place=True)
            return np.ascontiguousarray(convert(opened, mode))
    except Image.UnidentifiedImageError as error:
        raise BrokenPictureError("not an image, or a damaged one") from error
    except PICTURE_ERRORS as error:
        raise BrokenPictureError(f"damaged ({first_line(error)})") from error


def picture_size(data: bytes | memoryview) -> Size:
    """Height and width of an encoded image, from its header where that tells; raises BrokenPictureError."""
    size, _ = _header(data)
    return size if all(size) else decode_picture(data).shape[:2]


def _header(data: bytes | memoryview) -> tuple[Size, bool]:
    """Height and width as an image's header tells them, (0, 0) where nothing does, and whether it is all opaque.

    PNG and JPEG, the formats of data sets, are looked at here: Pillow takes longer for that than a word to decode.
    """
    start = bytes(data[:64])
    if start.startswith(_PNG) and len(start) > 26:
        width, height = struct.unpack(">II", start[16:24])
        return (height, width), start[25] not in _PNG_WITH_ALPHA and b"tRNS" not in bytes(data[: 1 << 16])
    place = len(_JPEG)
    while start.startswith(_JPEG) and place + 9 <= len(data) and data[place] == 0xFF:
        if 0xC0 <= data[place + 1] <= 0xCF and data[place + 1] not in _NO_SIZE_IN_JPEG:
            return struct.unpack(">HH", data[place + 5 : place + 9]), True
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.size[::-1], not opened.has_transparency_data
    except Image.DecompressionBombError as error:
        raise BrokenPictureError(first_line(error)) from error
    except PICTURE_ERRORS:
        return (0, 0), True


def convert(picture: Image.Image, mode: str) -> Image.Image:
    """An image in Pillow's mode `RGB` or `L`, 8 bits: deeper ones are scaled; in RGB, what is transparent is white."""
    if mode == "RGB" and picture.has_transparency_data:
        ground = Image.new("RGB", picture.size, "white")
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        ground.paste(picture, mask=picture.getchannel("A"))
        return ground
    return to_8_bits(picture).convert(mode)


def to_8_bits(picture: Image.Image) -> Image.Image:
    """An image of deep greys at 8 bits, any other as it is; Pillow's own conversions cut levels off at 255.

    16 bits lose their lower 8. Floats and 32-bit levels within [0, 1] (floats only), [0, 255] or [0, 65535] are scaled
    by that range, all others by that from their lowest level to their highest; what is not finite becomes 0.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode not in ("I", "F"):
        return picture
    return Image.fromarray(_scaled(np.asarray(picture), FLOAT_RANGES if picture.mode == "F" else INTEGER_RANGES))


def _scaled(levels: np.ndarray, ranges: Sequence[int]) -> np.ndarray:
    """Deep levels as uint8: see `to_8_bits`."""
    levels = np.nan_to_num(levels, posinf=0, neginf=0).astype(np.float32, copy=False)
    low, high = float(levels.min(initial=0)), float(levels.max(initial=0))
    if low < 0 or high > ranges[-1]:
        low = float(levels.min())
        scale = 255 / ((high - low) or 1)
    else:
        low, scale = 0.0, 255 / next(each for each in ranges if high <= each)
    return np.rint(levels * scale - low * scale).astype(np.uint8)


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


def fit_canvas(matrix: np.ndarray, size: Size, *, max_side: int = MAX_SIDE) -> tuple[np.ndarray, Size]:
    """Move the result of `matrix` to the origin and give the size that holds all of it.

    Args:
        size: height and width of the source.
        max_side: a larger result is scaled down to this.

    Returns:
        The matrix onto the new canvas, and the canvas' height and width.
    """
    height, width = size
    (a, b, c), (d, e, f), (g, h, k) = matrix.tolist()  # four points: plain numbers are faster than arrays
    xs, ys = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        depth = g * x + h * y + k
        xs.append((a * x + b * y + c) / depth)
        ys.append((d * x + e * y + f) / depth)
    left, top = min(xs), min(ys)
    extent_x, extent_y = max(xs) - left, max(ys) - top
    new_width = min(max(round(extent_x), 1), max_side)
    new_height = min(max(round(extent_y), 1), max_side)
    scale_x, scale_y = new_width / extent_x, new_height / extent_y
    onto = np.array([[scale_x, 0.0, -left * scale_x], [0.0, scale_y, -top * scale_y], [0.0, 0.0, 1.0]])
    return onto @ matrix, (new_height, new_width)


# From continuous coordinates to OpenCV's, where the middle of the first pixel is (0, 0), and back.
_TO_OPENCV = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])
_FROM_OPENCV = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])


def warp(picture: np.ndarray, matrix: np.ndarray, size: Size, interpolation: int) -> np.ndarray:
    """Warp a picture or mask by `matrix` onto a canvas of `size`; what lies outside repeats the border."""
    matrix = _TO_OPENCV @ matrix @ _FROM_OPENCV
    canvas = (size[1], size[0])
    if matrix[2, 0] or matrix[2, 1]:
        return cv2.warpPerspective(picture, matrix, canvas, flags=interpolation, borderMode=cv2.BORDER_REPLICATE)
    return cv2.warpAffine(picture, matrix[:2], canvas, flags=interpolation, borderMode=cv2.BORDER_REPLICATE)


def resize(picture: np.ndarray, size: Size) -> np.ndarray:
    """Resize bilinearly to height and width, without smoothing first, as the published pipeline does."""
    if picture.shape[:2] == size:
        return picture
    return cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


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


class WordTransform(Protocol):
    """Makes (height, width) inputs of a picture and its mask."""

    size: Size

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator) -> tuple[Picture, Mask | None]: ...


class ResizeWord:
    """Resize to the network's size: what evaluation does, and the end of what training does.

    Args:
        size: height and width.
        fit: "stretch" to it; or keep the aspect, "centre" with the borders replicated, or at the upper "left", the rest
            black and no text.
        random_aspect: half of the time, stretch to the whole height and a random width from the height on, centred,
            instead; needs a generator.
    """

    def __init__(self, *, size: Size = (32, 128), fit: Fit = "stretch", random_aspect: bool = False) -> None:
        self.size = tuple(size)
        self.fit = fit
        self.random_aspect = random_aspect

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator | None) -> tuple[Picture, Mask | None]:
        size = self.draw_size(picture.shape[:2], rng)
        return self.place(picture, size), None if mask is None else self.place(mask, size)

    def draw_size(self, size: Size, rng: Generator | None) -> Size:
        """Height and width that an image of `size` gets inside of the network's size."""
        if self.random_aspect and rng.random() < 0.5:
            height, width = self.size
            return height, int(rng.integers(min(height, width), width + 1))
        return self.fitted(size)

    def fitted(self, size: Size) -> Size:
        """As `draw_size`, without chance."""
        if self.fit == "stretch":
            return self.size
        scale = min(self.size[0] / size[0], self.size[1] / size[1])
        return (
            min(max(round(size[0] * scale), 1), self.size[0]),
            min(max(round(size[1] * scale), 1), self.size[1]),
        )

    def corner(self, size: Size) -> tuple[int, int]:
        """Row and column of the network's input where an image that got `size` begins."""
        if self.fit != "centre":
            return 0, 0
        return (self.size[0] - size[0] + 1) // 2, (self.size[1] - size[1] + 1) // 2

    def place(self, picture: np.ndarray, size: Size) -> np.ndarray:
        """Resize a picture or mask to `size` and fill up to the network's."""
        picture = resize(picture, size)
        below, right = self.size[0] - size[0], self.size[1] - size[1]
        if not below and not right:
            return picture
        border = cv2.BORDER_REPLICATE if self.fit == "centre" else cv2.BORDER_CONSTANT
        top, left = self.corner(size)
        return cv2.copyMakeBorder(picture, top, below - top, left, right - left, border, value=0)


TURNS = (0, 90, 270)  # degrees counterclockwise


def turn(picture: np.ndarray, degrees: int) -> np.ndarray:
    """An image or mask turned counterclockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(picture, degrees // 90)) if degrees else picture


class View(NamedTuple):
    """An image and its mask, turned counterclockwise by some degrees."""

    picture: Picture
    mask: Mask | None
    turned: int = 0


def views(picture: Picture, mask: Mask | None, *, turn_tall: float | None = None) -> list[View]:
    """The ways in which an image is read: as stored and, where it is tall, turned by 90 degrees both ways, too.

    Args:
        turn_tall: height / width above which an image is tall; None for no image.
    """
    tall = turn_tall is not None and picture.shape[0] > turn_tall * picture.shape[1]
    turns = TURNS if tall else TURNS[:1]
    return [View(turn(picture, each), None if mask is None else turn(mask, each), each) for each in turns]


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


def warp_pair(
    picture: Picture, mask: Mask | None, matrix: np.ndarray, size: Size, interpolation: int
) -> tuple[Picture, Mask | None]:
    """`warp` of a picture and its mask, alike to the last pixel."""
    if mask is None:
        return warp(picture, matrix, size, interpolation), None
    both = warp(cv2.merge((picture, mask)), matrix, size, interpolation)  # four channels cost what three do
    return cv2.cvtColor(both, cv2.COLOR_RGBA2RGB), cv2.extractChannel(both, 3)


def limit_size(picture: np.ndarray, max_side: int = MAX_SIDE) -> np.ndarray:
    """Bring sides over `max_side` down to it, each by itself."""
    height, width = picture.shape[:2]
    if height <= max_side and width <= max_side:
        return picture
    return cv2.resize(picture, (min(width, max_side), min(height, max_side)), interpolation=cv2.INTER_AREA)


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
        matrix = (_TO_OPENCV @ matrix @ _FROM_OPENCV)[:2]
        canvas = (self.size[1], self.size[0])
        picture = cv2.warpAffine(picture, matrix, canvas, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        outside = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": self.ignore_index}
        labels = cv2.warpAffine(labels, matrix, canvas, flags=cv2.INTER_NEAREST, **outside)
        if rng.random() < self.color:
            picture = color_jitter(picture, rng)
        return picture, labels
