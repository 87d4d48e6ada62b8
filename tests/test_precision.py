"""Precisions: what autocast computes in, and a device's own choice."""

import functools
import os

import pytest
import torch
from torch.nn import functional as F

from builders import with_checkpoint
from config import load_config
from engine.precision import (
    PRECISIONS,
    autocast,
    channels_last,
    choose_algorithms,
    fastest_precision,
    training_arithmetic,
    use_tf32,
    without_search,
)
from modules.transformer import TransformerEncoder
from tools import benchmark

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PRECISIONS)
def test_matrix_multiplications_use_the_precision(name):
    with autocast(CPU, name):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == PRECISIONS[name]


def test_a_cpu_uses_16_bits_only_if_it_multiplies_them_natively(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": False})
    assert fastest_precision(CPU) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert fastest_precision(CPU) == "bf16"


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_one_setting_for_convolutions_and_matrix_multiplications(allowed):
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
def test_deterministic_algorithms_are_not_chosen_by_timing(algorithms, deterministic, search):
    choose_algorithms(deterministic=deterministic, search=search)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert (
        not torch.is_deterministic_algorithms_warn_only_enabled()
    )  # attention is deterministic only if torch may fail
    assert torch.backends.cudnn.benchmark == (search and not deterministic)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


def test_algorithms_are_not_timed_for_images_of_many_sizes(algorithms):
    choose_algorithms(deterministic=False, search=True)
    with without_search():
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", PRECISIONS)
def test_16_bit_training_on_a_cpu_uses_unfused_attention(name):
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


def test_only_images_change_their_memory_format():
    image, labels = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    assert channels_last(image).is_contiguous(memory_format=torch.channels_last)
    assert channels_last(labels) is labels
    assert channels_last(None) is None


def test_an_encoder_evaluates_in_the_precision_of_autocast():
    torch.manual_seed(0)
    encoder = TransformerEncoder(num_layers=1, d_model=16, nhead=2, d_inner=32).eval()
    sequence = torch.randn(2, 5, 16)
    with autocast(CPU, "bf16"):
        expected = encoder(sequence)
        with torch.no_grad():  # where torch has a fused kernel
            torch.testing.assert_close(encoder(sequence), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("cells", [26, 64, 128, 192])
def test_gradients_of_attention_with_strongly_negative_products_are_finite_on_a_gpu(algorithms, cells):
    """Positions that only fill a tile have the product 0: not masked, they would get the weight exp(0 + 1000)."""
    choose_algorithms(deterministic=False, search=True)
    direction = torch.randn(32, device="cuda")
    noise = torch.randn(8, 4, cells, 32, device="cuda")
    query, key = (noise + sign * 14 * direction for sign in (1, -1))
    inputs = [tensor.bfloat16().requires_grad_() for tensor in (query, key, noise)]
    F.scaled_dot_product_attention(*inputs).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


# --- losses -----------------------------------------------------------------------------------------------------------


@functools.cache
def last_loss(network: str, form: str, device: torch.device, steps: int, words: int) -> float:
    """Mean total loss of the last ten of some training steps on rendered words, without dropout."""
    precision, _, mode = form.partition(", ")
    settings = [f"dataset.train.roots=[{benchmark.RENDERED_WORDS}]", f"dataset.train.length={8 * words}"]
    settings += [f"dataset.train.batch_size={words}", "dataset.train.shares=null", "dataset.masks.source=lmdb"]
    settings += ["dataset.num_workers=0", "dataset.data_aug=false", f"training.precision={precision}"]
    settings += ["model.vision.dropout=0.0", "model.language.dropout=0.0"]
    settings += ["training.compile=true", f"training.compile_mode={mode.removeprefix('compiled ')}"] if mode else []
    config = with_checkpoint(load_config(f"configs/{network}.yaml", settings), None)
    trainer, batches = benchmark.make_trainer(config, device=device, batches=8)
    losses = [trainer.train_step(batches[step % len(batches)]).terms["total"] for step in range(steps)]
    torch.compiler.reset()
    return torch.stack(losses[-10:]).mean().item()


def check_losses(network: str, form: str, device: torch.device, *, steps: int, words: int) -> None:
    scale = {"device": device, "steps": steps, "words": words}
    expected, found = (last_loss(network, each, **scale) for each in ("fp32", form))
    assert abs(found / expected - 1) < 0.02, f"{form}: loss {found:.4f}, in fp32 {expected:.4f}"


def test_losses_in_16_bits_stay_near_those_of_float32():
    check_losses("small", "bf16", CPU, steps=6, words=4)


@pytest.mark.parametrize("other", [0.979, 1.021])
def test_losses_2_percent_apart_are_found(monkeypatch, other):
    monkeypatch.setitem(globals(), "last_loss", lambda network, form, **scale: 1.0 if form == "fp32" else other)
    with pytest.raises(AssertionError, match="bf16: loss"):
        check_losses("small", "bf16", CPU, steps=1, words=1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bf16", "fp16", "bf16, compiled default"])
def test_losses_of_the_small_network_on_a_gpu(form):
    check_losses("small", form, torch.device("cuda"), steps=200, words=96)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bf16", "fp16", "bf16, compiled default", "bf16, compiled reduce-overhead"])
def test_losses_of_the_full_size_network_on_a_gpu(form):
    check_losses("train", form, torch.device("cuda"), steps=50, words=96)
