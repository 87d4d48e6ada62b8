"""What the tool prints of every kind of checkpoint."""

import json
import re

import pytest
import torch
from tiny_run import folder_of, run, write_config

from builders import build_model
from bundle import save_bundle
from tests import small_networks
from tools import show_checkpoint


def shown(path, capsys):
    """The printed lines as name -> value, and the text."""
    assert show_checkpoint.main([str(path)]) == 0
    text = capsys.readouterr().out
    return dict(re.findall(r"^  (\S.*?)  +(\S.*)$", text, re.MULTILINE)), text


def learnt(module):
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


@pytest.fixture
def saved(tmp_path):
    def save(name):
        return small_networks.save_network(tmp_path / f"{name}.pth", small_networks.small_config(name))

    return save


def test_parameters_are_counted_by_sub_model_and_buffers_are_none(saved, tmp_path, capsys):
    recogniser, ssn = saved("binet"), saved("ssn")
    save_bundle(tmp_path / "bundle.pth", recogniser, ssn)
    rows, text = shown(tmp_path / "bundle.pth", capsys)
    network = build_model(small_networks.small_config("binet"))
    for name, part in network.named_children():
        assert rows[name] == learnt(part), name
    ssn_count = learnt(build_model(small_networks.small_config("ssn")))
    assert rows["ssn"] == ssn_count
    assert rows["all"] == f"{int(learnt(network).replace(',', '')) + int(ssn_count.replace(',', '')):,}"
    assert "a recogniser with the SSN" in text
    assert "training\n  not known" in text
    assert "training of the SSN\n  not known" in text


def test_a_checkpoint_of_training_tells_its_story(tmp_path, capsys):
    config = write_config(tmp_path)
    run(config, "training.iterations=2")
    run(config, "--resume", "training.iterations=3")
    (path,) = folder_of(config).glob("*_3.pth")
    _, text = shown(path, capsys)
    assert "which can be resumed" in text
    first, second = json.loads(text.split("\ntraining\n")[1])["starts"]
    assert "training.iterations=2" in first["command"]
    assert "training.iterations=3" in second["command"]
    assert second["iteration"] == 2
    assert '"samples": 24' in text
    assert first["versions"]["torch"] == torch.__version__
    _, text = shown(folder_of(config) / "best-tiny.pth", capsys)
    assert "weights with their config" in text
    assert json.loads(text.split("\nscores\n")[1].split("\ntraining\n")[0])["weighted"]["samples"] == 11


@pytest.mark.parametrize("form", ["published", "plain"])
def test_other_forms_say_what_is_not_known(form, tmp_path, capsys):
    network = build_model(small_networks.small_config("abinet"))
    weights = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"model": weights, "opt": {"state": {}}} if form == "published" else weights, tmp_path / "weights.pth")
    rows, text = shown(tmp_path / "weights.pth", capsys)
    assert {"published": "the published form (fastai)", "plain": "a plain state_dict"}[form] in text
    assert rows["network"] == rows["characters"] == rows["iteration"] == "not known"
    assert rows["language"] == learnt(network.language)
    assert "training\n  not known" in text


def test_what_a_checkpoint_holds_in_place_of_values_is_printed_safely(saved, tmp_path, capsys):
    starts = [7, {"command": "\x1b[31mred", "versions": [1], "iteration": "x"}]
    torch.save(
        {"model": 3, "config": [], "charset": 4, "scores": "x", "ssn": 1, "provenance": {"starts": starts}},
        tmp_path / "odd.pth",
    )
    rows, text = shown(tmp_path / "odd.pth", capsys)
    assert r"\u001b[31mred" in text
    assert rows["all"] == "0"
    assert "\x1b" not in text
