"""A run that is killed anywhere and resumed is the run that was never killed, bit for bit."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import tiny_run
import torch
from tiny_run import ITERATIONS, NAME, folder_of, history, history_text, run, start, write_config

from builders import build_charset, build_model
from bundle import save_bundle
from config import load_config
from engine.checkpoints import newest_valid_checkpoint
from loading.workers import initialize_worker
from tests import small_networks

OPTIONS = ("training.ema=0.9", "training.accumulation=2")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def lines(config, name):
    return history_text(config, name).count("\n")


def kill_at(run, config, name, iteration, pause=0.0):
    """SIGKILL some moments after an iteration was logged."""
    run.wait_until(lambda: lines(config, name) >= iteration)
    time.sleep(pause)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.text()


def assert_same_runs(config, first, second):
    assert history_text(config, first) == history_text(config, second)
    assert [entry["iteration"] for entry in history(config, second)] == list(range(1, ITERATIONS + 1))
    states = [newest_valid_checkpoint(folder_of(config, name), name)[1] for name in (first, second)]
    assert states[0]["training"]["callbacks"] == states[1]["training"]["callbacks"]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


def test_killed_and_resumed_equals_uninterrupted(config):
    arguments = ("dataset.num_workers=2", *OPTIONS)
    run(config, "--name=whole", *arguments)
    kill_at(start(config, "--name=cut", *arguments), config, "cut", 5)
    kill_at(start(config, "--name=cut", "--resume", *arguments), config, "cut", 13, pause=0.01)
    run(config, "--name=cut", "--resume", *arguments)
    assert_same_runs(config, "whole", "cut")


DETERMINISTIC = ("training.deterministic=true", "training.precision=bf16")


def test_deterministic_runs_are_equal(config):
    """tools/gpu_check.py runs this test and the next one on a GPU."""
    for name in ("one", "two"):
        run(config, f"--name={name}", *DETERMINISTIC)
    assert_same_runs(config, "one", "two")


def test_a_deterministic_run_killed_and_resumed_equals_uninterrupted(config):
    run(config, "--name=whole", *DETERMINISTIC)
    kill_at(start(config, "--name=cut", *DETERMINISTIC), config, "cut", 5)
    run(config, "--name=cut", "--resume", *DETERMINISTIC)
    assert_same_runs(config, "whole", "cut")


def test_a_cosine_run_of_named_groups_with_a_frozen_part_goes_on_exactly(config):
    arguments = ("optimizer.scheduler.type=cosine", "optimizer.scheduler.warmup_iters=3", "model.vision.freeze=true")
    arguments += ("optimizer.lr_groups={language: 3, alignment.cls: 0.5}", "training.eval_iters=epoch")
    run(config, "--name=whole", *arguments)
    kill_at(start(config, "--name=cut", *arguments), config, "cut", 5)
    run(config, "--name=cut", "--resume", *arguments)
    assert_same_runs(config, "whole", "cut")
    assert history_text(config, "whole").count("\n") == ITERATIONS
    assert max(entry["lr"] for entry in history(config, "whole")) == 0.01  # of the config, not of a group


def test_a_finished_run_resumed_does_nothing_more(config):
    run(config, "training.iterations=6")
    before = history_text(config)
    run(config, "--resume", "training.iterations=6")
    assert history_text(config) == before


def test_resume_before_the_first_checkpoint_starts_again(config):
    kill_at(start(config, "training.save_iters=100", "training.eval_iters=100"), config, NAME, 3)
    resumed = run(config, "--resume", "training.iterations=6")
    assert "starting from the beginning" in resumed.text()
    assert [entry["iteration"] for entry in history(config)] == list(range(1, 7))


def test_resuming_a_run_that_does_not_exist_names_those_that_do(config):
    run(config, "training.iterations=3")
    run(config, "--name=started", "training.iterations=1", "training.save_iters=100")
    resumed = run(config, "--name=tyni", "--resume", "training.iterations=1")
    assert (
        f"{folder_of(config, 'tyni')} has no checkpoint to resume from: starting from the beginning" in resumed.text()
    )
    assert f"(the runs in {folder_of(config).parent} that have one: started, {NAME})" in resumed.text()


def test_a_run_resumes_for_longer_and_in_another_precision(config):
    run(config, "training.iterations=6")
    run(config, "--resume", "training.iterations=8", "training.precision=fp16")
    run(config, "--resume", "training.iterations=10")
    assert [entry["iteration"] for entry in history(config)] == list(range(1, 11))


# --- what may change, and what may not --------------------------------------------------------------------------------


@pytest.fixture
def bundle(config, tmp_path):
    """A recogniser to start from, with the SSN for its masks in the same file."""
    loaded = load_config(config)
    recogniser = tmp_path / "recogniser.pth"
    torch.manual_seed(1)
    characters = build_charset(loaded).characters
    torch.save(
        {"model": build_model(loaded).state_dict(), "config": loaded.to_dict(), "charset": characters}, recogniser
    )
    ssn = small_networks.save_network(tmp_path / "ssn.pth", small_networks.small_config("ssn"))
    save_bundle(tmp_path / "bundle.pth", recogniser, ssn)
    return tmp_path / "bundle.pth"


def test_a_resumed_run_makes_masks_with_the_bundled_ssn(config, bundle):
    options = (f"--checkpoint={bundle}", "dataset.masks.source=online", "optimizer.scheduler.type=step")
    run(config, "--name=cut", *options, "training.iterations=7")
    run(config, "--name=whole", *options, "training.iterations=9")
    run(config, "--name=cut", "--resume", *options, "training.iterations=9")
    assert history_text(config, "cut") == history_text(config, "whole")
    assert load_config(folder_of(config, "cut") / "config.yaml").model.checkpoint == str(bundle)


def test_the_saved_config_keeps_the_weights_that_the_run_started_from(config, bundle):
    run(config, f"--checkpoint={bundle}", "training.iterations=3")
    bundle.unlink()  # which a resume does not need
    for iterations in (4, 5):
        run(config, "--resume", f"training.iterations={iterations}")
        assert load_config(folder_of(config) / "config.yaml").model.checkpoint == str(bundle)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["dataset.train.batch_size=4"], "dataset.train.batch_size: the run to resume has 8, not 4"),
        (["global.seed=6"], "global.seed: the run to resume has 5, not 6"),
        (
            ["model.language.freeze=true"],
            "groups the parameters in another way); resume with the model, its freeze keys",
        ),
        (["optimizer.lr_groups={{vision: 2}}"], "groups the parameters in another way); resume with the model"),
        (["--checkpoint=other.pth"], "model.checkpoint: the run to resume started from None, not other.pth"),
        (["dataset.train.roots=[{images}/test]"], "images/train'], not ['"),
        (
            ["model.vision.nhead=4", "model.vision.activation=gelu", "model.iter_size=3"],
            "model.vision.nhead: the run to resume has 2, not 4; model.vision.activation: the run to resume has relu, "
            "not gelu; model.iter_size: the run to resume has 2, not 3; set back what has changed, or start a new run",
        ),
        (["model.vision.segmentation.normalize=batch"], "model.vision.segmentation.normalize: the run to resume has"),
        (
            ["dataset.charset_path={images}/../turned.txt"],
            "the run to resume: its charset is not that of dataset.charset_path",
        ),
        (["model.name=vision"], "model.name: the run to resume has binet, not vision"),
    ],
)
def test_what_must_not_change_within_a_run_is_refused_by_its_key(config, tmp_path, changes, key):
    run(config, "training.iterations=3")
    before = history_text(config)
    turned = reversed(build_charset(load_config(config)).characters)
    (tmp_path / "turned.txt").write_text("".join(f"{number}\t{each}\n" for number, each in enumerate(turned)))
    changes = [each.format(images=tmp_path / "images") for each in changes]
    refused = start(config, "--resume", *changes)
    assert refused.wait() == 2, refused.text()
    (line,) = [line for line in refused.text().splitlines() if line.startswith("error: ")]
    assert key in line
    assert "Traceback" not in refused.text()
    assert history_text(config) == before


def test_a_run_resumes_with_data_that_have_moved_and_other_keys_of_training(config, tmp_path):
    run(config, "training.iterations=3")
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = (f"dataset.train.roots=[{tmp_path}/moved/train/]", f"dataset.test.roots=[{tmp_path}/moved/test]")
    run(config, "--resume", "training.iterations=5", *moved, "model.vision.dropout=0.2", "model.vision.loss_weight=2")
    assert len(history(config)) == 5
    tiny_run.write_words(tmp_path / "more", "train", 48)
    (tmp_path / "more" / "masks" / "test").symlink_to(tmp_path / "masks" / "test")
    other = (f"dataset.train.roots=[{tmp_path}/more/images/train]", f"dataset.masks.root={tmp_path}/more/masks")
    refused = start(config, "--resume", *other, moved[1])
    assert refused.wait() == 2, refused.text()
    assert "dataset.train.roots: an epoch of the run to resume has 5 batches, not 6" in refused.text()


def test_a_run_resumes_with_another_weight_decay(config):
    run(config, "training.iterations=3", "optimizer.wd=0.0")
    run(config, "--resume", "training.iterations=5", "optimizer.wd=0.1")
    run(config, "--resume", "training.iterations=7", "optimizer.wd=0.1", "optimizer.bn_wd=true")
    assert [entry["iteration"] for entry in history(config)] == list(range(1, 8))


def test_a_checkpoint_of_another_run_does_not_cut_the_history_of_this_one(config):
    run(config, "--name=other", "training.iterations=3")
    run(config, "training.iterations=5")
    before = history_text(config)
    (checkpoint,) = folder_of(config, "other").glob("other_*_3.pth")
    refused = start(config, f"--resume={checkpoint}", "training.iterations=5")
    assert refused.wait() == 2, refused.text()
    assert f"error: --resume {checkpoint}: no checkpoint of the run in {folder_of(config)}" in refused.text()
    assert history_text(config) == before
    run(config, "--name=new", f"--resume={checkpoint}", "training.iterations=5")
    assert [entry["iteration"] for entry in history(config, "new")] == [4, 5]


def test_a_run_that_went_back_to_an_older_checkpoint_resumes_from_it(config):
    """Also where it is killed before it saves anew: the newer ones are of steps that its history has lost."""
    run(config, "training.iterations=9")
    older = next(folder_of(config).glob(f"{NAME}_*_6.pth"))
    back = start(config, f"--resume={older}", "training.save_iters=100", "training.eval_iters=100")
    back.wait_until(lambda: "resumed after iteration 6" in back.text())
    os.kill(back.pid, signal.SIGKILL)
    back.wait()
    later = {f"superseded-{NAME}_1_9.pth", f"superseded-best-{NAME}.pth"}
    assert {path.name for path in folder_of(config).glob("superseded-*")} == later
    resumed = run(config, "--resume")
    assert "resumed after iteration 6" in resumed.text()
    assert [entry["iteration"] for entry in history(config)] == list(range(1, ITERATIONS + 1))
    assert (folder_of(config) / f"best-{NAME}.pth").is_file()  # of the steps that were taken anew


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stop_signals_save_and_end_cleanly(config, number):
    stopped = start(config, "dataset.num_workers=1", "training.save_iters=1000")
    stopped.wait_until(lambda: lines(config, NAME) >= 4)
    os.killpg(stopped.pid, number)  # as a terminal does: the run and whoever shares its group
    assert stopped.wait() == 128 + number, stopped.text()  # so that `train && test` ends here
    done = len(history(config))
    assert 4 <= done < ITERATIONS
    assert f"stopped by {number.name} after iteration {done}" in stopped.text()
    assert "Traceback" not in stopped.text()
    assert "worker died" not in stopped.text()
    assert list(folder_of(config).glob(f"{NAME}_*_{done}.pth"))
    run(config, "--resume")
    assert len(history(config)) == ITERATIONS


def _send_usr1_to_itself():
    initialize_worker(0)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_sigusr1_to_all_processes_ends_no_loader_worker():
    worker = multiprocessing.get_context("fork").Process(target=_send_usr1_to_itself)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0


def test_temporary_files_of_a_killed_run_are_removed(config):
    folder = folder_of(config)
    folder.mkdir(parents=True)
    (folder / ".tiny_0_3.pth.4711.tmp").write_bytes(b"half a checkpoint")
    run(config, "training.iterations=2")
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_ten_times_at_random_points_through_the_real_command_line(config, workers):
    moments = random.Random(workers)
    command = (sys.executable, "main.py", f"--config={config}", f"dataset.num_workers={workers}", *OPTIONS)
    whole = tiny_run.shell(*command, "--name=whole")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    kills = 0
    while kills < 10:
        process = tiny_run.shell(*command, "--name=cut", "--resume")
        # Mostly within the steps; sometimes while it loads.
        iteration = lines(config, "cut") + moments.randrange(-1, 5)
        end = time.monotonic() + moments.uniform(3, 12)
        while lines(config, "cut") < iteration and time.monotonic() < end and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        assert process.poll() in (None, 0), process.communicate()[0]
        if process.poll() == 0:
            break
        process.kill()
        process.wait()
        kills += 1
    process = tiny_run.shell(*command, "--name=cut", "--resume")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert kills == 10
    assert_same_runs(config, "whole", "cut")
