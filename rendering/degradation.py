"""Light and camera: what happens to the finished image. The mask is never changed."""

import math

import cv2
import numpy as np

from rendering.blending import full, raised, scaled
from rendering.colours import luminance, sample_light_colour, with_luminance
from rendering.config import RenderConfig
from rendering.effects import disc
from rendering.textures import ramp

_JPEG_QUALITY = 35  # lowest
_MIN_CONTRAST = 0.12  # least difference of luminance, 0 to 1, between letters and what is around them
_NOISE_SIDE = 512
_noise_tile = np.random.default_rng(11).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32)
# Street lamps of sodium, mercury and LEDs, and the sky after sunset.
_NIGHT_COLOURS = np.array([(1.25, 0.95, 0.55), (0.85, 1.1, 0.95), (1.0, 1.0, 1.0), (0.75, 0.9, 1.3)], np.float32)


def degrade(
    image: np.ndarray,
    alpha: np.ndarray,
    unit: float,
    config: RenderConfig,
    rng: np.random.Generator,
    *,
    faint: bool = False,
) -> np.ndarray:
    """Apply light, blur, loss of resolution, noise and compression, each by its probability; words stay readable.

    Args:
        image: float32 RGB (h, w, 3), 0 to 255; it may be changed in place.
        alpha: share of each pixel that letters cover, uint8 (h, w).
        unit: height of a capital letter, pixels: lengths are relative to it.
        faint: the letters differ from the background by light and shade alone, which night, haze, strong blur and low
            resolution would leave nothing of.

    Returns:
        uint8 RGB (h, w, 3).
    """
    chance, size, rare = rng.random(8), rng.random(8), rng.random(4)
    at_night = not faint and rare[0] < config.chance("night")
    veiled = not (faint or at_night) and rare[2] < config.chance("veil")
    tiny = not faint and rare[3] < config.chance("tiny")
    exposed = not (at_night or veiled) and chance[1] < config.chance("exposure")
    if rare[1] < config.chance("lights"):
        image = _add_lamps(image, unit, rng)
    if chance[0] < config.chance("lighting"):
        image = _light(image, config.amount(1.0), rng)
    if at_night:
        image = _darken(image, rng)
    elif veiled:
        image = _add_haze(image, rng)
    image = _eight_bits(image)
    if exposed:
        image = _expose(image, config.amount(0.4 if faint else 1.0), rng)
    sharp = image
    if tiny:
        image = _shrink_and_enlarge(image, unit / (7.0 + 3.0 * size[4]), cv2.INTER_CUBIC)
    else:
        # Letters keep 8 pixels, or 16 where they are faint or moved; smaller ones are `tiny`.
        moved = chance[2] < config.chance("motion")
        if moved:
            image = _blur_by_motion(image, config.amount(0.1 if faint else 0.2) * unit * size[2], np.pi * size[1])
        sigma = config.amount(0.02 if faint else 0.04) * unit * size[3] ** 1.5
        if chance[3] < config.chance("blur") and sigma > 0.2:
            image = cv2.GaussianBlur(image, (0, 0), sigma)
        if chance[4] < config.chance("low_resolution"):
            factor = min(1 + (config.amount(2.2) - 1) * size[4], unit / (16 if faint or moved else 8))
            image = _shrink_and_enlarge(image, factor, cv2.INTER_LINEAR)
    if not faint and (at_night or veiled or exposed or image is not sharp):
        image = keep_contrast(image, alpha, unit)
    if at_night or chance[5] < config.chance("noise"):
        deviation = 2 + 5 * size[5] if at_night else config.amount(9.0) * size[5] ** 2
        image = _eight_bits(cv2.scaleAdd(_noise(image.shape[:2], rng), deviation, image.astype(np.float32)))
    if chance[6] < config.chance("sharpening"):
        blurred = cv2.GaussianBlur(image, (0, 0), 1.2)
        image = cv2.addWeighted(image, 1.4 + size[6], blurred, -0.4 - size[6], 0)
    if chance[7] < config.chance("jpeg"):
        image = _compress(image, round(_JPEG_QUALITY + (95 - _JPEG_QUALITY) * size[7] ** 0.7))
    return image


def keep_contrast(image: np.ndarray, alpha: np.ndarray, unit: float) -> np.ndarray:
    """Return the image, uint8, with the contrast raised where letters hardly differ from what is around them.

    Args:
        alpha: share of each pixel that letters cover, uint8 (h, w).
    """
    half = int(alpha.max()) // 2 + 1  # thin letters may not cover any pixel
    letters = cv2.inRange(alpha, half, 255)
    around = cv2.inRange(cv2.dilate(alpha, disc(max(1, round(0.2 * unit)))), half, 255) & cv2.inRange(
        alpha, 0, half // 4
    )
    inside, outside = np.array(cv2.mean(image, letters)[:3]), np.array(cv2.mean(image, around)[:3])
    difference = np.abs(inside - outside)
    # Colour alone tells letters apart as well, but not as clearly as light does.
    contrast = max(abs(float(luminance(inside - outside))), 0.5 * float(difference.max()) / 255)
    if contrast >= _MIN_CONTRAST or not around.any():
        return image
    factor = min(_MIN_CONTRAST / max(contrast, 1e-3), 5.0)
    # The range around the middle of both is stretched, and moved where it would leave 0 to 255.
    middle = (inside + outside) / 2
    target = np.clip(middle, factor * difference / 2 + 8, 247 - factor * difference / 2)
    table = np.clip(factor * (np.arange(256)[:, None] - middle) + target, 0, 255).round().astype(np.uint8)
    return cv2.LUT(image, table[:, None])


def _eight_bits(image: np.ndarray) -> np.ndarray:
    return cv2.add(image, (0.0, 0.0, 0.0, 0.0), dtype=cv2.CV_8U)  # rounds and clips in one pass


def _darken(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken the image as under a lamp, in the colour of the lamp."""
    colour = _NIGHT_COLOURS[int(rng.integers(len(_NIGHT_COLOURS)))]
    left, black = 0.15 + 0.4 * rng.random() ** 1.5, 14 * rng.random()
    # Dark images stay bright enough to be seen.
    left = max(left, 60 / max(float(np.percentile(image[::2, ::2, 1], 95)), 60.0))
    return cv2.add(image * (np.float32(left) * colour), (black, black, black, 0.0))


def _add_haze(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Take most of the contrast, as haze, dust or glass do."""
    colour = sample_light_colour(rng)
    colour = with_luminance(0.35 * colour + 0.65 * luminance(colour) * 255, rng.uniform(0.25, 0.9))
    share = 0.14 + 0.36 * rng.random()
    return cv2.addWeighted(image, share, full(image.shape[:2], colour), 1 - share, 0)


def _add_lamps(image: np.ndarray, unit: float, rng: np.random.Generator) -> np.ndarray:
    """Draw lamps into the image, or let light spread from its bright parts."""
    if rng.random() < 0.4:
        bright = cv2.subtract(image, (110.0, 110.0, 110.0, 0.0))
        np.maximum(bright, 0, out=bright)
        spread = cv2.GaussianBlur(bright, (0, 0), unit * rng.uniform(0.15, 0.5))
        return cv2.add(image, spread * np.float32(rng.uniform(0.8, 2.0)))
    height, width = image.shape[:2]
    image = scaled(image, np.full((height, width), rng.uniform(0.45, 1.0), np.float32))
    for _ in range(int(rng.integers(1, 4))):
        x = (ramp(width) - np.float32(rng.uniform(-0.55, 0.55))) * np.float32(width / unit)
        y = (ramp(height) - np.float32(rng.choice([-1, 1]) * rng.uniform(0.2, 0.6))) * np.float32(height / unit)
        distance = x * x + (y * y)[:, None]
        core, reach = rng.uniform(0.02, 0.15), rng.uniform(0.25, 0.8)
        light = 260 * np.exp(-distance / (2 * core * core)) + rng.uniform(50, 150) * np.exp(-distance / (2 * reach**2))
        colour = (sample_light_colour(rng) / 255).astype(np.float32)
        image = cv2.add(image, light.astype(np.float32)[..., None] * colour)
    return image


def _light(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Add uneven light: a slope, a cast shadow with an edge, or a shine."""
    height, width = image.shape[:2]
    x, y = ramp(width), ramp(height)[:, None]
    kind, angle, strength = rng.random(), rng.uniform(0, 2 * np.pi), amount * rng.uniform(0.1, 0.5)
    across = x * np.float32(math.cos(angle)) + y * np.float32(0.5 * math.sin(angle))
    if kind < 0.6:
        return scaled(image, 1 + np.float32(strength) * across)
    if kind < 0.8:
        edge = np.clip(0.5 + rng.uniform(3, 30) * (across - rng.uniform(-0.3, 0.3)), 0, 1).astype(np.float32)
        return scaled(image, 1 - np.float32(min(strength, 0.6)) * edge)
    spot = rng.uniform(-0.5, 0.5, size=2).astype(np.float32)
    reach = np.float32(rng.uniform(0.15, 0.5))
    shine = np.exp(-((x - spot[0]) ** 2 + ((y - spot[1]) * (height / width)) ** 2) / (2 * reach**2))
    return raised(image, np.float32(160 * strength) * shine)


def _expose(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Change contrast, brightness, gamma and the colour of the light, uint8."""
    flat = 1 - min(0.65, amount * 0.6 * rng.random() ** 1.5)
    black = rng.random() * 255 * (1 - flat)
    tint = 1 + np.clip(rng.standard_normal(3) * 0.09 * amount, -0.3, 0.3)
    gamma = math.exp(min(max(rng.standard_normal() * 0.3 * amount, -0.8), 0.8))
    exposed = np.clip(np.arange(256)[:, None] * (flat * tint / 255) + black / 255, 0, 1)
    return cv2.LUT(image, np.round(255 * exposed**gamma).astype(np.uint8)[:, None])


def _blur_by_motion(image: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Blur along a line of `length` pixels."""
    side = 2 * math.ceil(length / 2) + 1
    if side < 3:
        return image
    kernel = np.zeros((side, side), np.float32)
    middle = side // 2
    step = np.array([math.cos(angle), math.sin(angle)]) * length / 2
    start, end = np.round(256 * (middle - step)).astype(int), np.round(256 * (middle + step)).astype(int)
    cv2.line(kernel, tuple(start.tolist()), tuple(end.tolist()), 1.0, 1, cv2.LINE_AA, shift=8)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def _shrink_and_enlarge(image: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    """Shrink by `factor` and enlarge again."""
    if factor <= 1:
        return image
    height, width = image.shape[:2]
    small = (max(4, round(width / factor)), max(4, round(height / factor)))
    shrunk = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=interpolation)


def _noise(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Cut normal noise of standard deviation 1, (h, w, 3), out of a tile that is the same in every process."""
    height, width = size
    if height > _NOISE_SIDE or width > _NOISE_SIDE:
        return rng.standard_normal((height, width, 3), dtype=np.float32)
    top, left = int(rng.integers(_NOISE_SIDE - height + 1)), int(rng.integers(_NOISE_SIDE - width + 1))
    return _noise_tile[top : top + height, left : left + width]


def _compress(image: np.ndarray, quality: int) -> np.ndarray:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
