"""What the page of `demo.py --html` shows of a word: image, masks, attention and probability of each character."""

import base64
from typing import Any

import cv2
import numpy as np

from evaluation.drawing import draw_attention, grey, on_image, overlay
from loading.transforms import resize, turn

HEIGHT, WIDTH = 96, 480  # pixels that an image on the page fits into
REFINED = "refined mask"
STEP_HEIGHT, STEP_WIDTH = 48, 144  # the same for the attention of a character


def page_entry(name: str, image: np.ndarray | None, prediction: Any) -> dict[str, Any]:
    """Return what `report_template/demo.html.j2` shows of one word.

    Args:
        name: of the image.
        image: RGB, uint8, (H, W, 3); None where it could not be read.
        prediction: a `reader.Prediction` of it, with its mask and attention.
    """
    entry = {"name": name, "text": prediction.text, "confidence": prediction.confidence, "error": prediction.error}
    if prediction.error is not None:
        return entry | {"images": [], "characters": []}
    large = word_layers(image, prediction, HEIGHT, WIDTH)
    small = word_layers(image, prediction, STEP_HEIGHT, STEP_WIDTH)
    images = [("image", _uri(large["image"]))]
    for mask_name, mask in large["masks"].items():
        images.append((mask_name, _uri(grey(mask) if mask_name == REFINED else overlay(large["image"], mask))))
    characters = [
        {"text": each.text, "confidence": each.confidence, "image": _uri(draw_attention(small["image"], weights))}
        for each, weights in zip(prediction.characters, small["attention"], strict=True)
    ]
    return entry | {"images": images, "characters": characters}


def word_layers(image: np.ndarray, prediction: Any, height: int, width: int) -> dict[str, Any]:
    """Return an image, (H, W, 3), as it was read, at the largest size that fits, its aspect kept.

    `masks` (by name, where there are any) and the maps of `attention` are float in [0, 1], of that size.
    """
    image = turn(image, prediction.turned)
    scale = min(height / image.shape[0], width / image.shape[1])
    size = tuple(max(round(side * scale), 1) for side in image.shape[:2])
    masks = {}
    if prediction.mask_levels is not None:
        masks["text mask"] = resize(turn(prediction.mask_levels, prediction.turned), size) / 255
    if prediction.refined_mask is not None:
        masks[REFINED] = on_image(prediction.refined_mask, size, prediction.extent)
    attention = [on_image(each, size, prediction.extent) for each in prediction.attention]
    return {"image": resize(image, size), "masks": masks, "attention": attention}


def _uri(image: np.ndarray) -> str:
    """Return an RGB image as a data URI."""
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
