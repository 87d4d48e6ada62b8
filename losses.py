"""Named loss terms and their weighted sum.

A criterion is called with a network's output and the batch's targets. It returns a dict of scalar tensors: its terms,
unweighted, and `total`, the sum that is minimised. All means are taken over the whole (global) batch; the mean of an
empty set is 0. Nothing here waits for the device.

For a batch in parts (`training.accumulation`), `criterion.counts` returns how many steps and pixels the means of a part
are taken over. With the sums of these counts as `whole`, terms and gradients of the parts add up to those of the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import batch_mean, summed
from loading.batches import IGNORED
from modules.outputs import RecogniserOutput
from modules.ssn import SegmentationOutput

Counts = dict[str, Tensor]  # how many steps or pixels each mean is taken over; scalars


def counted_steps(labels: Tensor, lengths: Tensor) -> Tensor:
    """Return 1 at the steps before the length and 0 from there on, (N, T) float."""
    return (torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]).float()


def sequence_cross_entropy(logits: list[Tensor], labels: Tensor, lengths: Tensor, whole: Tensor) -> Tensor:
    """Return the mean cross-entropy over all steps before the length, end token included, and all rounds.

    Args:
        logits: (N, T, C), one for each round.
        labels: (N, T) class ids, 0 at the end token and after it.
        lengths: (N,) number of characters + 1: the end token counts.
        whole: number of steps of the whole batch.
    """
    counted = counted_steps(labels, lengths)
    total = sum(
        (F.cross_entropy(each.transpose(1, 2).float(), labels, reduction="none") * counted).sum() for each in logits
    )
    return batch_mean(total, whole * len(logits))


def refinement_counts(refined_mask: Tensor, threshold: float) -> Counts:
    """Return the number of pixels above the threshold (`text`) and of the others (`background`)."""
    text = (refined_mask.float() > threshold).float().sum()
    return {"text": text, "background": refined_mask.numel() - text}


def refinement_loss(refined_mask: Tensor, threshold: float, whole: Counts) -> Tensor:
    """Return BINet's mask refinement loss, which pulls pixels above the threshold to 1 and the others to 0.

    It is the mean of |r - 1| over the pixels with r > threshold plus the mean of |r| over the others.

    Args:
        refined_mask: r, (N, 1, H, W), not bounded.
        whole: `refinement_counts` of the whole batch.
    """
    refined_mask = refined_mask.float()
    text = (refined_mask > threshold).float()
    to_one = batch_mean(((refined_mask - 1).abs() * text).sum(), whole["text"])
    to_zero = batch_mean((refined_mask.abs() * (1 - text)).sum(), whole["background"])
    return to_one + to_zero


class Criterion(nn.Module):
    """Base of both criteria: the terms of a batch and their weighted sum.

    A criterion has `terms(output, *targets, whole)`, those whose weight is not 0, and `counts(output, *targets)`.
    """

    counts_outputs = True  # whether `counts` needs the network's output

    def __init__(self, weights: dict[str, float]):
        super().__init__()
        self.weights = weights

    def forward(self, output: Any, *targets: Tensor, whole: Counts | None = None) -> dict[str, Tensor]:
        """Return the terms of one batch and `total`; `targets` are those of the batch.

        Args:
            whole: sums of `counts` over the whole batch, if this is a part; None: this is the whole batch.
        """
        if whole is None:  # several processes exchange all counts in one message
            whole = summed([self.counts(output, *targets)])
        terms = self.terms(output, *targets, whole=whole)
        if not terms:
            raise ValueError(f"no loss term is left: every weight of {self.weights} is 0 or its sub-model is missing")
        return terms | {"total": sum(self.weights[name] * term for name, term in terms.items())}


class RecogniserCriterion(Criterion):
    """Loss of a recogniser or of one of its stages (BINet, training objective; ABINet, section 3.4).

    Targets are labels (N, T) and lengths (N,), the end token counted.

    Args:
        weights: weight of each term: `vision`, `language`, `alignment`, `refinement`. Terms of sub-models that the
            output does not have are left out.
        refinement_threshold: pixels of the refined mask above it should be 1.
    """

    def __init__(self, *, weights: dict[str, float], refinement_threshold: float = 0.7):
        super().__init__(weights)
        self.refinement_threshold = refinement_threshold
        self.counts_outputs = weights.get("refinement", 0) != 0  # it counts pixels of the refined mask

    def terms(self, output: RecogniserOutput, labels: Tensor, lengths: Tensor, whole: Counts) -> dict[str, Tensor]:
        rounds = {
            "vision": [] if output.vision is None else [output.vision.logits],
            "language": [each.logits for each in output.language or []],
            "alignment": [each.logits for each in output.alignment or []],
        }
        terms = {}
        for name, logits in rounds.items():
            if logits and self.weights.get(name, 0) != 0:
                terms[name] = sequence_cross_entropy(logits, labels, lengths, whole["steps"])
        if (refined_mask := self._refined_mask(output)) is not None:
            terms["refinement"] = refinement_loss(refined_mask, self.refinement_threshold, whole)
        return terms

    def counts(self, output: RecogniserOutput | None, labels: Tensor, lengths: Tensor) -> Counts:
        """Return the numbers of steps, text pixels and background pixels; `output` is used if `counts_outputs`."""
        counts = {"steps": counted_steps(labels, lengths).sum()}
        if (refined_mask := self._refined_mask(output)) is not None:
            counts |= refinement_counts(refined_mask, self.refinement_threshold)
        return counts

    def _refined_mask(self, output: RecogniserOutput | None) -> Tensor | None:
        """Return the refined mask if its loss is computed."""
        return output.vision.refined_mask if self.counts_outputs and output.vision is not None else None


# Text segmentation (TexRNet, section 4).


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels (N, H, W) to (N, h, w): nearest pixel, corners aligned, ties to even."""
    rows, columns = (
        _nearest_aligned(old, new, labels.device) for old, new in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]


def _nearest_aligned(old: int, new: int, device: torch.device) -> Tensor:
    step = (old - 1) / (new - 1) if new > 1 else 0.0
    return (torch.arange(new, device=device, dtype=torch.float64) * step).round().long()


def trimap(labels: Tensor) -> Tensor:
    """Return the pixels at class boundaries, bool (N, H, W): at least one of the 4 neighbours has another class.

    Pixels at the border of the image, and those that are ignored or have an ignored neighbour, do not count.
    """
    padded = F.pad(labels, (1, 1, 1, 1), value=IGNORED)
    shifted = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    neighbours = torch.stack(shifted)  # (4, N, H, W)
    known = (neighbours != IGNORED).all(dim=0) & (labels != IGNORED)
    return known & (neighbours != labels).any(dim=0)


class SegmentationCriterion(Criterion):
    """Loss of SSN: semantic and refined logits everywhere, and the refined ones once more at class boundaries.

    The target are labels (N, H, W) of any size: 0, 1 or IGNORED.

    Args:
        weights: weight of each term: `semantic`, `refined`, `trimap`.
    """

    def __init__(self, *, weights: dict[str, float] | None = None):
        super().__init__(weights or {"semantic": 1.0, "refined": 0.5, "trimap": 0.5})

    def terms(self, output: SegmentationOutput, labels: Tensor, whole: Counts) -> dict[str, Tensor]:
        labels = resize_labels(labels, output.refined_logits.shape[-2:])  # (N, h, w)
        terms = {}
        for name, where in self._where(labels).items():
            logits = output.semantic_logits if name == "semantic" else output.refined_logits
            each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")  # (N, h, w)
            terms[name] = batch_mean((each * where).sum(), whole[name])
        return terms

    def counts(self, output: SegmentationOutput, labels: Tensor) -> Counts:
        """Return the number of pixels of each term, at the output's size."""
        labels = resize_labels(labels, output.refined_logits.shape[-2:])
        return {name: where.sum() for name, where in self._where(labels).items()}

    def _where(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the pixels that each term with a weight is a mean over, bool (N, h, w)."""
        counted = labels != IGNORED
        where = {"semantic": counted, "refined": counted, "trimap": trimap(labels)}
        return {name: pixels for name, pixels in where.items() if self.weights.get(name, 0) != 0}
