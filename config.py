"""The config of a run: reading it, checks across keys, what a resumed run keeps, the template.

`load_config(path, overrides=["training.epochs=1"])` returns a `Config` whose every value is known, typed and in range,
or raises one `UserError` that lists everything that is wrong. Keys and defaults are in `schema.py`.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from schema import DatasetConfig, GlobalConfig, ModelConfig, OptimizerConfig, TrainingConfig
from settings import Section, is_section, load_settings, validate_settings, walk_schema
from utils import RENDER_SCHEME, UserError
from yaml_io import dump_yaml

# Keys of published YAMLs and older versions that nothing reads any more; a YAML that has one gets a warning by name.
GONE_KEYS = (
    "dataset.one_hot_y",
    "dataset.cache_index",
    "dataset.masks.cache",
    "dataset.segmentation.ignore_index",
    "training.stats_iters",
    "training.max_skipped_steps",
    "training.log_images",
    "model.ensemble",
    "optimizer.head_lr_factor",
    "model.use_vision",
    "model.ssn.loss_weights",
)

# Keys of `model` that do not change what the network computes from an input; `areas` are those of masks.
OF_TRAINING = {"areas", "checkpoint", "detach", "dropout", "freeze", "loss_weight", "threshold"}


class Config(Section):
    """A whole config: the YAML's sections as attributes (`global` is `run`, as Python reserves the word)."""

    run: GlobalConfig = Field(default_factory=GlobalConfig, alias="global")
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)

    @model_validator(mode="after")
    def _no_masks_by_default_without_segmentation(self) -> "Config":
        if "source" not in self.dataset.masks.model_fields_set and not self.model.takes_masks:
            self.dataset.masks.source = "none"
        return self

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "config", *, drop_unknown: bool = False) -> "Config":
        """Return the config that plain data describe, such as a checkpoint's; `source` names them in messages.

        Args:
            drop_unknown: leave out keys that the schema does not have, and name those that it never had: a checkpoint
                stays usable when a key goes.

        Raises:
            UserError: with one line for each thing that is wrong.
        """
        return validate_settings(cls, _migrated(mapping), source, gone=GONE_KEYS, drop_unknown=drop_unknown)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (dotted key, what is wrong) for keys that do not fit together, in the parts that the network has."""
        model, vision, language = self.model, self.model.vision, self.model.language
        if model.kind in ("vision", "recogniser"):
            yield from _vision_problems(self)
        if model.kind in ("language", "recogniser") and language.d_model % language.nhead:
            yield "model.language.nhead", f"{language.nhead} does not divide model.language.d_model {language.d_model}"
        if model.kind == "recogniser":
            for name, d_model in (("language", language.d_model), ("alignment", model.alignment.d_model)):
                if d_model != vision.d_model:
                    yield f"model.{name}.d_model", f"{d_model} must equal model.vision.d_model {vision.d_model}"
        smallest, largest = self.dataset.segmentation.scale_range
        if smallest > largest:
            yield "dataset.segmentation.scale_range", f"{smallest} is larger than {largest}; give [smallest, largest]"
        if self.dataset.multiscales and self.dataset.align_left:
            yield "dataset.align_left", "true, and so is dataset.multiscales, which centres; set one of them"
        if self.run.phase == "train":
            yield from _training_problems(self)

    @property
    def work_folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.run.workdir) / self.run.name

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (dicts, lists, numbers, strings, None) that `from_dict` reads back equal."""
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        """Return the resolved config as YAML that `load_config` reads back equal."""
        return dump_yaml(self.to_dict(), width=120)


def _migrated(mapping: dict[str, Any]) -> dict[str, Any]:
    """Translate configs of checkpoints older than `align_left`, whose `multiscales` means what that key means now."""
    dataset = mapping.get("dataset")
    if isinstance(dataset, dict) and "cache_dir" in dataset and "align_left" not in dataset:  # resolved, and older
        align_left = dataset.get("multiscales", False)
        return mapping | {"dataset": dataset | {"multiscales": False, "align_left": align_left}}
    return mapping


# --- loading ----------------------------------------------------------------------------------------------------------


def load_config(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read one or several YAML files, later ones over earlier ones, and apply `key=value` overrides (YAML values).

    Sections of several files are merged; lists and values are replaced.

    Raises:
        UserError: a file cannot be read, or any key or value of files or overrides is wrong; one line for each.
    """
    return load_settings(Config, [path] if isinstance(path, str | Path) else path, overrides, gone=GONE_KEYS)


def continued(config: Config, before: Mapping[str, Any] | None) -> Config:
    """Return the config of a run that is resumed: it keeps the names of the weights that the run started from.

    Args:
        before: the config in the run's checkpoint, as plain data; None: it has none.

    Raises:
        UserError: a key has changed that must stay the same within a run.
    """
    config = config.model_copy(deep=True)
    if before is None:
        return config
    then = Config.from_dict(before, "the run to resume", drop_unknown=True)
    train, before_train = config.dataset.train, then.dataset.train
    changed = [
        ("global.seed", then.run.seed, config.run.seed),
        ("dataset.train.batch_size", before_train.batch_size, train.batch_size),
        ("model.name", then.model.name, config.model.name),
        *differing(function_keys(config), then.to_dict()["model"], "model"),
    ]
    if [Path(root).name for root in before_train.roots] != [Path(root).name for root in train.roots]:
        changed.append(("dataset.train.roots", before_train.roots, train.roots))  # else they are elsewhere at most
    if changed := [f"{key}: the run to resume has {old}, not {new}" for key, old, new in changed if old != new]:
        raise UserError(
            f"{'; '.join(changed)}; set back what has changed, or start a new run from its weights with --checkpoint"
        )
    pairs = {"model": (then.model, config.model)}
    parts = ("vision", "language", "ssn") if config.model.kind == "ssn" else ("vision", "language")
    pairs |= {f"model.{part}": (getattr(then.model, part), getattr(config.model, part)) for part in parts}
    for name, (old, new) in pairs.items():
        if new.checkpoint not in (None, old.checkpoint):
            raise UserError(
                f"{name}.checkpoint: the run to resume started from {old.checkpoint}, not {new.checkpoint}, and goes "
                f"on with its own weights; leave it out ({name}.checkpoint=null)"
            )
        new.checkpoint = old.checkpoint
    return config


def function_keys(config: Config) -> dict[str, Any]:
    """Return the keys of `model` that decide what the network computes from an input, as nested plain data."""
    kind = config.model.kind
    parts = ("vision", "language", "alignment") if kind == "recogniser" else (kind,)
    model = config.to_dict()["model"]
    keys = {part: model[part] for part in parts}
    return keys | {"iter_size": config.model.iter_size} if kind == "recogniser" else keys


def function_differences(config: Config, carried: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, its value, ours) where a checkpoint's config computes something else from an image or text."""
    sizes = {"image_height", "image_width", "max_length", "multiscales", "align_left"}
    theirs = _migrated(carried) if isinstance(carried, Mapping) else {}
    yield from differing(function_keys(config), theirs.get("model"), "model")
    yield from differing(config.dataset.model_dump(include=sizes), theirs.get("dataset"), "dataset")


def differing(
    ours: Mapping[str, Any], theirs: Any, section: str, ignored: Collection[str] = OF_TRAINING
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, their value, ours) of the keys of a section that have another value in a checkpoint's config.

    Args:
        theirs: whatever stands in place of the section there; keys that it lacks are passed over.
        ignored: names of keys to pass over, at every level.
    """
    for name, value in ours.items():
        other = theirs.get(name) if isinstance(theirs, Mapping) else None
        if name in ignored or other is None:
            continue
        if isinstance(value, Mapping):
            yield from differing(value, other, f"{section}.{name}", ignored)
        elif repr(other) != repr(value):
            yield f"{section}.{name}", other, value


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config to a YAML file that `load_config` reads back equal."""
    Path(path).write_text(config.to_yaml(), encoding="utf-8")


# --- checks across keys -----------------------------------------------------------------------------------------------


def _training_problems(config: Config) -> Iterator[tuple[str, str]]:
    training = config.training
    yield from _loss_problems(config)
    if training.compile and training.compile_mode != "default" and training.accumulation > 1:
        yield "training.compile_mode", f"{training.compile_mode} needs training.accumulation=1; change one of them"
    train = config.dataset.train
    if config.model.takes_masks and any(not root.startswith(RENDER_SCHEME) for root in train.roots):
        yield from mask_problems(config)
    if train.difficulty and not any(root.startswith(RENDER_SCHEME) for root in train.roots):
        yield "dataset.train.difficulty", "no root is render://FILE.yaml, and words of files have theirs already"
    if train.shares is not None and len(train.shares) != len(train.roots):
        yield "dataset.train.shares", f"{len(train.shares)} shares for {len(train.roots)} roots; give one for each root"
    elif train.shares is not None and not all(map(sum, zip(*train.shares, strict=True))):
        yield "dataset.train.shares", "all are 0 at the start or at the end of the run; give one of them more"


def _vision_problems(config: Config) -> Iterator[tuple[str, str]]:
    vision, dataset = config.model.vision, config.dataset
    if vision.d_model != vision.widths[-1]:
        yield (
            "model.vision.d_model",
            f"{vision.d_model} must equal the last of model.vision.widths, {vision.widths[-1]}",
        )
    if vision.backbone == "transformer" and vision.d_model % vision.nhead:
        yield "model.vision.nhead", f"{vision.nhead} does not divide model.vision.d_model {vision.d_model}"
    if vision.segmentation.enabled and vision.strides[-1] not in (1, [1, 1]):
        yield "model.vision.strides", f"the last is {vision.strides[-1]}; the mask branch needs 1 there"
    for axis, name in enumerate(("image_height", "image_width")):
        stride = math.prod(each if isinstance(each, int) else each[axis] for each in vision.strides)
        if getattr(dataset, name) % stride:
            yield f"dataset.{name}", f"{getattr(dataset, name)} is not a multiple of {stride}, the strides' product"


def _loss_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Check that some part that is trained has a loss to learn from."""
    model = config.model
    if model.kind == "ssn":
        return
    losses = {"vision": {"vision", "refinement", "alignment"}}  # part -> losses that train it
    losses |= {"language": {"language", "alignment"}, "alignment": {"alignment"}}
    if not model.language.detach:
        losses = {part: names | {"language"} for part, names in losses.items()}
    parts = list(losses) if model.kind == "recogniser" else [model.kind]
    weights = {part: getattr(model, part).loss_weight for part in parts}
    weights["refinement"] = model.takes_masks and model.vision.segmentation.loss_weight
    frozen = [part for part in parts if getattr(model, part).freeze]
    if not any(weights.get(loss) for part in parts if part not in frozen for loss in losses[part]):
        key = f"model.{frozen[0]}.freeze" if frozen else f"model.{parts[0]}.loss_weight"
        yield key, "no part that is trained has a loss to learn from; set a loss_weight above 0, or a freeze to false"


def mask_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) where the masks of words of LMDBs cannot be had."""
    masks = config.dataset.masks
    if masks.source == "lmdb" and masks.root is None:
        yield (
            "dataset.masks.root",
            "missing: the network reads masks from LMDBs (make them with tools/create_masks.py), "
            "else set dataset.masks.source=online or model.vision.segmentation.enabled=false",
        )
    if masks.source == "online" and config.model.ssn.checkpoint is None and config.model.checkpoint is None:
        yield "model.ssn.checkpoint", "missing: dataset.masks.source=online needs the weights of a trained SSN"


# --- template ---------------------------------------------------------------------------------------------------------


def template() -> str:
    """Return the text of `configs/template.yaml`: every key with its default, and its unit and effect as a comment."""
    lines = ["# Every key, its default, unit and effect. Printed by: python config.py > configs/template.yaml"]
    for dotted, field in walk_schema(Config):
        level = dotted.count(".")
        name = dotted.rpartition(".")[2]
        if is_section(field):
            lines += ([""] if level == 0 else []) + [f"{'  ' * level}{name}:  # {field.annotation.__doc__}"]
        else:
            value = dump_yaml(field.default, default_flow_style=True, width=1000).split("\n")[0]
            lines.append(f"{'  ' * level}{name}: {value}  # {field.description}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(template(), end="")
