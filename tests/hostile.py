"""Hostile inputs: mutations of bytes, texts and nested values, and processes that run one case each under guard.

A case is made of (kind, number, seed) alone, so that one that fails can be run again by itself.
"""

import contextlib
import copy
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError

ROOT = Path(__file__).parents[1]

SECONDS = 10  # of processor time that a case may take; it is killed after twice that
IDLE_SECONDS = 300  # after which one that waits for something is killed: on a busy machine a second of work takes many
MEGABYTES = 1024  # that a case may take
HARD_LIMIT = 4 << 30  # bytes of addresses; a request beyond it fails, and counts as a fault wherever it is caught
LONGEST_LINE = 2000  # characters of a message that somebody will read

RESULT, SKIP, LINE, RAISED = "result", "skipped", "one line", "raised"  # as it should be
TRACEBACK, SLOW, MEMORY, KILLED, OVERWRITTEN = "traceback", "slow", "memory", "killed", "overwritten"
ENDINGS = (RESULT, SKIP, LINE, RAISED, TRACEBACK, SLOW, MEMORY, KILLED, OVERWRITTEN)
FAULTS = ENDINGS[4:]


# --- mutations --------------------------------------------------------------------------------------------------------


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes cut short, flipped, overwritten, repeated, emptied or made something else."""
    data, kind = bytearray(data), int(rng.integers(10))
    if not data or kind == 0:
        return bytes(rng.choice([b"", b"\0", b"\xff" * 16, b"GIF89a", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"a,b\n"]))
    if kind <= 2:
        return bytes(data[: int(rng.integers(len(data)))])
    if kind <= 6:  # the first bytes, where headers are, half of the time
        end = min(len(data), 64) if rng.random() < 0.5 else len(data)
        for place in rng.integers(end, size=int(rng.integers(1, 20))):
            data[place] ^= 1 << int(rng.integers(8))
        return bytes(data)
    start, stop = sorted(int(each) for each in rng.integers(len(data) + 1, size=2))
    if kind == 7:
        data[start:stop] = data[start:stop] * 2
    elif kind == 8:
        data[start : start + 8] = rng.choice([b"\xff", b"\0", b"\x7f"]) * 8
    else:
        data[start:start] = rng.bytes(int(rng.integers(1, 40)))
    return bytes(data)


HUGE_NUMBERS = ("99999999999999999999", "-1", "1e308", "nan", "0", "2147483648", "9" * 400, "٣", "0x10")
ODD_TEXTS = (
    "",
    "\0",
    "\ufeff",
    "\u202e",
    "𝔘" * 30,
    "\r",
    "\t\t\t",
    '"',
    '"""',
    "'",
    "../../x",
    "/etc/passwd",
    "é" * 9000,
)


def mutated_text(rng: np.random.Generator, text: str) -> bytes:
    """A text as bytes: in another encoding, with other numbers or signs, or mutated as bytes."""
    kind = int(rng.integers(8))
    if kind == 0:
        encoding = str(rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp037", "utf-8-sig", "utf-7"]))
        return text.encode(encoding, "replace")
    if kind == 1:
        return text.replace("\n", str(rng.choice(["\r", "\r\n", "\0", "\u2028", "\n\n"]))).encode()
    if kind == 2:
        places = [place for place, sign in enumerate(text) if sign.isdigit()]
        if places:
            place = int(rng.choice(places))
            return (text[:place] + str(rng.choice(HUGE_NUMBERS)) + text[place + 1 :]).encode()
    if kind == 3:
        place = int(rng.integers(len(text) + 1))
        return (text[:place] + str(rng.choice(ODD_TEXTS)) + text[place:]).encode()
    if kind == 4:  # bytes that are no UTF-8
        place, data = int(rng.integers(len(text) + 1)), text.encode()
        return data[:place] + bytes(rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"])) + data[place:]
    if kind == 5:  # a line many times, or a long one
        lines = text.splitlines() or [""]
        line = lines[int(rng.integers(len(lines)))]
        times = min(20000, 10**6 // (len(line) + 1))
        return (text + line * times if rng.random() < 0.5 else text + f"\n{line}" * (times // 10)).encode()
    return mutated(rng, text.encode())


def _cyclic() -> dict:
    value: dict = {}
    value["again"] = value
    return value


def _shared(depth: int = 64) -> list:
    """A list that would have 2 ** depth entries if each place were an object of its own."""
    value: list = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


_ODD = (None, True, False, -1, 0, 1, 10**9, 10**30, -(2**63), 1e-300, 1e300, float("nan"), float("inf"), "", "x", "1")
_ODD += ("x" * 10000, "\0", "null", "é\u2028", b"bytes", [], {}, [[]], [None], {"": 1}, {1: 2}, ["x"] * 5, [10**9] * 5)
_ODD += ([-1] * 5, [0, 0], [1e9, 1e9], {"model": {}}, (1, 2), 3j)
ODD_VALUES: tuple[Callable[[], Any], ...] = tuple(lambda value=value: copy.copy(value) for value in _ODD)


def mutated_value(rng: np.random.Generator, value: Any, odd: Sequence[Callable[[], Any]] = ODD_VALUES) -> Any:
    """Nested dicts and lists with some place that holds another value or type, is gone, or has a neighbour too many."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return odd[int(rng.integers(len(odd)))]()
        holder, name = places[int(rng.integers(len(places)))]
        kind = rng.random()
        if kind < 0.75:
            holder[name] = odd[int(rng.integers(len(odd)))]()
        elif kind < 0.9:
            del holder[name]
        elif isinstance(holder, dict):
            holder[("x", 7, None, "")[int(rng.integers(4))]] = holder[name]
        else:
            holder.extend([holder[name]] * int(rng.integers(1, 1000)))
    return value


def _places(value: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) in nested dicts and lists; what is there twice is walked once."""
    seen = set() if seen is None else seen
    seen.add(id(value))
    for name, each in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, name
        if isinstance(each, dict | list) and id(each) not in seen:
            yield from _places(each, seen)


SIDES = (0, 1, 8000, 65535, 2**31 - 1, 2**32 - 1)


def with_sides(rng: np.random.Generator, data: bytes) -> bytes:
    """An encoded image whose header declares sides of another size, mostly huge."""
    sides = [int(each) for each in rng.choice(SIDES, 2)]
    small = [min(each, 65535) for each in sides]
    if data.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", *sides) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data.startswith(b"GIF"):
        return data[:6] + struct.pack("<HH", *small) + data[10:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<II", *sides) + data[26:]
    if data.startswith((b"II*\0", b"MM\0*")):
        order = "<" if data.startswith(b"II") else ">"
        for tag, side in ((256, sides[0]), (257, sides[1])):
            place = data.find(struct.pack(order + "H", tag), 8)
            if place > 0:
                field = struct.pack(order + "HHII", tag, 4, 1, side)
                data = data[:place] + field + data[place + len(field) :]
        return data
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if data.startswith(b"\xff\xd8") and frame > 0:
        return data[: frame + 5] + struct.pack(">HH", *small) + data[frame + 9 :]
    return data[:16] + b"\xff" * 8 + data[24:]


# --- guarded processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a case ended, in a line of its own words, and what it took."""

    kind: str
    number: int
    ending: str
    detail: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.number}: {self.ending} ({self.seconds:.1f} s, {self.megabytes:.0f} MB) {self.detail}"


# Makes the input below a folder; what it returns is then run, and gives RESULT, SKIP or RAISED, or raises UserError.
Kind = Callable[[np.random.Generator, Path, Path], Callable[[], str]]


def run_cases(
    kinds: dict[str, Kind], cases: Sequence[tuple[str, int]], *, material: Path, scratch: Path, seed: int, workers: int
) -> list[Outcome]:
    """Run every (kind, number) in one of some processes; one that is killed or stuck costs its own case only.

    Args:
        kinds: functions that the processes can import.
        material: folder that the kinds read; nothing in it may change.
        scratch: an empty folder.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "torch._dynamo"])
    waiting, outcomes = list(reversed(cases)), []
    running: dict[Connection, tuple[Any, tuple[str, int] | None, tuple[float, float]]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        folder = scratch / f"worker-{len(outcomes)}-{len(running)}"
        process = context.Process(target=_work, args=(theirs, kinds, material, folder, seed))
        process.start()
        theirs.close()
        running[ours] = (process, None, (0.0, 0.0))

    def hand_out(pipe: Connection) -> None:
        process = running[pipe][0]
        case = waiting.pop() if waiting else None
        pipe.send(case)
        if case is None:
            process.join()
            del running[pipe]
        else:
            running[pipe] = (process, case, (time.monotonic(), _processor_time(process.pid)))

    for _ in range(workers):
        start()
    while running:
        ready = wait(list(running), timeout=1.0)
        for pipe in ready:
            process, case, _ = running[pipe]
            try:
                message = pipe.recv()
            except (EOFError, ConnectionError):
                process.join()
                del running[pipe]
                if case is None:
                    raise RuntimeError(f"a process ended at its start with {process.exitcode}") from None
                outcomes.append(Outcome(*case, KILLED, f"exit code {process.exitcode}"))
                start()
                continue
            if message is not None:
                outcomes.append(message)
            hand_out(pipe)
        for pipe, (process, case, (began, used)) in list(running.items()):
            if case is None:
                continue
            if _processor_time(process.pid) - used > 2 * SECONDS or time.monotonic() - began > IDLE_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                del running[pipe]
                outcomes.append(Outcome(*case, SLOW, "killed", 2 * SECONDS))
                start()
    return outcomes


def _processor_time(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(pipe: Connection, kinds: dict[str, Kind], material: Path, scratch: Path, seed: int) -> None:
    """Run the cases that come through a pipe until there are none."""
    import cv2
    import torch

    os.setpgrp()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    scratch.mkdir(parents=True)
    output = os.open(scratch.with_suffix(".txt"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HARD_LIMIT, used + HARD_LIMIT))
    pipe.send(None)
    while (case := pipe.recv()) is not None:
        kind, number = case
        folder = scratch / str(number)
        folder.mkdir()
        pipe.send(run_case(kinds[kind], kind, number, material=material, folder=folder, seed=seed, output=output))
        shutil.rmtree(folder, ignore_errors=True)


def run_case(
    function: Kind, kind: str, number: int, *, material: Path, folder: Path, seed: int, output: int | None = None
) -> Outcome:
    """Make and run one case in this process; `output` is where what it prints goes, if that is to be looked at."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), number])
    run = function(rng, folder, material)
    before = _contents(folder)
    if output is not None:
        os.ftruncate(output, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, began = _memory("VmRSS"), time.process_time()
    detail, chain = "", []
    try:
        ending = run()
    except UserError as error:
        ending, detail, chain = LINE, str(error), _chain(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        ending, detail, chain = TRACEBACK, f"{type(error).__name__}: {error} at {place}"[:400], _chain(error)
    seconds, megabytes = time.process_time() - began, (_memory("VmHWM") - resident) / 1024
    if ending == LINE and (problem := _no_line(detail)):
        ending, detail = TRACEBACK, f"{problem}: {detail[:400]!r}"
    if output is not None and b"Traceback" in (printed := os.pread(output, 1 << 20, 0)):
        ending, detail = TRACEBACK, printed[printed.index(b"Traceback") :].decode(errors="replace")[-400:]
    after = _contents(folder)
    if changed := [name for name, content in before.items() if after.get(name) != content]:
        ending, detail = OVERWRITTEN, f"{changed[:5]} after {ending} {detail[:200]}"
    if seconds > SECONDS:
        ending = SLOW
    if megabytes > MEGABYTES or any(_wants_memory(error) for error in chain):
        ending = MEMORY
    return Outcome(kind, number, ending, detail, seconds, megabytes)


def _no_line(message: str) -> str | None:
    """What keeps a message from being one line, or one for each problem of a file."""
    first, *others = message.split("\n")
    if not all(each.isprintable() for each in (first, *others)):
        return "signs that cannot be printed"
    if max(map(len, (first, *others))) > LONGEST_LINE:
        return "too long to be read"
    return (
        "many lines" if others and " problems in " not in first and not all(": " in each for each in others) else None
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _wants_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "Insufficient memory", "Cannot allocate memory")
    )


def _contents(folder: Path) -> dict[str, bytes]:
    """What the files of a folder hold, but for a run's own, which it goes on writing."""
    files = (each for each in folder.rglob("*") if each.is_file())
    named = {str(each.relative_to(folder)): each for each in files}
    return {name: each.read_bytes() for name, each in named.items() if not name.startswith("runs/")}


def _memory(field: str) -> int:
    """Kilobytes that this process has, or had at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by kind and ending, and the most that a case took."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    width = max(map(len, kinds))
    lines = [" ".join([f"{'':<{width}}  cases", *(f"{ending:>11}" for ending in ENDINGS), "  most s", " most MB"])]
    for kind in [*kinds, "all"]:
        chosen = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = [sum(outcome.ending == ending for outcome in chosen) for ending in ENDINGS]
        most = max(outcome.seconds for outcome in chosen), max(outcome.megabytes for outcome in chosen)
        row = [f"{kind:<{width}}  {len(chosen):5}", *(f"{count:11}" for count in counts)]
        lines.append(" ".join([*row, f"{most[0]:8.1f}", f"{most[1]:8.0f}"]))
    return "\n".join(lines)
