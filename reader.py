"""Read words in a few lines of Python.

    from reader import Reader

    reader = Reader.from_checkpoint("weights.pth")
    for prediction in reader.read(["a.png", pil_image, array]):
        print(prediction.text, prediction.confidence)

`main.py --phase test` uses the same transforms, views and masks, in float32: `Reader(precision="fp32")` gives its
predictions.
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
from engine.distributed import pick_device
from engine.precision import PRECISIONS, fastest_precision, use_tf32
from evaluation.evaluator import read_logits
from evaluation.lexicon import Candidate, Lexicon, log_probabilities, most_probable
from inference.pipeline import in_order, single_threads
from inference.prediction import predict_words
from inference.prepare import prepare_for_inference
from inference.segmenter import IMAGE_PIXELS, Segmenter
from loading.batches import normalize_images, stack_images
from loading.decoding import IMAGE_ERRORS, MAX_PIXELS, BrokenImageError, convert, decode_image, decode_mask
from loading.transforms import ResizeWord, views
from modules.outputs import chosen_logits
from utils import UserError, first_line

DEFAULT_CHECKPOINT = Path(__file__).resolve().parent / "weights" / "binet-small.pth"
MASK_SOURCES = ("auto", "none")

CHANNELS = (1, 3, 4)  # of an array: grey, RGB, RGBA
FLOAT_TOLERANCE = 1e-3  # of floats that should lie in [0, 1], for arithmetic that rounds
GPU_THREADS = 2  # one prepares a batch while the other waits for the network

Source = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Character:
    """One character of a prediction and the probability that the network gives it."""

    text: str
    confidence: float


@dataclass(frozen=True)
class Prediction:
    """The result for one image. Compared, and hashed, by all but its arrays.

    Attributes:
        text: the word; empty where there is an `error`.
        confidence: product of the probabilities of its characters and of its end, in [0, 1].
        characters: each character with its own confidence.
        candidates: with `topk`, the most probable words, best first, each with its probability; the first need not be
            `text`, which has the most probable character at each step.
        steps: with `topk`, the most probable characters of each step of `text` and of its end, best first; "" is the
            end.
        match: with `lexicon`, the word of the list that the network most probably read, and its share of the
            probability of all words of the list.
        mask_levels: with `details`, the mask that the network was given, uint8 (H, W) of the image's size, 255 = text;
            None for a network without masks.
        attention: with `details`, float32 (len(text), h, w) over the network's input, where the vision model looked for
            each character; each sums to 1.
        refined_mask: with `details`, float32 over the network's input, at its size, about 1 on text; None for a network
            without masks.
        extent: where the image lies in the network's input: top, left, height, width as parts of the input's sides;
            (0, 0, 1, 1) where it was stretched, else less (`dataset.multiscales`, `dataset.align_left`).
        turned: degrees counterclockwise, 0, 90 or 270, by which the image was turned before it went into the network's
            input (`dataset.turn_tall`); attention, refined mask and extent are of the turned image.
        error: why the image could not be read, else None.
    """

    text: str
    confidence: float
    characters: tuple[Character, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    steps: tuple[tuple[Character, ...], ...] = ()
    match: Candidate | None = None
    mask_levels: np.ndarray | None = field(default=None, compare=False, repr=False)
    attention: np.ndarray | None = field(default=None, compare=False, repr=False)
    refined_mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    extent: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    turned: int = 0
    error: str | None = None

    @property
    def mask(self) -> np.ndarray | None:
        """Return `mask_levels` as float32 (H, W) in [0, 1], 1 = text; made anew at each call."""
        return None if self.mask_levels is None else self.mask_levels.astype(np.float32) / 255


Decoded = tuple[np.ndarray, np.ndarray | None] | Prediction  # image and given mask, or why there is none


class Reader:
    """Reads words with one network. One reader may be used by many threads at once.

    Making one decides for the whole program whether a GPU may round float32 to TF32: as `training.tf32` of the
    checkpoint's config says, by default not.

    Args:
        checkpoint: file of weights with config and characters; None takes `weights/binet-small.pth`.
        device: where the network runs; None takes a GPU where there is one.
        config: how to build the network of a checkpoint that carries no config: a Config, or its YAML.
        ssn: file of the SSN that makes masks; None takes the one that the checkpoint carries.
        masks: "auto" makes masks for a network that needs them; "none" gives it empty ones.
        batch_size: most images that are read together; large ones are read in smaller batches.
        model_eval: sub-model to read with, alignment, vision or language; None takes the last one that it has.
        precision: of the networks: "fp32", "bf16", "fp16", or "auto", 16 bits where the device multiplies them
            natively, else "fp32". Masks are made in bf16 or float32; those of training and test are float32.
        compile: let torch.compile fuse the network; the reader then takes minutes to make.
        tta_below: confidence below which a word is predicted again from variants of its image
            (`inference.prediction`), from 0, never, to 1. None: `dataset.tta_below` of the checkpoint's config.
        details: keep what shows how a word was read: mask, attention and refined mask of each prediction.

    Raises:
        UserError: the checkpoint is missing or damaged, the network needs masks and there is no SSN, or an option
            has an unknown value.
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
        precision: str = "auto",
        compile: bool = False,
        tta_below: float | None = None,
        details: bool = False,
    ) -> None:
        if precision not in ("auto", *PRECISIONS):
            raise UserError(f"precision {precision!r} is unknown; give auto, {', '.join(PRECISIONS)}")
        if masks not in MASK_SOURCES:
            raise UserError(f"masks {masks!r} is unknown; give {' or '.join(MASK_SOURCES)}")
        if tta_below is not None and not (isinstance(tta_below, int | float) and 0 <= tta_below <= 1):
            raise UserError(f"tta_below {tta_below!r} must be a number from 0 to 1")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size {batch_size!r} must be a positive integer")
        self.checkpoint = DEFAULT_CHECKPOINT if checkpoint is None else Path(checkpoint)
        if checkpoint is None and not DEFAULT_CHECKPOINT.is_file():
            raise UserError(f"no checkpoint is named and {DEFAULT_CHECKPOINT} does not exist; give --checkpoint FILE")
        config = load_config(config) if isinstance(config, str | os.PathLike) else config
        bundle = load_bundle(self.checkpoint, config)
        self.device = pick_device(name=device)
        self.charset = bundle.charset
        self.takes_masks = bundle.config.model.takes_masks
        self.batch_size = batch_size
        self.model_eval = checked_model_eval(bundle.config, model_eval)
        self.precision = fastest_precision(self.device) if precision == "auto" else precision
        self.tta_below = bundle.config.dataset.tta_below if tta_below is None else tta_below
        self.details = details
        use_tf32(bundle.config.training.tf32)  # as in the test
        self._model = prepare_for_inference(bundle.model.to(self.device), precision=self.precision, compile=compile)
        self._steps = bundle.config.dataset.max_length + 1
        self._resize = ResizeWord(size=bundle.config.dataset.image_size, fit=bundle.config.dataset.fit)
        self._turn_tall = bundle.config.dataset.turn_tall
        self._segmenter = self._make_segmenter(bundle, ssn) if self.takes_masks and masks == "auto" else None
        self._always_on_one_thread = compile  # a compiled network is made for one number of threads
        if compile:
            self.read([np.zeros((*self._resize.size, 3), np.uint8)] * 2)  # before two threads compile at once

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: torch.device | str | None = None, **options: object
    ) -> "Reader":
        """Load a reader from one file of weights; the options are those of the class."""
        return cls(path, device=device, **options)

    def read(
        self,
        images: Sequence[Source],
        masks: Sequence[Source | None] | None = None,
        *,
        topk: int = 0,
        lexicon: Sequence[str] | None = None,
    ) -> list[Prediction]:
        """Read images of one word each.

        Args:
            images: paths, encoded bytes, PIL images, or arrays and tensors of uint8 levels, of floats in [0, 1] or of
                booleans: RGB (H, W, 3), RGBA (H, W, 4) or grey (H, W), (H, W, 1), tensors also with the channels first;
                or N such images as one array or tensor of four dimensions. Files and PIL images are turned as their
                EXIF orientation says, and what is transparent is white.
            masks: text masks of the images, of their sizes, 255 (1.0, True) = text, in the same forms; None, as a whole
                or for an image, lets SSN make them.
            topk: how many words, and characters at each step, a prediction gives (`candidates`, `steps`).
            lexicon: words of which a prediction gives the most probable one (`match`), as `lexicon.Lexicon` chooses.

        Returns:
            One prediction for each image, in order; of an image that cannot be read, with its `error`.

        Raises:
            TypeError, ValueError: an image is none of these, or `images` is a single one.
            UserError: `topk` is not an integer from 0 up, or the network can spell no word of `lexicon`.
        """
        return list(self.stream(images, masks, topk=topk, lexicon=lexicon))

    def stream(
        self,
        images: Sequence[Source],
        masks: Sequence[Source | None] | None = None,
        *,
        topk: int = 0,
        lexicon: Sequence[str] | None = None,
    ) -> Iterator[Prediction]:
        """Do as `read`, but work only a few batches ahead of what is asked for: any number of images fits into memory.

        Images are decoded while batches before them are read; on a CPU as many batches as it has threads are read side
        by side.
        """
        single = isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 4) != 4
        if single or not hasattr(images, "__len__"):
            raise TypeError(
                "images must be a list of images, or an array (N, H, W, 3) or (N, H, W, 1); put a single one into a "
                'list, and name the files of a folder: sorted(Path("FOLDER").iterdir())'
            )
        masks = [None] * len(images) if masks is None else masks
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} images")
        if not isinstance(topk, int) or topk < 0:
            raise UserError(f"topk {topk!r} must be 0 or a positive integer")
        if isinstance(lexicon, str):
            raise TypeError("lexicon must be a list of words")
        chosen = None if lexicon is None else Lexicon(lexicon, self.charset, steps=self._steps)
        return self._stream(images, masks, functools.partial(self._read_batch, topk=topk, lexicon=chosen))

    def _stream(
        self,
        images: Sequence[Source],
        masks: Sequence[Source | None],
        read: Callable[[Sequence[Decoded]], list[Prediction]],
    ) -> Iterator[Prediction]:
        threads = torch.get_num_threads() if self.device.type == "cpu" else GPU_THREADS
        rounds = -(-len(images) // (self.batch_size * threads))
        size = -(-len(images) // max(rounds * threads, 1))  # so that all threads have as much to do
        pool = None if len(images) < 2 and not self._always_on_one_thread else single_threads(threads)
        for predictions in in_order(read, self._decoded(images, masks, size), pool, ahead=threads):
            yield from predictions

    def _decoded(self, images: Sequence[Source], masks: Sequence[Source | None], size: int) -> Iterator[list[Decoded]]:
        """Yield batches of at most `size` images with their given masks."""
        batch: list[Decoded] = []
        pixels = 0
        for source, mask_source in zip(images, masks, strict=True):
            try:
                image = to_image(source)
                unread = mask_source is None or not self.takes_masks
                batch.append((image, None if unread else to_mask(mask_source, image)))
                pixels += image.shape[0] * image.shape[1]
            except BrokenImageError as error:
                batch.append(Prediction("", 0.0, error=" ".join(str(error).splitlines())))
            if len(batch) >= size or pixels >= IMAGE_PIXELS:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch

    def _read_batch(self, batch: Sequence[Decoded], *, topk: int, lexicon: Lexicon | None) -> list[Prediction]:
        """Return predictions for images with their given masks; a prediction of an image that cannot be read stays."""
        images = [each for each in batch if not isinstance(each, Prediction)]
        read = iter(self._read_images(*zip(*images, strict=True), topk=topk, lexicon=lexicon) if images else ())
        return [each if isinstance(each, Prediction) else next(read) for each in batch]

    @torch.inference_mode()
    def _read_images(
        self, images: Sequence[np.ndarray], given: Sequence[np.ndarray | None], *, topk: int, lexicon: Lexicon | None
    ) -> list[Prediction]:
        masks = self._complete(images, given) if self.takes_masks else [None] * len(images)
        pairs = enumerate(zip(images, masks, strict=True))
        seen = [(word, view) for word, pair in pairs for view in views(*pair, turn_tall=self._turn_tall)]
        sized = [self._resize(view.image, view.mask, None) for _, view in seen]
        tensors = normalize_images(stack_images([image for image, _ in sized]).to(self.device))  # (M, 3, H, W)
        inputs = None
        if self.takes_masks:
            inputs = torch.from_numpy(np.stack([mask for _, mask in sized])).unsqueeze(1).to(self.device) / 255.0
        owners = None if len(seen) == len(images) else [word for word, _ in seen]
        output, rows = predict_words(
            self._model, tensors, inputs, model_eval=self.model_eval, owners=owners, tta_below=self.tta_below
        )
        logits = chosen_logits(output, self.model_eval).float()  # (N, T, C)
        texts, confidences = read_logits(logits, self.charset)
        probabilities = logits.softmax(-1).amax(-1).nan_to_num(0.0)
        logs = log_probabilities(logits) if topk or lexicon else [None] * len(rows)
        mask_levels = attention = refined = [None] * len(rows)
        if self.details:
            mask_levels, attention = masks, output.vision.attention.float().cpu().numpy()
            if output.vision.refined_mask is not None:
                refined = output.vision.refined_mask[:, 0].float().cpu().numpy()
        read = zip(texts, confidences, probabilities.tolist(), logs, rows, mask_levels, attention, refined, strict=True)
        return [
            Prediction(
                text=text,
                confidence=confidence,
                characters=tuple(map(Character, text, each)),
                candidates=tuple(most_probable(log, self.charset, topk)) if topk else (),
                steps=self._ranked(log[: len(text) + 1], topk) if topk else (),
                match=lexicon(log, text) if lexicon else None,
                extent=self._extent(seen[row][1].image),
                turned=seen[row][1].turned,
                mask_levels=levels,
                attention=None if weights is None else weights[: len(text)],
                refined_mask=refined_mask,
            )
            for text, confidence, each, log, row, levels, weights, refined_mask in read
        ]

    def _ranked(self, logs: np.ndarray, count: int) -> tuple[tuple[Character, ...], ...]:
        """Return the most probable characters of each step of log-probabilities (steps, C)."""
        names = ("", *self.charset.characters)
        ranked = np.argsort(-logs, axis=1, kind="stable")[:, :count].tolist()
        return tuple(
            tuple(Character(names[each], float(np.exp(step[each]))) for each in order)
            for step, order in zip(logs, ranked, strict=True)
        )

    def _extent(self, image: np.ndarray) -> tuple[float, float, float, float]:
        """Return top, left, height and width of an image in the network's input, as parts of its sides."""
        size = self._resize.fitted(image.shape[:2])
        height, width = self._resize.size
        top, left = self._resize.corner(size)
        return top / height, left / width, size[0] / height, size[1] / width

    def _complete(self, images: Sequence[np.ndarray], given: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return a mask, uint8 (H, W), for each image: the given one, else SSN's, else an empty one."""
        missing = [image for image, mask in zip(images, given, strict=True) if mask is None]
        empty = (np.zeros(image.shape[:2], np.uint8) for image in missing)
        made = empty if self._segmenter is None else iter(self._segmenter(missing))
        return [next(made) if mask is None else mask for mask in given]

    def _make_segmenter(self, bundle: Bundle, ssn: str | os.PathLike | None) -> Segmenter:
        network, areas = load_ssn(ssn) if ssn is not None else (bundle.ssn, bundle.areas)
        if network is None:
            raise UserError(
                f"checkpoint {self.checkpoint} reads with text masks and carries no SSN to make them: name one "
                "(--ssn FILE), bundle one with tools/bundle_weights.py, or do without (--masks none)"
            )
        return Segmenter(network, areas, device=self.device, precision="bf16" if self.precision == "bf16" else "fp32")


def to_image(source: Source) -> np.ndarray:
    """Convert any form of image that a reader takes to RGB, uint8, (H, W, 3).

    Raises:
        BrokenImageError: it cannot be decoded, or is empty; the message says why.
        TypeError, ValueError: it is of another type, shape or range.
    """
    return _decoded(source, decode_image, "RGB")


def to_mask(mask: Source, image: np.ndarray) -> np.ndarray:
    """Convert a mask to grey, uint8, (H, W); raises as `to_image`, or BrokenImageError for another size."""
    decoded = _decoded(mask, decode_mask, "L")
    if decoded.shape != image.shape[:2]:
        height, width = image.shape[:2]
        raise BrokenImageError(
            f"the mask is {decoded.shape[1]} x {decoded.shape[0]} pixels and its image {width} x {height}"
        )
    return decoded


def _decoded(image: Source, decode: Callable[..., np.ndarray], mode: str) -> np.ndarray:
    if isinstance(image, Image.Image):
        return _from_pillow(image, mode)
    if isinstance(image, Tensor):
        image = _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, mode)
    if not isinstance(image, str | os.PathLike | bytes):
        raise TypeError(f"an image is a path, bytes, PIL image, array or tensor, not {type(image).__name__}")
    name = f"{len(image)} bytes" if isinstance(image, bytes) else Path(image)
    try:
        if isinstance(name, Path) and not name.is_file():
            raise BrokenImageError("a folder; name its files" if name.is_dir() else "no such file")
        return decode(image if isinstance(image, bytes) else name.read_bytes(), oriented=True)
    except OSError as error:
        raise BrokenImageError(f"{name}: cannot be read ({error.strerror})") from error
    except BrokenImageError as error:
        raise BrokenImageError(f"{name}: {error}") from error


def _from_pillow(image: Image.Image, mode: str) -> np.ndarray:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BrokenImageError(f"PIL image of {width} x {height} pixels; there must be 1 to {MAX_PIXELS}")
    try:
        return np.array(convert(ImageOps.exif_transpose(image), mode))
    except IMAGE_ERRORS as error:
        raise BrokenImageError(f"PIL image: {first_line(error)}") from error


def _from_tensor(tensor: Tensor) -> np.ndarray:
    """Convert a tensor, whose channels may come first, to an array."""
    tensor = tensor.detach().cpu()
    if tensor.ndim == 3 and tensor.shape[0] in CHANNELS:
        tensor = tensor.permute(1, 2, 0)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _from_array(array: np.ndarray, mode: str) -> np.ndarray:
    shape = array.shape
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (mode == "L" or array.ndim != 3 or array.shape[2] not in CHANNELS):
        shapes = "(H, W, 3), (H, W, 4) or (H, W)" if mode == "RGB" else "(H, W)"
        raise ValueError(f"array is {shape}; it must be {shapes}, with the channels last")
    if not array.size:
        raise BrokenImageError(f"array is {shape}: empty")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
            raise ValueError(f"array of floats from {low} to {high}; they must lie in [0, 1], or be uint8 levels")
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"array is {array.dtype}; it must hold uint8 levels, floats in [0, 1] or booleans")
    return np.array(convert(Image.fromarray(np.ascontiguousarray(array)), mode))
