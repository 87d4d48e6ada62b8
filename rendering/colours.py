"""Colours of backgrounds, and colours of letters that contrast with them.

A colour is RGB, float, (3,), from 0 to 255. Luminance is from 0 (black) to 1 (white).
"""

import colorsys

import numpy as np

from rendering.config import RenderConfig

# Ranges of hue, 0 to 1; a range that is listed twice is twice as likely.
_PAINTS = ((-0.03, 0.03), (-0.03, 0.03), (0.05, 0.11), (0.11, 0.17), (0.11, 0.17), (0.25, 0.45), (0.5, 0.68))
_PAINTS += ((0.55, 0.68), (0.0, 1.0))
_NEUTRAL = 0.6  # share of letters that are white, grey or black
_LUMINANCE = np.array([0.299, 0.587, 0.114]) / 255


def luminance(colour: np.ndarray) -> np.ndarray:
    """Return the luminance (...) of colours (..., 3)."""
    return colour @ _LUMINANCE


def with_luminance(colour: np.ndarray, wanted: float) -> np.ndarray:
    """Darken a colour, or mix it with white, until its luminance is `wanted`."""
    present = float(luminance(colour))
    if present >= wanted:
        return colour * (wanted / max(present, 1e-6))
    return colour + (255.0 - colour) * ((wanted - present) / max(1.0 - present, 1e-6))


def sample_background_colour(rng: np.random.Generator, saturated: float = 0.3) -> np.ndarray:
    """Sample a colour of walls, signs, paper and print: nearly neutral, or strong with probability `saturated`."""
    kind, hue, saturation, value = rng.random(4)
    if kind >= 1 - saturated:
        return _from_hsv(_paint_hue(hue), 0.35 + 0.6 * saturation, 0.25 + 0.65 * value)
    kind /= 1 - saturated
    if kind < 0.42:  # paper, white walls
        return _from_hsv(hue, 0.16 * saturation, 0.65 + 0.35 * value)
    if kind < 0.72:  # black signs, shade
        return _from_hsv(hue, 0.5 * saturation, 0.05 + 0.25 * value)
    return _from_hsv(hue, 0.3 * saturation, 0.25 + 0.5 * value)  # stone, metal


def sample_hue(rng: np.random.Generator) -> np.ndarray:
    """Sample a colour whose luminance is still to be chosen; grey with probability _NEUTRAL."""
    chance, hue, saturation = rng.random(3)
    if chance < _NEUTRAL:
        return _from_hsv(hue, 0.06 * saturation, 0.9)
    return _from_hsv(_paint_hue(hue), 0.4 + 0.6 * saturation, 0.9)


def _from_hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def _paint_hue(place: float) -> float:
    """Return the hue for a number from 0 to 1: mostly the reds, yellows, greens and blues of signs and print."""
    number, within = divmod(place * len(_PAINTS), 1)
    low, high = _PAINTS[int(number)]
    return low + within * (high - low)


def sample_letter_colour(darkest: float, lightest: float, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Sample a colour for letters that contrasts with what is behind them.

    Args:
        darkest, lightest: luminance between which nearly everything behind the letters lies.
    """
    hue = sample_hue(rng)
    low, side, share = rng.random(3)
    # Mostly on the side, lighter or darker, that leaves more room.
    room_above, room_below = 1.0 - lightest, darkest
    above = side < room_above**2 / max(room_above**2 + room_below**2, 1e-6)
    least = config.contrast
    if (room_above if above else room_below) < least:
        above = room_above > room_below
    room = room_above if above else room_below
    if low < config.chance("low_contrast"):
        difference = least * (1 + 2 * share) / 3
    else:
        difference = least + (room - least) * share**0.6
    difference = min(max(difference, 0.0), room)
    return with_luminance(hue, lightest + difference if above else darkest - difference)


def sample_light_colour(rng: np.random.Generator) -> np.ndarray:
    """Sample a colour of lamps: bright, white or strong."""
    chance, hue, saturation, value = rng.random(4)
    return _from_hsv(
        _paint_hue(hue), 0.15 * saturation if chance < 0.25 else 0.35 + 0.6 * saturation, 0.8 + 0.2 * value
    )


def sample_contrasting_colour(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample a colour that borders on `colour`: light beside dark and dark beside light."""
    hue = sample_hue(rng)
    share = rng.random()
    ground = float(luminance(colour))
    return with_luminance(hue, ground * 0.5 * share if ground > 0.5 else 1 - (1 - ground) * 0.5 * share)
