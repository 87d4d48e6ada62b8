"""HRNet: sizes and widths."""

import pytest
import torch

from modules.hrnet import HRNet

SMALL = {"stem_width": 8, "num_blocks": 1, "bottlenecks": 1, "bottleneck_width": 4}


def small_hrnet(widths=(4, 8, 12, 16), num_modules=(1, 2, 1), **changes) -> HRNet:
    torch.manual_seed(0)
    return HRNet(widths=widths, num_modules=num_modules, **{**SMALL, **changes})


@pytest.mark.parametrize(
    ("size", "cells"), [((65, 193), (17, 49)), ((64, 100), (16, 25)), ((1, 33), (1, 9)), ((31, 7), (8, 2))]
)
def test_output_is_a_quarter_of_any_image_size(size, cells):
    maps = small_hrnet().eval()(torch.randn(2, 3, *size))
    assert maps.shape == (2, 40, *cells)


@pytest.mark.parametrize(("widths", "num_modules"), [((4, 8), (1,)), ((4, 8, 12), (1, 1)), ((16, 8, 8, 4), (1, 1, 1))])
def test_any_number_of_branches_and_any_widths(widths, num_modules):
    network = small_hrnet(widths=widths, num_modules=num_modules)
    assert network(torch.randn(2, 3, 33, 65)).shape == (2, sum(widths), 9, 17)


def test_no_bottlenecks_and_no_modules_leave_a_working_network():
    network = small_hrnet(bottlenecks=0, num_modules=(0, 0, 0))
    assert network(torch.randn(2, 3, 33, 65)).shape == (2, 40, 9, 17)


def test_every_parameter_gets_a_gradient():
    network = small_hrnet()
    network(torch.randn(2, 3, 65, 65)).square().mean().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
