"""Put a trained recogniser and the SSN that predicts its masks into one file, all that demo.py and Reader need."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from bundle import save_bundle
from tools.support import make_parser, positive, print_summary, refuse_existing
from utils import run_command_line

EXAMPLE = """  python tools/bundle_weights.py --recogniser workdir/small/best-small.pth \\
      --ssn workdir/small-ssn/best-small-ssn.pth --output weights/binet-small.pth --half"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--recogniser", required=True, metavar="FILE", help="recogniser's checkpoint")
    parser.add_argument("--ssn", metavar="FILE", help="SSN's checkpoint; leave it out for a network without masks")
    parser.add_argument("--areas", type=positive, nargs="+", default=(), metavar="SIDE", help="default: the SSN's own")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--half", action="store_true", help="store matrices and kernels in 16 bits: half the size")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    output = options.output
    refuse_existing(output, overwrite=options.overwrite)
    content = save_bundle(output, options.recogniser, options.ssn, areas=options.areas, half=options.half)
    parts = {"recogniser": content["model"], "SSN": content.get("ssn", {}).get("model", {})}
    counts = {f"{name}: numbers": sum(tensor.numel() for tensor in part.values()) for name, part in parts.items()}
    print_summary(f"wrote {output}", {**counts, "bytes": output.stat().st_size})
    return 0


if __name__ == "__main__":
    run_command_line(main)
