"""Print what a checkpoint holds and how it came to be: form, network, parameters, scores, command, versions, hours."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from torch import Tensor

from engine.checkpoints import checkpoint_weights, read_checkpoint
from tools.support import make_parser, print_summary
from utils import printable, run_command_line

EXAMPLE = "  python tools/show_checkpoint.py weights/binet-small.pth"
BUFFERS = {"running_mean", "running_var", "num_batches_tracked", "pe"}  # last part of the names of what is not learnt
UNKNOWN = "not known"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    state = read_checkpoint(options.checkpoint)
    print_summary(f"{options.checkpoint}: {form_of(state)}", contents(state))
    print_summary("parameters", parameter_counts(state))
    show_provenance("training", state)
    if "ssn" in state:
        show_provenance("training of the SSN", section(state, "ssn"))
    return 0


def form_of(state: Mapping[str, Any]) -> str:
    """Return what kind of checkpoint it is."""
    if "training" in state:
        return "a checkpoint of training, which can be resumed"
    if "ssn" in state:
        return "a recogniser with the SSN that makes its masks"
    if "config" in state:
        return "weights with their config"
    if "opt" in state:
        return "the published form (fastai), weights and optimiser"
    return "weights alone" if "model" in state else "a plain state_dict"


def contents(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return network, characters, iteration and scores."""
    name = section(section(state, "config"), "model").get("name")
    charset = state.get("charset")
    iteration = section(state, "training").get("iteration", state.get("iteration"))
    weighted = section(section(state, "scores"), "weighted")
    scores = {f"weighted {metric}": value for metric, value in weighted.items() if metric != "samples"}
    return {
        "network": known(name),
        "characters": len(charset) if isinstance(charset, str | list) else UNKNOWN,
        "iteration": known(iteration),
        "words or images scored": known(weighted.get("samples")),
        **{printable(str(metric)): known(value) for metric, value in scores.items()},
    }


def parameter_counts(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of parameters of each sub-model and in all; the SSN of a bundle is one of them."""
    counts: Counter[str] = Counter()
    for name, tensor in checkpoint_weights(state).items():
        counts[printable(name.split(".")[0])] += learnt(name, tensor)
    if "ssn" in state:
        counts["ssn"] = sum(learnt(*each) for each in checkpoint_weights(section(state, "ssn")).items())
    counts["all"] = counts.total()
    return dict(counts)


def learnt(name: str, tensor: Tensor) -> int:
    """Return the number of parameters in a tensor; none if it is a buffer."""
    return 0 if name.split(".")[-1] in BUFFERS else tensor.numel()


def show_provenance(heading: str, state: Mapping[str, Any]) -> None:
    """Print hours and samples, and how the run was started and resumed."""
    carried = section(state, "provenance")
    if not carried:
        print(f"{heading}\n  {UNKNOWN}: command, versions, commit, device, hours, words seen")
        return
    hours, samples = carried.get("hours"), carried.get("samples")
    print_summary(heading, {"hours": known(hours), "words or images seen": known(samples)})
    starts = carried.get("starts")
    starts = [start for start in starts if isinstance(start, Mapping)] if isinstance(starts, list) else []
    for start in starts:
        versions = ", ".join(f"{name} {version}" for name, version in section(start, "versions").items())
        commit = known(start.get("commit"))
        state_of_tree = {True: " with changes", False: " without changes"}.get(start.get("dirty"), "")
        rows = {
            "at iteration": known(start.get("iteration")),
            "time": known(start.get("time")),
            "command": known(start.get("command")),
            "versions": printable(versions) or UNKNOWN,
            "commit": commit + state_of_tree,
            "device": known(start.get("device")),
            "processes": known(start.get("processes")),
        }
        print_summary("resumed" if start.get("iteration") else "started", rows)
    if starts and starts[0].get("iteration"):
        print("  hours, words and commands before that are not known")


def section(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping inside a checkpoint; empty if there is none."""
    value = state.get(name)
    return value if isinstance(value, Mapping) else {}


def known(value: Any) -> Any:
    """Return a value as it is printed."""
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4f}"
    return value if isinstance(value, int) else printable(str(value))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """See `--help`."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("checkpoint", metavar="FILE", help="any checkpoint: ours, a bundle, the published form")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command_line(main)
