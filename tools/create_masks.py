"""Make the mask LMDB of a word LMDB with a trained SSN: the same keys, 8-bit grey PNGs, 255 = text."""

import argparse
import contextlib
import functools
import glob
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

import cv2
import numpy as np

from builders import build_mask_maker
from bundle import load_ssn
from config import load_config
from engine import distributed
from engine.distributed import Process
from engine.precision import PRECISIONS
from inference.segmenter import Segmenter
from loading.decoding import BrokenImageError, decode_image
from loading.lmdb_io import (
    DATA_FILE,
    NUM_SAMPLES,
    PARTIAL_SUFFIX,
    LmdbReader,
    LmdbWriter,
    find_lmdbs,
    image_key,
    is_lmdb,
    label_key,
)
from tools.support import RejectionLog, make_parser, positive, print_summary, progress
from utils import UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/create_masks.py --config configs/train_ssn.yaml --checkpoint ssn.pth \\
    --input data/training/label/real --output data/masks
  python tools/create_masks.py --checkpoint weights/binet-small.pth --input data/training/label/real --output data/masks
  torchrun --nproc_per_node=8 tools/create_masks.py --checkpoint ssn.pth --input data/training/MJ --output data/masks

The processes of torchrun, on one machine or several that share the folders, share the words; the result is byte for
byte that of one process. A run that was stopped goes on when the same command is given again, even with another number
of processes; until then its masks are in OUTPUT.part-*.partial. A word whose image cannot be decoded gets no mask; it
is counted and listed in OUTPUT-rejected.tsv. OUTPUT-masks.json says how the masks were made."""

CHUNK_PIXELS = 1 << 23  # of images that are held at once, whatever their number: scenes are larger than words
SHARE_TIMEOUT = timedelta(weeks=2)  # a process that is done waits for the others


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("--config", help="YAML that describes the network (default: the checkpoint does)")
    parser.add_argument("--checkpoint", help="weights of SSN (default: the config's model.ssn.checkpoint)")
    parser.add_argument("--input", required=True, type=Path, metavar="LMDB", help="word LMDB, or a folder of them")
    parser.add_argument("--output", required=True, type=Path, metavar="MASK_LMDB", help="LMDB to make, or a folder")
    parser.add_argument("--areas", type=positive, nargs="+", metavar="SIDE", help="scales, pixels (default: its own)")
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help="default: the fastest here")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=positive, default=256, help="words read and stored together (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output when it exists, from the start")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of config keys")
    options = parser.parse_args(arguments)
    process = distributed.start("cpu", timeout=SHARE_TIMEOUT)  # what the processes tell each other lives on the host
    pairs = paired_paths(options.input, options.output)
    checkpoint, segmenter = load_segmenter(options)
    settings = {
        "checkpoint": _digest(checkpoint.read_bytes()),
        "areas": list(segmenter.areas),
        "precision": segmenter.precision,
    }
    found = distributed.gather([settings])
    if any(each != settings for each in found):
        raise UserError(f"the processes would make other masks: {found}; give --precision, and all the same weights")
    make = functools.partial(MaskOutput, settings=settings, overwrite=options.overwrite, process=process)
    for output in [make(source, target) for source, target in pairs]:  # all are checked before the first is made
        output.make(segmenter, batch_size=options.batch_size)
    distributed.stop()
    return 0


def paired_paths(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Return (word LMDB, mask LMDB) for each LMDB of the input; the output has the layout of the input."""
    # Masks of an earlier run may lie below the words.
    found = [each for each in find_lmdbs(source) if target.resolve() not in each.resolve().parents]
    if not found:
        raise UserError(f"--input {source} lies in --output {target}; choose another output")
    pairs = [(each, target / each.relative_to(source)) for each in found]
    for _, output in pairs:
        for each in found:
            if output.resolve().is_relative_to(each.resolve()):
                raise UserError(f"--output {output} is the input {each} or lies in it; choose another output")
    return pairs


def load_segmenter(options: argparse.Namespace) -> tuple[Path, Segmenter]:
    """Return the file of SSN's weights, and SSN as the config or else the checkpoint describes it, ready for images."""
    if options.overrides and options.config is None:
        raise UserError(f"{options.overrides[0]}: there is no config to change; give one with --config")
    config = load_config(options.config, options.overrides) if options.config else None
    checkpoint = options.checkpoint or (config and (config.model.ssn.checkpoint or config.model.checkpoint))
    if checkpoint is None:
        raise UserError("no weights: give --checkpoint, or set model.ssn.checkpoint in the config")
    try:
        if config is None:
            ssn, areas = load_ssn(checkpoint)
        else:
            config.model.ssn.checkpoint = checkpoint
            ssn, areas = build_mask_maker(config)
    except UserError as error:
        raise UserError(f"{error}; the network is described by model.ssn of {options.config or '--config'}") from error
    # For several GPUs, `cuda` is each process's own.
    device = distributed.pick_device(name=None if options.device == "cuda" else options.device)
    if options.device == "cuda" and device.type != "cuda":
        raise UserError("--device cuda: torch can use no GPU here; give --device cpu")
    return Path(checkpoint), Segmenter(ssn, options.areas or areas, device=device, precision=options.precision)


class MaskOutput:
    """The masks of one word LMDB.

    The processes take blocks of consecutive words in turn, and each keeps its masks in a part of its own until all are
    made. Then the main one writes them to `target` in the order of their keys. Blocks do not depend on the number of
    processes, so that neither it nor an interruption changes a bit of the result.

    Args:
        source: word LMDB.
        target: mask LMDB to make.
        settings: what the masks depend on beside the images.
        overwrite: replace what is at `target`, and start anew.
        process: this one among those that share the words.

    Raises:
        UserError: what is at `target` was made otherwise, and is not to be replaced.
    """

    def __init__(
        self, source: Path, target: Path, *, settings: dict[str, Any], overwrite: bool, process: Process
    ) -> None:
        self.reader = LmdbReader(source)
        self.target = target
        self.overwrite = overwrite
        self.process = process
        self.count = len(self.reader)
        self.settings = settings | {"source": self._source_digest()}
        self.identity = json.dumps(self.settings, sort_keys=True)
        self._record_path = target.with_name(f"{target.name}-masks.json")
        self._is_unrecorded = False
        self.complete = any(distributed.gather([process.is_main and self._is_made()]))

    def _source_digest(self) -> str:
        """Name the source's content, wherever it lies: its size, number of words, and a few of the words."""
        chosen = sorted({1, (self.count + 1) // 2, self.count} - {0})
        parts = [str(self.count).encode(), str((self.reader.path / DATA_FILE).stat().st_size).encode()]
        parts += [self.reader.get(key(index)) or b"" for index in chosen for key in (image_key, label_key)]
        return _digest(b"\0".join(parts))

    def _is_made(self) -> bool:
        if self.overwrite or not self.target.exists():
            return False
        if self._parts() and not self._record_path.exists():  # a run ended after it had named the masks
            self._claim_parts()
            self._is_unrecorded = True
            return False
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # without a sound record it is not ours
            record = json.loads(self._record_path.read_text(encoding="utf-8"))
            if is_lmdb(self.target) and record["settings"] == self.settings:
                return True
        raise UserError(
            f"{self.target}: exists and was made of other images or with other settings; "
            "choose another output or replace it with --overwrite"
        )

    def make(self, segmenter: Segmenter, *, batch_size: int) -> None:
        """Make what is missing, check all of it against the source, and give it its name."""
        if self.complete:
            if self.process.is_main:
                print_summary(f"{self.target}: is complete already", {"words": self.count})
                with contextlib.suppress(UserError):  # parts of other settings, or of a run that replaces this one
                    self._claim_parts()
                    self._remove_parts()
            return
        if self.process.is_main:
            self._claim_parts()
            if self.overwrite:
                self._remove_parts()
        distributed.barrier()
        made = self._part_of_each()
        distributed.barrier()  # a part must not be read while its process writes it
        new, rejected = self._make_share(segmenter, made, batch_size=batch_size)
        new, rejected = sum(distributed.gather([new])), sorted(distributed.gather(rejected))
        if self.process.is_main:
            with RejectionLog.beside(self.target) as log:
                for index, detail in rejected:
                    log.add(image_key(index), "damaged image", detail)
                self._merge(broken=len(rejected))
            self._remove_parts()
            counts = {"words": self.count, "masks": self.count - len(rejected), "made in this run": new}
            print_summary(f"{self.target}: areas {list(segmenter.areas)}, {segmenter.precision}", counts, log)
        distributed.barrier()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[Path]:
        """Return the parts that exist, those of an interrupted run included."""
        return sorted(self.target.parent.glob(f"{glob.escape(self.target.name)}.part-*{PARTIAL_SUFFIX}"))

    def _claim_parts(self) -> None:
        """Raise UserError unless the parts belong to this output and no other process writes them."""
        for each in self._parts():
            name = each.with_name(each.name.removesuffix(PARTIAL_SUFFIX))
            LmdbWriter(name, overwrite=self.overwrite, identity=self.identity).abort()

    def _remove_parts(self) -> None:
        for each in self._parts():
            shutil.rmtree(each)

    def _part_of_each(self) -> np.ndarray:
        """Return the place in `_parts()` of each word's mask, -1 where it has none: (count + 1,), words from 1."""
        prefix = image_key(0).rstrip("0")
        places = np.full(self.count + 1, -1, np.int16)
        for place, each in enumerate(self._parts()):
            places[[int(key.removeprefix(prefix)) for key in LmdbReader(each).keys(prefix)]] = place
        return places

    def _make_share(
        self, segmenter: Segmenter, made: np.ndarray, *, batch_size: int
    ) -> tuple[int, list[tuple[int, str]]]:
        """Segment this process's words that have no mask yet; return their number, and index and reason of the others.

        The next words are read while the network works; each chunk is one transaction.
        """
        starts = range(1, self.count + 1, batch_size)[self.process.rank :: self.process.world_size]
        blocks = [range(start, min(start + batch_size, self.count + 1)) for start in starts]
        todo = [[index for index in block if made[index] < 0] for block in blocks]
        total, missing = sum(map(len, blocks)), sum(map(len, todo))
        name = self.target.with_name(f"{self.target.name}.part-{self.process.rank}")
        part = LmdbWriter(name, identity=self.identity)
        rejected = []
        bar = progress((), total=total, unit="word", description=self.target.name, disable=not self.process.is_main)
        bar.update(total - missing)
        try:
            with ThreadPoolExecutor(1) as pool, bar:
                chunks = self._read(todo)
                following = pool.submit(next, chunks, None)
                while images := following.result():
                    following = pool.submit(next, chunks, None)
                    read = {index: image for index, image in images.items() if not isinstance(image, str)}
                    for index, mask in zip(read, segmenter(list(read.values())), strict=True):
                        part.put(image_key(index), cv2.imencode(".png", mask)[1].tobytes())
                    part.commit()
                    rejected += [(index, image) for index, image in images.items() if index not in read]
                    bar.update(len(images))
        finally:
            part.abort()  # a part never takes a name without PARTIAL_SUFFIX
        return missing - len(rejected), rejected

    def _read(self, blocks: Sequence[Sequence[int]]) -> Iterator[dict[int, np.ndarray | str]]:
        """Yield the images of a block, or why they cannot be decoded: in several chunks where they are large."""
        for block in blocks:
            images: dict[int, np.ndarray | str] = {}
            pixels = 0
            for index in block:
                try:
                    images[index] = image = decode_image(self.reader.get(image_key(index)) or b"")
                    pixels += image[..., 0].size
                except BrokenImageError as error:
                    images[index] = str(error)
                if pixels >= CHUNK_PIXELS:
                    yield images
                    images, pixels = {}, 0
            if images:
                yield images

    def _merge(self, *, broken: int) -> None:
        """Write all masks and labels in the order of their keys: the file depends on nothing but its content."""
        parts = [LmdbReader(each) for each in self._parts()]
        places = self._part_of_each()
        found = np.flatnonzero(places >= 0).tolist()
        if len(found) < self.count - broken:
            raise UserError(
                f"{self.target}: only {len(found)} of {self.count - broken} masks can be seen from here; "
                "all machines must share the folder of --output"
            )
        with LmdbWriter(self.target, overwrite=self.overwrite or self._is_unrecorded, in_order=True) as writer:
            for index in found:
                writer.put(image_key(index), parts[places[index]].get(image_key(index)))
            for index in range(1, self.count + 1):
                if (label := self.reader.get(label_key(index))) is not None:
                    writer.put(label_key(index), label)
            writer.put(NUM_SAMPLES, str(self.count))
            self._record_path.unlink(missing_ok=True)  # it speaks of the masks that are replaced
        facts = {"settings": self.settings, "words": self.count, "without_mask": broken}
        write_atomically(self._record_path, json.dumps(facts, indent=1) + "\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


if __name__ == "__main__":
    run_command_line(main)
