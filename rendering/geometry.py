"""The warp: from the flat word to its place in the picture, the same one for everything that belongs to the letters.

Two steps: the base line is bent (arc or wave), then the plane is seen in perspective. Points are (x, y) in pixels, y
downwards; the flat and the bent plane have their origin at the middle of the letters.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from rendering.config import RenderConfig
from rendering.letters import Letters


@dataclass(frozen=True)
class Bend:
    """A curved base line: an arc of `radius` pixels (negative: its middle is low) or a wave of `amplitude` pixels."""

    radius: float = 0.0
    amplitude: float = 0.0
    length: float = 1.0
    phase: float = 0.0

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Flat points (n, 2) to bent ones."""
        x, y = points[:, 0], points[:, 1]
        if self.radius:
            angle = x / self.radius
            return np.stack([(self.radius - y) * np.sin(angle), self.radius - (self.radius - y) * np.cos(angle)], 1)
        return np.stack([x, y + self.amplitude * np.sin(2 * math.pi * x / self.length + self.phase)], 1)

    def backward(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bent coordinates to flat ones, arrays of one shape."""
        if self.radius:
            sign = math.copysign(1.0, self.radius)
            down = (self.radius - y) * sign
            distance = np.sqrt(x * x + down * down)
            return self.radius * np.arctan2(x * sign, down), self.radius - sign * distance
        return x, y - self.amplitude * np.sin(2 * math.pi * x / self.length + self.phase)


@dataclass(frozen=True)
class Warp:
    """The whole way from the flat word to the picture.

    `centre`: the origin in the flat picture; `bend` or None; `matrix`: (3, 3), bent plane to picture; `size`: (width,
    height) of the picture; `unit`: height of a capital letter in it; `margins`: left, top, right, bottom space around
    the letters in pixels, negative where letters are cut.
    """

    centre: tuple[float, float]
    bend: Bend | None
    matrix: np.ndarray
    size: tuple[int, int]
    unit: float
    margins: tuple[float, float, float, float]

    def apply(self, layer: np.ndarray) -> np.ndarray:
        """`layer` (h, w[, channels]) of the flat word, as it lies in the picture; 0 outside."""
        if self.bend is None:
            matrix = self.matrix @ _shift(-self.centre[0], -self.centre[1])
            return cv2.warpPerspective(layer, matrix, self.size, flags=cv2.INTER_LINEAR)
        return cv2.remap(layer, *self._maps(), cv2.INTER_LINEAR)

    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(self.matrix)
        x, y = np.arange(self.size[0], dtype=np.float32), np.arange(self.size[1], dtype=np.float32)[:, None]
        over = (inverse[2, 0] * x + inverse[2, 1] * y + inverse[2, 2]).astype(np.float32)
        bent_x = (inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2]).astype(np.float32) / over
        bent_y = (inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2]).astype(np.float32) / over
        flat_x, flat_y = self.bend.backward(bent_x, bent_y)
        return (flat_x + self.centre[0]).astype(np.float32), (flat_y + self.centre[1]).astype(np.float32)


def draw_warp(letters: Letters, height: float, config: RenderConfig, rng: np.random.Generator) -> Warp:
    """A random warp that makes a capital letter about `height` pixels high and crops the picture around the letters."""
    left, top, right, bottom = letters.box
    centre = ((left + right) / 2, (top + bottom) / 2)
    bend = _draw_bend(right - left, bottom - top, config, rng)
    stretch = math.exp(float(np.clip(rng.normal(0, config.letters.stretch), -0.5, 0.5)))
    view = _draw_view(max(right - left, bottom - top) / 2 * stretch, config, rng) @ np.diag([stretch, 1.0, 1.0])
    outline = _outline(letters) - centre
    points = cv2.perspectiveTransform((bend.forward(outline) if bend else outline)[None], view)[0]
    low, high = points.min(axis=0), points.max(axis=0)
    scale = height / letters.unit
    margins = _draw_margins(config, rng) * letters.unit
    extent = high - low + margins[:2] + margins[2:]
    scale = min(scale, config.letters.max_width / extent[0], 3 * config.letters.max_height / extent[1])
    size = np.maximum(np.round(extent * scale), 8).astype(int)
    matrix = np.diag([scale, scale, 1.0]) @ _shift(*(margins[:2] - low)) @ view
    unit = letters.unit * scale
    return Warp(centre, bend, matrix, (int(size[0]), int(size[1])), unit, tuple(float(m) for m in margins * scale))


def _outline(letters: Letters) -> np.ndarray:
    """Points (n, 2) on the upper and lower edge of the letters, column by column: the warped ones bound the word."""
    left, top, right, bottom = letters.box
    columns = np.unique(np.linspace(left, right - 1, 60).astype(int))
    inked = letters.fill[top:bottom, columns] > 127
    columns, inked = columns[inked.any(axis=0)], inked[:, inked.any(axis=0)]
    if not columns.size:  # hairlines that never cover half a pixel
        return np.array([(left, top), (right, top), (left, bottom), (right, bottom)], np.float64)
    first = top + inked.argmax(axis=0)
    last = bottom - inked[::-1].argmax(axis=0)
    sides = [(left, first[0]), (left, last[0]), (right, first[-1]), (right, last[-1])]
    return np.concatenate([np.stack([columns, first], 1), np.stack([columns, last], 1), sides]).astype(np.float64)


def _draw_bend(width: int, height: int, config: RenderConfig, rng: np.random.Generator) -> Bend | None:
    chance, arc, sign, angle, phase, waves = rng.random(6)
    if chance >= config.probability(config.geometry.curve) or width < 1.5 * height:
        return None
    if arc < 0.7:
        degrees = min(160.0, config.amount(config.geometry.curve_degrees)) * (0.25 + 0.75 * angle)
        radius = width / math.radians(degrees)
        # The inner side of the arc must not fold over: the radius stays above the letters' half height.
        return Bend(radius=math.copysign(max(radius, height), sign - 0.35))
    return Bend(
        amplitude=config.amount(0.2) * height * (0.3 + 0.7 * angle),
        length=width * (0.8 + 1.2 * waves),
        phase=2 * math.pi * phase,
    )


def _draw_view(half_extent: float, config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Perspective after rotation after slant, about the origin."""
    settings = config.geometry
    chances, values = rng.random(3), np.clip(rng.normal(size=4), -2.2, 2.2)
    matrix = np.eye(3)
    if chances[0] < config.probability(settings.shear):
        matrix[0, 1] = config.amount(settings.shear_amount) * values[0]
    if chances[1] < config.probability(settings.rotation):
        angle = math.radians(config.amount(settings.degrees) * values[1])
        turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]])
        matrix = turn @ matrix
    if chances[2] < config.probability(settings.perspective):
        tilt = np.clip(config.amount(settings.perspective_amount) * values[2:], -0.35, 0.35) / half_extent
        view = np.eye(3)
        view[2, :2] = tilt[0], 0.5 * tilt[1]
        matrix = view @ matrix
    return matrix


def _draw_margins(config: RenderConfig, rng: np.random.Generator) -> np.ndarray:
    """Left, top, right, bottom space in heights of a capital letter; opposite ones are alike."""
    margins = config.geometry.margin * rng.gamma(2.0, 0.5, size=2)[[0, 1, 0, 1]] * rng.uniform(0.6, 1.4, size=4)
    cuts = rng.random(4) < config.probability(config.geometry.cut)
    depths = rng.uniform(0.02, 0.1, size=4)
    return np.where(cuts, -depths, margins)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
