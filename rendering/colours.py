"""Colours: those of backgrounds, and those of letters that can be told from what is behind them.

A colour is RGB, float, (3,), from 0 to 255. Luminance is from 0 (black) to 1 (white).
"""

import colorsys

import numpy as np

from rendering.config import RenderConfig

_LUMINANCE = np.array([0.299, 0.587, 0.114]) / 255


def luminance(colour: np.ndarray) -> np.ndarray:
    """Luminance of colours (..., 3): (...)."""
    return colour @ _LUMINANCE


def with_luminance(colour: np.ndarray, wanted: float) -> np.ndarray:
    """The colour darkened, or mixed with white, until its luminance is `wanted`."""
    present = float(luminance(colour))
    if present >= wanted:
        return colour * (wanted / max(present, 1e-6))
    return colour + (255.0 - colour) * ((wanted - present) / max(1.0 - present, 1e-6))


def draw_background_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour of walls, signs, paper and print: light or dark and nearly neutral, or a strong one."""
    kind, hue, saturation, value = rng.random(4)
    if kind < 0.3:  # paper, white walls
        parts = (hue, 0.12 * saturation, 0.75 + 0.25 * value)
    elif kind < 0.52:  # black signs, shade
        parts = (hue, 0.3 * saturation, 0.05 + 0.22 * value)
    elif kind < 0.66:  # stone, metal
        parts = (hue, 0.2 * saturation, 0.25 + 0.5 * value)
    elif kind < 0.8:  # red, orange, yellow and blue paint
        parts = ((0.0, 0.09, 0.15, 0.6)[int(4 * hue)], 0.6 + 0.4 * saturation, 0.45 + 0.5 * value)
    else:
        parts = (hue, 0.3 + 0.6 * saturation, 0.2 + 0.7 * value)
    return 255.0 * np.array(colorsys.hsv_to_rgb(*parts))


def draw_hue(rng: np.random.Generator, neutral: float) -> np.ndarray:
    """A colour whose luminance is still to be chosen; grey with probability `neutral`."""
    chance, hue, saturation = rng.random(3)
    return 255.0 * np.array(
        colorsys.hsv_to_rgb(hue, 0.06 * saturation if chance < neutral else 0.5 + 0.5 * saturation, 0.9)
    )


def draw_letter_colour(behind: np.ndarray, spread: float, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """A colour that differs from what is behind the letters by the wanted contrast.

    Args:
        behind: mean colour behind the letters.
        spread: standard deviation of the luminance there; a restless background asks for more contrast.
    """
    hue = draw_hue(rng, config.colours.neutral)
    low, side, share = rng.random(3)
    ground = float(luminance(behind))
    least = config.colours.min_contrast
    # Lighter or darker by the room there is on each side, seldom on the smaller one.
    room_above, room_below = 1.0 - ground, ground
    above = side < room_above**2 / (room_above**2 + room_below**2)
    room = room_above if above else room_below
    if room < least:
        above, room = not above, max(room_above, room_below)
    if low < config.probability(config.colours.low_contrast):
        difference = least * (1 + 2 * share) / 3
    else:
        least = min(least + spread, room)
        difference = least + (room - least) * share**0.6
    difference = min(difference, room)
    return with_luminance(hue, ground + difference if above else ground - difference)


def draw_contrasting(colour: np.ndarray, rng: np.random.Generator, *, neutral: float = 0.6) -> np.ndarray:
    """A colour for what borders on `colour`: light beside dark and dark beside light."""
    hue = draw_hue(rng, neutral)
    share = rng.random()
    ground = float(luminance(colour))
    return with_luminance(hue, ground * 0.5 * share if ground > 0.5 else 1 - (1 - ground) * 0.5 * share)
