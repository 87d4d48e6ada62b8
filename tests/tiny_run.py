"""Whole runs of the command line on a network and data as small as they can be, for the tests of training.

`start` runs `main.py` in a process of its own, forked from one that has imported everything already, which takes a
second instead of ten. `shell` runs the real thing.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import yaml

from loading.lmdb_io import LmdbWriter

ROOT = Path(__file__).parents[1]
NAME = "tiny"
ITERATIONS = 16
WORDS = ["stop", "taxi", "exit", "open", "sale", "w0rld", "hello", "a", "77", "bus", "no", "cafe"]

NETWORK = {
    "name": "binet",
    "iter_size": 2,
    "vision": {
        "stem_width": 4,
        "widths": [4, 4, 8, 8, 16],
        "depths": [1, 1, 1, 1, 1],
        "backbone_ln": 1,
        "d_model": 16,
        "nhead": 2,
        "d_inner": 32,
        "segmentation": {
            "sft_blocks": 1,
            "sft_channels": 4,
            "condition_channels": 4,
            "hidden_channels": 4,
            "side_channels": 4,
        },
    },
    "language": {"num_layers": 1, "d_model": 16, "nhead": 2, "d_inner": 32},
    "alignment": {"d_model": 16},
}


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def image_and_mask(number: int) -> tuple[bytes, bytes]:
    """A word's image, 16 x 48 pixels, and its mask."""
    rng = np.random.default_rng(number)
    mask = np.zeros((16, 48), np.uint8)
    mask[4:12, 6 : 20 + number % 20] = 255
    image = np.where(mask[..., None] > 0, 220, rng.integers(0, 120, (16, 48, 3))).astype(np.uint8)
    return png(image), png(mask)


def write_words(folder: Path, name: str, count: int, *, first: int = 0) -> None:
    """A word LMDB `images/NAME` and its mask LMDB `masks/NAME`."""
    with LmdbWriter(folder / "images" / name) as images, LmdbWriter(folder / "masks" / name) as masks:
        for number in range(first, first + count):
            image, mask = image_and_mask(number)
            label = WORDS[number % len(WORDS)]
            images.append(image, label)
            masks.append(mask, label)


def write_config(folder: Path, *, train: int = 40, test: int = 11) -> Path:
    """Data and a config below `folder`; runs go to `folder/runs/NAME`."""
    write_words(folder, "train", train)
    write_words(folder, "test", test, first=1000)
    config = {
        "global": {"name": NAME, "workdir": str(folder / "runs"), "seed": 5},
        "dataset": {
            "train": {"roots": [str(folder / "images" / "train")], "batch_size": 8},
            "test": {"roots": [str(folder / "images" / "test")], "batch_size": 4},
            "masks": {"root": str(folder / "masks")},
            "max_length": 7,
            "image_height": 16,
            "image_width": 64,
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        },
        "training": {"iterations": ITERATIONS, "show_iters": 1, "eval_iters": 7, "save_iters": 3},
        "optimizer": {"lr": 0.01, "scheduler": {"type": "poly"}},
        "model": NETWORK,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# --- running ----------------------------------------------------------------------------------------------------------


class Run:
    """One command line in a process; `log` is all that it prints."""

    def __init__(self, process: multiprocessing.process.BaseProcess, log: Path):
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, seconds: float = 120) -> int:
        """Its exit status."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for something that the run does."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end or not self.process.is_alive():
                raise TimeoutError(f"it did not come to pass:\n{self.text()}")
            time.sleep(0.002)


def start(config: Path, *arguments: str, environment: dict[str, str] | None = None, limit: int | None = None) -> Run:
    """Start `main.py --config=... ARGUMENTS`.

    Args:
        limit: largest file that the run can write, bytes: a disk that is full.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "torch._dynamo"])  # which optimisers import
    number = len(list(config.parent.glob("log-*.txt")))
    log = config.parent / f"log-{number}.txt"
    log.touch()
    process = context.Process(
        target=_command_line, args=([f"--config={config}", *arguments], log, environment or {}, limit)
    )
    process.start()
    return Run(process, log)


def _command_line(arguments: list[str], log: Path, environment: dict[str, str], limit: int | None) -> None:
    import resource
    import signal

    import torch

    import main
    from utils import run_command_line

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not started by another
    os.environ.update(environment)
    torch.set_num_threads(1)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["main.py", *arguments]
    run_command_line(main.main)


def run(config: Path, *arguments: str, **options) -> Run:
    """`start` and wait for success."""
    started = start(config, *arguments, **options)
    status = started.wait()
    assert status == 0, started.text()
    return started


def start_processes(config: Path, world_size: int, *arguments: str) -> list[Run]:
    """As torchrun would: some processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(config, *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_processes(config: Path, world_size: int, *arguments: str) -> list[Run]:
    """Some processes of one run, waited for."""
    ranks = start_processes(config, world_size, *arguments)
    for each in ranks:
        assert each.wait() == 0, "\n".join(rank.text() for rank in ranks)
    return ranks


def shell(*command: str, **options) -> subprocess.Popen:
    """A real command in the repository, output captured as text."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


# --- what a run left --------------------------------------------------------------------------------------------------


def folder_of(config: Path, name: str = NAME) -> Path:
    return config.parent / "runs" / name


def history_text(config: Path, name: str = NAME) -> str:
    path = folder_of(config, name) / "history.jsonl"
    return path.read_text() if path.exists() else ""


def history(config: Path, name: str = NAME) -> list[dict]:
    return [json.loads(line) for line in history_text(config, name).splitlines()]


def losses(config: Path, name: str = NAME) -> list[float]:
    return [entry["loss"] for entry in history(config, name)]
