"""Schedules are pure functions of the iteration; parameter groups spare what should not decay."""

import pytest
import torch
from torch import nn

from engine.optimization import (
    cosine_schedule,
    frozen_parts,
    make_optimizer,
    one_cycle_schedule,
    parameter_groups,
    poly_schedule,
    step_schedule,
    with_warmup,
)


def test_step_schedule_falls_at_its_milestones():
    factor = step_schedule([6, 10], 0.1)
    assert [factor(i) for i in (0, 5, 6, 9, 10, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_poly_schedule_follows_the_published_formula():
    factor = poly_schedule(100, 0.9)
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0.5**0.9)
    assert factor(100) == factor(101) == 0


def test_warmup_rises_linearly_and_hands_over():
    factor = with_warmup(poly_schedule(100, 0.9), 4)
    assert [factor(i) for i in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factor(4) == 1
    assert factor(54) == pytest.approx(0.5**0.9)


def test_one_cycle_is_torchs_own():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=101, pct_start=0.3, cycle_momentum=False)
    ours = one_cycle_schedule(100, 0.3, end=1 / 25 / 1e4)
    for iteration in range(100):
        assert ours(iteration) == pytest.approx(theirs.get_last_lr()[0], abs=0.04)
        optimizer.step()
        theirs.step()


def test_norms_and_biases_are_spared_and_the_head_learns_faster():
    network = nn.ModuleDict(
        {"body": nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), "semrfnhead": nn.Linear(2, 2)}
    )
    network["semrfnhead"].bias_sem = nn.Parameter(torch.zeros(2))  # as the head of SSN names one
    network["attention"] = nn.MultiheadAttention(2, 1)
    groups = parameter_groups(network, lr=0.1, weight_decay=0.5, lr_factors={"semrfnhead": 10})
    settings = {
        name: (g["lr"], g["weight_decay"])
        for name, p in network.named_parameters()
        for g in groups
        for q in g["params"]
        if q is p
    }
    assert settings["body.0.weight"] == (0.1, 0.5)
    assert settings["body.0.bias"] == settings["body.1.weight"] == settings["body.1.bias"] == (0.1, 0.0)
    assert settings["semrfnhead.weight"] == (1.0, 0.5)
    assert settings["semrfnhead.bias"] == settings["semrfnhead.bias_sem"] == (1.0, 0.0)
    assert settings["attention.in_proj_bias"] == (0.1, 0.0)
    assert all(g["weight_decay"] == 0.5 for g in parameter_groups(network, lr=1, weight_decay=0.5, decay_norms=True))


@pytest.mark.parametrize(
    ("kind", "decoupled", "family"),
    [
        ("Adam", False, torch.optim.Adam),
        ("Adam", True, torch.optim.AdamW),
        ("AdamW", False, torch.optim.AdamW),
        ("SGD", False, torch.optim.SGD),
    ],
)
def test_optimisers_have_their_type_and_are_fused(kind, decoupled, family):
    groups = parameter_groups(nn.Linear(2, 2), lr=0.1, weight_decay=0.1)
    optimizer = make_optimizer(kind, groups, decoupled_decay=decoupled)
    assert type(optimizer) is family
    assert optimizer.defaults["fused"]


def test_a_first_step_that_is_called_off_leaves_sgd_as_it_was():
    torch.manual_seed(0)
    plain, spared = nn.Linear(64, 64), nn.Linear(64, 64)
    spared.load_state_dict(plain.state_dict())
    inputs = torch.randn(8, 64)
    for network, flags in ((plain, (0.0, 0.0)), (spared, (1.0, 0.0, 0.0))):
        optimizer = make_optimizer("SGD", parameter_groups(network, lr=0.1, weight_decay=0.01))
        for flag in flags:
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.found_inf = torch.tensor(flag)
            optimizer.step()
    for ours, theirs in zip(spared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_cosine_is_torchs_own():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    ours = cosine_schedule(50)
    for iteration in range(51):
        assert ours(iteration) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert ours(60) == 0


def test_the_largest_frozen_parts_are_found():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    )
    assert frozen_parts(network) == []
    network[0].requires_grad_(False)
    network[1][1].requires_grad_(False)
    assert frozen_parts(network) == [network[0], network[1][1]]
    assert [len(group["params"]) for group in parameter_groups(network, lr=1, weight_decay=0)] == [1, 1]
    assert frozen_parts(network.requires_grad_(False)) == [network]
