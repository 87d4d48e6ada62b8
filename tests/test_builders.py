"""builders.py: which weights and settings a network is built with. That each kind builds and trains: test_main.py."""

import pytest
import torch

from builders import build_model, build_schedule, build_segmenter
from bundle import load_bundle
from config import Config
from modules.ssn import SSN
from tests import small_networks

TINY = {key: value for key, value in small_networks.SSN.items() if key != "areas"}


def ssn_config(**changes) -> Config:
    return Config.from_dict({"model": {"name": "ssn", "ssn": {**TINY, **changes}}})


@pytest.fixture
def ssn():
    torch.manual_seed(0)
    return SSN(**TINY)


@pytest.fixture
def beside_a_recogniser(ssn, tmp_path):
    """A checkpoint that carries an SSN for the area 65 beside other weights."""
    path = tmp_path / "bundle.pth"
    part = {"model": ssn.state_dict(), "config": ssn_config(areas=[65]).to_dict()}
    torch.save({"model": {}, "ssn": part}, path)
    return path


@pytest.mark.parametrize(("changes", "areas"), [({}, (65,)), ({"areas": [97, 129]}, (97, 129))])
def test_areas_are_the_checkpoints_unless_the_config_names_some(beside_a_recogniser, changes, areas):
    config = Config.from_dict({"model": {"ssn": {"checkpoint": str(beside_a_recogniser), **changes}}})
    assert build_segmenter(config, device="cpu").areas == areas


def test_an_ssn_is_loaded_from_beside_a_recogniser(beside_a_recogniser, ssn):
    config = ssn_config()
    config.model.checkpoint = str(beside_a_recogniser)
    built = build_model(config).state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in ssn.state_dict().items())


def test_a_checkpoint_whose_config_has_a_key_that_has_gone_is_of_use(beside_a_recogniser, tmp_path, caplog):
    state = torch.load(beside_a_recogniser, weights_only=True)
    state["ssn"]["config"]["model"]["ssn"]["gone"] = 1
    torch.save(state, beside_a_recogniser)
    config = Config.from_dict({"model": {"ssn": {"checkpoint": str(beside_a_recogniser)}}})
    assert build_segmenter(config, device="cpu").areas == (65,)
    path = small_networks.save_network(tmp_path / "vision.pth", small_networks.small_config("vision"))
    state = torch.load(path, weights_only=True)
    state["config"]["training"]["departed"] = 1
    torch.save(state, path)
    assert load_bundle(path).config.model.kind == "vision"
    assert "model.ssn.gone is no key" in caplog.text
    assert "training.departed is no key" in caplog.text


@pytest.mark.parametrize(
    ("periods", "epochs", "warned"),
    [([6, 4], 10, ""), ([6, 4], 12, "add up to 10 epochs, training.epochs is 12"), ([6, 4], 1, "training.epochs is 1")],
)
def test_periods_that_do_not_fill_the_epochs_are_told(caplog, periods, epochs, warned):
    mapping = {"training": {"epochs": epochs}, "optimizer": {"scheduler": {"periods": periods}}}
    build_schedule(Config.from_dict(mapping), batches_per_epoch=3, iterations=3 * epochs)
    assert ("optimizer.scheduler.periods" in caplog.text) == bool(warned)
    assert warned in caplog.text
    caplog.clear()
    mapping["training"]["iterations"] = 5  # which rules
    build_schedule(Config.from_dict(mapping), batches_per_epoch=3, iterations=5)
    assert not caplog.text
