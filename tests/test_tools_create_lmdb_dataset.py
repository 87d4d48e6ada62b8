"""Folders of images become word LMDBs; every line is stored or listed with a reason."""

import csv
import os
import subprocess
import sys
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from loading.decoding import decode_image
from loading.lmdb_io import LmdbReader, image_key, label_key
from tools import create_lmdb_dataset
from tools.create_lmdb_dataset import read_entries, split_line
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT.parent / "shared" / "data" / "train"


def _image(path, kind="PNG", size=(40, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def _bomb():
    """A PNG whose header says 20,000 x 20,000 pixels, with a small body."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _convert(tmp_path, content, *options):
    """Run the tool on a list of labels in tmp_path; returns the (name, label) pairs stored and the rejected rows."""
    gt_file = tmp_path / "gt.txt"
    gt_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out"
    create_lmdb_dataset.main([str(tmp_path), str(gt_file), str(output), "--workers", "1", *options])
    reader = LmdbReader(output)
    labels = [reader.get(label_key(i)).decode() for i in range(1, len(reader) + 1)]
    return labels, _rejected(Path(f"{output}-rejected.tsv"))


def _rejected(path):
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["entry"], row["reason"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.png\tword", ("a.png", "word")),
        ("a b.png\ttwo words", ("a b.png", "two words")),
        ("a,b.png\tx,y", ("a,b.png", "x,y")),
        ("a.png,word", ("a.png", "word")),
        ("a.png,one, two", ("a.png", "one, two")),
        ('word_1.png, "Tiredness"', ("word_1.png", "Tiredness")),
        ('word_2.png, "say \\"hi\\""', ("word_2.png", 'say "hi"')),
        ('word_3.png, """', ("word_3.png", '"')),
        ("straße.png,Größe", ("straße.png", "Größe")),
    ],
)
def test_forms_of_a_line(line, expected):
    assert next(split_line(line)) == expected


def test_line_without_separator_has_no_reading():
    assert not list(split_line("a.png word"))


def test_every_format_is_stored_unchanged_and_in_order(tmp_path):
    kinds = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}
    paths = [_image(tmp_path / "im" / f"w.{suffix}", kind) for suffix, kind in kinds.items()]
    labels, rejected = _convert(tmp_path, "".join(f"im/{p.name}\t{p.suffix}\n" for p in paths))
    assert labels == [p.suffix for p in paths]
    assert rejected == []
    reader = LmdbReader(tmp_path / "out")
    for i, path in enumerate(paths, start=1):
        assert reader.get(image_key(i)) == path.read_bytes()


def test_images_are_stored_upright(tmp_path):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 10, 3), np.uint8))
    exif = Image.Exif()
    for orientation in range(9):
        exif[ExifTags.Base.Orientation] = orientation
        for suffix in ("png", "jpg"):
            small.resize((40, 16)).save(tmp_path / f"{orientation}.{suffix}", exif=exif, quality=95)
    names = [f"{orientation}.{suffix}" for orientation in range(9) for suffix in ("png", "jpg")]
    assert len(_convert(tmp_path, "".join(f"{name}\tx\n" for name in names))[0]) == 18
    reader = LmdbReader(tmp_path / "out")
    for number, name in enumerate(names, start=1):
        file, stored = (tmp_path / name).read_bytes(), reader.get(image_key(number))
        seen = decode_image(stored).astype(int)
        expected = decode_image(file, oriented=True)
        assert seen.shape == expected.shape
        assert np.abs(seen - expected).mean() < (8 if name.endswith("jpg") else 1e-9)  # another turn differs far more
        assert (stored == file) == (name[0] in "01")
        assert stored[:2] == file[:2]  # of one format


def test_names_and_labels_with_spaces_commas_tabs_and_accents(tmp_path):
    names = ["two words.png", "a,b.png", "tab\there.png", "Füße 漢字.png", "e\u0301.png"]
    for name in names:
        _image(tmp_path / name)
    lines = [f"{name}\tlabel {name[0]}" for name in names[:-1]] + ["\u00e9.png\taccent written otherwise"]
    labels, rejected = _convert(tmp_path, "\n".join(lines))
    assert labels == ["label t", "label a", "label t", "label F", "accent written otherwise"]
    assert rejected == []


def test_icdar_form_with_byte_order_mark_and_windows_line_ends(tmp_path):
    _image(tmp_path / "word_1.png")
    _image(tmp_path / "word,2.png")
    content = '\ufeffword_1.png, "Hello, you"\r\n\r\nword,2.png, "x"\r\n'
    assert _convert(tmp_path, content) == (["Hello, you", "x"], [])


def test_hostile_input_is_counted_by_reason_and_the_rest_is_stored(tmp_path):
    folder = tmp_path / "set"
    good = _image(folder / "good.png")
    _image(tmp_path / "outside.png")
    (folder / "zero.png").touch()
    (folder / "cut.png").write_bytes(good.read_bytes()[:-300])
    jpeg = _image(folder / "whole.jpg", "JPEG", (200, 80)).read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.png").write_text("no image at all")
    (folder / "bomb.png").write_bytes(_bomb())
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    lines = {
        b"good.png\tone": None,
        b"zero.png\tx": "damaged image",
        b"cut.png\tx": "damaged image",
        b"cut.jpg\tx": "damaged image",
        b"text.png\tx": "damaged image",
        b"bomb.png\tx": "damaged image",
        b"folder.png\tx": "not a file",
        b"pipe.png\tx": "not a file",
        b"missing.png\tx": "no such file",
        b"../outside.png\tx": "path leaves the folder",
        b"/etc/hostname\tx": "path leaves the folder",
        b"good.png\t\xff\xfe": "line is not UTF-8",
        b"good.png\t": "empty label",
        b"good.png\tx\ty": "tab in label",
        b"nothing here": "no separator",
        b"nul\0.png\tx": "no such file",
        b"\tx": "no path",
        b"whole.jpg\ttwo": None,
    }
    (folder / "gt.txt").write_bytes(b"\n".join(lines))
    output = tmp_path / "out"
    for workers in ("1", "2"):
        create_lmdb_dataset.main(
            [str(folder), str(folder / "gt.txt"), str(output), "--overwrite", "--workers", workers]
        )
        reader = LmdbReader(output)
        assert [reader.get(label_key(i)) for i in (1, 2)] == [b"one", b"two"]
        assert len(reader) == 2
        entries, reasons = zip(*_rejected(tmp_path / "out-rejected.tsv"), strict=True)
        assert list(reasons) == [reason for reason in lines.values() if reason]
        assert list(entries[:10]) == [line.decode().partition("\t")[0] for line in list(lines)[1:11]]
        assert entries[11:14] == ("good.png", "good.png", "nothing here")


def test_second_run_is_refused_and_loses_nothing(tmp_path):
    _image(tmp_path / "a.png")
    _convert(tmp_path, "a.png\tfirst\nb.png\tx\n")
    before = (tmp_path / "out-rejected.tsv").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        _convert(tmp_path, "a.png\tsecond\n")
    assert LmdbReader(tmp_path / "out").get(label_key(1)) == b"first"
    assert (tmp_path / "out-rejected.tsv").read_text() == before
    labels, rejected = _convert(tmp_path, "a.png\tsecond\n", "--overwrite")
    assert (labels, rejected) == (["second"], [])


def test_nothing_usable_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no such file: 1"):
        _convert(tmp_path, "missing.png\tx\n")
    assert os.listdir(tmp_path) == ["gt.txt"]


def test_lists_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt"):
        list(read_entries(tmp_path / "none.txt"))
    (tmp_path / "wide.txt").write_text("a.png\tx", encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        list(read_entries(tmp_path / "wide.txt"))
    with pytest.raises(UserError, match="no such folder"):
        create_lmdb_dataset.main([str(tmp_path / "none"), str(tmp_path / "wide.txt"), str(tmp_path / "out")])


def _program(*arguments, **options):
    command = [sys.executable, "tools/create_lmdb_dataset.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_program_runs_from_the_root_and_on_a_full_disk_says_so(tmp_path):
    _image(tmp_path / "a.png", size=(600, 600))
    (tmp_path / "gt.txt").write_text("a.png\tx\n" * 20)
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20,) * 2); "
    limit += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    arguments = ["tools/create_lmdb_dataset.py", str(tmp_path), str(tmp_path / "gt.txt"), str(tmp_path / "out")]
    full = subprocess.run(
        [sys.executable, "-c", limit, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert full.returncode == 2
    assert "error: " in full.stderr
    assert "disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.png", "gt.txt"]
    result = _program(tmp_path, tmp_path / "gt.txt", tmp_path / "out")
    assert result.returncode == 0
    assert "words" in result.stdout
    again = _program(tmp_path, tmp_path / "gt.txt", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1


@pytest.mark.skipif(not TRAIN.is_dir(), reason="shared data is absent")
@pytest.mark.parametrize(("name", "count"), [("svt", 257), ("ic03", 872)])
def test_real_words_are_all_usable(tmp_path, name, count):
    create_lmdb_dataset.main([str(TRAIN / name), str(TRAIN / name / "gt.txt"), str(tmp_path / "out")])
    assert len(LmdbReader(tmp_path / "out")) == count
    assert not (tmp_path / "out-rejected.tsv").exists()


def test_bomb_header_is_whole(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(BytesIO(_bomb())) as image:
        assert image.size == (20_000, 20_000)


def test_a_line_of_many_separators_costs_no_more_than_its_length():
    tracemalloc.start()
    try:
        predictions = sum(1 for _ in split_line("a," * 300_000))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert predictions == 2048  # no path is longer than 4096
