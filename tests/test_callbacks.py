"""Callbacks: one test walks all of them; then what each leaves behind."""

import dataclasses
import inspect
import io
import json
import logging
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

import callbacks
from callbacks import (
    Callback,
    Checkpoints,
    Evaluation,
    MetricLog,
    Periodic,
    UnreadableSamples,
)
from engine.distributed import Process
from engine.provenance import Provenance
from engine.trainer import Step
from engine.writers import Console, History, TensorBoard
from evaluation.dumps import PredictionFiles
from evaluation.evaluator import ScoredWord
from utils import UserError, setup_logging


class Evaluator:
    headline = "accuracy"
    sets = "a"

    def measure(self):
        return [self.sets]

    def __init__(self, values=(0.5, 0.25, 0.75)):
        self.values = iter(values)

    def evaluate(self, model, observers=()):
        value = next(self.values)
        entry = {"samples": 4, "accuracy": value}
        return {"datasets": {"set": entry | {"skipped": {}}}, "weighted": entry, "mean": {"accuracy": value}}

    def table(self, scores):
        return f"accuracy {scores['weighted']['accuracy']}"


class WordList:
    def describe(self, index):
        return f"word {index}"


class Batch:
    skipped = {3: "broken"}  # noqa: RUF012

    def state_dict(self):
        return {"indices": torch.tensor([3])}


class FakeTrainer:
    """What a callback sees of a trainer."""

    def __init__(self, iterations=10, rank=0):
        self.iteration, self.epoch, self.iterations = 0, 0, iterations
        self.process = Process(rank, rank + 1)
        self.evaluation_model = nn.Linear(1, 1)
        self.provenance = Provenance(torch.device("cpu"), rank + 1)
        self.called = []

    @property
    def epochs_done(self):
        return self.epoch

    def call(self, hook, *arguments):
        self.called.append(hook)

    def share_statistics(self):
        self.called.append("share_statistics")

    def weights(self):
        return {"model": self.evaluation_model.state_dict(), "charset": "abc"}

    def state_dict(self):
        return self.weights() | {"training": {"iteration": self.iteration}}


def metric_log(*writers, interval=1):
    return MetricLog(writers=writers, interval=interval)


def step(loss=1.0):
    terms = {"vision": torch.tensor(loss / 2), "total": torch.tensor(loss)}
    return Step(terms, torch.tensor(3.0), torch.tensor(True), 0.1, samples=8, data_wait=0.25, duration=1.0)


def every_callback(folder):
    return [
        metric_log(Console(), History(folder / "history.jsonl"), TensorBoard(folder / "tensorboard"), interval=2),
        UnreadableSamples(dataset=WordList()),
        Evaluation(evaluator=Evaluator(), interval=4, folder=folder, name="run"),
        Checkpoints(folder=folder, name="run", interval=4, keep=2),
    ]


def walk(each, trainer, steps):
    each.on_fit_start(trainer)
    for _ in range(steps):
        each.on_batch_loaded(trainer, Batch())
        trainer.iteration += 1
        each.on_step_end(trainer, step())
    each.on_epoch_end(trainer)
    scores = Evaluator().evaluate(None)
    each.on_evaluation_end(trainer, scores)
    state = each.state_dict()
    each.load_state_dict(state)
    assert each.state_dict() == state
    each.load_state_dict({})
    each.on_fit_end(trainer)
    each.on_fit_failed(trainer)


def test_the_list_of_callbacks_is_complete(tmp_path):
    kinds = {kind for _, kind in inspect.getmembers(callbacks, inspect.isclass) if issubclass(kind, Callback)}
    assert kinds - {Callback, Periodic} == {type(each) for each in every_callback(tmp_path)}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("rank", [0, 1])
def test_every_callback_goes_through_a_run_and_only_the_main_process_writes(tmp_path, place, rank):
    each = every_callback(tmp_path)[place]
    walk(each, FakeTrainer(rank=rank), 10)
    if rank:
        assert not list(tmp_path.iterdir())


def test_history_has_every_interval_and_the_last_iteration(tmp_path):
    walk(metric_log(History(tmp_path / "history.jsonl"), interval=4), FakeTrainer(), 10)
    entries = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [4, 8, 10]
    assert entries[0] == {"iteration": 4, "epoch": 0, "loss": 1.0, "vision": 0.5, "lr": 0.1}


LOSSES = [1.0, 2.0, 6.0, float("nan"), 5.0, 7.0, 8.0, 8.0, 3.0, 4.0]  # of ten steps
MEANS = {4: 3.0, 8: 7.0, 10: 3.5}  # since the line before, without the step that is not finite


def walk_losses(each, trainer, losses=LOSSES):
    each.on_fit_start(trainer)
    for loss in losses:
        trainer.iteration += 1
        each.on_step_end(trainer, step(loss))
    each.on_fit_end(trainer)


def test_a_loss_is_the_mean_since_the_previous_line(tmp_path, caplog):
    caplog.set_level("INFO")
    walk_losses(metric_log(History(tmp_path / "history.jsonl"), interval=4), FakeTrainer())
    entries = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert {entry["iteration"]: entry["loss"] for entry in entries} == MEANS
    assert [entry["vision"] for entry in entries] == [mean / 2 for mean in MEANS.values()]
    walk_losses(metric_log(Console(), interval=4), FakeTrainer())
    assert [record.getMessage().split("  ")[2] for record in caplog.records] == [
        f"loss {mean:.4f}" for mean in MEANS.values()
    ]


def test_a_line_without_any_finite_step_has_no_loss(tmp_path):
    walk_losses(metric_log(History(tmp_path / "history.jsonl"), interval=2), FakeTrainer(2), [float("nan")] * 2)
    assert json.loads((tmp_path / "history.jsonl").read_text())["loss"] is None


def test_tensorboard_has_the_means_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    walk_losses(metric_log(TensorBoard(tmp_path), interval=4), FakeTrainer())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss/total")} == MEANS


class BusyNorm:
    """A scalar on a GPU that has work to do still."""

    device = torch.device("cuda")

    def __float__(self):
        return 3.0


def test_throughput_includes_waiting_for_the_gpu(tmp_path, monkeypatch, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO")
    work = [0.5]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(work.pop() if work else 0))
    trainer, each = FakeTrainer(iterations=1), metric_log(Console(), TensorBoard(tmp_path))
    each.on_fit_start(trainer)
    trainer.iteration = 1
    done = Step({"total": torch.tensor(1.0)}, BusyNorm(), torch.tensor(True), 0.1, 8, data_wait=0.0, duration=0.0)
    each.on_step_end(trainer, done)
    each.on_fit_end(trainer)
    assert 0.5 <= done.duration < 5
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("speed/samples_per_second")[0].value <= 8 / 0.5
    (line,) = [message for message in caplog.messages if "samples/s" in message]
    assert float(line.split(" samples/s")[0].split()[-1]) <= 8 / 0.5


def test_terminal_and_file_get_the_same_lines_with_losses_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logging.root, "handlers", [])
    setup_logging(tmp_path / "log.txt")
    walk(metric_log(Console(), interval=5), FakeTrainer(), 10)
    line = r" I epoch 0  iteration \d+/10  loss 1\.0000  vision 0\.5000  lr 1\.00e-01  8 samples/s  00:0\d left"
    dated, timed = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d" + line), re.compile(r"\d\d:\d\d:\d\d" + line)
    assert sum(bool(dated.fullmatch(each)) for each in (tmp_path / "log.txt").read_text().splitlines()) == 2
    assert sum(bool(timed.fullmatch(each)) for each in sys.stderr.getvalue().splitlines()) == 2


def test_a_line_is_logged_at_each_interval_and_at_the_end(tmp_path, caplog):
    caplog.set_level("INFO")
    walk(metric_log(Console(), interval=4), FakeTrainer(), 10)
    *lines, table = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[1] for line in lines] == [f"iteration {n}/10" for n in (4, 8, 10)]
    assert table.startswith("iteration 10\n| data set")
    assert re.search(r"\| set +\| +4 \| +0 \| +50\.00 \|", table)


def test_tensorboard_has_losses_rate_gradient_speed_wait_and_scores(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    walk(metric_log(TensorBoard(tmp_path), interval=2), FakeTrainer(), 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {"loss/vision", "loss/total", "optimizer/learning_rate", "optimizer/gradient_norm"}
    expected |= {"speed/samples_per_second", "speed/data_wait_share", "set/accuracy", "weighted/accuracy"}
    assert expected <= set(events.Tags()["scalars"])
    assert events.Scalars("speed/samples_per_second")[0].value == pytest.approx(8)
    assert events.Scalars("speed/data_wait_share")[0].value == pytest.approx(0.25)


def test_the_best_weights_are_kept_and_statistics_shared_before_evaluation(tmp_path):
    each = Evaluation(evaluator=Evaluator(), interval=1, folder=tmp_path, name="run")
    trainer = FakeTrainer()
    for value in (0.5, 0.5, 0.75):
        trainer.iteration += 1
        each.on_step_end(trainer, step())
        assert each.best == value
    saved = torch.load(tmp_path / "best-run.pth", weights_only=True)
    assert (saved["iteration"], saved["charset"]) == (3, "abc")
    assert trainer.called == ["on_evaluation_start", "share_statistics", "on_evaluation_end"] * 3


def test_the_best_weights_are_those_of_what_is_evaluated_now(tmp_path, caplog):
    before, trainer = Evaluation(evaluator=Evaluator(), interval=1, folder=tmp_path, name="run"), FakeTrainer()
    trainer.iteration = 1
    before.on_step_end(trainer, step())
    same, after = (Evaluation(evaluator=Evaluator((0.25,)), interval=1, folder=tmp_path, name="run") for _ in range(2))
    same.load_state_dict(before.state_dict())
    assert (same.best, caplog.text) == (0.5, "")
    after.evaluator.sets = "b"
    after.load_state_dict(before.state_dict())
    assert "best-run.pth" in caplog.text
    trainer.iteration = 2
    after.on_step_end(trainer, step())
    assert after.best == 0.25
    assert torch.load(tmp_path / "best-run.pth", weights_only=True)["iteration"] == 2


@pytest.mark.parametrize("losses", [("language",), ("vision", "refinement")])
def test_a_resume_with_other_losses_logs_each_by_its_name(tmp_path, losses):
    before, after = (metric_log(History(tmp_path / "history.jsonl"), interval=4) for _ in range(2))
    trainer = FakeTrainer()
    before.on_fit_start(trainer)
    for trainer.iteration in (1, 2, 3):
        before.on_step_end(trainer, step(5.0))
    after.load_state_dict(before.state_dict())
    after.on_fit_start(trainer)
    trainer.iteration = 4
    terms = {name: torch.tensor(1.0 + place) for place, name in enumerate((*losses, "total"))}
    after.on_step_end(trainer, dataclasses.replace(step(), terms=terms))
    entry = json.loads((tmp_path / "history.jsonl").read_text())
    assert {name: entry[name] for name in losses} == {name: 1.0 + place for place, name in enumerate(losses)}


def test_predictions_are_one_line_each_whatever_the_label_holds(tmp_path):
    files = PredictionFiles(folder=tmp_path, model_eval="vision", normalize=lambda text: text.lower().strip("!"))
    words = [ScoredWord(0, "a\tb\nc", "abc", 0.5), ScoredWord(1, "Word", "word", 0.5), ScoredWord(2, "!!", "ll", 0.5)]
    files.on_batch("set", None, None, words)
    files.on_end({"datasets": {"set": {}}})
    folder = tmp_path / "set-vision"
    assert (folder / "vision.txt").read_text() == "a\\tb\\nc\tabc\nWord\tword\n!!\tll\n"
    assert (folder / "vision-false.txt").read_text() == "a\\tb\\nc\tabc\n"  # "!!" is not scored


def test_the_list_names_the_newest_checkpoint_last(tmp_path):
    walk(Checkpoints(folder=tmp_path, name="run", interval=2, keep=2), FakeTrainer(), 7)
    listing = yaml.safe_load((tmp_path / "checkpoint.yaml").read_text())
    assert listing == {"latest": "run_0_7.pth", "checkpoints": ["run_0_6.pth", "run_0_7.pth"]}
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["run_0_6.pth", "run_0_7.pth"]


def test_a_full_disk_is_an_error_that_names_the_history(tmp_path):
    history = History(tmp_path / "history.jsonl")
    each = metric_log(history)
    each.on_fit_start(FakeTrainer())
    history.close()
    history._file = SimpleNamespace(write=lambda text: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"history\.jsonl: no space left"):
        each.on_step_end(FakeTrainer(), step())


def test_a_damaged_history_keeps_its_valid_lines(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    path.write_bytes(
        b'{"iteration": 1}\n{"iteration": \xff}\n[1]\n{"iteration": "x"}\n{"iteration": 2}\n{"iteration": 9}\n'
    )
    trainer = FakeTrainer()
    trainer.iteration = 2
    each = metric_log(History(path), interval=1)
    each.on_fit_start(trainer)
    each.on_fit_end(trainer)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    assert caplog.text.count("a damaged line is dropped") == 3
