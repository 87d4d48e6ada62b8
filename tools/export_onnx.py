"""Export a recogniser to ONNX and its SSN, which makes the masks, as a second graph.

Recogniser (--output), inputs:
  image   float32 (N, 3, 32, 128): RGB image, resized as below, divided by 255, minus mean (0.485, 0.456, 0.406),
          divided by deviation (0.229, 0.224, 0.225)
  mask    float32 (N, 1, 32, 128) in [0, 1], 1 = text, resized alike; only for networks that read with masks
Outputs:
  logits     float32 (N, steps, classes): class 0 ends the text, class i is the i-th character of the charset; take the
             largest class of each step up to the first 0
  attention  float32 (N, steps, h, w): where the vision model looked at each step
Images and masks are resized bilinearly; `fit` in the metadata says how:
  stretch  to the network's size
  left     until one side fits; the rest, on the right or below, is black, mask 0
  centre   until one side fits, in the middle; the borders are replicated
SSN (--ssn-output), input:
  image             float32 (N, 3, H, W): RGB images of one size, 0 to 255
Output:
  text_probability  float32 (N, 1, H, W); the recogniser's mask is made of it in 8 bits, as round(255 * p)
N, H and W are free. Charset, sizes, fit, mean, deviation, areas and opset are in the metadata of the files.
tools/read_with_onnx.py is an example that reads with both.
"""

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import torch
from torch import Tensor, nn

from builders import checked_model_eval
from bundle import Bundle, load_bundle, load_ssn
from config import load_config
from inference.segmenter import fold_batch_norms
from loading.batches import IMAGENET_MEAN, IMAGENET_STD
from modules.outputs import chosen_logits
from modules.ssn import SSN
from tools.support import make_parser, print_summary, refuse_existing
from utils import UserError, run_command_line, write_atomically

EXAMPLE = "  python tools/export_onnx.py --checkpoint weights/binet-small.pth --output binet.onnx --ssn-output ssn.onnx"

PACKAGES = ("onnx", "onnxscript")  # of requirements-dev.txt
OPSET = 18

ModelProto = Any  # onnx.ModelProto; the package may be missing

# For each area: `network_size`, the image resized to it, SSN (its nodes replace NETWORK), the probability resized back;
# then their mean. Sizes are computed in double precision, as Python does.
SSN_GRAPH = """
ssn (float[n, 3, height, width] image) => (float[n, 1, height, width] text_probability)
<int64[1] one = {1}, int64[1] three = {3}, int64 count = {COUNT}, double[COUNT] areas = {AREAS},
 double step = {32.0}, float zero = {0.0},
 float[1, 3, 1, 1] mean = {MEAN}, float[1, 3, 1, 1] deviation = {DEVIATION}>
{
  batch = Shape <start = 0, end = 1> (image)
  size = Shape <start = 2, end = 4> (image)
  mask_shape = Concat <axis = 0> (batch, one, size)
  sides = Cast <to = 11> (size)
  pixels = ReduceProd <keepdims = 0> (sides)
  nothing = Expand (zero, mask_shape)
  sum = Loop (count, , nothing) <body = at_area (int64 i, bool before, float[n, 1, height, width] sum_before)
    => (bool go_on, float[n, 1, height, width] sum_after)
  {
    go_on = Identity (before)
    side = Gather (areas, i)
    area = Mul (side, side)
    squared_ratio = Div (area, pixels)
    ratio = Sqrt (squared_ratio)
    exact = Mul (sides, ratio)
    whole = Floor (exact)
    steps = Div (whole, step)
    whole_steps = Floor (steps)
    multiples = Mul (whole_steps, step)
    rounded = Cast <to = 7> (multiples)
    network_size = Add (rounded, one)
    network_shape = Concat <axis = 0> (batch, three, network_size)
    resized = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (image, , , network_shape)
    centred = Sub (resized, mean)
    ssn_image = Div (centred, deviation)
    ssn_text = NETWORK (ssn_image)
    in_place = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (ssn_text, , , mask_shape)
    sum_after = Add (sum_before, in_place)
  }>
  number = Cast <to = 1> (count)
  text_probability = Div (sum, number)
}
"""


class Recogniser(nn.Module):
    """A recogniser that returns the logits of one sub-model, and attention."""

    def __init__(self, model: nn.Module, model_eval: str) -> None:
        super().__init__()
        self.model = model
        self.model_eval = model_eval

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W), (N, 1, H, W) -> logits (N, T, C), attention (N, T, h, w)."""
        output = self.model(image, mask)
        return chosen_logits(output, self.model_eval), output.vision.attention


class NetworkSSN(nn.Module):
    """Normalised images of 32 k + 1 pixels a side -> probability of text at a quarter of their size."""

    def __init__(self, ssn: SSN) -> None:
        super().__init__()
        self.ssn = fold_batch_norms(copy.deepcopy(ssn))

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, 32 k + 1, 32 l + 1) -> (N, 1, 8 k + 1, 8 l + 1)."""
        return self.ssn.probability(image)


def export_recogniser(bundle: Bundle, path: Path, *, model_eval: str) -> None:
    """Write the recogniser."""
    height, width = bundle.config.dataset.image_size
    examples = {"image": torch.zeros(2, 3, height, width)}
    if bundle.config.model.takes_masks:
        examples["mask"] = torch.rand(2, 1, height, width)
    batch = {0: torch.export.Dim("batch", min=1)}
    graph = exported(Recogniser(bundle.model, model_eval), examples, ("logits", "attention"), [batch] * len(examples))
    facts = {
        "charset": bundle.charset.characters,
        "model_eval": model_eval,
        "image_size": list(bundle.config.dataset.image_size),
        "fit": bundle.config.dataset.fit,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    store(graph, path, facts)


def export_ssn(ssn: SSN, areas: Sequence[int], path: Path) -> None:
    """Write SSN with the whole procedure of `inference.segmenter` at these areas, but for the rounding to 8 bits."""
    sides = {axis: 32 * torch.export.Dim(name, min=1, max=128) + 1 for axis, name in ((2, "rows"), (3, "columns"))}
    shape = {0: torch.export.Dim("batch", min=1), **sides}
    network = exported(NetworkSSN(ssn), {"image": torch.rand(2, 3, 97, 193)}, ("text",), [shape])
    store(around_ssn(network, areas), path, {"areas": list(areas)})


def exported(
    network: nn.Module, examples: dict[str, Tensor], outputs: Sequence[str], free: Sequence[dict[int, Any]]
) -> ModelProto:
    """Return the graph of a network with named inputs; `free` has the axes that may vary of each."""
    noise = io.StringIO()  # the exporter reports its steps on stdout
    with contextlib.redirect_stdout(noise), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            tuple(examples.values()),
            input_names=list(examples),
            output_names=list(outputs),
            dynamic_shapes=tuple(free),
            opset_version=OPSET,
            dynamo=True,
        )
    return program.model_proto


def around_ssn(network: ModelProto, areas: Sequence[int]) -> ModelProto:
    """Return SSN_GRAPH with the nodes and weights of the network inside."""
    import onnx.compose
    import onnx.parser

    def numbers(values: Sequence[float]) -> str:
        return ", ".join(map(str, values))

    text = SSN_GRAPH.replace("COUNT", str(len(areas))).replace("AREAS", numbers(map(float, areas)))
    text = text.replace("MEAN", numbers(255 * each for each in IMAGENET_MEAN))
    text = text.replace("DEVIATION", numbers(255 * each for each in IMAGENET_STD))
    graph = onnx.parser.parse_graph(text)
    network = onnx.compose.add_prefix(network, "ssn_")  # names of nodes and weights differ from those above
    body = next(node for node in graph.node if node.op_type == "Loop").attribute[0].g
    nodes = [[node] if node.op_type != "NETWORK" else list(network.graph.node) for node in body.node]
    del body.node[:]
    body.node.extend(itertools.chain(*nodes))
    graph.initializer.extend(network.graph.initializer)
    return onnx.helper.make_model(graph, opset_imports=network.opset_import, ir_version=network.ir_version)


def store(model: ModelProto, path: Path, facts: dict[str, object]) -> None:
    """Write a checked ONNX file, all or nothing, with facts in its metadata, as JSON where they are not text."""
    import onnx

    facts = facts | {"opset": OPSET}
    values = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    onnx.helper.set_model_props(model, values)
    onnx.checker.check_model(model)
    write_atomically(path, model.SerializeToString())
    print_summary(f"wrote {path}", {"bytes": path.stat().st_size, "opset": OPSET})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="recogniser, with its config")
    parser.add_argument("--config", metavar="YAML", help="how to build a checkpoint that carries no config")
    parser.add_argument("--output", required=True, metavar="FILE", help="ONNX file of the recogniser to write")
    parser.add_argument("--ssn-output", metavar="FILE", help="ONNX file of the SSN to write")
    parser.add_argument("--ssn", metavar="FILE", help="checkpoint of the SSN (default: the one in --checkpoint)")
    parser.add_argument("--model_eval", metavar="NAME", help="sub-model whose logits to give (default: the last)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    if missing := [each for each in PACKAGES if importlib.util.find_spec(each) is None]:
        raise UserError(f"{', '.join(missing)} is not installed; install requirements-dev.txt")
    refuse_existing(options.output, options.ssn_output, overwrite=options.overwrite)
    bundle = load_bundle(options.checkpoint, load_config(options.config) if options.config else None)
    model_eval = checked_model_eval(bundle.config, options.model_eval)
    ssn, areas = load_ssn(options.ssn) if options.ssn else (bundle.ssn, bundle.areas)
    if options.ssn_output is not None and ssn is None:
        raise UserError(f"--ssn-output: checkpoint {options.checkpoint} carries no SSN; name its file with --ssn")
    export_recogniser(bundle, Path(options.output), model_eval=model_eval)
    if options.ssn_output is not None:
        export_ssn(ssn, areas, Path(options.ssn_output))
    return 0


if __name__ == "__main__":
    run_command_line(main)
