"""builders.py: which weights and settings a network is built with. That each kind builds and trains: test_main.py."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import build_evaluator, build_model, build_schedule, build_segmenter, build_training_data
from bundle import load_bundle
from config import Config
from engine.distributed import Process
from loading.augmentation import AugmentWord, RandAugmentWord
from loading.transforms import ResizeWord
from modules.ssn import SSN
from tests import small_networks
from utils import UserError

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


def test_training_and_test_roots_and_two_files_of_a_run_render_no_word_twice(tmp_path):
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text("length: 50\nbackground: plain\nletters: {height_spread: 0.0}\n")
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.train.roots = [f"render://{tmp_path / name}" for name in ("one.yaml", "two.yaml")]
    config.dataset.test.roots = config.dataset.train.roots[:1]
    parts = {"device": torch.device("cpu"), "process": Process()}
    training = build_training_data(config, **parts).dataset.datasets
    tested = build_evaluator(config, model_eval="vision", **parts).loaders["one"].dataset
    words = [
        {(word.text, word.image.tobytes()) for word in map(each.__getitem__, range(50))} for each in (*training, tested)
    ]
    assert [len(each) for each in words] == [50, 50, 50]
    assert not words[0] & words[1]
    assert not (words[0] | words[1]) & words[2]


def test_difficulty_is_of_training_words_and_changes_over_the_run(tmp_path):
    (tmp_path / "render.yaml").write_text("length: 8\n")
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.train.roots = config.dataset.test.roots = [f"render://{tmp_path / 'render.yaml'}"]
    config.dataset.train.difficulty = [0.1, 0.9]
    config.dataset.train.batch_size, config.training.epochs = 4, 3  # 6 batches
    parts = {"device": torch.device("cpu"), "process": Process()}
    loader = build_training_data(config, **parts)
    source, drawn = loader.dataset.datasets[0].source, []
    word = source.renderer.render(0, 0)
    source.renderer.render = lambda *_, difficulty: drawn.append(difficulty) or word
    assert len(list(itertools.islice(loader, 6))) == 6
    assert drawn == pytest.approx(np.repeat(0.1 + 0.8 * np.arange(6) / 6, 4))
    assert build_evaluator(config, model_eval="vision", **parts).loaders["render"].dataset.source.difficulty is None


def test_a_mixture_goes_on_exactly_whatever_the_workers(tmp_path):
    """Rendered words that get harder and words of a file, augmented: the second half is the whole's second half."""
    small_networks.write_words(tmp_path / "words", 7)
    (tmp_path / "render.yaml").write_text("length: 5\nbackground: plain\n")
    config = small_networks.small_config("abinet", data_aug="rand")
    config.dataset.train.roots = [f"render://{tmp_path / 'render.yaml'}", str(tmp_path / "words")]
    config.dataset.train.shares, config.dataset.train.difficulty = [[0.9, 0.2], [0.1, 0.8]], [0.1, 0.7]
    config.dataset.train.batch_size, config.dataset.train.length, config.training.epochs = 6, 12, 4

    def batches(epoch, batch, count, workers):
        config.dataset.num_workers = workers
        loader = build_training_data(config, device=torch.device("cpu"), process=Process())
        loader.batch_sampler.set_position(epoch, batch)
        return list(itertools.islice(loader, count))

    whole = batches(0, 0, 8, 0)
    for one, other in zip(whole[3:], batches(1, 1, 5, 2), strict=True):
        assert one.texts == other.texts
        assert torch.equal(one.images, other.images)
    assert len({image.numpy().tobytes() for batch in whole for image in batch.images}) == sum(map(len, whole))


@pytest.mark.parametrize(
    ("augmentation", "kind"), [(True, AugmentWord), ("rand", RandAugmentWord), (False, ResizeWord)]
)
def test_training_words_are_augmented_as_asked_for(tmp_path, augmentation, kind):
    small_networks.write_words(tmp_path / "words", 3)
    config = small_networks.small_config("abinet", data_aug=augmentation, multiscales=True)
    config.dataset.train.roots = [str(tmp_path / "words")]
    words = build_training_data(config, device=torch.device("cpu"), process=Process()).dataset.datasets[0]
    assert type(words.transform) is kind
    resize = getattr(words.transform, "resize", words.transform)
    assert (resize.fit, resize.random_aspect, words.min_side) == ("centre", True, 7)
    with pytest.raises(UserError, match="data_aug: must be true, false or rand"):
        small_networks.small_config("abinet", data_aug="much")


def test_roots_have_their_shares_of_every_batch(tmp_path):
    """A folder of two LMDBs is one root: one share, one order."""
    for name, words in (("one/a", 3), ("one/b", 5), ("two", 4)):
        small_networks.write_words(tmp_path / name, words)
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.train.roots = [str(tmp_path / "one"), str(tmp_path / "two")]
    config.dataset.train.shares = [[3, 0], [1, 4]]
    config.dataset.train.batch_size = config.dataset.train.length = 4
    config.training.epochs = 4
    batches = itertools.islice(build_training_data(config, device=torch.device("cpu"), process=Process()), 5)
    counts = [int((batch.indices < 8).sum()) for batch in batches]
    assert [len(counts), counts[-1]] == [5, 0]
    assert sum(counts[:4]) in (7, 8)  # 3, 2.25, 1.5, 0.75


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


@pytest.mark.parametrize(
    ("charset", "case_sensitive", "warned"), [(94, False, True), (94, True, False), (36, False, False)]
)
def test_a_charset_whose_upper_case_is_never_taught_is_told(tmp_path, caplog, charset, case_sensitive, warned):
    small_networks.write_words(tmp_path / "words", 3)
    path = str(Path(__file__).resolve().parents[1] / "data" / f"charset_{charset}.txt")
    config = small_networks.small_config("abinet", charset_path=path, case_sensitive=case_sensitive)
    config.dataset.train.roots = [str(tmp_path / "words")]
    build_training_data(config, device=torch.device("cpu"), process=Process())
    assert ("dataset.case_sensitive=true" in caplog.text) == warned
