"""The command line: what it builds, what it trains and tests, and what it says when a user errs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from config import load_config
from engine.checkpoints import resume_state
from engine.trainer import Trainer
from loading.lmdb_io import LmdbWriter
from main import build_criterion, build_model, main
from tests.reference import expected_tensors, known_inputs, tensor_shapes
from utils import UserError

ROOT = Path(__file__).parent.parent
NO_CHECKPOINTS = ["global.phase=test", "model.vision.checkpoint=null", "model.language.checkpoint=null"]
TINY = {
    "vision": {
        "stem_width": 4,
        "widths": [4, 4, 8, 8, 16],
        "depths": [1, 1, 1, 1, 1],
        "strides": [2, 2, 2, 1, 1],
        "backbone_ln": 1,
        "d_model": 16,
        "nhead": 2,
        "d_inner": 16,
        "attention_channels": 4,
        "segmentation": {
            "sft_blocks": 1,
            "sft_channels": 4,
            "condition_channels": 4,
            "hidden_channels": 4,
            "side_channels": 4,
        },
    },
    "language": {"num_layers": 1, "d_model": 16, "nhead": 2, "d_inner": 16},
    "alignment": {"d_model": 16},
    "ssn": {
        "widths": [2, 4, 4, 4],
        "stem_width": 4,
        "num_modules": [1, 1, 1],
        "num_blocks": 1,
        "bottlenecks": 1,
        "bottleneck_width": 2,
        "head_width": 4,
        "areas": [65],
    },
}
WORDS = ["kayak", "Mantis", "x", "42", "Tree-house", "lens"]


def word_image(text, number):
    image = np.full((32, 100, 3), 40 + 10 * (number % 5), np.uint8)
    cv2.putText(image, text, (4, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (250, 240, 230), 2)
    mask = (image[..., 0] > 150).astype(np.uint8) * 255
    return cv2.imencode(".png", image)[1].tobytes(), cv2.imencode(".png", mask)[1].tobytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two word LMDBs, their masks, a language CSV, and a YAML for each stage."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("set-a", 5), ("set-b", 3)):
        with LmdbWriter(folder / "images" / name) as images, LmdbWriter(folder / "masks" / name) as masks:
            for number in range(count):
                text = WORDS[number % len(WORDS)]
                image, mask = word_image(text, number)
                images.append(image, text)
                masks.append(mask, text)
    (folder / "language.csv").write_text("inp\tgt\n" + "".join(f"{w.lower()}\t{w}\n" for w in WORDS * 2))
    for kind in ("binet", "abinet", "vision", "language", "ssn"):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tiny_config(folder, kind)))
    return folder


def tiny_config(folder, kind):
    roots = (
        [str(folder / "language.csv")] * 2
        if kind == "language"
        else [str(folder / "images/train"), str(folder / "images/set-a")]
    )
    return {
        "global": {"name": kind, "workdir": str(folder / "workdir")},
        "dataset": {
            "train": {"roots": roots[:1], "batch_size": 4},
            "test": {"roots": roots[1:], "batch_size": 4},
            "masks": {"root": str(folder / "masks"), "source": "none" if kind == "abinet" else "lmdb"},
            "num_workers": 0,
            "segmentation": {"crop_size": [33, 65], "ignore_level": None},
        },
        "training": {"iterations": 4, "show_iters": 1, "eval_iters": 4, "save_iters": 2},
        "model": {"name": kind, **TINY},
    }


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "overrides"),
    [
        ("binet", "train", []),
        ("binet_position", "train", ["model.vision.attention=position"]),
        ("abinet", "train_abinet", []),
        (
            "abinet",
            "train",
            ["model.name=modules.model_abinet_iter.ABINetIterModel", "model.vision.attention=position"],
        ),
        ("ssn", "train_ssn", []),
    ],
)
def test_configs_build_the_published_networks(name, config, overrides):
    model = build_model(load_config(ROOT / f"configs/{config}.yaml", [*NO_CHECKPOINTS, *overrides]))
    assert tensor_shapes(model) == expected_tensors(name)


@pytest.mark.parametrize("kind", ["binet", "abinet", "vision", "language", "ssn"])
def test_every_kind_builds_and_its_criterion_takes_its_output(kind, data):
    config = load_config(data / f"{kind}.yaml")
    model, criterion = build_model(config), build_criterion(config)
    image, mask, labels, lengths = known_inputs(seed=1, count=2)
    if kind == "ssn":
        terms = criterion(model(image), torch.zeros(2, 32, 128, dtype=torch.long))
        assert terms.keys() == {"semantic", "refined", "trimap", "total"}
    elif kind == "language":
        terms = criterion(model(torch.rand(2, 26, 37), lengths), labels, lengths)
        assert terms.keys() == {"language", "total"}
    else:
        terms = criterion(model(image, mask), labels, lengths)
        expected = {"vision", "total"} if kind == "vision" else {"vision", "language", "alignment", "total"}
        assert terms.keys() == expected | ({"refinement"} if kind != "abinet" else set())
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_any_number_of_rounds_trains(rounds, data):
    config = load_config(data / "binet.yaml", [f"model.iter_size={rounds}"])
    model = build_model(config)
    image, mask, labels, lengths = known_inputs(seed=1, count=2)
    output = model(image, mask)
    assert len(output.alignment) == len(output.language) == rounds
    build_criterion(config)(output, labels, lengths)["total"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_eight_words_can_be_overfitted(data):
    torch.manual_seed(0)
    config = load_config(data / "binet.yaml", ["model.vision.dropout=0", "model.language.dropout=0"])
    model, criterion = build_model(config), build_criterion(config)
    image, mask, labels, lengths = known_inputs(seed=2, count=8)
    labels, lengths = labels.clone(), lengths.clamp(max=6)
    labels[torch.arange(26) >= lengths[:, None] - 1] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        criterion(model(image, mask), labels, lengths)["total"].backward()
        optimizer.step()
    read = model(image, mask).alignment[-1].logits.argmax(-1)
    counted = torch.arange(26) < lengths[:, None]
    assert torch.equal(read[counted], labels[counted])


def test_a_stage_starts_from_checkpoints_of_its_sub_models(data, tmp_path):
    paths = {}
    for kind in ("vision", "language"):
        model = build_model(load_config(data / f"{kind}.yaml"))
        paths[kind] = tmp_path / f"{kind}.pth"
        torch.save(model.state_dict(), paths[kind])
    overrides = [f"model.{kind}.checkpoint={path}" for kind, path in paths.items()]
    model = build_model(load_config(data / "binet.yaml", overrides))
    for kind, path in paths.items():
        for name, tensor in torch.load(path, weights_only=True).items():
            assert torch.equal(getattr(model, kind).state_dict()[name], tensor), name


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binet", "abinet", "vision", "language", "ssn"])
def test_every_stage_trains_and_tests(kind, data, capsys):
    assert main([f"--config={data / kind}.yaml", f"global.name=stage-{kind}"]) == 0
    folder = data / "workdir" / f"stage-{kind}"
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0].keys() >= {"iteration", "epoch", "loss", "lr"}
    assert yaml.safe_load((folder / "checkpoint.yaml").read_text())["latest"] == f"stage-{kind}_1_4.pth"
    assert list(folder.glob("tensorboard/events*"))
    best = folder / f"best-stage-{kind}.pth"
    build_model(load_config(folder / "config.yaml", [f"model.checkpoint={best}"]))

    assert main([f"--config={data / kind}.yaml", "--name", f"stage-{kind}", "--phase", "test"]) == 0
    assert "weighted" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    (entry,) = metrics["datasets"].values()
    assert entry["samples"] + sum(entry["skipped"].values()) == {"language": 12}.get(kind, 5)
    assert metrics["weighted"].keys() >= ({"iou", "f_score"} if kind == "ssn" else {"accuracy", "ccr", "ned"})


@pytest.mark.parametrize("phase", ["train", "test"])
@pytest.mark.parametrize("allowed", [False, True])
def test_training_and_test_round_float32_alike(data, tmp_path, phase, allowed):
    weights = tmp_path / "weights.pth"
    torch.save(build_model(load_config(data / "vision.yaml")).state_dict(), weights)
    arguments = [f"--config={data / 'vision.yaml'}", f"--name=tf32-{phase}-{allowed}", "training.iterations=1"]
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in backends]
    try:
        for each in backends:
            each.allow_tf32 = not allowed
        main([*arguments, f"--phase={phase}", f"--checkpoint={weights}", *(["training.tf32=true"] if allowed else [])])
        assert [each.allow_tf32 for each in backends] == [allowed, allowed]
    finally:
        for each, value in zip(backends, before, strict=True):
            each.allow_tf32 = value


def test_an_operation_without_a_deterministic_form_is_named(data, monkeypatch):
    def refuse(self):
        raise RuntimeError("upsample_backward does not have a deterministic implementation, but you set it.\nMore.")

    monkeypatch.setattr(Trainer, "fit", refuse)
    arguments = [f"--config={data / 'vision.yaml'}", "--name=deterministic", "training.iterations=1"]
    with pytest.raises(UserError, match=r"training\.deterministic: torch cannot \(upsample_backward .*set it to false"):
        main([*arguments, "training.deterministic=true"])
    with pytest.raises(RuntimeError, match="upsample_backward"):
        main(arguments)
    assert not torch.are_deterministic_algorithms_enabled()


def assert_tested(folder, weights):
    """The report and the scores of the last test name these weights."""
    assert str(weights) in (folder / "report" / "index.html").read_text()
    assert json.loads((folder / "metrics.json").read_text())["checkpoint"] == str(weights)


def test_a_run_is_tested_with_its_own_best_weights_not_those_it_started_from(data, tmp_path):
    start = tmp_path / "start.pth"
    torch.manual_seed(7)
    torch.save(build_model(load_config(data / "vision.yaml")).state_dict(), start)
    trained = [f"--config={data / 'vision.yaml'}", "--name=own-best"]
    assert main([*trained, f"--checkpoint={start}", "optimizer.lr=0.01"]) == 0
    folder = data / "workdir" / "own-best"
    own = f"--config={folder / 'config.yaml'}"
    assert load_config(folder / "config.yaml").model.checkpoint == str(start)
    best = folder / "best-own-best.pth"
    for named, weights in (([], best), ([f"--checkpoint={start}"], start), ([f"model.checkpoint={start}"], start)):
        assert main([own, "--phase=test", *named]) == 0
        assert_tested(folder, weights)

    best.unlink()
    with pytest.raises(UserError, match=r"--checkpoint .*own-best_1_4\.pth"):
        main([own, "--phase=test"])


def test_where_nothing_was_trained_the_configs_weights_are_tested(data, tmp_path):
    start = tmp_path / "start.pth"
    torch.save(build_model(load_config(data / "vision.yaml")).state_dict(), start)
    config = tiny_config(data, "vision")
    config["model"]["checkpoint"] = str(start)
    (tmp_path / "with.yaml").write_text(yaml.safe_dump(config))
    assert main([f"--config={tmp_path / 'with.yaml'}", "--name=untrained", "--phase=test"]) == 0
    folder = data / "workdir" / "untrained"
    assert_tested(folder, start)
    assert f"nothing was trained in {folder}: testing model.checkpoint, {start}" in (folder / "log.txt").read_text()
    with pytest.raises(UserError, match="no weights to test"):
        main([f"--config={data / 'vision.yaml'}", "--name=untrained-too", "--phase=test"])


def test_each_test_set_has_its_row_and_its_files(data):
    name = "rows"
    weights = data / "rows.pth"
    torch.save(build_model(load_config(data / "binet.yaml")).state_dict(), weights)
    arguments = [f"--config={data / 'binet.yaml'}", "--name", name, "--phase", "test", "--checkpoint", str(weights)]
    roots = ["--test_root", str(data / "images/set-a"), "--test_root", str(data / "images/set-b")]
    for model_eval in ("alignment", "vision", "language"):
        assert main([*arguments, *roots, "--model_eval", model_eval]) == 0
        folder = data / "workdir" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["model_eval"] == model_eval
        assert {n: e["samples"] for n, e in metrics["datasets"].items()} == {"set-a": 5, "set-b": 3}
        assert metrics["weighted"].keys() >= {"accuracy", "ccr", "ned"} <= metrics["mean"].keys()
        lines = (folder / f"set-a-{model_eval}" / f"{model_eval}.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == WORDS[:5]
        assert (folder / f"set-a-{model_eval}" / f"{model_eval}-false.txt").exists()
        images = sorted(path.name for path in (folder / f"set-b-{model_eval}" / "attn").iterdir())
        assert images == [f"{number:09d}.jpg" for number in (1, 2, 3)], "named by the keys of the LMDB"
    for model_eval in ("alignment", "vision", "language"):  # none has taken another's place
        assert json.loads((folder / f"metrics-{model_eval}.json").read_text())["model_eval"] == model_eval
        assert (folder / f"metrics-{model_eval}.csv").exists()


def test_image_only_leaves_attention_out_and_a_folder_gives_all_its_sets(data):
    weights = data / "folder.pth"
    torch.save(build_model(load_config(data / "abinet.yaml")).state_dict(), weights)
    arguments = ["--phase", "test", "--image_only", "--checkpoint", str(weights), "--test_root", str(data / "images")]
    assert main([f"--config={data / 'abinet.yaml'}", "--name", "folder", *arguments]) == 0
    folder = data / "workdir" / "folder"
    assert json.loads((folder / "metrics.json").read_text())["datasets"].keys() == {"train", "set-a", "set-b"}
    assert not list(folder.glob("*/attn"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_eval=vision"], "--model_eval vision: training scores alignment"),
        (["--phase=test", "--resume"], "--resume continues a training"),
        (["global.stage=train-semi-super"], "global.stage: train-semi-super is not built"),
    ],
)
def test_what_would_be_ignored_is_refused_and_no_run_is_moved_for_it(data, arguments, message):
    run = [f"--config={data / 'binet.yaml'}", "--name=ignored", "training.iterations=1"]
    if not (data / "workdir" / "ignored").exists():
        assert main([*run, "--model_eval=alignment"]) == 0  # what training scores
    with pytest.raises(UserError) as error:
        main([*run, *arguments])
    assert message in str(error.value)
    assert not (data / "workdir" / "ignored.1").exists()


def test_a_refused_test_leaves_no_folder(data):
    for arguments in (["--checkpoint=gone.pth"], ["--model_eval=vision"], []):
        with pytest.raises(UserError):
            main([f"--config={data / 'language.yaml'}", "--name=refused-test", "--phase=test", *arguments])
        assert not (data / "workdir" / "refused-test").exists()
    torch.save(build_model(load_config(data / "vision.yaml")).state_dict(), data / "whole.pth")
    arguments = [f"--checkpoint={data / 'whole.pth'}", "--phase=test", "dataset.test.lexicon=lexicon50"]
    with pytest.raises(UserError, match="has no lexicon50"):  # found at the first word
        main([f"--config={data / 'vision.yaml'}", "--name=refused-test", *arguments])
    assert not (data / "workdir" / "refused-test").exists()
    kept = data / "workdir" / "refused-later"
    kept.mkdir(parents=True)
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        main([f"--config={data / 'language.yaml'}", "--name=refused-later", "--phase=test"])
    assert (kept / "notes.txt").exists()


def test_a_refused_training_leaves_no_folder_and_moves_no_earlier_run(data, capsys):
    run = [f"--config={data / 'language.yaml'}", "--name=refused", "training.iterations=1"]
    gone = "dataset.train.roots=[gone.csv]"
    folder = data / "workdir" / "refused"
    with pytest.raises(UserError, match=r"gone\.csv"):
        main([*run, gone])
    assert not folder.exists()
    assert main(run) == 0
    history = (folder / "history.jsonl").read_text()
    with pytest.raises(UserError, match=r"gone\.csv"):
        main([*run, gone])
    assert (folder / "history.jsonl").read_text() == history
    assert not folder.with_name("refused.1").exists()
    assert "is the earlier run again" in capsys.readouterr().out


def test_print_config_prints_what_the_files_and_overrides_say_and_stops(data, tmp_path, capsys):
    (tmp_path / "sets.yaml").write_text("dataset: {test: {roots: [one, two]}}\n")
    files = [f"--config={data / 'vision.yaml'}", f"--config={tmp_path / 'sets.yaml'}"]
    assert main([*files, "--print_config", "--name=printed", "training.epochs=7"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "printed.yaml")
    assert config == load_config(
        [data / "vision.yaml", tmp_path / "sets.yaml"], ["global.name=printed", "training.epochs=7"]
    )
    assert config.dataset.test.roots == ["one", "two"]
    assert not (data / "workdir" / "printed").exists()


def test_valid_sets_choose_the_best_weights_and_test_sets_are_tested(data):
    run = [f"--config={data / 'vision.yaml'}", "--name=valid", "training.iterations=1"]
    valid = f"dataset.valid.roots=[{data / 'images/set-b'}]"
    folder = data / "workdir" / "valid"
    for arguments, scored in (([valid], "set-b"), ([], "set-a")):
        assert main([*run, *arguments]) == 0
        best = torch.load(folder / "best-valid.pth", weights_only=True)
        assert list(best["scores"]["datasets"]) == [scored]
        assert ("dataset.valid.roots is empty" in (folder / "log.txt").read_text()) == (not arguments)
    assert main([*run, valid, "--phase=test"]) == 0
    assert list(json.loads((folder / "metrics.json").read_text())["datasets"]) == ["set-a"]


def test_an_earlier_run_is_moved_aside_not_overwritten(data, capsys):
    arguments = [f"--config={data / 'language.yaml'}", "global.name=again", "training.iterations=1"]
    assert main(arguments) == 0
    first = (data / "workdir/again/history.jsonl").read_text()
    assert main(arguments) == 0
    assert (data / "workdir/again.1/history.jsonl").read_text() == first
    assert "again.1" in capsys.readouterr().out


def test_training_twice_gives_the_same_losses(data):
    for name in ("one", "two"):
        assert main([f"--config={data / 'binet.yaml'}", f"global.name=same-{name}"]) == 0
    one, two = ((data / f"workdir/same-{name}/history.jsonl").read_text() for name in ("one", "two"))
    assert one == two


def test_a_checkpoint_is_resumed_from_by_name_and_a_file_of_another_name_is_refused(tmp_path):
    for iteration in (3, 6):
        torch.save({"training": {"iteration": iteration}}, tmp_path / f"toy_0_{iteration}.pth")
    torch.save({"training": {"iteration": 4}}, tmp_path / "backup.pth")
    resumed = [resume_state(tmp_path, "toy", each) for each in ("", str(tmp_path / "toy_0_3.pth"))]
    assert [state["training"]["iteration"] for state in resumed] == [6, 3]
    (tmp_path / "history.jsonl").write_text('{"iteration": 6}\n')
    with pytest.raises(UserError, match=r"--resume .*backup\.pth: no checkpoint of the run"):
        resume_state(tmp_path, "toy", str(tmp_path / "backup.pth"))


# --- user errors ------------------------------------------------------------------------------------------------------

ERRORS = {
    "unknown key": ("training: {epoch: 3}", [], ["training.epoch", "epochs"]),
    "wrong type": ("training: {epochs: ten}", [], ["training.epochs", "ten"]),
    "broken YAML": ("training: {epochs: 3", [], ["broken.yaml"]),
    "code tag": ("training: !!python/object/apply:os.mkdir [executed]", [], ["python/object/apply", "broken.yaml"]),
    "missing config": (None, [], ["broken.yaml"]),
    "missing data": ("dataset: {train: {roots: [nowhere/at/all]}}", [], ["nowhere/at/all"]),
    "folder without LMDB": ("dataset: {train: {roots: [empty]}}", [], ["empty"]),
    "missing checkpoint": ("{}", ["--phase", "test", "--checkpoint", "no.pth", "--test_root", "empty"], ["no.pth"]),
    "unknown override": ("{}", ["training.epoks=3"], ["training.epoks", "epochs"]),
    "unknown flag": ("{}", ["--epochs", "3"], ["--epochs", "--help"]),
    "unknown choice": ("{}", ["--phase", "fit"], ["--phase", "train"]),
    "no way out of workdir": ("{}", ["--name", ".."], ["global.name", ".."]),
    "no loss": (
        "model: {name: vision, vision: {loss_weight: 0}}",
        [],
        ["model.vision.loss_weight", "has a loss to learn from"],
    ),
    "workdir that is a file": (
        "{}",
        ["--phase", "test", "--checkpoint", "no.pth", "--test_root", "empty", "global.workdir=broken.yaml"],
        ["broken.yaml", "global.workdir"],
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_user_errors_exit_with_two_and_name_the_culprit(kind, tmp_path):
    content, arguments, culprits = ERRORS[kind]
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "broken.yaml").write_text(content + "\n")
    command = [sys.executable, str(ROOT / "main.py"), "--config=broken.yaml", "model.vision.segmentation.enabled=false"]
    overrides = [f"dataset.charset_path={ROOT / 'data/charset_36.txt'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments, *overrides], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :].strip()
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for culprit in culprits:
        assert culprit in message, message
    assert not (tmp_path / "executed").exists()


def test_several_mistakes_are_told_at_once(tmp_path, capsys):
    (tmp_path / "many.yaml").write_text("training: {epoch: 3, show_iters: x}\nmodle: {}\n")
    with pytest.raises(ValueError, match=r"training\.epoch") as caught:
        load_config(tmp_path / "many.yaml", ["optimizer.lrate=1"])
    for culprit in ("training.epoch", "training.show_iters", "modle", "optimizer.lrate"):
        assert culprit in str(caught.value)
