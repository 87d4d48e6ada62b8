"""Named loss terms and their weighted sum.

A criterion is called with a network's output and the batch's targets; it gives a dict of scalar tensors: its terms,
each unweighted, and `total`, the sum that is minimised. Terms with weight 0 are not computed. All means are taken over
the whole (global) batch; the mean of an empty set is 0. Nothing here waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import batch_mean
from modules.outputs import RecogniserOutput
from modules.ssn import SegmentationOutput


def sequence_cross_entropy(logits: list[Tensor], labels: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross-entropy over all steps before the length, the end token included, of all rounds together.

    Args:
        logits: (N, T, C), one for each round.
        labels: (N, T) class ids, 0 at the end token and after it.
        lengths: (N,) number of characters + 1: the end token counts.
    """
    steps = torch.arange(labels.shape[1], device=labels.device)
    counted = (steps < lengths[:, None]).float()  # (N, T)
    total = sum(
        (F.cross_entropy(each.transpose(1, 2).float(), labels, reduction="none") * counted).sum() for each in logits
    )
    return batch_mean(total, counted.sum() * len(logits))


def refinement_loss(refined_mask: Tensor, threshold: float) -> Tensor:
    """BINet's mask refinement loss: pull pixels above the threshold to 1 and the others to 0.

    Mean of |r - 1| over the pixels with r > threshold plus mean of |r| over the others, over the whole batch.

    Args:
        refined_mask: r, (N, 1, H, W), not bounded.
    """
    refined_mask = refined_mask.float()
    text = (refined_mask > threshold).float()
    background = 1 - text
    to_one = batch_mean(((refined_mask - 1).abs() * text).sum(), text.sum())
    to_zero = batch_mean((refined_mask.abs() * background).sum(), background.sum())
    return to_one + to_zero


class RecogniserCriterion(nn.Module):
    """Loss of a recogniser or of one of its stages (BINet, training objective; ABINet, section 3.4).

    Args:
        weights: weight of each term; `vision`, `language`, `alignment`, `refinement`. A term whose sub-model the output
            does not have is left out.
        refinement_threshold: pixels of the refined mask above it should be 1.
    """

    def __init__(self, *, weights: dict[str, float], refinement_threshold: float = 0.7):
        super().__init__()
        self.weights = weights
        self.refinement_threshold = refinement_threshold

    def forward(self, output: RecogniserOutput, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Terms of one batch: `output` of the network, labels (N, T), lengths (N,) with the end token counted."""
        terms = {}
        for name, logits in self._logits(output).items():
            if logits and self.weights.get(name, 0) != 0:
                terms[name] = sequence_cross_entropy(logits, labels, lengths)
        refined_mask = output.vision.refined_mask if output.vision is not None else None
        if refined_mask is not None and self.weights.get("refinement", 0) != 0:
            terms["refinement"] = refinement_loss(refined_mask, self.refinement_threshold)
        return with_total(terms, self.weights)

    @staticmethod
    def _logits(output: RecogniserOutput) -> dict[str, list[Tensor]]:
        return {
            "vision": [] if output.vision is None else [output.vision.logits],
            "language": [each.logits for each in output.language or []],
            "alignment": [each.logits for each in output.alignment or []],
        }


def with_total(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """The terms and, as `total`, their weighted sum."""
    if not terms:
        raise ValueError(f"no loss term is left: every weight of {weights} is 0 or its sub-model is missing")
    return terms | {"total": sum(weights[name] * term for name, term in terms.items())}


# Text segmentation (TexRNet, section 4).


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (N, H, W) at another size (N, h, w): the nearest pixel of each cell, corners aligned; ties to even."""
    rows, columns = (
        _nearest_aligned(old, new, labels.device) for old, new in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[:, rows[:, None], columns]


def _nearest_aligned(old: int, new: int, device: torch.device) -> Tensor:
    step = (old - 1) / (new - 1) if new > 1 else 0.0
    return (torch.arange(new, device=device, dtype=torch.float64) * step).round().long()


def trimap(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels at the rim of a class, bool (N, H, W): one of the 4 neighbours has another class, all of them are known.

    A pixel beside an ignored one or at the border of the picture is none.
    """
    padded = F.pad(labels, (1, 1, 1, 1), value=ignore_index)
    neighbours = torch.stack(
        [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
    )  # (4, N, H, W)
    known = (neighbours != ignore_index).all(dim=0) & (labels != ignore_index)
    return known & (neighbours != labels).any(dim=0)


class SegmentationCriterion(nn.Module):
    """Loss of SSN: both opinions everywhere, and the second one once more at the rims of the letters.

    Args:
        weights: weight of each term; `semantic`, `refined`, `trimap`.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(self, *, weights: dict[str, float] | None = None, ignore_index: int = 255):
        super().__init__()
        self.weights = weights or {"semantic": 1.0, "refined": 0.5, "trimap": 0.5}
        self.ignore_index = ignore_index

    def forward(self, output: SegmentationOutput, labels: Tensor) -> dict[str, Tensor]:
        """Terms of one batch: `output` of SSN, labels (N, H, W) of any size: 0, 1 or `ignore_index`."""
        labels = resize_labels(labels, output.refined_logits.shape[-2:])  # (N, h, w)
        counted = labels != self.ignore_index
        arguments = {
            "semantic": (output.semantic_logits, counted),
            "refined": (output.refined_logits, counted),
            "trimap": (output.refined_logits, trimap(labels, self.ignore_index)),
        }
        terms = {
            name: self._mean_over(logits, labels, where)
            for name, (logits, where) in arguments.items()
            if self.weights.get(name, 0) != 0
        }
        return with_total(terms, self.weights)

    def _mean_over(self, logits: Tensor, labels: Tensor, where: Tensor) -> Tensor:
        """Mean cross-entropy over the pixels that `where` names."""
        each = F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index, reduction="none")  # (N, h, w)
        return batch_mean((each * where).sum(), where.sum())
