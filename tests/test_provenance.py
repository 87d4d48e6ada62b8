"""How a run came to be: what is remembered, summed over resumes, and passed on."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_run
import torch
from tiny_run import folder_of, run, write_config

from bundle import save_bundle
from engine import provenance
from engine.provenance import Provenance, without_folders
from tests import small_networks

CPU = torch.device("cpu")


@pytest.fixture
def fresh_source():
    provenance.source.cache_clear()
    yield provenance.source
    provenance.source.cache_clear()


def test_a_run_and_its_checkpoints_say_how_they_came_to_be(tmp_path):
    config = write_config(tmp_path)
    run(config, "training.iterations=3")
    run(config, "--resume", "training.iterations=5")
    (last,) = folder_of(config).glob("*_5.pth")
    written = json.loads((folder_of(config) / "provenance.json").read_text())
    for path in (last, folder_of(config) / f"best-{tiny_run.NAME}.pth"):
        carried = torch.load(path, weights_only=True)["provenance"]
        first = carried["starts"][0]
        assert first["command"] == f"python main.py --config={config} training.iterations=3"
        assert first["versions"].keys() == {"binet", "python", "torch", "cuda"}
        assert (first["iteration"], first["processes"]) == (0, 1)
        assert first["device"]
        assert carried["hours"] > 0
    assert [start["iteration"] for start in written["starts"]] == [0, 3]
    assert "--resume" in written["starts"][1]["command"]
    assert written["samples"] == 5 * 8  # words of a batch


def test_hours_and_samples_are_summed_over_resumes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(provenance.time, "monotonic", lambda: clock[0])
    first = Provenance(CPU, 2)
    first.samples, clock[0] = 48, 100.0 + 7200
    second = Provenance(CPU, 1)
    second.resume(first.state_dict(), 6)
    second.samples, clock[0] = second.samples + 16, clock[0] + 1800
    state = second.state_dict()
    assert (state["hours"], state["samples"]) == (2.5, 64)
    assert [(start["iteration"], start["processes"]) for start in state["starts"]] == [(0, 2), (6, 1)]


def test_a_checkpoint_without_provenance_is_resumed():
    resumed = Provenance(CPU, 1)
    resumed.resume({}, 6)
    assert [start["iteration"] for start in resumed.state_dict()["starts"]] == [6]


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_named_and_whether_files_have_changed(tmp_path, monkeypatch, fresh_source):
    (tmp_path / "main.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "main.py")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "-a", "v9", "-m", "a tag is no commit")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert (fresh_source()["commit"], fresh_source()["dirty"]) == (commit, False)
    (tmp_path / "main.py").write_text("2\n")
    fresh_source.cache_clear()
    assert (fresh_source()["commit"], fresh_source()["dirty"]) == (commit, True)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_folder_that_is_no_checkout_has_no_commit_and_no_error(tmp_path, monkeypatch, fresh_source, is_broken):
    if is_broken:
        (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert (fresh_source()["commit"], fresh_source()["dirty"]) == (None, None)
    assert fresh_source()["versions"]["binet"] is None


def test_a_machine_without_git_has_no_commit_and_no_error(monkeypatch, fresh_source):
    monkeypatch.setenv("PATH", "")
    assert fresh_source()["commit"] is None


def test_a_bundle_keeps_it_without_the_paths_of_the_machine(tmp_path, monkeypatch):
    arguments = ["main.py", "--config=/home/me/secret/c.yaml", "dataset.train.roots=[/data/me/mj, data/st]", "a=b/c"]
    monkeypatch.setattr(sys, "argv", arguments)
    carried = Provenance(CPU, 1).state_dict() | {"samples": 7}
    paths = [tmp_path / "binet.pth", tmp_path / "ssn.pth"]
    for path in paths:
        small_networks.save_network(path, small_networks.small_config(path.stem))
        torch.save(torch.load(path, weights_only=True) | {"provenance": carried}, path)
    save_bundle(tmp_path / "bundle.pth", *paths)
    saved = torch.load(tmp_path / "bundle.pth", weights_only=True)
    for part in (saved, saved["ssn"]):
        assert part["provenance"]["samples"] == 7
        (start,) = part["provenance"]["starts"]
        assert start["command"] == "python main.py --config=c.yaml 'dataset.train.roots=[mj, data/st]' a=b/c"
        assert start["versions"] == carried["starts"][0]["versions"]


def test_a_bundle_keeps_no_word_lists_and_no_project_of_its_training(tmp_path):
    config = small_networks.small_config("abinet")
    config.dataset.test.lexicon = config.dataset.valid.lexicon = "/home/me/secret/words.txt"
    config.training.wandb = "secret"
    small_networks.save_network(tmp_path / "abinet.pth", config)
    save_bundle(tmp_path / "bundle.pth", tmp_path / "abinet.pth")
    assert "secret" not in str(torch.load(tmp_path / "bundle.pth", weights_only=True)["config"])


def test_paths_below_the_current_folder_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [f"{tmp_path}/main.py", f"a=[{tmp_path}/x, /other{tmp_path}/y]", f"--config={tmp_path}/my words/c.yaml"]
    monkeypatch.setattr(sys, "argv", arguments)
    (start,) = Provenance(CPU, 1).starts
    assert start["command"] == f"python main.py 'a=[x, /other{tmp_path}/y]' '--config=my words/c.yaml'"


@pytest.mark.parametrize(
    ("command", "passed_on"),
    [
        ("python '/home/My Name/main.py' a=b", "python 'main.py' a=b"),
        ("python main.py '--config=/home/My Name/c.yaml' /data/x y/z", "python main.py '--config=c.yaml' x y/z"),
        ("main.py a=[render:///home/me/words.yaml]", "main.py a=[render://words.yaml]"),
        ("main.py 'never closed /home/me/x", "main.py 'never closed x"),
    ],
)
def test_folders_with_spaces_and_those_of_renderers_are_left_out(command, passed_on):
    assert without_folders({"starts": [{"command": command}]})["starts"][0]["command"] == passed_on


def test_addresses_are_no_folders():
    command = "python main.py a=https://host/b/c ./x/y /one"
    assert without_folders({"starts": [{"command": command}]})["starts"][0]["command"] == command
