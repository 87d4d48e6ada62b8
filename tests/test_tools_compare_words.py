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
    first, second = (compare_words.measure(image, text) for text, image in words)
    assert (first.contrast, first.luminance, first.saturation, first.height) == (150, 125, 0, 20)
    assert first.character == pytest.approx(1.0)
    assert second.saturation == 255
    assert second.detail == 0 < first.detail
    assert second.rotation is None


def test_an_lmdb_and_a_folder_of_the_same_words_are_alike(tmp_path, words, capsys):
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for text, image in words:
            writer.append(encode(image), text)
        writer.commit()
    folder = tmp_path / "folder"
    folder.mkdir()
    for text, image in words:
        (folder / f"{text}.png").write_bytes(encode(image))
    (folder / "gt.txt").write_text("".join(f"{text}.png\t{text}\n" for text, _ in words) + "gone.png\tgone\n")
    assert compare_words.main([str(tmp_path / "lmdb"), str(folder)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["lmdb", "folder"]
    assert ["words", "2", "2"] in rows
    assert ["digits", "only", "50", "%", "50", "%"] in rows
    assert ["1", "to", "3", "characters", "50", "%", "50", "%"] in rows
    assert ["higher", "than", "wide", "50", "%", "50", "%"] in rows


def test_renderings_at_each_difficulty(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("street\nmarket\n")
    (tmp_path / "easy.yaml").write_text(f"words: {{file: {tmp_path / 'words.txt'}, numbers: 0}}\n")
    arguments = [str(tmp_path / "easy.yaml"), "chances.strong_rotation=1", "--difficulty", "0.2", "0.6"]
    assert compare_words.main([*arguments, "--count", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "easy 0.2" in lines[0]
    assert "easy 0.6" in lines[0]
    rotations = next(line for line in lines if line.startswith("rotation over 20")).replace("%", "").split()[-2:]
    assert int(rotations[0]) == 0 < int(rotations[1])


@pytest.mark.parametrize(
    ("sources", "message"),
    [(["none"], "gt.txt"), (["none.yaml"], "none.yaml"), (["difficulty=1"], "no source"), ([], "SOURCE")],
)
def test_wrong_sources(tmp_path, monkeypatch, sources, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as error:
        compare_words.main(sources)
    assert message in str(error.value) + capsys.readouterr().err
