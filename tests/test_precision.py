"""Precisions: what autocast computes in, and a device's own choice."""

import copy

import pytest
import torch
from torch.nn import functional as F

from precision import (
    PRECISIONS,
    ChannelSum,
    autocast,
    channels_last,
    fastest_precision,
    sum_few_channels,
    training_arithmetic,
)
from tests.reference import known_inputs, small_recogniser

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRECISIONS)
def test_matrix_products_are_computed_in_the_precision(name):
    with autocast(CPU, name):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == PRECISIONS[name]


def test_a_cpu_takes_sixteen_bits_only_where_it_multiplies_them_natively(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False})
    assert fastest_precision(CPU) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert fastest_precision(CPU) == "bf16"


@pytest.mark.parametrize("name", PRECISIONS)
def test_attention_of_16_bit_training_is_written_out_on_a_cpu(name):
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    query = torch.randn(2, 2, 8, 16, requires_grad=True)
    with training_arithmetic(CPU, name):
        output = F.scaled_dot_product_attention(query, query, query)
    assert output.dtype == PRECISIONS[name]
    fused = "FlashAttention" in type(output.grad_fn).__name__
    assert fused == (name == "fp32")
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before
    torch.testing.assert_close(
        output.float(), F.scaled_dot_product_attention(query, query, query), rtol=0.05, atol=0.05
    )


def test_sums_of_few_channels_compute_what_the_convolutions_do():
    network = small_recogniser().eval()
    swapped = copy.deepcopy(network)
    sum_few_channels(swapped)
    refinement = copy.deepcopy(swapped).vision.mask_refinement
    assert {type(refinement.rf), type(refinement.rf2)} == {ChannelSum}
    assert list(swapped.state_dict()) == list(network.state_dict())
    image, mask, *_ = known_inputs(5, 2)
    masks = [each(image, mask).vision.refined_mask for each in (network, swapped)]
    torch.testing.assert_close(*masks, rtol=1e-5, atol=1e-6)


def test_only_images_change_their_memory_format():
    image, labels = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    assert channels_last(image).is_contiguous(memory_format=torch.channels_last)
    assert channels_last(labels) is labels
    assert channels_last(None) is None
