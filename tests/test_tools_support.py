"""What all tools share: worker processes, the list of rejected entries."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.support import RejectionLog, inside, map_in_processes
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def _times(factor, number):
    return factor * number


def _die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _fail(number):
    raise KeyError(number)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_keep_the_order(workers):
    results = map_in_processes(functools.partial(_times, 3), range(50), workers=workers, chunk_size=4)
    assert list(results) == list(range(0, 150, 3))


def test_items_may_be_endless():
    results = map_in_processes(functools.partial(_times, 1), itertools.count(), workers=2, chunk_size=3)
    assert list(itertools.islice(results, 10)) == list(range(10))
    results.close()


def test_killed_worker_is_a_clear_error():
    with pytest.raises(UserError, match="worker process was killed"):
        list(map_in_processes(_die, range(20), workers=2, chunk_size=1))


def test_error_in_a_worker_arrives_as_it_is():
    with pytest.raises(KeyError):
        list(map_in_processes(_fail, range(3), workers=2, chunk_size=1))


def test_workers_do_not_outlive_a_killed_tool():
    code = """
import os, signal, sys
from tools.support import map_in_processes
results = map_in_processes(abs, range(10**9), workers=2, chunk_size=1)
next(results)
import multiprocessing
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    workers = result.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_log_has_one_line_an_entry_whatever_its_characters(tmp_path):
    with RejectionLog(tmp_path / "sub" / "log.tsv") as log:
        log.add("a\tb\nc\udcff", "reason", "tab\there")
        log.add("image", "other", words=7)
    assert log.counts == {"reason": 1, "other": 7}
    assert (tmp_path / "sub" / "log.tsv").read_text(encoding="utf-8").splitlines() == [
        "entry\treason\tdetail",
        r"a\tb\nc\udcff" + "\treason\t" + r"tab\there",
        "image\tother\t",
    ]


def test_log_of_nothing_removes_that_of_an_earlier_run(tmp_path):
    (tmp_path / "log.tsv").write_text("entry\treason\tdetail\nold\tone\t\n")
    with RejectionLog(tmp_path / "log.tsv"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "/data/set/a.png"),
        ("./b/../a.png", "/data/set/a.png"),
        ("/data/set/a.png", "/data/set/a.png"),
        ("../set/a.png", "/data/set/a.png"),
        ("../a.png", None),
        ("../set2/a.png", None),
        ("b/../../a.png", None),
        ("/etc/passwd", None),
        (".", None),
        ("", None),
    ],
)
def test_paths_that_climb_out_are_refused(name, expected):
    assert inside("/data/set", name) == expected
