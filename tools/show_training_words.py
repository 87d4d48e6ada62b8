"""Draw a sheet of training words as the network sees them: augmented, at its size, with mask and label."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import torch

from config import Config, load_config
from engine.distributed import Process
from evaluation.contact_sheet import Cell, save_contact_sheet
from evaluation.drawing import to_images
from run_builders import build_training_data
from tools.support import make_parser, positive, print_summary, seed_number
from utils import UserError, run_command_line

EXAMPLE = """  python tools/show_training_words.py --config configs/small.yaml --output sheet.png
  python tools/show_training_words.py --config configs/small.yaml --output sheet.png --epoch 5 dataset.data_aug=rand"""


def read_training_words(config: Config, count: int, *, epoch: int = 0) -> list[Cell]:
    """Return the first `count` words that a run trains on from `epoch` on, with their labels as stored."""
    if config.model.kind not in ("vision", "recogniser"):
        raise UserError(f"model.name {config.model.name}: is not trained on words; give the config of a recogniser")
    config = config.model_copy(deep=True)
    config.run.phase, config.dataset.num_workers = "train", 0
    loader = build_training_data(config, device=torch.device("cpu"), process=Process())
    loader.batch_sampler.set_position(epoch, 0)
    cells: list[Cell] = []
    for batch in itertools.islice(loader, len(loader.batch_sampler)):
        masks = [None] * len(batch) if batch.masks is None else batch.masks[:, 0].numpy()
        cells += map(Cell, to_images(batch.images), batch.texts, masks)
        if len(cells) >= count:
            break
    return cells[:count]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--config", required=True, metavar="YAML", help="as main.py reads it")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="sheet to write")
    parser.add_argument("--count", type=positive, default=60, help="words on the sheet (default: 60)")
    parser.add_argument("--epoch", type=seed_number, default=0, help="their epoch, from 0 (default: 0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    cells = read_training_words(config, options.count, epoch=options.epoch)
    if not cells:
        raise UserError("dataset.train.roots: no word of the first epoch can be read; see the messages above")
    height, width = config.dataset.image_height, config.dataset.image_width
    save_contact_sheet(cells, options.output, cell_width=2 * width, cell_height=2 * height, columns=6)
    print_summary(f"wrote {options.output}", {"words": len(cells)})
    return 0


if __name__ == "__main__":
    run_command_line(main)
