"""What the recognisers return, and how long a predicted text is.

Legend: N images, T steps (max_length + 1, the end token counted), E features, C classes (charset + 1; class 0 is the
null and end symbol), H x W pixels, h x w cells of the feature map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NULL_CLASS = 0  # the end of a text, and every step after it


@dataclass
class VisionOutput:
    """Output of the vision model.

    `logits` (N, T, C); `feature` (N, T, E), one vector for each step; `attention` (N, T, h, w), which sums to 1 over
    the cells; `refined_mask` (N, 1, H, W), about 1 on text and 0 elsewhere but not limited to [0, 1], or None without
    the mask branch.
    """

    logits: Tensor
    feature: Tensor
    attention: Tensor
    refined_mask: Tensor | None = None


@dataclass
class LanguageOutput:
    """Output of the language model in one round: `logits` (N, T, C) and `feature` (N, T, E)."""

    logits: Tensor
    feature: Tensor


@dataclass
class AlignmentOutput:
    """Output of the alignment model in one round: `logits` (N, T, C) and `feature` (N, T, E)."""

    logits: Tensor
    feature: Tensor


@dataclass
class RecogniserOutput:
    """Outputs of all sub-models, None for those that the network does not have.

    `language` and `alignment` have one entry for each round; the last one is final.
    """

    vision: VisionOutput | None = None
    language: list[LanguageOutput] | None = None
    alignment: list[AlignmentOutput] | None = None


# DistributedDataParallel, torch.compile and torch.export find the tensors of pytrees only.
for _output in (VisionOutput, LanguageOutput, AlignmentOutput, RecogniserOutput):
    torch.export.register_dataclass(_output, serialized_type_name=f"binet.{_output.__name__}")


def text_lengths(logits: Tensor) -> Tensor:
    """Return the lengths (N,) int64 of the texts in `logits` (N, T, C): index of the first null + 1, T without one."""
    steps = logits.shape[1]
    nulls_so_far = (logits.argmax(dim=-1) == NULL_CLASS).cumsum(dim=-1)  # (N, T)
    return ((nulls_so_far == 0).sum(dim=-1) + 1).clamp(max=steps)  # (N,)


def chosen_logits(output: RecogniserOutput, model_eval: str) -> Tensor:
    """Return logits (N, T, C) of the sub-model to read: vision, or the last round of language or alignment."""
    part = getattr(output, model_eval)
    return part.logits if model_eval == "vision" else part[-1].logits


@torch.no_grad()
def decode_greedily(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most probable class of each step (N, T) of logits (N, T, C), and the confidence of each text (N,).

    The confidence is the product of the probabilities of its characters and of its end; 0 where they are NaN.
    """
    probabilities, ids = logits.float().softmax(-1).max(-1)  # (N, T)
    ends = ids == NULL_CLASS
    after_end = (ends.cumsum(1) - ends.long()) > 0  # steps behind the first end token
    return ids, probabilities.masked_fill(after_end, 1.0).prod(1).nan_to_num(0.0)
