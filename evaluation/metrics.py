"""Scores of predictions, text masks and confidences: pure functions, 0 where there is nothing to count."""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def word_accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Fraction of words read without a mistake."""
    return _mean([prediction == target for prediction, target in _pairs(predictions, targets)])


def character_accuracy(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Fraction of the targets' characters that the prediction has at the same position (`ccr`).

    Pooled over all characters, not averaged over words. A missing character shifts all that follow, as the field counts
    it; `normalized_edit_distance` does not punish that.
    """
    pairs = _pairs(predictions, targets)
    right = sum(read == true for prediction, target in pairs for read, true in zip(prediction, target, strict=False))
    total = sum(len(target) for _, target in pairs)
    return right / total if total else 0.0


def normalized_edit_distance(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Mean over words of 1 - edit distance / length of the longer text (`ned`): 1 is perfect; two empty texts are."""
    return _mean(
        [Levenshtein.normalized_similarity(prediction, target) for prediction, target in _pairs(predictions, targets)]
    )


def foreground_iou(true_positives: float, false_positives: float, false_negatives: float) -> float:
    """Intersection over union of the text pixels, from counts of pixels."""
    union = true_positives + false_positives + false_negatives
    return true_positives / union if union else 0.0


def f_score(true_positives: float, false_positives: float, false_negatives: float) -> float:
    """Harmonic mean of precision and recall of the text pixels, from counts of pixels."""
    total = 2 * true_positives + false_positives + false_negatives
    return 2 * true_positives / total if total else 0.0


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over equally wide bins of confidence, weighted by their words.

    Args:
        confidences: probability of each prediction, in [0, 1]. A bin holds its upper edge; the first also holds 0.
        correct: whether each prediction is right.
        bins: number of bins.
    """
    confidence = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if confidence.shape != right.shape:
        raise ValueError(f"{confidence.size} confidences for {right.size} words")
    if not confidence.size:
        return 0.0
    # Edges as i / bins compare exactly with confidences that were written as such fractions.
    edges = np.arange(1, bins + 1) / bins
    index = np.minimum(np.searchsorted(edges, confidence, side="left"), bins - 1)
    gaps = np.bincount(index, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / confidence.size)


def _pairs(predictions: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return list(zip(predictions, targets, strict=True))


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
