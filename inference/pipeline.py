"""Work on several batches at a time: one thread for each, results in order."""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@functools.cache
def single_threads(count: int) -> ThreadPoolExecutor | None:
    """Return the process's pool of threads for work side by side, each computing alone; None for a count of one.

    torch lets a thread have a number of its own only by `set_num_threads`, which is the number of threads to come, too.
    So it is called once for each of these threads, as they start together, and set back at once.
    """
    if count < 2:
        return None
    before = torch.get_num_threads()
    started = threading.Barrier(count)

    def compute_alone() -> None:
        torch.get_num_threads()  # else torch gives this thread the common number when it first computes
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="side-by-side", initializer=compute_alone)
    for each in [pool.submit(int) for _ in range(count)]:
        each.result()
    torch.set_num_threads(before)
    return pool


os.register_at_fork(after_in_child=single_threads.cache_clear)  # threads do not survive a fork


def in_order(function: Callable[[T], R], items: Iterable[T], pool: Executor | None, *, ahead: int) -> Iterator[R]:
    """Yield `function(item)` of each item in order, computed in a pool; items are drawn in the caller's thread.

    Args:
        pool: None computes each result when it is asked for.
        ahead: results that are computed, or wait to be taken, before the next one is asked for.
    """
    if pool is None:
        yield from map(function, items)
        return
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # nobody asks for the others
        for each in pending:
            each.cancel()
