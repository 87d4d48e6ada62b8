"""Small images for tests of decoding, geometry and augmentation."""

import io

import cv2
import numpy as np
from PIL import Image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pattern(height: int = 40, width: int = 100) -> np.ndarray:
    """Smooth grey blobs, (H, W) uint8, that change under any geometry."""
    noise = rng(3).random((5, 9)).astype(np.float32) * 255
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def as_color(grey: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
