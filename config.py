"""Config schema, YAML loading, `key=value` overrides and error messages.

`load_config(path, overrides=["training.epochs=1"])` gives a `Config` whose every value is known, typed and in range, or
raises one `UserError` that lists everything that is wrong. The schema below is the only place where a key, its default,
its limits and its meaning are written; `configs/template.yaml` is printed from it (`python config.py`).
"""

import logging
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from rapidfuzz import fuzz, process

from modules.ssn import PUBLISHED_AREAS
from utils import RENDER_SCHEME, UserError, is_folder_name
from yaml_io import Document, dump_yaml, parse_yaml, read_yaml

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Names with a meaning
# ---------------------------------------------------------------------------------------------------------------------

VISION = "modules.model_vision.BaseVision"
LANGUAGE = "modules.model_language.BCNLanguage"
ABINET = "modules.model_abinet_iter.ABINetIterModel"
BINET = "modules.model_binet_iter.BINetIterModel"
SSN = "modules.ssn.SSN"
KINDS = {VISION: "vision", LANGUAGE: "language", ABINET: "recogniser", BINET: "recogniser", SSN: "ssn"}
ALIASES = {"vision": VISION, "language": LANGUAGE, "abinet": ABINET, "binet": BINET, "ssn": SSN}

# What an ABINet name means where the YAML does not say otherwise: no masks, sinusoidal positions, position queries.
ABINET_DEFAULTS = {
    "vision": {"attention": "position", "positional_encoding": True, "segmentation": {"enabled": False}},
}

DEEPEST = 8  # sections and lists in one another, of a config
PROBLEMS_SHOWN = 30  # of a configuration, in one message

# Published keys that nothing reads any more: they are named in a warning and ignored.
DEAD_KEYS = ("dataset.cache_index", "dataset.one_hot_y", "training.stats_iters", "model.ensemble", "model.use_vision")

# ---------------------------------------------------------------------------------------------------------------------
# Schema
# ---------------------------------------------------------------------------------------------------------------------


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key of the schema: its default, its unit and effect in one sentence, and pydantic's limits on the value."""
    return Field(default, description=description, **limits)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_pair(value: Any) -> Any:
    return [value, value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _single_rate(value: Any) -> Any:
    """Published YAMLs may give one learning rate for each layer group; equal ones mean a single rate."""
    return value[0] if isinstance(value, list) and value and all(rate == value[0] for rate in value) else value


def _known_stride(value: Any) -> Any:
    """1, 2, or a list of two of these, for rows and columns."""
    if value in (1, 2) or (isinstance(value, list) and len(value) == 2 and all(each in (1, 2) for each in value)):
        return value
    raise ValueError("must be 1, 2 or [rows, columns] of these")


def _known_augmentation(value: Any) -> Any:
    if isinstance(value, bool) or value == "rand":
        return value
    raise ValueError("must be true, false or rand")


def _folder_name(value: Any) -> Any:
    if isinstance(value, str) and not is_folder_name(value):
        raise ValueError("must be the name of one folder")
    return value


Roots = Annotated[list[str], BeforeValidator(_as_list)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
FeatureWidth = Annotated[int, Field(ge=2, multiple_of=2)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Five = Field(min_length=5, max_length=5)
Share = Annotated[list[Weight], Field(min_length=2, max_length=2), BeforeValidator(_as_pair)]
Stride = Annotated[int | list[int], BeforeValidator(_known_stride)]
Pair = Field(min_length=2, max_length=2)


class Section(BaseModel):
    """A mapping of the YAML: no unknown keys, no conversion but int to float; left empty, it is all defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        sections = {field.alias or name for name, field in cls.model_fields.items() if _is_section(field)}
        return {name: value for name, value in data.items() if value is not None or name not in sections}


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


class GlobalConfig(Section):
    """The run as a whole."""

    name: Annotated[str, BeforeValidator(_folder_name)] = key(
        "run", "Name of the run: its folder below workdir and its checkpoint files."
    )
    phase: Literal["train", "test"] = key("train", "train, or test: evaluate only (--phase sets it).")
    stage: Literal["pretrain-vision", "pretrain-language", "train-semi-super", "train-super", "train-ssn"] = key(
        "train-super",
        "Published name of the stage; informative, model.name decides what is trained. Training refuses "
        "train-semi-super, which is not built.",
    )
    workdir: str = key("workdir", "Folder that holds one folder for each run.", min_length=1)
    seed: int | None = key(None, "Seed of weights, order and augmentation; null means 0.", ge=0, lt=2**63)


class TrainDataConfig(Section):
    """Training data."""

    roots: Roots = key(
        [], "LMDBs, folders of LMDBs, render://FILE.yaml; CSV files for language; folders of pairs for SSN."
    )
    batch_size: PositiveInt = key(384, "Samples in one optimiser step over all processes.")
    length: PositiveInt | None = key(
        None,
        "Samples in an epoch: of each render:// root (null: its own number), or, with shares, of the mixture (null: "
        "all samples).",
    )
    shares: list[Share] | None = key(
        None,
        "Share of each root in every batch: a number, or [first, last] that it changes between over the run; each root "
        "is passed through in its own order before it repeats. null: every sample once an epoch.",
    )
    difficulty: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Pair, BeforeValidator(_as_pair)] | None = key(
        None,
        "Difficulty of render:// words, 0 to 1: a number, or [first, last] that it changes between over the run; null: "
        "that of the file. For rendered LMDBs: shares that change, of one LMDB for each difficulty.",
    )


class TestDataConfig(Section):
    """Evaluation data, during training and in test."""

    __test__ = False  # not a test case, whatever its name

    roots: Roots = key([], "As train.roots; each LMDB found is one test set with its own row.")
    batch_size: PositiveInt = key(384, "Samples read at once; does not change results.")


class MasksConfig(Section):
    """Where text masks come from."""

    source: Literal["lmdb", "online", "none"] = key(
        "lmdb",
        "lmdb: files (rendered words bring their own); online: SSN in the loop; none (the default of a "
        "network without segmentation).",
    )
    root: str | None = key(None, "Folder of mask LMDBs; the masks of <root of images>/X are in <masks.root>/X.")
    cache: bool = key(False, "Keep the online mask of each word on disk, in cache_dir, for later epochs and runs.")


class SegmentationDataConfig(Section):
    """Samples for training SSN."""

    crop_size: Annotated[list[PositiveInt], Pair] = key([513, 513], "Height and width of a training crop, pixels.")
    scale_range: Annotated[list[PositiveFloat], Pair] = key(
        [0.5, 2.0], "Smallest and largest random resizing before the crop, factor."
    )
    ignore_index: int = key(255, "Label of pixels that no loss and no score counts.", ge=2, le=255)
    ignore_level: int | None = key(
        128,
        "Grey level of masks that marks pixels to ignore; null for soft masks, which have it as any other.",
        ge=1,
        le=254,
    )


class DatasetConfig(Section):
    """Data: where it is and how a sample is made of it."""

    train: TrainDataConfig = Field(default_factory=TrainDataConfig)
    test: TestDataConfig = Field(default_factory=TestDataConfig)
    charset_path: str = key("data/charset_36.txt", "Characters of the network, one `id<TAB>character` per line.")
    eval_protocol: Literal[36, 62, 94] | None = key(
        None,
        "Score on 36 (case and punctuation blind), 62 or 94 characters; null: the charset's own where "
        "eval_case_sensitive is true, else 36.",
    )
    max_length: PositiveInt = key(25, "Longest word, characters; the network reads one step more for the end.")
    image_height: PositiveInt = key(32, "Height of the network's input, pixels.")
    image_width: PositiveInt = key(128, "Width of the network's input, pixels.")
    case_sensitive: bool = key(False, "Keep the case of labels in training (needs a charset with upper case).")
    eval_case_sensitive: bool = key(False, "Keep the case of labels in evaluation.")
    data_aug: Annotated[bool | Literal["rand"], BeforeValidator(_known_augmentation)] = key(
        True, "Augmentation of training samples: true, the published one; rand, RandAugment as of PARSeq; false, none."
    )
    multiscales: bool = key(
        False,
        "Keep the aspect when resizing, centred, borders replicated; in training, half of the time, a random aspect.",
    )
    align_left: bool = key(
        False,
        "Keep the aspect when resizing, at the left edge, the rest black: a letter's place tells its number.",
    )
    turn_tall: float | None = key(
        None,
        "Height / width of an image above which it is read as stored and turned by 90 degrees both ways (test, Reader, "
        "demo); the most confident prediction is kept. null: images are read as stored.",
        ge=1,
        allow_inf_nan=False,
    )
    num_workers: int = key(4, "Data loading processes for each training process; 0 loads in the loop.", ge=0)
    pin_memory: bool = key(True, "Copy batches into page-locked memory (faster transfer to a GPU).")
    use_sm: bool = key(False, "Spelling mutation of language inputs.")
    smooth_label: bool = key(False, "Smooth the language inputs' one-hot characters.")
    smooth_factor: float = key(
        0.1, "Largest share of a character that smoothing spreads over all; drawn for each word.", ge=0, lt=1
    )
    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = key(
        None, "How workers start; null: the platform's way."
    )
    cache_dir: str | None = key(
        None,
        "Folder that keeps which samples pass the filter (an LMDB then opens at once) and cached masks; null: the "
        "user's cache folder.",
    )
    masks: MasksConfig = Field(default_factory=MasksConfig)
    segmentation: SegmentationDataConfig = Field(default_factory=SegmentationDataConfig)

    @property
    def fit(self) -> Literal["stretch", "centre", "left"]:
        """How an image gets the network's size (`transforms.ResizeWord`)."""
        return "centre" if self.multiscales else "left" if self.align_left else "stretch"


class TrainingConfig(Section):
    """Length, rhythm and arithmetic of training."""

    epochs: PositiveInt = key(10, "Passes over the training data.")
    iterations: PositiveInt | None = key(None, "Optimiser steps; when set it rules and epochs does not count.")
    show_iters: PositiveInt = key(50, "Steps between two lines of the log.")
    eval_iters: PositiveInt = key(3000, "Steps between two evaluations.")
    save_iters: PositiveInt = key(3000, "Steps between two checkpoints.")
    start_iters: int = key(0, "Step from which evaluation and checkpoints start.", ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "Arithmetic of the networks; fp16 scales the loss.")
    tf32: bool = key(
        False,
        "Let a GPU round the inputs of float32 convolutions and matrix products to 10 bits (TF32): several times "
        "faster, errors of about 1e-3. In training and test alike; false, so that fp32 means float32 on every device.",
    )
    deterministic: bool = key(
        False,
        "Take only algorithms of a GPU that give the same bits each time, so that a run repeats and resumes exactly "
        "there; slower.",
    )
    compile: bool = key(False, "Compile the network with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = key(
        "default",
        "What compile aims at. reduce-overhead: a GPU replays the network as one graph, where the host is too slow to "
        "launch its kernels; max-autotune: the same, and kernels chosen by timing. Both need accumulation: 1.",
    )
    accumulation: PositiveInt = key(
        1,
        "Parts into which a batch is cut to save memory. Loss and gradient are those of the whole batch, but batch "
        "norms take the statistics of each part; BINet and SSN take a forward pass more, to count pixels.",
    )
    ema: float | None = key(
        None,
        "Decay of the averaged weights that are evaluated, less in the first steps: (1 + step) / (10 + step); null: no "
        "average.",
        gt=0,
        lt=1,
    )
    sync_batchnorm: bool = key(False, "Batch statistics over all processes instead of each one's own.")
    keep_checkpoints: PositiveInt = key(3, "Newest checkpoints that stay on disk, beside the best one.")
    max_skipped_steps: PositiveInt = key(10, "Steps in a row with a loss or gradient not finite before the run stops.")
    log_images: int = key(8, "Words shown in TensorBoard at each evaluation.", ge=0)


class OptimizerArgsConfig(Section):
    """Arguments of the optimiser; each type takes those it knows."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Pair] = key([0.9, 0.999], "Adam, AdamW: decay rates.")
    eps: PositiveFloat = key(1e-8, "Adam, AdamW: added to the denominator.")
    momentum: float = key(0.9, "SGD: momentum.", ge=0, lt=1)


class SchedulerConfig(Section):
    """Learning rate over time."""

    type: Literal["step", "poly", "one_cycle"] = key("step", "step: x gamma after each period; poly; one_cycle.")
    periods: Annotated[list[PositiveInt], Field(min_length=1)] = key(
        [6, 4], "step: lengths of the periods, epochs; the last one goes on to the end."
    )
    gamma: PositiveFloat = key(0.1, "step: factor on the rate after each period.")
    power: PositiveFloat = key(0.9, "poly: rate = lr * (1 - step / steps) ^ power.")
    warmup_iters: int = key(0, "step, poly: steps over which the rate rises linearly to lr.", ge=0)
    pct_start: float = key(0.3, "one_cycle: share of the steps with a rising rate.", gt=0, lt=1)


class OptimizerConfig(Section):
    """Optimiser and schedule."""

    type: Literal["Adam", "AdamW", "SGD"] = key("Adam", "Adam, AdamW or SGD.")
    lr: Annotated[PositiveFloat, BeforeValidator(_single_rate)] = key(1e-4, "Learning rate (peak rate of one_cycle).")
    wd: float = key(0.0, "Weight decay.", ge=0)
    true_wd: bool = key(False, "Adam: decay the weights themselves, not through the gradient (as AdamW always does).")
    bn_wd: bool = key(False, "Decay normalisation parameters and biases too.")
    clip_grad: PositiveFloat | None = key(20.0, "Largest norm of the whole gradient; null: no clipping.")
    args: OptimizerArgsConfig = Field(default_factory=OptimizerArgsConfig)
    head_lr_factor: PositiveFloat = key(1.0, "Factor on the rate of SSN's head.")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)


class SegmentationConfig(Section):
    """Mask refinement and mask embedding of BINet."""

    enabled: bool = key(True, "Refine the text mask and modulate the features with it (ABINet: false by default).")
    threshold: float = key(
        0.7, "Refinement loss: mask value above which a pixel is drawn to 1, below to 0.", gt=0, lt=1
    )
    normalize: Literal["sample", "batch"] = key(
        "sample", "Minimum and maximum over one image, or the batch (published)."
    )
    loss_weight: Weight = key(1.0, "Weight of the refinement loss; 0: not computed.")
    sft_blocks: PositiveInt = key(16, "Residual blocks of the spatial feature transform.")
    sft_channels: PositiveInt = key(64, "Channels of those blocks.")
    condition_channels: PositiveInt = key(32, "Channels of the condition made of the mask.")
    hidden_channels: PositiveInt = key(128, "Channels inside the condition network.")
    side_channels: PositiveInt = key(128, "Channels of the backbone's side outputs and of the refinement.")


class VisionConfig(Section):
    """Vision model: backbone, encoder, masks, attention."""

    checkpoint: str | None = key(None, "Weights that the vision model starts from.")
    loss_weight: Weight = key(1.0, "Weight of the vision loss; 0: not computed.")
    attention: Literal["attention", "position"] = key(
        "attention", "attention: reading-order embedding; position: U-net keys (default of ABINet)."
    )
    attention_mode: Literal["nearest", "bilinear"] = key("nearest", "position: upsampling in the U-net.")
    backbone: Literal["transformer", "resnet"] = key("transformer", "ResNet45 with encoder layers, or without.")
    backbone_ln: PositiveInt = key(3, "Encoder layers after the ResNet.")
    d_model: FeatureWidth = key(512, "Feature width E; equals the last of widths.")
    nhead: PositiveInt = key(8, "Heads of the encoder; divides d_model.")
    d_inner: PositiveInt = key(2048, "Width of the encoder's feed-forward layers.")
    dropout: Dropout = key(0.1, "Dropout of the encoder, probability.")
    activation: Literal["relu", "gelu"] = key("relu", "Activation of the encoder.")
    stem_width: PositiveInt = key(32, "Channels after the ResNet's first convolution.")
    widths: Annotated[list[PositiveInt], Five] = key([32, 64, 128, 256, 512], "Channels of the five stages.")
    depths: Annotated[list[PositiveInt], Five] = key([3, 4, 6, 6, 3], "Blocks of the five stages.")
    strides: Annotated[list[Stride], Five] = key(
        [2, 1, 2, 1, 1], "Stride of each stage's first block; [2, 1] keeps the columns."
    )
    attention_channels: PositiveInt = key(64, "position: channels of the U-net.")
    positional_encoding: bool = key(False, "Sinusoidal positions before the encoder (ABINet: true by default).")
    segmentation: SegmentationConfig = Field(default_factory=SegmentationConfig)


class LanguageConfig(Section):
    """Language model (BCN)."""

    checkpoint: str | None = key(None, "Weights that the language model starts from.")
    loss_weight: Weight = key(1.0, "Weight of the language loss; 0: not computed.")
    num_layers: PositiveInt = key(4, "Decoder layers.")
    d_model: FeatureWidth = key(512, "Feature width E; equals the vision model's in a recogniser.")
    nhead: PositiveInt = key(8, "Heads; divides d_model.")
    d_inner: PositiveInt = key(2048, "Width of the feed-forward layers.")
    dropout: Dropout = key(0.1, "Dropout, probability.")
    activation: Literal["relu", "gelu"] = key("relu", "Activation of the feed-forward layers.")
    detach: bool = key(True, "No gradient from the language model into the reading that it corrects.")
    use_self_attn: bool = key(False, "Self-attention in the decoder layers.")


class AlignmentConfig(Section):
    """Gate between vision and language."""

    loss_weight: Weight = key(1.0, "Weight of the alignment loss; 0: not computed.")
    d_model: FeatureWidth = key(512, "Feature width E; equals the vision model's.")


class SSNLossWeightsConfig(Section):
    """Weights of the SSN losses."""

    semantic: Weight = key(1.0, "Weight of the cross-entropy of the semantic logits.")
    refined: Weight = key(0.5, "Weight of the cross-entropy of the refined logits.")
    trimap: Weight = key(0.5, "Weight of the same on the pixels along borders.")


class SSNConfig(Section):
    """Text segmentation network: HRNet and head."""

    checkpoint: str | None = key(None, "Weights of SSN; online masks need them.")
    widths: Annotated[list[PositiveInt], Field(min_length=4, max_length=4)] = key(
        [48, 96, 192, 384], "Channels of the four branches."
    )
    stem_width: PositiveInt = key(64, "Channels of the two first convolutions.")
    num_modules: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)] = key(
        [1, 4, 3], "Modules of stages 2, 3, 4."
    )
    num_blocks: PositiveInt = key(4, "Basic blocks of each branch of a module.")
    bottlenecks: PositiveInt = key(4, "Bottleneck blocks of stage 1.")
    bottleneck_width: PositiveInt = key(64, "Inner channels of those; they give four times as many.")
    head_width: PositiveInt = key(64, "Channels of the refining convolutions.")
    areas: Annotated[list[PositiveInt], Field(min_length=1)] = key(
        list(PUBLISHED_AREAS),
        "Sides of the square areas, pixels, at which an image is segmented; masks are the mean. Left at this default, "
        "a checkpoint that carries its own areas is used with those.",
    )
    loss_weights: SSNLossWeightsConfig = Field(default_factory=SSNLossWeightsConfig)


class ModelConfig(Section):
    """The network."""

    name: Annotated[
        Literal[VISION, LANGUAGE, ABINET, BINET, SSN],
        BeforeValidator(lambda name: ALIASES.get(name, name) if isinstance(name, str) else name),
    ] = key(BINET, f"Network to build, by its published name; short: {', '.join(ALIASES)}.")
    iter_size: PositiveInt = key(3, "Rounds of language and alignment.")
    checkpoint: str | None = key(None, "Weights of the whole network; loaded after the sub-models'.")
    strict: bool = key(True, "A checkpoint must have every tensor and no other.")
    vision: VisionConfig = Field(default_factory=VisionConfig)
    language: LanguageConfig = Field(default_factory=LanguageConfig)
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig)
    ssn: SSNConfig = Field(default_factory=SSNConfig)

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") in ("abinet", ABINET):
            return _merged(ABINET_DEFAULTS, data)
        return data

    @property
    def kind(self) -> Literal["vision", "language", "recogniser", "ssn"]:
        """What sort of network `name` is: it decides the data, the losses and the metrics."""
        return KINDS[self.name]

    @property
    def takes_masks(self) -> bool:
        """Whether the network reads a text mask beside the image."""
        return self.kind in ("vision", "recogniser") and self.vision.segmentation.enabled


def _merged(defaults: dict, given: dict) -> dict:
    """`given`, with `defaults` where it says nothing; neither is edited. A null section says nothing."""
    result = dict(given)
    for name, default in defaults.items():
        value = given.get(name)
        if isinstance(default, dict) and (value is None or isinstance(value, dict)):
            result[name] = _merged(default, value or {})
        else:
            result.setdefault(name, default)
    return result


class Config(Section):
    """A whole config: the YAML's sections as attributes (`global` is `run`, a keyword being no attribute)."""

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
        """A config from plain data, such as a checkpoint carries; `source` names it in messages.

        Args:
            drop_unknown: leave out keys that the schema does not have, with a warning that names them: a checkpoint is
                of use after a key has gone.

        Raises:
            UserError: with one line for each thing that is wrong.
        """
        return _validated(Document(_migrated(_plain(mapping, source)), source, {}), {}, drop_unknown=drop_unknown)

    @property
    def work_folder(self) -> Path:
        """Where everything of the run goes."""
        return Path(self.run.workdir) / self.run.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, numbers, strings, None) that `from_dict` reads back equal."""
        return self.model_dump(by_alias=True)

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load_config` reads back equal."""
        return dump_yaml(self.to_dict(), width=120)


def _migrated(mapping: dict[str, Any]) -> dict[str, Any]:
    """The resolved config of an older checkpoint in today's keys: there `multiscales` was what `align_left` is now."""
    dataset = mapping.get("dataset")
    if isinstance(dataset, dict) and "cache_dir" in dataset and "align_left" not in dataset:  # resolved, and older
        align_left = dataset.get("multiscales", False)
        return mapping | {"dataset": dataset | {"multiscales": False, "align_left": align_left}}
    return mapping


def _plain(value: Any, source: str, depth: int = 0) -> Any:
    """Nested data as dicts and lists of its own; a list that holds itself has no end."""
    if depth > DEEPEST:
        raise UserError(f"{source}: nested too deeply; it is no config")
    if isinstance(value, Mapping):
        return {name: _plain(item, source, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, source, depth + 1) for item in value]
    return value


def walk_schema(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema in order, sections before what they hold: (dotted key, field)."""
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted, field
        if _is_section(field):
            yield from walk_schema(field.annotation, f"{dotted}.")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides, whose values are YAML too.

    Raises:
        UserError: the file cannot be read, or any key or value of file or overrides is wrong; one line for each.
    """
    document = read_yaml(Path(path))
    problems: list[str] = []
    origins: dict[str, str] = {}  # dotted key -> the override that set it
    for override in overrides:
        try:
            dotted, value = _parse_override(override)
            _set(document.data, dotted.split("."), value)
            origins[dotted] = _named(override)
        except UserError as error:
            problems.append(str(error))
    return _validated(document, origins, problems)


def continued(config: Config, before: Mapping[str, Any] | None) -> Config:
    """The config of a run that is resumed: it keeps the names of the weights that it started from.

    Args:
        before: the config in the run's checkpoint, as plain data; None: it has none.

    Raises:
        UserError: a key has changed that must not within a run.
    """
    config = config.model_copy(deep=True)
    if before is None:
        return config
    now = config.to_dict()
    for key in ("global.seed", "dataset.train.batch_size"):  # the order of the samples, and the steps of an epoch
        if (value_of(before, key) or 0) != (value_of(now, key) or 0):
            raise UserError(
                f"{key}: the run to resume has {value_of(before, key)}, not {value_of(now, key)}, and its place in the "
                "data means nothing with another; keep it, or start from the run's weights with --checkpoint"
            )
    sections = {"model": config.model, "model.vision": config.model.vision, "model.language": config.model.language}
    if config.model.kind == "ssn":
        sections["model.ssn"] = config.model.ssn
    for name, section in sections.items():
        started_from = value_of(before, f"{name}.checkpoint")
        if section.checkpoint not in (None, started_from):
            raise UserError(
                f"{name}.checkpoint: the run to resume started from {started_from}, not {section.checkpoint}, and goes "
                f"on with its own weights; leave it out ({name}.checkpoint=null)"
            )
        section.checkpoint = started_from
    return config


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in a config as plain data; None where it has no such key."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config to a YAML file that `load_config` reads back equal."""
    Path(path).write_text(config.to_yaml(), encoding="utf-8")


def _parse_override(override: str) -> tuple[str, Any]:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals:
        raise UserError(f"{_named(override)}: not of the form key=value, such as training.epochs=1")
    known = [name for name, _ in walk_schema()]
    if dotted not in known and dotted not in DEAD_KEYS:
        raise UserError(f"{_named(override)}: {_unknown_key(dotted)}")
    return dotted, parse_yaml(text, _named(override)).data


def _named(override: str) -> str:
    """An override in messages, in one line whatever its value is."""
    return f"override {override}".replace("\n", r"\n")


def _set(data: Any, names: list[str], value: Any) -> None:
    """Set a nested value. What a file has wrongly in a section's place stays, to be reported."""
    for name in names[:-1]:
        if not isinstance(data.get(name) or {}, dict):
            return
        data[name] = dict(data.get(name) or {})  # a copy, as a YAML alias may share the section with another
        data = data[name]
    data[names[-1]] = value


def _validated(
    document: Document, origins: Mapping[str, str], problems: Sequence[str] = (), *, drop_unknown: bool = False
) -> Config:
    problems = list(problems)
    _drop_dead_keys(document)
    if drop_unknown:
        _drop_unknown_keys(document)
    config = None
    try:
        config = Config.model_validate(document.data)
        found = list(_cross_key_problems(config))
    except ValidationError as errors:
        found = [_describe(error) for error in errors.errors(include_url=False)]
    problems += [f"{_origin(dotted, document, origins)}: {message}" for dotted, message in found]
    if problems or config is None:
        shown = problems[:PROBLEMS_SHOWN]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more: mend these first")
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration\n  "
        raise UserError(head + "\n  ".join(shown))
    return config


def _drop_dead_keys(document: Document) -> None:
    for dotted in DEAD_KEYS:
        section, name = dotted.split(".")
        values = document.data.get(section)
        if isinstance(values, dict) and name in values:
            logger.warning("%s: %s is a published key that nothing reads any more; ignored", document.source, dotted)
            document.data[section] = {other: value for other, value in values.items() if other != name}


def _drop_unknown_keys(document: Document) -> None:
    try:
        Config.model_validate(document.data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            if error["type"] == "extra_forbidden":
                *sections, name = error["loc"]
                values = document.data
                for section in sections:
                    values = values[section]
                del values[name]
                logger.warning("%s: %s is no key of the config any more; ignored", document.source, _describe(error)[0])


def _cross_key_problems(config: Config) -> Iterator[tuple[str, str]]:
    """What no single key shows: (dotted key, what is wrong). Only the parts that the network has are looked at."""
    model, vision, language = config.model, config.model.vision, config.model.language
    if model.kind in ("vision", "recogniser"):
        yield from _vision_problems(config)
    if model.kind in ("language", "recogniser") and language.d_model % language.nhead:
        yield "model.language.nhead", f"{language.nhead} does not divide model.language.d_model {language.d_model}"
    if model.kind == "recogniser":
        for name, d_model in (("language", language.d_model), ("alignment", model.alignment.d_model)):
            if d_model != vision.d_model:
                yield f"model.{name}.d_model", f"{d_model} must equal model.vision.d_model {vision.d_model}"
    if config.run.phase == "train":
        yield from _loss_problems(config)
        training = config.training
        if training.compile and training.compile_mode != "default" and training.accumulation > 1:
            yield (
                "training.compile_mode",
                f"{training.compile_mode} keeps the gradients of one part only, and training.accumulation is "
                f"{training.accumulation}; set one of them to its default",
            )
    smallest, largest = config.dataset.segmentation.scale_range
    if smallest > largest:
        yield "dataset.segmentation.scale_range", f"{smallest} is larger than {largest}; give [smallest, largest]"
    if config.dataset.multiscales and config.dataset.align_left:
        yield "dataset.align_left", "true, and so is dataset.multiscales, which centres; set one of them"
    if config.run.phase == "train":
        yield from _mixture_problems(config.dataset.train)
    reads_files = [root for root in config.dataset.train.roots if not root.startswith(RENDER_SCHEME)]
    if config.run.phase == "train" and reads_files and model.takes_masks:
        yield from _mask_problems(config)


def _vision_problems(config: Config) -> Iterator[tuple[str, str]]:
    vision, dataset = config.model.vision, config.dataset
    if vision.d_model != vision.widths[-1]:
        yield (
            "model.vision.d_model",
            f"{vision.d_model} must equal the last of model.vision.widths, {vision.widths[-1]}",
        )
    if vision.backbone == "transformer" and vision.d_model % vision.nhead:
        yield "model.vision.nhead", f"{vision.nhead} does not divide model.vision.d_model {vision.d_model}"
    for axis, name in enumerate(("image_height", "image_width")):
        stride = math.prod(each if isinstance(each, int) else each[axis] for each in vision.strides)
        if getattr(dataset, name) % stride:
            yield f"dataset.{name}", f"{getattr(dataset, name)} is not a multiple of {stride}, the strides' product"


def _loss_problems(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    weights = {
        "model.vision.loss_weight": model.vision.loss_weight,
        "model.language.loss_weight": model.language.loss_weight,
        "model.alignment.loss_weight": model.alignment.loss_weight,
        "model.vision.segmentation.loss_weight": model.takes_masks and model.vision.segmentation.loss_weight,
    }
    if model.kind == "ssn":
        weights = {f"model.ssn.loss_weights.{name}": weight for name, weight in model.ssn.loss_weights}
    elif model.kind != "recogniser":
        weights = {name: weight for name, weight in weights.items() if name.startswith(f"model.{model.kind}.")}
    if not any(weights.values()):
        yield next(iter(weights)), f"all weights of the loss are 0; set one of {', '.join(weights)}"


def _mixture_problems(train: TrainDataConfig) -> Iterator[tuple[str, str]]:
    if train.difficulty and not any(root.startswith(RENDER_SCHEME) for root in train.roots):
        yield "dataset.train.difficulty", "no root is render://FILE.yaml, and words of files have theirs already"
    if train.shares is None:
        return
    if len(train.shares) != len(train.roots):
        yield "dataset.train.shares", f"{len(train.shares)} shares for {len(train.roots)} roots; give one for each root"
    elif not all(map(sum, zip(*train.shares, strict=True))):
        yield "dataset.train.shares", "all are 0 at the start or at the end of the run; give one of them more"


def _mask_problems(config: Config) -> Iterator[tuple[str, str]]:
    masks = config.dataset.masks
    if masks.source == "lmdb" and masks.root is None:
        yield (
            "dataset.masks.root",
            "missing: the network reads masks from LMDBs (make them with tools/create_masks.py), "
            "else set dataset.masks.source=online or model.vision.segmentation.enabled=false",
        )
    if masks.source == "online" and config.model.ssn.checkpoint is None and config.model.checkpoint is None:
        yield "model.ssn.checkpoint", "missing: dataset.masks.source=online needs the weights of a trained SSN"


# ---------------------------------------------------------------------------------------------------------------------
# Error messages
# ---------------------------------------------------------------------------------------------------------------------


def _describe(error: Mapping[str, Any]) -> tuple[str, str]:
    """A pydantic error as (dotted key, what is wrong)."""
    dotted = re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in error["loc"]))
    if error["type"] == "extra_forbidden":
        return dotted, _unknown_key(dotted)
    if error["type"] == "invalid_key":
        return dotted, f"{_unknown_key(re.sub(r'[][]', '', dotted))} (a key is text)"
    if error["type"] in ("model_type", "model_attributes_type"):
        return dotted, f"must be a section of `key: value` lines, not {reprlib.repr(error['input'])}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("List should", "must")
    message = message.replace(" after validation", "").replace("'", "")
    return dotted, f"{message}, not {reprlib.repr(error['input'])}"


def _unknown_key(dotted: str) -> str:
    return f"unknown key; nearest known key: {_nearest_key(dotted)}"


def _nearest_key(dotted: str) -> str:
    """A likely slip among the section's own keys, else the same word elsewhere, else the section's nearest."""
    known = [name for name, _ in walk_schema()]
    parent, _, leaf = dotted.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    close = process.extractOne(leaf, [name.rpartition(".")[2] for name in siblings], scorer=fuzz.ratio, score_cutoff=70)
    return (
        siblings[close[2]]
        if close
        else process.extractOne(dotted, elsewhere or siblings or known, scorer=fuzz.ratio)[0]
    )


def _origin(dotted: str, document: Document, origins: Mapping[str, str]) -> str:
    """Where a key was set, for the start of a line: the override itself, or file, line and key."""
    names = re.split(r"[.\[]", dotted)
    for size in range(len(names), 0, -1):
        name = ".".join(names[:size])
        if name in origins:
            return origins[name] if name == dotted else f"{origins[name]}: {dotted}"
        if name in document.lines:
            return f"{document.source}:{document.lines[name]}: {dotted}"
    return f"{document.source}: {dotted}"


# ---------------------------------------------------------------------------------------------------------------------
# Template
# ---------------------------------------------------------------------------------------------------------------------


def template() -> str:
    """The text of `configs/template.yaml`: every key with its default, and its unit and effect as a comment."""
    lines = ["# Every key, its default, unit and effect. Printed by: python config.py > configs/template.yaml"]
    for dotted, field in walk_schema():
        level = dotted.count(".")
        name = dotted.rpartition(".")[2]
        if _is_section(field):
            lines += ([""] if level == 0 else []) + [f"{'  ' * level}{name}:  # {field.annotation.__doc__}"]
        else:
            value = dump_yaml(field.default, default_flow_style=True, width=1000).split("\n")[0]
            lines.append(f"{'  ' * level}{name}: {value}  # {field.description}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(template(), end="")
