"""Scores of predictions, text masks and confidences: pure functions that return 0 where there is nothing to count."""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def word_accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return the fraction of words that are predicted without a mistake."""
    return _mean([prediction == target for prediction, target in zip(predictions, targets, strict=True)])


def character_accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return the fraction of the targets' characters that the prediction has at the same position (`ccr`).

    It is pooled over all characters, not averaged over words. A missing character shifts all characters after it, which
    then count as wrong; `normalized_edit_distance` counts the missing one alone.
    """
    pairs = zip(predictions, targets, strict=True)
    right = sum(a == b for prediction, target in pairs for a, b in zip(prediction, target, strict=False))
    total = sum(map(len, targets))
    return right / total if total else 0.0


def normalized_edit_distance(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return the mean over words of edit distance / length of the longer text: 0 is perfect, 1 the worst.

    The tables' `ned` is 1 minus this.
    """
    return _mean([Levenshtein.normalized_distance(*pair) for pair in zip(predictions, targets, strict=True)])


def foreground_iou(true_positives: float, false_positives: float, false_negatives: float) -> float:
    """Return the intersection over union of the text pixels, from counts of pixels."""
    union = true_positives + false_positives + false_negatives
    return true_positives / union if union else 0.0


def f_score(true_positives: float, false_positives: float, false_negatives: float) -> float:
    """Return the harmonic mean of precision and recall of the text pixels, from counts of pixels."""
    total = 2 * true_positives + false_positives + false_negatives
    return 2 * true_positives / total if total else 0.0


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Return the mean distance between confidence and accuracy over equally wide bins, weighted by their words.

    Args:
        confidences: probability of each prediction, in [0, 1].
        correct: whether each prediction is right.
        bins: number of bins.

    Raises:
        ValueError: there are not as many confidences as predictions.
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if confidence.shape != right.shape:
        raise ValueError(f"{confidence.size} confidences for {right.size} words")
    if not confidence.size:
        return 0.0
    gaps = np.bincount(confidence_bins(confidence, bins), weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / confidence.size)


def confidence_bins(confidences: Sequence[float] | np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each confidence; all bins are equally wide and include their upper edge, the first one also 0.

    Edges as i / bins compare exactly with confidences that were written as such fractions.
    """
    edges = np.arange(1, bins + 1) / bins
    return np.minimum(np.searchsorted(edges, confidences, side="left"), bins - 1)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
