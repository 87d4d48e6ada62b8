"""The loop: exact resume, skipped steps, accumulation, averaging, stopping. A toy network stands for any other."""

import functools
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import pytest
import tiny_run
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import callbacks
from callbacks import (
    Callback,
    Checkpoints,
    Evaluation,
    MetricLog,
)
from engine.averaging import AveragedWeights
from engine.checkpoints import load_training_state, newest_valid_checkpoint
from engine.distributed import Process
from engine.optimization import make_optimizer, parameter_groups, poly_schedule
from engine.trainer import Trainer
from engine.writers import Console, History
from loading.sampling import ResumableBatchSampler, SampleKey
from tests import small_networks
from utils import UserError

SAMPLES, BATCH, ITERATIONS = 40, 8, 12


@dataclass
class ToyBatch:
    x: Tensor
    y: Tensor
    indices: Tensor

    def __len__(self):
        return len(self.x)

    def inputs(self):
        return (self.x,)

    def targets(self):
        return (self.y,)

    def to(self, device, non_blocking=True):
        return self

    def split(self, parts):
        columns = zip(self.x.chunk(parts), self.y.chunk(parts), self.indices.chunk(parts), strict=True)
        return [ToyBatch(*each) for each in columns]

    def state_dict(self):
        return {"x": self.x, "y": self.y, "indices": self.indices}


class ToyData(Dataset):
    def __init__(self, bad=()):
        self.bad = set(bad)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 5, generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, key):
        x = self.x[key.index].clone()
        if (key.epoch, key.index) in self.bad or "all" in self.bad:
            x[0] = float("nan")
        return x, x.sum(), key.index


def collate(samples):
    x, y, indices = zip(*samples, strict=True)
    return ToyBatch(torch.stack(x), torch.stack(y)[:, None], torch.tensor(indices))


class ToyCriterion(nn.Module):
    counts_outputs = False

    def forward(self, output, target, whole=None):
        squares = (output - target).square()
        error = squares.sum() / (squares.numel() if whole is None else whole["samples"])
        return {"error": error, "total": error}

    def counts(self, output, target):
        return {"samples": torch.tensor(target.numel())}


class Recorder(Callback):
    def __init__(self, stop_at=None):
        self.losses = []
        self.skipped = []
        self.stop_at = stop_at

    def on_step_end(self, trainer, step):
        self.losses.append(float(step.terms["total"]))
        if not step.finite:
            self.skipped.append(trainer.iteration)
        if trainer.iteration == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def make_trainer(folder, *, callbacks=(), bad=(), workers=0, iterations=ITERATIONS, kind="Adam", every=1, **options):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
    sampler = ResumableBatchSampler(SAMPLES, BATCH, seed=1)
    data = DataLoader(
        ToyData(bad), batch_sampler=sampler, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
    optimizer = make_optimizer(kind, parameter_groups(network, lr=0.01, weight_decay=0.0), lr=0.01)
    return Trainer(
        model=network,
        criterion=ToyCriterion(),
        optimizer=optimizer,
        learning_rate_factor=poly_schedule(iterations, 0.9),
        data=data,
        batches_per_epoch=SAMPLES // BATCH,
        iterations=iterations,
        device=torch.device("cpu"),
        process=Process(),
        callbacks=[
            *callbacks,
            MetricLog(writers=[History(folder / "history.jsonl")], interval=every),
            Checkpoints(folder=folder, name="toy", interval=5, keep=2),
        ],
        **options,
    )


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [3, 5, 9])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"precision": "fp16"}], ids=["plain", "ema", "fp16"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, workers, stop_at, options):
    (tmp_path / "whole").mkdir()
    whole = make_trainer(tmp_path / "whole", workers=workers, **options)
    whole.fit()
    (tmp_path / "cut").mkdir()
    make_trainer(tmp_path / "cut", callbacks=[Recorder(stop_at)], workers=workers, **options).fit()
    assert len(history(tmp_path / "cut")) == stop_at
    resumed = make_trainer(tmp_path / "cut", workers=workers, **options)
    path, state = newest_valid_checkpoint(tmp_path / "cut", "toy")
    assert path.name == f"toy_{stop_at // 5}_{stop_at}.pth"
    resumed.load_state_dict(state)
    resumed.fit()
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    for name, tensor in whole.evaluation_model.state_dict().items():
        assert torch.equal(tensor, resumed.evaluation_model.state_dict()[name]), name


@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_a_mean_over_several_steps_survives_a_resume(tmp_path, stop_at):
    recorder = Recorder()
    for name, observer in (("whole", recorder), ("cut", Recorder(stop_at))):
        (tmp_path / name).mkdir()
        make_trainer(tmp_path / name, callbacks=[observer], every=4).fit()
    resumed = make_trainer(tmp_path / "cut", every=4)
    resumed.load_state_dict(newest_valid_checkpoint(tmp_path / "cut", "toy")[1])
    resumed.fit()
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    means = [sum(recorder.losses[first : first + 4]) / 4 for first in (0, 4, 8)]
    assert [entry["loss"] for entry in history(tmp_path / "cut")] == pytest.approx(means)


def test_the_duration_of_a_step_includes_waiting_for_the_previous_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_check_waiting", lambda self: time.sleep(0.05))
    durations = []

    class Watch(Callback):
        def on_step_end(self, trainer, step):
            durations.append(step.duration)

    make_trainer(tmp_path, callbacks=[Watch()], iterations=3).fit()
    assert min(durations) >= 0.05


def test_history_has_each_iteration_once_when_a_kill_lost_the_newest_steps(tmp_path):
    make_trainer(tmp_path, iterations=10).fit()
    whole = history(tmp_path)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"iteration": 11, "lo')
    next(tmp_path.glob("toy_*_10.pth")).unlink()
    resumed = make_trainer(tmp_path, iterations=10)
    resumed.load_state_dict(newest_valid_checkpoint(tmp_path, "toy")[1])
    resumed.fit()
    assert history(tmp_path) == whole


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, caplog):
    make_trainer(tmp_path).fit()
    newest = tmp_path / "toy_2_12.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    path, _ = newest_valid_checkpoint(tmp_path, "toy")
    assert path.name == "toy_2_10.pth"
    assert "toy_2_12.pth" in caplog.text


def test_the_last_k_checkpoints_stay(tmp_path):
    make_trainer(tmp_path, iterations=20).fit()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["toy_3_15.pth", "toy_4_20.pth"]


@pytest.mark.parametrize(("stop_at", "names"), [(5, ["toy_1_5.pth"]), (7, ["toy_1_5.pth", "toy_1_7.pth"])])
def test_a_step_that_ends_an_epoch_is_saved_once(tmp_path, monkeypatch, stop_at, names):
    saved = []
    save = callbacks.save_atomically
    monkeypatch.setattr(callbacks, "save_atomically", lambda state, path: [saved.append(path.name), save(state, path)])
    make_trainer(tmp_path, callbacks=[Recorder(stop_at)]).fit()
    assert saved == names
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == names


def test_a_bad_batch_changes_nothing_and_is_named(tmp_path, caplog):
    recorder = Recorder()
    bad = [(0, 7)]
    trainer = make_trainer(tmp_path, callbacks=[recorder], bad=bad, iterations=5)
    trainer.fit()
    (iteration,) = recorder.skipped
    assert "error, total not finite" in caplog.text
    assert history(tmp_path)[iteration - 1]["loss"] is None
    assert re.search(r"samples \[.*\b7\b", caplog.text)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.isfinite(tensor).all(), name


def test_batches_of_which_nothing_can_be_read_are_left_out_but_end_the_run_in_a_row(tmp_path):
    trainer = make_trainer(tmp_path)
    full = collate([trainer.data.dataset[SampleKey(0, index)] for index in range(BATCH)])
    empty = ToyBatch(full.x[:0], full.y[:0], full.indices[:0])
    trainer._batches = lambda: iter([*[(empty, 0.0)] * 9, (full, 0.0), *[(empty, 0.0)] * 10])
    with pytest.raises(UserError, match="only 0 samples of a batch could be read after iteration 1"):
        trainer.fit()


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_grad", [20.0, None])
def test_a_gradient_whose_norm_alone_is_not_finite_changes_nothing(tmp_path, caplog, kind, precision, clip_grad):
    """Each number of it is finite; the squares of the norm are not."""
    caplog.set_level("INFO")
    trainer = make_trainer(tmp_path, iterations=3, kind=kind, precision=precision, clip_grad=clip_grad)
    forward_backward, update, states = trainer._forward_backward, trainer._update, []

    def steep(batch):
        terms = forward_backward(batch)
        if trainer.iteration == 1:
            for parameter in trainer.model.parameters():
                parameter.grad.fill_(1e25)
        return terms

    def watched(*arguments):
        states.append(state_of(trainer))
        update(*arguments)

    trainer._forward_backward, trainer._update = steep, watched
    trainer.fit()
    assert [line.split(" skipped")[0] for line in caplog.messages if " skipped" in line] == ["iteration 2"]
    assert all(torch.equal(*pair) for pair in zip(states[1], states[2], strict=True))
    assert any(not torch.equal(*pair) for pair in zip(states[2], state_of(trainer), strict=True)), "the run goes on"


def state_of(trainer):
    """Weights, and the optimiser's momenta and counts of steps."""
    state = trainer.optimizer.state_dict()["state"]
    tensors = [*trainer.model.parameters(), *(t for each in state.values() for t in each.values())]
    return [tensor.detach().clone() for tensor in tensors]


def test_bad_batches_in_a_row_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.trainer.MAX_SKIPPED", 3)
    trainer = make_trainer(tmp_path, bad=["all"])
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        trainer.fit()
    assert trainer.iteration == 3
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_accumulated_parts_are_one_step(tmp_path):
    def first_update(accumulation):
        trainer = make_trainer(tmp_path, accumulation=accumulation, iterations=1)
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.BatchNorm1d):  # statistics are those of a part, by nature
                module.momentum = 0.0
                module.track_running_stats = True
                module.eval()
                module.train = lambda mode=True: None
        trainer.fit()
        return trainer.model[0].weight.detach().clone()

    torch.testing.assert_close(first_update(1), first_update(4), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["binet", "abinet", "vision", "language", "ssn"])
def test_parts_of_any_number_give_the_terms_and_gradients_of_the_batch(kind):
    one, four, three = (small_networks.terms_and_gradients(kind, parts=parts) for parts in (1, 4, 3))
    assert len(one) > 2
    for parts in (four, three):
        for name, expected in one.items():
            torch.testing.assert_close(parts[name], expected, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_counting_for_a_split_batch_changes_no_state():
    """Neither in the batch norms nor in the numbers that the steps draw."""
    counted = small_networks.trainer("binet", parts=2)
    before = {name: buffer.clone() for name, buffer in counted.model.named_buffers()}
    drawn = torch.get_rng_state()
    counted.model.train()
    counted._whole_counts(small_networks.uneven_batch("binet").split(2), counted.model)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, buffer in counted.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_averaged_weights_are_those_that_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    trainer.fit()
    _, state = newest_valid_checkpoint(tmp_path, "toy")
    assert not torch.equal(state["model"]["0.weight"], trainer.model[0].weight)
    assert torch.equal(state["model"]["0.weight"], trainer.ema.module[0].weight)


def warmed_up(averaged, current, count):
    """torch counts the first update, which copies, as well."""
    decay = torch.minimum(torch.tensor(0.7), count / (9 + count))
    return torch.lerp(averaged, current.to(averaged.dtype), 1 - decay)


def test_averaged_weights_are_torchs_with_a_decay_that_rises():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    theirs = AveragedModel(network, avg_fn=warmed_up, use_buffers=True)
    theirs.n_averaged += 1
    ours = AveragedWeights(network, decay=0.7)
    for _ in range(30):
        network(torch.randn(5, 3))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.update_parameters(network)
        ours.update(network)
    for (name, mine), other in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if mine.is_floating_point():  # torch averages the count of batches as well
            torch.testing.assert_close(mine, other, msg=name)
    assert ours.module[1].num_batches_tracked == 30
    assert not any(parameter.requires_grad for parameter in ours.module.parameters())


def test_averaged_weights_of_a_short_run_are_near_its_last_weights(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.9999, iterations=40)
    first = trainer.model[0].weight.detach().clone()
    trainer.fit()
    averaged, last = trainer.evaluation_model[0].weight, trainer.model[0].weight
    assert (averaged - last).norm() < 0.2 * (averaged - first).norm()


class FailingEvaluator:
    """Breaks at its first evaluations."""

    headline, columns = "accuracy", ()

    def __init__(self, failures):
        self.failures = failures
        self.evaluated = []

    def measure(self):
        return ["toy"]

    def evaluate(self, model, observers=()):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("evaluation failed")
        self.evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"datasets": {}, "weighted": {"samples": 1, "accuracy": 0.5}, "mean": {"accuracy": 0.5}}

    def table(self, scores):
        return ""


@pytest.mark.parametrize("iterations", [12, 5])
def test_a_failed_evaluation_costs_no_step_and_is_repeated(tmp_path, iterations):
    def trainer(evaluator):
        evaluation = Evaluation(evaluator=evaluator, interval=5, folder=tmp_path, name="toy")
        return make_trainer(tmp_path, callbacks=[evaluation], iterations=iterations)

    with pytest.raises(RuntimeError, match="evaluation failed"):
        trainer(FailingEvaluator(1)).fit()
    path, state = newest_valid_checkpoint(tmp_path, "toy")
    assert path.name.endswith("_5.pth")
    evaluator = FailingEvaluator(0)
    resumed = trainer(evaluator)
    resumed.load_state_dict(state)
    resumed.fit()
    assert len(evaluator.evaluated) == {12: 3, 5: 1}[iterations]
    for name, tensor in evaluator.evaluated[0].items():
        assert torch.equal(tensor, state["model"][name]), name


def test_a_resumed_run_has_the_configured_decay_and_refuses_another_optimiser(tmp_path):
    make_trainer(tmp_path).fit()
    _, state = newest_valid_checkpoint(tmp_path, "toy")
    resumed = make_trainer(tmp_path)
    for group in resumed.optimizer.param_groups:
        group["weight_decay"] = 0.2
    resumed.load_state_dict(state)
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.2}
    assert resumed.optimizer.state_dict()["state"]
    resumed.optimizer = make_optimizer("SGD", parameter_groups(resumed.model, lr=0.1, weight_decay=0.0))
    with pytest.raises(UserError, match=r"optimizer\.type"):
        load_training_state(resumed, state)
    resumed = make_trainer(tmp_path)
    del state["model"]["0.weight"]
    with pytest.raises(UserError, match=r"0\.weight"):
        load_training_state(resumed, state)


def moments(trainer):
    """The optimiser's first moments by name of the parameter."""
    state = trainer.optimizer.state
    return {name: state[parameter]["exp_avg"].clone() for name, parameter in trainer.model.named_parameters()}


def test_a_resumed_run_with_another_decay_keeps_each_parameters_moments(tmp_path):
    trained = make_trainer(tmp_path)
    trained.fit()
    _, state = newest_valid_checkpoint(tmp_path, "toy")
    resumed = make_trainer(tmp_path)
    resumed.optimizer = make_optimizer("Adam", parameter_groups(resumed.model, lr=0.01, weight_decay=0.1))
    resumed._parameters = [p for group in resumed.optimizer.param_groups for p in group["params"]]
    load_training_state(resumed, state)
    for name, moment in moments(resumed).items():
        assert torch.equal(moment, moments(trained)[name]), name
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_nearly_the_same(tmp_path, precision):
    for name in ("fp32", precision):
        (tmp_path / name).mkdir()
        make_trainer(tmp_path / name, precision=name).fit()
    full, low = (torch.tensor([e["loss"] for e in history(tmp_path / name)]) for name in ("fp32", precision))
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("error", "workers", "is_dead"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 2, True),
        (EOFError(), 2, True),
        (ConnectionRefusedError(111, "Connection refused"), 2, True),
        (EOFError("Caught EOFError in DataLoader worker process 0.\nTraceback"), 2, False),
        (ConnectionResetError(), 0, False),
    ],
)
def test_a_dead_loader_worker_is_told_from_an_error_inside_one(tmp_path, error, workers, is_dead):
    class Loader:
        num_workers = workers
        batch_sampler = ResumableBatchSampler(SAMPLES, BATCH, seed=1)

        def __iter__(self):
            raise error
            yield

    trainer = make_trainer(tmp_path)
    trainer.data = Loader()
    with pytest.raises(UserError if is_dead else type(error), match="a loader worker died" if is_dead else None):
        trainer.fit()


def test_the_learning_rate_follows_the_schedule(tmp_path):
    make_trainer(tmp_path).fit()
    expected = [0.01 * (1 - i / ITERATIONS) ** 0.9 for i in range(ITERATIONS)]
    assert [entry["lr"] for entry in history(tmp_path)] == pytest.approx(expected)


def test_progress_is_logged_as_lines_without_a_terminal(tmp_path, caplog):
    caplog.set_level("INFO")
    make_trainer(tmp_path, callbacks=[MetricLog(writers=[Console()], interval=4)]).fit()
    lines = [record.getMessage() for record in caplog.records if "iteration" in record.getMessage()]
    assert len(lines) == 3
    assert "12/12" in lines[-1]


# --- a real network ---------------------------------------------------------------------------------------------------


def whole_run(config, name, *options):
    """Losses of four steps without dropout and augmentation."""
    tiny_run.run(
        config,
        f"--name={name}",
        "training.iterations=4",
        "training.eval_iters=100",
        "dataset.data_aug=false",
        "model.vision.dropout=0.0",
        "model.language.dropout=0.0",
        "optimizer.lr=0.001",
        *options,
    )
    return torch.tensor(tiny_run.losses(config, name))


def test_precisions_agree_on_the_recogniser(tmp_path):
    config = tiny_run.write_config(tmp_path)
    full = whole_run(config, "fp32")
    for precision in ("bf16", "fp16"):
        low = whole_run(config, precision, f"training.precision={precision}")
        torch.testing.assert_close(low, full, rtol=0.02, atol=0.0)


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path):
    config = tiny_run.write_config(tmp_path)
    eager = whole_run(config, "eager")
    command = (sys.executable, "main.py", f"--config={config}", "--name=compiled", "training.compile=true")
    options = ("training.iterations=4", "training.eval_iters=100", "dataset.data_aug=false", "optimizer.lr=0.001")
    dropout = ("model.vision.dropout=0.0", "model.language.dropout=0.0")
    process = tiny_run.shell(*command, *options, *dropout)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    compiled = torch.tensor(tiny_run.losses(config, "compiled"))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


@dataclass
class PartlyReadBatch(ToyBatch):
    skipped: dict


def test_a_batch_with_an_unreadable_sample_does_not_recompile(tmp_path, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    trainer = make_trainer(tmp_path, compile_mode="default")
    whole = collate([trainer.data.dataset[SampleKey(0, index)] for index in range(BATCH)])
    short = PartlyReadBatch(whole.x[:-1], whole.y[:-1], whole.indices[:-1], {7: "broken"})
    for batch in (short, whole, short, whole):
        assert torch.isfinite(trainer.train_step(batch).terms["total"])
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, precision):
    from config import load_config
    from run_builders import build_trainer

    path = tiny_run.write_config(tmp_path)
    config = load_config(path, [f"training.precision={precision}", "training.ema=0.9"])
    trainer = build_trainer(config, device=torch.device("cuda"), process=Process())
    batches = [batch.pin_memory() for batch, _ in zip(trainer.data, range(4), strict=False)]
    for batch in batches[:2]:  # lazy state of optimiser and scaler
        trainer.train_step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def lists_in_lists(depth=64):
    """A few kilobytes that are 2 ** depth numbers to whoever walks through them."""
    value = [0.0]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "damage", [{}, {"exp_avg_sq": None}, {"exp_avg": torch.zeros(1)}, {"exp_avg": 7}, {"exp_avg": lists_in_lists()}]
)
def test_damaged_momenta_are_refused_before_a_step_is_made(tmp_path, damage):
    make_trainer(tmp_path).fit()
    _, state = newest_valid_checkpoint(tmp_path, "toy")
    momenta = state["training"]["optimizer"]["state"]
    momenta[0] = momenta[0] | damage if damage else {"step": momenta[0]["step"]}
    with pytest.raises(UserError, match="does not fit the run"):
        load_training_state(make_trainer(tmp_path), state)
