"""How weights came to be: command, versions, commit, device, hours and samples, as plain data for checkpoints."""

import functools
import json
import platform
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from utils import RENDER_SCHEME, write_atomically

ROOT = Path(__file__).resolve().parents[1]
PATH_START = rf"(?:(?<![\w.~:/])|(?<={RENDER_SCHEME}))"
# A path that starts at the root and names two folders or more; its last part says enough.
ABSOLUTE_FOLDERS = re.compile(PATH_START + r"/(?:[^/,'\"\]]+/)+")
ARGUMENT = re.compile(r"'[^']*'|[^\s']+")  # of a command that `shlex.join` made; between quotes paths may have spaces


class Provenance:
    """Counts the hours and samples of a run and remembers how it was started and resumed."""

    def __init__(self, device: torch.device, processes: int):
        here = re.compile(PATH_START + re.escape(f"{Path.cwd()}/"))
        start = {
            "iteration": 0,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            # Paths below the current folder are relative to it.
            "command": here.sub("", shlex.join(["python", *sys.argv])),
            **source(),
            "device": device_name(device),
            "processes": processes,
        }
        self.starts = [start]  # one for the start and for each resume
        self.samples = 0  # words (images of an SSN) seen over all processes, repeated ones included
        self._hours_before = 0.0
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return `hours` (evaluations included), `samples` and `starts`."""
        hours = self._hours_before + (time.monotonic() - self._since) / 3600
        return {"hours": hours, "samples": self.samples, "starts": [dict(start) for start in self.starts]}

    def resume(self, state: Mapping[str, Any], iteration: int) -> None:
        """Go on from a checkpoint; `state` is empty if it has no provenance."""
        self.starts[-1]["iteration"] = iteration
        self.starts = [*state.get("starts", []), self.starts[-1]]
        self.samples = int(state.get("samples", 0))
        self._hours_before = float(state.get("hours", 0.0))

    def write(self, path: Path) -> None:
        """Write `state_dict` as JSON."""
        write_atomically(path, json.dumps(self.state_dict(), indent=2, ensure_ascii=False) + "\n")


def without_folders(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance for files that are passed on: absolute paths in its commands keep their last part only."""

    def shorten(command: str) -> str:
        return ARGUMENT.sub(lambda argument: ABSOLUTE_FOLDERS.sub("", argument[0]), command)

    starts = [start | {"command": shorten(str(start.get("command")))} for start in provenance.get("starts", [])]
    return {**provenance, "starts": starts}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "cuda"  # tests fake tensors there
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()


@functools.cache
def source() -> dict[str, Any]:
    """Return `versions` of the program and its foundations, the git `commit` and whether it was `dirty`, else None."""
    project = ROOT / "pyproject.toml"
    ours = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] if project.is_file() else None
    versions = {
        "binet": ours,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    commit = _git_commit()
    dirty = None if commit is None else commit.endswith("-dirty")
    return {"versions": versions, "commit": commit and commit.removesuffix("-dirty"), "dirty": dirty}


def _git_commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` behind it if a tracked file has changed; None without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
