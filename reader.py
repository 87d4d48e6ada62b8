"""Read words in a few lines of Python.

    from reader import Reader

    reader = Reader.from_checkpoint("weights.pth")
    for reading in reader.read(["a.png", pil_image, array]):
        print(reading.text, reading.confidence)

Readings are those of `main.py --phase test` on the same pictures: both use the same transforms, collation and masks.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batches import normalize_images, stack_pictures
from builders import checked_model_eval
from bundle import Bundle, load_bundle, load_ssn
from config import Config, load_config
from evaluation import chosen_logits
from inference import prepare_for_inference
from precision import use_tf32
from segmentation import Segmenter
from transforms import BrokenPictureError, ResizeWord, decode_mask, decode_picture, to_8_bits
from utils import UserError

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "weights" / "binet-small.pth"
MASK_SOURCES = ("auto", "none")

Source = str | os.PathLike | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Character:
    """One character of a reading and the probability that the network gives it."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What was read of one picture.

    Attributes:
        text: the word; empty where there is an `error`.
        confidence: product of the probabilities of its characters and of its end, in [0, 1].
        characters: each character with its own confidence.
        mask: float32 (H, W) of the picture's size in [0, 1], 1 = text: what the network was given; None without masks.
        attention: float32 (len(text), h, w) over the network's input, where the vision model looked for each character;
            each sums to 1.
        refined_mask: float32 over the network's input, at its size, about 1 on text; None for a network without masks.
        extent: where the picture lies in the network's input: top, left, height, width as parts of the input's sides;
            (0, 0, 1, 1) where it was stretched, else less (`dataset.multiscales`, `dataset.align_left`).
        error: why the picture could not be read, else None.
    """

    text: str
    confidence: float
    characters: tuple[Character, ...] = ()
    mask: np.ndarray | None = None
    attention: np.ndarray | None = None
    refined_mask: np.ndarray | None = None
    extent: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    error: str | None = None


class Reader:
    """Reads words with one network. One reader may be used by many threads at once.

    Args:
        checkpoint: file of weights with config and characters; None takes `weights/binet-small.pth`.
        device: where the network runs; None takes a GPU where there is one.
        config: how to build the network of a checkpoint that carries no config: a Config, or its YAML.
        ssn: file of the SSN that makes masks; None takes the one that the checkpoint carries.
        masks: "auto" makes masks for a network that needs them; "none" gives it empty ones.
        batch_size: most pictures in one forward pass.
        model_eval: sub-model to read with, alignment, vision or language; None takes the last one that it has.

    Raises:
        UserError: the checkpoint is missing or damaged, or the network needs masks and there is no SSN.
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
        self.checkpoint = checkpoint_or_default(checkpoint)
        config = load_config(config) if isinstance(config, str | os.PathLike) else config
        bundle = load_bundle(self.checkpoint, config)
        self.device = pick_device(device)
        self.charset = bundle.charset
        self.takes_masks = bundle.config.model.takes_masks
        self.batch_size = batch_size
        self.model_eval = checked_model_eval(bundle.config, model_eval)
        use_tf32(bundle.config.training.tf32)  # readings are those of the test
        self._model = prepare_for_inference(bundle.model.to(self.device), precision="fp32", compile=False)
        self._resize = ResizeWord(size=bundle.image_size, fit=bundle.config.dataset.fit)
        self._segmenter = self._make_segmenter(bundle, ssn) if self.takes_masks and masks == "auto" else None

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: torch.device | str | None = None, **options: object
    ) -> "Reader":
        """A reader of one file of weights; the options are those of the class."""
        return cls(path, device=device, **options)

    def read(self, images: Sequence[Source], masks: Sequence[Source | None] | None = None) -> list[Reading]:
        """Read pictures of one word each.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 arrays: RGB (H, W, 3), RGBA or grey (H, W).
            masks: text masks of the pictures, of their sizes, 255 = text, in the same forms; None, as a whole or for a
                picture, lets SSN make them.

        Returns:
            One reading for each picture, in order; of a picture that cannot be read, with its `error`.

        Raises:
            TypeError: an image is none of these, or `images` is a single one.
        """
        if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
            raise TypeError("images must be a list of pictures; put a single one into a list")
        masks = [None] * len(images) if masks is None else list(masks)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} images")
        readings: list[Reading] = []
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            readings += self._read_batch(list(images[chosen]), masks[chosen])
        return readings

    def _read_batch(self, images: list[Source], masks: list[Source | None]) -> list[Reading]:
        readings: list[Reading | None] = [None] * len(images)
        pictures, given, places = [], [], []
        for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
            try:
                picture = to_picture(image)
                given.append(None if mask is None or not self.takes_masks else to_mask(mask, picture))
                pictures.append(picture)
                places.append(place)
            except BrokenPictureError as error:
                readings[place] = Reading("", 0.0, error=str(error))
        if places:
            for place, reading in zip(places, self._read_pictures(pictures, given), strict=True):
                readings[place] = reading
        return readings

    def _read_pictures(self, pictures: list[np.ndarray], given: list[np.ndarray | None]) -> list[Reading]:
        masks = self._complete(pictures, given) if self.takes_masks else [None] * len(pictures)
        sized = [self._resize(picture, mask, None) for picture, mask in zip(pictures, masks, strict=True)]
        images = normalize_images(stack_pictures([picture for picture, _ in sized]).to(self.device))
        inputs = None
        if self.takes_masks:
            inputs = torch.from_numpy(np.stack([mask for _, mask in sized])).unsqueeze(1).to(self.device) / 255.0
        with torch.inference_mode():
            output = self._model(images, inputs)
            probabilities, classes = chosen_logits(output, self.model_eval).float().softmax(-1).max(-1)  # (N, T)
        attention, refined = _array(output.vision.attention), output.vision.refined_mask
        refined = [None] * len(pictures) if refined is None else _array(refined)[:, 0]
        extents = [self._extent(picture) for picture in pictures]
        return [
            self._reading(*row)
            for row in zip(probabilities.tolist(), classes.tolist(), masks, attention, refined, extents, strict=True)
        ]

    def _extent(self, picture: np.ndarray) -> tuple[float, float, float, float]:
        """Top, left, height and width of a picture in the network's input, as parts of its sides."""
        size = self._resize.fitted(picture.shape[:2])
        height, width = self._resize.size
        top, left = self._resize.corner(size)
        return top / height, left / width, size[0] / height, size[1] / width

    def _complete(self, pictures: list[np.ndarray], given: list[np.ndarray | None]) -> list[np.ndarray]:
        """A mask, uint8 (H, W), for each picture: the one that was given, else SSN's, else an empty one."""
        missing = [place for place, mask in enumerate(given) if mask is None]
        masks = list(given)
        if self._segmenter is not None:
            made = self._segmenter([pictures[place] for place in missing]) if missing else []
        else:
            made = [np.zeros(pictures[place].shape[:2], np.uint8) for place in missing]
        for place, mask in zip(missing, made, strict=True):
            masks[place] = mask
        return masks

    def _reading(
        self,
        probabilities: list[float],
        classes: list[int],
        mask: np.ndarray | None,
        attention: np.ndarray,
        refined: np.ndarray | None,
        extent: tuple[float, float, float, float],
    ) -> Reading:
        text = self.charset.decode(classes)
        counted = probabilities[: len(text) + 1]  # the end too, unless the text fills every step
        return Reading(
            text=text,
            confidence=float(np.prod(counted)),
            characters=tuple(Character(*each) for each in zip(text, counted, strict=False)),
            mask=None if mask is None else mask.astype(np.float32) / 255,
            attention=attention[: len(text)],
            refined_mask=refined,
            extent=extent,
        )

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
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: not usable ({str(error).splitlines()[0]}); give cpu or cuda") from error


def to_picture(image: Source) -> np.ndarray:
    """RGB, uint8, (H, W, 3) of any of the forms that a reader takes.

    Raises:
        BrokenPictureError: it cannot be decoded, or is no picture; says why.
        TypeError: it is of another type.
    """
    return _decoded(image, decode_picture, "RGB")


def to_mask(mask: Source, picture: np.ndarray) -> np.ndarray:
    """Grey, uint8, (H, W), of the picture's size; raises as `to_picture`."""
    decoded = _decoded(mask, decode_mask, "L")
    if decoded.shape != picture.shape[:2]:
        height, width = picture.shape[:2]
        raise BrokenPictureError(
            f"the mask is {decoded.shape[1]} x {decoded.shape[0]} pixels and its picture {width} x {height}"
        )
    return decoded


def _decoded(image: Source, decode: Callable[[bytes], np.ndarray], mode: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).read_bytes())
        except OSError as error:
            raise BrokenPictureError(f"{image}: cannot be read ({error.strerror})") from error
        except BrokenPictureError as error:
            raise BrokenPictureError(f"{image}: not a picture, or a damaged one") from error
    if isinstance(image, bytes):
        try:
            return decode(image)
        except BrokenPictureError as error:
            raise BrokenPictureError(f"{len(image)} bytes: not a picture, or a damaged one") from error
    if isinstance(image, np.ndarray):
        return _from_array(image, mode)
    if isinstance(image, Image.Image):
        try:
            return np.array(to_8_bits(image).convert(mode))
        except (OSError, ValueError, SyntaxError) as error:
            raise BrokenPictureError(f"picture of Pillow: {error}") from error
    raise TypeError(f"a picture is a path, bytes, PIL image or uint8 array, not {type(image).__name__}")


def _from_array(array: np.ndarray, mode: str) -> np.ndarray:
    channels = (1, 3, 4) if mode == "RGB" else (1,)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in channels or not array.size:
        shapes = "(H, W, 3), (H, W, 4) or (H, W)" if mode == "RGB" else "(H, W)"
        raise BrokenPictureError(f"array is {array.dtype} {array.shape}; it must be uint8 {shapes}, not empty")
    if mode == "L":
        return np.ascontiguousarray(array[..., 0])
    return np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
