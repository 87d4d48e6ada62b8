import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modules.mask_refinement import PrototypeSimilarity
from tools import benchmark
from tools.measuring import BlockClock, blocks_of, count_flops, shares, time_interleaved
from utils import UserError

CPU = torch.device("cpu")
QUICK = ["--config", "configs/small.yaml", "--precision", "fp32", "--no-compile", "--no-memory", "--runs", "1"]
SMALLER = ["dataset.image_width=64", "model.iter_size=1"]


def test_forms_are_timed_in_turns():
    calls = []
    forms = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = time_interleaved(forms, device=CPU, runs=3)
    assert calls == ["a", "b"] * 4
    assert all(len(timing.runs) == 3 and timing.median >= 0 for timing in timings.values())


def test_a_product_counts_two_operations_for_each_pair():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5


def test_shares_add_up_to_one():
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    assert [name for name, _ in blocks_of(network)] == ["0", "1"]
    result = shares(BlockClock(network, CPU), lambda: network(torch.ones(8, 64)), CPU, runs=2)
    assert sum(result.values()) == pytest.approx(1, abs=1e-6)
    assert set(result) == {"0", "1", "(outside)"}


def test_the_straightforward_way_computes_the_same():
    torch.manual_seed(0)
    feature, mask = torch.randn(2, 6, 8, 32), torch.rand(2, 1, 32, 128)
    slow = benchmark.FullResolutionSimilarity()(feature, mask)
    torch.testing.assert_close(PrototypeSimilarity()(feature, mask), slow, rtol=1e-4, atol=1e-5)
    pixels = F.interpolate(feature, size=(32, 128), mode="bilinear", align_corners=False)
    assert slow.shape == (2, 1, *pixels.shape[-2:])


def test_reading_and_training_are_reported(tmp_path, capsys):
    path = tmp_path / "speed.json"
    sizes = ["--batch-size", "2", "--training-batch-size", "2", "--json", str(path)]
    assert benchmark.main(["reading", "training", *QUICK, *sizes, *SMALLER]) == 0
    report = json.loads(path.read_text())
    forms = {(row["task"], row["form"]) for row in report["rows"]}
    assert {("reading", name) for name in ("eager", "autocast", "prepared", "straightforward")} <= forms
    assert {("training", "eager"), ("training", benchmark.YARDSTICK), ("latency", "prepared")} <= forms
    for row in report["rows"]:
        assert row["rate"] > 0
        if row["task"] in ("reading", "training"):
            assert row["ratio"] > 0
    assert "vision.sft" in report["blocks"]["reading"]
    assert "| reading | prepared | 2 |" in capsys.readouterr().out


def test_growth_is_drawn(tmp_path):
    path = tmp_path / "growth.png"
    rows = [benchmark.Row("reading", "prepared", words, 0.1 * words) for words in (1, 2)]
    benchmark.plot_growth(rows, str(path))
    assert path.stat().st_size > 0


@pytest.mark.parametrize("arguments", [["flying"], ["reading"]])
def test_mistakes_are_named(arguments):
    with pytest.raises(UserError, match=r"flying|--config"):
        benchmark.parse_arguments(arguments)
