"""Several processes are one: same losses, same scores, one writer. Gloo on the CPU stands for any backend."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import tiny_run
import torch
from tiny_run import (
    ITERATIONS,
    NAME,
    folder_of,
    history,
    losses,
    run,
    run_processes,
    shell,
    start_processes,
    write_config,
)
from torch import nn

from builders import build_criterion, build_model
from engine import distributed
from tests import small_networks
from tests.small_networks import terms_and_gradients
from utils import UserError

STEPS = 20
# Dropout draws other numbers in every process. SGD: Adam would blow rounding up where gradients are almost 0. Low rate:
# rounding grows from step to step, at the usual rate to 1e-3 within twenty.
EQUAL = (
    f"training.iterations={STEPS}",
    "model.vision.dropout=0.0",
    "model.language.dropout=0.0",
    "optimizer.type=SGD",
    "optimizer.lr=1.0e-3",
    "training.sync_batchnorm=true",
)


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def scores(config, name):
    return torch.load(folder_of(config, name) / f"best-{name}.pth", weights_only=True)["scores"]


def test_two_processes_equal_one(config):
    run(config, "--name=one", *EQUAL)
    run_processes(config, 2, "--name=two", *EQUAL)
    one, two = history(config, "one"), history(config, "two")
    assert [entry["iteration"] for entry in two] == list(range(1, STEPS + 1))
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, abs=1e-5), (first["iteration"], name)
    one, two = (scores(config, name)["weighted"] for name in ("one", "two"))
    assert two == pytest.approx(one)
    assert two["samples"] == 11


def test_two_processes_read_every_test_word_once_and_write_once(config):
    run(config, "training.iterations=2")
    arguments = ("--phase=test", "--checkpoint", str(folder_of(config) / f"best-{NAME}.pth"), "--image_only")
    run(config, "--name=one", *arguments)
    run_processes(config, 2, "--name=two", *arguments)
    results = [json.loads((folder_of(config, name) / "metrics.json").read_text()) for name in ("one", "two")]
    assert results[0] == results[1]
    files = [(folder_of(config, n) / "test-alignment" / "alignment.txt").read_text() for n in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 11


def test_a_run_resumes_with_another_number_of_processes(config):
    constant = (*EQUAL[1:], "optimizer.scheduler.type=step")
    run(config, "--name=whole", *constant, "training.iterations=7")
    run_processes(config, 2, "--name=changed", *constant, "training.iterations=4")
    resumed = run(config, "--name=changed", "--resume", *constant, "training.iterations=7")
    assert "resumed with 1 processes after 2" in resumed.text()
    assert losses(config, "changed") == pytest.approx(losses(config, "whole"), abs=1e-5)


def test_a_loss_term_of_weight_0_trains_in_parallel(config):
    run_processes(config, 2, "training.iterations=3", "model.vision.loss_weight=0.0", "model.language.loss_weight=0.0")
    assert set(history(config)[0]) == {"iteration", "epoch", "loss", "alignment", "refinement", "lr"}


def test_a_batch_that_cannot_be_shared_is_refused(config):
    with pytest.raises(AssertionError, match="3 processes cannot share evenly"):
        run_processes(config, 3)


def torchrun(*arguments, **options):
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py")
    return shell(*command, *arguments, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_exit_with_the_status_of_a_signal_to_one(config, number):
    ranks = start_processes(config, 2, "training.iterations=2000", "training.save_iters=1000")
    ranks[0].wait_until(lambda: len(history(config)) >= 3)
    os.kill(ranks[1].pid, number)
    assert [each.wait() for each in ranks] == [128 + number] * 2, "\n".join(each.text() for each in ranks)
    assert "Traceback" not in ranks[0].text() + ranks[1].text()


@pytest.mark.slow
def test_torchrun_writes_once_and_stops_cleanly_at_a_signal(config):
    process = torchrun(f"--config={config}", "--local_rank=0", "training.iterations=2000", "training.save_iters=1000")
    written = folder_of(config) / "history.jsonl"
    end = time.monotonic() + 120
    while not (written.exists() and written.read_text().count("\n") > 3) and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output  # whatever the launcher makes of it
    iterations = [entry["iteration"] for entry in history(config)]
    assert iterations == list(range(1, len(iterations) + 1)), output
    assert list(folder_of(config).glob(f"{NAME}_*_{iterations[-1]}.pth")), output
    assert f"after iteration {iterations[-1]}; continue with --resume" in output
    run(config, "--resume", f"training.iterations={iterations[-1] + 2}")
    assert len(history(config)) == iterations[-1] + 2


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(config, free_port):
    """Two launchers on one host, which meet at an address as those of two machines do."""
    run(config, "--name=one", *EQUAL, "training.iterations=3")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1")
    meeting = ("--master_addr=127.0.0.1", f"--master_port={free_port}")
    command = ("main.py", f"--config={config}", "--name=two", *EQUAL, "training.iterations=3")
    machines = [shell(*launcher, f"--node_rank={rank}", *meeting, *command) for rank in (0, 1)]
    for each in machines:
        output = each.communicate(timeout=300)[0]
        assert each.returncode == 0, output
    assert losses(config, "two") == pytest.approx(losses(config, "one"), abs=1e-5)


# At the first bad exit it ends the others, as `--kill-on-bad-exit=1` does, and counts them as ended by it.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> options.txt; shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
for _ in $pids; do
    while wait -n -p ended; code=$?; [ -z "$ended" ]; do :; done
    [ $code -eq 0 ] || { echo $code >> codes.txt; kill -TERM $pids 2> /dev/null; wait; exit 143; }
done
"""
SCONTROL = """#!/bin/bash
if [ $1 = show ]; then echo 127.0.0.1; else echo "$@" > requeued.txt; fi
"""


@pytest.mark.slow
def test_a_slurm_job_saves_at_its_time_limit_and_is_requeued(config, tmp_path):
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "6"}
    for name in ("main.py", "data"):
        (tmp_path / name).symlink_to(tiny_run.ROOT / name)
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def submit(*arguments):
        command = ["bash", str(tiny_run.ROOT / "docs" / "slurm_train.sh"), f"--config={config}", *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    job = submit("training.iterations=2000", "training.save_iters=1000", "training.eval_iters=1000")
    end = time.monotonic() + 300
    while len(tiny_run.history_text(config).splitlines()) < 4 and time.monotonic() < end:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    output = job.communicate(timeout=300)[0]
    assert "--cpus-per-task=6" in (tmp_path / "options.txt").read_text().split()  # which tasks do not inherit
    assert job.returncode == 128 + signal.SIGTERM, output
    assert (tmp_path / "codes.txt").read_text() == f"{128 + signal.SIGUSR1}\n"
    assert (tmp_path / "requeued.txt").read_text() == "requeue 77\n"
    done = len(history(config))
    assert list(folder_of(config).glob(f"{NAME}_*_{done}.pth")), output
    job = submit(f"training.iterations={done + 2}")
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert len(history(config)) == done + 2


# --- the parts --------------------------------------------------------------------------------------------------------


def _as_rank(rank, port, function, results, world_size=2):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    distributed.start("cpu")
    results.put((rank, function(rank)))
    distributed.stop()


def normalised_part(rank):
    """Output, gradients and statistics of rank's uneven part of a batch of 5."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    values, weights = torch.randn(5, 3, 4, 6), torch.randn(5, 4, 4, 6)
    rows = slice(None) if rank is None else slice(0, 2) if rank == 0 else slice(2, 5)
    names = list(network.state_dict())
    network = distributed.synchronized(network, True)
    assert list(network.state_dict()) == names
    output = network(values[rows])
    (output * weights[rows]).sum().backward()
    gradients = [distributed.counted(parameter.grad) for parameter in network.parameters()]
    tensors = [output.detach(), *gradients, *network[1].buffers()]
    return [tensor.numpy() for tensor in tensors]


def test_batch_norm_over_processes_equals_batch_norm_over_the_batch(free_port):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_as_rank, args=(r, free_port, normalised_part, results)) for r in (0, 1)]
    for each in ranks:
        each.start()
    parts = [part for _, part in sorted((results.get(timeout=60) for _ in ranks), key=lambda item: item[0])]
    for each in ranks:
        each.join(60)
    whole = [torch.from_numpy(array) for array in normalised_part(None)]
    parts = [[torch.from_numpy(array) for array in part] for part in parts]
    torch.testing.assert_close(torch.cat([parts[0][0], parts[1][0]]), whole[0], rtol=1e-5, atol=1e-6)
    for part in parts:
        for found, expected in zip(part[1:], whole[1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def half_in_parts(rank):
    """Terms and gradients of the recogniser on rank's half of an uneven batch, in two parts."""
    if rank is None:
        return {name: tensor.numpy() for name, tensor in terms_and_gradients("binet", parts=1).items()}
    rows = slice(0, 4) if rank == 0 else slice(4, 8)
    found = terms_and_gradients("binet", parts=2, rows=rows, process=distributed.Process(rank, 2))
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_two_processes_with_two_parts_each_equal_one_with_one(free_port):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_as_rank, args=(r, free_port, half_in_parts, results)) for r in (0, 1)]
    for each in ranks:
        each.start()
    found = [results.get(timeout=120)[1] for _ in ranks]
    for each in ranks:
        each.join(60)
    for name, expected in half_in_parts(None).items():
        for process in found:
            torch.testing.assert_close(
                torch.from_numpy(process[name]),
                torch.from_numpy(expected),
                rtol=2e-4,
                atol=2e-6,
                msg=lambda message, name=name: f"{name}: {message}",
            )


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_one_process_needs_no_group():
    values = torch.tensor([2.0, 4.0])
    assert distributed.average(values) is values
    assert distributed.counted(values) is values
    assert distributed.gather(["a"]) == ["a"]
    assert distributed.batch_mean(values.sum(), torch.tensor(0)) == 6.0
    network = nn.Sequential(nn.BatchNorm2d(2))
    assert type(distributed.synchronized(network, True)[0]) is nn.BatchNorm2d


def test_a_group_of_one_process_equals_no_group(config):
    run(config, "--name=plain", "training.iterations=4")
    run_processes(config, 1, "--name=group", "training.iterations=4", "training.sync_batchnorm=true")
    assert losses(config, "group") == pytest.approx(losses(config, "plain"), rel=1e-5)


def in_group(rank):
    return distributed.is_distributed(), torch.distributed.get_backend()


def test_torchrun_with_one_process_makes_a_group(free_port):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    alone = context.Process(target=_as_rank, args=(0, free_port, in_group, results, 1))
    alone.start()
    assert results.get(timeout=60) == (0, (True, "gloo"))
    alone.join(60)


def join_group_of_one(port, monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.start("cpu")


def test_synchronized_batch_norm_compiles_to_one_graph(free_port, monkeypatch):
    join_group_of_one(free_port, monkeypatch)
    try:
        network = distributed.synchronized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), True)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        compiled(torch.randn(2, 3, 4, 6)).square().sum().backward()
        assert network[0].weight.grad.abs().sum() > 0
    finally:
        distributed.stop()


@pytest.mark.parametrize("name", ["binet", "ssn"])
def test_all_counts_of_a_loss_take_one_message(name, free_port, monkeypatch):
    join_group_of_one(free_port, monkeypatch)
    try:
        config, batch = small_networks.small_config(name), small_networks.uneven_batch(name)
        output = build_model(config).eval()(*batch.inputs())
        messages = mock.Mock(wraps=torch.distributed.all_reduce)
        monkeypatch.setattr(torch.distributed, "all_reduce", messages)
        assert len(build_criterion(config)(output, *batch.targets())) > 3
    finally:
        distributed.stop()
    assert messages.call_count == 1


@pytest.mark.gpu
def test_nccl_with_one_process_runs(config, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    process = shell(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone", "main.py",
        f"--config={config}", "training.sync_batchnorm=true",
    )  # fmt: skip
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "NCCL INFO" in output
    assert len(history(config)) == ITERATIONS


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("cuda", "built"), [("13.0", "built for CUDA 13.0"), (None, "built without CUDA")])
def test_a_gpu_that_torch_cannot_use_causes_a_warning(no_cuda, monkeypatch, caplog, cuda, built):
    monkeypatch.setattr(distributed, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert distributed.pick_device() == torch.device("cpu")
    assert built in caplog.text


@pytest.mark.parametrize("hidden", [True, False])
def test_nothing_is_said_without_a_gpu_or_of_a_hidden_one(no_cuda, monkeypatch, caplog, hidden):
    monkeypatch.setattr(distributed, "_has_gpu", lambda: hidden)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.pick_device() == torch.device("cpu")
    assert not caplog.records


def test_without_a_launcher_the_current_gpu_stays(monkeypatch):
    chosen = []
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.pick_device() == torch.device("cuda", 1)
    assert distributed.pick_device(0) == torch.device("cuda", 0)
    assert chosen == [1, 0]


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 of this machine has no GPU, there are 2; lower --nproc_per_node"):
        distributed.pick_device()
