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


def mask_scores(true_positives: int, false_positives: int, false_negatives: int) -> dict[str, float]:
    """Return intersection over union (`iou`) and F-score (`f_score`) of the text pixels, from counts of pixels."""
    union = true_positives + false_positives + false_negatives
    iou = true_positives / union if union else 0.0
    return {"iou": iou, "f_score": 2 * true_positives / (union + true_positives) if union else 0.0}


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Return the mean distance between confidence and accuracy over the bins of `reliability`, weighted by words."""
    words, confidence, right = reliability(confidences, correct, bins)
    return float(np.abs(confidence - right).sum() / max(words.sum(), 1))


def reliability(confidences: Sequence[float], correct: Sequence[bool], bins: int) -> np.ndarray:
    """Return words, sum of confidences and number of right words of each bin of confidence, (3, bins).

    All bins are equally wide and include their upper edge, the first one also 0.

    Args:
        confidences: probability of each prediction, in [0, 1].
        correct: whether each prediction is right.
    """
    edges = np.arange(1, bins + 1) / bins  # these compare exactly with confidences that were written as such fractions
    places = np.minimum(np.searchsorted(edges, confidences, side="left"), bins - 1)
    return np.stack([np.bincount(places, weights, bins) for weights in (None, confidences, correct)])


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
