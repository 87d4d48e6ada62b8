"""tools/background_report.py: intervals that cover, paired differences, and tables with known answers."""

import csv
import json
import re

import numpy as np
import pytest

from tools import background_report as report
from utils import UserError

WORDS = np.arange(400)[None]


def test_the_bootstrap_has_the_width_of_the_binomial():
    right = (np.random.default_rng(0).random((1, 400)) < 0.7).astype(float)
    sampled = report.bootstrap(right, ["a"], WORDS)
    share = right.mean()
    assert sampled.values[0] == pytest.approx(share)
    assert sampled.samples.mean() == pytest.approx(share, abs=0.003)
    assert sampled.samples.std() == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.1)


@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.93), (0.02, 0.87)])
def test_intervals_cover_the_true_accuracy(monkeypatch, spread, least):
    """Three seeds whose true accuracies differ by a standard deviation of `spread`, words that all seeds share."""
    monkeypatch.setattr(report, "RESAMPLES", 400)
    random, covered = np.random.default_rng(0), []
    for trial in range(200):
        difficulty = random.random(300)  # a word is read where this is less than the accuracy of the seed
        right = (difficulty < 0.7 + spread * random.standard_normal((3, 1))).astype(float)
        sampled = report.bootstrap(right, [f"{trial}-{seed}" for seed in range(3)], np.arange(300)[None])
        [interval] = sampled.estimates()
        covered.append(interval.low <= 0.7 <= interval.high)
    assert least <= np.mean(covered) <= 0.99


def test_seeds_have_the_variance_of_their_mean():
    right = np.repeat([[0.0], [0.5], [1.0]], 400, 1)  # no variance of words
    samples = report.bootstrap(right, ["a", "b", "c"], WORDS).samples
    assert samples.std() == pytest.approx(0.5 / np.sqrt(3), rel=0.05)


def test_differences_are_paired():
    right = (np.random.default_rng(0).random((3, 400)) < [[0.5], [0.6], [0.9]]).astype(float)
    better = right.copy()
    better[:, :40] = 1.0
    one, other = (report.bootstrap(each, ["a", "b", "c"], WORDS) for each in (right, better))
    [gain] = (other - one).estimates()
    assert gain.value == pytest.approx((better - right).mean())
    [alone] = one.estimates()
    assert gain.high - gain.low < (alone.high - alone.low) / 3
    again = report.bootstrap(right, ["a", "b", "c"], WORDS)
    assert ((again - one).samples == 0).all()  # equal rows differ in no sample


def test_cells_share_their_words_and_other_streams_do_not():
    right = (np.random.default_rng(0).random((1, 400)) < 0.6).astype(float)
    both = report.bootstrap(right, ["a"], np.repeat(WORDS, 2, 0)).samples
    assert (both[:, 0] == both[:, 1]).all()
    assert (report.bootstrap(right, ["a"], WORDS, stream=1).samples[:, 0] != both[:, 0]).any()


@pytest.fixture
def folder(tmp_path):
    """A study of 10 rendered words on 2 backgrounds and 20 real words: right counts that the tests know."""
    items = [
        ["rendered", word, kind, contrast, 0.1, "a"]
        for contrast in report.CONTRASTS
        for kind in ("plain", "clutter")
        for word in range(10)
    ]
    items += [["real", word, "", "", word / 100, "a"] for word in range(20)]
    _write(tmp_path / "items.csv", ["group", "word", "background", "contrast", "complexity", "text"], items)

    def measured(name, checkpoint, masks, counts, quality):
        """`counts`: words of 10 that are right on plain and on clutter; real words are right in the last quartile."""
        header = ["name", "checkpoint", "masks", "item", "prediction", "right", "quality"]
        rows = []
        for place, item in enumerate(items):
            real = item[0] == "real"
            if real and masks == "exact":
                continue
            right = item[1] >= 15 if real else item[1] < counts[item[2] == "clutter"]
            rows.append([name, checkpoint, masks, place, "a", int(right), "" if real or masks == "-" else quality])
        (tmp_path / "predictions").mkdir(exist_ok=True)
        _write(tmp_path / "predictions" / f"{name}.{checkpoint}.{masks}.csv", header, rows)

    for seed, counts in (("x", (8, 6)), ("y", (10, 6))):
        measured("binet", seed, "ssn", counts, 0.75)
        measured("binet", seed, "exact", (10, 10), 1)
        measured("binet", seed, "eroded-1", (5, 5), 0.5)
    measured("plainnet", "z", "-", (8, 4), "")
    checkpoints = dict.fromkeys(["binet=x", "binet=y", "plainnet=z"], "0")
    study = {"settings": {"backgrounds": ["plain", "clutter"]}, "checkpoints": checkpoints}
    (tmp_path / "study.json").write_text(json.dumps(study))
    return tmp_path


def _write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_a_network_with_masks_may_be_the_baseline(folder):
    study = report.Study(folder)
    baseline = study.baseline("binet")
    assert (baseline.name, baseline.masks) == ("binet", "ssn")
    (row, estimates), *_ = report.make_tables(study, baseline)["difference"]["rows"]
    assert (row.name, row.masks, round(estimates[0].value, 4)) == ("binet", "exact", 0.1)


def test_tables_have_known_values(folder):
    study = report.Study(folder)
    baseline = study.baseline(None)
    assert (baseline.name, baseline.masks) == ("plainnet", "-")
    tables = report.make_tables(study, baseline)
    values = {
        key: {(row.name, row.masks): [e and round(e.value, 4) for e in cells] for row, cells in table["rows"]}
        for key, table in tables.items()
    }
    assert values["accuracy_low"]["binet", "ssn"] == [0.9, 0.6, 0.75, -0.3]
    assert values["accuracy"] == values["accuracy_high"]
    assert values["difference"] == {("binet", "ssn"): [0.1, 0.2, 0.15, 0.1], ("binet", "exact"): [0.2, 0.6, 0.4, 0.4]}
    assert values["real"]["binet", "ssn"] == [0, 0, 0, 1, 0.25, 1]
    assert values["real_difference"] == {("binet", "ssn"): [0, 0, 0, 0, 0, 0]}
    assert values["masks"]["binet", "eroded-1"] == [0.5, 0.5, -0.5, 0.25, 0]
    assert values["masks"]["binet", "exact"] == [1, 1, 0, None, None]
    estimates = [e for table in tables.values() for _, cells in table["rows"] for e in cells if e]
    assert all(e.low <= e.value + 1e-9 and e.value <= e.high + 1e-9 for e in estimates)


def test_a_study_without_real_words_has_tables_of_rendered_ones(folder):
    for file in [folder / "items.csv", *(folder / "predictions").iterdir()]:
        lines = file.read_text().splitlines()
        file.write_text("\n".join(lines[:61]) + "\n")  # the header and 60 rendered words
    table = report.write_report(folder)
    assert "rendered words" in table
    assert "real words by complexity" not in table


def test_a_baseline_that_was_not_measured_with_fitting_masks_is_refused(folder):
    for file in (folder / "predictions").glob("binet.*.ssn.csv"):
        file.unlink()
    with pytest.raises(UserError, match="measured only with the masks exact"):
        report.write_report(folder, "binet")


def test_plots_show_exact_masks_and_what_masks_have_to_beat(folder):
    study = report.Study(folder)
    figures = report.draw_plots(study, report.make_tables(study, study.baseline(None)))
    labels = {
        name: {each.get_text() for each in figure.axes[-1].get_legend().get_texts()} for name, figure in figures.items()
    }
    assert labels["accuracy_by_contrast.png"] == {"binet (ssn)", "binet (exact)", "plainnet"}
    (axes,) = figures["accuracy_by_mask_quality.png"].axes
    assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == "plainnet"] == [pytest.approx(60)]


def test_a_report_is_written_from_the_files_alone(folder):
    table = report.write_report(folder)
    assert re.search(r"\| binet +\| ssn +\| +2 \| +90.0 \[", table)
    results = json.loads((folder / "results.json").read_text())["tables"]
    assert results["accuracy_low"]["rows"][0]["cells"][0].keys() == {"value", "low", "high"}
    for name in ("accuracy_by_contrast", "difference_by_complexity", "accuracy_by_mask_quality"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    with pytest.raises(UserError, match="no such network"):
        report.write_report(folder, "gone")
    with pytest.raises(UserError, match="holds no study"):
        report.write_report(folder / "gone")
