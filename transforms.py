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
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageOps

from utils import first_line

Picture = np.ndarray  # (H, W, 3) uint8, RGB
Mask = np.ndarray  # (H, W) uint8, 255 = text
Size = tuple[int, int]  # height, width

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
    angle = math.radians(symmetric(rng, degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def affine(rng: Generator, size: Size, *, scale: float = 2.0, shear: tuple[float, float] = (45.0, 15.0)) -> np.ndarray:
    """Matrix (3, 3) of a scaling by 1/`scale` to `scale` and shears of up to `shear` degrees along x and y."""
    factor = scale ** symmetric(rng, 1.0)
    along_x = math.tan(math.radians(symmetric(rng, shear[0])))
    along_y = math.tan(math.radians(symmetric(rng, shear[1])))
    return np.array([[factor, factor * along_x, 0.0], [factor * along_y, factor, 0.0], [0.0, 0.0, 1.0]])


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
    """Add normal noise of a variance of up to `variance` (grey levels squared), per pixel and channel."""
    factor = math.sqrt(one_sided(rng, variance)) / NOISE_DEVIATION
    table = _noise_table()
    if picture.size * 2 > table.size:
        table = np.resize(table, picture.size * 2)
    start = int(rng.integers(table.size - picture.size))
    noise = table[start : start + picture.size].reshape(picture.shape)
    return cv2.addWeighted(picture, 1.0, noise, factor, -NOISE_MIDDLE * factor)


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


def rescale(picture: Picture, rng: Generator, *, base: Size, steps: float = 4.0) -> Picture:
    """Lose detail: down to `base` halved up to `steps` times (the levels of a picture pyramid), and back up."""
    step = round(one_sided(rng, steps))
    height, width = max(base[0] >> step, 1), max(base[1] >> step, 1)
    if height >= picture.shape[0] and width >= picture.shape[1]:
        return picture  # the level is larger than the picture: nothing would be lost
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return resize(small, picture.shape[:2])


def deteriorate(picture: Picture, rng: Generator, *, base: Size) -> Picture:
    """Noise, motion blur and loss of detail, in random order; `base` is the lowest level of the pyramid."""
    kinds: list[Callable[[Picture], Picture]] = [
        lambda each: gaussian_noise(each, rng),
        lambda each: motion_blur(each, rng),
        lambda each: rescale(each, rng, base=base),
    ]
    for kind in rng.permutation(3):
        picture = kinds[kind](picture)
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
            mean = cv2.mean(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))[0]
            picture = _stretch(picture, factors[1], (1.0 - factors[1]) * mean)
        elif kind == 2:
            grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            picture = cv2.addWeighted(picture, factors[2], grey, 1.0 - factors[2], 0.0)
        else:
            picture = _turn_hue(picture, turn)
    return picture


def _stretch(picture: Picture, factor: float, offset: float) -> Picture:
    """factor x level + offset, within [0, 255]."""
    return cv2.addWeighted(picture, factor, picture, 0.0, offset)  # saturates, and is faster than a table


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
        keep_aspect: scale until one side fits and fill the rest (right or below) with black, not text.
    """

    def __init__(self, *, size: Size = (32, 128), keep_aspect: bool = False) -> None:
        self.size = tuple(size)
        self.keep_aspect = keep_aspect

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator) -> tuple[Picture, Mask | None]:
        size = self.fitted(picture.shape[:2])
        return self.pad(resize(picture, size)), None if mask is None else self.pad(resize(mask, size))

    def fitted(self, size: Size) -> Size:
        """Height and width that a picture of `size` gets before the filling."""
        if not self.keep_aspect:
            return self.size
        scale = min(self.size[0] / size[0], self.size[1] / size[1])
        return (
            min(max(round(size[0] * scale), 1), self.size[0]),
            min(max(round(size[1] * scale), 1), self.size[1]),
        )

    def pad(self, picture: np.ndarray) -> np.ndarray:
        """Fill up to the network's size."""
        below, right = self.size[0] - picture.shape[0], self.size[1] - picture.shape[1]
        if not below and not right:
            return picture
        return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)


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
        size, keep_aspect: as of ResizeWord.
        geometry, deterioration, color: probability of each.
    """

    def __init__(
        self,
        *,
        size: Size = (32, 128),
        keep_aspect: bool = False,
        geometry: float = 0.5,
        deterioration: float = 0.25,
        color: float = 0.25,
    ) -> None:
        self.resize = ResizeWord(size=size, keep_aspect=keep_aspect)
        self.size = self.resize.size
        self.geometry = geometry
        self.deterioration = deterioration
        self.color = color

    def __call__(self, picture: Picture, mask: Mask | None, rng: Generator) -> tuple[Picture, Mask | None]:
        draws = rng.random(3).tolist()
        moved, deteriorated = draws[0] < self.geometry, draws[1] < self.deterioration
        picture, mask = limit_size(picture), None if mask is None else limit_size(mask)
        if moved:
            picture, mask = self._move(picture, mask, rng, whole=deteriorated)
        if deteriorated:
            picture = deteriorate(picture, rng, base=(4 * self.size[0], 4 * self.size[1]))
        picture, mask = self.resize(picture, mask, rng)
        if draws[2] < self.color:  # pointwise, so it may as well follow the resizing, where there are fewer pixels
            picture = color_jitter(picture, rng)
        return picture, mask

    def _move(self, picture: Picture, mask: Mask | None, rng: Generator, *, whole: bool) -> tuple[Picture, Mask | None]:
        """One kind of geometry, with one kind of interpolation. `whole` asks for the grown canvas at its own size.

        Otherwise a canvas larger than the network's input is never made: resizing it down picks bilinear samples of it
        without smoothing, so that warping straight to the smaller size takes the same samples and costs far less. A
        smaller canvas is made: there the warp itself loses detail.
        """
        size = picture.shape[:2]
        kind = (rotation, affine, perspective)[rng.integers(3)]
        matrix, canvas = fit_canvas(kind(rng, size), size)
        interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
        final = self.resize.fitted(canvas)
        if not whole and canvas[0] >= final[0] and canvas[1] >= final[1]:
            matrix = np.diag((final[1] / canvas[1], final[0] / canvas[0], 1.0)) @ matrix
            canvas = final
        if mask is None:
            return warp(picture, matrix, canvas, interpolation), None
        # As a fourth channel the mask gets the picture's warp to the last pixel, and four channels cost what three do.
        both = warp(cv2.merge((picture, mask)), matrix, canvas, interpolation)
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
