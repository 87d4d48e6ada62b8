"""Read words in a few lines of Python.

    from reader import Reader

    reader = Reader.from_checkpoint("weights.pth")
    for prediction in reader.read(["a.png", pil_image, array]):
        print(prediction.text, prediction.confidence)

Predictions are those of `main.py --phase test` on the same images: both use the same transforms, views and masks.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from builders import checked_model_eval
from bundle import Bundle, load_bundle, load_ssn
from config import Config, load_config
from engine.precision import use_tf32
from evaluation.evaluator import chosen_logits, most_confident, read_logits, take_rows
from inference.prepare import prepare_for_inference
from inference.segmenter import IMAGE_PIXELS, Segmenter
from loading.batches import normalize_images, stack_images
from loading.decoding import IMAGE_ERRORS, MAX_PIXELS, BrokenImageError, convert, decode_image, decode_mask
from loading.transforms import ResizeWord, views
from utils import UserError, first_line

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "weights" / "binet-small.pth"
MASK_SOURCES = ("auto", "none")

CHANNELS = (1, 3, 4)  # of an array: grey, RGB, RGBA
FLOAT_TOLERANCE = 1e-3  # of floats that should lie in [0, 1], for arithmetic that rounds

Source = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Character:
    """One character of a prediction and the probability that the network gives it."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Prediction:
    """What was read of one image. Compared, and hashed, by all but its arrays.

    Attributes:
        text: the word; empty where there is an `error`.
        confidence: product of the probabilities of its characters and of its end, in [0, 1].
        characters: each character with its own confidence.
        mask_levels: the mask that the network was given, uint8 (H, W) of the image's size, 255 = text; None without.
        attention: float32 (len(text), h, w) over the network's input, where the vision model looked for each character;
            each sums to 1.
        refined_mask: float32 over the network's input, at its size, about 1 on text; None for a network without masks.
        extent: where the image lies in the network's input: top, left, height, width as parts of the input's sides;
            (0, 0, 1, 1) where it was stretched, else less (`dataset.multiscales`, `dataset.align_left`).
        turned: degrees counterclockwise, 0, 90 or 270, by which the image was turned before it went into the network's
            input (`dataset.turn_tall`); attention, refined mask and extent are of the turned image.
        error: why the image could not be read, else None.
    """

    text: str
    confidence: float
    characters: tuple[Character, ...] = ()
    mask_levels: np.ndarray | None = field(default=None, compare=False, repr=False)
    attention: np.ndarray | None = field(default=None, compare=False, repr=False)
    refined_mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    extent: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    turned: int = 0
    error: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """The mask as float32 (H, W) in [0, 1], 1 = text; made anew at each call."""
        return None if self.mask_levels is None else self.mask_levels.astype(np.float32) / 255


class Reader:
    """Reads words with one network. One reader may be used by many threads at once.

    Args:
        checkpoint: file of weights with config and characters; None takes `weights/binet-small.pth`.
        device: where the network runs; None takes a GPU where there is one.
        config: how to build the network of a checkpoint that carries no config: a Config, or its YAML.
        ssn: file of the SSN that makes masks; None takes the one that the checkpoint carries.
        masks: "auto" makes masks for a network that needs them; "none" gives it empty ones.
        batch_size: most images that are read together; large ones are read in smaller batches.
        model_eval: sub-model to read with, alignment, vision or language; None takes the last one that it has.

    Raises:
        UserError: the checkpoint is missing or damaged, the network needs masks and there is no SSN, or an option is
            none of these.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | None = None,
        *,
        device: torch.device | str | None = None,
        config: Config | str | os.PathLike | None = None,
        ssn: str | os.PathLike | None = None,
        masks: str = "auto",
        batch_size: int = 64,
        model_eval: str | None = None,
    ) -> None:
        if masks not in MASK_SOURCES:
            raise UserError(f"masks {masks!r} is unknown; give {' or '.join(MASK_SOURCES)}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size {batch_size!r} must be a whole number from 1")
        self.checkpoint = checkpoint_or_default(checkpoint)
        config = load_config(config) if isinstance(config, str | os.PathLike) else config
        bundle = load_bundle(self.checkpoint, config)
        self.device = pick_device(device)
        self.charset = bundle.charset
        self.takes_masks = bundle.config.model.takes_masks
        self.batch_size = batch_size
        self.model_eval = checked_model_eval(bundle.config, model_eval)
        use_tf32(bundle.config.training.tf32)  # predictions are those of the test
        self._model = prepare_for_inference(bundle.model.to(self.device), precision="fp32", compile=False)
        self._resize = ResizeWord(size=bundle.image_size, fit=bundle.config.dataset.fit)
        self._turn_tall = bundle.config.dataset.turn_tall
        self._segmenter = self._make_segmenter(bundle, ssn) if self.takes_masks and masks == "auto" else None

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: torch.device | str | None = None, **options: object
    ) -> "Reader":
        """A reader of one file of weights; the options are those of the class."""
        return cls(path, device=device, **options)

    def read(self, images: Sequence[Source], masks: Sequence[Source | None] | None = None) -> list[Prediction]:
        """Read images of one word each.

        Args:
            images: paths, encoded bytes, PIL images, or arrays and tensors of uint8 levels or of floats in [0, 1]: RGB
                (H, W, 3), RGBA (H, W, 4) or grey (H, W), (H, W, 1), tensors also with the channels first; or one array
                or tensor of N such images. Files and PIL images are turned as their EXIF orientation says, and what is
                transparent is white.
            masks: text masks of the images, of their sizes, 255 (or 1.0) = text, in the same forms; None, as a whole or
                for an image, lets SSN make them.

        Returns:
            One prediction for each image, in order; of an image that cannot be read, with its `error`.

        Raises:
            TypeError, ValueError: an image is none of these, or `images` is a single one.
        """
        return list(self.stream(images, masks))

    def stream(self, images: Sequence[Source], masks: Sequence[Source | None] | None = None) -> Iterator[Prediction]:
        """As `read`, but a batch is only read when it is asked for: any number of images fits into memory."""
        if isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 4) != 4:
            raise TypeError("images must be a list of images, or an array (N, H, W, 3); put a single one into a list")
        masks = [None] * len(images) if masks is None else masks
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} images")
        return self._stream(images, masks)

    def _stream(self, images: Sequence[Source], masks: Sequence[Source | None]) -> Iterator[Prediction]:
        batch: list[tuple[np.ndarray, np.ndarray | None] | Prediction] = []
        pixels = 0
        for source, mask_source in zip(images, masks, strict=True):
            try:
                image = to_image(source)
                unread = mask_source is None or not self.takes_masks
                batch.append((image, None if unread else to_mask(mask_source, image)))
                pixels += image.shape[0] * image.shape[1]
            except BrokenImageError as error:
                batch.append(Prediction("", 0.0, error=" ".join(str(error).splitlines())))
            if len(batch) == self.batch_size or pixels >= IMAGE_PIXELS:
                yield from self._read_batch(batch)
                batch, pixels = [], 0
        yield from self._read_batch(batch)

    def _read_batch(self, batch: Sequence[tuple[np.ndarray, np.ndarray | None] | Prediction]) -> list[Prediction]:
        """Predictions of images with their given masks; what is a prediction already stays."""
        images = [each for each in batch if not isinstance(each, Prediction)]
        read = iter(self._read_images(*zip(*images, strict=True)) if images else ())
        return [each if isinstance(each, Prediction) else next(read) for each in batch]

    def _read_images(self, images: Sequence[np.ndarray], given: Sequence[np.ndarray | None]) -> list[Prediction]:
        masks = self._complete(images, given) if self.takes_masks else [None] * len(images)
        pairs = enumerate(zip(images, masks, strict=True))
        seen = [(word, view) for word, pair in pairs for view in views(*pair, turn_tall=self._turn_tall)]
        sized = [self._resize(view.image, view.mask, None) for _, view in seen]
        tensors = normalize_images(stack_images([image for image, _ in sized]).to(self.device))  # (M, 3, H, W)
        inputs = None
        if self.takes_masks:
            inputs = torch.from_numpy(np.stack([mask for _, mask in sized])).unsqueeze(1).to(self.device) / 255.0
        with torch.inference_mode():
            output = self._model(tensors, inputs)
            texts, confidences = read_logits(chosen_logits(output, self.model_eval), self.charset)
            rows = most_confident(confidences, [word for word, _ in seen])
            output = take_rows(output, rows)
            chosen = chosen_logits(output, self.model_eval).float()  # (N, T, C)
            probabilities = chosen.softmax(-1).amax(-1).nan_to_num(0.0)
        attention, refined = _array(output.vision.attention), output.vision.refined_mask
        refined = [None] * len(images) if refined is None else _array(refined)[:, 0]
        return [
            Prediction(
                text=texts[row],
                confidence=confidences[row],
                characters=tuple(map(Character, texts[row], each)),
                mask_levels=mask,
                attention=looked[: len(texts[row])],
                refined_mask=sharp,
                extent=self._extent(seen[row][1].image),
                turned=seen[row][1].turned,
            )
            for row, each, mask, looked, sharp in zip(
                rows, probabilities.tolist(), masks, attention, refined, strict=True
            )
        ]

    def _extent(self, image: np.ndarray) -> tuple[float, float, float, float]:
        """Top, left, height and width of an image in the network's input, as parts of its sides."""
        size = self._resize.fitted(image.shape[:2])
        height, width = self._resize.size
        top, left = self._resize.corner(size)
        return top / height, left / width, size[0] / height, size[1] / width

    def _complete(self, images: Sequence[np.ndarray], given: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """A mask, uint8 (H, W), for each image: the one that was given, else SSN's, else an empty one."""
        missing = [place for place, mask in enumerate(given) if mask is None]
        masks = list(given)
        if self._segmenter is not None:
            made = self._segmenter([images[place] for place in missing]) if missing else []
        else:
            made = [np.zeros(images[place].shape[:2], np.uint8) for place in missing]
        for place, mask in zip(missing, made, strict=True):
            masks[place] = mask
        return masks

    def _make_segmenter(self, bundle: Bundle, ssn: str | os.PathLike | None) -> Segmenter:
        network, areas = load_ssn(ssn) if ssn is not None else (bundle.ssn, bundle.areas)
        if network is None:
            raise UserError(
                f"checkpoint {self.checkpoint} reads with text masks and carries no SSN to make them: name one "
                "(--ssn FILE), bundle one with tools/bundle_weights.py, or do without (--masks none)"
            )
        return Segmenter(network, areas, device=self.device)


def checkpoint_or_default(checkpoint: str | os.PathLike | None) -> Path:
    """The file to read with.

    Raises:
        UserError: none is named and the one that comes with the project is not there.
    """
    if checkpoint is None and not DEFAULT_CHECKPOINT.is_file():
        raise UserError(f"no checkpoint is named and {DEFAULT_CHECKPOINT} does not exist; give --checkpoint FILE")
    return DEFAULT_CHECKPOINT if checkpoint is None else Path(checkpoint)


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device that is named, else a GPU where there is one, else the CPU.

    Raises:
        UserError: the name is none, or there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # a meta device has nothing to read
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: not usable ({str(error).splitlines()[0]}); give cpu or cuda") from error


def to_image(source: Source) -> np.ndarray:
    """RGB, uint8, (H, W, 3) of any of the forms that a reader takes.

    Raises:
        BrokenImageError: it cannot be decoded, or has no pixel; says why.
        TypeError, ValueError: it is of another type, shape or range.
    """
    return _decoded(source, decode_image, "RGB")


def to_mask(mask: Source, image: np.ndarray) -> np.ndarray:
    """Grey, uint8, (H, W), of the image's size; raises as `to_image`, and BrokenImageError for another size."""
    decoded = _decoded(mask, decode_mask, "L")
    if decoded.shape != image.shape[:2]:
        height, width = image.shape[:2]
        raise BrokenImageError(
            f"the mask is {decoded.shape[1]} x {decoded.shape[0]} pixels and its image {width} x {height}"
        )
    return decoded


def _decoded(image: Source, decode: Callable[..., np.ndarray], mode: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image), functools.partial(decode, oriented=True))
    if isinstance(image, bytes):
        try:
            return decode(image, oriented=True)
        except BrokenImageError as error:
            raise BrokenImageError(f"{len(image)} bytes: {error}") from error
    if isinstance(image, Image.Image):
        return _from_pillow(image, mode)
    if isinstance(image, Tensor):
        image = _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, mode)
    raise TypeError(f"an image is a path, bytes, PIL image, array or tensor, not {type(image).__name__}")


def _from_file(path: Path, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    try:
        if not path.is_file():
            raise BrokenImageError("no such file")
        return decode(path.read_bytes())
    except OSError as error:
        raise BrokenImageError(f"{path}: cannot be read ({error.strerror})") from error
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: {error}") from error


def _from_pillow(image: Image.Image, mode: str) -> np.ndarray:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BrokenImageError(f"PIL image of {width} x {height} pixels; there must be 1 to {MAX_PIXELS}")
    try:
        return np.array(convert(ImageOps.exif_transpose(image), mode))
    except IMAGE_ERRORS as error:
        raise BrokenImageError(f"PIL image: {first_line(error)}") from error


def _from_tensor(tensor: Tensor) -> np.ndarray:
    """An array of a tensor, whose channels may come first."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == 3 and tensor.shape[0] in CHANNELS:
        tensor = tensor.permute(1, 2, 0)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _from_array(array: np.ndarray, mode: str) -> np.ndarray:
    shape, channels = array.shape, CHANNELS if mode == "RGB" else CHANNELS[:1]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in channels:
        shapes = "(H, W, 3), (H, W, 4) or (H, W)" if mode == "RGB" else "(H, W)"
        raise ValueError(f"array is {shape}; it must be {shapes}, with the channels last")
    if not array.size:
        raise BrokenImageError(f"array is {shape}: empty")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
            raise ValueError(f"array of floats from {low} to {high}; they must lie in [0, 1], or be uint8 levels")
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"array is {array.dtype}; it must hold uint8 levels or floats in [0, 1]")
    if array.shape[2] == 4:
        return np.array(convert(Image.fromarray(np.ascontiguousarray(array)), mode))
    if mode == "L":
        return np.ascontiguousarray(array[..., 0])
    return np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
