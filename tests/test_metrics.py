"""Metrics on cases whose answers can be counted by hand."""

import pytest

from evaluation.metrics import (
    character_accuracy,
    expected_calibration_error,
    mask_scores,
    normalized_edit_distance,
    word_accuracy,
)

# Each with its value where everything is right, and where everything is wrong.
TEXT_METRICS = [(word_accuracy, 1.0, 0.0), (character_accuracy, 1.0, 0.0), (normalized_edit_distance, 0.0, 1.0)]


@pytest.mark.parametrize(("metric", "best", "worst"), TEXT_METRICS)
def test_bounds_and_empty_input(metric, best, worst):
    assert metric([], []) == 0.0
    assert metric(["a", "bc"], ["a", "bc"]) == best
    assert metric(["x", "y"], ["a", "bc"]) == worst
    with pytest.raises(ValueError, match="is longer than"):
        metric(["a"], ["a", "b"])


@pytest.mark.parametrize("metric", [metric for metric, *_ in TEXT_METRICS])
def test_order_of_words_does_not_matter(metric):
    predictions, targets = ["cat", "dgo", "", "bird"], ["cat", "dog", "a", "birds"]
    assert metric(predictions[::-1], targets[::-1]) == pytest.approx(metric(predictions, targets))


def test_word_accuracy():
    assert word_accuracy(["cat", "Cat", "ca", "cats"], ["cat"] * 4) == 0.25


def test_character_accuracy_counts_positions_over_all_targets():
    # 3 of 3, 0 of 3 (shifted by one), 1 of 1 (what is too much does not count)
    assert character_accuracy(["cat", "og", "ab"], ["cat", "dog", "a"]) == 4 / 7
    assert character_accuracy([""], [""]) == 0.0


def test_normalized_edit_distance():
    assert normalized_edit_distance(["og", "cat", ""], ["dog", "cut", "ab"]) == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert normalized_edit_distance(["abcd"], ["ab"]) == 0.5  # over the longer of the two
    assert normalized_edit_distance([""], [""]) == 0.0


def test_segmentation_scores():
    assert mask_scores(6, 2, 4) == {"iou": 0.5, "f_score": 2 / 3}
    assert mask_scores(0, 0, 0) == mask_scores(0, 2, 0) == {"iou": 0.0, "f_score": 0.0}


def test_expected_calibration_error():
    assert expected_calibration_error([], []) == 0.0
    assert expected_calibration_error([1.0, 1.0], [True, False]) == 0.5
    assert expected_calibration_error([0.75] * 4, [True, True, True, False], bins=10) == 0.0
    # bins (0, 0.5] and (0.5, 1]: |0.2 + 0.5 - 1| and |0.9 - 0|, over three words
    assert expected_calibration_error([0.2, 0.5, 0.9], [True, False, False], bins=2) == pytest.approx(1.2 / 3)
    assert expected_calibration_error([0.0], [False]) == 0.0
    with pytest.raises(ValueError, match="length"):
        expected_calibration_error([0.1], [True, False])
