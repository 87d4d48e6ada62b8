"""Weights & Biases: a stand-in records what it is given; where wandb is installed, the real one runs offline."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
from tiny_run import folder_of, history, run, write_config

from engine.writers import Record, Scores, WeightsAndBiases
from utils import UserError


class FakeWandb:
    """The part of wandb that is used, recording every call."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs = []

    def init(self, **settings):
        record = SimpleNamespace(settings=settings, logged=[], exit_code=None)
        record.log = lambda values, step: record.logged.append((step, values))
        record.finish = lambda exit_code: setattr(record, "exit_code", exit_code)
        self.runs.append(record)
        return record

    @staticmethod
    def Image(array):  # noqa: N802
        return ("image", array.shape)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def writer(folder):
    return WeightsAndBiases("words", name="run", folder=folder, config={"a": 1})


RECORD = Record(
    iteration=4, iterations=10, epoch=1, losses={"vision": 0.5, "total": 1.0}, learning_rate=0.1, gradient_norm=3.0,
    samples_per_second=8.0, data_wait_share=0.25, seconds_left=60.0,
)  # fmt: skip
SCORES = {
    "datasets": {"set": {"samples": 4, "skipped": {}, "accuracy": 0.5}},
    "weighted": {"samples": 4, "accuracy": 0.5},
    "mean": {"accuracy": 0.5},
}


def test_losses_scores_and_words_are_logged_once_each(tmp_path, wandb):
    each = writer(tmp_path)
    each.open(0)
    each.write(RECORD)
    each.write_scores(Scores(4, SCORES, "table", np.zeros((32, 64, 3), np.uint8)))
    each.close()
    (logged,) = wandb.runs
    (first, losses), (second, scores) = logged.logged
    assert first == second == 4
    assert losses["loss/total"] == 1.0
    assert losses.keys() == {"epoch", *RECORD.scalars()}
    assert scores["set/accuracy"] == scores["mean/accuracy"] == 0.5
    assert scores["words"] == ("image", (32, 64, 3))
    assert logged.settings["project"] == "words"
    assert logged.settings["config"] == {"a": 1}
    assert logged.exit_code == 0


def test_a_resumed_run_goes_on_under_the_same_id_and_another_run_has_its_own(tmp_path, wandb):
    for folder in ("one", "one", "two"):
        each = writer(tmp_path / folder)
        each.open(0)
        each.close(failed=True)
        each.close()
    ids = [logged.settings["id"] for logged in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    assert {logged.settings["resume"] for logged in wandb.runs} == {"allow"}
    assert [logged.exit_code for logged in wandb.runs] == [1, 1, 1]


def test_what_wandb_refuses_is_a_user_error(tmp_path, wandb, monkeypatch):
    def refuse(**settings):
        raise wandb.Error("no API key\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^training\.wandb: no API key; run wandb login"):
        writer(tmp_path).open(0)


def test_without_wandb_the_key_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^training\.wandb: wandb is not installed; pip install wandb"):
        writer(tmp_path)


def test_without_wandb_a_run_is_refused_before_its_data_is_opened(tmp_path, monkeypatch):
    import main

    monkeypatch.setitem(sys.modules, "wandb", None)
    command = [f"--config={write_config(tmp_path)}", "training.wandb=words", "dataset.train.roots=[gone]"]
    with pytest.raises(UserError, match=r"^training\.wandb: wandb is not installed"):
        main.main(command)
    assert not folder_of(tmp_path / "tiny.yaml").exists()


def test_a_run_logs_every_iteration_and_evaluation_to_it(tmp_path, wandb):
    import main

    config = write_config(tmp_path)
    command = [f"--config={config}", "training.wandb=words", "training.iterations=3", "training.eval_iters=2"]
    assert main.main(command) == 0
    assert main.main([*command, "--resume", "training.iterations=4"]) == 0
    first, second = wandb.runs
    assert first.settings["id"] == second.settings["id"]
    for logged in wandb.runs:
        assert logged.settings["name"] == tiny_run.NAME
        assert logged.settings["config"]["training"]["wandb"] == "words"
    everything = [each for logged in wandb.runs for each in logged.logged]
    losses = [(step, values["loss/total"]) for step, values in everything if "loss/total" in values]
    assert losses == [(entry["iteration"], entry["loss"]) for entry in history(config)]
    assert [step for step, values in everything if "test/accuracy" in values] == [2, 3, 4]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_writes_a_run_offline(tmp_path):
    config = write_config(tmp_path)
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    for options in (["training.iterations=3"], ["--resume", "training.iterations=5"]):
        run(config, "training.wandb=words", *options, environment=os.environ | offline)
    folder = folder_of(config)
    number = (folder / "wandb-id.txt").read_text()
    files = list((folder / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    assert all(b"loss/total" in file.read_bytes() for file in files)
