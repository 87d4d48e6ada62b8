"""Scores: known answers, protocols, what is skipped, and that batches, workers and processes change nothing."""

import csv
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch
from torch import nn

import main
from builders import build_model
from engine.distributed import Process
from evaluation.evaluator import (
    EMPTY_IN_PROTOCOL,
    WordEvaluator,
    read_logits,
    score_table,
    score_words,
    write_scores,
)
from inference.prepare import prepare_for_inference
from inference.segmenter import Segmenter
from loading.batches import IMAGENET_MEAN, IMAGENET_STD, Batch
from loading.charset import PROTOCOLS, Charset
from loading.lmdb_io import LmdbWriter
from modules.outputs import RecogniserOutput, VisionOutput
from reader import Reader
from run_builders import build_evaluator, evaluation_protocol
from tests.small_networks import ReadsUprightWords, save_network, small_config, write_words
from utils import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
CHARSET = Charset(PROTOCOLS[94])
STEPS = 9


class Says(nn.Module):
    """A network that reads what it was told to, with the confidence that it was told, at the place of each image."""

    def __init__(self, predictions: list[tuple[str, float]]):
        super().__init__()
        self.predictions = predictions

    def forward(self, image, mask):
        logits = torch.full((len(image), STEPS, CHARSET.num_classes), -1e4)
        places = (image[:, 0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        for row, place in enumerate(places.round().long().tolist()):
            text, confidence = self.predictions[place]
            for step, character in enumerate([*CHARSET.encode(text), 0]):
                logits[row, step, character] = 0
            # The first step shares its probability with one other class; all others are certain.
            first = CHARSET.encode(text)[0] if text else 0
            other = (first + 1) % CHARSET.num_classes
            logits[row, 0, other] = torch.logit(torch.tensor(1 - confidence, dtype=torch.float64))
            logits[row, len(text) + 1 :, 0] = 0
        return RecogniserOutput(vision=VisionOutput(logits, logits, torch.full((len(image), STEPS, 2, 4), 0.125)))


def batches(labels: list[str], size: int, *, broken: dict[int, str] | None = None) -> list[Batch]:
    """Batches of words whose images hold their place."""
    result = []
    for start in range(0, len(labels), size):
        places = torch.arange(start, min(start + size, len(labels)))
        images = places.byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 8)
        labels_, lengths = torch.zeros(len(places), STEPS, dtype=torch.int64), torch.ones(len(places))
        texts = [labels[place] for place in places]
        fields = {"labels": labels_, "lengths": lengths, "texts": texts, "indices": places}
        result.append(Batch(images=images, masks=None, **fields, skipped=(broken or {}) if start == 0 else {}))
    return result


def evaluator(sets: dict[str, list[Batch]], *, protocol: int = 36, filtered: dict | None = None) -> WordEvaluator:
    return WordEvaluator(
        loaders=sets,
        filtered={name: (filtered or {}).get(name, {}) for name in sets},
        charset=CHARSET,
        protocol=Charset(PROTOCOLS[protocol]),
        model_eval="vision",
        device=torch.device("cpu"),
    )


LABELS = ["Hello", "it's", "A-1", "cat", "!!"]
READINGS = [("hello", 0.9), ("its", 0.8), ("A-l", 0.7), ("cats", 0.6), ("x", 0.5)]


def test_known_answers():
    sets = {"one": batches(LABELS[:3], 2), "two": batches(LABELS, 4)}
    scores = evaluator(sets).evaluate(Says(READINGS))
    one, two = scores["datasets"]["one"], scores["datasets"]["two"]
    assert (one["samples"], one["skipped"]) == (3, {})
    assert one["accuracy"] == pytest.approx(2 / 3)  # hello, its; al is not a1
    assert one["ccr"] == pytest.approx(9 / 10)
    assert one["ned"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert one["ece"] == pytest.approx((0.1 + 0.2 + 0.7) / 3, abs=1e-5)
    # "!!" has nothing that protocol 36 compares; "cats" has all of cat in place and one letter too many.
    assert (two["samples"], two["skipped"]) == (4, {EMPTY_IN_PROTOCOL: 1})
    assert two["accuracy"] == pytest.approx(2 / 4)
    assert two["ccr"] == pytest.approx(12 / 13)
    assert two["ned"] == pytest.approx((1 + 1 + 0.5 + 0.75) / 4)
    assert scores["weighted"]["samples"] == 7
    assert scores["weighted"]["accuracy"] == pytest.approx(4 / 7)
    assert scores["mean"]["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(("protocol", "right"), [(36, 2), (62, 1), (94, 0)])
def test_one_network_is_scored_by_every_protocol(protocol, right):
    scores = evaluator({"set": batches(LABELS[:4], 4)}, protocol=protocol).evaluate(Says(READINGS))
    assert scores["protocol"] == protocol
    assert scores["datasets"]["set"]["accuracy"] == pytest.approx(
        right / 4
    )  # its = it's but in 94, hello = Hello in 36


def test_other_languages_are_scored_on_all_characters_of_their_charset(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        for label in ("UP", "Привет!", "?"):
            writer.append(cv2.imencode(".png", RAMP)[1].tobytes(), label)
    path = tmp_path / "charset.txt"
    path.write_text("".join(f"{place}\t{each}\n" for place, each in enumerate("НОПРноприветup?")), encoding="utf-8")
    data = {"charset_path": str(path), "test": {"roots": [str(tmp_path / "set")]}}

    def scored(**settings) -> dict:
        config = small_config("abinet", **data, **settings)
        judge = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="vision")
        return judge.evaluate(ReadsUprightWords(config))

    scores = scored()
    assert (scores["protocol"], scores["characters"]) == (11, "ноприветup?")
    entry = scores["datasets"]["set"]
    assert (entry["samples"], entry["skipped"], entry["accuracy"]) == (3, {}, 1 / 3)
    assert scored(eval_case_sensitive=True)["characters"] == "НОПРноприветup?"
    assert scored(eval_protocol=36)["datasets"]["set"]["skipped"] == {EMPTY_IN_PROTOCOL: 2}


@pytest.mark.parametrize(
    ("characters", "case_sensitive", "compared"),
    [
        (PROTOCOLS[62] + "-", True, PROTOCOLS[62] + "-"),
        (PROTOCOLS[62][10:] + "!?.,-+*/#%", True, PROTOCOLS[62][10:] + "!?.,-+*/#%"),  # 62 characters, no digits
        (PROTOCOLS[62] + "-", False, PROTOCOLS[36]),
        (PROTOCOLS[36].upper(), False, PROTOCOLS[36]),
    ],
)
def test_where_case_counts_all_characters_do(tmp_path, characters, case_sensitive, compared):
    path = tmp_path / "charset.txt"
    path.write_text("".join(f"{place}\t{each}\n" for place, each in enumerate(characters)))
    config = small_config("abinet", charset_path=str(path), eval_case_sensitive=case_sensitive)
    assert evaluation_protocol(config).characters == compared


def test_a_set_of_which_nothing_counts_is_refused():
    with pytest.raises(UserError, match=r"other: none of its 2 words.*dataset\.eval_protocol"):
        evaluator({"set": batches(LABELS, 4), "other": batches(["!!", "да"], 4)}).evaluate(Says(READINGS))


def test_every_word_is_accounted_for():
    sets = {"set": batches(LABELS, 5, broken={7: "broken", 8: "broken"}), "none": []}
    scores = evaluator(sets, filtered={"set": {"empty": 2, "broken": 1}}).evaluate(Says(READINGS))
    entry = scores["datasets"]["set"]
    assert entry["skipped"] == {"empty": 2, "broken": 3, EMPTY_IN_PROTOCOL: 1}
    assert entry["samples"] + sum(entry["skipped"].values()) == len(LABELS) + 2 + 3
    assert scores["datasets"]["none"]["samples"] == 0
    assert scores["mean"] == pytest.approx({name: entry[name] for name in ("accuracy", "ccr", "ned", "ece")})


def test_confidence_stops_at_the_end_of_the_text():
    logits = Says([("ab", 0.25)])(*batches(["ab"], 1)[0].inputs()).vision.logits
    logits[0, 4, 5] = 0.0  # steps behind the end do not count
    texts, confidences = read_logits(logits, CHARSET)
    assert texts in (["ab"], [chr(ord("a") + 1) + "b"])
    assert confidences[0] == pytest.approx(0.75)


def test_tables_hold_the_scores(tmp_path):
    judge = evaluator({"a,b": batches(LABELS[:3], 3)})
    scores = judge.evaluate(Says(READINGS))
    write_scores(tmp_path, scores)
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["dataset"] for row in rows] == ["a,b", "weighted", "mean"]
    assert float(rows[0]["accuracy"]) == scores["datasets"]["a,b"]["accuracy"]
    assert (tmp_path / "metrics.md").read_text() == score_table(scores) + "\n"
    assert "66.67" in score_table(scores)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "dataset,samples,skipped,accuracy,ccr,ned,ece"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a network and 40 words of two sets, and the arguments of a test run."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = small_config("abinet")
    save_network(folder / "net.pth", config)
    write_words(folder / "words" / "one", 23, broken=(4,))
    write_words(folder / "words" / "two", 17, seed=1)
    (folder / "config.yaml").write_text(config.to_yaml())
    arguments = ["--config", str(folder / "config.yaml"), "--phase", "test", "--checkpoint", str(folder / "net.pth")]
    return folder, [*arguments, "--test_root", str(folder / "words"), "--image_only", f"global.workdir={folder}"]


@pytest.fixture(scope="module")
def reference(run):
    folder, arguments = run
    main.main([*arguments, "--name", "reference", "dataset.test.batch_size=96"])
    return (folder / "reference" / "metrics.json").read_text()


def test_a_run_accounts_for_all_words(reference):
    datasets = json.loads(reference)["datasets"]
    assert {name: (e["samples"], e["skipped"]) for name, e in datasets.items()} == {
        "one": (22, {"broken": 1}),
        "two": (17, {}),
    }


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (7, 0), (7, 2)])
def test_batches_and_workers_change_nothing(run, reference, size, workers):
    folder, arguments = run
    name = f"run-{size}-{workers}"
    main.main([*arguments, "--name", name, f"dataset.test.batch_size={size}", f"dataset.num_workers={workers}"])
    assert (folder / name / "metrics.json").read_text() == reference
    for file in ("alignment.txt", "alignment-false.txt"):
        expected = (folder / "reference" / "one-alignment" / file).read_text()
        assert (folder / name / "one-alignment" / file).read_text() == expected


@pytest.mark.slow
def test_processes_change_nothing(run, reference):
    folder, arguments = run
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, *arguments, "--name", "two"], cwd=REPOSITORY, check=True, timeout=300, env=environment)
    assert (folder / "two" / "metrics.json").read_text() == reference
    page = (folder / "two" / "report" / "index.html").read_text()
    assert set(re.findall(r'"[0-9a-f]+-(\d)-\d{5}"', page)) == {"0", "1"}  # sprites of both processes


RAMP = np.tile(np.linspace(0, 255, 90, dtype=np.uint8), (30, 1))  # upright, (H, W)
TURNED = [RAMP, np.rot90(RAMP), np.rot90(RAMP, 2), np.rot90(RAMP, 3), RAMP[:, :40], RAMP[:, :20]]


class Seen:
    """An observer that keeps what it is given of every word."""

    def __init__(self):
        self.words, self.images, self.masks, self.attention = [], [], [], []

    def on_batch(self, dataset, batch, output, predictions):
        assert len(batch) == len(predictions) == len(output.vision.attention) == len(output.alignment[-1].logits)
        self.words += [(prediction.label, prediction.text, prediction.confidence) for prediction in predictions]
        self.images += list(batch.images)
        self.masks += [] if batch.masks is None else list(batch.masks)

    def on_end(self, scores):
        self.scores = scores


@pytest.mark.parametrize("network", ["abinet", "binet"])
@pytest.mark.parametrize("workers", [0, 1])
def test_tall_words_are_read_turned_both_ways(tmp_path, network, workers):
    """By a network that only reads upright words; the reader gives the same predictions."""
    for kind in ("images", "masks"):
        with LmdbWriter(tmp_path / kind / "set") as writer:
            for number, image in enumerate(TURNED):
                writer.append(cv2.imencode(".png", image)[1].tobytes(), f"w{number}")
    seen = {}
    for ratio in (None, 1.4):
        data = {"turn_tall": ratio, "num_workers": workers, "masks": {"root": str(tmp_path / "masks")}}
        config = small_config(network, test={"roots": [str(tmp_path / "images")], "batch_size": 4}, **data)
        evaluator = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="alignment")
        seen[ratio] = Seen()
        evaluator.evaluate(ReadsUprightWords(config), [seen[ratio]])
    read = {ratio: [text for _, text, _ in each.words] for ratio, each in seen.items()}
    assert read[None] == ["up", "no", "no", "no", "up", "up"]  # parts of an upright word are upright
    assert read[1.4] == ["up", "up", "no", "up", "up", "up"]
    assert [label for label, _, _ in seen[1.4].words] == [f"w{number}" for number in range(len(TURNED))]
    assert seen[1.4].scores["datasets"]["set"]["samples"] == len(TURNED)
    for place in (1, 3):  # what the report shows is what was read
        assert seen[1.4].images[place][..., -1].float().mean() > seen[1.4].images[place][..., 0].float().mean()
    assert len(seen[1.4].masks) == (len(TURNED) if network == "binet" else 0)

    save_network(tmp_path / "network.pth", config)
    reader = Reader(tmp_path / "network.pth", device="cpu", masks="none", batch_size=4)
    reader._model = ReadsUprightWords(config)
    predictions = reader.read(TURNED, masks=TURNED)
    assert [(each.text, each.confidence) for each in predictions] == [word[1:] for word in seen[1.4].words]
    assert [each.turned for each in predictions] == [0, 270, 0, 90, 0, 0]
    assert all(
        each.mask is None or each.mask.shape == image.shape for each, image in zip(predictions, TURNED, strict=True)
    )


def test_predictions_are_chosen_from_the_word_lists_of_the_set(tmp_path):
    """Of lists in the LMDB under any name, and of one file; scores are of the chosen words."""
    with LmdbWriter(tmp_path / "set") as writer:
        for number, image in enumerate([RAMP, RAMP[:, ::-1]]):
            writer.append(cv2.imencode(".png", image)[1].tobytes(), ("Up!", "nor")[number])
    with lmdb.open(str(tmp_path / "set")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"lexicon-000000001", b"Up!,no")
        transaction.put(b"lexicon-000000002", b"up nor")
        transaction.put(b"lexicon1k-000000001", b"down,use")
        transaction.put(b"lexicon1k-000000002", b"nor")
    (tmp_path / "list.txt").write_text("nor\nupper\n")
    expected = {None: ["up", "no"], "lexicon": ["Up!", "nor"], "lexicon1k": ["use", "nor"]}
    expected[str(tmp_path / "list.txt")] = ["upper", "nor"]
    for lexicon, texts in expected.items():
        data = {"roots": [str(tmp_path / "set")], "batch_size": 1, "lexicon": lexicon, "lexicon_match": "distance"}
        config = small_config("abinet", test=data)
        judge = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="alignment")
        seen = Seen()
        scores = judge.evaluate(ReadsUprightWords(config), [seen])
        assert [text for _, text, _ in seen.words] == texts
        right = sum(label.lower().strip("!") == text.lower().strip("!") for label, text, _ in seen.words)
        assert scores["datasets"]["set"]["accuracy"] == right / 2
    for lexicon in ("nothing", str(tmp_path / "gone.txt")):
        config.dataset.test.lexicon = lexicon
        judge = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="alignment")
        with pytest.raises(UserError, match=r"dataset\.test\.lexicon"):
            judge.evaluate(ReadsUprightWords(config))


def test_batches_are_scored_side_by_side_as_one_after_the_other(run, monkeypatch):
    """The fast form on several threads of a CPU gives the scores of one thread, and observers every batch in order."""
    folder, _ = run
    data = {"roots": [str(folder / "words")], "batch_size": 3}
    config = small_config("abinet", test=data)
    model = prepare_for_inference(build_model(config), precision="fp32", compile=False)
    judge = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="vision")
    before, results = torch.get_num_threads(), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen, names = Seen(), set()
        hook = model.register_forward_pre_hook(lambda *_, names=names: names.add(threading.current_thread().name))
        results[threads] = judge.evaluate(model, [seen]), seen.words
        hook.remove()
        assert all(name.startswith("side-by-side") == (threads == 2) for name in names)
    torch.set_num_threads(before)
    assert results[1][0] == results[2][0]
    assert [word[:2] for word in results[1][1]] == [word[:2] for word in results[2][1]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("prepared", [False, True])
def test_segmentation_scores_are_those_of_the_masks_that_users_get(tmp_path, precision, prepared):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (24, width, 3), dtype=np.uint8) for width in (60, 60, 90)]
    labels = [random.integers(0, 2, image.shape[:2], dtype=np.uint8) for image in images]
    with LmdbWriter(tmp_path / "pairs") as writer:
        for image, label in zip(images, labels, strict=True):
            stored, mask = (cv2.imencode(".png", each)[1].tobytes() for each in (image[..., ::-1], label * 255))
            writer.append(stored, mask=mask)
    config = small_config("ssn", test={"roots": [str(tmp_path / "pairs")], "batch_size": 2})
    torch.manual_seed(0)
    ssn = build_model(config).eval()
    ssn.semrfnhead.conv_ref_last.weight.data.mul_(5)
    true, found = np.concatenate([each.ravel() for each in labels]) > 0, Segmenter(ssn, [65])(images)
    found = np.concatenate([each.ravel() for each in found]) >= 128
    wanted = {"device": torch.device("cpu"), "process": Process(), "model_eval": "ssn", "precision": precision}
    evaluator = build_evaluator(config, **wanted)
    scores = evaluator.evaluate(prepare_for_inference(ssn, precision="fp32", compile=False) if prepared else ssn)
    assert 0 < found.mean() < 1
    assert scores["datasets"]["pairs"]["iou"] == (true & found).sum() / (true | found).sum()


def test_a_network_that_gives_no_numbers_is_scored_as_sure_of_nothing():
    logits = torch.full((2, STEPS, CHARSET.num_classes), float("nan"))
    assert read_logits(logits, CHARSET)[1] == [0.0, 0.0]


def test_no_words_score_nothing():
    assert set(score_words([], str.lower).values()) == {0.0}
