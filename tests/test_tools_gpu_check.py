"""tools/gpu_check.py: every part has its line, and without a GPU those that need one are listed as left out."""

import time

import pytest
import torch

from tests import test_resume
from tools import gpu_check

NEED_A_GPU = {
    *(("tests that need a GPU", form) for form in ("eager", "compiled")),
    ("training, small", "fp16"),
    ("reading", "bf16, compiled"),
    *(("training, small", f"bf16, compiled, {mode}") for mode in ("default", "reduce-overhead")),
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
    for name in ("tests", "speed"):
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
    assert {("speed", "training", "small", "bf16"), ("speed", "masks", "small SSN", "bf16")} <= set(parts)
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
    assert lines["reading", "bf16"][1] == "ok"


def test_no_part_starts_when_the_time_is_over(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.time, "monotonic", iter(range(0, 100_000, 100)).__next__)
    gpu_check.main(["--output", str(tmp_path / "check.md"), "--seconds", "450"])
    verdicts = lines_of(tmp_path / "check.md")
    assert verdicts["training, small", "bf16"][1] == "ok"
    assert verdicts["reading", "bf16"] == ("no time was left; give more --seconds", "left out")
    assert verdicts["training, small", "fp16"] == ("needs a GPU", "left out")


def test_tests_that_the_end_of_the_time_stops_have_not_failed(tmp_path):
    check = gpu_check.GpuCheck(torch.device("cpu"), tmp_path, time.monotonic() + 2)
    (tmp_path / "test_it.py").write_text("import time\n\ndef test_slow(): time.sleep(60)\n")
    check.part("slow", "eager", check.tests, str(tmp_path / "test_it.py"))
    assert check.rows == [("slow", "eager", "no time was left; give more --seconds", "left out")]


def test_a_failed_test_is_named(tmp_path):
    check = gpu_check.GpuCheck(torch.device("cpu"), tmp_path, time.monotonic() + 60)
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    result, verdict = check.tests(str(tmp_path / "test_it.py"))
    assert verdict == "failed"
    assert "1 failed, 1 passed" in result
    assert "::test_bad" in result
    assert check.tests(str(tmp_path / "test_it.py"), "-k", "good")[1] == "ok"


def test_a_row_on_a_gpu_is_told_in_words():
    row = {"task": "training", "form": "autocast", "rate": 4000.0, "seconds": 0.024}
    cpu = row | {"matrix_share": None, "launches": None, "host": None}
    gpu = row | {"matrix_share": 0.35, "launches": 4769, "host": 0.01}
    assert gpu_check.shown(cpu) == "training, autocast: 4e+03 words/s"
    assert gpu_check.shown(gpu).endswith("35% of the matrix rate, 4769 launches, host 10.0 of 24.0 ms")


@pytest.mark.slow
def test_the_real_parts_run_through_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "pick_device", lambda: torch.device("cpu"))
    gpu_check.main(["--output", str(tmp_path / "check.md")])
    lines = lines_of(tmp_path / "check.md")
    assert {verdict for _, verdict in lines.values()} == {"ok", "measured", "left out"}
    assert lines["kill and resume", "deterministic"][1] == "ok"
