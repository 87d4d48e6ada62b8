"""Published names: children that are left out of them, in both directions, at any depth and in copies."""

import copy

import torch
from torch import nn

from modules.names import leave_out_of_names
from tests.reference import small_recogniser


def nested() -> nn.Module:
    inner = nn.Module()
    inner.before = nn.Linear(2, 2)
    inner.block = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    leave_out_of_names(inner, "block")
    outer = nn.Module()
    outer.inner = inner
    return outer


def test_names_are_short_in_both_directions_and_in_the_order_of_the_parameters():
    network = nested()
    state = copy.deepcopy(network).state_dict()
    assert list(state)[:4] == ["inner.before.weight", "inner.before.bias", "inner.0.weight", "inner.0.bias"]
    other = nested()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.inner.block[0].weight, network.inner.block[0].weight)
    assert list(state) == list(other.state_dict())


def test_unknown_names_are_still_reported():
    state = nested().state_dict()
    state["inner.2.weight"] = state.pop("inner.0.weight")
    keys = nested().load_state_dict(state, strict=False)
    assert keys.unexpected_keys == ["inner.2.weight"]
    assert len(keys.missing_keys) == 1


def test_loading_does_not_edit_its_argument():
    network = small_recogniser()
    state = network.state_dict()
    before = list(state)
    network.load_state_dict(state)
    assert list(state) == before
    assert "vision.classifier_6.0.weight" in before
    assert not any("mask_" in name for name in before)
