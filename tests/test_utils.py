"""Checkpoint files load in every form, name what does not fit, and execute nothing."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from builders import build_model
from config import load_config
from engine.checkpoints import load_checkpoint, read_checkpoint, save_atomically
from utils import UserError, write_atomically


def small_network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return {
        name: torch.randn_like(t) if t.is_floating_point() else t for name, t in small_network().state_dict().items()
    }


FORMS = {
    "plain": lambda weights: weights,
    "module prefix": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "compiled and parallel": lambda weights: {f"module._orig_mod.{name}": t for name, t in weights.items()},
    "fastai": lambda weights: {"model": weights, "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}},
    "fastai, module prefix": lambda weights: {"model": {f"module.{n}": t for n, t in weights.items()}, "opt": None},
    "ours": lambda weights: {"model": weights, "config": {"model": {"name": "binet"}}, "charset": "abc"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_strictly(form, weights, tmp_path):
    torch.save(FORMS[form](weights), tmp_path / "weights.pth")
    network = small_network()
    load_checkpoint(network, tmp_path / "weights.pth", strict=True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_old_non_zip_files_load(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(small_network(), tmp_path / "old.pth")


def test_a_file_without_tensors_is_a_user_error(tmp_path):
    torch.save({"model": None}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"0\.weight"):
        load_checkpoint(small_network(), tmp_path / "none.pth")


@pytest.mark.parametrize(("error", "status"), [("UserError('no disk')", 2), ("RuntimeError('no disk')", 1)])
def test_a_failing_process_of_several_exits_at_once_and_says_why(error, status):
    """At exit a group of NCCL would be taken down together; nothing that is registered there may run."""
    program = (
        "import atexit, time, utils, torch.distributed as dist\n"
        "atexit.register(time.sleep, 60)\n"
        "def main():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        f"    raise {error.replace('UserError', 'utils.UserError')}\n"
        "utils.run_command_line(main)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert result.returncode == status
    assert "no disk" in result.stderr


def test_missing_extra_and_reshaped_tensors_are_named(weights, tmp_path):
    weights["stranger"] = weights.pop("0.bias")
    weights["1.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        load_checkpoint(small_network(), tmp_path / "weights.pth")
    for culprit in ("0.bias", "stranger", "1.weight", "(7,)", "(4,)"):
        assert culprit in str(caught.value)


def test_the_differences_of_another_size_are_shown_without_a_cut(tmp_path):
    small = build_model(load_config("configs/quickstart.yaml"))
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    full = load_config("configs/train.yaml", ["model.vision.checkpoint=null", "model.language.checkpoint=null"])
    with pytest.raises(UserError) as caught:
        load_checkpoint(build_model(full), tmp_path / "weights.pth")
    assert " ... " not in str(caught.value)
    assert "conv1.weight (8, 3, 3, 3), not (32, 3, 3, 3)" in str(caught.value)


def test_not_strict_loads_what_fits(weights, tmp_path, caplog):
    del weights["0.bias"]
    torch.save(weights, tmp_path / "weights.pth")
    network = small_network()
    load_checkpoint(network, tmp_path / "weights.pth", strict=False)
    assert torch.equal(network[0].weight, weights["0.weight"])
    assert "0.bias" in caplog.text


def test_a_checkpoint_of_another_network_is_refused_even_when_not_strict(tmp_path):
    torch.save({"elsewhere": torch.ones(3)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="no tensor of the network"):
        load_checkpoint(small_network(), tmp_path / "weights.pth", strict=False)


def test_unused_published_tensors_are_dropped_and_nothing_else(weights, tmp_path):
    unused = {"vision.project.weight": torch.ones(2), "vision.backbone.resnet.side4_1.0.bias": torch.ones(2)}
    torch.save(weights | unused, tmp_path / "weights.pth")
    load_checkpoint(small_network(), tmp_path / "weights.pth", strict=True)
    torch.save(weights | unused | {"vision.projector.weight": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"vision\.projector\.weight"):
        load_checkpoint(small_network(), tmp_path / "weights.pth", strict=True)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(weights, tmp_path):
    torch.save({"model": weights, "opt": Malicious(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(small_network(), tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_user_errors(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pth"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_truncated_checkpoint_is_a_user_error(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for size in (10, len(content) // 2, len(content) - 5):
        (tmp_path / "cut.pth").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.pth"):
            read_checkpoint(tmp_path / "cut.pth")


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        read_checkpoint("nowhere.pth")


def test_a_failed_save_leaves_the_older_file_intact(weights, tmp_path):
    path = tmp_path / "weights.pth"
    save_atomically(weights, path)
    before = path.read_bytes()
    code = (
        "import resource, torch, utils\nfrom engine import checkpoints\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"utils.run_command_line(lambda: checkpoints.save_atomically({{'w': torch.ones(10**6)}}, {str(path)!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no space left" in result.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    def refuse(file):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(UserError, match=r"page\.html: cannot be written \(Read-only file system\)"):
        write_atomically(tmp_path / "page.html", refuse)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02a.", "damaged"),  # takes from an empty stack
        (b"\x80\x02G\x00", "damaged"),  # a number that is cut short
    ],
)
def test_bytes_that_are_a_hostile_pickle_are_a_user_error(content, message, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "weights.pth")


def test_weights_whose_names_are_not_strings_are_ignored(weights, tmp_path):
    torch.save(weights | {7: torch.zeros(1)}, tmp_path / "weights.pth")
    load_checkpoint(small_network(), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "odd", [torch.zeros(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.bool), torch.empty(4, device="meta")]
)
def test_a_tensor_of_another_type_is_named(odd, weights, tmp_path):
    torch.save(weights | {"1.weight": odd}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"1\.weight torch\..*, not torch\.float32"):
        load_checkpoint(small_network(), tmp_path / "weights.pth")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(weights, tmp_path):
    torch.save(weights | {"odd": torch.zeros(1).expand(1 << 40)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="claim far more than the file holds"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_compressed_archive_is_unpacked_within_limits_only(weights, tmp_path):
    torch.save({"0.weight": torch.zeros(1 << 25)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(UserError, match="unpacks to far more"):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_message_is_a_line_that_can_be_printed_and_read():
    assert str(UserError("a\x1b[31m.yaml: \u2028 is wrong")) == r"a\x1b[31m.yaml: \u2028 is wrong"
    assert str(UserError("2 problems\n  one")) == "2 problems\n  one"
    long = str(UserError("first " + "x" * 10**6 + " last"))
    assert long.startswith("first x")
    assert long.endswith("x last")
    assert len(long) < 1100
