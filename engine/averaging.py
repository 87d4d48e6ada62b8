"""Averaged weights (EMA) and the running statistics of batch norms."""

import copy

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of a network's weights and buffers; integer buffers are copied.

    The decay of update n, from 0, is min(decay, (1 + n) / (10 + n)), so that the average forgets the first weights in a
    short run, too. Steps are counted on the host: torch's `AveragedModel` copies its counter to the device, which
    stalls a GPU.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0  # updates so far

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network as it is now."""
        ours, theirs = _floats_and_integers(self.module), _floats_and_integers(network)
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(ours[0], theirs[0], 1 - decay)
        if ours[1]:
            torch._foreach_copy_(ours[1], theirs[1])
        self.steps += 1


def _floats_and_integers(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the floating-point parameters and buffers of a network, and the others."""
    tensors = [*network.parameters(), *network.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Return running means and variances of a network's batch norms."""
    return [each for name, each in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
