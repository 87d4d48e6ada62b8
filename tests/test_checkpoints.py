"""A run's checkpoints: their order, what a resume sets aside, what older versions wrote."""

import copy

import pytest
import tiny_run
import torch
from tiny_run import folder_of, run, write_config
from torch import nn

from engine.checkpoints import newest_valid_checkpoint, restore_optimizer, saved_checkpoints, set_aside_later
from engine.optimization import make_optimizer, parameter_groups


def test_checkpoints_of_a_run_are_told_from_other_files(tmp_path):
    """Names with underscores: neither the best weights nor another run's files are taken for checkpoints."""
    for name in ("best-a_1_2.pth", "a_1_2_0_7.pth", "other_0_9.pth", "a_1_2.pth", "superseded-a_1_2_0_9.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert saved_checkpoints(tmp_path, "a_1_2") == ["a_1_2_0_7.pth"]


def test_checkpoints_are_ordered_by_iteration_whatever_their_dates(tmp_path):
    """A folder that was copied has dates in any order."""
    for name in ("a_1_10.pth", "a_2_20.pth", "a_0_9.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert saved_checkpoints(tmp_path, "a") == ["a_0_9.pth", "a_1_10.pth", "a_2_20.pth"]


@pytest.mark.parametrize("content", [None, "{damaged", "checkpoints: [a_0_9.pth]\nlatest: a_0_9.pth\n"])
def test_the_list_is_not_needed(tmp_path, content):
    for iteration in (9, 10):
        torch.save({"training": {"iteration": iteration}}, tmp_path / f"a_0_{iteration}.pth")
    if content is not None:
        (tmp_path / "checkpoint.yaml").write_text(content)
    path, state = newest_valid_checkpoint(tmp_path, "a")
    assert (path.name, state["training"]["iteration"]) == ("a_0_10.pth", 10)


def test_checkpoints_of_steps_that_are_repeated_are_renamed(tmp_path):
    for iteration in (3, 6, 9):
        (tmp_path / f"a_0_{iteration}.pth").write_text(str(iteration))
    set_aside_later(tmp_path, "a", 6)
    assert saved_checkpoints(tmp_path, "a") == ["a_0_3.pth", "a_0_6.pth"]
    assert (tmp_path / "superseded-a_0_9.pth").read_text() == "9"


def test_best_weights_of_steps_that_are_repeated_are_kept(tmp_path):
    best = tmp_path / "best-a.pth"
    for iteration in (6, 9, 12):
        torch.save({"iteration": iteration}, best)
        set_aside_later(tmp_path, "a", 6)
        assert best.exists() == (iteration == 6)
    kept = [tmp_path / f"superseded-best-a.pth{number}" for number in ("", ".1")]
    assert [torch.load(each)["iteration"] for each in kept] == [9, 12]
    best.write_bytes(b"damaged")
    set_aside_later(tmp_path, "a", 6)
    assert best.exists()


def test_a_refused_resume_renames_nothing(tmp_path):
    config = write_config(tmp_path)
    run(config, "training.iterations=6")
    before = sorted(path.name for path in folder_of(config).glob("*.pth"))
    older = next(folder_of(config).glob(f"{tiny_run.NAME}_*_3.pth"))
    refused = tiny_run.start(config, f"--resume={older}", "optimizer.type=SGD")
    assert refused.wait() == 2, refused.text()
    assert sorted(path.name for path in folder_of(config).glob("*.pth")) == before


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_run_resumes_in_another_memory_format(kind):
    """Earlier versions trained with contiguous weights on a CPU."""
    torch.manual_seed(0)
    old = nn.Conv2d(4, 5, 3)
    new = copy.deepcopy(old).to(memory_format=torch.channels_last)
    image = torch.randn(2, 4, 5, 5)
    optimizers = [make_optimizer(kind, parameter_groups(each, lr=0.1, weight_decay=0.0)) for each in (old, new)]

    def step(network, optimizer):
        network(image).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(old, optimizers[0])
    new.load_state_dict(old.state_dict())
    restore_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
    for network, optimizer in zip((old, new), optimizers, strict=True):
        step(network, optimizer)
    torch.testing.assert_close(new.weight, old.weight)
