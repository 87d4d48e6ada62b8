"""The schema of a config: every section and key with its type, default, limits and meaning.

It is the only place where these are written; `configs/template.yaml` is printed from it (`python config.py`).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from modules.ssn import PUBLISHED_AREAS
from settings import Section, key, merged
from utils import is_folder_name

PUBLISHED_NAMES = {  # model.name in published YAMLs -> ours
    "modules.model_vision.BaseVision": "vision",
    "modules.model_language.BCNLanguage": "language",
    "modules.model_abinet_iter.ABINetIterModel": "abinet",
    "modules.model_binet_iter.BINetIterModel": "binet",
    "modules.ssn.SSN": "ssn",
}

# Defaults of `name: abinet`: no masks, sinusoidal positions, position queries.
ABINET_DEFAULTS = {"vision": {"attention": "position", "positional_encoding": True, "segmentation": {"enabled": False}}}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_pair(value: Any) -> Any:
    return [value, value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _single_rate(value: Any) -> Any:
    """Accept a list of equal rates: published YAMLs may give one for each layer group."""
    return value[0] if isinstance(value, list) and value and all(rate == value[0] for rate in value) else value


def _known_stride(value: Any) -> Any:
    if value in (1, 2) or (isinstance(value, list) and len(value) == 2 and all(each in (1, 2) for each in value)):
        return value
    raise ValueError("must be 1, 2 or [rows, columns] of these")


def _known_interval(value: Any) -> Any:
    if value == "epoch" or (type(value) is int and value >= 1):
        return value
    raise ValueError("must be a whole number from 1 on, or epoch")


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
Pair, Three, Four, Five = (Field(min_length=count, max_length=count) for count in (2, 3, 4, 5))
Share = Annotated[list[Weight], Pair, BeforeValidator(_as_pair)]
Stride = Annotated[int | list[int], BeforeValidator(_known_stride)]
Interval = Annotated[int | Literal["epoch"], BeforeValidator(_known_interval)]
FolderName = Annotated[str, BeforeValidator(_folder_name)]


class GlobalConfig(Section):
    """The run as a whole."""

    name: FolderName = key("run", "Name of the run: its folder below workdir and its checkpoint files.")
    phase: Literal["train", "test"] = key("train", "train, or test: evaluate only (--phase sets it).")
    stage: Literal["pretrain-vision", "pretrain-language", "train-semi-super", "train-super", "train-ssn"] = key(
        "train-super", "Published name of the stage; model.name decides what is trained. train-semi-super is not built."
    )
    workdir: str = key("workdir", "Folder that holds one folder for each run.", min_length=1)
    seed: Annotated[int, BeforeValidator(lambda seed: 0 if seed is None else seed)] = key(  # published YAMLs say null
        0, "Seed of weights, order and augmentation.", ge=0, lt=2**63
    )


class TrainDataConfig(Section):
    """Training data."""

    roots: Roots = key([], "LMDBs, folders of LMDBs, render://FILE.yaml; language: CSV files; SSN: folders of pairs.")
    batch_size: PositiveInt = key(384, "Samples in one optimiser step over all processes.")
    length: PositiveInt | None = key(
        None,
        "Samples in an epoch: of each render:// root (null: its own number); with shares, of all (null: their sum).",
    )
    shares: list[Share] | None = key(
        None,
        "Share of each root in every batch: a number, or [first, last], between which it changes over the run; each "
        "root is passed through in its own order before it repeats. null: every sample once an epoch.",
    )
    difficulty: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Pair, BeforeValidator(_as_pair)] | None = key(
        None,
        "Difficulty of render:// words, 0 to 1: a number, or [first, last], between which it changes over the run; "
        "null: that of the file.",
    )


class TestDataConfig(Section):
    """Test sets of --phase test."""

    __test__ = False  # pytest takes the name for a test case's

    roots: Roots = key([], "As train.roots; each LMDB found is one set with its own row.")
    batch_size: PositiveInt = key(384, "Samples read at once; does not change results.")
    lexicon: str | None = key(
        None,
        "Word list that predictions are chosen from: a text file with a word a line, or NAME of the lists that the "
        "LMDBs hold under NAME-%09d, words separated by commas or spaces. null: predictions are free.",
    )
    lexicon_match: Literal["probability", "distance"] = key(
        "probability", "Choose the most probable word, or the one at the smallest edit distance from the prediction."
    )


class ValidDataConfig(TestDataConfig):
    """Sets that are scored during training and choose the best weights; without roots, the test sets do (published)."""


class MasksConfig(Section):
    """Source of the text masks."""

    source: Literal["lmdb", "online", "none"] = key(
        "lmdb", "lmdb: files (rendered words bring their own); online: SSN in the loop; none: without segmentation."
    )
    root: str | None = key(None, "Folder of mask LMDBs; the masks of <root of images>/X are in <masks.root>/X.")


class SegmentationDataConfig(Section):
    """Samples for training SSN."""

    crop_size: Annotated[list[PositiveInt], Pair] = key([513, 513], "Height and width of a training crop, pixels.")
    scale_range: Annotated[list[PositiveFloat], Pair] = key([0.5, 2.0], "Factors of random resizing before the crop.")
    ignore_level: int | None = key(
        128, "Grey level of masks that marks pixels to ignore; null (soft masks): none.", ge=1, le=254
    )


class DatasetConfig(Section):
    """Data: where it is and how samples are made of it."""

    train: TrainDataConfig = Field(default_factory=TrainDataConfig)
    valid: ValidDataConfig = Field(default_factory=ValidDataConfig)
    test: TestDataConfig = Field(default_factory=TestDataConfig)
    charset_path: str = key("data/charset_36.txt", "Characters of the network, one `id<TAB>character` per line.")
    eval_protocol: Literal[36, 62, 94] | None = key(
        None,
        "Score on 36 (case and punctuation blind), 62 or 94 characters; null: the charset's own where "
        "eval_case_sensitive is true or it has others than these 94 (another language), else 36.",
    )
    max_length: PositiveInt = key(25, "Longest word, characters; the network has one step more, for the end.")
    image_height: PositiveInt = key(32, "Height of the network's input, pixels.")
    image_width: PositiveInt = key(128, "Width of the network's input, pixels.")
    case_sensitive: bool = key(False, "Keep the case of labels in training (needs a charset with upper case).")
    eval_case_sensitive: bool = key(False, "Keep the case of labels in evaluation.")
    data_aug: Literal[True, False, "rand"] = key(
        True, "Augmentation of training samples: true, the published one; rand, RandAugment as in PARSeq; false, none."
    )
    multiscales: bool = key(
        False,
        "Keep the aspect when resizing: centred, borders replicated; in training, half of the time, a random one.",
    )
    align_left: bool = key(False, "Keep the aspect when resizing: at the left edge, the rest black.")
    turn_tall: float | None = key(
        None,
        "Height / width of an image above which it is read as stored and turned by 90 degrees both ways (every "
        "evaluation, Reader, demo); the most confident prediction is kept. null: images are read as stored.",
        ge=1,
        allow_inf_nan=False,
    )
    tta_below: float = key(
        0.0,
        "Test-time augmentation: confidence below which a word is predicted again from variants of its image, "
        "squeezed, slanted or shifted, until one is predicted with high confidence (--phase test, Reader, demo); the "
        "most confident prediction is kept. 0: off.",
        ge=0,
        le=1,
    )
    num_workers: int = key(4, "Data loading processes for each training process; 0 loads in the loop.", ge=0)
    pin_memory: bool = key(True, "Copy batches into page-locked memory (faster transfer to a GPU).")
    use_sm: bool = key(False, "Spelling mutation of language inputs.")
    smooth_label: bool = key(False, "Smooth the language inputs' one-hot characters.")
    smooth_factor: float = key(0.1, "Largest share of a character that smoothing spreads over all.", ge=0, lt=1)
    multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = key(
        None, "Start method of the workers; null: torch's default."
    )
    cache_dir: str | None = key(
        None, "Folder for indices of LMDBs, which open at once then; null: the user's cache folder."
    )
    masks: MasksConfig = Field(default_factory=MasksConfig)
    segmentation: SegmentationDataConfig = Field(default_factory=SegmentationDataConfig)

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width of the network's input, pixels."""
        return self.image_height, self.image_width

    @property
    def fit(self) -> Literal["stretch", "centre", "left"]:
        """Return how an image is brought to the network's size (`transforms.ResizeWord`)."""
        return "centre" if self.multiscales else "left" if self.align_left else "stretch"


class TrainingConfig(Section):
    """Length, intervals and arithmetic of training."""

    epochs: PositiveInt = key(10, "Passes over the training data.")
    iterations: PositiveInt | None = key(None, "Optimiser steps; when set, epochs does not count.")
    show_iters: PositiveInt = key(50, "Steps between two lines of the log.")
    eval_iters: Interval = key(3000, "Steps between two evaluations; epoch: one after each epoch.")
    save_iters: Interval = key(3000, "Steps between two checkpoints; epoch: one after each epoch.")
    start_iters: int = key(0, "Step from which evaluation and checkpoints start.", ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "Arithmetic of the networks; fp16 scales the loss.")
    tf32: bool = key(
        False,
        "Let a GPU round the inputs of float32 convolutions and matrix multiplications to a 10-bit mantissa (TF32), in "
        "training and test: several times faster, errors of about 1e-3. false: fp32 means float32 on every device.",
    )
    deterministic: bool = key(False, "Use only GPU algorithms that give the same bits each time; slower.")
    compile: bool = key(False, "Compile the network with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = key(
        "default",
        "reduce-overhead: a GPU replays the network as one graph; max-autotune: also with kernels chosen by timing. "
        "Both need accumulation: 1.",
    )
    accumulation: PositiveInt = key(
        1,
        "Parts into which a batch is split to save memory. Loss and gradient are those of the whole batch, but batch "
        "norms use the statistics of each part; BINet and SSN need one more forward pass, to count pixels.",
    )
    ema: float | None = key(
        None, "Decay of the averaged weights (EMA), at most (1 + step) / (10 + step); they are evaluated.", gt=0, lt=1
    )
    sync_batchnorm: bool = key(False, "Batch statistics over all processes instead of each one's own.")
    keep_checkpoints: PositiveInt = key(3, "Newest checkpoints that stay on disk, beside the best one.")
    wandb: str | None = key(None, "Project of Weights & Biases (pip install wandb); null: none.", min_length=1)


class OptimizerArgsConfig(Section):
    """Arguments of the optimiser; each type uses its own."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Pair] = key([0.9, 0.999], "Adam, AdamW: decay rates.")
    eps: PositiveFloat = key(1e-8, "Adam, AdamW: added to the denominator.")
    momentum: float = key(0.9, "SGD: momentum.", ge=0, lt=1)


class SchedulerConfig(Section):
    """Learning rate over time."""

    type: Literal["step", "poly", "one_cycle", "cosine"] = key(
        "step", "step: x gamma after each period; poly; one_cycle; cosine: falls to 0 at the end of the run."
    )
    periods: Annotated[list[PositiveInt], Field(min_length=1)] = key(
        [6, 4], "step: lengths of the periods, epochs; the last one goes on to the end."
    )
    gamma: PositiveFloat = key(0.1, "step: factor on the rate after each period.")
    power: PositiveFloat = key(0.9, "poly: rate = lr * (1 - step / steps) ^ power.")
    warmup_iters: int = key(0, "step, poly, cosine: steps over which the rate rises linearly to lr.", ge=0)
    pct_start: float = key(0.3, "one_cycle: share of the steps with a rising rate.", gt=0, lt=1)


class OptimizerConfig(Section):
    """Optimiser and schedule."""

    type: Literal["Adam", "AdamW", "SGD"] = key("Adam", "Adam, AdamW or SGD.")
    lr: Annotated[PositiveFloat, BeforeValidator(_single_rate)] = key(1e-4, "Learning rate (peak rate of one_cycle).")
    wd: float = key(0.0, "Weight decay.", ge=0)
    true_wd: bool = key(False, "Adam: decay the weights directly, not through the gradient (AdamW always does).")
    bn_wd: bool = key(False, "Decay normalisation parameters and biases too.")
    clip_grad: PositiveFloat | None = key(20.0, "Largest norm of the whole gradient; null: no clipping.")
    args: OptimizerArgsConfig = Field(default_factory=OptimizerArgsConfig)
    lr_groups: dict[str, PositiveFloat] = key(
        {},
        "Factors on lr by prefix of the parameters' names in a checkpoint, such as {vision: 0.1} or {semrfnhead: 10}; "
        "the longest prefix counts.",
    )
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)


class SegmentationConfig(Section):
    """Mask refinement and mask embedding of BINet."""

    enabled: bool = key(True, "Refine the text mask and modulate the features with it (ABINet: false by default).")
    threshold: float = key(0.7, "Refinement loss: pixels above it are pulled to 1, others to 0.", gt=0, lt=1)
    normalize: Literal["sample", "batch"] = key(
        "sample", "Extremes of one image, or of the batch (published; predictions then depend on the batch)."
    )
    loss_weight: Weight = key(1.0, "Weight of the refinement loss; 0: not computed.")
    sft_blocks: PositiveInt = key(16, "Residual blocks of the spatial feature transform.")
    sft_channels: PositiveInt = key(64, "Channels of those blocks.")
    condition_channels: PositiveInt = key(32, "Channels of the condition computed from the mask.")
    hidden_channels: PositiveInt = key(128, "Channels inside the condition network.")
    side_channels: PositiveInt = key(128, "Channels of the backbone's side outputs and of the refinement.")


class PartConfig(Section):
    """Part of a recogniser."""

    freeze: bool = key(False, "Do not train it: weights and batch norm statistics stay, dropout is off.")
    loss_weight: Weight = key(1.0, "Weight of its loss; 0: not computed.")


class VisionConfig(PartConfig):
    """Vision model: backbone, encoder, masks, attention."""

    checkpoint: str | None = key(None, "Weights that the vision model starts from.")
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
    strides: Annotated[list[Stride], Five] = key([2, 1, 2, 1, 1], "Strides of the stages; [2, 1] keeps the columns.")
    attention_channels: PositiveInt = key(64, "position: channels of the U-net.")
    positional_encoding: bool = key(False, "Sinusoidal positions before the encoder (ABINet: true by default).")
    segmentation: SegmentationConfig = Field(default_factory=SegmentationConfig)


class LanguageConfig(PartConfig):
    """Language model (BCN)."""

    checkpoint: str | None = key(None, "Weights that the language model starts from.")
    num_layers: PositiveInt = key(4, "Decoder layers.")
    d_model: FeatureWidth = key(512, "Feature width E; equals the vision model's in a recogniser.")
    nhead: PositiveInt = key(8, "Heads; divides d_model.")
    d_inner: PositiveInt = key(2048, "Width of the feed-forward layers.")
    dropout: Dropout = key(0.1, "Dropout, probability.")
    activation: Literal["relu", "gelu"] = key("relu", "Activation of the feed-forward layers.")
    detach: bool = key(True, "No gradient from the language model into the prediction that it corrects.")
    use_self_attn: bool = key(False, "Self-attention in the decoder layers.")


class AlignmentConfig(PartConfig):
    """Gate between vision and language."""

    d_model: FeatureWidth = key(512, "Feature width E; equals the vision model's.")


class SSNConfig(Section):
    """Text segmentation network: HRNet and head."""

    checkpoint: str | None = key(None, "Weights of SSN; online masks need them.")
    widths: Annotated[list[PositiveInt], Four] = key([48, 96, 192, 384], "Channels of the four branches.")
    stem_width: PositiveInt = key(64, "Channels of the first two convolutions.")
    num_modules: Annotated[list[PositiveInt], Three] = key([1, 4, 3], "Modules of stages 2, 3, 4.")
    num_blocks: PositiveInt = key(4, "Basic blocks of each branch of a module.")
    bottlenecks: PositiveInt = key(4, "Bottleneck blocks of stage 1.")
    bottleneck_width: PositiveInt = key(64, "Inner channels of those; they give four times as many.")
    head_width: PositiveInt = key(64, "Channels of the refining convolutions.")
    areas: Annotated[list[PositiveInt], Field(min_length=1)] = key(
        list(PUBLISHED_AREAS),
        "Scales at which an image is segmented, as sides of squares of equal area, pixels; masks are the mean. At this "
        "default, a checkpoint that carries its own areas is used with those.",
    )


class ModelConfig(Section):
    """The network."""

    name: Annotated[
        Literal["vision", "language", "abinet", "binet", "ssn"],
        BeforeValidator(lambda name: PUBLISHED_NAMES.get(name, name) if isinstance(name, str) else name),
    ] = key("binet", "Network to build: vision, language, abinet, binet, ssn; published class paths are accepted.")
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
        name = data.get("name") if isinstance(data, dict) else None
        is_abinet = isinstance(name, str) and PUBLISHED_NAMES.get(name, name) == "abinet"
        return merged(ABINET_DEFAULTS, data) if is_abinet else data

    @property
    def kind(self) -> Literal["vision", "language", "recogniser", "ssn"]:
        """Return the kind of network, which decides the data, the losses and the metrics."""
        return "recogniser" if self.name in ("abinet", "binet") else self.name

    @property
    def takes_masks(self) -> bool:
        """Return whether the network takes a text mask beside the image."""
        return self.kind in ("vision", "recogniser") and self.vision.segmentation.enabled
