"""Read words from pictures: a picture, a folder of them, or a pattern.

Examples:
    python demo.py --input word.png
    python demo.py --input "pictures/*.jpg" --checkpoint workdir/small/best-small.pth --json
    python demo.py --input pictures --checkpoint weights.pth --overlay seen

Prints one line for each image: path, prediction, confidence (tab separated), or JSON objects with --json. With
--overlay each image is drawn with its mask and the attention of each character. An image that cannot be read has no
prediction and confidence 0, and a line on stderr (with --json: its object) says why. Exit status: 0, also when some of
the images are broken; 2 when all are, or for a mistake in the command.
"""

import argparse
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from evaluation.drawing import on_picture, reading_picture
from loading.transforms import resize, turn
from reader import MASK_SOURCES, Reader, Reading, to_picture
from utils import ArgumentParser, UserError, run_command_line

PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
OVERLAY_HEIGHT, OVERLAY_WIDTH = 64, 1024  # pixels that each drawing of the word fits into
ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    paths = find_pictures(options.input)
    reader = Reader(
        options.checkpoint,
        device=options.device,
        config=options.config,
        ssn=options.ssn,
        masks=options.masks,
        model_eval=options.model_eval,
    )
    overlays = overlay_paths(paths, Path(options.overlay)) if options.overlay else [None] * len(paths)
    read_any = False
    for path, reading, overlay in zip(paths, reader.stream(paths), overlays, strict=True):
        if overlay is not None and reading.error is None:
            draw_overlay(path, reading, overlay)
        print(as_json(path, reading, overlay) if options.json else as_line(path, reading), flush=True)
        if reading.error and not options.json:
            print(f"error: {reading.error}".translate(ESCAPES), file=sys.stderr, flush=True)
        read_any = read_any or reading.error is None
    return 0 if read_any else 2


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """See `--help`."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, action="append", metavar="PATH", help="picture, folder or pattern; repeatable"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to read with (default: weights/binet-small.pth)")
    parser.add_argument("--config", metavar="YAML", help="how to build the network of weights that carry no config")
    parser.add_argument("--ssn", metavar="FILE", help="SSN that makes the masks (default: the one in the checkpoint)")
    parser.add_argument("--masks", choices=MASK_SOURCES, default="auto", help="none: give the network empty masks")
    parser.add_argument("--model_eval", metavar="NAME", help="sub-model to read with: alignment, vision or language")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--overlay", metavar="FOLDER", help="draw mask and attention of each picture there, as PNG")
    return parser.parse_args(arguments)


def find_pictures(inputs: Sequence[str]) -> list[Path]:
    """The pictures of some inputs in order: files as named, those of folders (not below them) and patterns by name.

    Raises:
        UserError: an input is not there, or holds no picture.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            matches = [each for each in sorted(path.iterdir()) if is_picture(each)]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(each) for each in sorted(glob.glob(name, recursive=True)) if Path(each).is_file()]
        if not matches:
            raise UserError(f"--input {name}: no picture there; give a picture, a folder of pictures or a pattern")
        found += matches
    return found


def is_picture(path: Path) -> bool:
    """Whether this is a file with the name of an image."""
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def as_line(path: Path, reading: Reading) -> str:
    """A row of the table that a person reads: three columns, whatever the path is."""
    return f"{str(path).translate(ESCAPES)}\t{reading.text}\t{reading.confidence:.4f}"


def as_json(path: Path, reading: Reading, overlay: Path | None) -> str:
    """What a program reads."""
    if reading.error:
        return json.dumps({"path": str(path), "error": reading.error}, ensure_ascii=False)
    fields = {
        "path": str(path),
        "text": reading.text,
        "confidence": round(reading.confidence, 6),
        "turned": reading.turned,
        "characters": [{"text": each.text, "confidence": round(each.confidence, 6)} for each in reading.characters],
    }
    if overlay is not None:
        fields["overlay"] = str(overlay)
    return json.dumps(fields, ensure_ascii=False)


def overlay_paths(paths: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG in `folder` for each picture; pictures of equal names get numbers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--overlay {folder}: cannot be made ({error.strerror}); name another folder") from error
    taken: set[str] = set()
    chosen = []
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        chosen.append(folder / f"{name}.png")
    return chosen


def draw_overlay(path: Path, reading: Reading, output: Path) -> None:
    """The image as it was read, the image under its mask, the refined mask and the attention of each character."""
    picture = turn(to_picture(path), reading.turned)
    scale = min(OVERLAY_HEIGHT / picture.shape[0], OVERLAY_WIDTH / picture.shape[1])
    size = tuple(max(round(side * scale), 1) for side in picture.shape[:2])
    refined, mask = reading.refined_mask, reading.mask_levels
    drawing = reading_picture(
        resize(picture, size),
        caption=f"{reading.text} {reading.confidence:.2f}",
        characters=reading.text,
        attention=[on_picture(weights, size, reading.extent) for weights in reading.attention],
        mask=None if mask is None else resize(turn(mask, reading.turned), size) / 255,
        refined_mask=None if refined is None else on_picture(refined, size, reading.extent),
        over_picture=True,
    )
    if not cv2.imwrite(str(output), drawing[..., ::-1]):
        raise UserError(f"--overlay {output}: cannot be written; name another folder")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    run_command_line(main)
