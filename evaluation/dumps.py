"""Observers of an evaluation that write prediction files and attention images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2

from engine import distributed
from evaluation.drawing import draw_words
from evaluation.evaluator import Observer, ScoredWord
from modules.outputs import RecogniserOutput

ONE_FIELD = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # keeps a label one field of one line


@dataclass(eq=False)
class PredictionFiles:
    """Writes every `gt<TAB>prediction` to `<dataset>-<model_eval>/<model_eval>.txt`, the wrong ones to `-false.txt`.

    Words of which nothing counts in the protocol are not scored, so that they are not wrong either.
    """

    folder: Path
    model_eval: str
    normalize: Callable[[str], str]  # to what the evaluation's protocol compares of a text
    _predictions: dict[str, list[ScoredWord]] = field(default_factory=dict, init=False)

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, predictions: Sequence[ScoredWord]) -> None:
        self._predictions.setdefault(dataset, []).extend(predictions)

    def on_end(self, scores: Mapping[str, Any]) -> None:
        for dataset in scores["datasets"]:
            predictions = distributed.gather(self._predictions.get(dataset, []))
            if distributed.is_main():
                self._write(dataset, sorted(predictions, key=lambda prediction: prediction.index))
        self._predictions.clear()

    def _write(self, dataset: str, predictions: Sequence[ScoredWord]) -> None:
        folder = self.folder / f"{dataset}-{self.model_eval}"
        folder.mkdir(parents=True, exist_ok=True)
        targets = [self.normalize(each.label) for each in predictions]
        wrong = [
            each
            for each, target in zip(predictions, targets, strict=True)
            if target and self.normalize(each.text) != target
        ]
        for name, listed in ((self.model_eval, predictions), (f"{self.model_eval}-false", wrong)):
            lines = "".join(f"{each.label.translate(ONE_FIELD)}\t{each.text}\n" for each in listed)
            (folder / f"{name}.txt").write_text(lines, encoding="utf-8")


@dataclass(eq=False)
class AttentionImages(Observer):
    """Writes `<dataset>-<model_eval>/attn/<number>.jpg`: each word with its masks and the attention of each character.

    The number is that of the word in its LMDB.
    """

    folder: Path
    model_eval: str

    def on_batch(self, dataset: str, batch: Any, output: RecogniserOutput, predictions: Sequence[ScoredWord]) -> None:
        if output.vision is None:
            return
        folder = self.folder / f"{dataset}-{self.model_eval}" / "attn"
        folder.mkdir(parents=True, exist_ok=True)
        for prediction, image in zip(predictions, draw_words(batch, output, predictions), strict=True):
            cv2.imwrite(str(folder / f"{prediction.number:09d}.jpg"), image[..., ::-1])
