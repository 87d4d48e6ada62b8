"""Evaluation: run a network on test sets, decode its outputs and score them, for training, test and the reader.

An evaluator gives the mapping that `metrics.json` holds: one entry per data set, their mean weighted by words, their
plain mean. Words are sharded over the processes and every word counts once: batch size, workers and processes change no
score.
"""

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine import distributed
from engine.precision import autocast
from evaluation import metrics
from evaluation.lexicon import Lexicon, log_probabilities
from evaluation.tables import csv_text, markdown_table
from inference.pipeline import in_order, single_threads
from inference.prediction import predict_words
from inference.prepare import PreparedNetwork, PreparedSSN
from inference.segmenter import Segmenter
from loading.batches import IGNORED, Batch, split_skipped
from loading.charset import Charset
from loading.decoding import TEXT_THRESHOLD
from modules.outputs import RecogniserOutput, chosen_logits, decode_greedily
from utils import UserError, write_atomically

logger = logging.getLogger(__name__)

EMPTY_IN_PROTOCOL = "empty_in_protocol"  # nothing of the label counts in the protocol: there is nothing to read
# Sums of floats differ in their last digits between batch sizes; the calibration error is kept to digits that do not.
ECE_DIGITS = 5


@dataclass(frozen=True)
class ScoredWord:
    """One word with its label and prediction."""

    index: int  # position in its data set: sample `index` of the LMDB's filtered list
    label: str  # as stored
    text: str
    confidence: float  # product of the probabilities of its characters and of the end token, in [0, 1]
    number: int = 0  # of its entry in the LMDB, which counts from 1, those that the filter leaves out as well


class Observer(Protocol):
    """Receives every evaluated batch: prediction files, attention images, a report; the methods here do nothing."""

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, predictions: Sequence[ScoredWord]) -> None:
        """Receive one batch of one data set."""

    def on_end(self, scores: Mapping[str, Any]) -> None:
        """Receive the scores after the last data set."""


def read_logits(logits: Tensor, charset: Charset) -> tuple[list[str], list[float]]:
    """Decode logits (N, T, C) greedily: texts up to the first end token, and their confidences, 0 where they are NaN.

    Everything is computed on the device; the host gets two small tensors for the whole batch.
    """
    ids, confidences = decode_greedily(logits)
    return [charset.decode(row) for row in ids.tolist()], confidences.tolist()


def score_words(predictions: Sequence[ScoredWord], normalize: Callable[[str], str]) -> dict[str, float]:
    """Return word accuracy, character accuracy, 1 - normalised edit distance and calibration error of predictions.

    Args:
        normalize: what the protocol compares of a text (36: case and punctuation do not count).
    """
    texts = [normalize(each.text) for each in predictions]
    targets = [normalize(each.label) for each in predictions]
    correct = [text == target for text, target in zip(texts, targets, strict=True)]
    error = metrics.expected_calibration_error([each.confidence for each in predictions], correct)
    return {
        "accuracy": metrics.word_accuracy(texts, targets),
        "ccr": metrics.character_accuracy(texts, targets),
        "ned": 1 - metrics.normalized_edit_distance(texts, targets) if texts else 0.0,
        "ece": round(error, ECE_DIGITS),
    }


@dataclass
class WordEvaluator:
    """Scores a recogniser, or one of its stages, on sets of words; mappings are by the name of a set."""

    loaders: Mapping[str, DataLoader]  # this process's share of the batches
    filtered: Mapping[str, Mapping[str, int]]  # reason -> words that are not read at all
    charset: Charset
    protocol: Charset  # the characters that are compared
    model_eval: str
    device: torch.device
    precision: str = "fp32"  # or bf16, fp16 (autocast)
    numbers: Mapping[str, Callable[[int], int]] = field(default_factory=dict)  # of an index in the LMDB; else from 1
    lexicons: Mapping[str, Callable[[int], Lexicon]] = field(default_factory=dict)  # number -> list to choose from
    tta_below: float = 0.0  # confidence below which test-time augmentation is used; 0: never
    headline: ClassVar[str] = "accuracy"  # decides which weights are best

    def measure(self) -> list[Any]:
        """Return what the scores depend on besides the network, as plain values: only equal ones can be compared."""
        return [_sizes(self.loaders), self.model_eval, sorted(self.protocol.characters), bool(self.lexicons)]

    def evaluate(self, model: nn.Module, observers: Sequence[Observer] = ()) -> dict[str, Any]:
        """Read every word; a word that cannot be read or scored is counted in `skipped` under its reason.

        Raises:
            UserError: nothing of any label of a set counts in the protocol, so that every network would score 0.
        """
        normalize = self.protocol.normalize
        was_training = model.training
        model.eval()
        datasets = {}
        for name, loader in self.loaders.items():
            predictions, unreadable = self._read(model, name, loader, observers)
            scored = [word for word in predictions if normalize(word.label)]
            if predictions and not scored:
                raise UserError(
                    f"{name}: none of its {len(predictions)} words has one of the {len(self.protocol)} characters that "
                    "are compared; leave the set out, or set dataset.eval_protocol to 94, or to null with a "
                    "dataset.charset_path that holds its characters"
                )
            empty = Counter({EMPTY_IN_PROTOCOL: len(predictions) - len(scored)})
            skipped = dict(Counter(self.filtered[name]) + unreadable + empty)
            datasets[name] = {"samples": len(scored), "skipped": skipped, **score_words(scored, normalize)}
        model.train(was_training)
        protocol = {"protocol": len(self.protocol), "characters": self.protocol.characters}
        scores = {"model_eval": self.model_eval, **protocol, **with_means(datasets)}
        for observer in observers:
            observer.on_end(scores)
        return scores

    def _read(
        self, model: nn.Module, name: str, loader: DataLoader, observers: Sequence[Observer]
    ) -> tuple[list[ScoredWord], Counter]:
        """Return the predictions of one data set in the order of its samples, and counts of what could not be read."""
        predictions: list[ScoredWord] = []
        unreadable: Counter = Counter()

        def filled() -> Iterator[Any]:
            for batch in loader:
                unreadable.update(batch.skipped.values())
                if len(batch):
                    yield batch

        # The fast form on a CPU reads batches side by side while others are loaded and observed.
        threads = torch.get_num_threads()
        side_by_side = self.device.type == "cpu" and isinstance(model, PreparedNetwork) and not model.frozen
        pool = single_threads(threads) if side_by_side else None
        read_batch = functools.partial(self._read_batch, model, name)
        for batch, output, read in in_order(read_batch, filled(), pool, ahead=threads):
            predictions += read
            for observer in observers:
                observer.on_batch(name, batch, output, read)
        predictions = sorted(distributed.gather(predictions), key=lambda prediction: prediction.index)
        return predictions, sum(distributed.gather([unreadable]), Counter())

    @torch.inference_mode()
    def _read_batch(self, model: nn.Module, name: str, batch: Any) -> tuple[Any, RecogniserOutput, list[ScoredWord]]:
        """Return the batch on the device, the network's output and the scored words; one view of each word."""
        batch = batch.to(self.device)
        owners = batch.owners.tolist() if isinstance(batch, Batch) and batch.owners is not None else None
        with autocast(self.device, self.precision):
            output, rows = predict_words(
                model, *batch.inputs(), model_eval=self.model_eval, owners=owners, tta_below=self.tta_below
            )
        batch = batch if owners is None else batch.with_images(rows)
        texts, confidences = read_logits(chosen_logits(output, self.model_eval), self.charset)
        indices = batch.indices.tolist()
        numbers = [*map(self.numbers.get(name, lambda index: index + 1), indices)]
        if name in self.lexicons:
            logs = log_probabilities(chosen_logits(output, self.model_eval))
            rows = zip(numbers, logs, texts, strict=True)
            words = [self.lexicons[name](number)(log, text) for number, log, text in rows]
            texts, confidences = [word.text for word in words], [word.confidence for word in words]
        rows = zip(indices, batch.texts, texts, confidences, numbers, strict=True)
        return batch, output, [ScoredWord(*row) for row in rows]


@dataclass
class SegmentationEvaluator:
    """Scores a segmentation network: foreground IoU and F-score over all pixels of a data set.

    What is scored are the masks that `Segmenter` makes of the network, as recognisers are given them. The loaders give
    lists of samples, whose images may have any sizes.
    """

    loaders: Mapping[str, DataLoader]
    filtered: Mapping[str, Mapping[str, int]]
    areas: Sequence[int]
    device: torch.device
    headline: ClassVar[str] = "iou"

    def measure(self) -> list[Any]:
        """Return what the scores depend on besides the network, as plain values: only equal ones can be compared."""
        return [_sizes(self.loaders), list(self.areas)]

    def evaluate(self, model: nn.Module, observers: Sequence[Observer] = ()) -> dict[str, Any]:
        """Segment every image at its own size and compare with its labels."""
        ssn = model.network if isinstance(model, PreparedSSN) else model
        segmenter = Segmenter(ssn, self.areas, device=self.device)
        datasets = {}
        for name, loader in self.loaders.items():
            shares = distributed.gather([self._count(segmenter, loader)])
            counts, samples, skipped = (sum(each[1:], each[0]) for each in zip(*shares, strict=True))
            skipped = dict(Counter(self.filtered[name]) + skipped)
            datasets[name] = {"samples": samples, "skipped": skipped, **metrics.mask_scores(*counts.tolist())}
        return {"model_eval": "ssn", **with_means(datasets)}

    def _count(self, segmenter: Segmenter, loader: DataLoader) -> tuple[np.ndarray, int, Counter]:
        """Return true positives, false positives and false negatives; images; counts of what could not be read."""
        counts = np.zeros(3, np.int64)
        samples, unreadable = 0, Counter()
        for batch in loader:
            read, skipped = split_skipped(batch)
            unreadable.update(skipped.values())
            masks = segmenter([sample.image for sample in read])
            for mask, sample in zip(masks, read, strict=True):
                counted = sample.labels != IGNORED
                text, predicted = (sample.labels == 1)[counted], (mask >= TEXT_THRESHOLD)[counted]
                counts += [(text & predicted).sum(), (~text & predicted).sum(), (text & ~predicted).sum()]
            samples += len(read)
        return counts, samples, unreadable


Evaluator = WordEvaluator | SegmentationEvaluator


def _sizes(loaders: Mapping[str, DataLoader]) -> dict[str, int]:
    return {name: len(loader.dataset) for name, loader in loaders.items()}


def with_means(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the data sets' scores with their mean weighted by samples and their plain mean, without empty sets."""
    read = [entry for entry in datasets.values() if entry["samples"]]
    names = [name for name in next(iter(datasets.values()), {}) if name not in ("samples", "skipped")]
    total = sum(entry["samples"] for entry in read)
    weighted = {name: sum(e[name] * e["samples"] for e in read) / max(total, 1) for name in names}
    mean = {name: sum(e[name] for e in read) / max(len(read), 1) for name in names}
    return {"datasets": dict(datasets), "weighted": {"samples": total, **weighted}, "mean": mean}


def score_rows(scores: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield name, samples, skipped and scores of each data set, of `weighted` and of `mean`; "" where there is none."""
    means = [(name, scores[name]) for name in ("weighted", "mean")]
    for name, entry in [*scores["datasets"].items(), *means]:
        skipped = sum(entry["skipped"].values()) if "skipped" in entry else ""
        yield [name, entry.get("samples", ""), skipped, *(entry[metric] for metric in scores["mean"])]


def score_table(scores: Mapping[str, Any]) -> str:
    """Format scores as a Markdown table, in per cent: one row per data set, then weighted and mean."""
    rows = [["data set", "samples", "skipped", *(f"{metric} %" for metric in scores["mean"])]]
    for name, samples, skipped, *values in score_rows(scores):
        rows.append([name, samples, skipped, *(f"{100 * value:.2f}" for value in values)])
    return markdown_table(rows)


def write_scores(folder: Path, scores: Mapping[str, Any], *, name: str = "metrics") -> None:
    """Write `<name>.json`, and its rows as `<name>.md`, in per cent, and `<name>.csv`, fractions in full."""
    contents = {
        "json": json.dumps(scores, indent=2, ensure_ascii=False) + "\n",
        "md": score_table(scores) + "\n",
        "csv": csv_text([["dataset", "samples", "skipped", *scores["mean"]], *score_rows(scores)]),
    }
    for suffix, content in contents.items():
        write_atomically(folder / f"{name}.{suffix}", content)
