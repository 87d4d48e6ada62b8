"""Archives in the published forms of SynthText and MJSynth become word LMDBs."""

import faulthandler
import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from loading.lmdb_io import LmdbReader, image_key, label_key
from tools import crop_by_word_bb
from tools.crop_by_word_bb import check_box, crop_word, parse_scene
from tools.support import RejectedError
from utils import UserError

WIDTH, HEIGHT = 200, 120


def _cells(items):
    """A 1 x M cell array, as MATLAB stores it."""
    cells = np.empty((1, len(items)), object)
    for i, item in enumerate(items):
        cells[0, i] = item
    return cells


def _box(left, top, right, bottom):
    """Corners from the top left clockwise, (2, 4) as SynthText has them."""
    return np.array([[left, right, right, left], [top, top, bottom, bottom]], np.float32)


def _boxes(*boxes):
    """(2, 4, N); a single box is stored as (2, 4), as in the published file."""
    return boxes[0] if len(boxes) == 1 else np.stack(boxes, axis=-1)


def _save_archive(folder, entries):
    """Write images and gt.mat for (imname, boxes, texts) entries; colours tell the places of an image apart."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    pixels = np.stack([columns, rows * 2, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    for name, _, _ in entries:
        if name and ".." not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name, quality=95)
    content = {
        "imnames": _cells([np.array([name]) for name, _, _ in entries]),
        "wordBB": _cells([boxes for _, boxes, _ in entries]),
        "charBB": _cells([np.zeros((2, 4, 3)) for _ in entries]),
        "txt": _cells([np.array(texts) for _, _, texts in entries]),
    }
    savemat(folder / "gt.mat", content)
    return folder / "gt.mat"


def _words(output):
    reader = LmdbReader(output)
    return [
        (
            reader.get(label_key(i)).decode(),
            np.asarray(Image.open(BytesIO(reader.get(image_key(i)))).convert("RGB")).astype(int),
        )
        for i in range(1, len(reader) + 1)
    ]


def _reasons(output):
    path = output.with_name(output.name + "-rejected.tsv")
    if not path.exists():
        return {}
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {row[0]: row[1] for row in rows}


THREE = _boxes(_box(10, 10, 60, 30), _box(70, 10, 120, 30), _box(10, 50, 90, 80))
ENTRIES = [
    ("8/ballet_106_0.jpg", THREE, ["Lines:\nI  ", "lost "]),
    ("8/one word.jpg", _boxes(_box(20, 20, 80, 50)), ["  Kevin\n "]),
    ("9/none.jpg", np.zeros((2, 4, 0), np.float32), []),
]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_synthtext_words_are_cut_out_in_order(tmp_path, workers):
    gt = _save_archive(tmp_path / "SynthText", ENTRIES)
    crop_by_word_bb.main([str(gt), str(tmp_path / "out"), "--workers", workers])
    words = _words(tmp_path / "out")
    assert [label for label, _ in words] == ["Lines:", "I", "lost", "Kevin"]
    assert [crop.shape[:2] for _, crop in words] == [(20, 50), (20, 50), (30, 80), (30, 60)]
    for (_, crop), (left, top) in zip(words, [(10, 10), (70, 10), (10, 50), (20, 20)], strict=True):
        assert abs(crop[0, 0, :2] - (left, 2 * top)).max() <= 6  # JPEG
    assert _reasons(tmp_path / "out") == {}


def test_malformed_entries_are_counted_by_reason(tmp_path, capsys):
    nan = _box(10, 10, 60, 30)
    nan[0, 0] = np.nan
    entries = [
        ("a.jpg", _boxes(_box(10, 10, 60, 30), _box(70, 10, 120, 30)), ["only-one"]),
        ("b.jpg", _boxes(_box(300, 10, 360, 30), _box(180, 10, 260, 30), nan, _box(9, 9, 9.5, 30)), ["a b c d"]),
        ("c.jpg", np.zeros((3, 4), np.float32), ["word"]),
        ("../climbs.jpg", _boxes(_box(10, 10, 60, 30)), ["x"]),
        ("good.jpg", _boxes(_box(-5, 10, 60, 30)), ["clipped"]),
        ("gone.jpg", _boxes(_box(10, 10, 60, 30)), ["x"]),
        ("broken.jpg", _boxes(_box(10, 10, 60, 30), _box(10, 10, 60, 30)), ["two", "words"]),
    ]
    gt = _save_archive(tmp_path / "set", entries)
    (tmp_path / "climbs.jpg").write_bytes((tmp_path / "set" / "good.jpg").read_bytes())
    (tmp_path / "set" / "gone.jpg").unlink()
    (tmp_path / "set" / "broken.jpg").write_bytes((tmp_path / "set" / "good.jpg").read_bytes()[:400])
    crop_by_word_bb.main([str(gt), str(tmp_path / "out")])
    assert [label for label, _ in _words(tmp_path / "out")] == ["clipped"]
    assert _reasons(tmp_path / "out") == {
        "a.jpg": "boxes and words differ in number",
        "b.jpg#1": "box outside the image",
        "b.jpg#2": "box outside the image",
        "b.jpg#3": "box is not finite",
        "b.jpg#4": "degenerate box",
        "c.jpg": "boxes are not 2 x 4 x N",
        "../climbs.jpg": "path leaves the folder",
        "gone.jpg": "no such file",
        "broken.jpg": "damaged image",
    }
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rejected", "11"] in printed  # 2 + 4 + 1 + 1 + 1 + 2 words


def test_words_are_parted_at_white_space_and_line_ends():
    raw = (np.array(["a.jpg"]), np.zeros((2, 4, 4)), np.array(["ab\ncd ", " e\t f   "]))
    assert parse_scene(raw)[2] == ["ab", "cd", "e", "f"]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_boxes_are_rejected(scale):
    with pytest.raises(RejectedError):
        check_box(_box(1, 1, 5, 5).T * np.float32(scale), 100, 100)


def test_words_that_are_too_long_for_their_format_are_rejected():
    with pytest.raises(RejectedError, match="too large"):
        crop_word(np.zeros((8, 66_000, 3), np.uint8), _box(0, 0, 66_000, 8).T.copy())


@pytest.mark.parametrize("content", [b"", b"no mat file " * 50])
def test_gt_that_is_no_mat_file_is_named(tmp_path, content):
    (tmp_path / "gt.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"gt\.mat"):
        crop_by_word_bb.main([str(tmp_path / "gt.mat"), str(tmp_path / "out")])
    assert os.listdir(tmp_path) == ["gt.mat"]


def test_truncated_gt_and_missing_fields_are_named(tmp_path):
    gt = _save_archive(tmp_path, ENTRIES)
    gt.write_bytes(gt.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"gt\.mat"):
        crop_by_word_bb.main([str(gt), str(tmp_path / "out")])
    savemat(gt, {"imnames": _cells(["a"])})
    with pytest.raises(UserError, match="has no wordBB, txt"):
        crop_by_word_bb.main([str(gt), str(tmp_path / "out")])


def test_other_annotation_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither"):
        crop_by_word_bb.main([str(tmp_path / "gt.xml"), str(tmp_path / "out")])


def test_mjsynth_labels_come_from_the_file_names(tmp_path):
    root = tmp_path / "mnt" / "ramdisk" / "max" / "90kDICT32px"
    names = ["./2425/1/115_Lube_45484.jpg", "./2425/1/114_Spencerian_73323.jpg", "./1/2/3_a_b_4.jpg"]
    pixels = np.random.default_rng(0).integers(0, 255, (32, 100, 3), np.uint8)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    (root / "1/2/5_zero_6.jpg").touch()
    lines = [f"{name} 1" for name in names] + [names[0], f"{names[0]}\t1", f"{names[0]}  1"]
    lines += ["./1/2/5_zero_6.jpg 6", "./1/2/7_gone_8.jpg 8", "../../9_out_9.jpg 9", "./1/2/nolabel.jpg 1", "\u3000"]
    (root / "annotation_train.txt").write_text("\n".join(lines) + "\n")
    crop_by_word_bb.main([str(root / "annotation_train.txt"), str(tmp_path / "out")])
    assert [label for label, _ in _words(tmp_path / "out")] == ["Lube", "Spencerian", "a_b"] + ["Lube"] * 3
    assert LmdbReader(tmp_path / "out").get(image_key(1)) == (root / names[0]).read_bytes()
    assert list(_reasons(tmp_path / "out").items()) == [
        ("./1/2/5_zero_6.jpg", "damaged image"),
        ("./1/2/7_gone_8.jpg", "no such file"),
        ("../../9_out_9.jpg", "path leaves the folder"),
        ("./1/2/nolabel.jpg 1", "no label in the file name"),
        ("\\u3000", "no label in the file name"),
    ]


def test_second_run_is_refused(tmp_path):
    gt = _save_archive(tmp_path / "set", ENTRIES)
    crop_by_word_bb.main([str(gt), str(tmp_path / "out")])
    with pytest.raises(UserError, match="--overwrite"):
        crop_by_word_bb.main([str(gt), str(tmp_path / "out")])
    assert len(LmdbReader(tmp_path / "out")) == 4


def _crash(*_arguments, **_options):
    faulthandler.disable()  # the process is meant to die: no trace of it among the tests' lines
    os.abort()


def test_a_crash_of_the_matlab_reader_is_a_user_error(tmp_path, monkeypatch):
    """As on a damaged file that scipy reads outside its memory."""
    savemat(tmp_path / "gt.mat", {"imnames": 1})
    monkeypatch.setattr("scipy.io.loadmat", _crash)
    with pytest.raises(UserError, match=r"gt\.mat: cannot be read as a MATLAB file"):
        crop_by_word_bb.read_synthtext(tmp_path / "gt.mat")
