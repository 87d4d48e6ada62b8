"""tools/background_study.py: words at several contrasts, complexity of backgrounds, changed masks, a whole study."""

import csv
import dataclasses
import json
import re

import cv2
import numpy as np
import pytest

from bundle import save_bundle
from loading.batches import LabelRule
from loading.charset import PROTOCOLS, Charset
from loading.lmdb_io import LmdbWriter
from tests.small_networks import save_network, small_config
from tools import background_study as study
from utils import UserError

KINDS = ["plain", "texture", "clutter"]
RULE = LabelRule(Charset(PROTOCOLS[36]), 25)
COUNT = 12


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
def items():
    config = study.load_render_config(None, ["degradation=0", "effects=0", "surroundings=0"])
    return study.render_items(config, COUNT, seed=5, kinds=KINDS, rule=RULE, workers=1)


def of(items, contrast, kind):
    return [item for item in items if (item.contrast, item.background) == (contrast, kind)]


def test_words_are_the_same_on_every_background_and_at_every_contrast(items):
    assert len(items) == 3 * len(KINDS) * COUNT
    first = of(items, "low", "plain")
    for contrast in study.CONTRASTS:
        for kind in KINDS:
            for item, same in zip(of(items, contrast, kind), first, strict=True):
                assert (item.word, item.text) == (same.word, same.text)
                assert (item.exact == same.exact).all()


def contrast(item):
    grey = cv2.cvtColor(item.image, cv2.COLOR_RGB2GRAY) / 255
    return abs(grey[item.exact > 200].mean() - grey[item.exact < 5].mean())


def test_contrasts_differ_as_they_are_named(items):
    low, middle, high = ([contrast(item) for item in of(items, each, "plain")] for each in study.CONTRASTS)
    assert all(0.04 < each < 0.16 for each in low)
    assert all(0.09 < each < 0.31 for each in middle)
    assert all(each > 0.29 for each in high)


def test_low_contrast_stays_low_at_another_difficulty():
    config = study.load_render_config(None, ["difficulty=0.2", "degradation=0", "effects=0", "surroundings=0"])
    low = of(study.render_items(config, 24, seed=5, kinds=["plain"], rule=RULE, workers=1), "low", "plain")
    assert all(contrast(item) < 0.16 for item in low)
    with pytest.raises(UserError, match="difficulty=0"):
        study.render_items(
            config.model_copy(update={"difficulty": 0}), 1, seed=5, kinds=["plain"], rule=RULE, workers=1
        )


def test_complexity_orders_the_kinds_of_background(items):
    plain, texture, clutter = (
        np.mean([study.complexity(item.image, item.exact) for item in of(items, "high", kind)]) for kind in KINDS
    )
    assert plain < texture < clutter


def test_complexity_has_known_values():
    ramp = np.repeat(np.arange(0, 256, 2, dtype=np.uint8)[None], 32, 0)  # 2 of 255 a pixel
    image, empty = np.repeat(ramp[..., None], 3, 2), np.zeros((32, 128), np.uint8)
    assert study.complexity(image, empty) == pytest.approx(2 / 255, rel=0.02)
    large = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    assert study.complexity(large, np.zeros((128, 512), np.uint8)) == pytest.approx(2 / 255, rel=0.02)
    letters = np.full((32, 128, 3), 90, np.uint8)
    mask = empty.copy()
    mask[8:24, 20:30] = 255
    letters[mask > 0] = 200
    assert study.complexity(letters, mask) == 0  # what the dilated mask covers does not count
    assert study.complexity(letters, empty) > 0
    assert study.complexity(letters, np.full_like(mask, 255)) == 0


def square():
    mask = np.zeros((32, 64), np.uint8)
    mask[10:20, 30:40] = 255
    return mask


@pytest.mark.parametrize(("change", "pixels", "side"), [("eroded", 1, 8), ("eroded", 2, 6), ("dilated", 2, 14)])
def test_masks_are_eroded_and_dilated(change, pixels, side):
    mask = study.changed(square(), change, pixels, 0)
    assert mask.sum() == 255 * side**2
    double = study.changed(cv2.resize(square(), (128, 64), interpolation=cv2.INTER_NEAREST), change, pixels, 0)
    assert (double > 127).sum() == pytest.approx(4 * side**2, rel=0.1)  # pixels are those of a height of 32


@pytest.mark.parametrize(("word", "move"), [(0, (0, 4)), (1, (4, 0)), (2, (0, -4)), (3, (-4, 0)), (4, (0, 4))])
def test_masks_are_shifted_in_a_direction_of_the_word(word, move):
    assert (study.changed(square(), "shifted", 4, word) == np.roll(square(), move, (0, 1))).all()


def test_masks_match_their_names(items):
    real = [dataclasses.replace(item, group="real", background="", contrast="", exact=None) for item in items[:3]]
    scales = []

    def segment(images, scale):
        scales.append(scale)
        return [np.full(image.shape[:2], 7, np.uint8) for image in images]

    words = [*items[:3], *real]
    maker = study.MaskMaker(words, segment)
    masks = {kind: maker.make(kind) for kind in (*study.MASKS, *study.ABLATIONS)}
    for kind, made in masks.items():
        given = [mask for mask in made if mask is not None]
        assert len(given) == (3 if kind == "exact" else 6)
        assert all(
            mask.shape == word.image.shape[:2] for mask, word in zip(made, words, strict=True) if mask is not None
        )
    assert all((mask == word.exact).all() for mask, word in zip(masks["exact"], items[:3], strict=False))
    assert not any(mask.any() for mask in masks["none"])
    assert all((mask == 255).all() for mask in masks["full"])
    assert (masks["other"][2] == cv2.resize(words[0].exact, masks["other"][2].shape[::-1])).all()
    assert (masks["other"][3] == 7).all()
    assert study.MaskMaker([items[0]], segment).make("other") == [None]
    assert {0.75, 1.5} <= set(scales)
    area = {kind: np.mean([mask.mean() for mask in made[:3]]) for kind, made in masks.items()}
    assert area["eroded-2"] < area["eroded-1"] < area["exact"] < area["dilated-1"] < area["dilated-2"]
    one, two = (
        [study.overlap(mask, word.exact) for mask, word in zip(masks[kind], items[:3], strict=False)]
        for kind in ("shifted-2", "shifted-4")
    )
    assert np.mean(two) < np.mean(one) < 1


def test_overlap_is_the_intersection_over_union():
    assert study.overlap(square(), square()) == 1
    assert study.overlap(np.roll(square(), 5, 1), square()) == pytest.approx(50 / 150)
    assert study.overlap(np.zeros_like(square()), square()) == 0


def test_a_study_resumes_and_reports(files, tmp_path, monkeypatch, capsys):
    words = tmp_path / "real"
    with LmdbWriter(words) as writer:
        for number in range(5):
            image = np.random.default_rng(number).integers(0, 256, (24, 60, 3), dtype=np.uint8)
            writer.append(cv2.imencode(".png", image)[1].tobytes(), f"word{number}")
        writer.append(b"broken", "broken")
    output = tmp_path / "study"
    one = ["--checkpoint", f"binet={files / 'both.pth'}", "--backgrounds", "plain", "clutter", "--count", "2"]
    one += ["--words", str(words), "--workers", "1", "--device", "cpu", "--output", str(output), "difficulty=0.2"]
    all_three = ["--checkpoint", f"binet={files / 'binet1.pth'}", "--checkpoint", f"abinet={files / 'abinet.pth'}"]
    all_three += ["--masks", "ssn", "exact", "other", "--mask-ablations", "binet", *one]
    calls = []
    read_items = study.read_items
    monkeypatch.setattr(study, "read_items", lambda *given: calls.append(given) or read_items(*given))
    assert study.main(["--ssn", str(files / "ssn.pth"), "--masks", "ssn", *one]) == 0
    assert len(calls) == 1
    assert study.main(["--ssn", str(files / "ssn.pth"), *all_three]) == 0
    assert len(calls) == 2 * (3 + len(study.ABLATIONS)) + 1  # the first is not read again
    tables = sorted((output / "predictions").glob("*.csv"))
    assert len(tables) == len(calls)
    sizes = {path.name.split(".", 2)[2]: len(list(csv.DictReader(path.open()))) for path in tables}
    assert sizes["exact.csv"] == 2 * 2 * 3
    assert {size for name, size in sizes.items() if name != "exact.csv"} == {2 * 2 * 3 + 5}
    assert re.search(r"\| binet +\| ssn +\| +2 \|", capsys.readouterr().out)
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["render"]["difficulty"] == 0.2
    content = (output / "table.md").read_bytes(), (output / "results.json").read_bytes()
    (output / "table.md").unlink()
    assert study.main(["--output", str(output)]) == 0
    assert content == ((output / "table.md").read_bytes(), (output / "results.json").read_bytes())
    assert len(calls) == len(tables)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        study.main(["--seed", "9", "--ssn", str(files / "ssn.pth"), *one])


def test_mistakes_are_named(files, tmp_path):
    with pytest.raises(UserError, match="NAME=FILE"):
        study.main(["--checkpoint", "a=gone.pth", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="holds no study"):
        study.main(["--output", str(tmp_path)])
    one = ["--checkpoint", str(files / "binet0.pth"), "--output", str(tmp_path), "--count", "2", "--workers", "1"]
    with pytest.raises(UserError, match="--mask-ablations binet1: no"):
        study.main([*one, "--mask-ablations", "binet1"])
    with pytest.raises(UserError, match="photo"):
        study.main([*one, "--backgrounds", "photo"])
    with pytest.raises(UserError, match="holds no SSN"):
        study.main([*one, "--backgrounds", "plain", "--masks", "ssn"])
