"""Dropout that does not hold up a CPU: there torch draws each number by itself, a quarter of a 16-bit training step."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS = 16  # random bits for each number: its probability is met to 2 ** -17


def dropout(values: Tensor, p: float = 0.1) -> Tensor:
    """Each number 0 with probability `p` in [0, 1), else divided by 1 - p; as `torch.nn.functional.dropout`."""
    if p == 0:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, p)
    return values * torch.ops.binet.dropout_factors(values.detach(), p, False)


def relu_dropout(values: Tensor, p: float = 0.1) -> Tensor:
    """`dropout(relu(values), p)`; on a CPU one product, which keeps its factors alone for the way back."""
    if p == 0 or values.device.type != "cpu":
        return dropout(F.relu(values), p)
    return values * torch.ops.binet.dropout_factors(values.detach(), p, True)


class Dropout(nn.Dropout):
    """`dropout` while training, the identity else."""

    def forward(self, values: Tensor) -> Tensor:
        return dropout(values, self.p) if self.training else values


@torch.library.custom_op("binet::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_factors(values: Tensor, p: float, rectify: bool) -> Tensor:
    """0 or 1 / (1 - p) for each of `values`, in their shape and precision; torch's generator gives the seed.

    With `rectify` it is 0 wherever a value is not positive. An operation of its own: a compiler takes it as it is.
    """
    # numpy's smallest generator draws bits four times as fast as torch's own, which is asked for a seed alone.
    generator = np.random.SFC64(torch.randint(2**62, (2,)).tolist())
    drawn = torch.from_numpy(generator.random_raw(values.numel() * BITS // 64 + 1))
    bits = drawn.view(torch.int16)[: values.numel()].view(values.shape)  # each of -2 ** 15 ... 2 ** 15 - 1 alike
    dropped = round(p * 2**BITS)
    # In place: on a CPU a new tensor of this size costs more than what is computed in it.
    kept = torch.ge(bits, dropped - 2 ** (BITS - 1), out=bits)  # 0 or 1
    factors = kept.to(values.dtype).mul_(2**BITS / (2**BITS - dropped))
    if rectify:  # relu's way back, which passes what belongs to positive values: a twentieth of the time of a mask
        torch.ops.aten.threshold_backward.grad_input(factors, values, 0, grad_input=factors)
    return factors


@dropout_factors.register_fake
def _(values: Tensor, p: float, rectify: bool) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device=values.device)
