"""demo.py: what it finds, prints and draws, and that it reads what `main.py --phase test` reads."""

import json
import resource

import cv2
import numpy as np
import pytest

import demo
import main
from evaluation.drawing import on_image
from loading.lmdb_io import LmdbReader, image_key
from tests.small_networks import save_networks, small_config, write_words
from utils import UserError

WORDS = 7


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A folder with a bundle, an LMDB of words, and the same words as files."""
    folder = save_networks(tmp_path_factory.mktemp("demo"))
    write_words(folder / "words", WORDS)
    (folder / "images").mkdir()
    words = LmdbReader(folder / "words")
    for number in range(1, WORDS + 1):
        (folder / "images" / f"{number:02d}.png").write_bytes(words.get(image_key(number)))
    (folder / "images" / "notes.txt").write_text("no image")
    return folder


def run(capsys, setup, *arguments: str) -> tuple[int, list[str]]:
    status = demo.main(["--checkpoint", str(setup / "both.pth"), "--device", "cpu", *arguments])
    return status, capsys.readouterr().out.splitlines()


def test_folders_patterns_and_images_are_found(capsys, setup):
    status, from_folder = run(capsys, setup, "--input", str(setup / "images"))
    assert status == 0
    assert len(from_folder) == WORDS
    _, from_pattern = run(capsys, setup, "--input", str(setup / "images" / "*.png"))
    assert from_pattern == from_folder
    _, single = run(capsys, setup, "--input", str(setup / "images" / "02.png"))
    assert single == from_folder[1:2]
    path, _, confidence = single[0].split("\t")
    assert path.endswith("02.png")
    assert 0 <= float(confidence) <= 1
    with pytest.raises(UserError, match="--input"):
        run(capsys, setup, "--input", str(setup / "nothing*"))


def test_predictions_are_those_of_the_evaluation(capsys, setup, tmp_path):
    config = small_config("binet")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    arguments = ["--config", str(tmp_path / "config.yaml"), "--phase", "test", "--name", "run", "--image_only"]
    arguments += ["--checkpoint", str(setup / "both.pth"), "--test_root", str(setup / "words")]
    arguments += [f"global.workdir={tmp_path}", "dataset.masks.source=online"]
    assert main.main(arguments) == 0
    capsys.readouterr()
    lines = (tmp_path / "run" / "words-alignment" / "alignment.txt").read_text().splitlines()
    _, printed = run(capsys, setup, "--input", str(setup / "images"), "--json", "--precision", "fp32")
    assert [json.loads(line)["text"] for line in printed] == [line.split("\t")[1] for line in lines]


def test_json_lines_hold_characters_and_errors(capsys, setup, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "b.png").write_bytes((setup / "images" / "01.png").read_bytes())
    status, lines = run(capsys, setup, "--input", str(tmp_path), "--json")
    broken, whole = map(json.loads, lines)
    assert status == 0
    assert "a.png" in broken["error"]
    assert "".join(each["text"] for each in whole["characters"]) == whole["text"]
    assert run(capsys, setup, "--input", str(tmp_path / "a.png"))[0] == 2


def test_candidates_and_the_chosen_word_are_printed_below_the_prediction(capsys, setup, tmp_path):
    (tmp_path / "words.txt").write_text("hello\nworld\n")
    arguments = ["--input", str(setup / "images" / "01.png")]
    first, *words, match = run(capsys, setup, *arguments, "--topk", "3", "--lexicon", str(tmp_path / "words.txt"))[1]
    assert [first] == run(capsys, setup, *arguments)[1]
    rows = [word.split("\t") for word in words]
    assert [row[0] for row in rows] == [""] * 3
    probabilities = [float(row[2]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert match.split("\t")[:2] == ["", "most probable in the list"]
    assert match.split("\t")[2] in ("hello", "world")


def test_json_lines_hold_candidates_and_the_chosen_word(capsys, setup, tmp_path):
    (tmp_path / "words.txt").write_text("hello\nworld\n")
    arguments = ["--input", str(setup / "images" / "01.png"), "--json"]
    _, lines = run(capsys, setup, *arguments, "--topk", "2", "--lexicon", str(tmp_path / "words.txt"))
    fields = json.loads(lines[0])
    assert len(fields["candidates"]) == 2
    assert fields["candidates"][0]["confidence"] >= fields["candidates"][1]["confidence"]
    assert fields["match"]["text"] in ("hello", "world")
    assert not {"candidates", "match"} & set(json.loads(run(capsys, setup, *arguments)[1][0]))
    with pytest.raises(UserError, match="gone"):
        run(capsys, setup, *arguments, "--lexicon", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="topk"):
        run(capsys, setup, *arguments, "--topk", "-1")


def test_the_table_keeps_its_columns_whatever_is_read(capsys, setup, tmp_path):
    (tmp_path / "a\tb\nc.png").write_bytes(b"broken")
    (tmp_path / "d.png").write_bytes((setup / "images" / "01.png").read_bytes())
    (tmp_path / "folder.png").mkdir()
    assert demo.main(["--checkpoint", str(setup / "both.pth"), "--device", "cpu", "--input", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [len(row) for row in rows] == [3, 3]
    assert rows[0][1:] == ["", "0.0000"]
    assert rows[1][1]
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_an_image_of_any_shape_is_drawn(capsys, setup, tmp_path):
    """Very wide and very tall ones would be drawn at 64 pixels' height: gigabytes."""
    for name, size in (("a", (1, 20_000)), ("b", (20_000, 1)), ("c", (3000, 4000))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((*size, 3), 200, np.uint8))
    (tmp_path / "d.png").write_bytes((setup / "images" / "01.png").read_bytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    run(capsys, setup, "--input", str(tmp_path), "--overlay", str(tmp_path / "o"))
    needed = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert len(list((tmp_path / "o").iterdir())) == 4
    assert needed < 400  # MiB
    assert all(max(cv2.imread(str(each)).shape) < 5000 for each in (tmp_path / "o").iterdir())


def test_overlays_are_images_with_names_of_their_own(capsys, setup, tmp_path):
    twice = str(setup / "images" / "01.png")
    status, lines = run(capsys, setup, "--input", twice, "--input", twice, "--overlay", str(tmp_path / "o"), "--json")
    assert status == 0
    drawings = [cv2.imread(json.loads(line)["overlay"]) for line in lines]
    assert len({json.loads(line)["overlay"] for line in lines}) == 2
    assert all(drawing.shape[0] >= demo.OVERLAY_HEIGHT and np.ptp(drawing) > 0 for drawing in drawings)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--overlay"):
        run(capsys, setup, "--input", twice, "--overlay", str(tmp_path / "file"))


def test_no_masks_may_be_asked_for(capsys, setup):
    arguments = ["--checkpoint", str(setup / "binet.pth"), "--input", str(setup / "images"), "--device", "cpu"]
    with pytest.raises(UserError, match="--masks none"):
        demo.main(arguments)
    assert demo.main([*arguments, "--masks", "none"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == WORDS


@pytest.mark.parametrize(
    "extent", [(0, 0, 1, 1), (0, 0, 1, 0.25), (0, 0, 0.5, 1), (0, 0.375, 1, 0.25), (0.25, 0, 0.5, 1)]
)
def test_a_map_over_the_input_lies_where_its_part_of_the_image_is(extent):
    """A spot in the middle of what the image fills of the input comes to the middle of the image."""
    values = np.zeros((32, 128), np.float32)
    row, column = int(32 * extent[0] + 16 * extent[2]), int(128 * extent[1] + 64 * extent[3])
    values[row - 2 : row + 2, column - 2 : column + 2] = 1
    drawn = on_image(values, (64, 100), extent)
    assert drawn.shape == (64, 100)
    rows, columns = np.nonzero(drawn > 0.5)
    assert abs(rows.mean() - 31.5) < 1.5
    assert abs(columns.mean() - 49.5) < 1.5
