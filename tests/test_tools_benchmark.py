"""tools/benchmark.py: every task reports its forms, and what is counted is counted right."""

import json
import re
from unittest import mock

import pytest
import torch
from torch import nn

from tools import benchmark
from tools.benchmark import count_flops, time_in_turns
from utils import UserError

QUICK = ["--precision", "fp32", "--no-compile", "--runs", "1", "--batch-size", "2"]
ROOTS = f"dataset.train.roots=[{benchmark.RENDERED_WORDS}]"
RENDERED = [ROOTS, "dataset.train.length=12", "dataset.train.batch_size=2", "dataset.multiprocessing_context=fork"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run tasks with little work; returns the JSON report."""
    monkeypatch.setattr(benchmark, "LOADED_BATCHES", 3)
    monkeypatch.setattr("tools.benchmark.ROUND_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "YARDSTICK_SIZE", 32)
    monkeypatch.setattr(benchmark, "matrix_rate", lambda device, dtype: 1e9)

    def run(*arguments):
        path = tmp_path / "speed.json"
        assert benchmark.main([*arguments, *QUICK, "--json", str(path)]) == 0
        return json.loads(path.read_text())

    return run


def test_forms_are_timed_in_turns(monkeypatch):
    monkeypatch.setattr("tools.benchmark.ROUND_SECONDS", 0.001)
    calls = []
    forms = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = time_in_turns(forms, runs=2)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns == ["a", "b"] * 2
    assert all(timing.median > 0 and timing.iqr >= 0 for timing in timings.values())


def test_a_multiply_add_counts_as_two():
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    assert count_flops(lambda: network(torch.ones(3, 4))) == 2 * 3 * 4 * 5


def test_reading_and_training_are_reported(measure, capsys):
    config = ["--config", "configs/small.yaml", "dataset.image_width=64", "model.iter_size=1"]
    report = measure("reading", "training", *config, "dataset.train.roots=[not/there]")  # training needs no data
    forms = [(row["task"], row["form"]) for row in report["rows"]]
    assert forms == [
        *(("reading", form) for form in ("eager", "prepared", benchmark.YARDSTICK)),
        *(("latency", form) for form in ("eager", "prepared")),
        *(("training", form) for form in ("eager", "autocast")),
    ]
    for row in report["rows"]:
        assert row["rate"] == pytest.approx(row["words"] / row["seconds"])
        assert (row["ratio"] is None) == (row["task"] != "reading")
        assert (row["flops"] is None) == (row["form"] == benchmark.YARDSTICK)
    flops = {(row["task"], row["form"]): row["flops"] for row in report["rows"]}
    assert flops["training", "eager"] == pytest.approx(3 * flops["reading", "eager"], rel=0.1)  # with the backward pass
    assert re.search(r"\| reading +\| prepared +\| +2 \|", capsys.readouterr().out)


def test_loading_is_reported(measure, monkeypatch):
    normalise = mock.Mock(side_effect=AssertionError("the device's work was counted as loading"))
    monkeypatch.setattr("loading.batches.Batch.inputs", normalise)
    config = ["--config", "configs/small.yaml", "dataset.num_workers=2"]
    (loading,) = measure("loading", *config, *RENDERED)["rows"]
    assert (loading["form"], loading["words"]) == ("workers: 2", 8)  # two batches from each


@pytest.mark.parametrize("config", ["small", "small_ssn"])
def test_masks_are_reported_without_weights(measure, config):
    settings = ["model.ssn.areas=[65]", "model.ssn.checkpoint=nothere.pth"]
    rows = measure("masks", "--config", f"configs/{config}.yaml", *settings)["rows"]
    assert [row["form"] for row in rows] == ["scales 65", benchmark.YARDSTICK]


def test_reading_needs_a_recogniser(measure):
    with pytest.raises(UserError, match="abinet or binet"):
        measure("reading", "--config", "configs/small_pretrain_vision.yaml")


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="flying"):
        benchmark.parse_arguments(["flying", "--config", "configs/small.yaml"])
