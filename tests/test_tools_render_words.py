"""The tool that renders words: two LMDBs that belong together, or none."""

import errno
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from loading import lmdb_io
from loading.lmdb_io import LmdbReader, image_key, label_key
from rendering.config import load_render_config
from rendering.engine import WordRenderer
from tools import render_words
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("street\nmarket\ncoffee\nopen\n")
    return path


def run(tmp_path, words, *more, count=12, name="w", workers=1):
    arguments = ["--output", str(tmp_path / "out"), "--name", name, "--count", str(count), f"words.file={words}"]
    return render_words.main([*arguments, "--workers", str(workers), *more])


def read(path):
    reader = LmdbReader(path)
    return [(bytes(reader.get(image_key(i))), bytes(reader.get(label_key(i)))) for i in range(1, len(reader) + 1)]


def decode(data, flags=cv2.IMREAD_UNCHANGED):
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def test_two_lmdbs_with_the_same_keys_labels_and_sizes(tmp_path, words, capsys):
    assert run(tmp_path, words, "--seed", "5", "output.image=png") == 0
    images, masks = read(tmp_path / "out/images/w"), read(tmp_path / "out/masks/w")
    assert len(images) == len(masks) == 12
    renderer = WordRenderer(load_render_config(None, [f"words.file={words}"]))
    for index, ((image, label), (mask, mask_label)) in enumerate(zip(images, masks, strict=True)):
        word = renderer.render(5, index)
        assert label == mask_label == word.text.encode()
        assert mask.startswith(b"\x89PNG")
        assert np.array_equal(decode(mask), word.mask)
        assert np.array_equal(decode(image)[..., ::-1], word.image)
    summary = capsys.readouterr().out
    assert "words" in summary
    assert "12" in summary


def test_jpeg_images_are_close(tmp_path, words):
    run(tmp_path, words, "difficulty=0")
    renderer = WordRenderer(load_render_config(None, [f"words.file={words}", "difficulty=0"]))
    for index, (image, _) in enumerate(read(tmp_path / "out/images/w")):
        assert image.startswith(b"\xff\xd8")
        difference = decode(image)[..., ::-1].astype(int) - renderer.render(0, index).image
        assert np.abs(difference).mean() < 4


def test_same_words_for_any_number_of_workers(tmp_path, words):
    run(tmp_path, words, count=70, name="one", workers=1)
    run(tmp_path, words, count=70, name="two", workers=2)
    for kind in ("images", "masks"):
        assert read(tmp_path / "out" / kind / "one") == read(tmp_path / "out" / kind / "two")


def test_runs_twice(tmp_path, words):
    run(tmp_path, words)
    with pytest.raises(UserError, match="--overwrite"):
        run(tmp_path, words, count=3)
    assert len(read(tmp_path / "out/images/w")) == len(read(tmp_path / "out/masks/w")) == 12
    run(tmp_path, words, "--overwrite", count=3)
    assert len(read(tmp_path / "out/images/w")) == len(read(tmp_path / "out/masks/w")) == 3


@pytest.mark.parametrize("fails", ["images", "masks"])
def test_a_full_disk_leaves_neither(tmp_path, words, monkeypatch, fails):
    commit = lmdb_io.LmdbWriter.commit

    def full(self):
        if self.path.parent.name == fails:
            with self._explained_errors():
                raise OSError(errno.ENOSPC, "No space left on device")
        commit(self)

    monkeypatch.setattr(lmdb_io.LmdbWriter, "commit", full)
    with pytest.raises(UserError, match="disk is full"):
        run(tmp_path, words)
    assert not list((tmp_path / "out").rglob("data.mdb"))


def test_a_failure_at_the_very_end_leaves_neither(tmp_path, words, monkeypatch):
    def full(self):
        raise UserError("the disk is full")

    monkeypatch.setattr(
        lmdb_io.LmdbWriter,
        "_rename",
        lambda self, rename=lmdb_io.LmdbWriter._rename: (
            full(self) if self.path.parent.name == "masks" else rename(self)
        ),
    )
    with pytest.raises(UserError, match="full"):
        run(tmp_path, words)
    assert not list((tmp_path / "out").rglob("data.mdb"))


def test_contact_sheet(tmp_path, words):
    run(tmp_path, words, "--contact-sheet", str(tmp_path / "sheet.png"))
    assert decode((tmp_path / "sheet.png").read_bytes()).shape[0] > 100
    with pytest.raises(UserError, match="contact sheet"):
        run(tmp_path, words, "--contact-sheet", str(tmp_path / "sheet.nothing"), name="other")


def test_flags_reach_the_settings(tmp_path, words):
    flags = ["--output", "o", "--name", "n", "--difficulty", "0.9", "--photos", "p", f"words.file={words}"]
    flags += ["--config", "configs/render.yaml", "--seed", "1", "letters.height=30", "difficulty=0.1"]
    options = render_words.parse_arguments(flags)
    config = load_render_config(options.config, options.overrides)
    assert (config.difficulty, config.photos, config.words.file) == (0.9, "p", str(words))
    assert config.letters.height == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dificulty=1"], "nearest known key: difficulty"),
        (["--config", "none.yaml"], "none.yaml"),
        (["words.file=none.txt"], "none.txt"),
        (["fonts.folders=[none]"], "none"),
        (["--photos", "none"], "none"),
        (["background=photo"], "photos"),
    ],
)
def test_wrong_settings_write_nothing(tmp_path, words, arguments, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, words, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    command = [
        sys.executable,
        "tools/render_words.py",
        "--output",
        str(tmp_path / "o"),
        "--name",
        "n",
        "words.file=none",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none: cannot read the word list")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [["--name", "a/b"], ["--name", ".."], ["--count", "0"], ["--seed", "-1"]])
def test_wrong_arguments(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        render_words.main(["--output", str(tmp_path / "o"), "--name", "n", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        render_words.main(["--help"])
    assert "python tools/render_words.py --output" in capsys.readouterr().out
