"""Known weights and inputs, and networks to give them to: what the parity tests of the networks share.

The values follow the recipe that the stored arrays of tests/data were made with.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modules.attention import PositionAttention, ReadingOrderAttention
from modules.backbone import ResNet, TransformerBackbone
from modules.model_alignment import AlignmentModel
from modules.model_binet_iter import BINet
from modules.model_language import LanguageModel
from modules.model_vision import MaskedVisionModel, VisionModel

DATA = Path(__file__).parent / "data"
NUM_CLASSES, NUM_STEPS = 37, 26


def fill_known_weights(model: nn.Module) -> nn.Module:
    """Give every floating-point tensor, positional encodings excepted, its known value. Returns the model."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point and ".pe" not in name:
                tensor.copy_(torch.from_numpy(_known_value(name, tuple(tensor.shape))))
    return model


def _known_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    digest = hashlib.sha256(name.encode()).digest()
    noise = np.random.RandomState(int.from_bytes(digest[:4], "little")).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    elif name.endswith("running_mean"):
        value = 0.1 * noise
    elif len(shape) == 1:
        value = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def known_inputs(seed: int, count: int, num_classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image (N, 3, 32, 128), mask (N, 1, 32, 128), labels (N, T), lengths (N,) of the stored arrays."""
    random = np.random.RandomState(seed)
    image = random.standard_normal((count, 3, 32, 128)).astype(np.float32)
    mask = random.uniform(0, 1, (count, 1, 32, 128)).astype(np.float32)
    mask[mask <= 0.5] = 0
    lengths = random.randint(2, NUM_STEPS, (count,))
    labels = np.zeros((count, NUM_STEPS), np.int64)
    for row, length in zip(labels, lengths, strict=True):
        row[: length - 1] = random.randint(1, num_classes, (length - 1,))
    return torch.from_numpy(image), torch.from_numpy(mask), torch.from_numpy(labels), torch.from_numpy(lengths)


def expected_arrays(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def expected_losses() -> dict[str, float]:
    return json.loads((DATA / "binet_train_n1.json").read_text())["losses"]


def expected_tensors(name: str) -> dict[str, str]:
    """Name -> shape ("3x4", or "scalar") of every tensor that the published network uses."""
    lines = (DATA / f"state_dict_{name}.tsv").read_text().splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return {tensor: shape for tensor, shape, used in rows if used == "yes"}


def tensor_shapes(model: nn.Module) -> dict[str, str]:
    return {name: "x".join(map(str, t.shape)) or "scalar" for name, t in model.state_dict().items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def small_vision(
    *,
    masked: bool = True,
    attention: str = "attention",
    image_size: tuple[int, int] = (32, 128),
    normalize: str = "sample",
    dropout: float = 0.0,
    d_model: int = 32,
) -> VisionModel:
    """A vision model of a few thousand parameters, with every block of the large one."""
    resnet = ResNet(
        stem_width=8, widths=(8, 16, d_model), depths=(1, 1, 2), strides=(2, 2, 1), mask_branch=masked, side_channels=8
    )
    backbone = TransformerBackbone(
        resnet=resnet,
        image_size=image_size,
        num_layers=1,
        nhead=2,
        d_inner=48,
        dropout=dropout,
        positional_encoding=not masked,
    )
    shared = {"num_steps": NUM_STEPS, "cells": resnet.output_size(image_size), "d_model": d_model}
    attend = (
        ReadingOrderAttention(**shared)
        if attention == "attention"
        else PositionAttention(**shared, attention_channels=8)
    )
    if not masked:
        return VisionModel(backbone=backbone, attention=attend, num_classes=NUM_CLASSES, image_size=image_size)
    return MaskedVisionModel(
        backbone=backbone,
        attention=attend,
        num_classes=NUM_CLASSES,
        image_size=image_size,
        normalize=normalize,
        sft_blocks=2,
        sft_channels=8,
        condition_channels=4,
        hidden_channels=8,
    )


def small_language(*, d_model: int = 32, dropout: float = 0.0, **options: bool) -> LanguageModel:
    return LanguageModel(num_layers=2, d_model=d_model, nhead=2, d_inner=48, dropout=dropout, **options)


def small_recogniser(
    *, iter_size: int = 3, masked: bool = True, attention: str = "attention", **vision: object
) -> BINet:
    return BINet(
        vision=small_vision(masked=masked, attention=attention, **vision),
        language=small_language(),
        alignment=AlignmentModel(d_model=32),
        iter_size=iter_size,
    )


def published_recogniser(name: str, *, dropout: float = 0.1) -> BINet:
    """The full-size network of `name`: "binet", "binet_position" or "abinet"."""
    masked = name != "abinet"
    backbone = TransformerBackbone(resnet=ResNet(mask_branch=masked), dropout=dropout, positional_encoding=not masked)
    attention = ReadingOrderAttention() if name == "binet" else PositionAttention()
    vision = (MaskedVisionModel if masked else VisionModel)(backbone=backbone, attention=attention)
    return BINet(vision=vision, language=LanguageModel(dropout=dropout), alignment=AlignmentModel())
