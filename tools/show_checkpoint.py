"""Print what a checkpoint holds and how it came to be: form, network, parameters, scores, command, versions, hours."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from engine.checkpoints import checkpoint_weights, read_checkpoint
from tools.support import make_parser, print_summary
from utils import printable, run_command_line

EXAMPLE = "  python tools/show_checkpoint.py weights/binet-small.pth"
BUFFERS = {"running_mean", "running_var", "num_batches_tracked", "pe"}  # last part of the names of what is not learnt
UNKNOWN = "not known"
FORMS = {  # of checkpoints that have such a key, the first one of these
    "training": "a checkpoint of training, which can be resumed",
    "ssn": "a recogniser with the SSN that makes its masks",
    "config": "weights with their config",
    "opt": "the published form (fastai), weights and optimiser",
    "model": "weights alone",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("checkpoint", metavar="FILE", help="any checkpoint: ours, a bundle, the published form")
    path = parser.parse_args(arguments).checkpoint
    state = read_checkpoint(path)
    charset, name = state.get("charset"), section(section(state, "config"), "model").get("name", UNKNOWN)
    iteration = section(state, "training").get("iteration", state.get("iteration", UNKNOWN))
    facts = {
        "network": printable(str(name)),
        "characters": len(charset) if isinstance(charset, str | list) else UNKNOWN,
        "iteration": printable(str(iteration)),
    }
    form = next((form for key, form in FORMS.items() if key in state), "a plain state_dict")
    print_summary(f"{path}: {form}", facts)
    print_summary("parameters", parameter_counts(state))
    show("scores", state.get("scores"))
    show("training", state.get("provenance"))
    if "ssn" in state:
        show("training of the SSN", section(state, "ssn").get("provenance"))
    return 0


def parameter_counts(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of parameters of each sub-model and in all; the SSN of a bundle is one of them."""
    counts: Counter[str] = Counter()
    for part, content in ("", state), ("ssn", section(state, "ssn")):
        for name, tensor in checkpoint_weights(content).items():
            if name.split(".")[-1] not in BUFFERS:
                counts[part or printable(name.split(".")[0])] += tensor.numel()
    counts["all"] = counts.total()
    return dict(counts)


def show(heading: str, content: Any) -> None:
    """Print a part of a checkpoint that holds plain data, as JSON."""
    text = json.dumps(content, indent=2, default=str) if content else UNKNOWN
    print(heading, *(f"  {printable(line)}" for line in text.splitlines()), sep="\n")


def section(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping inside a checkpoint; empty if there is none."""
    value = state.get(name)
    return value if isinstance(value, Mapping) else {}


if __name__ == "__main__":
    run_command_line(main)
