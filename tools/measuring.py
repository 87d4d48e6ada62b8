"""Time, memory and arithmetic of calls: what tools/benchmark.py and tools/gpu_check.py measure with."""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, Timer, timer
from torch.utils.flop_counter import FlopCounterMode

ROUND_SECONDS = 0.2  # a round repeats a short call for so long
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Call = Callable[[], object]


def time_in_turns(calls: Mapping[str, Call], *, runs: int = 5) -> dict[str, Measurement]:
    """Time all calls in each of `runs` rounds, so that other load on the machine falls on all of them alike.

    Each is called at least once more before it is timed, and a GPU is waited for. `median` and `iqr` of a measurement
    are over the calls of all rounds.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    rounds = [
        {name: each.blocked_autorange(min_run_time=ROUND_SECONDS) for name, each in timers.items()} for _ in range(runs)
    ]
    return {name: Measurement.merge([found[name] for found in rounds])[0] for name in calls}


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Return the MiB that a call needs on top of what is held before it; None where the system does not tell.

    On a GPU this is what torch's allocator hands out, on a CPU the largest resident size of the process (Linux).
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else memory kept from earlier calls is used again and not seen
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        call()
        return (_resident("VmHWM") - before) / 2**10
    except OSError:
        return None


def _resident(field: str) -> int:
    """Return the KiB of one line of the process's status."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def count_flops(call: Call) -> dict[str, int]:
    """Return the floating-point operations of matrix multiplications and convolutions, a multiply-add counting as two.

    Keys are `Global` for all of them, and the names of the modules that were called, such as `BINet.vision.backbone`.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()} or {"Global": 0}


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix multiplication: the best that this machine can do."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_in_turns({"product": lambda: a @ b})["product"].median


def count_launches(call: Call) -> int:
    """Return how many kernels and graphs the host launches on a GPU in a call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        timer()  # waits for the GPU
    return sum(event.count for event in found.key_averages() if event.key in LAUNCHES)


def host_seconds(call: Call) -> tuple[float, float]:
    """Return the seconds until the host is done with a call, and until the device is."""
    start = timer()
    call()
    host = time.perf_counter()
    return host - start, timer() - start
