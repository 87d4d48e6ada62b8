"""Optimisers and learning rate schedules: what a step is made of, apart from the loop that takes it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
HEAD_PREFIX = "semrfnhead."  # SSN's head, which learns at a multiple of the backbone's rate

Schedule = Callable[[int], float]  # iteration (from 0) -> factor of the configured learning rate


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, decay_norms: bool = False, head_lr_factor: float = 1.0
) -> list[dict]:
    """Parameters in groups of equal rate and decay.

    The groups depend on the network alone, so that a run may be resumed with other rates and decays.

    Args:
        decay_norms: decay normalisation parameters and biases as well.
        head_lr_factor: factor of the rate of SSN's head.
    """
    norms = {id(p) for module in model.modules() if isinstance(module, NORMALISATIONS) for p in module.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            norm_or_bias = id(parameter) in norms or name.endswith("bias")
            groups.setdefault((name.startswith(HEAD_PREFIX), norm_or_bias), []).append(parameter)
    return [
        {
            "params": group,
            "lr": lr * (head_lr_factor if in_head else 1.0),
            "weight_decay": 0.0 if norm_or_bias and not decay_norms else weight_decay,
        }
        for (in_head, norm_or_bias), group in groups.items()
    ]


def make_optimizer(
    kind: str,
    groups: list[dict],
    *,
    decoupled_decay: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> Optimizer:
    """Adam, AdamW or SGD in torch's fused form: one kernel, and a step that can be called off on the device."""
    if kind == "SGD":
        return _with_velocities(torch.optim.SGD(groups, momentum=momentum, fused=True))
    family = torch.optim.AdamW if kind == "AdamW" or decoupled_decay else torch.optim.Adam
    return family(groups, betas=tuple(betas), eps=eps, fused=True)


def _with_velocities(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """The optimiser with all momenta at 0, where torch's first step would start them, too.

    torch makes them at that step without values; where it is called off they stay so, and the next step would use them.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def with_warmup(schedule: Schedule, iterations: int) -> Schedule:
    """Rise linearly to the schedule's start over `iterations`, then follow it."""

    def factor(iteration: int) -> float:
        if iteration < iterations:
            return schedule(0) * (iteration + 1) / iterations
        return schedule(iteration - iterations)

    return factor if iterations else schedule


def step_schedule(milestones: Sequence[int], gamma: float) -> Schedule:
    """x gamma at every milestone (iterations)."""
    return lambda iteration: gamma ** sum(iteration >= milestone for milestone in milestones)


def poly_schedule(iterations: int, power: float) -> Schedule:
    """(1 - i / iterations) ^ power."""
    return lambda iteration: max(0.0, 1 - iteration / iterations) ** power


def one_cycle_schedule(iterations: int, pct_start: float, *, start: float = 1 / 25, end: float = 1e-4) -> Schedule:
    """Cosine rise from `start` to 1 over `pct_start` of the iterations, then cosine fall to `end` (Smith, 2018)."""
    peak = max(1, round(pct_start * iterations))

    def factor(iteration: int) -> float:
        if iteration < peak:
            return _cosine(start, 1.0, iteration / peak)
        return _cosine(1.0, end, min(1.0, (iteration - peak) / max(1, iterations - peak)))

    return factor


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
