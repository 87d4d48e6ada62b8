"""Export a recogniser to ONNX, alone or with the SSN that makes its masks in the same graph.

Alone, the inputs are what the network reads:
  image   float32 (N, 3, 32, 128): RGB image, brought to the network's size, divided by 255, minus mean (0.485, 0.456,
          0.406), divided by deviation (0.229, 0.224, 0.225)
  mask    float32 (N, 1, 32, 128) in [0, 1], 1 = text, brought to that size likewise; only for a network that reads with
          masks
With --ssn the input is the image itself, and the graph does the rest:
  image float32 (N, 3, h, w): RGB, 0 to 255, brought to the size given by --ssn-size (32 k + 1 each)
An image is brought to a size by bilinear interpolation, as the network was trained (`fit` of the metadata):
  stretch  to that size
  left     scaled until one side fits and filled up with black, mask 0, on the right or below
  centre   scaled until one side fits, in the middle, its borders replicated
Outputs:
  logits     float32 (N, steps, classes): class 0 is the end of the text, class i the i-th character of the charset;
             read the largest class of every step up to the first 0
  attention  float32 (N, steps, h, w): where the vision model looked at every step
  text_mask  float32 (N, 1, h, w), with --ssn: probability of text of the image's pixels
N is free. Charset, sizes, fit, mean and deviation are in the file's metadata.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # lets `python tools/NAME.py` find the repository's modules

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from builders import checked_model_eval
from bundle import Bundle, load_bundle, load_ssn
from config import load_config
from evaluation.evaluator import chosen_logits
from loading.batches import IMAGENET_MEAN, IMAGENET_STD
from modules.hrnet import resize_aligned
from modules.ssn import SSN
from tools.support import make_parser, print_summary
from utils import UserError, explain_full_disk, run_command_line

EXAMPLE = """  python tools/export_onnx.py --checkpoint weights/binet-small.pth --output binet.onnx
  python tools/export_onnx.py --checkpoint weights/binet-small.pth --ssn --output binet-with-ssn.onnx"""

PACKAGES = ("onnx", "onnxscript")  # of requirements-dev.txt
OPSET = 18
SSN_SIZE = (161, 641)  # height, width: in the shape of the network's input, about the area that masks are made at


class Recogniser(nn.Module):
    """image, mask -> logits of one sub-model and attention."""

    def __init__(self, model: nn.Module, model_eval: str) -> None:
        super().__init__()
        self.model = model
        self.model_eval = model_eval

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W), (N, 1, H, W) -> logits (N, T, C), attention (N, T, h, w)."""
        output = self.model(image, mask)
        return chosen_logits(output, self.model_eval), output.vision.attention


class SegmentingRecogniser(nn.Module):
    """image -> logits, attention, text mask: SSN at the image's own size, then the recogniser."""

    def __init__(self, recogniser: Recogniser, ssn: SSN, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.recogniser = recogniser
        self.ssn = ssn
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, h, w), 0 to 255 -> logits (N, T, C), attention (N, T, ., .), text mask (N, 1, h, w)."""
        normalized = (image - self.mean) / self.std
        text_mask = resize_aligned(self.ssn.probability(normalized), image.shape[-2:])  # (N, 1, h, w)
        resized = F.interpolate(normalized, size=self.image_size, mode="bilinear", align_corners=False)
        mask = F.interpolate(text_mask, size=self.image_size, mode="bilinear", align_corners=False)
        return *self.recogniser(resized, mask), text_mask


def export(
    network: nn.Module, examples: dict[str, Tensor], outputs: Sequence[str], path: Path, facts: dict[str, object]
) -> None:
    """Write an ONNX file of one graph with a free batch size, all or nothing.

    Args:
        examples: name and shape of the inputs.
        facts: what goes into the metadata.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_full_disk(path):
            _export_graph(network, examples, outputs, temporary)
            describe(temporary, facts)
            temporary.replace(path)
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name another file") from error
    finally:
        temporary.unlink(missing_ok=True)


def _export_graph(network: nn.Module, examples: dict[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    noise = io.StringIO()  # the exporter reports its steps on stdout
    with contextlib.redirect_stdout(noise), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            tuple(examples.values()),
            path,
            input_names=list(examples),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in examples),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
        )


def describe(path: Path, facts: dict[str, object]) -> None:
    """Put facts into the file's metadata, as JSON where they are no text."""
    import onnx

    model = onnx.load(path)
    values = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    onnx.helper.set_model_props(model, values)
    onnx.save(model, path)


def export_recogniser(bundle: Bundle, path: Path, *, model_eval: str) -> None:
    """Write the recogniser alone."""
    height, width = bundle.image_size
    examples = {"image": torch.zeros(2, 3, height, width)}
    if bundle.config.model.takes_masks:
        examples["mask"] = torch.rand(2, 1, height, width)
    facts = facts_of(bundle, model_eval) | {"input": "image"}
    export(Recogniser(bundle.model, model_eval), examples, ("logits", "attention"), path, facts)


def export_with_ssn(
    bundle: Bundle, ssn: SSN, path: Path, *, model_eval: str, ssn_size: tuple[int, int] = SSN_SIZE
) -> None:
    """Write SSN and recogniser as one graph.

    Raises:
        UserError: the recogniser reads without masks, or the size is not of the form 32 k + 1.
    """
    if not bundle.config.model.takes_masks:
        raise UserError("--ssn: this network reads without masks; export it without --ssn")
    if any(side < 33 or side % 32 != 1 for side in ssn_size):
        raise UserError(f"--ssn-size {ssn_size[0]} {ssn_size[1]}: both must be 32 k + 1, such as 161 641")
    network = SegmentingRecogniser(Recogniser(bundle.model, model_eval), ssn, bundle.image_size)
    facts = facts_of(bundle, model_eval) | {"input": "image", "image_size": list(ssn_size)}
    examples = {"image": torch.rand(2, 3, *ssn_size) * 255}
    export(network, examples, ("logits", "attention", "text_mask"), path, facts)


def facts_of(bundle: Bundle, model_eval: str) -> dict[str, object]:
    """What a program needs to know to use the file."""
    return {
        "charset": bundle.charset.characters,
        "model_eval": model_eval,
        "image_size": list(bundle.image_size),
        "fit": bundle.config.dataset.fit,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    if missing := [each for each in PACKAGES if importlib.util.find_spec(each) is None]:
        raise UserError(f"{', '.join(missing)} is not installed; install requirements-dev.txt")
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output} exists; give another path or --overwrite")
    bundle = load_bundle(options.checkpoint, load_config(options.config) if options.config else None)
    model_eval = checked_model_eval(bundle.config, options.model_eval)
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.ssn is None:
        export_recogniser(bundle, output, model_eval=model_eval)
    else:
        ssn = load_ssn(options.ssn)[0] if options.ssn else bundle.ssn
        if ssn is None:
            raise UserError(f"--ssn: checkpoint {options.checkpoint} carries no SSN; name its file")
        export_with_ssn(bundle, ssn, output, model_eval=model_eval, ssn_size=tuple(options.ssn_size))
    print_summary(f"wrote {output}", {"bytes": output.stat().st_size, "opset": OPSET})
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """See `--help`."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="recogniser, with its config")
    parser.add_argument("--config", metavar="YAML", help="how to build a checkpoint that carries no config")
    parser.add_argument("--output", required=True, metavar="FILE", help="ONNX file to write")
    parser.add_argument(
        "--ssn", nargs="?", const="", metavar="FILE", help="put SSN into the graph: the checkpoint's, or that of FILE"
    )
    parser.add_argument(
        "--ssn-size",
        type=int,
        nargs=2,
        default=SSN_SIZE,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images that a graph with SSN takes (default: 161 641)",
    )
    parser.add_argument("--model_eval", metavar="NAME", help="sub-model whose logits to give (default: the last)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it exists")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command_line(main)
