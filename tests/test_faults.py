"""Injected faults, each with its expected outcome: what is wrong is named, nothing that was good is lost."""

import errno
import fcntl
import gc
import os
import signal
import time

import lmdb
import numpy as np
import pytest
import torch
from tiny_run import ITERATIONS, NAME, folder_of, history, history_text, png, run, start, write_config, write_words

from engine.distributed import Process
from loading.lmdb_io import image_key, label_key
from utils import UserError


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def edit(folder, changes):
    """Put (or with None remove) entries of an LMDB."""
    gc.collect()
    with lmdb.open(str(folder), lock=False, map_size=1 << 26) as environment, environment.begin(write=True) as entries:
        for key, value in changes.items():
            if value is None:
                entries.delete(key.encode())
            else:
                entries.put(key.encode(), value)


def truncated(folder, number):
    with lmdb.open(str(folder), lock=False, readonly=True) as environment, environment.begin() as entries:
        return entries.get(image_key(number).encode())[:60]


def test_broken_words_are_counted_named_and_left_out(config, tmp_path):
    images, masks = tmp_path / "images" / "train", tmp_path / "masks" / "train"
    edit(
        images,
        {
            image_key(3): truncated(images, 3),  # truncated image
            image_key(5): None,  # missing key
            label_key(8): b"\xff\xfe\xfa",  # label not UTF-8
            "num-samples": b"44",  # larger than it is
        },
    )
    edit(masks, {image_key(11): None, image_key(14): png(np.zeros((5, 5), np.uint8)), "num-samples": b"44"})
    # All 38 words that the filter keeps come in 19 batches of 2.
    finished = run(config, "dataset.train.batch_size=2", "training.iterations=19", "training.save_iters=100")
    text = finished.text()
    assert "38 words; left out: 5 missing, 1 not_utf8" in text
    for number, reason in ((3, "broken"), (11, "mask_missing"), (14, "mask_size")):
        assert f"{images} {image_key(number)} cannot be read ({reason}) and is skipped" in text
    for count in ("1 broken", "1 mask_missing", "1 mask_size"):
        assert count in text.split("left out of training")[1]
    assert len(history(config)) == 19


def test_broken_test_words_are_counted(config, tmp_path):
    images = tmp_path / "images" / "test"
    edit(images, {image_key(2): truncated(images, 2), label_key(4): b"\xff"})
    run(config, "training.iterations=1")
    scores = torch.load(folder_of(config) / f"best-{NAME}.pth", weights_only=True)["scores"]["datasets"]["test"]
    assert scores["samples"] == 9
    assert scores["skipped"] == {"not_utf8": 1, "broken": 1}


def test_masks_of_another_set_are_refused(config, tmp_path):
    write_words(tmp_path / "other", "train", 40, first=7)
    write_words(tmp_path / "other", "test", 11)
    refused = start(config, f"dataset.masks.root={tmp_path / 'other' / 'masks'}")
    assert refused.wait() == 2
    assert "do not belong to" in refused.text()
    assert "Traceback" not in refused.text()


def test_a_batch_of_which_nothing_can_be_read_is_left_out_and_the_run_ends_if_all_are(config, tmp_path):
    images = tmp_path / "images" / "train"
    edit(images, {image_key(n): truncated(images, n) for n in range(21, 41)})
    run(config, "--name=one", "dataset.train.batch_size=1", "training.iterations=9")
    assert len(history(config, "one")) == 9
    edit(images, {image_key(n): b"" for n in range(1, 41)})
    failed = start(config, "--name=all")
    assert failed.wait() == 2
    assert "tools/check_lmdb.py" in failed.text()


def test_a_step_that_is_not_finite_is_skipped_and_named(config, monkeypatch):
    """NaN in one batch."""
    import main
    import run_builders
    from callbacks import Callback

    class Spoil(Callback):
        """Makes the third batch's images NaN."""

        def on_batch_loaded(self, trainer, batch):
            if trainer.iteration == 2:
                batch.images = torch.full(batch.images.shape, float("nan"))
                self.before = {key: value.clone() for key, value in trainer.model.named_parameters()}
                self.indices = batch.indices

        def on_step_end(self, trainer, step):
            if not step.finite:
                self.skipped = trainer.iteration
                self.unchanged = all(torch.equal(v, self.before[k]) for k, v in trainer.model.named_parameters())

    spoil = Spoil()
    build = run_builders.build_callbacks
    monkeypatch.setattr(run_builders, "build_callbacks", lambda *args, **options: [spoil, *build(*args, **options)])
    assert main.main([f"--config={config}", "training.iterations=5", "training.eval_iters=100"]) == 0
    assert spoil.skipped == 3
    assert spoil.unchanged
    log = (folder_of(config) / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "iteration 3 skipped" in line)
    assert "vision, alignment" in line or "vision, language, alignment" in line
    assert str(spoil.indices.tolist()) in line
    entries = history(config)
    assert entries[2]["loss"] is None
    assert all(np.isfinite(entry["loss"]) for entry in entries if entry["iteration"] != 3)


def test_a_truncated_newest_checkpoint_is_passed_over(config):
    run(config, "--name=whole", "training.iterations=9")
    run(config, "training.iterations=9", "training.eval_iters=7")
    newest = next(folder_of(config).glob(f"{NAME}_*_9.pth"))
    newest.write_bytes(newest.read_bytes()[:5000])
    resumed = run(config, "--resume", "training.iterations=9")
    assert newest.name in resumed.text()
    assert "trying the one before it" in resumed.text()
    assert "resumed after iteration 6" in resumed.text()
    assert history_text(config) == history_text(config, "whole")


def test_a_full_disk_while_saving_leaves_older_files_intact(config):
    run(config, "training.iterations=3")
    folder = folder_of(config)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    size = max(map(len, before.values()))
    full = start(config, "--resume", limit=size // 2)
    assert full.wait() == 2
    assert "no space left" in full.text()
    assert "Traceback" not in full.text()
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert not list(folder.glob(".*.tmp"))
    run(config, "--resume")
    assert [entry["iteration"] for entry in history(config)] == list(range(1, ITERATIONS + 1))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs rights")
def test_a_full_file_system(config, tmp_path):
    disk = tmp_path / "runs"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {disk}"):
        pytest.skip("no file system can be mounted here")
    try:
        full = start(config, "training.keep_checkpoints=100", "training.save_iters=1", "training.iterations=500")
        assert full.wait() == 2
        assert "no space left" in full.text()
        assert full.text().count("Traceback") == 0
        listed = (folder_of(config) / "checkpoint.yaml").read_text()
        for path in folder_of(config).glob(f"{NAME}_*.pth"):
            assert path.name in listed
            torch.load(path, weights_only=True)
    finally:
        os.system(f"umount {disk}")


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(each) for each in file.read().split()]


def test_a_killed_loader_worker_is_a_user_error_and_a_resume_changes_nothing(config):
    run(config, "--name=whole")
    cut = start(config, "--name=cut", "dataset.num_workers=2", "training.eval_iters=100")
    cut.wait_until(lambda: history_text(config, "cut").count("\n") >= 4 and len(children(cut.pid)) >= 2)
    os.kill(children(cut.pid)[0], signal.SIGKILL)
    assert cut.wait() == 2, cut.text()
    (line,) = [line for line in cut.text().splitlines() if line.startswith("error: ")]
    assert "a loader worker died" in line
    assert "lower dataset.num_workers, then continue with --resume" in line
    assert "Traceback" not in cut.text()
    run(config, "--name=cut", "--resume", "training.eval_iters=100")
    assert history_text(config, "cut") == history_text(config, "whole")


def test_workers_exit_when_their_run_is_killed(config):
    running = start(config, "dataset.num_workers=2", "training.eval_iters=100")
    running.wait_until(lambda: history_text(config).count("\n") >= 2)
    workers = children(running.pid)
    assert len(workers) >= 2
    os.kill(running.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and _running(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def _running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_second_run_in_one_work_folder_is_refused(config):
    folder_of(config).parent.mkdir()
    with open(folder_of(config).parent / f".{NAME}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # what a running one holds
        second = start(config, "--resume")
        assert second.wait() == 2
    assert "is in use by another run" in second.text()
    assert not folder_of(config).exists()
    run(config, "training.iterations=1")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_causes_a_warning(config, monkeypatch, caplog, code):
    from engine import run_folder

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with run_folder.claimed(folder_of(config), Process(), keep=False):
        assert folder_of(config).is_dir()
    assert f"its file system has no locks ({os.strerror(code)})" in caplog.text
    assert "global.workdir" in caplog.text


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN])
def test_a_lock_of_another_run_is_a_user_error(config, monkeypatch, code):
    from engine import run_folder

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with (
        pytest.raises(UserError, match="in use by another run"),
        run_folder.claimed(folder_of(config), Process(), keep=True),
    ):
        pass


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(pid):
    """Megabytes of memory that a process and its workers have for themselves or share among them."""
    total = 0
    for each in [pid, *children(pid)]:
        with open(f"/proc/{each}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


@pytest.mark.slow
def test_memory_of_ten_thousand_steps_does_not_grow(config, capsys):
    running = start(
        config,
        "dataset.num_workers=1",
        "dataset.train.batch_size=2",
        "training.iterations=10000",
        "training.show_iters=100",
        "training.eval_iters=2000",
        "training.save_iters=1000",
        "model.name=vision",  # with its masks; language and alignment would take most of the time
        "model.vision.backbone=resnet",
    )
    curve = []
    for step in range(500, 10000, 500):
        running.wait_until(lambda wanted=step: history_text(config).count("\n") * 100 >= wanted, seconds=1200)
        curve.append((step, round(resident(running.pid), 1)))
        with capsys.disabled():
            print(f"\n{curve[-1][0]} steps: {curve[-1][1]} MB", end="", flush=True)
    assert running.wait() == 0, running.text()
    early = max(memory for step, memory in curve if step <= 3000)
    late = max(memory for step, memory in curve if step > 7000)
    assert late < 1.02 * early, curve
