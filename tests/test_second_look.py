"""The second look: which words get one, what is kept of it, and where its maps lie in the image."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from inference.second_look import VIEWS, _bring_back, look_twice, transformed, view_maps
from modules.outputs import RecogniserOutput, VisionOutput
from tests.reference import small_recogniser

SIZE = (32, 128)


class PrefersBlack(nn.Module):
    """Is the surer of its one step the darker the image is; remembers the images that it was given."""

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
    """Images that look the same in every view, darker when they are made smaller, and as dark as can be."""
    images = torch.zeros(3, 3, *SIZE)
    images[0] = 0.25
    images[1, :, 8:24, 32:96] = 1.0
    return images


def test_words_are_read_once_without_a_threshold():
    model = PrefersBlack()
    look_twice(model, grey_box_and_black(), None, below=0.0, model_eval="vision")
    assert len(model.images) == 1


def test_only_unsure_words_are_read_again_and_only_surer_readings_are_kept():
    images, model = grey_box_and_black(), PrefersBlack()
    once = model(images).vision
    twice = look_twice(model, images, None, below=0.95, model_eval="vision").vision
    assert [len(each) for each in model.images] == [3, 3, 2 * len(VIEWS)]  # the third was sure at once
    for leaf in ("logits", "feature", "attention"):
        assert torch.equal(getattr(twice, leaf)[[0, 2]], getattr(once, leaf)[[0, 2]])
    before, after = (each.logits[1].softmax(-1).max() for each in (once, twice))
    assert before < 0.9 < after
    assert twice.feature[1] == 1 + 2 * 2  # of the two words, the second; of the views, the third, which is narrower


@pytest.mark.parametrize("masked", [False, True])
def test_a_reading_depends_on_no_other_word_of_the_batch(masked):
    torch.manual_seed(0)
    model = small_recogniser(masked=masked).eval()
    image, mask = torch.randn(5, 3, *SIZE), torch.rand(5, 1, *SIZE) if masked else None
    with torch.no_grad():
        together = look_twice(model, image, mask, below=1.0, model_eval="alignment")
        alone = [
            look_twice(model, image[i : i + 1], mask[i : i + 1] if masked else None, below=1.0, model_eval="alignment")
            for i in range(5)
        ]
        once = model(image, mask)
    alone = _pytree.tree_map(lambda *leaves: None if leaves[0] is None else torch.cat(leaves), *alone)
    for one, other in zip(_pytree.tree_leaves(together), _pytree.tree_leaves(alone), strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert not torch.equal(together.alignment[-1].logits, once.alignment[-1].logits)
    sums = together.vision.attention.sum((2, 3))
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-4, rtol=0)


def test_views_turn_counterclockwise_and_make_words_narrower_and_lower():
    picture = np.zeros(SIZE, np.uint8)
    cv2.putText(picture, "Word", (28, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 255, 2)
    picture = cv2.GaussianBlur(picture.astype(np.float32) / 255, (0, 0), 1)
    given = torch.from_numpy(picture).expand(len(VIEWS), 1, *SIZE)
    seen = transformed(given, view_maps(SIZE, torch.device("cpu")), "zeros")[:, 0].numpy()
    centre = (SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2
    for view, (degrees, narrower, lower) in zip(seen, VIEWS, strict=True):
        there = cv2.getRotationMatrix2D(centre, degrees, 1.0)  # counterclockwise, as its manual says
        there = there @ np.array(
            [[1 / narrower, 0, centre[0] * (1 - 1 / narrower)], [0, 1 / lower, centre[1] * (1 - 1 / lower)], [0, 0, 1]]
        )
        expected = cv2.warpAffine(picture, there, SIZE[::-1], flags=cv2.INTER_LINEAR)
        assert np.abs(view - expected).max() < 0.08
        assert math.isclose(view.sum(), picture.sum() / narrower / lower, rel_tol=0.03)


def test_maps_of_a_view_come_back_to_where_they_lie_in_the_image():
    attention = torch.zeros(len(VIEWS), 1, 8, 32)
    attention[:, :, 3, 9] = 1.0
    attention = torch.nn.functional.avg_pool2d(attention, 3, 1, 1)
    refined = torch.zeros(len(VIEWS), 1, *SIZE)
    refined[:, :, 10:22, 30:90] = 1.0
    maps = view_maps(SIZE, torch.device("cpu"))
    seen = VisionOutput(
        logits=torch.zeros(1),
        feature=torch.zeros(1),
        attention=transformed(attention, maps, "zeros"),
        refined_mask=transformed(refined, maps, "zeros"),
    )
    _bring_back(seen, maps)
    rows, columns = (torch.arange(size).float() for size in (8, 32))
    assert ((seen.attention.sum((1, 3)) * rows).sum(1) - 3).abs().max() < 0.1
    assert ((seen.attention.sum((1, 2)) * columns).sum(1) - 9).abs().max() < 0.1
    assert (seen.refined_mask - refined).abs().mean() < 0.02
