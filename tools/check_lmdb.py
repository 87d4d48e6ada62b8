"""Check word LMDBs: broken entries, statistics of labels and sizes, masks, images shared with another LMDB."""

import argparse
import functools
import hashlib
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from evaluation.contact_sheet import Cell, save_contact_sheet
from loading.charset import Charset
from loading.decoding import decode_image, decode_mask
from loading.lmdb_io import NUM_SAMPLES, LmdbReader, LmdbWriter, find_lmdbs, image_key, label_key, mask_key
from loading.masks import find_mask_lmdb
from tools.support import (
    RejectedError,
    RejectionLog,
    add_run_arguments,
    checked_image,
    make_parser,
    map_in_processes,
    positive,
    print_summary,
    progress,
)
from utils import UserError, run_command_line, write_atomically

EXAMPLE = """  python tools/check_lmdb.py data/training --charset data/charset_36.txt
  python tools/check_lmdb.py data/training/IIIT5k --against data/evaluation --contact-sheet sheet.png
  python tools/check_lmdb.py data/training/IIIT5k --masks data/masks/IIIT5k --fix clean

exit status: 0 clean, 1 problems found, 2 cannot be checked"""

SHARED = "image is in the other LMDB too"


@dataclass(frozen=True)
class Sample:
    """What was found at one index: `reason` is empty when nothing is wrong; equal pixels have equal `digest`s."""

    index: int
    reason: str = ""
    detail: str = ""
    label: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    mask_empty: bool = False


@dataclass
class Report:
    """The findings about one LMDB; `problems` counts entries by reason and is empty when it is clean.

    `heights` (pixels) and `aspects` (width / height) count valid samples up to each power of two.
    """

    path: str
    num_samples: int | None
    samples: int = 0
    valid: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    heights: Counter[float] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    foreign_characters: Counter[str] = field(default_factory=Counter)
    good: array = field(default_factory=lambda: array("q"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the list of good indices, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "good"}


# --- samples ----------------------------------------------------------------------------------------------------------


def scan_keys(reader: LmdbReader) -> tuple[np.ndarray, int]:
    """Return the indices with an image or a label, whatever `num-samples` says, and the number of other keys."""
    known = {"image": array("q"), "label": array("q"), "mask": array("q")}  # small: there may be millions
    others = 0
    for key in reader.keys():  # noqa: SIM118 (no dict)
        kind, _, number = key.partition("-")
        if kind in known and len(number) == 9 and number.isdecimal() and int(number):
            known[kind].append(int(number))
        elif key != NUM_SAMPLES:
            others += 1
    return np.union1d(known["image"], known["label"]).astype(np.int64), others


def checked_samples(
    reader: LmdbReader, masks: LmdbReader | None, indices: np.ndarray, *, workers: int
) -> Iterator[Sample]:
    """Check the samples of `indices` in order, with a progress bar."""
    segmentation = next(reader.keys("mask-"), None) is not None  # labels, where it has some, name the pairs
    check = functools.partial(check_sample, reader=reader, masks=masks, segmentation=segmentation)
    results = map_in_processes(check, map(int, indices), workers=workers, chunk_size=64)
    return progress(results, total=len(indices), unit="word", description=reader.path.name)


def check_sample(index: int, *, reader: LmdbReader, masks: LmdbReader | None, segmentation: bool) -> Sample:
    """Read and decode everything at `index`; runs in a worker."""
    label, mask_empty = "", False
    try:
        stored = reader.get(image_key(index))
        if stored is None:
            raise RejectedError("image missing")
        if not segmentation:
            label = checked_label(reader.get(label_key(index)))
        image = checked_image(stored)
        height, width = image.shape[:2]
        if segmentation or masks is not None:
            mask_empty = not checked_mask(stored_mask(index, reader, masks), (height, width)).any()
        copied = masks and masks.get(label_key(index))  # training does without
        if copied is not None and copied != label.encode():
            raise RejectedError("mask of another word", f"its label is {copied!r}")
    except RejectedError as error:
        return Sample(index, *error.args, label=label)
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()
    return Sample(index, "", "", label, width, height, digest, mask_empty)


def checked_label(data: bytes | None) -> str:
    """Decode a label; raises RejectedError."""
    if data is None:
        raise RejectedError("label missing")
    try:
        label = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectedError("label is not UTF-8", repr(data[:60])) from error
    if not label:
        raise RejectedError("label empty")
    return label


def stored_mask(index: int, reader: LmdbReader, masks: LmdbReader | None) -> bytes | None:
    """Return the encoded mask of a sample, from the mask LMDB or, for segmentation data, from `reader` itself."""
    return reader.get(mask_key(index)) if masks is None else masks.get(image_key(index))


def checked_mask(data: bytes | None, size: tuple[int, int]) -> np.ndarray:
    """Decode the mask (H, W, 3) of an image of `size` (height, width); raises RejectedError."""
    if data is None:
        raise RejectedError("mask missing")
    try:
        mask = checked_image(data)
    except RejectedError as error:
        raise RejectedError(f"mask: {error.reason}", error.detail) from error
    if mask.shape[:2] != size:
        raise RejectedError("mask of another size", f"{mask.shape[:2]} for an image of {size}")
    if (mask != mask[..., :1]).any():
        raise RejectedError("mask is not grey")
    return mask


def digests_of(root: str, *, workers: int) -> set[bytes]:
    """Return the digests of the images in every LMDB of `root`; those that cannot be decoded are passed over."""
    readers = map(LmdbReader, find_lmdbs(root))
    return {
        sample.digest
        for reader in readers
        for sample in checked_samples(reader, None, scan_keys(reader)[0], workers=workers)
        if sample.digest
    }


# --- reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checker:
    """Checks LMDBs with the same settings: `charset` and `max_length` as in training, `others` are digests."""

    charset: Charset | None
    max_length: int
    workers: int
    others: set[bytes]

    def check(self, path: Path, mask_path: Path | None, log: RejectionLog) -> Report:
        """Check one LMDB, with its masks when `mask_path` is given."""
        reader = LmdbReader(path)
        masks = None if mask_path is None else LmdbReader(mask_path)
        if masks is not None:
            len(masks)  # what is not a mask LMDB is named before the work begins
        indices, others = scan_keys(reader)
        try:
            report = Report(str(path), len(reader))
        except UserError:
            report = Report(str(path), None)
        for reason, count, detail in _count_problems(report.num_samples, indices):
            report.problems[reason] += count
            log.add(str(path), reason, detail, count)
        report.notes["keys that nothing reads"] = others
        digests = bytearray()  # small: there may be millions
        for sample in checked_samples(reader, masks, indices, workers=self.workers):
            report.samples += 1
            reason = sample.reason or (SHARED if sample.digest in self.others else "")
            if reason:
                report.problems[reason] += 1
                log.add(f"{path}:{sample.index}", reason, sample.detail or sample.label)
            else:
                self._describe(sample, report)
                digests += sample.digest[:8]
        report.notes["images that occur more than once"] = report.valid - len(np.unique(np.frombuffer(digests, "u8")))
        report.notes = +report.notes
        return report

    def _describe(self, sample: Sample, report: Report) -> None:
        """Add a valid sample to the statistics."""
        report.valid += 1
        report.good.append(sample.index)
        report.lengths[len(sample.label)] += 1
        report.heights[_power_of_two(sample.height)] += 1
        report.aspects[_power_of_two(sample.width / sample.height)] += 1
        report.notes["masks without text"] += sample.mask_empty
        read = sample.label
        if self.charset is not None:
            read = self.charset.normalize(sample.label)
            foreign = [c for c in sample.label if not self.charset.normalize(c)]
            report.foreign_characters.update(foreign)
            report.notes["labels with characters outside the charset"] += bool(foreign)
            report.notes["labels without any character of the charset"] += bool(sample.label) and not read
        report.notes[f"labels longer than {self.max_length}"] += len(read) > self.max_length


def _count_problems(num_samples: int | None, indices: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """Yield (reason, number, detail) where `num-samples` and the keys do not agree."""
    if num_samples is None:
        yield f"{NUM_SAMPLES} missing or no number", 1, ""
        return
    within = int(np.count_nonzero(indices <= num_samples))
    if within < num_samples:
        yield "neither image nor label", num_samples - within, f"{NUM_SAMPLES} is {num_samples}, {within} have keys"
    if within < len(indices):
        yield f"beyond {NUM_SAMPLES}", len(indices) - within, f"{NUM_SAMPLES} is {num_samples}, last is {indices[-1]}"


def _power_of_two(value: float) -> float:
    """Return the smallest power of two that is not below a positive value."""
    return 2 ** math.ceil(math.log2(value))


def print_report(report: Report) -> None:
    """Print the findings about one LMDB."""
    counts: dict[str, Any] = {
        NUM_SAMPLES: "none" if report.num_samples is None else report.num_samples,
        "samples": report.samples,
        "valid": report.valid,
        "problems": report.problems.total(),
    }
    counts |= {f"  {reason}": count for reason, count in report.problems.most_common()}
    counts |= {f"note: {note}": count for note, count in report.notes.most_common()}
    print_summary(report.path, counts)
    histograms = {
        "label length": report.lengths,
        "height up to, pixels": report.heights,
        "width / height up to": report.aspects,
    }
    for title, histogram in histograms.items():
        for number, (value, count) in enumerate(sorted(histogram.items())):
            bar = "#" * round(40 * count / max(histogram.values()))
            print(f"  {'' if number else title:20} {value:>8} {count:>10,} {bar}".rstrip())
    if report.foreign_characters:
        shown = " ".join(f"{character!r}:{count}" for character, count in report.foreign_characters.most_common(30))
        print(f"  characters outside the charset: {shown}")


# --- outputs ----------------------------------------------------------------------------------------------------------


def write_clean_copy(report: Report, mask_path: Path | None, root: str, output: Path, *, overwrite: bool) -> None:
    """Write the valid samples of a checked LMDB anew, numbered without gaps.

    The copy lies below `output` as the LMDB does below `root`; with masks, below `output/images`, and the masks
    likewise below `output/masks`.
    """
    if not report.good:
        raise UserError(f"{report.path}: has no valid sample, so there is no clean copy to write")
    place = Path(report.path).relative_to(root)
    copies = {Path(report.path): output / place}
    if mask_path:
        place = place if place.name else Path(report.path).name
        copies = {Path(report.path): output / "images" / place, mask_path: output / "masks" / place}
    for source, target in copies.items():
        reader = LmdbReader(source)
        with LmdbWriter(target, overwrite=overwrite) as writer:
            for index in report.good:
                writer.append(reader.get(image_key(index)), reader.get(label_key(index)), reader.get(mask_key(index)))


def write_contact_sheet(report: Report, mask_path: Path | None, output: Path, count: int) -> None:
    """Draw `count` valid samples, evenly spread over the LMDB."""
    reader = LmdbReader(report.path)
    masks = LmdbReader(mask_path) if mask_path else None
    cells = []
    for place in np.unique(np.linspace(0, len(report.good) - 1, count).astype(int)):
        index = report.good[place]
        mask = stored_mask(index, reader, masks)
        label = reader.get(label_key(index)) or b""
        image = decode_image(reader.get(image_key(index)))
        cells.append(Cell(image, f"{index} {label.decode()}", None if mask is None else decode_mask(mask)))
    save_contact_sheet(cells, output)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("lmdb", metavar="LMDB", help="an LMDB, or a folder of LMDBs")
    parser.add_argument(
        "--masks", metavar="LMDB", help="its masks, found as training finds those of dataset.masks.root"
    )
    parser.add_argument("--charset", metavar="FILE", help="count label characters outside this charset")
    parser.add_argument("--max-length", type=positive, default=25, help="count longer labels (default: 25)")
    parser.add_argument("--against", metavar="LMDB", help="images that these LMDBs (test sets) have too are problems")
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw words from all over the LMDB to look at")
    parser.add_argument("--cells", type=positive, default=64, help="words on the contact sheet (default: 64)")
    parser.add_argument("--json", metavar="FILE", help="write the findings here as well")
    parser.add_argument("--rejected", metavar="FILE", help="list the problems here (default: with --fix, beside it)")
    parser.add_argument("--fix", metavar="OUTPUT", help="write a copy without the problems")
    add_run_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    for flag in ("fix", "rejected"):
        path = getattr(options, flag)
        if path and Path(path).exists() and not options.overwrite:
            raise UserError(f"{path}: exists already; choose another --{flag} or replace it with --overwrite")
    lmdbs = find_lmdbs(options.lmdb)
    mask_paths = [options.masks and find_mask_lmdb(options.masks, options.lmdb, path) for path in lmdbs]
    charset = Charset.from_file(options.charset) if options.charset else None
    others = digests_of(options.against, workers=options.workers) if options.against else set()
    checker = Checker(charset, options.max_length, options.workers, others)
    reports = []
    beside = options.fix and f"{options.fix.rstrip('/')}-rejected.tsv"
    with RejectionLog(options.rejected or beside) as log:
        for path, mask_path in zip(lmdbs, mask_paths, strict=True):
            report = checker.check(path, mask_path, log)
            reports.append(report)
            print_report(report)
            if options.contact_sheet and report.good:
                sheet = Path(options.contact_sheet)
                if len(lmdbs) > 1:
                    sheet = sheet.with_stem("-".join([sheet.stem, *path.relative_to(options.lmdb).parts]))
                write_contact_sheet(report, mask_path, sheet, options.cells)
            if options.fix and len(lmdbs) > 1 and not report.good:
                log.add(str(path), "no valid sample, no copy")
            elif options.fix:
                write_clean_copy(report, mask_path, options.lmdb, Path(options.fix), overwrite=options.overwrite)
    if options.json:
        text = json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False)
        write_atomically(Path(options.json), lambda file: file.write(text.encode() + b"\n"))
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    run_command_line(main)
