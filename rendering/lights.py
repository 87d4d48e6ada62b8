"""Hard light: night, haze and lamps. Images are float32 RGB (h, w, 3), 0 to 255."""

import cv2
import numpy as np

from rendering.blending import full, scaled
from rendering.colours import luminance, sample_light_colour, with_luminance
from rendering.textures import ramp

# Street lamps of sodium, mercury and LEDs, and the sky after sunset.
_NIGHT_COLOURS = np.array([(1.25, 0.95, 0.55), (0.85, 1.1, 0.95), (1.0, 1.0, 1.0), (0.75, 0.9, 1.3)], np.float32)


def darken(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken the image as under a lamp, in the colour of the lamp."""
    colour = _NIGHT_COLOURS[int(rng.integers(len(_NIGHT_COLOURS)))]
    left, black = 0.15 + 0.4 * rng.random() ** 1.5, 14 * rng.random()
    # Dark images stay bright enough to be seen.
    left = max(left, 60 / max(float(np.percentile(image[::2, ::2, 1], 95)), 60.0))
    return cv2.add(image * (np.float32(left) * colour), (black, black, black, 0.0))


def veil(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Take most of the contrast, as haze, dust or glass do."""
    colour = sample_light_colour(rng)
    colour = with_luminance(0.35 * colour + 0.65 * luminance(colour) * 255, rng.uniform(0.25, 0.9))
    share = 0.14 + 0.36 * rng.random()
    return cv2.addWeighted(image, share, full(image.shape[:2], colour), 1 - share, 0)


def shine(image: np.ndarray, unit: float, rng: np.random.Generator) -> np.ndarray:
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
