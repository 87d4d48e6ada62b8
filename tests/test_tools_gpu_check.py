"""tools/gpu_check.py: every part has its line, and without a GPU those that need one are listed as left out."""

import pytest
import torch

from tests import test_resume
from tools import gpu_check

NEED_A_GPU = {
    ("tests that need a GPU", "pytest -m gpu"),
    ("small network", "fp16"),
    *(("full size", form) for form in ("fp32", "bf16", "fp16")),
    ("small network", "bf16, compiled"),
    ("reading", "bf16, compiled"),
    *(("full size", f"bf16, compiled, {mode}") for mode in ("default", "reduce-overhead")),
}


@pytest.fixture
def parts(monkeypatch):
    """Parts that take no time; those that were done."""
    done = []

    def part(name):
        def work(self, *arguments, **named):
            done.append((name, *arguments))
            return f"{name} | done", "ok"

        return work

    monkeypatch.setattr(gpu_check.render_words, "main", lambda arguments: 0)
    monkeypatch.setattr(gpu_check, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for name in ("tests", "training", "speed"):
        monkeypatch.setattr(gpu_check.GpuCheck, name, part(name))
    return done


def lines_of(path):
    lines = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("| ")]
    rows = [map(str.strip, line) for line in lines[2:]]
    return {(part, form): (result, verdict) for part, form, result, verdict in rows}


def test_without_a_gpu_the_parts_that_need_one_are_named(parts, tmp_path):
    assert gpu_check.main(["--output", str(tmp_path / "check.md")]) == 0
    lines = lines_of(tmp_path / "check.md")
    assert {key for key, value in lines.items() if value == ("needs a GPU", "left out")} == NEED_A_GPU
    assert len(lines) - len(NEED_A_GPU) == len(parts)
    assert {("training", "small", "bf16"), ("speed", "masks", "small SSN", "bf16")} <= set(parts)
    tests = [selected for name, selected, *_ in parts if name == "tests"]
    assert [getattr(test_resume, each.removeprefix("tests/test_resume.py::")) for each in tests]
    assert len(tests) == 2


def test_a_part_that_fails_changes_its_line_and_the_exit_status(parts, tmp_path, monkeypatch):
    def fail(self, *arguments):
        raise ZeroDivisionError("no\nwords")

    monkeypatch.setattr(gpu_check.GpuCheck, "tests", fail)
    assert gpu_check.main(["--output", str(tmp_path / "check.md")]) == 1
    lines = lines_of(tmp_path / "check.md")
    assert lines["two equal runs", "deterministic"] == ("ZeroDivisionError: no", "failed")
    assert lines["reading", "fp32"][1] == "ok"


def test_no_part_starts_when_the_time_is_over(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.time, "monotonic", iter(range(0, 100_000, 100)).__next__)
    gpu_check.main(["--output", str(tmp_path / "check.md"), "--seconds", "450"])
    verdicts = lines_of(tmp_path / "check.md")
    assert verdicts["small network", "fp32"][1] == "ok"
    assert verdicts["reading", "bf16"] == ("no time was left; give more --seconds", "left out")
    assert verdicts["full size", "fp32"] == ("needs a GPU", "left out")


def test_a_loss_far_from_fp32s_fails(tmp_path, monkeypatch):
    check = gpu_check.GpuCheck(torch.device("cpu"), gpu_check.ON_CPU, tmp_path, float("inf"))
    losses = {"fp32": 2.0, "bf16": 2.03, "fp16": 2.1}

    class Trainer:
        def __init__(self, loss):
            self.loss = torch.tensor(loss)

        def _step(self, batch, waited):
            return type("Step", (), {"terms": {"total": self.loss}})

    monkeypatch.setattr(check, "_trainer", lambda _, key, **__: (Trainer(losses[key.partition("=")[2]]), [[0] * 4]))
    monkeypatch.setattr(check, "_flops_of_a_word", lambda network: 1e9)
    monkeypatch.setattr(gpu_check.benchmark, "matrix_rate", lambda device, dtype: 1e12)
    verdicts = {form: check.training("small", form) for form in losses}
    assert verdicts["fp32"][1] == "measured"
    assert verdicts["bf16"][1] == "ok"
    assert "differs by 1.50 %" in verdicts["bf16"][0]
    assert verdicts["fp16"][1] == "failed"


@pytest.mark.slow
def test_the_real_parts_run_through_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "pick_device", lambda: torch.device("cpu"))
    gpu_check.main(["--output", str(tmp_path / "check.md")])
    lines = lines_of(tmp_path / "check.md")
    assert {verdict for _, verdict in lines.values()} == {"ok", "measured", "left out"}
    assert lines["kill and resume", "deterministic"][1] == "ok"
