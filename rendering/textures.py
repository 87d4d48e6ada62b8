"""Procedural textures: pieces of tiles that each process makes once."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

TILE = 256  # pixels
VARIANTS = 6
_SEED = 20


def _noise(rng: np.random.Generator, *, finest: int = 256, falloff: float = 0.55) -> np.ndarray:
    """Return noise of several scales, (TILE, TILE), in [0, 1]."""
    total = np.zeros((TILE, TILE), np.float32)
    size, strength = 4, 1.0
    while size <= finest:
        grid = rng.random((size, size), dtype=np.float32)
        total += strength * cv2.resize(grid, (TILE, TILE), interpolation=cv2.INTER_CUBIC)
        size, strength = size * 2, strength * falloff
    return _stretched(total)


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, finest=32)


def _plaster(rng: np.random.Generator) -> np.ndarray:
    noise = _noise(rng, falloff=0.85)
    light = cv2.Sobel(cv2.GaussianBlur(noise, (0, 0), 1.2), cv2.CV_32F, 1, 1)
    return _stretched(light + 0.05 * noise)


def _stone(rng: np.random.Generator) -> np.ndarray:
    grains = rng.random((TILE, TILE), dtype=np.float32)
    return _stretched(cv2.GaussianBlur(grains, (0, 0), rng.uniform(0.7, 1.8)) + 0.3 * _noise(rng, finest=16))


def _stripes(rng: np.random.Generator) -> np.ndarray:
    period = rng.uniform(8, 48)
    place = np.arange(TILE, dtype=np.float32) / period + 0.4 * rng.random()
    sharpness = rng.uniform(1, 8)
    wave = np.clip(0.5 + sharpness * np.sin(2 * np.pi * place), 0, 1).astype(np.float32)
    tile = np.repeat(wave[None], TILE, axis=0)
    return tile if rng.random() < 0.5 else np.ascontiguousarray(tile.T)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    height, width, joint = int(rng.integers(18, 44)), int(rng.integers(40, 90)), int(rng.integers(2, 5))
    tile = np.full((TILE, TILE), rng.uniform(0.0, 1.0), np.float32)
    for row, top in enumerate(range(0, TILE, height)):
        for left in range(-(row % 2) * width // 2, TILE, width):
            cv2.rectangle(
                tile, (left + joint, top + joint), (left + width - 1, top + height - 1), rng.uniform(0.35, 0.65), -1
            )
    return np.clip(tile + 0.3 * (_noise(rng) - 0.5), 0, 1)


def _planks(rng: np.random.Generator) -> np.ndarray:
    grain = cv2.resize(rng.random((TILE, 12), dtype=np.float32), (TILE, TILE), interpolation=cv2.INTER_CUBIC)
    tile = 0.5 * _stretched(cv2.GaussianBlur(grain, (0, 0), sigmaX=6, sigmaY=0.8)) + 0.25 * _noise(rng, finest=8)
    width = int(rng.integers(36, 100))
    for top in range(0, TILE, width):
        tile[top : top + width] += rng.uniform(-0.12, 0.12)
        tile[top : top + 2] -= 0.5
    return _stretched(tile)


def _mesh(rng: np.random.Generator) -> np.ndarray:
    step, line = int(rng.integers(8, 30)), int(rng.integers(1, 4))
    tile = np.full((TILE, TILE), 0.7, np.float32)
    slanted = rng.random() < 0.5
    for place in range(-TILE, 2 * TILE, step):
        ends = ((place, 0), (place + TILE, TILE)) if slanted else ((place, 0), (place, TILE))
        other = ((place, TILE), (place + TILE, 0)) if slanted else ((0, place), (TILE, place))
        cv2.line(tile, *ends, 0.2, line, cv2.LINE_AA)
        cv2.line(tile, *other, 0.2, line, cv2.LINE_AA)
    return np.clip(tile + 0.15 * (_noise(rng) - 0.5), 0, 1)


def _cloth(rng: np.random.Generator) -> np.ndarray:
    x = np.arange(TILE, dtype=np.float32)
    period = rng.uniform(3, 7)
    weave = np.sin(2 * np.pi * x / period)[None] * np.sin(2 * np.pi * x / period)[:, None]
    folds = _noise(rng, finest=8)
    return _stretched(0.3 * weave.astype(np.float32) + folds)


def _leaves(rng: np.random.Generator) -> np.ndarray:
    tile = np.full((TILE, TILE), 0.15, np.float32)
    for _ in range(260):
        centre = tuple(int(v) for v in rng.integers(0, TILE, size=2))
        axes = (int(rng.integers(5, 18)), int(rng.integers(3, 8)))
        cv2.ellipse(tile, centre, axes, float(rng.uniform(0, 180)), 0, 360, float(rng.random()), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(tile, (0, 0), 0.8)


_KINDS: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (
    _clouds,
    _plaster,
    _stone,
    _stripes,
    _bricks,
    _planks,
    _mesh,
    _cloth,
    _leaves,
)


@lru_cache(maxsize=len(_KINDS) * VARIANTS)
def _tile(kind: int, variant: int) -> np.ndarray:
    return _KINDS[kind](np.random.default_rng([_SEED, kind, variant]))


@lru_cache(maxsize=VARIANTS)
def _wear(variant: int) -> np.ndarray:
    return _stretched(_noise(np.random.default_rng([_SEED, 100, variant]), falloff=0.8) ** 3)


@lru_cache(maxsize=1024)
def ramp(length: int) -> np.ndarray:
    """Return -0.5 to 0.5 in `length` steps, float32 (length,), read-only."""
    values = np.linspace(-0.5, 0.5, length, dtype=np.float32)
    values.flags.writeable = False
    return values


def cut_texture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Sample a piece of a texture at any scale, float32 (h, w) in [0, 1]; `size` is (height, width)."""
    return _cut(_tile(int(rng.integers(len(_KINDS))), int(rng.integers(VARIANTS))), size, rng)


def cut_wear(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Sample how worn paint is, float32 (h, w) in [0, 1], mostly near 0; `size` is (height, width)."""
    return _cut(_wear(int(rng.integers(VARIANTS))), size, rng)


def _cut(tile: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    height, width = size
    # Wide images show a tile enlarged.
    span = min(TILE, max(height, width)) * rng.uniform(0.6, 1.0)
    piece_width = max(2, round(span * width / max(height, width)))
    piece_height = max(2, round(span * height / max(height, width)))
    left, top = int(rng.integers(TILE - piece_width + 1)), int(rng.integers(TILE - piece_height + 1))
    piece = tile[top : top + piece_height, left : left + piece_width]
    return cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)
