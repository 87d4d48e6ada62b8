import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from builders import build_model, build_ssn
from config import load_config
from inference.segmenter import Segmenter
from modules.mask_refinement import PrototypeSimilarity
from tools import benchmark
from tools.growth import growth_table, largest_steps, make_curve
from tools.measuring import BlockClock, Timing, blocks_of, count_flops, shares, time_interleaved
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
    slow = benchmark.FullResolutionSimilarity(image_size=(32, 128))(feature, mask)
    torch.testing.assert_close(PrototypeSimilarity()(feature, mask), slow, rtol=1e-4, atol=1e-5)
    pixels = F.interpolate(feature, size=(32, 128), mode="bilinear", align_corners=False)
    assert slow.shape == (2, 1, *pixels.shape[-2:])


def test_a_straightforward_network_reads_the_same():
    torch.manual_seed(0)
    model = build_model(load_config("configs/small.yaml", SMALLER)).eval()
    inputs = torch.randn(2, 3, 32, 64), torch.rand(2, 1, 32, 64)
    with torch.no_grad():
        fast, slow = (network(*inputs).vision for network in (model, benchmark.straightforward(model)))
    torch.testing.assert_close(fast.refined_mask, slow.refined_mask, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-3, atol=1e-3)


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
    assert "vision.mask_embedding" in report["blocks"]["reading"]
    assert "| reading | prepared | 2 |" in capsys.readouterr().out


def test_loading_rendering_and_masks_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "MADE_WORDS", 6)
    path = tmp_path / "speed.json"
    quick = [*QUICK, "--json", str(path)]
    data = ["dataset.train.roots=[]", "dataset.train.batch_size=2", "dataset.multiprocessing_context=fork"]
    assert benchmark.main(["loading", "rendering", "--batches", "3", "--rendered", "2", *quick, *data]) == 0
    loading, rendering = json.loads(path.read_text())["rows"]
    assert (loading["form"], loading["words"], rendering["words"]) == ("1 worker", 6, 2)

    quick[1] = "configs/small_ssn.yaml"
    assert benchmark.main(["masks", "--straightforward", "--batch-size", "2", *quick, "model.ssn.areas=[65]"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["form"] for row in rows] == ["areas 65", "straightforward", benchmark.YARDSTICK]


def test_masks_one_by_one_are_those_of_the_segmenter():
    config = load_config("configs/small_ssn.yaml")
    ssn = build_ssn(config)
    images = benchmark.word_images(3)
    plain = benchmark.one_by_one(benchmark.straightforward(ssn), [65, 97], images)
    for expected, mask in zip(plain, Segmenter(ssn, [65, 97])(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(mask) / 255, expected, rtol=0, atol=1 / 510 + 1e-4)


def curve(task, seconds, words=None):
    """A curve from size -> seconds, of `words` words for every size or of as many as the size says."""
    return make_curve(task, "form", {size: (words or size, Timing([time])) for size, time in seconds.items()})


def test_steps_compare_growing_cost_with_growing_size():
    first, linear, square, free = curve("growth-words", {10: 1.0, 100: 10.0, 1000: 1000.0, 2000: 1000.0})
    assert (first.step, first.exponent) == (None, None)
    assert (linear.step, linear.exponent) == pytest.approx((1, 1))
    assert (square.step, square.exponent) == pytest.approx((10, 2))
    assert (free.step, free.exponent) == pytest.approx((0.5, 0), abs=1e-9)


def test_steps_of_workers_compare_their_time_together():
    # The first worker only takes over; the second halves the time, the third changes nothing, the fourth does harm.
    points = curve("growth-workers", {0: 4.0, 1: 4.0, 2: 2.0, 3: 2.0, 4: 3.0}, words=100)
    assert [point.step for point in points[1:]] == pytest.approx([1, 0.5, 1, 1.5])
    assert points[1].exponent is None
    assert [point.exponent for point in points[2:4]] == pytest.approx([0, 1], abs=1e-9)


def test_the_largest_step_is_judged():
    good, bad = curve("growth-words", {1: 1.0, 10: 10.5}), curve("growth-batch", {1: 1.0, 2: 1.0, 4: 3.0})
    assert largest_steps([*good, *bad]) == pytest.approx({"growth-words, form": 1.05, "growth-batch, form": 1.5})
    lines = growth_table([*good, *bad])[-2:]
    assert "1.05 x linear, no worse than linear" in lines[0]
    assert "1.50 x linear, worse than linear" in lines[1]
    assert largest_steps(curve("growth-words", {1: 1.0})) == {}


def measure_growth(tmp_path, *arguments):
    """Run growth tasks: form -> its points; a drawing of each task is made."""
    path, plots = tmp_path / "growth.json", tmp_path / "plots"
    assert benchmark.main([*arguments, "--json", str(path), "--plot", str(plots)]) == 0
    report = json.loads(path.read_text())
    forms = {}
    for point in report["growth"]:
        forms.setdefault((point["task"], point["form"]), []).append(point)
        assert (plots / f"{point['task']}.png").stat().st_size > 0
    assert set(report["largest_steps"]) == {", ".join(form) for form in forms}
    return forms


def test_growth_of_reading_and_of_opening_word_lists(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(benchmark, "LIST_SIZES", (10, 100))
    forms = measure_growth(tmp_path, "growth-batch", "growth-words", *QUICK, *SMALLER)
    assert [point["size"] for point in forms["growth-batch", "prepared"]] == [1, 2]
    for opening in ("first opening", "second opening"):
        small, large = forms["growth-words", opening]
        assert (small["words"], large["words"]) == (10, 100)
        assert small["step"] is None
        assert large["step"] == pytest.approx(large["seconds"] / small["seconds"] / 10)
    printed = capsys.readouterr().out
    assert "| growth-words | second opening | 100 |" in printed
    assert "largest step of growth-batch, prepared:" in printed


def test_growth_of_loading_renders_words_where_the_config_names_none(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "WORKERS", (0, 2))
    monkeypatch.setattr(benchmark, "MADE_WORDS", 6)
    data = ["dataset.train.roots=[]", "dataset.train.batch_size=2", "dataset.multiprocessing_context=fork"]
    points = measure_growth(tmp_path, "growth-workers", *QUICK, *data, "--batches", "3")["growth-workers", "loading"]
    assert [(point["size"], point["words"]) for point in points] == [(0, 6), (2, 8)]  # two workers: two batches each


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["flying"], "flying"),
        (["reading"], "--config"),
        (["growth-batch"], "--config"),
        (["rendering", "--plot", "plots"], "--plot"),
    ],
)
def test_mistakes_are_named(arguments, culprit):
    with pytest.raises(UserError, match=culprit):
        benchmark.parse_arguments(arguments)


def test_word_lists_and_workers_need_no_config():
    assert benchmark.parse_arguments(["growth-words", "growth-workers"]).config is None
