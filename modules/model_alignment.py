"""Alignment of the two predictions (ABINet, fusion).

Legend: N images, T steps, E features, C classes.
"""

import torch
from torch import Tensor, nn

from modules.outputs import AlignmentOutput


class AlignmentModel(nn.Module):
    """Merges features by a gate: g = sigmoid(w_att(concat(language, vision))); cls(g * vision + (1 - g) * language)."""

    float32_layers = ("cls",)

    def __init__(self, *, num_classes: int = 37, d_model: int = 512):
        super().__init__()
        self.w_att = nn.Linear(2 * d_model, d_model)
        self.cls = nn.Linear(d_model, num_classes)

    def forward(self, language: Tensor, vision: Tensor) -> AlignmentOutput:
        """Features (N, T, E) of the language and the vision model -> logits (N, T, C) and fused feature (N, T, E)."""
        gate = self.w_att(torch.cat((language, vision), dim=-1)).sigmoid()
        feature = gate * vision + (1 - gate) * language
        return AlignmentOutput(logits=self.cls(feature), feature=feature)
