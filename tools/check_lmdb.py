"""Check word LMDBs: broken entries, statistics of labels and sizes, masks, images shared with another LMDB."""

import argparse
import functools
import hashlib
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from evaluation.contact_sheet import save_sheet_of_lmdb
from loading.batches import TOO_LONG, LabelRule
from loading.charset import Charset
from loading.decoding import BrokenImageError, ImageArray, decode_mask
from loading.lmdb_io import NUM_SAMPLES, LmdbReader, LmdbWriter, find_lmdbs, image_key, label_key, mask_key
from loading.masks import LmdbMasks, find_mask_lmdb
from tools import support
from tools.support import RejectedError
from utils import UserError, run_command_line

EXAMPLE = """  python tools/check_lmdb.py data/training --charset data/charset_36.txt
  python tools/check_lmdb.py data/training/IIIT5k --against data/evaluation --contact-sheet sheet.png
  python tools/check_lmdb.py data/training/IIIT5k --masks data/masks/IIIT5k --fix clean

exit status: 0 clean, 1 problems found, 2 cannot be checked"""

SHARED = "image is in the other LMDB too"


@dataclass(frozen=True)
class Sample:
    """What was found under a number: `reason` is empty if nothing is wrong; equal pixels have equal digests."""

    number: int
    reason: str = ""
    detail: str = ""
    label: str = ""
    digest: int | None = None
    mask_empty: bool = False


@dataclass
class Findings:
    """The findings about one LMDB: numbers of valid samples, and the others (`problems`) counted by reason.

    `lengths` counts the valid samples by the length of their labels.
    """

    path: Path
    num_samples: int | None
    valid: array = field(default_factory=lambda: array("q"))
    problems: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    foreign_characters: Counter[str] = field(default_factory=Counter)


# --- samples ----------------------------------------------------------------------------------------------------------


def scan_keys(reader: LmdbReader) -> np.ndarray:
    """Return the numbers under which there is an image or a label, whatever `num-samples` says."""
    digits = (key.partition("-")[2] for kind in ("image-", "label-") for key in reader.keys(kind))
    # There may be millions.
    return np.unique(array("q", (int(each) for each in digits if len(each) == 9 and each.isdecimal() and int(each))))


def checked_samples(
    reader: LmdbReader, masks: LmdbMasks | None, numbers: np.ndarray, *, workers: int
) -> Iterator[Sample]:
    """Check samples in order, with a progress bar."""
    has_pairs = next(reader.keys("mask-"), None) is not None  # labels, where it has some, name the pairs
    masks = masks or (LmdbMasks(reader.path, mask_key) if has_pairs else None)
    check = functools.partial(check_sample, reader=reader, masks=masks, has_labels=not has_pairs)
    results = support.map_in_processes(check, map(int, numbers), workers=workers, chunk_size=64)
    return support.progress(results, total=len(numbers), unit="word", description=reader.path.name)


def check_sample(number: int, *, reader: LmdbReader, masks: LmdbMasks | None, has_labels: bool) -> Sample:
    """Read and decode everything under a number; runs in a worker."""
    label, mask_empty = "", False
    try:
        stored = reader.get(image_key(number))
        if stored is None:
            raise RejectedError("image missing")
        if has_labels:
            label = checked_label(reader.get(label_key(number)))
        image = support.checked_image(stored)
        if masks is not None:
            mask = masks.read(number, image)
            if isinstance(mask, str):
                raise RejectedError(mask, describe_mask(masks.reader.get(masks.key(number)), image))
            mask_empty = not mask.any()
            copied = masks.reader.get(label_key(number))  # training does without
            if has_labels and copied is not None and copied != label.encode():
                raise RejectedError("mask of another word", f"its label is {copied!r}")
    except RejectedError as error:
        return Sample(number, *error.args, label=label)
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
    return Sample(number, label=label, digest=int.from_bytes(digest), mask_empty=mask_empty)


def describe_mask(data: bytes | None, image: ImageArray) -> str:
    """Return what is wrong with a mask that training refuses."""
    try:
        height, width = decode_mask(data or b"").shape
    except BrokenImageError as error:
        return str(error)
    return f"{width} x {height} for an image of {image.shape[1]} x {image.shape[0]}"


def checked_label(data: bytes | None) -> str:
    """Decode a label; raises RejectedError."""
    if not data:
        raise RejectedError("label missing or empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectedError("label is not UTF-8", repr(data[:60])) from error


def digests_of(root: str, *, workers: int) -> set[int]:
    """Return the digests of the images in every LMDB of `root`; those that cannot be decoded are skipped."""
    digests: set[int] = set()
    for reader in map(LmdbReader, find_lmdbs(root)):
        digests.update(each.digest for each in checked_samples(reader, None, scan_keys(reader), workers=workers))
    return digests - {None}


# --- findings ---------------------------------------------------------------------------------------------------------


def check(
    path: Path,
    mask_path: Path | None,
    log: support.RejectionLog,
    *,
    charset: Charset | None,
    others: set[int],
    workers: int,
) -> Findings:
    """Check one LMDB and its masks; `others` are digests of images that it must not have."""
    reader = LmdbReader(path)
    masks = None if mask_path is None else LmdbMasks(mask_path)
    if masks is not None:
        len(masks.reader)  # what is not a mask LMDB is named before the work begins
    numbers = scan_keys(reader)
    try:
        findings = Findings(path, len(reader))
    except UserError:
        findings = Findings(path, None)
    for reason, count, detail in _count_problems(findings.num_samples, numbers):
        findings.problems[reason] += count
        log.add(str(path), reason, detail, count)
    digests = array("Q")  # there may be millions
    for sample in checked_samples(reader, masks, numbers, workers=workers):
        reason = sample.reason or (SHARED if sample.digest in others else "")
        if reason:
            findings.problems[reason] += 1
            log.add(f"{path}:{sample.number}", reason, sample.detail or sample.label)
        else:
            _describe(sample, findings, charset)
            digests.append(sample.digest)
    findings.notes["images that occur more than once"] = len(digests) - len(np.unique(digests))
    findings.notes = +findings.notes
    return findings


def _describe(sample: Sample, findings: Findings, charset: Charset | None) -> None:
    """Add a valid sample to the statistics."""
    findings.valid.append(sample.number)
    findings.lengths[len(sample.label)] += 1
    findings.notes["masks without text"] += sample.mask_empty
    reason = TOO_LONG if len(sample.label) > LabelRule.max_length else None
    if charset is not None and sample.label:
        foreign = [each for each in sample.label if not charset.normalize(each)]
        findings.foreign_characters.update(foreign)
        findings.notes["labels with characters outside the charset"] += bool(foreign)
        reason = LabelRule(charset).unusable(sample.label)
    findings.notes[f"labels that training skips: {reason}"] += reason is not None


def _count_problems(num_samples: int | None, numbers: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """Yield (reason, number, detail) where `num-samples` and the keys do not agree."""
    if num_samples is None:
        yield f"{NUM_SAMPLES} missing or no number", 1, ""
        return
    within = int(np.count_nonzero(numbers <= num_samples))
    if within < num_samples:
        yield "neither image nor label", num_samples - within, f"{NUM_SAMPLES} is {num_samples}, {within} have keys"
    if within < len(numbers):
        yield f"beyond {NUM_SAMPLES}", len(numbers) - within, f"{NUM_SAMPLES} is {num_samples}, last is {numbers[-1]}"


def print_findings(findings: Findings) -> None:
    """Print the findings about one LMDB."""
    counts: dict[str, Any] = {
        NUM_SAMPLES: "none" if findings.num_samples is None else findings.num_samples,
        "valid": len(findings.valid),
        "problems": findings.problems.total(),
    }
    counts |= {f"  {reason}": count for reason, count in findings.problems.most_common()}
    counts |= {f"note: {note}": count for note, count in findings.notes.most_common()}
    support.print_summary(str(findings.path), counts)
    for number, (length, count) in enumerate(sorted(findings.lengths.items())):
        bar = "#" * round(40 * count / max(findings.lengths.values()))
        print(f"  {'' if number else 'label length':20} {length:>8} {count:>10,} {bar}".rstrip())
    if findings.foreign_characters:
        shown = " ".join(f"{character!r}:{count}" for character, count in findings.foreign_characters.most_common(30))
        print(f"  characters outside the charset: {shown}")


# --- outputs ----------------------------------------------------------------------------------------------------------


def write_clean_copy(findings: Findings, mask_path: Path | None, root: str, output: Path, *, overwrite: bool) -> None:
    """Write the valid samples of a checked LMDB anew, numbered without gaps, and all that they have.

    The copy lies below `output` as the LMDB does below `root`; with masks, below `output/images`, and the masks
    likewise below `output/masks`.
    """
    if not findings.valid:
        raise UserError(f"{findings.path}: has no valid sample, so there is no clean copy to write")
    place = findings.path.relative_to(root)
    copies = {findings.path: output / place}
    if mask_path:
        place = place if place.name else findings.path.name
        copies = {findings.path: output / "images" / place, mask_path: output / "masks" / place}
    for source, target in copies.items():
        reader = LmdbReader(source)
        numbered = (re.fullmatch("(.+)-[0-9]{9}", key) for key in reader.keys(""))
        names = {match[1] for match in numbered if match} - {"image", "label", "mask"}  # such as word lists
        with LmdbWriter(target, overwrite=overwrite) as writer:
            for number in findings.valid:
                new = writer.append(*(reader.get(key(number)) for key in (image_key, label_key, mask_key)))
                for name in names:
                    value = reader.get(f"{name}-{number:09d}")
                    if value is not None:
                        writer.put(f"{name}-{new:09d}", value)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = support.make_parser(__doc__, EXAMPLE)
    parser.add_argument("lmdb", metavar="LMDB", help="an LMDB, or a folder of LMDBs")
    parser.add_argument("--masks", metavar="LMDB", help="its masks, found as those of dataset.masks.root")
    parser.add_argument("--charset", metavar="FILE", help="count labels that do not fit this charset")
    parser.add_argument("--against", metavar="LMDB", help="images that these LMDBs (test sets) have too are problems")
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw words from all over the LMDB to look at")
    parser.add_argument("--cells", type=support.positive, default=64, help="words on the contact sheet (default: 64)")
    parser.add_argument("--rejected", metavar="FILE", help="list the problems here (default: with --fix, beside it)")
    parser.add_argument("--fix", metavar="OUTPUT", help="write a copy without the problems")
    support.add_run_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    support.refuse_existing(options.fix, options.rejected, overwrite=options.overwrite)
    lmdbs = find_lmdbs(options.lmdb)
    mask_paths = [options.masks and find_mask_lmdb(options.masks, options.lmdb, path) for path in lmdbs]
    charset = Charset.from_file(options.charset) if options.charset else None
    others = digests_of(options.against, workers=options.workers) if options.against else set()
    has_problems = False
    beside = options.fix and f"{options.fix.rstrip('/')}-rejected.tsv"
    with support.RejectionLog(options.rejected or beside) as log:
        for path, mask_path in zip(lmdbs, mask_paths, strict=True):
            findings = check(path, mask_path, log, charset=charset, others=others, workers=options.workers)
            has_problems |= bool(findings.problems)
            print_findings(findings)
            if options.contact_sheet and findings.valid:
                sheet = Path(options.contact_sheet)
                if len(lmdbs) > 1:
                    sheet = sheet.with_stem("-".join([sheet.stem, *path.relative_to(options.lmdb).parts]))
                places = np.unique(np.linspace(0, len(findings.valid) - 1, options.cells).astype(int))
                save_sheet_of_lmdb(path, mask_path, [findings.valid[place] for place in places], sheet)
            if options.fix and len(lmdbs) > 1 and not findings.valid:
                log.add(str(path), "no valid sample, no copy")
            elif options.fix:
                write_clean_copy(findings, mask_path, options.lmdb, Path(options.fix), overwrite=options.overwrite)
    return int(has_problems)


if __name__ == "__main__":
    run_command_line(main)
