"""Time, memory and arithmetic of something that can be called: what the benchmark measures with."""

import contextlib
import ctypes
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Modules that are opened up in the table of blocks; all others count as one block.
OPENED = {"", "vision", "vision.backbone", "backbone", "hrnet"}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Timing:
    """Seconds of every run of one form, in order; `median` is what is reported."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median: how far to trust the median."""
        return (max(self.runs) - min(self.runs)) / self.median


@dataclass
class Measurement:
    """One form of one task: `words` are what was worked on in `seconds`; `spread` as in `Timing`."""

    task: str
    form: str
    words: int
    seconds: float
    spread: float = 0.0

    @property
    def rate(self) -> float:
        """Words a second."""
        return self.words / self.seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def time_interleaved(
    forms: Mapping[str, Callable[[], object]], *, device: torch.device, runs: int = 5, warm_up: int = 1
) -> dict[str, Timing]:
    """Time every form once in each round, so that whatever else the machine does falls on all of them alike."""
    for function in forms.values():
        for _ in range(warm_up):
            function()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(runs):
        for name, function in forms.items():
            times[name].append(seconds_of(function, device))
    return {name: Timing(each) for name, each in times.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """MiB that one call needs on top of what is held before it; None where the system does not tell.

    On a GPU what the allocator hands out; on a CPU the largest resident size of the process (Linux).
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else memory kept from earlier calls is used again and not seen
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        function()
        return (_resident("VmHWM") - before) / 2**10
    except OSError:
        return None


def _resident(field: str) -> int:
    """KiB of one line of the process's status."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations (a multiplication and its addition are two) of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype, *, runs: int = 5) -> float:
    """FLOP a second of a large square matrix product: the machine's measured best."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = time_interleaved({"product": lambda: a @ b}, device=device, runs=runs)["product"]
    return 2 * size**3 / timing.median


class BlockClock:
    """Seconds that a network spends in each of its blocks, forward; calls of a compiled network are not seen."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._blocks = dict(blocks_of(network))
        self._started: dict[str, float] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the calls inside the `with` block."""
        handles = []
        for name, block in self._blocks.items():
            handles.append(block.register_forward_pre_hook(lambda *_, name=name: self._start(name)))
            handles.append(block.register_forward_hook(lambda *_, name=name: self._stop(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, name: str) -> None:
        synchronize(self.device)
        self._started[name] = time.perf_counter()

    def _stop(self, name: str) -> None:
        synchronize(self.device)
        self.seconds[name] += time.perf_counter() - self._started[name]


def blocks_of(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the blocks of a network: its children, those in OPENED replaced by theirs."""
    for name, child in network.named_children():
        path = f"{prefix}.{name}".lstrip(".")
        if path in OPENED:
            yield from blocks_of(child, path)
        else:
            yield path, child


def shares(
    clock: BlockClock, function: Callable[[], object], device: torch.device, *, runs: int = 5
) -> dict[str, float]:
    """Share of a call's time in the forward of each block, [0, 1], largest first; `(outside)` is all the rest."""
    function()
    with clock.running():
        total = sum(seconds_of(function, device) for _ in range(runs))
    result = {name: seconds / total for name, seconds in clock.seconds.items() if seconds > 0}
    result["(outside)"] = max(0.0, 1 - sum(result.values()))
    return dict(sorted(result.items(), key=lambda entry: -entry[1]))
