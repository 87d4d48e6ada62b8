"""Arithmetic of the networks: the three precisions, autocast, and what a device multiplies natively."""

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


def fastest_precision(device: torch.device) -> str:
    """`bf16` where the device has instructions for products of it, else `fp32`.

    A processor without them computes bfloat16 at half the speed of float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu.get_capabilities()
    return "bf16" if native.get("amx_bf16") or native.get("avx512_bf16") else "fp32"
