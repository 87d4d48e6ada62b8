"""Optimisers, parameter groups, frozen parts and learning rate schedules."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from utils import UserError

NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
SSN_HEAD = "semrfnhead"  # it has parameter groups of its own whatever its rate, as in every checkpoint so far

Schedule = Callable[[int], float]  # iteration (from 0) -> factor of the configured learning rate


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    decay_norms: bool = False,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict]:
    """Return the parameters that are trained, in groups of equal rate and decay.

    The groups depend on the network and the prefixes alone, so a run can be resumed with other rates and decays.

    Args:
        decay_norms: decay normalisation parameters and biases as well.
        lr_factors: prefix of names in the `state_dict` -> factor on the rate; the longest prefix counts.

    Raises:
        UserError: a prefix fits no parameter that is trained.
    """
    factors = {SSN_HEAD: 1.0, **(lr_factors or {})}
    norms = {id(p) for module in model.modules() if isinstance(module, NORMALISATIONS) for p in module.parameters()}
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}  # as published
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    used = set()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        name = names[id(parameter)]
        prefixes = [prefix for prefix in factors if f"{name}.".startswith(f"{prefix}.")]
        used.update(prefixes)
        norm_or_bias = id(parameter) in norms or "bias" in name.rpartition(".")[2]
        groups.setdefault((max(prefixes, key=len, default=""), norm_or_bias), []).append(parameter)
    for prefix in factors.keys() - used - {SSN_HEAD}:
        parts = ", ".join(sorted({name.split(".")[0] for name in names.values()}))
        raise UserError(
            f"optimizer.lr_groups: no parameter that is trained is below {prefix!r}; the network has {parts}"
        )
    return [
        {
            "params": group,
            "lr": lr * factors.get(prefix, 1.0),
            "weight_decay": 0.0 if norm_or_bias and not decay_norms else weight_decay,
        }
        for (prefix, norm_or_bias), group in groups.items()
    ]


def frozen_parts(network: nn.Module) -> list[nn.Module]:
    """Return the largest parts of a network that have parameters of which none is trained."""
    trained = [parameter.requires_grad for parameter in network.parameters()]
    if trained and not any(trained):
        return [network]
    return [part for child in network.children() for part in frozen_parts(child)]


def make_optimizer(
    kind: str,
    groups: list[dict],
    *,
    lr: float = 1e-3,
    decoupled_decay: bool = False,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> Optimizer:
    """Return Adam, AdamW or SGD in torch's fused form, whose step can be cancelled on the device.

    Args:
        lr: the learning rate that is logged; each of the groups has its own.
    """
    if kind == "SGD":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            # As torch's first step does; but if that is cancelled, it leaves momenta uninitialised to the next one.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    family = torch.optim.AdamW if kind == "AdamW" or decoupled_decay else torch.optim.Adam
    return family(groups, lr=lr, betas=tuple(betas), eps=eps, fused=True)


def with_warmup(schedule: Schedule, iterations: int) -> Schedule:
    """Return a schedule that rises linearly to the start of another one over `iterations`, then follows it."""

    def factor(iteration: int) -> float:
        if iteration < iterations:
            return schedule(0) * (iteration + 1) / iterations
        return schedule(iteration - iterations)

    return factor if iterations else schedule


def step_schedule(milestones: Sequence[int], gamma: float) -> Schedule:
    """Return a schedule that is multiplied by gamma at every milestone (iterations)."""
    return lambda iteration: gamma ** sum(iteration >= milestone for milestone in milestones)


def poly_schedule(iterations: int, power: float) -> Schedule:
    """Return the schedule (1 - i / iterations) ^ power."""
    return lambda iteration: max(0.0, 1 - iteration / iterations) ** power


def cosine_schedule(iterations: int) -> Schedule:
    """Return a schedule that falls from 1 to 0 over `iterations` along half a cosine (Loshchilov and Hutter, 2017)."""
    return lambda iteration: _cosine(1.0, 0.0, min(1.0, iteration / iterations))


def one_cycle_schedule(iterations: int, pct_start: float, *, start: float = 1 / 25, end: float = 1e-4) -> Schedule:
    """Return a schedule with a cosine rise from `start` to 1 over `pct_start`, then a fall to `end` (Smith, 2018)."""
    peak = max(1, round(pct_start * iterations))

    def factor(iteration: int) -> float:
        if iteration < peak:
            return _cosine(start, 1.0, iteration / peak)
        return _cosine(1.0, end, min(1.0, (iteration - peak) / max(1, iterations - peak)))

    return factor


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
