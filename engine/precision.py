"""Arithmetic of the networks: the three precisions, autocast, and what a device multiplies natively."""

import contextlib
import os
from collections.abc import Iterator

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context in which networks on `device` compute in fp32 (as they are), bf16 or fp16."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def use_tf32(allowed: bool) -> None:
    """Let a GPU round the inputs of float32 convolutions and matrix products to 10 bits (TF32) in this program, or not.

    torch by itself rounds those of convolutions alone.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def choose_algorithms(*, deterministic: bool, search: bool) -> None:
    """Which of several algorithms a GPU uses in this program; to be called before it is used.

    Args:
        deterministic: only those that give the same bits every time; torch raises RuntimeError where it has none.
        search: let cuDNN time them for each new size of a convolution, and take the fastest.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in the search for faults, at a cost
    torch.backends.cudnn.benchmark = search and not deterministic


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Let cuDNN take algorithms by rule of thumb, for images that each have a size of their own."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fastest_precision(device: torch.device) -> str:
    """`bf16` where the device has instructions for products of it, else `fp32`.

    A processor without them computes bfloat16 at half the speed of float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu.get_capabilities()
    return "bf16" if native.get("amx_bf16") or native.get("avx512_bf16") else "fp32"
