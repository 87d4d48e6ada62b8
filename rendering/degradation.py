"""What light and camera do to the finished image; the mask is never touched."""

import math

import cv2
import numpy as np

from rendering.blending import raised, scaled
from rendering.config import RenderConfig
from rendering.lights import darken, shine, veil
from rendering.textures import ramp

_NOISE_SIDE = 512
_noise_tile = np.random.default_rng(11).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32)


def degrade(image: np.ndarray, unit: float, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Light, blur, loss of resolution, noise and compression, each by its probability.

    Args:
        image: float32 RGB (h, w, 3), 0 to 255; it may be changed in place.
        unit: height of a capital letter, pixels: lengths are relative to it.

    Returns:
        uint8 RGB (h, w, 3).
    """
    settings = config.degradation
    chance, size, rare = rng.random(8), rng.random(8), rng.random(4)
    at_night = rare[0] < config.steep(settings.night)
    if rare[1] < config.steep(settings.lights):
        image = shine(image, unit, rng)
    if chance[0] < config.probability(settings.lighting):
        image = _light(image, config.amount(1.0), rng)
    if at_night:
        image = darken(image, rng)
    elif rare[2] < config.steep(settings.veil):
        image = veil(image, rng)
    elif chance[1] < config.probability(settings.exposure):
        image = _expose(image, config.amount(1.0), rng)
    image = _eight_bits(image)
    if chance[2] < config.probability(settings.motion):
        image = _move(image, config.amount(settings.motion_amount) * unit * size[2], np.pi * size[1])
    if chance[3] < config.probability(settings.blur):
        sigma = config.amount(settings.blur_amount) * unit * size[3] ** 1.5
        if sigma > 0.2:
            image = cv2.GaussianBlur(image, (0, 0), sigma)
    if rare[3] < config.steep(settings.tiny):
        image = _shrink_and_enlarge(image, unit / (5.5 + 3.5 * size[4]), cv2.INTER_CUBIC)
    elif chance[4] < config.probability(settings.low_resolution):
        # Not below letters of 8 pixels: what is smaller is `tiny`.
        factor = 1 + (config.amount(settings.resolution_loss) - 1) * size[4]
        image = _shrink_and_enlarge(image, min(factor, unit / 8), cv2.INTER_LINEAR)
    if at_night or chance[5] < config.probability(settings.noise):
        deviation = 3 + 8 * size[5] if at_night else config.amount(settings.noise_amount) * size[5] ** 2
        image = _eight_bits(image + np.float32(deviation) * _noise(image.shape[:2], rng))
    if chance[6] < config.probability(settings.sharpening):
        blurred = cv2.GaussianBlur(image, (0, 0), 1.2)
        image = cv2.addWeighted(image, 1.4 + size[6], blurred, -0.4 - size[6], 0)
    if chance[7] < config.probability(settings.jpeg):
        image = _compress(image, round(settings.jpeg_quality + (95 - settings.jpeg_quality) * size[7] ** 0.7))
    return image


def _eight_bits(image: np.ndarray) -> np.ndarray:
    return cv2.add(image, (0.0, 0.0, 0.0, 0.0), dtype=cv2.CV_8U)  # rounds and clips in one pass


def _light(image: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A slope of light, a cast shadow with an edge, or a shine."""
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
    """Change contrast, brightness, gamma and the colour of the light."""
    flat = 1 - min(0.65, amount * 0.6 * rng.random() ** 1.5)
    black = rng.uniform(0, 1) * 255 * (1 - flat)
    tint = 1 + np.clip(rng.normal(0, 0.09 * amount, size=3), -0.3, 0.3)
    image = image * (flat * tint).astype(np.float32) + np.float32(black)
    gamma = math.exp(float(np.clip(rng.normal(0, 0.3 * amount), -0.8, 0.8)))
    table = np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return cv2.LUT(_eight_bits(image), table)


def _move(image: np.ndarray, length: float, angle: float) -> np.ndarray:
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
    """Normal noise of standard deviation 1, (h, w, 3), cut from a tile that every process has alike."""
    height, width = size
    if height > _NOISE_SIDE or width > _NOISE_SIDE:
        return rng.standard_normal((height, width, 3), dtype=np.float32)
    top, left = int(rng.integers(_NOISE_SIDE - height + 1)), int(rng.integers(_NOISE_SIDE - width + 1))
    return _noise_tile[top : top + height, left : left + width, rng.permutation(3)]


def _compress(image: np.ndarray, quality: int) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
