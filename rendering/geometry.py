"""The warp from the flat word to the image, the same for everything that belongs to the letters.

First the baseline is bent (arc or wave), then the plane is seen in perspective. Points are (x, y) in pixels, y
downwards; the flat and the bent plane have their origin at the middle of the letters.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from loading.transforms import rotation_matrix
from rendering.config import RenderConfig
from rendering.letters import MAX_HEIGHT, Letters

_CURVE_DEGREES = 60.0  # largest arc of a word at difficulty 0.5, but for strong ones


@dataclass(frozen=True)
class Bend:
    """A curved baseline: an arc of `radius` pixels (negative: its middle is low) or a wave of `amplitude` pixels."""

    radius: float = 0.0
    amplitude: float = 0.0
    length: float = 1.0
    phase: float = 0.0

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Map flat points (n, 2) to bent ones."""
        x, y = points[:, 0], points[:, 1]
        if self.radius:
            angle = x / self.radius
            return np.stack([(self.radius - y) * np.sin(angle), self.radius - (self.radius - y) * np.cos(angle)], 1)
        return np.stack([x, y + self.amplitude * np.sin(2 * math.pi * x / self.length + self.phase)], 1)

    def backward(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map bent coordinates to flat ones, arrays of one shape."""
        if self.radius:
            sign = math.copysign(1.0, self.radius)
            down = (self.radius - y) * sign
            distance = np.sqrt(x * x + down * down)
            return self.radius * np.arctan2(x * sign, down), self.radius - sign * distance
        return x, y - self.amplitude * np.sin(2 * math.pi * x / self.length + self.phase)


@dataclass(frozen=True)
class Warp:
    """The mapping from the flat word to the image.

    `centre`: the origin in the flat image; `bend` or None; `matrix`: (3, 3), bent plane to image; `size`: (width,
    height) of the image; `unit`: height of a capital letter in it; `margins`: left, top, right, bottom space around
    the letters in pixels, negative where letters are cut; `rotation` and `arc` (from the first to the last letter, 0
    for a wave): degrees.
    """

    centre: tuple[float, float]
    bend: Bend | None
    matrix: np.ndarray
    size: tuple[int, int]
    unit: float
    margins: tuple[float, float, float, float]
    rotation: float = 0.0
    arc: float = 0.0

    def apply(self, layer: np.ndarray, centre: tuple[float, float] | None = None) -> np.ndarray:
        """Warp a `layer` (h, w[, channels]) of the flat word into the image; 0 outside.

        Args:
            centre: the origin in `layer`; None: that of the flat image.
        """
        x, y = centre or self.centre
        if self.bend is None:
            matrix = self.matrix @ _shift(-x, -y)
            if matrix[2, 0] == matrix[2, 1] == 0:  # takes half of the time
                return cv2.warpAffine(layer, matrix[:2] / matrix[2, 2], self.size, flags=cv2.INTER_LINEAR)
            return cv2.warpPerspective(layer, matrix, self.size, flags=cv2.INTER_LINEAR)
        flat_x, flat_y = self._maps
        return cv2.remap(layer, flat_x + np.float32(x), flat_y + np.float32(y), cv2.INTER_LINEAR)

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(self.matrix).astype(np.float32)
        x, y = np.arange(self.size[0], dtype=np.float32), np.arange(self.size[1], dtype=np.float32)[:, None]
        over = inverse[2, 0] * x + (inverse[2, 1] * y + inverse[2, 2])
        bent_x = (inverse[0, 0] * x + (inverse[0, 1] * y + inverse[0, 2])) / over
        bent_y = (inverse[1, 0] * x + (inverse[1, 1] * y + inverse[1, 2])) / over
        flat_x, flat_y = self.bend.backward(bent_x, bent_y)
        return flat_x.astype(np.float32), flat_y.astype(np.float32)


def sample_warp(letters: Letters, height: float, config: RenderConfig, rng: np.random.Generator) -> Warp:
    """Sample a warp that makes a capital letter about `height` pixels high and crops the image around the letters."""
    left, top, right, bottom = letters.box
    centre = ((left + right) / 2, (top + bottom) / 2)
    bend, arc = _sample_bend(right - left, bottom - top, config, rng)
    stretch = math.exp(min(max(0.15 * rng.standard_normal(), -0.5), 0.5))
    view, rotation = _sample_view(max(right - left, bottom - top) / 2 * stretch, config, rng)
    view = view @ np.diag([stretch, 1.0, 1.0])
    outline = _outline(letters) - centre
    points = cv2.perspectiveTransform((bend.forward(outline) if bend else outline)[None], view)[0]
    low, high = points.min(axis=0), points.max(axis=0)
    scale = height / letters.unit
    margins = _sample_margins(config, rng) * letters.unit
    extent = high - low + margins[:2] + margins[2:]
    scale = min(scale, config.letters.max_width / extent[0], 3 * MAX_HEIGHT / extent[1])
    size = (max(round(extent[0] * scale), 8), max(round(extent[1] * scale), 8))
    matrix = np.diag([scale, scale, 1.0]) @ _shift(*(margins[:2] - low)) @ view
    sides = tuple(float(margin * scale) for margin in margins)
    return Warp(centre, bend, matrix, size, letters.unit * scale, sides, rotation, arc)


def _outline(letters: Letters) -> np.ndarray:
    """Return points (n, 2) on the upper and lower edge of the letters; the warped points bound the word."""
    left, top, right, bottom = letters.box
    step = max(1, (right - left) // 50)
    columns = np.arange(left, right, step)
    inked = letters.fill[top:bottom, left:right:step] > 127
    some = inked.any(axis=0)
    if not some.any():  # hairlines that never cover half a pixel
        return np.array([(left, top), (right, top), (left, bottom), (right, bottom)], np.float64)
    columns, inked = columns[some], inked[:, some]
    first = top + inked.argmax(axis=0)
    last = bottom - inked[::-1].argmax(axis=0)
    points = np.empty((2 * len(columns) + 4, 2))
    points[: len(columns), 0] = points[len(columns) : -4, 0] = columns
    points[: len(columns), 1], points[len(columns) : -4, 1] = first, last
    points[-4:] = (left, first[0]), (left, last[0]), (right, first[-1]), (right, last[-1])
    return points


def _sample_bend(width: int, height: int, config: RenderConfig, rng: np.random.Generator) -> tuple[Bend | None, float]:
    """Sample a bend or None, and the degrees of the arc."""
    chance, strong, kind, sign, angle, phase, waves = rng.random(7)
    beyond = rng.standard_exponential()
    if width < 1.5 * height:
        return None, 0.0
    if strong < config.chance("strong_curve"):
        degrees = config.amount(_CURVE_DEGREES) + 60.0 * beyond
    elif chance >= config.chance("curve"):
        return None, 0.0
    elif kind < 0.85:
        degrees = config.amount(_CURVE_DEGREES) * (0.25 + 0.75 * angle)
    else:
        amplitude = config.amount(0.16) * height * (0.3 + 0.7 * angle)
        return Bend(amplitude=amplitude, length=width * (1 + 1.5 * waves), phase=2 * math.pi * phase), 0.0
    # The radius stays above the letters' half height, so that the inner side of the arc does not fold over.
    radius = max(width / math.radians(min(degrees, 320.0)), height)
    return Bend(radius=math.copysign(radius, sign - 0.35)), math.degrees(width / radius)


def _sample_view(half_extent: float, config: RenderConfig, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Sample slant, rotation and perspective about the origin as one matrix, and the rotation in degrees."""
    chances = rng.random(4)
    values = [min(max(value, -2.2), 2.2) for value in rng.standard_normal(4).tolist()]
    tail = rng.laplace()
    matrix, degrees = np.eye(3), 0.0
    if chances[0] < config.chance("shear"):
        matrix[0, 1] = config.amount(0.18) * values[0]
    if chances[3] < config.chance("strong_rotation"):
        degrees = 24.0 * tail
    elif chances[1] < config.chance("rotation"):
        degrees = config.amount(5.0) * values[1]
    if degrees:
        matrix = rotation_matrix(degrees) @ matrix
    if chances[2] < config.chance("perspective"):
        amount = config.amount(0.12)
        view = np.eye(3)
        view[2, 0] = min(max(amount * values[2], -0.35), 0.35) / half_extent
        view[2, 1] = 0.5 * min(max(amount * values[3], -0.35), 0.35) / half_extent
        matrix = view @ matrix
    return matrix, degrees


def _sample_margins(config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Sample left, top, right, bottom space in heights of a capital letter; opposite sides are similar."""
    chances, spread = rng.random(6), rng.random((2, 4))
    margins = config.letters.margin * rng.gamma(2.0, 0.5, size=2)[[0, 1, 0, 1]] * (0.6 + 0.8 * spread[0])
    if chances[4] < config.chance("loose"):
        margins = 0.2 + 1.6 * spread[0]
    elif chances[5] < config.chance("tight"):
        margins = 0.06 * spread[0]
    return np.where(chances[:4] < config.chance("cut"), -0.02 - 0.08 * spread[1], margins)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
