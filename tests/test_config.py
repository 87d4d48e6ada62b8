"""Config: published YAMLs load, every mistake is named at once, and the template and the recipes follow the schema."""

import copy
import logging
from pathlib import Path

import pytest
import yaml

from config import Config, load_config, save_config, template
from settings import is_section, walk_schema
from utils import UserError
from yaml_io import read_yaml

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.endswith("render"))
RECIPES = [path for path in CONFIGS if path.stem not in ("template", "small_real_words", "small_narrow")]

PUBLISHED = """
global:
  name: train-abinet
  phase: train
  stage: train-super
  workdir: workdir
  seed: ~
dataset:
  train: {
    roots: ['data/training/MJ/MJ_train/', 'data/training/ST'],
    batch_size: 384
  }
  test: {
    roots: ['data/evaluation/IIIT5k_3000', 'data/evaluation/SVT'],
    batch_size: 384
  }
  data_aug: True
  multiscales: False
  num_workers: 14
  one_hot_y: True
training:
  epochs: 10
  show_iters: 50
  eval_iters: 3000
  save_iters: 3000
  stats_iters: 100000
optimizer:
  type: Adam
  true_wd: False
  wd: 0.0
  bn_wd: False
  clip_grad: 20
  lr: 0.0001
  args: {
    betas: !!python/tuple [0.9, 0.999], # for default Adam
  }
  scheduler: {
    periods: [6, 4],
    gamma: 0.1,
  }
model:
  name: 'modules.model_abinet_iter.ABINetIterModel'
  iter_size: 3
  ensemble: ''
  use_vision: False
  vision: {
    checkpoint: workdir/pretrain-vision-model/best-pretrain-vision-model.pth,
    loss_weight: 1.,
    attention: 'position',
    backbone: 'transformer',
    backbone_ln: 3,
  }
  language: {
    checkpoint: workdir/pretrain-language-model/pretrain-language-model.pth,
    num_layers: 4,
    loss_weight: 1.,
    detach: True,
    use_self_attn: False
  }
  alignment: {
    loss_weight: 1.,
  }
"""


@pytest.fixture
def write(tmp_path):
    def write_yaml(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_yaml


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    lines = str(error.value).split("\n")
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


# Values


def test_published_yaml_loads_and_dead_keys_are_named_once(write, caplog):
    with caplog.at_level(logging.WARNING):
        config = load_config(write(PUBLISHED))
    assert config.model.kind == "recogniser"
    assert config.optimizer.args.betas == [0.9, 0.999]
    assert not config.model.takes_masks
    for dead in ("dataset.one_hot_y", "training.stats_iters", "model.ensemble", "model.use_vision"):
        assert sum(dead in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("published", "name", "kind"),
    [
        ("modules.model_vision.BaseVision", "vision", "vision"),
        ("modules.model_language.BCNLanguage", "language", "language"),
        ("modules.model_abinet_iter.ABINetIterModel", "abinet", "recogniser"),
        ("modules.model_binet_iter.BINetIterModel", "binet", "recogniser"),
        ("modules.ssn.SSN", "ssn", "ssn"),
    ],
)
def test_published_names_mean_ours(write, published, name, kind):
    config = load_config(write(f"model: {{name: {published}}}"))
    assert config.model.name == name
    assert config.model.kind == kind
    assert config == load_config(write(f"model: {{name: {name}}}"))
    assert config.dataset.masks.source == ("lmdb" if name in ("vision", "binet") else "none")


def test_abinet_defaults_yield_to_what_is_given(write):
    vision = load_config(write("model: {name: abinet}")).model.vision
    assert (vision.attention, vision.positional_encoding, vision.segmentation.enabled) == ("position", True, False)
    given = "attention: attention, positional_encoding: false, segmentation: {enabled: true}"
    config = load_config(write(f"model: {{name: abinet, vision: {{{given}}}}}"))
    vision = config.model.vision
    assert (vision.attention, vision.positional_encoding, vision.segmentation.enabled) == ("attention", False, True)
    assert config.dataset.masks.source == "lmdb"
    config = load_config(write("model: {name: abinet, vision: }"), ["model.vision.attention=attention"])
    assert (config.model.vision.attention, config.model.vision.positional_encoding) == ("attention", True)


def test_later_files_override_earlier_ones(tmp_path):
    """Sections are merged, lists and values replaced, and a mistake is named with the files."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("dataset: {test: {roots: [a, b], batch_size: 3}, valid: {roots: c}}\ntraining: {epochs: 2}\n")
    second.write_text("dataset:\n  test: {roots: [d]}\n  valid: {roots: []}\ntraining:\nmodel: {name: abinet}\n")
    config = load_config([first, second], ["training.show_iters=1"])
    assert (config.dataset.test.roots, config.dataset.test.batch_size) == (["d"], 3)
    assert (config.dataset.valid.roots, config.model.name) == ([], "abinet")
    assert (config.training.epochs, config.training.show_iters) == (2, 1)
    assert load_config([second, first]).dataset.test.roots == ["a", "b"]

    second.write_text("training:\n  epoch: 1\nmodel: {vision: {nhead: 7}}\ndataset: {test: {batch_size: 0}}\n")
    with pytest.raises(UserError) as error:
        load_config([first, second])
    assert f"{first} + {second}: training.epoch: unknown key" in str(error.value)
    assert f"{second}: dataset.test.batch_size: must be" in str(error.value)
    first.write_text("a: &a {a: *a}")
    second.write_text("a: &a {a: *a}")
    with pytest.raises(UserError, match=r"second\.yaml: nested too deeply"):
        load_config([first, second])


def test_overrides_take_yaml_values(write):
    path = write("model: {vision: {checkpoint: x.pth}}\ndataset: {train: &data {batch_size: 2}, test: *data}")
    overrides = ["model.vision.checkpoint=null", "dataset.train.roots=[a, b=c]", "optimizer.lr=1e-3"]
    overrides += [
        "dataset.masks.root=m",
        "dataset.train.batch_size=8",
        "optimizer.args.betas=!!python/tuple [0.8, 0.9]",
    ]
    config = load_config(path, [*overrides, "optimizer.lr=2e-3"])
    assert config.model.vision.checkpoint is None
    assert config.dataset.train.roots == ["a", "b=c"]
    assert config.optimizer.lr == 2e-3
    assert (config.dataset.train.batch_size, config.dataset.test.batch_size) == (8, 2)
    assert config.optimizer.args.betas == [0.8, 0.9]


def test_forgiving_forms(write):
    config = load_config(
        write("training:\ndataset: {train: {roots: one}}\noptimizer: {lr: [1, 1], clip_grad: 5}\nmodel: {name: abinet}")
    )
    assert config.training == Config().training
    assert config.dataset.train.roots == ["one"]
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (1.0, 5.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_saved_config_is_read_back_equal(tmp_path, path):
    config = load_config(path, ["global.name='1e-4'"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert Config.from_dict(config.to_dict()) == config


def test_shares_are_numbers_or_pairs_one_for_each_root(tmp_path):
    roots = ["dataset.train.roots=[a, b]", "dataset.masks.root=m"]
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    shares = load_config(path, [*roots, "dataset.train.shares=[0.5, [1, 0]]"]).dataset.train.shares
    assert shares == [[0.5, 0.5], [1, 0]]
    for wrong, message in (
        ("[1]", "1 shares for 2 roots"),
        ("[[0, 1], [0, 1]]", "all are 0 at the start"),
        ("[1, -1]", "shares"),
        ("[1, [1, 2, 3]]", "shares"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, [*roots, f"dataset.train.shares={wrong}"])
    assert load_config(path, ["global.phase=test", "dataset.train.shares=[1]"]).dataset.train.shares == [[1, 1]]


def test_difficulty_is_of_rendered_roots(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{dataset: {masks: {root: m}}}")
    roots = "dataset.train.roots=[a, render://b.yaml]"
    assert load_config(path, [roots, "dataset.train.difficulty=0.3"]).dataset.train.difficulty == [0.3, 0.3]
    assert load_config(path, [roots, "dataset.train.difficulty=[0, 1]"]).dataset.train.difficulty == [0, 1]
    for override, message in (
        ("dataset.train.difficulty=[0, 2]", "less than or equal to 1"),
        ("dataset.train.roots=[a]", "no root is render://"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, [roots, "dataset.train.difficulty=0.3", override])


def test_older_checkpoints_keep_the_fit_that_they_were_trained_with():
    """`multiscales` of a resolved config without `align_left` is what `align_left` is now."""
    older = Config.from_dict({"dataset": {"multiscales": True}}).to_dict()
    del older["dataset"]["align_left"]
    dataset = Config.from_dict(older).dataset
    assert (dataset.multiscales, dataset.align_left, dataset.fit) == (False, True, "left")
    assert older["dataset"]["multiscales"] is True
    assert Config.from_dict({"dataset": {"multiscales": True}}).dataset.fit == "centre"
    with pytest.raises(UserError, match="align_left"):
        Config.from_dict({"dataset": {"multiscales": True, "align_left": True}})


def test_from_dict_leaves_its_argument_and_names_its_source():
    mapping = {"optimizer": {"args": {"betas": [0.5, 0.6]}}, "model": {"ensemble": "", "name": "ssn"}}
    before = copy.deepcopy(mapping)
    assert Config.from_dict(mapping).optimizer.args.betas == [0.5, 0.6]
    assert mapping == before
    with pytest.raises(UserError, match=r"^weights\.pth: training\.epoch: unknown key"):
        Config.from_dict({"training": {"epoch": 1}}, source="weights.pth")


def test_keys_that_have_gone_are_named_in_a_yaml_and_dropped_silently_from_a_checkpoint(write, caplog):
    gone = {"dataset": {"cache_index": True}, "training": {"max_skipped_steps": 10, "log_images": 8}}
    gone["optimizer"] = {"head_lr_factor": 10}
    config = Config.from_dict(gone, drop_unknown=True)
    assert not caplog.records
    path = write(yaml.safe_dump(gone))
    assert load_config(path) == config
    for section, keys in gone.items():
        for key in keys:
            assert sum(f"{section}.{key}: " in message for message in caplog.messages) == 1
    assert f"{path}: optimizer.head_lr_factor: " in caplog.text


def test_a_seed_is_a_number_and_the_published_null_is_0(write):
    assert load_config(write("global: {seed: ~}")) == load_config(write("global: {}"))
    assert Config().run.seed == 0
    assert load_config(write("{}"), ["global.seed=null"]).run.seed == 0


def test_keys_of_a_checkpoint_that_have_gone_are_dropped_and_named(caplog):
    mapping = Config().to_dict()
    mapping["training"]["gone"] = 1
    mapping["model"]["vision"]["segmentation"]["old"] = {"a": 2}
    mapping["extra"] = {"b": 3}
    before = copy.deepcopy(mapping)
    assert Config.from_dict(mapping, "w.pth (config)", drop_unknown=True) == Config()
    assert mapping == before
    for key in ("training.gone", "model.vision.segmentation.old", "extra"):
        assert f"w.pth (config): {key}: nothing reads this key any more; ignored" in caplog.messages
    mapping["training"]["epochs"] = "ten"
    with pytest.raises(UserError, match=r"^w\.pth: training\.epochs"):
        Config.from_dict(mapping, "w.pth", drop_unknown=True)


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: ten}", "training.epochs: must be a valid integer, not 'ten'"),
        ("training: {epochs: true}", "training.epochs: must be a valid integer, not True"),
        ("training: {epochs: 1.5}", "training.epochs: must be a valid integer, not 1.5"),
        ("training: {epochs: 0}", "training.epochs: must be greater than or equal to 1, not 0"),
        ("training: {compile: 1}", "training.compile: must be a valid boolean, not 1"),
        ("training: {precision: fp8}", "training.precision: must be fp32, bf16 or fp16, not 'fp8'"),
        (
            "model: {vision: {strides: [2, 1, 3, 1, 1]}}",
            "model.vision.strides[2]: must be 1, 2 or [rows, columns] of these, not 3",
        ),
        ("training: 3", "training: must be a section of `key: value` lines, not 3"),
        ("training: {eval_iters: 0}", "training.eval_iters: must be a whole number from 1 on, or epoch, not 0"),
        ("training: {save_iters: day}", "training.save_iters: must be a whole number from 1 on, or epoch, not 'day'"),
        ("optimizer: {lr_groups: {vision: 0}}", "optimizer.lr_groups.vision: must be greater than 0, not 0"),
        ("optimizer: {scheduler: {type: cos}}", "optimizer.scheduler.type: must be step, poly, one_cycle or cosine"),
        ("dataset: {valid: {root: a}}", "dataset.valid.root: unknown key; nearest known key: dataset.valid.roots"),
        ("optimizer: {lr: true}", "optimizer.lr: must be a valid number, not True"),
        ("optimizer: {lr: .nan}", "optimizer.lr: must be a finite number, not nan"),
        ("optimizer: {lr: [1, 2]}", "optimizer.lr: must be a valid number, not [1, 2]"),
        ("global: {name: a/b}", "global.name: "),
        ("model: {name: [1]}", "model.name: must be "),
        ("dataset: {train: {roots: [a, 1]}}", "dataset.train.roots[1]: must be a valid string, not 1"),
        ("trainning: {epochs: 1}", "trainning: unknown key; nearest known key: training"),
        ("training: {epoch: 1}", "training.epoch: unknown key; nearest known key: training.epochs"),
        ("model: {precision: fp32}", "model.precision: unknown key; nearest known key: training.precision"),
        ("1: 2", "[1]: "),
    ],
)
def test_one_mistake_is_one_line_with_file_and_key(write, text, message):
    path = write(text)
    [line] = problems(path)
    assert line.startswith(f"{path}: {message}")


def test_all_mistakes_at_once(write):
    path = write("training:\n  epochs: ten\n  epoch: 1\nfoo: 1\nmodel: {vision: {nhead: -1}}\n")
    lines = problems(path, "training.show_iters=x", "training.show_iter=1", "nonsense", "optimizer.lr=[")
    assert len(lines) == 8
    assert sum(line.startswith("override ") for line in lines) == 4
    assert "override training.show_iters=x: must be a valid integer, not 'x'" in lines
    assert "override training.show_iter=1: unknown key; nearest known key: training.show_iters" in lines
    assert any(line.startswith("override nonsense: not of the form key=value") for line in lines)
    assert any(line.startswith(f"{path}: foo: unknown key") for line in lines)


def test_override_cannot_run_code(write):
    [line] = problems(write("training: {}"), "global.name=!!python/object/apply:os.getcwd []")
    assert "refused" in line


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("model: {vision: {d_model: 256}}", "model.vision.d_model", "must equal the last of model.vision.widths, 512"),
        ("model: {vision: {nhead: 7}}", "model.vision.nhead", "does not divide"),
        ("model: {language: {nhead: 7}}", "model.language.nhead", "does not divide"),
        ("model: {language: {d_model: 256}}", "model.language.d_model", "must equal model.vision.d_model 512"),
        ("model: {alignment: {d_model: 256}}", "model.alignment.d_model", "must equal model.vision.d_model 512"),
        ("dataset: {image_width: 130}", "dataset.image_width", "not a multiple of 4"),
        ("model: {vision: {strides: [2, 1, 2, 1, 2]}}", "model.vision.strides", "the mask branch needs 1"),
        (
            "{dataset: {image_height: 36}, model: {vision: {strides: [2, 2, [2, 1], 1, 1]}}}",
            "dataset.image_height",
            "not a multiple of 8",
        ),
        (
            "model: {name: vision, vision: {freeze: true}}",
            "model.vision.freeze",
            "no part that is trained has a loss",
        ),
        ("dataset: {train: {roots: [a]}}", "dataset.masks.root", "tools/create_masks.py"),
        ("dataset: {train: {roots: [a]}, masks: {source: online}}", "model.ssn.checkpoint", "weights"),
        (
            "model: {vision: {freeze: true}, language: {freeze: true}, alignment: {loss_weight: 0}}",
            "model.vision.freeze",
            "no part that is trained has a loss",
        ),
        ("dataset: {segmentation: {scale_range: [2, 1]}}", "dataset.segmentation.scale_range", "larger"),
    ],
)
def test_keys_that_do_not_fit_together(write, text, key, message):
    matching = [line for line in problems(write(text)) if f" {key}: " in line]
    assert len(matching) == 1
    assert message in matching[0]


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: binet}",
        "model: {vision: {freeze: true}, language: {freeze: true}}",
        "{global: {phase: test}, model: {name: vision, vision: {freeze: true}}}",
        "dataset: {train: {roots: ['render://configs/render.yaml']}}",
        "{global: {phase: test}, dataset: {train: {roots: [a]}}}",
        "{dataset: {train: {roots: [a]}}, model: {vision: {segmentation: {enabled: false}}}}",
        "{dataset: {train: {roots: [a]}}, model: {name: language, language: {d_model: 64}}}",
        "{dataset: {train: {roots: [a]}, masks: {source: none}}}",
    ],
)
def test_masks_and_widths_are_asked_for_only_where_needed(write, text):
    load_config(write(text))


# Schema, template and recipes


def test_template_names_every_key_with_its_default_and_a_comment():
    text = (FOLDER / "template.yaml").read_text()
    assert text == template(), "print it anew: python config.py > configs/template.yaml"
    document = read_yaml(FOLDER / "template.yaml")
    values = [dotted for dotted, field in walk_schema(Config) if not is_section(field) and field.default != {}]
    assert [".".join(names) for names in leaves(document)] == values
    assert Config.from_dict(document) == Config()
    assert all("#" in line for line in text.splitlines() if line)


def leaves(data: dict, prefix: tuple[str, ...] = ()):
    for name, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_open_with_their_command_and_hold_only_what_differs(path):
    document = read_yaml(path)
    opening = path.read_text().split("global:")[0]
    assert f"python main.py --config=configs/{path.name}" in opening
    config = load_config(path)
    said_for_the_reader = {("global", "stage"), ("model", "name"), ("training", "epochs")}
    for names in set(leaves(document)) - said_for_the_reader:
        data = copy.deepcopy(document)
        section = data
        for name in names[:-1]:
            section = section[name]
        del section[names[-1]]
        try:
            without = Config.from_dict(data)
        except UserError:
            continue
        assert without != config, f"{'.'.join(names)} repeats the default"


def test_the_real_words_go_after_another_small_config():
    words = FOLDER / "small_real_words.yaml"
    assert f"--config=configs/{words.name}" in words.read_text().split("dataset:")[0]
    for name in ("small", "small_abinet", "small_pretrain_vision"):
        dataset = load_config([FOLDER / f"{name}.yaml", words]).dataset
        assert len(dataset.train.roots) == len(dataset.train.shares)
        assert [sum(shares) for shares in zip(*dataset.train.shares, strict=True)] == pytest.approx([1, 1])
        assert dataset.data_aug is True


def test_the_narrow_network_goes_after_another_small_config():
    for name in ("small", "small_abinet", "small_pretrain_vision", "small_pretrain_language"):
        model = load_config([FOLDER / f"{name}.yaml", FOLDER / "small_narrow.yaml"]).model
        parts = (model.vision, model.language, model.alignment)
        assert [part.d_model for part in parts] == [128] * 3
        assert model.vision.segmentation == load_config(FOLDER / f"{name}.yaml").model.vision.segmentation


def test_recipes_as_published():
    train = load_config(FOLDER / "train.yaml")
    assert (train.model.vision.attention, train.model.iter_size, train.training.epochs) == ("attention", 3, 10)
    ssn = load_config(FOLDER / "train_ssn.yaml")
    optimizer = ssn.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.wd, optimizer.lr_groups) == ("SGD", 0.01, 5e-4, {"semrfnhead": 10})
    assert (ssn.training.iterations, ssn.optimizer.scheduler.type) == (20500, "poly")
    assert ssn.model.ssn.widths == [48, 96, 192, 384]
    language = load_config(FOLDER / "pretrain_language_model.yaml")
    assert (language.dataset.train.batch_size, language.training.epochs) == (4096, 80)


def test_small_recipes_fit_each_other():
    small, alone = load_config(FOLDER / "small.yaml").model, load_config(FOLDER / "small_pretrain_vision.yaml").model
    assert alone.vision == small.vision
    assert load_config(FOLDER / "small_pretrain_language.yaml").model.language == small.language
    abinet = load_config(FOLDER / "small_abinet.yaml")
    assert abinet.model.language == small.language
    assert abinet.model.vision.widths == small.vision.widths
    assert load_config(FOLDER / "small.yaml").optimizer == abinet.optimizer


def test_graphs_of_a_step_and_parts_of_a_batch_exclude_each_other():
    overrides = ["training.compile_mode=reduce-overhead", "training.accumulation=2"]
    load_config(FOLDER / "small.yaml", overrides)
    with pytest.raises(UserError, match=r"training\.compile_mode=reduce-overhead.*needs training\.accumulation=1"):
        load_config(FOLDER / "small.yaml", [*overrides, "training.compile=true"])


def test_a_message_names_no_more_problems_than_can_be_read(tmp_path):
    (tmp_path / "a.yaml").write_text("dataset:\n  train:\n    roots: [" + "1, " * 500 + "1]\n")
    with pytest.raises(UserError, match="501 problems") as caught:
        load_config(tmp_path / "a.yaml")
    assert len(str(caught.value).splitlines()) == 32
    assert str(caught.value).endswith("and 471 more: fix these first")


@pytest.mark.parametrize("override", ["training.epochs=a\nb", "training.epoch=\n1", "a\nb", "training.epochs=[\n"])
def test_an_override_of_several_lines_is_named_in_one(override):
    with pytest.raises(UserError) as caught:
        load_config("configs/small.yaml", [override])
    assert "\n" not in str(caught.value)


def test_a_config_that_holds_itself_is_refused():
    mapping = {"model": {}}
    mapping["model"]["vision"] = mapping
    with pytest.raises(UserError, match=r"weights\.pth: model\.vision\.model: unknown key"):
        Config.from_dict(mapping, source="weights.pth")


def test_a_list_of_the_wrong_length_is_named_once():
    with pytest.raises(UserError) as caught:
        load_config("configs/small.yaml", ["model.vision.widths=[1, 2]"])
    assert str(caught.value) == "override model.vision.widths=[1, 2]: must have at least 5 items, not [1, 2]"
