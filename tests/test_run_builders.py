"""run_builders.py: the data, evaluators and callbacks that a config describes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks import Checkpoints, Evaluation
from engine.distributed import Process
from loading.augmentation import AugmentWord, RandAugmentWord
from loading.charset import PROTOCOLS
from loading.transforms import ResizeWord
from run_builders import build_callbacks, build_evaluator, build_trainer, build_training_data
from schema import MasksConfig
from tests import small_networks
from utils import UserError


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
    source, drawn = loader.dataset.datasets[0], []
    word = source.renderer.render(0, 0)
    source.renderer.render = lambda *_, difficulty: drawn.append(difficulty) or word
    assert len(list(itertools.islice(loader, 6))) == 6
    assert drawn == pytest.approx(np.repeat(0.1 + 0.8 * np.arange(6) / 6, 4))
    assert build_evaluator(config, model_eval="vision", **parts).loaders["render"].dataset.difficulty is None


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


@pytest.mark.parametrize(
    ("charset", "case_sensitive", "warned"),
    [(94, False, True), (94, True, False), (36, False, False), ("plates", False, False)],
)
def test_a_charset_whose_upper_case_is_never_taught_is_told(tmp_path, caplog, charset, case_sensitive, warned):
    small_networks.write_words(tmp_path / "words", 3)
    path = Path(__file__).resolve().parents[1] / "data" / f"charset_{charset}.txt"
    if charset == "plates":
        path = tmp_path / "plates.txt"
        path.write_text("".join(f"{place}\t{each}\n" for place, each in enumerate(PROTOCOLS[36].upper())))
    config = small_networks.small_config("abinet", charset_path=str(path), case_sensitive=case_sensitive)
    config.dataset.train.roots = [str(tmp_path / "words")]
    build_training_data(config, device=torch.device("cpu"), process=Process())
    assert ("dataset.case_sensitive=true" in caplog.text) == warned


def test_validation_words_of_a_renderer_are_those_of_neither_training_nor_test(tmp_path):
    (tmp_path / "words.yaml").write_text("length: 30\nbackground: plain\n")
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.valid.roots = config.dataset.test.roots = [f"render://{tmp_path / 'words.yaml'}"]
    parts = {"device": torch.device("cpu"), "process": Process(), "model_eval": "vision"}
    words = [
        {(word.text, word.image.tobytes()) for word in map(dataset.__getitem__, range(30))}
        for dataset in (
            build_evaluator(config, split=each, **parts).loaders["words"].dataset for each in ("valid", "test")
        )
    ]
    assert [len(each) for each in words] == [30, 30]
    assert not words[0] & words[1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, r"^dataset\.masks\.root: missing.*tools/create_masks\.py.*segmentation\.enabled=false"),
        ({"source": "online"}, r"^model\.ssn\.checkpoint: missing; name the weights"),
        ({"source": "none"}, r"^dataset\.masks\.source: none, but the network takes masks"),
    ],
)
def test_missing_masks_are_named_before_any_data_is_opened(masks, message):
    config = small_networks.small_config("binet")
    config.dataset.masks = MasksConfig(**masks)
    config.dataset.train.roots = ["no-such-folder"]
    with pytest.raises(UserError, match=message):
        build_training_data(config, device=torch.device("cpu"), process=Process())


def test_rendered_test_words_bring_their_masks_whatever_the_training_words(tmp_path):
    (tmp_path / "words.yaml").write_text("length: 2\nbackground: plain\n")
    config = small_networks.small_config("binet")
    config.run.phase = "test"
    config.dataset.train.roots = ["no-such-folder"]
    config.dataset.test.roots = [f"render://{tmp_path / 'words.yaml'}"]
    evaluator = build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="vision")
    assert evaluator.loaders["words"].dataset[0].mask.any()


def test_masks_of_test_words_are_missing_though_training_words_are_rendered(tmp_path, monkeypatch):
    """They were looked for in the current folder."""
    images = small_networks.write_words(tmp_path / "words", 2)
    small_networks.write_masks(tmp_path / "current" / "words", tmp_path / "words", images)
    monkeypatch.chdir(tmp_path / "current")
    config = small_networks.small_config("binet")
    config.dataset.train.roots, config.dataset.test.roots = ["render://render.yaml"], [str(tmp_path / "words")]
    with pytest.raises(UserError, match=r"^dataset\.masks\.root: missing"):
        build_evaluator(config, device=torch.device("cpu"), process=Process(), model_eval="vision")


def test_an_interval_of_an_epoch_has_its_batches(tmp_path):
    small_networks.write_words(tmp_path / "words", 10)
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.train.roots = config.dataset.valid.roots = [str(tmp_path / "words")]
    config.dataset.train.batch_size = 4
    parts = {"device": torch.device("cpu"), "process": Process()}
    data = build_training_data(config, **parts)
    config.training.eval_iters, config.training.save_iters = "epoch", 5
    callbacks = {type(each): each for each in build_callbacks(config, data=data, **parts)}
    assert len(data.batch_sampler) in (2, 3)
    assert (callbacks[Evaluation].interval, callbacks[Checkpoints].interval) == (len(data.batch_sampler), 5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_keeps_weights_images_and_momenta_channels_last(tmp_path, precision):
    """Without this the mask refinement's 1x1 convolutions take ten times as long on a CPU for batches of 16 or more."""
    small_networks.write_words(tmp_path / "words", 4)
    config = small_networks.small_config("abinet", data_aug=False)
    config.dataset.train.roots, config.dataset.train.batch_size = [str(tmp_path / "words")], 4
    config.training.precision, config.training.iterations = precision, 1
    config.run.workdir = str(tmp_path)
    trainer = build_trainer(config, device=torch.device("cpu"), process=Process())
    convolution, images = trainer.model.vision.backbone.resnet.layer1[0].conv2, []
    convolution.register_forward_pre_hook(lambda _, arguments: images.append(arguments[0]))
    trainer.train_step(next(iter(trainer.data)))
    momentum = trainer.optimizer.state[convolution.weight]["exp_avg"]
    for tensor in (*images, convolution.weight, momentum):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
