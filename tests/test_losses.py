"""Loss terms equal the published ones and plain arithmetic, and are finite where a batch leaves them nothing to do."""

import pytest
import torch
import torch.nn.functional as F

from losses import (
    RecogniserCriterion,
    SegmentationCriterion,
    refinement_counts,
    refinement_loss,
    resize_labels,
    sequence_cross_entropy,
    trimap,
)
from modules.ssn import SegmentationOutput
from tests.reference import expected_losses, fill_known_weights, known_inputs, published_recogniser, small_recogniser

WEIGHTS = {"vision": 1.0, "language": 1.0, "alignment": 1.0, "refinement": 1.0}


# --- recogniser -------------------------------------------------------------------------------------------------------


def test_terms_equal_the_published_ones():
    model = fill_known_weights(published_recogniser("binet", dropout=0.0)).train()
    image, mask, labels, lengths = known_inputs(seed=13, count=1)
    terms = RecogniserCriterion(weights=WEIGHTS)(model(image, mask), labels, lengths)
    names = {"vision": "vision_loss", "language": "language_loss", "alignment": "alignment_loss"}
    names |= {"refinement": "refine_loss", "total": "total"}
    for ours, theirs in names.items():
        assert float(terms[ours]) == pytest.approx(expected_losses()[theirs], rel=1e-4), ours


def test_cross_entropy_counts_every_step_before_the_length_and_every_round():
    torch.manual_seed(0)
    rounds = [torch.randn(2, 5, 7) for _ in range(3)]
    labels = torch.tensor([[3, 4, 0, 0, 0], [1, 2, 3, 4, 0]])
    lengths = torch.tensor([3, 5])
    steps = [(row, step) for row, length in enumerate([3, 5]) for step in range(length)]
    expected = sum(F.cross_entropy(each[r, s], labels[r, s]) for each in rounds for r, s in steps) / (3 * len(steps))
    assert torch.allclose(sequence_cross_entropy(rounds, labels, lengths, lengths.sum()), expected)


def test_a_batch_without_valid_steps_costs_nothing():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    lengths = torch.zeros(2, dtype=torch.long)
    loss = sequence_cross_entropy([logits], torch.zeros(2, 5, dtype=torch.long), lengths, lengths.sum())
    loss.backward()
    assert float(loss) == 0
    assert torch.isfinite(logits.grad).all()


def test_refinement_pulls_to_one_above_the_threshold_and_to_zero_below():
    def loss(mask):
        return float(refinement_loss(mask, 0.7, refinement_counts(mask, 0.7)))

    assert loss(torch.tensor([[[[0.9, 0.5], [1.2, -0.1]]]])) == pytest.approx((0.1 + 0.2) / 2 + (0.5 + 0.1) / 2)
    assert loss(torch.full((1, 1, 2, 2), 0.9)) == pytest.approx(0.1)
    assert loss(torch.zeros(1, 1, 2, 2)) == 0


def test_terms_of_weight_zero_are_not_computed_and_the_total_is_weighted():
    model = small_recogniser()
    image, mask, labels, lengths = known_inputs(seed=1, count=2)
    output = model(image, mask)
    weights = {"vision": 2.0, "language": 0.0, "alignment": 0.5, "refinement": 0.0}
    terms = RecogniserCriterion(weights=weights)(output, labels, lengths)
    assert terms.keys() == {"vision", "alignment", "total"}
    assert torch.allclose(terms["total"], 2 * terms["vision"] + 0.5 * terms["alignment"])


def test_a_stage_without_any_weighted_term_is_named():
    output = small_recogniser()(*known_inputs(seed=1, count=1)[:2])
    with pytest.raises(ValueError, match="no loss term is left"):
        RecogniserCriterion(weights=dict.fromkeys(WEIGHTS, 0.0))(output, *known_inputs(seed=1, count=1)[2:])


# --- segmentation -----------------------------------------------------------------------------------------------------


def random_output(size=(9, 13), count=2) -> SegmentationOutput:
    generator = torch.Generator().manual_seed(0)
    semantic, refined = (torch.randn(count, 2, *size, generator=generator, requires_grad=True) for _ in range(2))
    return SegmentationOutput(semantic, refined, torch.zeros(()), torch.zeros(()))


def blob_labels(size=(33, 49), count=2) -> torch.Tensor:
    labels = torch.zeros(count, *size, dtype=torch.int64)
    labels[:, 8:20, 12:30] = 1
    labels[1, :, 40:] = 255
    return labels


def test_labels_take_the_nearest_pixel_with_aligned_corners():
    labels = torch.arange(9 * 13).view(1, 9, 13)
    assert torch.equal(resize_labels(labels, (3, 4)), labels[:, ::4, ::4])
    assert torch.equal(resize_labels(labels, (9, 13)), labels)
    assert resize_labels(labels, (1, 2)).tolist() == [[[0, 12]]]
    assert resize_labels(labels[:, :1, :1], (3, 3)).eq(0).all()


def test_trimap_by_its_definition():
    labels = torch.randint(0, 2, (2, 12, 15), generator=torch.Generator().manual_seed(1))
    labels[0, 3:5, 3:9] = 255
    expected = torch.zeros_like(labels, dtype=torch.bool)
    for n, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(1, 11), torch.arange(1, 14)).tolist():
        neighbours = [labels[n, y - 1, x], labels[n, y + 1, x], labels[n, y, x - 1], labels[n, y, x + 1]]
        known = all(each != 255 for each in [*neighbours, labels[n, y, x]])
        expected[n, y, x] = known and any(each != labels[n, y, x] for each in neighbours)
    assert torch.equal(trimap(labels), expected)


def test_terms_are_means_over_what_counts_and_the_total_is_weighted():
    output, labels = random_output(), blob_labels()
    terms = SegmentationCriterion()(output, labels)
    small = labels[:, ::4, ::4]
    semantic = F.cross_entropy(output.semantic_logits, small, ignore_index=255)
    refined = F.cross_entropy(output.refined_logits, small, ignore_index=255)
    rim = torch.where(trimap(small), small, 255)
    edge = F.cross_entropy(output.refined_logits, rim, ignore_index=255)
    torch.testing.assert_close(terms["semantic"], semantic)
    torch.testing.assert_close(terms["refined"], refined)
    torch.testing.assert_close(terms["trimap"], edge)
    torch.testing.assert_close(terms["total"], semantic + 0.5 * refined + 0.5 * edge)


@pytest.mark.parametrize("value", [0, 255])
def test_empty_sets_count_zero_and_their_gradient_is_zero(value):
    output = random_output()
    terms = SegmentationCriterion()(output, torch.full((2, 33, 49), value))
    assert terms["trimap"] == 0
    terms["total"].backward()
    assert output.refined_logits.grad.isfinite().all()
    if value == 255:
        assert terms["total"] == 0
        assert output.refined_logits.grad.eq(0).all()


def test_ignored_pixels_get_no_gradient():
    output = random_output()
    SegmentationCriterion()(output, blob_labels())["total"].backward()
    assert output.semantic_logits.grad[1, :, :, 10:].eq(0).all()
    assert output.semantic_logits.grad[0, :, :, 10:].ne(0).any()


def test_a_term_of_weight_zero_is_left_out():
    terms = SegmentationCriterion(weights={"semantic": 1.0, "refined": 0.0, "trimap": 2.0})(
        random_output(), blob_labels()
    )
    assert set(terms) == {"semantic", "trimap", "total"}
    torch.testing.assert_close(terms["total"], terms["semantic"] + 2 * terms["trimap"])
