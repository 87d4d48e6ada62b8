"""Precisions: what autocast computes in, and a device's own choice."""

import os

import pytest
import torch

from engine.precision import PRECISIONS, autocast, choose_algorithms, fastest_precision, use_tf32, without_search

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


@pytest.fixture
def algorithms(monkeypatch):
    """Leaves torch's choice as it was."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    choose_algorithms(deterministic=False, search=False)


@pytest.mark.parametrize(("deterministic", "search"), [(True, True), (False, True), (False, False)])
def test_deterministic_algorithms_are_not_searched_for_by_time(algorithms, deterministic, search):
    choose_algorithms(deterministic=deterministic, search=search)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    )  # attention is deterministic only if torch may fail
    assert torch.backends.cudnn.benchmark == (search and not deterministic)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


def test_the_search_pauses_for_images_of_many_sizes(algorithms):
    choose_algorithms(deterministic=False, search=True)
    with without_search():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
