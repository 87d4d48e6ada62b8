"""The report: its numbers, and the page in a real browser."""

import html
import json
import re
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import main
from evaluation import report
from evaluation.evaluator import ScoredWord
from evaluation.report import ReportedWord
from tests.browser import fill, found, missing_images, overflow, page_data, show
from tests.small_networks import save_network, small_config, write_masks, write_words

CHARSET = report.Charset("ab")


def word(target: str, prediction: str, confidence: float = 0.5) -> ReportedWord:
    scored = ScoredWord(0, target, prediction, confidence)
    return ReportedWord("set", scored, target, prediction, prediction, (), ())


def test_accuracy_by_length_counts_every_word():
    rows = report.accuracy_by_length([word("ab", "ab"), word("ab", "a"), word("abc", "abc")])
    assert rows == [{"length": 2, "words": 2, "accuracy": 0.5}, {"length": 3, "words": 1, "accuracy": 1.0}]


def test_confusions_are_the_edits_from_label_to_prediction():
    assert report.confusions_of("hello", "hallo") == [("e", "a")]
    assert report.confusions_of("boot", "bot") == [("o", "")]
    assert report.confusions_of("a", "ab") == [("", "b")]
    assert report.confusions_of("a", "a") == []
    ranked = report.most_confused([word("oo", "00"), word("lo", "l0"), word("in", "ln")], most=2)
    assert ranked == [
        {"true": "o", "read": "0", "count": 3, "share": 1.0},
        {"true": "i", "read": "l", "count": 1, "share": 1.0},
    ]
    assert report.most_confused([word("a", "ab")], most=5)[0]["share"] is None


def test_calibration_bins_hold_their_upper_edge_and_every_word():
    bins = report.calibration([word("a", "a", 0.0), word("a", "b", 0.5), word("a", "a", 0.51), word("a", "a", 1)], 2)
    assert [each["words"] for each in bins] == [2, 2]
    assert bins[0] == {"low": 0.0, "high": 0.5, "words": 2, "confidence": 0.25, "accuracy": 0.5}
    assert report.calibration([], 2)[0]["accuracy"] is None


def test_attention_strips_are_brightest_where_attention_is():
    attention = np.zeros((3, 8, 32), np.float32)
    attention[1, 4, 20] = 1.0
    strip = report.attention_strip(attention)
    assert strip.shape == (10, 3 * 34)
    assert np.unravel_index(strip.argmax(), strip.shape) == (4 + 1, 34 + 20 + 1)
    assert (strip[:, :34] == report.DARKEST).all()


def test_sprites_hold_their_words_in_their_rows(tmp_path):
    writer = report.SpriteWriter(tmp_path, prefix="0", attention=True)
    count = report.SPRITE_WORDS + 3
    images = [np.full((8, 16, 3), 10 * number, np.uint8) for number in range(count)]
    places = [writer.add([each, 255 - each], np.ones((1 + number % 4, 2, 4))) for number, each in enumerate(images)]
    writer.flush()
    assert len(set(places)) == count
    for (name, row), image in zip(places, images, strict=True):
        sheet = cv2.imread(str(tmp_path / f"words-{name}.jpg"))
        assert abs(int(sheet[row * 12 + 6, 10, 0]) - int(image[0, 0, 0])) < 4
        assert abs(int(sheet[row * 12 + 6, 30, 0]) - (255 - int(image[0, 0, 0]))) < 4
    assert len(list(tmp_path.glob("attention-*.png"))) == 2


# --- whole reports ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Test runs: a folder to give the configs, and a function that runs one and gives its report's folder."""
    folder = tmp_path_factory.mktemp("report")
    for name, count, seed in (("one", 31, 0), ("two", 22, 1)):
        images = write_words(folder / "words" / name, count, seed=seed)
        write_masks(folder / "masks" / name, folder / "words" / name, images)

    def test(network: str, *more: str) -> Path:
        config = small_config(network)
        save_network(folder / f"{network}.pth", config)
        (folder / f"{network}.yaml").write_text(config.to_yaml())
        arguments = ["--config", str(folder / f"{network}.yaml"), "--phase", "test", "--name", network, *more]
        arguments += ["--checkpoint", str(folder / f"{network}.pth"), "--test_root", str(folder / "words")]
        main.main([*arguments, f"global.workdir={folder}", "dataset.test.batch_size=9"])
        return folder / network / "report"

    return test, folder


@pytest.fixture(scope="module")
def page(run):
    test, folder = run
    return test("binet", f"dataset.masks.root={folder / 'masks'}") / "index.html"


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"\{.*?\}", "", text)
    data = page_data(page)
    assert len(data["words"]) == 53
    assert data["layout"]["layers"] == ["word", "mask", "refined mask"]
    stored = {path.name for path in (page.parent / "images").iterdir()}
    assert stored == {
        f"{kind}-{name}.{end}" for name in data["sprites"] for kind, end in (("words", "jpg"), ("attention", "png"))
    }


def test_image_only_and_networks_without_masks_leave_parts_out(run):
    test, _ = run
    first = test("abinet", "--image_only") / "index.html"
    data = page_data(first)
    assert not data["attention"]
    assert data["layout"]["layers"] == ["word"]
    assert not list(first.parent.glob("images/attention-*"))
    (first.parent / "images" / "words-9-00000.jpg").write_bytes(b"of an older report")
    test("abinet", "--image_only")
    assert not (first.parent / "images" / "words-9-00000.jpg").exists()


def written(folder: Path, words: list[ReportedWord]) -> Path:
    """The page of some words of data set `set`, all characters counting."""
    writer = report.Report(folder=folder, title="title", charset=CHARSET, protocol=CHARSET)
    writer._words = words
    score = {"accuracy": 0.0, "ccr": 0.0, "ned": 0.0, "ece": 0.5}
    entry = {"samples": len(words), "skipped": {}, **score}
    scores = {"model_eval": "vision", "protocol": 94, "datasets": {"set": entry}, "weighted": entry, "mean": score}
    writer.on_end(scores)
    return folder / "index.html"


def test_confusions_of_any_characters_are_told_apart(tmp_path):
    """A lost ">", one too many, and one that was read as another: the page's buttons find each among the words."""
    words = [word("a>", "a"), word("a", "a>"), word("x>", "xb"), word('b"', "b")]
    page = written(tmp_path, words)
    data = page_data(page)
    pairs = [tuple(pair.split(data["between"])) for row in data["words"] for pair in row[13]]
    assert pairs == [(">", ""), ("", ">"), (">", "b"), ('"', "")]
    buttons = [html.unescape(each) for each in re.findall(r'data-confusion="([^"]*)"', page.read_text())]
    assert sorted(tuple(each.split(data["between"])) for each in buttons) == sorted(pairs)


def test_hostile_labels_stay_text(tmp_path):
    writer = report.Report(
        folder=tmp_path, title="</script><b>", charset=CHARSET, protocol=CHARSET, details={"<i>": "&"}
    )
    label = "</script><script>alert(1)</script>"
    scored = ScoredWord(0, label, "<img src=x>", 0.5)
    writer._words = [ReportedWord("a<b", scored, scored.label, scored.text, None, (), ("<u>",))]
    score = {"accuracy": 0.0, "ccr": 0.0, "ned": 0.0, "ece": 0.5}
    entry = {"samples": 1, "skipped": {}, **score}
    writer.on_end(
        {"model_eval": "language", "protocol": 94, "datasets": {"a<b": entry}, "weighted": entry, "mean": score}
    )
    text = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<b>" not in text.split("<body>")[0]
    assert page_data(tmp_path / "index.html")["words"][0][2] == label


# --- in a browser -----------------------------------------------------------------------------------------------------


def test_the_page_works_in_a_browser(browser, page):
    browser.set_window_size(1280, 900)
    browser.get(page.resolve().as_uri())
    words = page_data(page)["words"]
    wrong = sum(1 - each[5] for each in words)
    assert found(browser) == (53, wrong)
    assert missing_images(browser) == 0
    fill(browser, wrong=True)
    assert found(browser) == (wrong, wrong)
    fill(browser, wrong=False, dataset="1")
    assert found(browser)[0] == 22
    fill(browser, dataset="", text="EXIT")
    assert found(browser)[0] == sum("exit" in each[2].lower() for each in words)
    fill(browser, text="", shortest=5, longest=5)
    assert found(browser)[0] == sum(each[6] == 5 for each in words) > 0
    fill(browser, shortest="", longest="", text="no such word")
    assert found(browser)[0] == 0
    fill(browser, text="", order="random")
    assert found(browser)[0] == 53
    browser.execute_script("document.querySelector('#confusions button').click()")
    pair = browser.execute_script("return document.querySelector('#confusions button').dataset.confusion")
    assert found(browser)[0] == sum(pair in each[13] for each in words)
    browser.execute_script("document.querySelector('#confusions button').click()")
    browser.execute_script("document.querySelector('.card > button').click()")
    shown = browser.execute_script(
        "const card = document.querySelector('.card.open');"
        "return [card.querySelectorAll('figure').length, card.querySelectorAll('.more tr').length]"
    )
    assert shown[0] >= 1
    assert shown[1] == 4  # heading, vision, language, alignment
    assert missing_images(browser) == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(browser, page, width):
    show(browser, page, width=width)
    browser.execute_script("document.querySelector('#filter [name=open]').click()")
    assert not overflow(browser, width)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_ten_thousand_words_are_fast(browser, page, tmp_path):
    data = page_data(page)
    data["words"] = [[*row[:1], number, *row[2:]] for number, row in enumerate(data["words"] * 190)]
    text = json.dumps(data).replace("\\", "\\\\")
    (tmp_path / "index.html").write_text(
        re.sub(r'(id="data">).*?(</script>)', rf"\g<1>{text}\g<2>", page.read_text(), flags=re.DOTALL)
    )
    shutil.copytree(page.parent / "images", tmp_path / "images")
    start = time.monotonic()
    browser.get((tmp_path / "index.html").resolve().as_uri())
    assert found(browser)[0] == 53 * 190
    assert time.monotonic() - start < 10
    milliseconds = browser.execute_script(
        "const start = performance.now(), field = document.querySelector('#filter [name=text]');"
        "field.value = 'e'; field.dispatchEvent(new Event('input', {bubbles: true}));"
        "return performance.now() - start"
    )
    assert milliseconds < 1_000  # some tens on an idle machine
    assert browser.execute_script("return document.querySelectorAll('.card').length") < 200
