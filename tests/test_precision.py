"""Precisions: what autocast computes in, and a device's own choice."""

import pytest
import torch

from engine.precision import PRECISIONS, autocast, fastest_precision, use_tf32

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


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_one_setting_for_convolutions_and_matrix_products(allowed):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        use_tf32(allowed)
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (allowed, allowed)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
