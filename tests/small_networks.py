"""Networks that are built in no time, their checkpoints, and words to read: what the tests of reading share."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import modules.ssn
from builders import build_charset, build_criterion, build_model, build_optimizer
from bundle import save_bundle
from config import Config
from engine.distributed import Process
from engine.trainer import Trainer
from loading.batches import Batch, LanguageBatch, SegmentationBatch
from loading.lmdb_io import LmdbWriter
from modules.hrnet import HRNet
from modules.outputs import AlignmentOutput, LanguageOutput, RecogniserOutput, VisionOutput

VISION = {
    "stem_width": 8,
    "widths": [8, 8, 16, 16, 32],
    "depths": [1, 1, 1, 1, 1],
    "backbone_ln": 1,
    "d_model": 32,
    "nhead": 2,
    "d_inner": 32,
    "attention_channels": 8,
    "segmentation": {
        "sft_blocks": 1,
        "sft_channels": 8,
        "condition_channels": 8,
        "hidden_channels": 8,
        "side_channels": 8,
    },
}
SSN = {
    "widths": [4, 8, 12, 16],
    "stem_width": 8,
    "num_modules": [1, 1, 1],
    "num_blocks": 1,
    "bottlenecks": 1,
    "bottleneck_width": 4,
    "head_width": 8,
    "areas": [65],
}
WORDS = ("hello", "World", "R2-D2", "a", "straße", "CAFÉ", "2024", "Exit", "open", "the")


class ReadsUprightWords(nn.Module):
    """Reads "up", surely, where image and mask grow brighter to the right, else "no", less surely."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.charset = build_charset(config)
        self.steps = config.dataset.max_length + 1

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        half = image.shape[-1] // 2
        seen = [image] if mask is None else [image, mask]
        upright = [each[..., half:].mean((1, 2, 3)) - each[..., :half].mean((1, 2, 3)) > 0.1 for each in seen]
        logits = torch.zeros(len(image), self.steps, self.charset.num_classes)
        for row, right in enumerate(torch.stack(upright).all(0).tolist()):
            classes = torch.tensor([*self.charset.encode("up" if right else "no"), 0])
            logits[row, range(3), classes] = 9.0 if right else 6.0
        attention = torch.full((len(image), self.steps, 4, 8), 1 / 32)
        vision = VisionOutput(logits, logits, attention, mask)
        return RecogniserOutput(vision, [LanguageOutput(logits, logits)], [AlignmentOutput(logits, logits)])


def small_config(name: str = "binet", **dataset: Any) -> Config:
    """A config of a tiny network of any name; ABINet's without masks."""
    vision = {key: value for key, value in VISION.items() if name != "abinet" or key != "segmentation"}
    model: dict[str, Any] = {"name": name, "iter_size": 2, "vision": vision, "ssn": SSN}
    model["language"] = {"num_layers": 1, "d_model": 32, "nhead": 2, "d_inner": 32}
    model["alignment"] = {"d_model": 32}
    root = Path(__file__).resolve().parents[1]
    data = {"charset_path": str(root / "data" / "charset_36.txt"), "num_workers": 0, **dataset}
    return Config.from_dict({"model": model, "dataset": data})


def trainer(
    kind: str | Config, *, parts: int = 1, process: Process | None = None, ema_decay: float | None = None
) -> Trainer:
    """A trainer of a tiny network of any name or config, without data; its batches go through it in `parts`."""
    config = small_config(kind) if isinstance(kind, str) else kind
    torch.manual_seed(0)
    model = build_model(config)
    return Trainer(
        model=model,
        criterion=build_criterion(config),
        optimizer=build_optimizer(config, model),
        learning_rate_factor=lambda iteration: 1.0,
        data=None,
        batches_per_epoch=10,
        iterations=10,
        device=torch.device("cpu"),
        process=process or Process(),
        accumulation=parts,
        ema_decay=ema_decay,
    )


def make_ssn(*, head_width: int, **sizes) -> nn.Module:
    """Return an SSN of some sizes, such as those of `SSN`."""
    return modules.ssn.SSN(HRNet(**sizes), head_width=head_width)


def uneven_batch(kind: str, count: int = 8):
    """Samples that hold different numbers of characters and pixels."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ssn":
        images = torch.randint(0, 256, (count, 3, 33, 65), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 2, (count, 33, 65), dtype=torch.uint8, generator=generator)
        for row in range(count):
            labels[row, :, 8 * row + 8 :] = 255  # which does not count
        return SegmentationBatch(images=images, labels=labels, indices=torch.arange(count))
    lengths = torch.tensor([2, 3, 5, 26, 2, 2, 17, 9])[:count]
    labels = torch.randint(1, 37, (count, 26), generator=generator)
    labels[torch.arange(26) >= lengths[:, None] - 1] = 0
    common = {"labels": labels, "lengths": lengths, "texts": [""] * count, "indices": torch.arange(count)}
    if kind == "language":
        spellings = torch.rand(count, 26, 37, generator=generator).softmax(-1)
        return LanguageBatch(probabilities=spellings, input_lengths=lengths, **common)
    images = torch.randint(0, 256, (count, 3, 32, 128), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 256, (count, 1, 32, 128), dtype=torch.uint8, generator=generator)
    masks[:, :, :, 16:] //= 1 + 5 * torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    return Batch(images=images, masks=None if kind == "abinet" else masks, **common)


def terms_and_gradients(
    kind: str, *, parts: int, rows: slice = slice(None), process: Process | None = None
) -> dict[str, Tensor]:
    """Loss terms and gradients of one step on those rows of the uneven batch, batch norms in eval mode, no dropout."""
    fitted = trainer(kind, parts=parts, process=process)
    for module in fitted.model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
        module.eval()
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    batch = uneven_batch(kind)
    fields = {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    batch = type(batch)(
        **{name: value[rows] if isinstance(value, Tensor | list) else value for name, value in fields.items()}
    )
    terms = fitted._forward_backward(batch)
    return terms | {name: p.grad for name, p in fitted.model.named_parameters() if p.grad is not None}


def save_network(path: Path, config: Config, *, seed: int = 0) -> Path:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("cls.weight"):
                tensor.mul_(8)  # predictions that differ from image to image
    characters = Path(config.dataset.charset_path).read_text(encoding="utf-8").splitlines()
    charset = "".join(line.split("\t")[1] for line in characters)
    torch.save({"model": model.state_dict(), "config": config.to_dict(), "charset": charset}, path)
    return path


def save_networks(folder: Path) -> Path:
    """Checkpoints `binet.pth`, `abinet.pth`, `ssn.pth`, and `both.pth`: the first and the last in one file."""
    for seed, name in enumerate(("binet", "abinet", "ssn")):
        save_network(folder / f"{name}.pth", small_config(name), seed=seed)
    save_bundle(folder / "both.pth", folder / "binet.pth", folder / "ssn.pth")
    return folder


def write_words(path: Path, count: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> list[np.ndarray]:
    """An LMDB of words that OpenCV draws, as lossless images, from 1; returns the images, RGB."""
    random = np.random.default_rng(seed)
    images = []
    with LmdbWriter(path) as writer:
        for number in range(1, count + 1):
            text = WORDS[number % len(WORDS)]
            size = (int(random.integers(20, 48)), int(random.integers(50, 140)), 3)
            image = random.integers(100, 256, size, dtype=np.uint8)
            cv2.putText(image, text, (3, size[0] - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 60), 2, cv2.LINE_AA)
            images.append(image)
            data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
            writer.append(b"no image" if number in broken else data, text)
    return images


def write_masks(path: Path, source: Path, images: list[np.ndarray]) -> None:
    """The mask LMDB of `write_words`: dark pixels are text."""
    with LmdbWriter(path) as writer:
        for number, image in enumerate(images, start=1):
            mask = (image.mean(axis=2) < 90).astype(np.uint8) * 255
            writer.append(cv2.imencode(".png", mask)[1].tobytes(), WORDS[number % len(WORDS)])
