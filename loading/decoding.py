"""Decodes images and masks to arrays, whatever was stored: RGB (H, W, 3) or grey (H, W) with 255 = text, uint8.

Two libraries share the work, with equal pixels where both can read: OpenCV takes half of Pillow's time for the PNGs and
JPEGs of data sets; Pillow reads what is transparent or packed in rarer ways, and refuses files that were cut short.
"""

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils import first_line

ImageArray = np.ndarray  # (H, W, 3) uint8, RGB
Mask = np.ndarray  # (H, W) uint8, 255 = text
Size = tuple[int, int]  # height, width

# Of files that a user's folder is searched for, in lower case.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEXT_THRESHOLD = 128  # a mask's pixel from this level on is text
MAX_PIXELS = 1 << 26  # of an image; the header tells, before memory is taken for it

_COLOR = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_GREY = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_WITH_ALPHA = (4, 6)  # colour types
_NO_SIZE_IN_JPEG = (0xC4, 0xC8, 0xCC)  # segments among C0 to CF that begin no frame

# OpenCV need not report images that cannot be decoded: the data set does, by name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)

# The errors that Pillow's decoders raise on damaged or hostile files.
IMAGE_ERRORS = (
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


class BrokenImageError(ValueError):
    """Raised for bytes that are not a valid image."""


def decode_image(data: bytes | memoryview, *, oriented: bool = False) -> ImageArray:
    """Decode an image of any depth, colour model and usual format to RGB.

    Deeper levels within [0, 1] (floats only), [0, 255] or [0, 65535] are scaled by that range, others by their own;
    grey is repeated; transparent pixels show a white background.

    Args:
        oriented: turn the image as its EXIF orientation says; not in data sets: their masks and boxes are those of the
            stored pixels. TIFFs are always turned, as other programs show them.

    Raises:
        BrokenImageError: it is damaged, or has more than MAX_PIXELS.
    """
    return _decode(data, _COLOR, "RGB", oriented)


def decode_mask(data: bytes | memoryview, *, oriented: bool = False) -> Mask:
    """Decode a mask to one 8-bit channel, 255 = text; transparency is dropped. The rest is as in `decode_image`."""
    return _decode(data, _GREY, "L", oriented)


def _decode(data: bytes | memoryview, flags: int, mode: str, oriented: bool) -> np.ndarray:
    buffer = np.frombuffer(data, dtype=np.uint8)
    if not buffer.size:
        raise BrokenImageError("empty")
    (height, width), is_opaque = _header(data)
    if height * width > MAX_PIXELS:
        raise BrokenImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if oriented:
        flags &= ~cv2.IMREAD_IGNORE_ORIENTATION
    if is_opaque or mode == "L":  # OpenCV drops transparency
        with contextlib.suppress(cv2.error):
            image = cv2.imdecode(buffer, flags | cv2.IMREAD_ANYDEPTH)
            if image is not None:
                return image if image.dtype == np.uint8 else _scaled(image)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if oriented:
                ImageOps.exif_transpose(opened, in_place=True)
            return np.ascontiguousarray(convert(opened, mode))
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError("not an image, or a damaged one") from error
    except IMAGE_ERRORS as error:
        raise BrokenImageError(f"damaged ({first_line(error)})") from error


def _header(data: bytes | memoryview) -> tuple[Size, bool]:
    """Return height and width of the header, (0, 0) if nothing tells them, and whether the image is opaque.

    PNG and JPEG, the formats of data sets, are parsed here: Pillow takes longer to open a word than it takes to decode.
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
        raise BrokenImageError(first_line(error)) from error
    except IMAGE_ERRORS:
        return (0, 0), True


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert to Pillow's mode `RGB` or `L`, 8 bits; in RGB, transparency becomes white.

    Pillow's own conversions clip deep levels at 255, so they are scaled here.
    """
    if mode == "RGB" and image.has_transparency_data:
        ground = Image.new("RGB", image.size, "white")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scaled(np.asarray(image)))
    return image.convert(mode)


def _scaled(levels: np.ndarray) -> np.ndarray:
    """Scale deep levels to uint8 by the first usual range that holds them all, else by their own; NaN becomes 0."""
    tops = (1, 255, 65535) if np.issubdtype(levels.dtype, np.floating) else (255, 65535)
    levels = np.nan_to_num(levels, posinf=0, neginf=0)
    low, high = float(levels.min()), float(levels.max())
    if low >= 0 and high <= tops[-1]:
        low, high = 0, next(each for each in tops if high <= each)
    elif low == high:
        return np.zeros(levels.shape, np.uint8)
    return np.rint(np.interp(levels, (low, high), (0, 255))).astype(np.uint8)
