import pytest
import torch
from torch import nn

from modules.attention import PositionAttention, ReadingOrderAttention


def make(kind: str, cells: tuple[int, int], **options: object) -> nn.Module:
    shared = {"num_steps": 5, "cells": cells, "d_model": 16}
    return (
        ReadingOrderAttention(**shared)
        if kind == "attention"
        else PositionAttention(**shared, attention_channels=8, **options)
    )


@pytest.mark.parametrize("kind", ["attention", "position"])
@pytest.mark.parametrize("cells", [(8, 32), (4, 16), (5, 13), (1, 3), (1, 1)])
def test_weights_average_the_cells(kind, cells):
    attention = make(kind, cells).eval()
    feature = torch.randn(2, 16, *cells)
    steps, weights = attention(feature)
    assert weights.shape == (2, 5, *cells)
    torch.testing.assert_close(weights.sum(dim=(2, 3)), torch.ones(2, 5))
    torch.testing.assert_close(steps, torch.einsum("nthw,nehw->nte", weights, feature))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_every_mode_works(mode):
    steps, _ = make("position", (4, 8), attention_mode=mode)(torch.randn(2, 16, 4, 8))
    assert steps.isfinite().all()


@pytest.mark.parametrize("kind", ["attention", "position"])
def test_every_parameter_gets_a_gradient(kind):
    attention = make(kind, (4, 8))
    steps, _ = attention(torch.randn(2, 16, 4, 8))
    steps.square().sum().backward()
    assert [name for name, parameter in attention.named_parameters() if parameter.grad is None] == []
