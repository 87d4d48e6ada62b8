"""tools/background_study.py: intervals with known answers, paired words, mask kinds, and a whole run."""

import csv
import json

import cv2
import numpy as np
import pytest

from bundle import save_bundle
from tests.small_networks import save_network, small_config
from tools import background_study as study
from utils import UserError

KINDS = ["plain", "texture", "clutter"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        save_network(folder / f"binet{seed}.pth", small_config("binet"), seed=seed)
    save_network(folder / "abinet.pth", small_config("abinet"))
    save_network(folder / "ssn.pth", small_config("ssn"))
    save_bundle(folder / "both.pth", folder / "binet0.pth", folder / "ssn.pth")
    return folder


@pytest.fixture(scope="module")
def words():
    config = study.load_render_config()
    limits = {"protocol": 36, "max_length": 25}
    return study.render_words(config, 6, seed=5, kinds=KINDS, workers=1, **limits)


def test_wilson_has_its_published_values():
    share = study.wilson(8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert study.wilson(0, 10).low == 0
    assert study.wilson(10, 10).high == 1
    assert study.wilson(0, 0) == study.Estimate(0.0, 0.0, 1.0)


def test_the_bootstrap_has_the_width_of_the_binomial():
    right = np.random.default_rng(0).random((1, 1, 400)) < 0.7
    samples = study.resampled_accuracies([right])[0][:, 0]
    share = right.mean()
    assert samples.mean() == pytest.approx(share, abs=0.003)
    assert samples.std() == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.1)


def test_differences_are_paired():
    right = np.random.default_rng(0).random((1, 1, 300)) < 0.6
    first, second = study.resampled_accuracies([right, right])
    assert (first == second).all()  # equal networks differ in no sample, however uncertain each is
    seeds = np.stack([np.zeros((1, 300), bool), np.ones((1, 300), bool)])
    assert study.resampled_accuracies([seeds])[0].std() > 0.3  # seeds that disagree widen the interval


def test_a_summary_has_known_values():
    right = np.zeros((3, 10), bool)
    right[0, :8], right[1, :6], right[2, :4] = True, True, True
    better = right.copy()
    better[1:, :8] = True
    rows = study.summarise(
        [study.Run("a", "x", "exact", right), study.Run("a", "y", "exact", right), study.Run("b", "z", "-", better)],
        KINDS,
    )
    assert [row["seeds"] for row in rows] == [2, 1]
    assert [each.value for each in rows[0]["accuracy"]] == pytest.approx([0.8, 0.6, 0.4, 0.6])
    assert [each.value for each in rows[0]["change"]] == pytest.approx([0, -0.2, -0.4, -0.3])
    assert [each.value for each in rows[1]["lead"]] == pytest.approx([0, 0.2, 0.4, 0.2])
    assert all(each.low <= each.value <= each.high for row in rows for each in row["accuracy"])
    assert "80.0 [" in study.markdown(rows, KINDS, words=10)


def test_words_are_the_same_on_every_background(words):
    for word in words:
        assert len({word[kind].text for kind in KINDS}) == 1
        assert all((word[kind].mask == word["plain"].mask).all() for kind in KINDS)
        assert any((word[kind].image != word["plain"].image).any() for kind in KINDS[1:])


def test_masks_match_their_names(words):
    chosen = [word["plain"] for word in words]
    by_kind = {kind: study.masks_for(chosen, kind) for kind in study.MASKS}
    assert by_kind["ssn"] == [None] * len(words)
    assert all((mask == word.mask).all() for mask, word in zip(by_kind["exact"], chosen, strict=True))
    assert not any(mask.any() for mask in by_kind["none"])
    assert all((mask == 255).all() for mask in by_kind["full"])
    assert all(mask.shape == word.mask.shape for mask, word in zip(by_kind["other"], chosen, strict=True))
    assert all((mask != word.mask).any() for mask, word in zip(by_kind["other"], chosen, strict=True))


def test_a_whole_study(files, tmp_path, capsys):
    arguments = ["--checkpoint", f"binet={files / 'both.pth'}", "--checkpoint", f"binet={files / 'binet1.pth'}"]
    arguments += ["--checkpoint", f"abinet={files / 'abinet.pth'}", "--ssn", str(files / "ssn.pth"), "--seed", "3"]
    arguments += ["--masks", "ssn", "exact", "other", "--backgrounds", *KINDS, "--count", "5", "--workers", "1"]
    assert study.main([*arguments, "--device", "cpu", "--output", str(tmp_path / "a"), "difficulty=0.2"]) == 0
    assert "| binet | exact | 2 |" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "a" / "scores.csv").open()))
    assert len(lines) == (2 * 3 + 1) * len(KINDS)
    assert all(float(line["low"]) <= float(line["accuracy"]) <= float(line["high"]) for line in lines)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(each["name"], each["masks"]) for each in results["networks"]] == [
        ("binet", "ssn"),
        ("binet", "exact"),
        ("binet", "other"),
        ("abinet", "-"),
    ]
    assert results["render"]["difficulty"] == 0.2
    assert np.ptp(cv2.imread(str(tmp_path / "a" / "plot.png"))) > 0
    assert study.main([*arguments, "--device", "cpu", "--output", str(tmp_path / "b"), "difficulty=0.2"]) == 0
    for name in ("table.md", "scores.csv", "results.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_mistakes_are_named(files, tmp_path):
    with pytest.raises(UserError, match="NAME=FILE"):
        study.main(["--checkpoint", "a=gone.pth", "--output", str(tmp_path)])
    one = ["--checkpoint", str(files / "binet0.pth"), "--output", str(tmp_path), "--count", "2", "--workers", "1"]
    with pytest.raises(UserError, match="photo"):
        study.main([*one, "--backgrounds", "photo"])
    with pytest.raises(UserError, match="carries no SSN"):
        study.main([*one, "--backgrounds", "plain", "--masks", "ssn"])
