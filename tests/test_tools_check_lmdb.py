"""The checker finds what is broken, counts what is odd, and writes clean copies."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from loading.lmdb_io import NUM_SAMPLES, LmdbReader, LmdbWriter, image_key, label_key
from loading.masks import find_mask_lmdb
from tools import check_lmdb
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CHARSET_36 = str(ROOT / "data" / "charset_36.txt")


def _encode(seed, kind="PNG", size=(64, 24), **options):
    """Return a smooth random image."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def _mask(size=(64, 24), value=255, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path, samples):
    with LmdbWriter(path) as writer:
        for image, label in samples:
            writer.append(image, label)
    return path


def _write_words(path, count=5, first=0):
    return _write(path, [(_encode(first + i), f"word{first + i}") for i in range(count)])


def _check(path, *options):
    """Run the checker; returns the exit status and the findings by LMDB name."""
    found, show = {}, check_lmdb.print_findings

    def keep(findings):
        found[findings.path.name] = vars(findings) | {"valid": len(findings.valid)}
        show(findings)

    with mock.patch.object(check_lmdb, "print_findings", keep):
        status = check_lmdb.main([str(path), "--workers", "1", *map(str, options)])
    return status, found


def test_clean_lmdb_has_status_0_and_its_statistics(tmp_path):
    _write(
        tmp_path / "a",
        [
            (_encode(0), "abc"),
            (_encode(1, "JPEG"), "Abc-é"),
            (_encode(2, size=(10, 40)), "é" * 2),
            (_encode(3), "x" * 26),
        ],
    )
    status, found = _check(tmp_path / "a", "--charset", CHARSET_36)
    assert status == 0
    assert found["a"]["num_samples"] == found["a"]["valid"] == 4
    assert found["a"]["problems"] == {}
    assert found["a"]["lengths"] == {3: 1, 5: 1, 2: 1, 26: 1}
    assert found["a"]["foreign_characters"] == {"é": 3, "-": 1}
    assert found["a"]["notes"] == {
        "labels with characters outside the charset": 2,
        "labels that training skips: empty": 1,
        "labels that training skips: too_long": 1,
    }


@pytest.fixture
def broken(tmp_path):
    """Nine samples of which the first and the last are whole, one key too few, one foreign key."""
    whole = _encode(0)
    with LmdbWriter(tmp_path / "broken") as writer:
        writer.append(whole, "first")
        writer.append(whole[:-200], "cut")
        writer.append(b"", "empty")
        writer.append(b"not an image", "text")
        writer.append(_encode(1), b"\xff\xfe")
        writer.append(_encode(2), "")
        writer.append(_encode(3))
        writer.put(label_key(8), "no image")
        writer.put(image_key(9), _encode(4))
        writer.put(label_key(9), "last")
        writer.put(NUM_SAMPLES, "11")
        writer.put("remark", "x")
    return tmp_path / "broken"


PROBLEMS = {
    "neither image nor label": 2,
    "damaged image": 3,
    "label is not UTF-8": 1,
    "label missing or empty": 2,
    "image missing": 1,
}


def test_every_fault_is_counted_by_reason(broken):
    status, found = _check(broken, "--rejected", broken.parent / "rejected.tsv")
    assert status == 1
    assert found["broken"]["problems"] == PROBLEMS
    assert found["broken"]["valid"] == 2
    assert found["broken"]["notes"] == {}
    assert len((broken.parent / "rejected.tsv").read_text().splitlines()) == 1 + 8  # and a header
    with pytest.raises(UserError, match=r"rejected\.tsv: exists"):
        _check(broken, "--rejected", broken.parent / "rejected.tsv")


def test_fix_writes_a_clean_copy_and_leaves_the_original(broken, tmp_path):
    before = (broken / "data.mdb").read_bytes()
    status, _ = _check(broken, "--fix", tmp_path / "clean")
    assert status == 1
    assert (broken / "data.mdb").read_bytes() == before
    reader = LmdbReader(tmp_path / "clean")
    assert [reader.get(label_key(i)) for i in (1, 2, 3)] == [b"first", b"last", None]
    assert reader.get(image_key(2)) == _encode(4)
    assert _check(tmp_path / "clean")[0] == 0
    with pytest.raises(UserError, match="--overwrite"):
        check_lmdb.main([str(broken), "--fix", str(tmp_path / "clean")])
    assert check_lmdb.main([str(broken), "--fix", str(tmp_path / "clean"), "--overwrite"]) == 1


def test_fix_keeps_all_that_is_stored_under_the_number_of_a_word(tmp_path):
    with LmdbWriter(tmp_path / "a") as writer:
        for number in (1, 2, 3):
            writer.append(_encode(number) if number != 2 else b"broken", f"word{number}")
            writer.put(f"lexicon-{number:09d}", f"list {number}")
        writer.put("lexicon-1k-000000003", "long list")
        writer.put("remark", "x")
    assert _check(tmp_path / "a", "--fix", tmp_path / "b")[0] == 1
    reader = LmdbReader(tmp_path / "b")
    lists = [b"list 1", b"list 3", None]
    assert [reader.get(f"lexicon-{number:09d}") for number in (1, 2, 3)] == lists
    assert list(reader.keys("lexicon-1k")) == ["lexicon-1k-000000002"]


@pytest.mark.parametrize(
    ("stored", "problems"),
    [(None, {"num-samples missing or no number": 1}), ("x", {"num-samples missing or no number": 1}), ("2", 3)],
)
def test_num_samples_is_compared_with_the_keys(tmp_path, stored, problems):
    with LmdbWriter(tmp_path / "a") as writer:
        for i in range(1, 6):
            writer.put(image_key(i), _encode(i))
            writer.put(label_key(i), "x")
        if stored:
            writer.put(NUM_SAMPLES, stored)
    status, found = _check(tmp_path / "a", "--fix", tmp_path / "b")
    assert status == 1
    assert found["a"]["problems"] == (problems if stored != "2" else {"beyond num-samples": 3})
    assert len(LmdbReader(tmp_path / "b")) == 5


def test_absurd_num_samples_takes_no_time(tmp_path):
    with LmdbWriter(tmp_path / "a") as writer:
        writer.append(_encode(0), "x")
        writer.commit()
        writer.put(NUM_SAMPLES, str(10**15))
    assert _check(tmp_path / "a")[1]["a"]["problems"] == {"neither image nor label": 10**15 - 1}


def test_masks_are_compared_with_their_words(tmp_path):
    _write_words(tmp_path / "images" / "a", 6)
    good = [(_mask(), f"word{i}") for i in range(6)]
    _write(tmp_path / "masks" / "a", good)
    assert _check(tmp_path / "images", "--masks", tmp_path / "masks")[0] == 0
    bad = list(good)
    bad[1] = (_mask((63, 24)), "word1")
    bad[2] = (_mask(), "of another word")
    bad[3] = (_encode(3)[:-300], "word3")
    bad[5] = (_mask(value=0), "word5")
    shutil.rmtree(tmp_path / "masks" / "a")
    with LmdbWriter(tmp_path / "masks" / "a") as writer:
        for number, (mask, label) in enumerate(bad, 1):
            if number != 5:
                writer.put(image_key(number), mask)
            writer.put(label_key(number), label)
        writer.put(NUM_SAMPLES, "6")
    status, found = _check(tmp_path / "images", "--masks", tmp_path / "masks", "--fix", tmp_path / "clean")
    assert status == 1
    assert found["a"]["problems"] == {
        "mask_size": 1,
        "mask of another word": 1,
        "mask_broken": 1,
        "mask_missing": 1,
    }
    assert found["a"]["notes"] == {"masks without text": 1}
    pair = [LmdbReader(tmp_path / "clean" / kind / "a") for kind in ("images", "masks")]
    assert [len(reader) for reader in pair] == [2, 2]
    assert [reader.get(label_key(2)) for reader in pair] == [b"word5", b"word5"]
    listed = [line.split("\t")[1:] for line in (tmp_path / "clean-rejected.tsv").read_text().splitlines()]
    assert ["mask_size", "63 x 24 for an image of 64 x 24"] in listed
    assert any(detail for reason, detail in listed if reason == "mask_broken" and detail != "word3")


def test_labels_that_are_too_long_are_noted_without_a_charset(tmp_path):
    _write(tmp_path / "a", [(_encode(i), "x" * (25 + i)) for i in range(3)])
    assert _check(tmp_path / "a")[1]["a"]["notes"] == {"labels that training skips: too_long": 2}


def test_missing_mask_lmdb_is_named(tmp_path):
    _write_words(tmp_path / "images" / "a")
    with pytest.raises(UserError, match="masks"):
        check_lmdb.main([str(tmp_path / "images"), "--masks", str(tmp_path / "masks")])


def test_segmentation_lmdb_needs_no_labels(tmp_path):
    with LmdbWriter(tmp_path / "seg") as writer:
        writer.append(_encode(0), mask=_mask())
        writer.append(_encode(1), mask=_mask((5, 5)))
    assert _check(tmp_path / "seg")[1]["seg"]["problems"] == {"mask_size": 1}


def test_images_shared_with_a_test_set_are_found_however_encoded(tmp_path):
    _write(tmp_path / "test", [(_encode(1, "BMP"), "one")])
    _write_words(tmp_path / "train", 5)
    shared = check_lmdb.SHARED
    status, found = _check(tmp_path / "train", "--against", tmp_path / "test", "--fix", tmp_path / "clean")
    assert (status, found["train"]["problems"]) == (1, {shared: 1})
    reader = LmdbReader(tmp_path / "clean")
    assert [reader.get(label_key(i)) for i in (1, 2, 3, 4)] == [b"word0", b"word2", b"word3", b"word4"]


def test_images_that_occur_twice_are_noted(tmp_path):
    _write(tmp_path / "a", [(_encode(1), "x"), (_encode(1, "BMP"), "y"), (_encode(2), "z")])
    status, found = _check(tmp_path / "a")
    assert status == 0
    assert found["a"]["notes"] == {"images that occur more than once": 1}


def test_number_of_workers_changes_nothing(broken):
    alone = _check(broken)
    assert _check(broken, "--workers", 2) == alone


def test_folder_gets_a_sheet_for_each_lmdb(tmp_path, capsys):
    for name in ("a", "b"):
        _write_words(tmp_path / "set" / name, 20)
    assert check_lmdb.main([str(tmp_path / "set"), "--contact-sheet", str(tmp_path / "s.png"), "--cells", "12"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["s-a.png", "s-b.png", "set"]
    assert Image.open(tmp_path / "s-a.png").width > 8 * 160
    printed = capsys.readouterr().out
    assert str(tmp_path / "set" / "b") in printed
    assert "label length" in printed


def test_contact_sheet_with_a_name_that_is_no_image_is_refused(tmp_path):
    _write_words(tmp_path / "a", 2)
    with pytest.raises(UserError, match=r"name a \.png file"):
        check_lmdb.main([str(tmp_path / "a"), "--contact-sheet", str(tmp_path / "s.words")])


def test_exit_status_for_scripts(tmp_path, broken):
    def run(*arguments):
        command = [sys.executable, "tools/check_lmdb.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert run(broken).returncode == 1
    missing = run(tmp_path / "missing")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("root", "masks"),
    [
        ("images", "masks"),  # <masks>/set of <images>/set
        ("images/set", "masks"),
        ("images/set", "masks/set"),  # the only one
        ("images", "masks/set"),
        ("images", "tree"),  # <tree>/images/set: the root is a folder of a larger tree
    ],
)
def test_masks_are_found_where_training_finds_them(tmp_path, root, masks):
    _write_words(tmp_path / "images" / "set")
    for place in ("masks/set", "tree/images/set"):
        _write(tmp_path / place, [(_mask(), None)] * 5)  # training takes masks without labels, too
    found = find_mask_lmdb(tmp_path / masks, tmp_path / root, tmp_path / "images" / "set")
    assert found.is_relative_to(tmp_path / masks)
    assert _check(tmp_path / root, "--masks", tmp_path / masks)[0] == 0
    shutil.rmtree(found)
    _write(found, [(_mask((9, 9)), None)] * 5)
    assert _check(tmp_path / root, "--masks", tmp_path / masks)[0] == 1


def test_masks_of_segmentation_data_are_checked_where_pairs_have_names(tmp_path):
    with LmdbWriter(tmp_path / "pairs") as writer:
        writer.append(_encode(0), "whole", _mask())
        writer.append(_encode(1), "small", _mask(size=(9, 9)))
        writer.append(_encode(2), "broken", b"junk")
        writer.append(_encode(3), "none")
    status, found = _check(tmp_path / "pairs")
    assert status == 1
    assert found["pairs"]["valid"] == 1


def test_an_lmdb_without_valid_samples_does_not_stop_the_copies_of_others(tmp_path):
    for name in ("a", "c"):
        _write_words(tmp_path / "root" / name)
    _write(tmp_path / "root" / "b", [(b"junk", "x")])
    assert check_lmdb.main([str(tmp_path / "root"), "--workers", "1", "--fix", str(tmp_path / "clean")]) == 1
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == ["a", "c"]
