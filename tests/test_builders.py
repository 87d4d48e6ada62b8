"""builders.py: which weights and settings a network is built with. That each kind builds and trains: test_main.py."""

import pytest
import torch

from builders import areas_to_test, build_charset, build_model, build_optimizer, build_schedule, build_segmenter
from bundle import load_bundle
from config import Config
from tests import small_networks
from utils import UserError

TINY = {key: value for key, value in small_networks.SSN.items() if key != "areas"}


def ssn_config(**changes) -> Config:
    return Config.from_dict({"model": {"name": "ssn", "ssn": {**TINY, **changes}}})


@pytest.fixture
def ssn():
    torch.manual_seed(0)
    return small_networks.make_ssn(**TINY)


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


@pytest.mark.parametrize(("changes", "areas"), [({}, [65]), ({"areas": [97, 129]}, [97, 129])])
def test_an_ssn_is_tested_with_the_same_areas(beside_a_recogniser, changes, areas):
    assert areas_to_test(ssn_config(**changes), str(beside_a_recogniser)) == areas


def test_an_ssn_is_loaded_from_beside_a_recogniser(beside_a_recogniser, ssn):
    config = ssn_config()
    config.model.checkpoint = str(beside_a_recogniser)
    built = build_model(config).state_dict()
    assert all(torch.equal(tensor, built[name]) for name, tensor in ssn.state_dict().items())


def test_an_error_names_the_keys_in_which_the_config_of_a_checkpoint_differs(tmp_path):
    whole = small_networks.save_network(tmp_path / "binet.pth", small_networks.small_config("binet"))
    config = small_networks.small_config("binet")
    config.model.checkpoint, config.model.language.d_inner, config.model.vision.dropout = str(whole), 48, 0.5
    with pytest.raises(UserError) as error:
        build_model(config)
    assert "does not fit the network" in str(error.value)
    assert str(error.value).endswith(". model.language.d_inner is 32 in its config, 48 here")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"d_inner is 32 in its config, 48 here$"):
        load_bundle(whole, config)

    ssn = small_networks.save_network(tmp_path / "ssn.pth", small_networks.small_config("ssn"))
    config = ssn_config(head_width=16, stem_width=4)
    config.model.checkpoint = str(ssn)
    with pytest.raises(
        UserError, match=r"\. model\.ssn\.stem_width is 8 .*; model\.ssn\.head_width is 8 in .*, 16 here$"
    ):
        build_model(config)

    vision = small_networks.save_network(tmp_path / "vision.pth", small_networks.small_config("vision"))
    config = small_networks.small_config("binet")
    config.model.vision.checkpoint, config.model.vision.d_inner = str(vision), 16
    config.model.language.d_inner = 48  # no part of what is loaded
    with pytest.raises(UserError, match=r"\. model\.vision\.d_inner is 32 in its config, 16 here$"):
        build_model(config)


def test_weights_of_another_charset_are_refused(tmp_path):
    path = small_networks.save_network(tmp_path / "binet.pth", small_networks.small_config("binet"))
    config = small_networks.small_config("binet")
    config.model.checkpoint = str(path)
    build_model(config)
    characters = build_charset(config).characters
    turned, longer = tmp_path / "turned.txt", tmp_path / "longer.txt"
    for file, text in ((turned, characters[::-1]), (longer, characters + "!")):
        file.write_text("".join(f"{number}\t{each}\n" for number, each in enumerate(text)))
    config.dataset.charset_path = str(turned)
    for config.model.strict in (False, True):
        with pytest.raises(
            UserError, match=r"binet\.pth: its charset .*turned\.txt: with id 0 it has 'a', not '0'; set"
        ):
            build_model(config)
    config.dataset.charset_path = str(longer)
    with pytest.raises(UserError, match="with id 36 it has None, not '!'"):
        build_model(config)
    config.model.strict = False
    build_model(config)
    state = torch.load(path, weights_only=True)
    config.model.strict, config.dataset.charset_path = True, str(turned)
    for plain in (state["model"], {"model": state["model"], "opt": {}}):
        torch.save(plain, path)
        build_model(config)


def test_a_test_of_weights_as_another_network_causes_one_warning(tmp_path, caplog):
    path = small_networks.save_network(tmp_path / "binet.pth", small_networks.small_config("binet"))
    config = small_networks.small_config("binet")
    config.model.checkpoint, config.run.phase, config.model.vision.dropout = str(path), "test", 0.5
    build_model(config)
    assert not caplog.records
    config.model.iter_size, config.model.vision.activation, config.dataset.align_left = 5, "gelu", True
    build_model(config)
    (record,) = caplog.records
    for key in ("model.vision.activation is relu in its config, gelu here", "model.iter_size", "dataset.align_left"):
        assert key in record.getMessage()
    torch.save(torch.load(path, weights_only=True)["model"], path)
    build_model(config)
    assert len(caplog.records) == 1


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
    assert "model.ssn.gone: nothing reads this key" in caplog.text
    assert "training.departed: nothing reads this key" in caplog.text


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


def frozen_trainer(**changes):
    config = small_networks.small_config("binet").to_dict()
    for part, settings in changes.items():
        config["model"][part] |= settings
    return small_networks.trainer(Config.from_dict(config), ema_decay=0.5)


def test_a_frozen_sub_model_stays_as_it_is_in_every_respect():
    trainer = frozen_trainer(vision={"freeze": True, "dropout": 0.5}, alignment={"freeze": True})
    model = trainer.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.language.parameters()}
    for _ in range(2):
        trainer.train_step(small_networks.uneven_batch("binet"))
    assert model.language.training
    assert not any(module.training for part in (model.vision, model.alignment) for module in part.modules())
    for state in (model.state_dict(), trainer.ema.module.state_dict()):
        for name, tensor in state.items():
            changes = name.startswith("language.") and not name.endswith(".pe")  # sinusoidal positions
            assert torch.equal(tensor, before[name]) != changes, name
    assert any("running_mean" in name for name in before)


def test_groups_of_the_learning_rate_go_by_the_names_in_a_checkpoint():
    """The refinement's parameters stand deeper in the network than their published names say."""
    config = small_networks.small_config("binet")
    config.optimizer.lr, config.optimizer.lr_groups = (
        0.1,
        {"vision": 0.5, "vision.rf": 3, "vision.backbone.resnet": 0.01},
    )
    model = build_model(config)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    factors = {"vision.rf.": 0.3, "vision.backbone.resnet.": 0.001, "vision.": 0.05, "": 0.1}
    seen = set()
    for group in build_optimizer(config, model).param_groups:
        for parameter in group["params"]:
            prefix = next(prefix for prefix in factors if names[id(parameter)].startswith(prefix))
            assert group["lr"] == pytest.approx(factors[prefix]), names[id(parameter)]
            seen.add(prefix)
    assert seen == set(factors)


def test_a_prefix_that_fits_nothing_is_named():
    config = small_networks.small_config("binet")
    config.optimizer.lr_groups = {"vison": 2}
    with pytest.raises(UserError, match=r"optimizer\.lr_groups: no parameter .* 'vison'; the network has .*vision"):
        build_optimizer(config, build_model(config))
    config.optimizer.lr_groups, config.model.alignment.freeze = {"alignment": 2}, True
    with pytest.raises(UserError, match="no parameter that is trained is below 'alignment'"):
        build_optimizer(config, build_model(config))


def test_a_cosine_starts_after_its_warm_up_and_ends_with_the_run():
    config = Config.from_dict({"optimizer": {"scheduler": {"type": "cosine", "warmup_iters": 4}}})
    factor = build_schedule(config, batches_per_epoch=3, iterations=24)
    assert [factor(i) for i in (0, 3, 4, 14, 24)] == pytest.approx([0.25, 1, 1, 0.5, 0])
    assert all(factor(i) > factor(i + 1) for i in range(4, 24))


def test_the_periods_of_steps_include_the_warm_up():
    scheduler = {"type": "step", "periods": [6, 4], "gamma": 0.1, "warmup_iters": 5}
    config = Config.from_dict({"optimizer": {"scheduler": scheduler}, "training": {"epochs": 10}})
    factor = build_schedule(config, batches_per_epoch=2, iterations=20)
    assert [factor(i) for i in (4, 11, 12, 19)] == pytest.approx([1, 1, 0.1, 0.1])


@pytest.mark.parametrize("kind", ["binet", "abinet"])
def test_only_matrices_and_kernels_are_decayed(kind):
    config = small_networks.small_config(kind)
    config.optimizer.wd = 0.01
    network = build_model(config)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = build_optimizer(config, network).param_groups
    decayed = {names[id(each)] for group in groups if group["weight_decay"] for each in group["params"]}
    assert decayed == {name for name, parameter in network.named_parameters() if parameter.dim() > 1}
