"""The tool that compares words: the same numbers for the same words, from whatever source."""

import cv2
import numpy as np
import pytest

from loading.lmdb_io import LmdbWriter
from tools import compare_words
from utils import UserError


def encode(image):
    return cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))[1].tobytes()


@pytest.fixture
def words():
    """Two words: a grey one with a light half, and a red one higher than wide."""
    grey = np.full((20, 60, 3), 50, np.uint8)
    grey[:, 30:] = 200
    return [("123", grey), ("Street", np.full((60, 20, 3), (200, 0, 0), np.uint8))]


def test_measurements(words):
    first, second = (compare_words.measure_word(image, text) for text, image in words)
    names = ("contrast", "luminance", "saturation", "height")
    assert [first[name] for name in names] == [150, 125, 0, 20]
    assert first["character's width / height"] == pytest.approx(1.0)
    assert second["saturation"] == 255
    assert second["detail"] == 0 < first["detail"]


def test_words_of_an_lmdb(tmp_path, words, capsys, monkeypatch):
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for text, image in words:
            writer.append(encode(image), text)
        writer.append(b"junk", "broken")
    monkeypatch.chdir(tmp_path)
    assert compare_words.main(["lmdb"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["", "lmdb"]
    assert ["words", "2"] in rows
    assert ["height, 10/50/90 %", "24 / 40 / 56"] in rows
    assert ["digits only", "50 %"] in rows
    assert ["1 to 3 characters", "50 %"] in rows
    assert ["higher than wide", "50 %"] in rows


def test_large_and_small_numbers_are_written_out():
    cells = compare_words.summarize("source", [{"detail": value} for value in (3950.4, 3950.4)])
    assert cells["detail, 10/50/90 %"] == "3950 / 3950 / 3950"
    assert compare_words.summarize("source", [{"aspect": 0.4567}])["aspect, 10/50/90 %"] == "0.46 / 0.46 / 0.46"


def test_renderings_at_each_difficulty(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("street\nmarket\n")
    (tmp_path / "easy.yaml").write_text(f"words: {{file: {tmp_path / 'words.txt'}, numbers: 0}}\n")
    arguments = [str(tmp_path / "easy.yaml"), "chances.strong_rotation=1", "--difficulty", "0.2", "0.6"]
    assert compare_words.main([*arguments, "--count", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "easy.yaml 0.2" in lines[0]
    assert "easy.yaml 0.6" in lines[0]
    rotations = next(line for line in lines if "rotation over 20" in line).replace("%", "").split("|")[2:4]
    assert int(rotations[0]) == 0 < int(rotations[1])


@pytest.mark.parametrize(
    ("sources", "message"),
    [(["none"], "not an LMDB"), (["none.yaml"], "none.yaml"), (["difficulty=1"], "no source"), ([], "SOURCE")],
)
def test_wrong_sources(tmp_path, monkeypatch, sources, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        compare_words.main(sources)
    assert message in str(error.value) + capsys.readouterr().err
