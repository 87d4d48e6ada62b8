"""Starts the processes that load data, and ends them with the process that they work for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset


def use_one_thread() -> None:
    """Let this worker process compute in one thread, and end it when its parent is gone, even by SIGKILL."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # torch's own watch misses the end of a parent under forkserver
    os._exit(1)


def initialize_worker(_worker: int) -> None:
    """Prepare a worker process of a data loader.

    A process group of its own keeps Ctrl-C and the launcher's signals away from it: the run ends its workers itself
    when its step is done. A scheduler sends its notice (SIGUSR1) to every process of a job.
    """
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    use_one_thread()


def make_loader(
    dataset: Dataset,
    collate: Callable[[Sequence[Any]], Any],
    *,
    num_workers: int = 0,
    multiprocessing_context: str | None = None,
    pin_memory: bool = False,
    **batching: Any,
) -> DataLoader:
    """Return a data loader over a `batch_sampler` (training), or over a `sampler` in batches of `batch_size`."""
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        worker_init_fn=initialize_worker,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # without it, each start of the workers would draw from torch's own generator
        **batching,
    )
