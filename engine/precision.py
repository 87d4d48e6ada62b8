"""Arithmetic of the networks: fp32, bf16, fp16, autocast, TF32, and what a device supports natively."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which networks on `device` compute in fp32 (unchanged), bf16 or fp16."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def use_tf32(allowed: bool) -> None:
    """Set whether a GPU may round inputs of float32 convolutions and products to a 10-bit mantissa (TF32).

    By default torch rounds those of convolutions only.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def choose_algorithms(*, deterministic: bool, search: bool) -> None:
    """Choose which algorithms a GPU uses in this program; call this before the GPU is used.

    Attention is then never cuDNN's, which torch prefers on an H100. It is suspected, not shown, to be why two trainings
    there, over 64 and over 192 cells, ended in gradients that were not finite; those over 128 did not.

    Args:
        deterministic: only those that give the same bits every time; torch raises RuntimeError if it has none.
        search: let cuDNN time them for each new size of a convolution and use the fastest.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it helps to find bugs only, and costs time
    torch.backends.cudnn.benchmark = search and not deterministic
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Let cuDNN choose algorithms by heuristics, for images that differ in size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fastest_precision(device: torch.device) -> str:
    """Return bf16 if the device multiplies it natively, else fp16 on a GPU and fp32 on a CPU.

    A CPU without such instructions computes bfloat16 at half the speed of float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu.get_capabilities()
    return "bf16" if native.get("amx_bf16") or native.get("avx512_bf16") else "fp32"


@contextlib.contextmanager
def training_arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Apply `autocast` for training.

    A CPU in 16 bits also computes attention as matrix multiplications and softmax, because the backward pass of torch's
    fused kernel takes several times as long.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(autocast(device, precision))
        if device.type == "cpu" and precision != "fp32":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.callback(
                torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
                torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
            )
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else it multiplies in float32
        yield


def channels_last(value: Tensor | None) -> Tensor | None:
    """Return images or masks (N, C, H, W) in channels-last memory, and any other tensor as it is."""
    is_image = value is not None and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value
