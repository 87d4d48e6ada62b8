"""tools/create_segmentation_data.py: each set on a small sample in its owners' form, and what must be refused."""

import json
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from loading.lmdb_io import LmdbReader, image_key, mask_key
from tools import create_segmentation_data as tool
from utils import UserError

SIZE = (40, 60)  # height, width
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def save(path: Path, values: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)


def scene(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def run(tmp_path: Path, name: str, *options: str, output: str = "out") -> Path:
    target = tmp_path / output
    tool.main(["--format", name, "--source", str(tmp_path / "source"), "--output", str(target), *options])
    return target


def mask_of(output: Path, name: str) -> np.ndarray:
    return cv2.imread(str(output / "masks" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def names(output: Path) -> list[str]:
    images = sorted(each.stem for each in (output / "images").iterdir())
    assert images == sorted(each.stem for each in (output / "masks").iterdir())
    return images


@pytest.fixture
def icdar13(tmp_path):
    """Two characters of a word, one of another, and one to ignore."""
    source = tmp_path / "source"
    save(source / "Challenge2_Training_Task12_Images" / "100.jpg", scene())
    truth = np.full((*SIZE, 3), 255, np.uint8)
    truth[10:20, 10:14] = RED
    truth[10:20, 16:20] = BLUE
    truth[30:36, 40:44] = GREEN
    truth[2:6, 50:54] = (1, 2, 3)
    save(source / "Challenge2_Training_Task2_GT" / "100_GT.bmp", truth)
    (source / "Challenge2_Training_Task2_GT" / "100_GT.txt").write_text(
        '255 0 0 12 15 10 10 13 19 "H"\n0 0 255 18 15 16 10 19 19 "i"\n\n'
        '0 128 0 42 33 40 30 43 35 """\n\n#1,2,3,52,4,49,1,55,7,"?"\n# a remark\n'
    )
    return tmp_path


def test_icdar13_colours_are_text_and_marked_characters_are_ignored(icdar13):
    output = run(icdar13, "icdar13")
    assert names(output) == ["100"]
    mask = mask_of(output, "100")
    expected = np.zeros(SIZE, np.uint8)
    expected[10:20, 10:14] = expected[10:20, 16:20] = expected[30:36, 40:44] = 255
    expected[1:8, 49:56] = 128
    assert np.array_equal(mask, expected)
    original = icdar13 / "source" / "Challenge2_Training_Task12_Images" / "100.jpg"
    assert (output / "images" / "100.jpg").read_bytes() == original.read_bytes()


def test_icdar13_words_are_groups_of_characters_with_a_margin(icdar13):
    output = run(icdar13, "icdar13", "--words", "--margin", "0.2")
    assert names(output) == ["100_001", "100_002"]
    word = mask_of(output, "100_001")
    assert word.shape == (14, 14)  # a box of 10 x 10 pixels and 2 on each side
    assert np.array_equal(np.unique(word), [0, 255])
    assert word[2:12, 2:6].all()
    image = cv2.imread(str(output / "images" / "100_001.png"))
    whole = cv2.imread(str(next((icdar13 / "source").rglob("100.jpg"))))
    assert np.array_equal(image, whole[8:22, 8:22])


def test_icdar13_names_lines_that_it_cannot_read(icdar13):
    next((icdar13 / "source").rglob("100_GT.txt")).write_text("1 2 3\n")
    with pytest.raises(UserError, match="damaged text file"):
        run(icdar13, "icdar13")


@pytest.fixture
def totaltext(tmp_path):
    source = tmp_path / "source"
    for split, stem, top in (("Train", "img11", 10), ("Test", "img1", 20)):
        save(source / "Images" / split / f"{stem}.jpg", scene())
        mask = np.zeros(SIZE, np.uint8)
        mask[top : top + 8, 8:32] = 255
        save(source / "groundtruth_pixel" / split / f"{stem}.jpg", mask, quality=95)
        polygons = source / "groundtruth_polygonal_annotation" / split / f"poly_gt_{stem}.txt"
        polygons.parent.mkdir(parents=True)
        polygons.write_text(
            f"x: [[ 8 20 31 31  8]], y: [[{top} {top} {top}\n {top + 7} {top + 7}]], "
            "ornt: [u'h'], transcriptions: [u'Ab']\n"
            "x: [[50 59 59 50]], y: [[0 0 5 5]], ornt: [u'#'], transcriptions: [u'#']\n"
        )
    return tmp_path


def test_totaltext_pairs_by_split(totaltext):
    assert names(run(totaltext, "totaltext", "--split", "Train", output="train")) == ["img11"]
    output = run(totaltext, "totaltext")
    assert names(output) == ["img1", "img11"]
    mask = mask_of(output, "img11")
    assert mask[10:18, 8:32].mean() > 250  # JPEG rounds a corner at most
    assert (mask[0:6, 50:60] == 128).all()
    assert mask[25:].max() == 0


def test_totaltext_words_come_from_polygons(totaltext):
    output = run(totaltext, "totaltext", "--split", "Test", "--words", "--margin", "0")
    assert names(output) == ["img1_001"]
    assert mask_of(output, "img1_001").shape == (8, 24)


def test_a_damaged_polygon_is_a_reason(totaltext):
    for each in (totaltext / "source").rglob("*.txt"):
        each.write_text("x: [[1 2 3]], y: [[1 2]], ornt: [u'h'], transcriptions: [u'a']\n")
    with pytest.raises(UserError, match="damaged polygons"):
        run(totaltext, "totaltext")


def test_corners_that_are_no_place_are_a_reason(totaltext):
    path = next((totaltext / "source").rglob("poly_gt_img1.txt"))
    path.write_text("x: [[nan 9 9]], y: [[1 2 3]], ornt: [u'h'], transcriptions: [u'a']\n")
    assert names(run(totaltext, "totaltext", "--words")) == ["img11_001"]
    assert "img1\tdamaged box" in (totaltext / "out-rejected.tsv").read_text()


def test_totaltext_without_polygons_has_no_words(totaltext):
    for each in (totaltext / "source").rglob("*.txt"):
        each.unlink()
    assert len(names(run(totaltext, "totaltext"))) == 2
    with pytest.raises(UserError, match="no word boxes"):
        run(totaltext, "totaltext", "--words", output="words")
    assert not (totaltext / "words").exists()
    assert not (totaltext / "words.partial").exists()


@pytest.mark.parametrize(("name", "folder"), [("coco_ts", "COCO_TS_labels"), ("mlt_s", "MLT_S_masks")])
@pytest.mark.parametrize("palette", [True, False])
def test_index_masks_count_1_as_text_and_255_as_unknown(tmp_path, name, folder, palette):
    values = np.zeros(SIZE, np.uint8)
    values[5:10, 5:20], values[20:30, 5:20], values[35, 5] = 1, 255, 7
    image = Image.fromarray(values)
    if palette:
        image.putpalette([0, 0, 0, 255, 255, 255] + [0, 0, 0] * 253 + [255, 0, 0])
    path = tmp_path / "source" / folder / "COCO_train2014_000000000036.png"
    path.parent.mkdir(parents=True)
    image.save(path)
    save(tmp_path / "source" / "train2014" / "COCO_train2014_000000000036.jpg", scene())
    mask = mask_of(run(tmp_path, name), "COCO_train2014_000000000036")
    assert (mask[5:10, 5:20] == 255).all()
    assert (mask[20:30, 5:20] == 128).all()
    assert mask[35, 5] == 128
    assert (mask == 0).sum() == SIZE[0] * SIZE[1] - 75 - 150 - 1


def test_a_binary_set_is_recognised(tmp_path):
    values = np.zeros((*SIZE, 3), np.uint8)
    values[5:10, 5:20], values[10, 5:20] = 255, 90
    save(tmp_path / "source" / "labels" / "a.png", values)
    save(tmp_path / "source" / "images" / "a.jpg", scene())
    mask = mask_of(run(tmp_path, "mlt_s"), "a")
    assert (mask[5:10, 5:20] == 255).all()
    assert (mask[10, 5:20] == 128).all()


@pytest.fixture
def textseg(tmp_path):
    source = tmp_path / "source"
    save(source / "image" / "a00001.jpg", scene())
    values = np.zeros(SIZE, np.uint8)
    values[4:12, 6:30], values[12:14, 6:30], values[30:, :5] = 100, 200, 255
    save(source / "semantic_label" / "a00001_maskfg.png", values)
    save(source / "bpoly_label" / "a00001_mask.png", values)
    annotation = {"0000": {"text": "HI", "bbox": [6, 4, 29, 4, 29, 11, 6, 11], "char": {}}}
    (source / "annotation").mkdir()
    (source / "annotation" / "a00001_anno.json").write_text(json.dumps(annotation))
    return tmp_path


def test_textseg_ignores_effects(textseg):
    mask = mask_of(run(textseg, "textseg"), "a00001")
    assert (mask[4:12, 6:30] == 255).all()
    assert (mask[12:14, 6:30] == 128).all()
    assert (mask[30:, :5] == 128).all()
    assert (mask[14:30] == 0).all()


def test_textseg_words(textseg):
    output = run(textseg, "textseg", "--words", "--margin", "0")
    assert names(output) == ["a00001_001"]
    assert (mask_of(output, "a00001_001") == np.full((8, 24), 255)).all()


def test_an_lmdb_of_pairs(textseg):
    reader = LmdbReader(run(textseg, "textseg", "--lmdb"))
    assert len(reader) == 1
    assert cv2.imdecode(np.frombuffer(reader.get(mask_key(1)), np.uint8), 0).shape == SIZE
    assert reader.get(image_key(1)) == (textseg / "source" / "image" / "a00001.jpg").read_bytes()


def test_unusable_images_are_counted_by_reason(tmp_path, capsys):
    for stem in ("good", "broken", "small", "alone", "badmask"):
        save(tmp_path / "source" / "x_labels" / f"{stem}.png", np.eye(*SIZE, dtype=np.uint8))
        save(tmp_path / "source" / "images" / f"{stem}.png", scene())
    (tmp_path / "source" / "images" / "broken.png").write_bytes(b"\x89PNG broken")
    save(tmp_path / "source" / "images" / "small.png", scene()[:20])
    (tmp_path / "source" / "images" / "alone.png").unlink()
    (tmp_path / "source" / "x_labels" / "badmask.png").write_bytes(b"nothing")
    output = run(tmp_path, "coco_ts")
    assert names(output) == ["good"]
    listed = (tmp_path / "out-rejected.tsv").read_text()
    reasons = ("image missing", "damaged image", "mask of another size", "damaged mask")
    assert all(reason in listed for reason in reasons)
    summary = capsys.readouterr().out
    assert all(reason in summary for reason in reasons)


def test_same_names_in_two_folders_do_not_overwrite_each_other(tmp_path):
    for split in ("Train", "Test"):
        save(tmp_path / "source" / "Images" / split / "img1.jpg", scene(len(split)))
        save(tmp_path / "source" / "groundtruth_pixel" / split / "img1.png", np.zeros(SIZE, np.uint8))
    output = run(tmp_path, "totaltext")
    assert names(output) == ["Train_img1", "img1"]
    expected = tmp_path / "source" / "Images" / "Train" / "img1.jpg"
    assert (output / "images" / "Train_img1.jpg").read_bytes() == expected.read_bytes()


def test_a_second_run_is_refused_and_changes_nothing(textseg):
    output = run(textseg, "textseg")
    before = {each: each.read_bytes() for each in output.rglob("*.*")}
    with pytest.raises(UserError, match="exists already"):
        run(textseg, "textseg")
    assert {each: each.read_bytes() for each in output.rglob("*.*")} == before


def test_what_a_killed_run_left_is_replaced(textseg):
    (textseg / "out.partial" / "images").mkdir(parents=True)
    (textseg / "out.partial" / "images" / "old.png").write_bytes(b"")
    assert names(run(textseg, "textseg")) == ["a00001"]
    assert not (textseg / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--split", "Val"], "Val"), (["--margin", "-1"], "--margin"), (["--source", "nowhere"], "nowhere")],
)
def test_wrong_arguments_are_named(textseg, options, message):
    with pytest.raises(UserError, match=message):
        run(textseg, "textseg", *options)


def test_a_source_without_masks_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    for name in tool.FORMATS:
        with pytest.raises(UserError, match=name):
            run(tmp_path, name)


def test_totaltext_masks_of_regions_are_not_taken_for_those_of_pixels(totaltext):
    for split, stem in (("Train", "img11"), ("Test", "img1")):
        region = totaltext / "source" / "groundtruth_textregion" / "Text_Region_Mask" / split / f"{stem}.png"
        save(region, np.full(SIZE, 255, np.uint8))
    output = run(totaltext, "totaltext")
    assert len(names(output)) == 2
    assert (mask_of(output, "img11") == 0).mean() > 0.5


def test_pairs_of_equal_names_are_all_kept(tmp_path):
    for number, folder in enumerate("abc"):
        save(tmp_path / "source" / folder / "1.jpg", scene(number))
        save(tmp_path / "source" / folder / "X_labels" / "1.png", np.full(SIZE, number % 2, np.uint8))
    assert len(names(run(tmp_path, "coco_ts"))) == 3


def test_icdar13_masks_with_a_palette_are_read_by_their_colours(icdar13):
    path = next((icdar13 / "source").rglob("100_GT.bmp"))
    expected = mask_of(run(icdar13, "icdar13", output="rgb"), "100")
    with Image.open(path) as opened:
        opened.convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(path.with_suffix(".png"))
    path.unlink()
    assert np.array_equal(mask_of(run(icdar13, "icdar13", output="palette"), "100"), expected)


@pytest.mark.parametrize("box", [[500, 500, 600, 600], [float("nan"), 0, 9, 9]])
def test_words_that_cannot_be_cut_out_are_counted(tmp_path, box):
    source = tmp_path / "source"
    save(source / "image" / "1.jpg", scene())
    save(source / "semantic_label" / "1_maskfg.png", np.full(SIZE, 100, np.uint8))
    save(source / "image" / "2.jpg", scene(1))
    save(source / "semantic_label" / "2_maskfg.png", np.full(SIZE, 100, np.uint8))
    (source / "annotation").mkdir()
    (source / "annotation" / "1_anno.json").write_text(json.dumps({"0": {"bbox": [20, 10, 50, 30]}}))
    (source / "annotation" / "2_anno.json").write_text(json.dumps({"0": {"bbox": box}}))
    assert names(run(tmp_path, "textseg", "--words")) == ["1_001"]
    (line,) = (tmp_path / "out-rejected.tsv").read_text().splitlines()[1:]
    assert line.startswith("2")


def test_a_mask_of_a_huge_size_is_refused_by_its_header(textseg):
    image = Image.new("L", (9000, 9000))
    image.save(textseg / "source" / "semantic_label" / "b_maskfg.png")
    save(textseg / "source" / "image" / "b.jpg", scene())
    tracemalloc.start()
    try:
        assert names(run(textseg, "textseg")) == ["a00001"]
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert "damaged mask\tb_maskfg.png: 9000 x 9000 pixels" in (textseg / "out-rejected.tsv").read_text()


@pytest.mark.parametrize("text", ["x: [[1 2]], y: [[3 4]], " * 50_000, "x: [[" + "y: [[1]] transcriptions: [" * 20_000])
def test_polygons_without_an_end_are_refused_at_once(tmp_path, text):
    (tmp_path / "poly_gt_img1.txt").write_text(text)
    Image.new("L", (8, 8)).save(tmp_path / "img1.png")
    polygons = tmp_path / "poly_gt_img1.txt"
    if len(text) > 50 * 20_000:
        assert not tool.read_totaltext(tmp_path / "img1.png", polygons).boxes
    else:
        with pytest.raises(tool.RejectedError, match="damaged polygons"):
            tool.read_totaltext(tmp_path / "img1.png", polygons)
