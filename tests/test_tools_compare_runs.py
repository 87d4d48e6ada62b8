"""tools/compare_runs.py: its numbers against scipy's and known ones, what it refuses, and its page in a browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

import main
from tests.browser import overflow, show
from tests.small_networks import save_network, small_config, write_masks, write_words
from tools import compare_runs
from tools.compare_runs import Comparison
from utils import UserError


def write_test(folder: Path, words: dict[str, list[tuple[str, str]]], *, model_eval="alignment", protocol=36) -> Path:
    """What a test leaves in its work folder."""
    scores = {"model_eval": model_eval, "protocol": protocol, "datasets": {name: {} for name in words}}
    folder.mkdir(exist_ok=True, parents=True)
    for file in ("metrics.json", f"metrics-{model_eval}.json"):
        (folder / file).write_text(json.dumps(scores))
    for name, pairs in words.items():
        path = folder / f"{name}-{model_eval}" / f"{model_eval}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{label}\t{text}\n" for label, text in pairs), encoding="utf-8", newline="")
    return folder


def compared(capsys, *arguments: str | Path) -> str:
    assert compare_runs.main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def test_the_p_value_is_that_of_the_exact_test():
    row = Comparison("set", 100, (80, 86), lost=2, gained=8)
    assert row.p_value == pytest.approx(2 * binom.cdf(2, 10, 0.5))  # 0.109
    assert Comparison("set", 100, (80, 80), lost=0, gained=0).p_value == 1.0
    assert Comparison("set", 100, (80, 80), lost=3, gained=3).p_value == 1.0


def test_the_interval_is_the_published_one():
    # Bonett and Price (2012): 13/102 - 5/102 +- 1.95996 sqrt((18/102 - (8/102)^2) / 102)
    low, high = Comparison("set", 100, (70, 78), lost=4, gained=12).interval
    assert (low, high) == pytest.approx((-0.001659, 0.158522), abs=1e-6)


def test_the_interval_holds_the_true_difference_about_95_times_of_100():
    random = np.random.default_rng(0)
    held = []
    for lost, gained, _ in random.multinomial(200, [0.05, 0.10, 0.85], 2000):
        low, high = Comparison("set", 200, (0, 0), lost=int(lost), gained=int(gained)).interval
        held.append(low <= 0.05 <= high)
    assert 0.935 <= np.mean(held) <= 0.975


def test_words_that_flip_are_counted_and_listed_per_data_set_and_together(tmp_path, capsys):
    first = {"one": [("a", "a"), ("B!", "b"), ("cd", "xx")], "two": [("e", ""), ("f", "f"), ("?", "")]}
    second = {"one": [("a", "z"), ("B!", "b"), ("cd", "CD")], "two": [("e", "e"), ("f", "f"), ("?", "y")]}
    a, b = write_test(tmp_path / "a", first), write_test(tmp_path / "b", second)
    out = compared(capsys, a, b)
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert [[cell.strip() for cell in row[:5]] for row in rows if len(row) == 9][2:] == [
        ["one", "3", "66.67", "66.67", "+0.00"],
        ["two", "2", "50.00", "100.00", "+50.00"],  # of "?" nothing counts
        ["all words", "5", "60.00", "80.00", "+20.00"],
    ]
    page = (b / "report" / "compare-a-alignment.html").read_text()
    assert page.count('<article class="card">') == 3
    assert "Correct only in A <span" in page


def test_other_languages_are_compared_on_the_characters_of_the_tests(tmp_path, capsys):
    runs = [{"one": [("Да", text), ("Éa", "éa"), ("?", "")]} for text in ("до", "да")]
    a, b = (write_test(tmp_path / name, words) for name, words in zip("ab", runs, strict=True))
    for run in (a, b):
        scores = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(scores | {"protocol": 5, "characters": "даоéa"}))
    assert "+50.00" in compared(capsys, a, b)
    with pytest.raises(UserError, match="36 and 5 different characters"):
        compare_runs.main([str(write_test(tmp_path / "c", runs[0])), str(b)])


def test_sub_models_of_one_run_are_compared(tmp_path, capsys):
    write_test(tmp_path / "run", {"one": [("a", "a"), ("b", "x")]}, model_eval="vision")
    run = write_test(tmp_path / "run", {"one": [("a", "a"), ("b", "b")]})
    out = compared(capsys, run, run, "--model_eval", "vision", "alignment", "--output", tmp_path / "page.html")
    assert "+50.00" in out
    assert (tmp_path / "page.html").is_file()
    assert "+0.00" in compared(capsys, run, run)


WORDS = [("a", "a"), ("b", "c")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"words": {"one": [("a", "a"), ("x", "c")]}}, "other words in one"),
        ({"words": {"one": [("a", "a")]}}, "other words in one"),
        ({"words": {"one": WORDS, "two": WORDS}}, "other words in two"),
        ({"words": {"one": WORDS}, "protocol": 94}, "--protocol"),
    ],
)
def test_evaluations_of_other_words_are_refused_in_one_line(tmp_path, other, message):
    a, b = write_test(tmp_path / "a", {"one": WORDS}), write_test(tmp_path / "b", **other)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        compare_runs.main([str(a), str(b)])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.html"))


def test_folders_without_a_test_are_named(tmp_path):
    a = write_test(tmp_path / "a", {"one": WORDS})
    with pytest.raises(UserError, match=r"nothing/metrics\.json.*--phase test"):
        compare_runs.main([str(a), str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"metrics-vision\.json.*--phase test --model_eval vision first"):
        compare_runs.main([str(a), str(a), "--model_eval", "vision"])
    (a / "one-alignment" / "alignment.txt").write_text("no tab\n")
    with pytest.raises(UserError, match=r"alignment\.txt: missing or damaged"):
        compare_runs.main([str(a), str(a)])


def test_labels_with_other_ends_of_lines_stay_words(tmp_path, capsys):
    words = {"one": [("a\u2028b", "ab"), ("c\x0bd", "x")]}
    a = write_test(tmp_path / "a", words)
    assert "|     2 | 50.00 |" in compared(capsys, a, a)


def test_the_page_of_two_real_tests_shows_the_images_of_its_words(tmp_path, capsys, browser):
    images = write_words(tmp_path / "words" / "set<one>", 30, seed=0)
    write_masks(tmp_path / "masks" / "set<one>", tmp_path / "words" / "set<one>", images)
    for name in ("a", "b"):
        config = small_config("binet")
        save_network(tmp_path / f"{name}.pth", config)
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml())
        arguments = ["--config", str(tmp_path / f"{name}.yaml"), "--phase", "test", "--name", name, "--image_only"]
        arguments += ["--checkpoint", str(tmp_path / f"{name}.pth"), "--test_root", str(tmp_path / "words")]
        main.main([*arguments, f"global.workdir={tmp_path}", f"dataset.masks.root={tmp_path / 'masks'}"])
    dump = tmp_path / "b" / "set<one>-alignment" / "alignment.txt"
    pairs = [line.split("\t") for line in dump.read_text().splitlines()]
    dump.write_text("".join(f"{label}\t{label}\n" for label, _ in pairs))  # B reads all words, A none
    compared(capsys, tmp_path / "a", tmp_path / "b")
    page = tmp_path / "b" / "report" / "compare-a-alignment.html"
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.read_text())
    for width in (1280, 390):
        show(browser, page, width=width)
        assert not overflow(browser, width)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.card img')].map((each) => each.naturalWidth)"
    )
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert shown == [128] * len(pairs)
