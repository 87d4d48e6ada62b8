"""Check word LMDBs: broken entries, label and size statistics, masks, words shared with another LMDB."""

import bisect
import functools
import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python tools/NAME.py`

from evaluation.contact_sheet import Cell, save_contact_sheet
from loading.charset import Charset
from loading.decoding import to_8_bits
from loading.lmdb_io import NUM_SAMPLES, LmdbReader, LmdbWriter, find_lmdbs, image_key, label_key, mask_key
from loading.masks import find_mask_lmdb
from tools.support import (
    MAX_PIXELS,
    RejectedError,
    RejectionLog,
    add_run_arguments,
    decode_image,
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

HEIGHT_EDGES = (8, 16, 32, 64, 128)  # pixels
ASPECT_EDGES = (1, 2, 4, 8)  # width / height
FINGERPRINT_SIDE = 16  # a fingerprint has this squared bits
NEAR_BITS = 10  # fingerprints of re-encoded copies of a word differ by less
SHARED = "image is in the other LMDB too"


@dataclass(frozen=True)
class Sample:
    """What was found at one index: `reason` is empty when nothing is wrong with it.

    `digest` (16 bytes) is equal for equal pixels; `fingerprint` (32 bytes) is alike for images that look alike.
    """

    index: int
    reason: str = ""
    detail: str = ""
    label: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""
    fingerprint: bytes = b""
    mask_empty: bool = False


@dataclass
class Report:
    """The findings about one LMDB; `problems` counts entries by reason and is empty when it is clean."""

    path: str
    num_samples: int | None
    samples: int = 0
    valid: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    heights: Counter[str] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    foreign_characters: Counter[str] = field(default_factory=Counter)
    good: array = field(default_factory=lambda: array("q"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the list of good indices, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "good"}


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


def check_sample(
    index: int, *, reader: LmdbReader, masks: LmdbReader | None, segmentation: bool, max_pixels: int
) -> Sample:
    """Read and decode everything at `index`; runs in a worker."""
    label = ""
    try:
        stored = reader.get(image_key(index))
        if stored is None:
            raise RejectedError("image missing")
        if not segmentation:
            label = _label(reader.get(label_key(index)))
        image = decode_image(stored, max_pixels)
        pixels = to_8_bits(image).convert("RGB")
        mask_empty = False
        if segmentation:
            mask_empty = _is_empty(reader.get(mask_key(index)), image.size, max_pixels)
        elif masks is not None:
            mask_empty = _is_empty(masks.get(image_key(index)), image.size, max_pixels)
            copied = masks.get(label_key(index))  # training does without
            if copied is not None and copied != label.encode():
                raise RejectedError("mask of another word", f"its label is {copied!r}")
    except RejectedError as error:
        return Sample(index, *error.args, label=label)
    digest = hashlib.blake2b(repr(image.size).encode() + pixels.tobytes(), digest_size=16).digest()
    return Sample(index, "", "", label, image.format or "", *image.size, digest, fingerprint(pixels), mask_empty)


def _label(data: bytes | None) -> str:
    if data is None:
        raise RejectedError("label missing")
    try:
        label = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RejectedError("label is not UTF-8", repr(data[:60])) from error
    if not label:
        raise RejectedError("label empty")
    return label


def _is_empty(data: bytes | None, size: tuple[int, int], max_pixels: int) -> bool:
    """Check the encoded mask of an image of `size`; tell whether it has no text."""
    if data is None:
        raise RejectedError("mask missing")
    try:
        mask = decode_image(data, max_pixels)
    except RejectedError as error:
        raise RejectedError(f"mask: {error.reason}", error.detail) from error
    if mask.size != size:
        raise RejectedError("mask of another size", f"{mask.size} for an image of {size}")
    if mask.mode not in ("L", "1"):
        raise RejectedError("mask is not 8-bit grey", f"mode {mask.mode}")
    return mask.getextrema()[1] == 0


def fingerprint(image: Image.Image) -> bytes:
    """Return a difference hash: for each cell of a small grey copy, whether it is brighter than its left neighbour."""
    side = FINGERPRINT_SIDE
    grey = np.asarray(image.convert("L").resize((side + 1, side), Image.Resampling.BOX))
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


class ImageSet:
    """The images of other LMDBs, to ask whether one is among them, exactly or nearly."""

    def __init__(self, *, near: bool) -> None:
        self._near = near
        self._digests: set[bytes] = set()
        self._fingerprints = bytearray()

    def add(self, sample: Sample) -> None:
        """Add the image of a sample."""
        self._digests.add(sample.digest)
        self._fingerprints += sample.fingerprint

    def holds(self, sample: Sample) -> bool:
        """Tell whether an image with the same pixels, or with `near` one that looks the same, was added."""
        if sample.digest in self._digests:
            return True
        if not self._near or not self._fingerprints:
            return False
        bits = np.frombuffer(self._fingerprints, np.uint64).reshape(-1, FINGERPRINT_SIDE**2 // 64)
        distances = np.bitwise_count(bits ^ np.frombuffer(sample.fingerprint, np.uint64)).sum(axis=1)
        return bool(distances.min() <= NEAR_BITS)


@dataclass(frozen=True)
class Checker:
    """Checks LMDBs with the same settings: `charset` and `max_length` as in training; `other` may be None."""

    charset: Charset | None = None
    max_length: int = 25
    max_pixels: int = MAX_PIXELS
    workers: int = 1
    other: ImageSet | None = None

    def samples(self, reader: LmdbReader, masks: LmdbReader | None, indices: np.ndarray) -> Iterator[Sample]:
        """Check the samples of `indices` in order, with a progress bar."""
        segmentation = next(reader.keys("mask-"), None) is not None  # labels, where it has some, name the pairs
        check = functools.partial(
            check_sample, reader=reader, masks=masks, segmentation=segmentation, max_pixels=self.max_pixels
        )
        results = map_in_processes(check, map(int, indices), workers=self.workers, chunk_size=64)
        return progress(results, total=len(indices), unit="word", description=reader.path.name)

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
        digests = bytearray()
        for sample in self.samples(reader, masks, indices):
            report.samples += 1
            if not sample.reason and self.other is not None and self.other.holds(sample):
                sample = Sample(sample.index, SHARED, sample.label)
            if sample.reason:
                report.problems[sample.reason] += 1
                log.add(f"{path}:{sample.index}", sample.reason, sample.detail)
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
        report.formats[sample.format] += 1
        report.lengths[len(sample.label)] += 1
        report.heights[_bucket(sample.height, HEIGHT_EDGES)] += 1
        report.aspects[_bucket(sample.width / sample.height, ASPECT_EDGES)] += 1
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


def _bucket(value: float, edges: tuple[int, ...]) -> str:
    place = bisect.bisect_right(edges, value)
    return f"{(0, *edges)[place]}-{(*edges, '')[place]}"


def write_clean_copy(report: Report, mask_path: Path | None, root: str, output: Path, *, overwrite: bool) -> None:
    """Write the valid samples of a checked LMDB anew, numbered without gaps.

    The copy lies below `output` as the LMDB does below `root`; with masks, below `output/images`, and the masks
    likewise below `output/masks`.
    """
    source = LmdbReader(report.path)
    place = Path(report.path).relative_to(root)
    if mask_path:
        place = place if place.name else Path(report.path).name
        output, mask_output = output / "images" / place, output / "masks" / place
    else:
        output = output / place
    if not report.good:
        raise UserError(f"{report.path}: has no valid sample, so there is no clean copy to write")
    with LmdbWriter(output, overwrite=overwrite) as writer:
        for index in report.good:
            writer.append(source.get(image_key(index)), source.get(label_key(index)), source.get(mask_key(index)))
    if mask_path:
        masks = LmdbReader(mask_path)
        with LmdbWriter(mask_output, overwrite=overwrite) as writer:
            for index in report.good:
                writer.append(masks.get(image_key(index)), masks.get(label_key(index)))


def write_contact_sheet(report: Report, mask_path: Path | None, output: Path, count: int) -> None:
    """Draw `count` valid samples, evenly spread over the LMDB."""
    if not report.good:
        return
    reader = LmdbReader(report.path)
    masks = LmdbReader(mask_path) if mask_path else None
    chosen = [report.good[i] for i in np.unique(np.linspace(0, len(report.good) - 1, count).astype(int))]
    cells = []
    for index in chosen:
        mask = masks.get(image_key(index)) if masks else reader.get(mask_key(index))
        label = reader.get(label_key(index)) or b""
        image, mask = (
            None if data is None else np.asarray(decode_image(data, sys.maxsize, mode))  # its size was checked
            for data, mode in ((reader.get(image_key(index)), "RGB"), (mask, "L"))
        )
        cells.append(Cell(image, f"{index} {label.decode()}", mask))
    save_contact_sheet(cells, output)


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
    _print_histogram("format", report.formats)
    _print_histogram("label length", {str(length): count for length, count in sorted(report.lengths.items())})
    for title, counts, edges in (
        ("height in pixels", report.heights, HEIGHT_EDGES),
        ("width / height", report.aspects, ASPECT_EDGES),
    ):
        _print_histogram(title, {_bucket(low, edges): counts[_bucket(low, edges)] for low in (0, *edges)})
    if report.foreign_characters:
        shown = " ".join(f"{character!r}:{count}" for character, count in report.foreign_characters.most_common(30))
        print(f"  characters outside the charset: {shown}")


def _print_histogram(title: str, counts: dict[str, int]) -> None:
    most = max(counts.values(), default=0)
    if most:
        print(f"  {title}")
        for name, count in counts.items():
            print(f"    {name:>8} {count:>10,} {'#' * round(40 * count / most)}".rstrip())


def collect_images(root: str, checker: Checker, *, near: bool) -> ImageSet:
    """Return the images of every LMDB of `root`; those that cannot be decoded are passed over."""
    images = ImageSet(near=near)
    for path in find_lmdbs(root):
        reader = LmdbReader(path)
        for sample in checker.samples(reader, None, scan_keys(reader)[0]):
            if sample.digest:
                images.add(sample)
    return images


def _parse(arguments: list[str] | None) -> Any:
    parser = make_parser(__doc__, EXAMPLE)
    parser.add_argument("lmdb", metavar="LMDB", help="an LMDB, or a folder of LMDBs")
    parser.add_argument(
        "--masks", metavar="LMDB", help="its masks, found as training finds those of dataset.masks.root"
    )
    parser.add_argument("--charset", metavar="FILE", help="count label characters outside this charset")
    parser.add_argument("--max-length", type=positive, default=25, help="count longer labels (default: 25)")
    parser.add_argument("--against", metavar="LMDB", help="images that these LMDBs (test sets) have too are problems")
    parser.add_argument("--near", action="store_true", help="with --against: look-alikes too (slow on large sets)")
    parser.add_argument("--contact-sheet", metavar="PNG", help="draw words from all over the LMDB to look at")
    parser.add_argument("--cells", type=positive, default=64, help="words on the contact sheet (default: 64)")
    parser.add_argument("--json", metavar="FILE", help="write the findings here (-: to stdout, instead of the text)")
    parser.add_argument("--fix", metavar="OUTPUT", help="write a copy without the problems")
    add_run_arguments(parser, log="with --fix OUTPUT-rejected.tsv, else none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.fix and Path(options.fix).exists() and not options.overwrite:
        raise UserError(f"{options.fix}: exists already; choose another --fix or replace it with --overwrite")
    lmdbs = find_lmdbs(options.lmdb)
    mask_paths = [options.masks and find_mask_lmdb(options.masks, options.lmdb, path) for path in lmdbs]
    charset = Charset.from_file(options.charset) if options.charset else None
    settings = (charset, options.max_length, options.max_pixels, options.workers)
    other = collect_images(options.against, Checker(*settings), near=options.near) if options.against else None
    checker = Checker(*settings, other)
    reports = []
    with RejectionLog(options.rejected or (f"{options.fix.rstrip('/')}-rejected.tsv" if options.fix else None)) as log:
        for path, mask_path in zip(lmdbs, mask_paths, strict=True):
            report = checker.check(path, mask_path, log)
            reports.append(report)
            if options.json != "-":
                print_report(report)
            if options.contact_sheet:
                sheet = Path(options.contact_sheet)
                if len(lmdbs) > 1:
                    name = "-".join([sheet.stem, *path.relative_to(options.lmdb).parts])
                    sheet = sheet.with_name(name + sheet.suffix)
                write_contact_sheet(report, mask_path, sheet, options.cells)
            if options.fix and len(lmdbs) > 1 and not report.good:
                log.add(str(path), "no valid sample, no copy")
            elif options.fix:
                write_clean_copy(report, mask_path, options.lmdb, Path(options.fix), overwrite=options.overwrite)
    text = json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False)
    if options.json == "-":
        print(text)
    elif options.json:
        write_atomically(Path(options.json), lambda file: file.write(text.encode() + b"\n"))
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    run_command_line(main)
