"""Read words from images: an image, a folder of them, or a pattern.

Examples:
    python demo.py --input word.png
    python demo.py --input "images/*.jpg" --checkpoint workdir/small/best-small.pth --json
    python demo.py --input images --checkpoint weights.pth --overlay seen --html seen.html

Prints one line for each image: path, prediction, confidence (tab separated), or JSON objects with --json. --topk and
--lexicon add lines that begin with a tab: word and probability. With --overlay each image is drawn with its mask and
the attention of each character, with --html one page shows them all. An image that cannot be read has no prediction and
confidence 0, and a line on stderr (with --json: its object) says why. Exit status: 0, also when some of the images are
broken; 2 when all are, or for a mistake in the command.
"""

import argparse
import glob
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from engine.precision import PRECISIONS
from evaluation.drawing import draw_prediction
from evaluation.dumps import ONE_FIELD
from evaluation.lexicon import Candidate, read_lexicon
from evaluation.prediction_page import page_entry, word_layers
from evaluation.report import render_page
from loading.decoding import IMAGE_SUFFIXES
from reader import MASK_SOURCES, Character, Prediction, Reader, to_image
from utils import ArgumentParser, UserError, run_command_line, write_atomically

OVERLAY_HEIGHT, OVERLAY_WIDTH = 64, 1024  # pixels that each drawing of the word fits into


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    paths = find_images(options.input)
    reader = Reader(
        options.checkpoint,
        device=options.device,
        config=options.config,
        ssn=options.ssn,
        masks=options.masks,
        model_eval=options.model_eval,
        precision=options.precision,
        details=bool(options.overlay or options.html),
    )
    overlays = overlay_paths(paths, Path(options.overlay)) if options.overlay else [None] * len(paths)
    read_any, entries = False, []
    lexicon = None if options.lexicon is None else read_lexicon(options.lexicon)
    predictions = reader.stream(paths, topk=options.topk, lexicon=lexicon)
    for path, prediction, overlay in zip(paths, predictions, overlays, strict=True):
        if overlay is not None and prediction.error is None:
            draw_overlay(path, prediction, overlay)
        if options.html:
            entries.append(page_entry(path.name, None if prediction.error else to_image(path), prediction))
        print(as_json(path, prediction, overlay) if options.json else as_lines(path, prediction), flush=True)
        if prediction.error and not options.json:
            print(f"error: {prediction.error}".translate(ONE_FIELD), file=sys.stderr, flush=True)
        read_any = read_any or prediction.error is None
    if options.html:
        details = {"weights": reader.checkpoint.name}
        page = render_page("demo.html.j2", title="What was read", details=details, words=entries)
        write_atomically(Path(options.html), page)
        print(f"masks, attention and probabilities: {options.html}", file=sys.stderr)
    return 0 if read_any else 2


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, action="append", metavar="PATH", help="image, folder or pattern")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to read with (default: weights/binet-small.pth)")
    parser.add_argument("--config", metavar="YAML", help="how to build the network of weights that carry no config")
    parser.add_argument("--ssn", metavar="FILE", help="SSN that makes the masks (default: the one in the checkpoint)")
    parser.add_argument("--masks", choices=MASK_SOURCES, default="auto", help="none: give the network empty masks")
    parser.add_argument("--model_eval", metavar="NAME", help="sub-model to read with: alignment, vision or language")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: 16 bits if native")
    parser.add_argument("--topk", type=int, default=0, metavar="K", help="the K most probable words as well")
    parser.add_argument("--lexicon", metavar="FILE", help="the most probable word of a list, one a line, as well")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--overlay", metavar="FOLDER", help="draw mask and attention of each image there, as PNG")
    parser.add_argument("--html", metavar="FILE", help="show what was read, with mask and attention, on one page")
    return parser.parse_args(arguments)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the images of the inputs in order: files as named, those of folders (not below) and patterns by name.

    Raises:
        UserError: an input does not exist, or holds no image.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = filter(Path.is_file, sorted(path.iterdir()))
            matches = [each for each in files if each.suffix.lower() in IMAGE_SUFFIXES]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file()]
        if not matches:
            raise UserError(f"--input {name}: no image there; give an image, a folder of images or a pattern")
        found += matches
    return found


def as_lines(path: Path, prediction: Prediction) -> str:
    """Return path, prediction and confidence on one line, then a line with a leading tab for each word asked for."""
    rows = [(str(path).translate(ONE_FIELD), prediction), *(("", each) for each in prediction.candidates)]
    if prediction.match is not None:
        rows.append(("\tmost probable in the list", prediction.match))
    return "\n".join(f"{name}\t{each.text}\t{each.confidence:.4f}" for name, each in rows)


def as_json(path: Path, prediction: Prediction, overlay: Path | None) -> str:
    """Return a JSON object on one line."""
    if prediction.error:
        return json.dumps({"path": str(path), "error": prediction.error}, ensure_ascii=False)
    fields = {
        "path": str(path),
        **as_fields(prediction),
        "turned": prediction.turned,
        "characters": [as_fields(each) for each in prediction.characters],
    }
    if prediction.candidates:
        fields["candidates"] = [as_fields(each) for each in prediction.candidates]
    if prediction.match is not None:
        fields["match"] = as_fields(prediction.match)
    if overlay is not None:
        fields["overlay"] = str(overlay)
    return json.dumps(fields, ensure_ascii=False)


def as_fields(each: Prediction | Character | Candidate) -> dict[str, object]:
    """Return a text and its confidence for JSON."""
    return {"text": each.text, "confidence": round(each.confidence, 6)}


def overlay_paths(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Return the path of a PNG in `folder` for each image; images of equal names get numbers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--overlay {folder}: cannot be made ({error.strerror}); name another folder") from error
    chosen: dict[Path, None] = {}
    for path in paths:
        names = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
        chosen[next(name for name in (folder / f"{each}.png" for each in names) if name not in chosen)] = None
    return list(chosen)


def draw_overlay(path: Path, prediction: Prediction, output: Path) -> None:
    """Draw the image as it was read, with its mask, the refined mask and the attention of each character."""
    parts = word_layers(to_image(path), prediction, OVERLAY_HEIGHT, OVERLAY_WIDTH)
    caption = f"{prediction.text} {prediction.confidence:.2f}"
    drawing = draw_prediction(**parts, caption=caption, characters=prediction.text, over_image=True)
    if not cv2.imwrite(str(output), drawing[..., ::-1]):
        raise UserError(f"--overlay {output}: cannot be written; name another folder")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    run_command_line(main)
