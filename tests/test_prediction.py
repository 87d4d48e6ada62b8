"""Predictions from views and variants: which words get them, what is kept, and where its maps lie in the image."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from inference.prediction import VARIANTS, _map_back, most_confident, predict_words, transformed
from modules.outputs import RecogniserOutput, VisionOutput
from tests.reference import small_recogniser

SIZE = (32, 128)


class PrefersBlack(nn.Module):
    """Is the more confident of its one step the darker the image is; remembers the images that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        self.images.append(image)
        surely = 2 - 4 * image.mean((1, 2, 3))
        logits = torch.stack((-surely, surely), dim=1)[:, None]
        feature = torch.arange(len(image)).float()[:, None, None]
        attention = torch.nn.functional.adaptive_avg_pool2d(image[:, :1], (8, 32))
        return RecogniserOutput(vision=VisionOutput(logits=logits, feature=feature, attention=attention))


def grey_box_and_black() -> Tensor:
    """Images that look the same in every variant, darker when squeezed, and as dark as can be."""
    images = torch.zeros(3, 3, *SIZE)
    images[0] = 0.3
    images[1, :, 8:24, 32:96] = 1.0
    return images


def predicted(model: nn.Module, *inputs: Tensor | None, **options: object) -> RecogniserOutput:
    return predict_words(model, *inputs, **options)[0]


def test_words_are_predicted_once_without_a_threshold():
    model = PrefersBlack()
    predict_words(model, grey_box_and_black(), None, model_eval="vision")
    assert len(model.images) == 1


def test_only_unsure_words_are_predicted_again_and_only_more_confident_predictions_are_kept():
    images, model = grey_box_and_black(), PrefersBlack()
    once = model(images).vision
    more = predicted(model, images, None, model_eval="vision", tta_below=0.97).vision
    assert [len(each) for each in model.images] == [3, 3] + [2] * len(VARIANTS)  # the third was sure at once
    for leaf in ("logits", "feature", "attention"):
        assert torch.equal(getattr(more, leaf)[[0, 2]], getattr(once, leaf)[[0, 2]])
    before, after = (each.logits[1].softmax(-1).max() for each in (once, more))
    assert before < 0.9 < after
    assert not torch.equal(more.attention[1], once.attention[1])


def test_a_tall_word_is_predicted_again_from_its_most_confident_view_alone():
    images, model = grey_box_and_black(), PrefersBlack()
    output, rows = predict_words(model, images[[0, 1, 0, 2, 0]], None, model_eval="vision", owners=[0, 0, 0, 1, 1])
    assert list(rows) == [1, 3]
    assert len(output.vision.logits) == 2
    _, rows = predict_words(
        model, images[[0, 1, 0, 2, 0]], None, model_eval="vision", owners=[0, 0, 0, 1, 1], tta_below=0.97
    )
    assert list(rows) == [1, 3]
    assert [len(each) for each in model.images] == [5, 5] + [1] * len(VARIANTS)
    assert torch.equal(model.images[-1].amax(), images[1].amax())


def test_the_most_confident_view_is_kept_and_the_first_of_equal_ones():
    assert most_confident([0.1, 0.5, 0.3, 0.2, 0.4, 0.4, 0.1], [0, 1, 1, 1, 2, 2, 3]) == [0, 1, 4, 6]
    assert most_confident([], []) == []
    assert most_confident([0.0, 0.0, 0.0], [0, 0, 0]) == [0]


@pytest.mark.parametrize("masked", [False, True])
def test_a_prediction_depends_on_no_other_word_of_the_batch(masked):
    torch.manual_seed(0)
    model = small_recogniser(masked=masked).eval()
    image, mask = torch.randn(5, 3, *SIZE), torch.rand(5, 1, *SIZE) if masked else None
    options = {"model_eval": "alignment", "tta_below": 1.0}
    with torch.no_grad():
        together = predicted(model, image, mask, **options)
        alone = [predicted(model, image[[i]], mask[[i]] if masked else None, **options) for i in range(5)]
        once = model(image, mask)
    alone = _pytree.tree_map(lambda *leaves: None if leaves[0] is None else torch.cat(leaves), *alone)
    for one, other in zip(_pytree.tree_leaves(together), _pytree.tree_leaves(alone), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together.alignment[-1].logits, once.alignment[-1].logits)
    sums = together.vision.attention.sum((2, 3))
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)


def test_a_word_that_has_become_sure_is_not_predicted_again():
    images, model = grey_box_and_black()[:2], PrefersBlack()
    predict_words(model, images, None, model_eval="vision", tta_below=0.95)  # narrow, the box is at 0.96
    assert [len(each) for each in model.images] == [2, 2] + [1] * (len(VARIANTS) - 1)


def test_variants_are_narrow_slanted_either_way_and_shifted_either_way():
    assert torch.equal(torch.tensor(VARIANTS)[1::2].abs(), torch.tensor(VARIANTS)[2::2].abs())
    picture = np.zeros(SIZE, np.uint8)
    cv2.putText(picture, "Word", (28, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    picture = cv2.GaussianBlur(picture.astype(np.float32) / 255, (0, 0), 1)
    pixels = np.array([[SIZE[1] / 2, 0, SIZE[1] / 2 - 0.5], [0, SIZE[0] / 2, SIZE[0] / 2 - 0.5], [0, 0, 1]])
    for variant in VARIANTS:
        seen = transformed(torch.from_numpy(picture)[None, None], torch.tensor(variant))[0, 0].numpy()
        there = pixels @ np.array([*variant, (0, 0, 1)]) @ np.linalg.inv(pixels)  # from pixels to pixels
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        assert np.abs(seen - cv2.warpAffine(picture, there[:2], SIZE[::-1], flags=flags)).max() < 0.08


def test_maps_of_a_variant_come_back_to_where_they_lie_in_the_image():
    attention = torch.zeros(1, 1, 8, 32)
    attention[:, :, 3, 9] = 1.0
    attention = torch.nn.functional.avg_pool2d(attention, 3, 1, 1)
    refined = torch.zeros(1, 1, *SIZE)
    refined[:, :, 10:22, 30:90] = 1.0
    rows, columns = (torch.arange(size).float() for size in (8, 32))
    for matrix in torch.tensor(VARIANTS):
        seen = (transformed(each, matrix) for each in (attention, refined))
        back = VisionOutput(torch.zeros(1), torch.zeros(1), *seen)
        _map_back(back, matrix)
        assert abs((back.attention.sum((0, 1, 3)) * rows).sum() - 3) < 0.1
        assert abs((back.attention.sum((0, 1, 2)) * columns).sum() - 9) < 0.2
        assert (back.refined_mask - refined).abs().mean() < 0.02


def test_attention_beside_the_image_is_spread_evenly():
    matrix = torch.tensor([[1.3, 0.0, 0.0], [0.0, 1.0, 0.0]])  # squeezed horizontally: there are margins
    attention = torch.zeros(1, 1, 8, 32)
    attention[..., 0] = 1 / 8
    back = VisionOutput(torch.zeros(1), torch.zeros(1), attention)
    _map_back(back, matrix)
    torch.testing.assert_close(back.attention, torch.full((1, 1, 8, 32), 1 / 256))
