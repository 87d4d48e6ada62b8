"""From a config to the parts it names. Nothing else sees both: classes take named values, configs hold only values."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks import (
    Callback,
    Checkpoints,
    Evaluation,
    History,
    NotFiniteBatches,
    Progress,
    TensorBoard,
    UnreadableSamples,
)
from config import Config, SSNConfig
from dataset import (
    JoinedDataset,
    LanguageDataset,
    WordDataset,
    open_segmentation_datasets,
    open_word_datasets,
)
from engine import distributed
from engine.checkpoints import load_weights, read_checkpoint
from engine.distributed import Process
from engine.optimization import (
    Schedule,
    make_optimizer,
    one_cycle_schedule,
    parameter_groups,
    poly_schedule,
    step_schedule,
    with_warmup,
)
from engine.trainer import Trainer
from evaluation.evaluator import Evaluator, SegmentationEvaluator, WordEvaluator
from inference.segmenter import Segmenter
from loading.augmentation import AugmentWord, CropSegmentation, RandAugmentWord
from loading.batches import LabelRule, LanguageCollate, SegmentationCollate, WordCollate
from loading.charset import PROTOCOLS, Charset
from loading.masks import OnlineMasks
from loading.sampling import MixtureBatchSampler, ResumableBatchSampler, ShardedSampler
from loading.transforms import ResizeWord
from loading.word_index import default_cache_dir
from loading.workers import make_loader
from losses import RecogniserCriterion, SegmentationCriterion
from modules.attention import PositionAttention, ReadingOrderAttention
from modules.backbone import ResNet, TransformerBackbone
from modules.model_alignment import AlignmentModel
from modules.model_binet_iter import BINet, LanguageRecogniser, VisionRecogniser
from modules.model_language import LanguageModel
from modules.model_vision import MaskedVisionModel, VisionModel
from modules.ssn import SSN
from utils import RENDER_SCHEME, UserError

logger = logging.getLogger(__name__)

SUB_MODELS = ("alignment", "vision", "language")
AUGMENTATIONS = {True: AugmentWord, "rand": RandAugmentWord}  # by dataset.data_aug
MIN_TRAINING_SIDE = 7  # pixels; words of smaller images are left out of training, as published

# --- networks and losses ----------------------------------------------------------------------------------------------


def build_model(config: Config, charset: Charset | None = None) -> nn.Module:
    """The network that `model.name` names, with the checkpoints that the config names loaded.

    Args:
        charset: the characters that it reads; None takes those of `dataset.charset_path`.

    Raises:
        UserError: a checkpoint is missing or does not fit.
    """
    if config.model.kind == "ssn":
        model = build_ssn(config)
    else:
        build = {"vision": build_vision_network, "language": build_language_network, "recogniser": build_recogniser}
        model = build[config.model.kind](config, charset or build_charset(config))
    return _with_weights(model, config.model.checkpoint, config)


def build_recogniser(config: Config, charset: Charset) -> nn.Module:
    """Vision, language and alignment in `iter_size` rounds (BINet; ABINet without its masks)."""
    return BINet(
        vision=build_vision_model(config, charset),
        language=build_language_model(config, charset),
        alignment=build_alignment_model(config, charset),
        iter_size=config.model.iter_size,
    )


def build_vision_network(config: Config, charset: Charset) -> VisionRecogniser:
    """A vision model that reads alone."""
    return VisionRecogniser(build_vision_model(config, charset))


def build_language_network(config: Config, charset: Charset) -> LanguageRecogniser:
    """A language model that corrects spellings alone."""
    return LanguageRecogniser(build_language_model(config, charset))


def build_vision_model(config: Config, charset: Charset) -> VisionModel:
    """Backbone, mask branch where `model.vision.segmentation` is enabled, attention and classifier."""
    vision, size = config.model.vision, image_size(config)
    backbone = ResNet(
        stem_width=vision.stem_width,
        widths=vision.widths,
        depths=vision.depths,
        strides=vision.strides,
        mask_branch=vision.segmentation.enabled,
        side_channels=vision.segmentation.side_channels,
    )
    if vision.backbone == "transformer":
        backbone = TransformerBackbone(
            resnet=backbone,
            image_size=size,
            num_layers=vision.backbone_ln,
            nhead=vision.nhead,
            d_inner=vision.d_inner,
            dropout=vision.dropout,
            activation=vision.activation,
            positional_encoding=vision.positional_encoding,
        )
    common = {
        "backbone": backbone,
        "attention": build_attention(config, cells=backbone.output_size(size)),
        "num_classes": charset.num_classes,
        "image_size": size,
    }
    if not vision.segmentation.enabled:
        model = VisionModel(**common)
    else:
        blocks = ("normalize", "sft_blocks", "sft_channels", "condition_channels", "hidden_channels")
        model = MaskedVisionModel(**common, **{name: getattr(vision.segmentation, name) for name in blocks})
    return _with_weights(model, vision.checkpoint, config)


def build_attention(config: Config, *, cells: tuple[int, int]) -> nn.Module:
    """Attention over the cells (h, w) of the feature map, one map for each step of a text."""
    vision, steps = config.model.vision, config.dataset.max_length + 1
    if vision.attention == "attention":
        return ReadingOrderAttention(num_steps=steps, cells=cells, d_model=vision.d_model)
    return PositionAttention(
        num_steps=steps,
        cells=cells,
        d_model=vision.d_model,
        attention_channels=vision.attention_channels,
        attention_mode=vision.attention_mode,
    )


def build_language_model(config: Config, charset: Charset) -> LanguageModel:
    """The bidirectional cloze network (ABINet)."""
    language = config.model.language
    options = language.model_dump(exclude={"checkpoint", "loss_weight"})
    model = LanguageModel(num_classes=charset.num_classes, num_steps=config.dataset.max_length + 1, **options)
    return _with_weights(model, language.checkpoint, config)


def build_alignment_model(config: Config, charset: Charset) -> nn.Module:
    """The gate between vision and language."""
    return AlignmentModel(num_classes=charset.num_classes, d_model=config.model.alignment.d_model)


def build_ssn(config: Config) -> SSN:
    """The text segmentation network, with `model.ssn.checkpoint`."""
    options = config.model.ssn.model_dump(exclude={"checkpoint", "areas", "loss_weights"})
    return _with_weights(SSN(**options), config.model.ssn.checkpoint, config)


def build_charset(config: Config) -> Charset:
    """The characters that the network reads."""
    return Charset.from_file(config.dataset.charset_path)


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of the network's input, pixels."""
    return config.dataset.image_height, config.dataset.image_width


def with_checkpoint(config: Config, checkpoint: str | None) -> Config:
    """The config with these weights for the whole network and none for its sub-models."""
    config = config.model_copy(deep=True)
    config.model.checkpoint = checkpoint
    config.model.vision.checkpoint = config.model.language.checkpoint = None
    if config.model.kind == "ssn":
        config.model.ssn.checkpoint = None
    return config


def _with_weights(model: nn.Module, path: str | None, config: Config) -> nn.Module:
    if path is not None:
        state = read_checkpoint(path)
        load_weights(model, ssn_part(state) if isinstance(model, SSN) else state, path, strict=config.model.strict)
    return model


def build_criterion(config: Config) -> nn.Module:
    """The loss of the network that `model.name` names: `criterion(output, *batch.targets())` gives named terms."""
    if config.model.kind == "ssn":
        weights = config.model.ssn.loss_weights.model_dump()
        return SegmentationCriterion(weights=weights, ignore_index=config.dataset.segmentation.ignore_index)
    vision = config.model.vision
    weights = {
        "vision": vision.loss_weight,
        "language": config.model.language.loss_weight,
        "alignment": config.model.alignment.loss_weight,
    }
    if config.model.takes_masks:
        weights["refinement"] = vision.segmentation.loss_weight
    return RecogniserCriterion(weights=weights, refinement_threshold=vision.segmentation.threshold)


# --- optimisation -----------------------------------------------------------------------------------------------------


def build_schedule(config: Config, *, batches_per_epoch: int, iterations: int) -> Schedule:
    """Factor of the learning rate at each iteration."""
    scheduler = config.optimizer.scheduler
    if scheduler.type == "one_cycle":
        return one_cycle_schedule(iterations, scheduler.pct_start)
    if scheduler.type == "poly":
        schedule = poly_schedule(max(iterations - scheduler.warmup_iters, 1), scheduler.power)
    else:
        total, epochs = sum(scheduler.periods), config.training.epochs
        if config.training.iterations is None and total != epochs and distributed.is_main():
            logger.warning(
                "optimizer.scheduler.periods add up to %d epochs, training.epochs is %d: %s",
                total,
                epochs,
                "the last period goes on to the end" if total < epochs else "the run ends before the rate is through",
            )
        ends = [sum(scheduler.periods[: i + 1]) * batches_per_epoch for i in range(len(scheduler.periods) - 1)]
        schedule = step_schedule(ends, scheduler.gamma)
    return with_warmup(schedule, scheduler.warmup_iters)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over all parameters that learn."""
    settings = config.optimizer
    groups = parameter_groups(
        model,
        lr=settings.lr,
        weight_decay=settings.wd,
        decay_norms=settings.bn_wd,
        head_lr_factor=settings.head_lr_factor,
    )
    return make_optimizer(
        settings.type, groups, decoupled_decay=settings.true_wd and settings.wd > 0, **settings.args.model_dump()
    )


# --- data -------------------------------------------------------------------------------------------------------------


def build_label_rule(config: Config, *, case_sensitive: bool) -> LabelRule:
    """What the network is taught of a label."""
    return LabelRule(build_charset(config), max_length=config.dataset.max_length, case_sensitive=case_sensitive)


def build_training_data(config: Config, *, device: torch.device, process: Process) -> DataLoader:
    """Endless, resumable batches of the training roots.

    Raises:
        UserError: there are no roots, a root is missing, or images and masks do not belong together.
    """
    roots = config.dataset.train.roots
    if not roots:
        raise UserError("dataset.train.roots is empty; name the LMDBs to train on")
    open_sets = {"language": _open_language, "ssn": _open_segmentation}.get(config.model.kind, _open_words)
    datasets, collate = open_sets(config, roots, training=True, device=device)
    dataset = JoinedDataset(datasets)
    if not len(dataset):
        raise UserError(f"dataset.train.roots {roots} hold no usable sample; see the counts above")
    sampler = build_training_sampler(config, datasets, process=process)
    return make_loader(dataset, collate, batch_sampler=sampler, **_loading(config))


def build_training_sampler(config: Config, datasets: Sequence[Any], *, process: Process) -> ResumableBatchSampler:
    """The order of training samples: over all data sets alike, or by the shares of their roots."""
    train = config.dataset.train
    options = {"seed": config.run.seed or 0, "rank": process.rank, "world_size": process.world_size}
    if train.shares is None:
        sampler = ResumableBatchSampler(sum(map(len, datasets)), train.batch_size, **options)
    else:
        lengths = [sum(len(each) for each in datasets if each.root == place) for place in range(len(train.roots))]
        sampler = MixtureBatchSampler(lengths, train.shares, train.batch_size, length=train.length, **options)
    sampler.run_batches = config.training.iterations or config.training.epochs * len(sampler)
    return sampler


def build_evaluator(
    config: Config, *, device: torch.device, process: Process, model_eval: str, precision: str = "fp32"
) -> Evaluator:
    """Scores of the network on `dataset.test.roots`, each word once over all processes."""
    roots = config.dataset.test.roots
    if not roots:
        raise UserError("dataset.test.roots is empty; name the LMDBs to test on, or give --test_root")
    if config.model.kind == "ssn":
        return _build_segmentation_evaluator(config, device=device, process=process)
    open_sets = _open_language if config.model.kind == "language" else _open_words
    datasets, collate = open_sets(config, roots, training=False, device=device)
    loaders = {}
    for dataset in datasets:
        sampler = ShardedSampler(len(dataset), rank=process.rank, world_size=process.world_size)
        batch_size = config.dataset.test.batch_size
        loaders[dataset.name] = make_loader(
            dataset, collate, sampler=sampler, batch_size=batch_size, **_loading(config)
        )
    return WordEvaluator(
        loaders=loaders,
        filtered={dataset.name: dataset.filtered for dataset in datasets},
        charset=build_charset(config),
        protocol=evaluation_protocol(config),
        model_eval=model_eval,
        device=device,
        precision=precision,
        numbers={dataset.name: dataset.number for dataset in datasets if isinstance(dataset, WordDataset)},
    )


def _build_segmentation_evaluator(config: Config, *, device: torch.device, process: Process) -> SegmentationEvaluator:
    datasets, _ = _open_segmentation(config, config.dataset.test.roots, training=False, device=device)
    loaders = {}
    for dataset in datasets:
        sampler = ShardedSampler(len(dataset), rank=process.rank, world_size=process.world_size)
        batch_size = config.dataset.test.batch_size
        loaders[dataset.name] = make_loader(dataset, list, sampler=sampler, batch_size=batch_size, **_loading(config))
    return SegmentationEvaluator(
        loaders=loaders,
        filtered={dataset.name: dataset.filtered for dataset in datasets},
        areas=config.model.ssn.areas,
        device=device,
        ignore_index=config.dataset.segmentation.ignore_index,
    )


def build_segmenter(config: Config, *, device: torch.device | str) -> Segmenter:
    """The network that makes masks, for images of any size.

    Its weights are those of `model.ssn.checkpoint`, else those that `model.checkpoint` carries beside the recogniser. A
    checkpoint that carries its config is built by that one; `model.ssn` describes the network of any other, and its
    areas are taken where they are not the default ones.
    """
    path = segmenter_checkpoint(config)
    carried = build_carried_ssn(read_checkpoint(path), path)
    ssn, areas = carried or (build_ssn(config), config.model.ssn.areas)
    if config.model.ssn.areas != SSNConfig().areas:  # its own wish goes before what the checkpoint was trained for
        areas = config.model.ssn.areas
    return Segmenter(ssn, areas, device=device)


def segmenter_checkpoint(config: Config) -> str:
    """The file that holds the weights of the network that makes masks.

    Raises:
        UserError: the config names none.
    """
    if config.model.ssn.checkpoint is not None:
        return config.model.ssn.checkpoint
    if config.model.checkpoint is not None and "ssn" in read_checkpoint(config.model.checkpoint):
        return config.model.checkpoint
    raise UserError("model.ssn.checkpoint is not set; name the weights of the network that makes the masks")


def build_carried_ssn(state: Mapping[str, Any], path: Path | str) -> tuple[SSN, list[int]] | None:
    """The SSN that a checkpoint describes itself, and its areas; None where it describes none.

    Its weights and config are the checkpoint's own, or stand beside a recogniser's as `state["ssn"]`.

    Args:
        path: what the checkpoint was read from, for messages.
    """
    part = ssn_part(state)
    if "config" not in part:
        return None
    carried = Config.from_dict(part["config"], source=f"{path} (config)", drop_unknown=True)
    config = with_checkpoint(carried, None)
    if config.model.kind != "ssn":
        return None
    ssn = build_ssn(config)
    load_weights(ssn, part, path)
    return ssn, config.model.ssn.areas


def ssn_part(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint holds of the SSN: all of it, or what stands beside a recogniser."""
    return state.get("ssn", state)


def checked_model_eval(config: Config, wanted: str | None) -> str:
    """The sub-model to score: the one that was asked for, else the last one that the network has."""
    available = {"recogniser": SUB_MODELS, "ssn": ("ssn",)}.get(config.model.kind, (config.model.kind,))
    if wanted is not None and wanted not in available:
        raise UserError(f"--model_eval {wanted}: {config.model.name} has only {', '.join(available)}")
    return wanted or available[0]


def evaluation_protocol(config: Config) -> int:
    """Characters that a score is about: `dataset.eval_protocol`, else the charset's own where case counts, else 36."""
    if config.dataset.eval_protocol is not None:
        return config.dataset.eval_protocol
    size = len(build_charset(config))
    return size if config.dataset.eval_case_sensitive and size in PROTOCOLS else 36


def _open_words(config: Config, roots: list[str], *, training: bool, device: torch.device) -> tuple[list, Callable]:
    data, size = config.dataset, image_size(config)
    labels = build_label_rule(config, case_sensitive=data.case_sensitive if training else data.eval_case_sensitive)
    if training and not data.case_sensitive and any(map(str.isupper, labels.charset.characters)):
        logger.warning(
            "%s has upper case, but labels are lower-cased: set dataset.case_sensitive=true to train on it",
            data.charset_path,
        )
    resize = ResizeWord(size=size, fit=data.fit, random_aspect=training and data.multiscales)
    datasets = open_word_datasets(
        roots,
        labels=labels,
        transform=AUGMENTATIONS[data.data_aug](resize) if training and data.data_aug else resize,
        masks=_mask_source(config, device=device),
        seed=config.run.seed or 0,
        cache_dir=data.cache_dir or default_cache_dir(),
        min_side=MIN_TRAINING_SIDE if training else 1,
        length=data.train.length if training and data.train.shares is None else None,
        split=0 if training else 1,
        difficulty=data.train.difficulty if training else None,
        turn_tall=None if training else data.turn_tall,
    )
    return datasets, WordCollate(labels, size=size, with_masks=config.model.takes_masks)


def _mask_source(config: Config, *, device: torch.device) -> str | OnlineMasks | None:
    """Where masks come from, None for a network without."""
    masks = config.dataset.masks
    if not config.model.takes_masks:
        return None
    if masks.source == "online":
        # Worker processes have no share in the GPU: with workers SSN runs on their cores.
        segmenter = build_segmenter(config, device="cpu" if config.dataset.num_workers else device)
        if not masks.cache:
            return OnlineMasks(segmenter)
        folder = Path(config.dataset.cache_dir or default_cache_dir()) / "masks"
        return OnlineMasks(segmenter, cache_dir=folder, fingerprint=_mask_fingerprint(config, segmenter))
    only_rendered = all(root.startswith(RENDER_SCHEME) for root in config.dataset.train.roots)
    if masks.source == "lmdb" and masks.root is None and not (only_rendered and config.run.phase == "train"):
        raise UserError(
            "the network reads with masks and dataset.masks.root is not set; name the folder of mask LMDBs "
            "(tools/create_masks.py), or set dataset.masks.source=online and model.ssn.checkpoint"
        )
    if masks.source == "none":
        raise UserError("dataset.masks.source is none, but the network reads with masks; set lmdb or online")
    return masks.root or ""


def _mask_fingerprint(config: Config, segmenter: Segmenter) -> str:
    """What online masks depend on beside the image: weights, areas and precision."""
    weights = Path(segmenter_checkpoint(config)).read_bytes()
    settings = f"{segmenter.areas} {segmenter.precision}"
    return hashlib.sha256(weights + settings.encode()).hexdigest()[:16]


def _open_language(config: Config, roots: list[str], *, training: bool, device: torch.device) -> tuple[list, Callable]:
    data = config.dataset
    labels = build_label_rule(config, case_sensitive=data.case_sensitive)
    datasets = [
        LanguageDataset(
            root,
            labels=labels,
            use_sm=data.use_sm and training,
            smooth_label=data.smooth_label and training,
            smooth_factor=data.smooth_factor,
            seed=config.run.seed or 0,
            stream=number,
            root=number,
        )
        for number, root in enumerate(roots)
    ]
    return datasets, LanguageCollate(labels)


def _open_segmentation(
    config: Config, roots: list[str], *, training: bool, device: torch.device
) -> tuple[list, Callable]:
    settings = config.dataset.segmentation
    crop = CropSegmentation(
        size=tuple(settings.crop_size), scale_range=tuple(settings.scale_range), ignore_index=settings.ignore_index
    )
    datasets = open_segmentation_datasets(
        roots,
        transform=crop if training else None,
        mask_root=config.dataset.masks.root,
        ignore_index=settings.ignore_index,
        ignore_level=settings.ignore_level,
        seed=config.run.seed or 0,
    )
    return datasets, SegmentationCollate(size=tuple(settings.crop_size))


def _loading(config: Config) -> dict:
    data = config.dataset
    return {
        "num_workers": data.num_workers,
        "multiprocessing_context": data.multiprocessing_context,
        "pin_memory": data.pin_memory,
    }


# --- training ---------------------------------------------------------------------------------------------------------


def build_trainer(config: Config, *, device: torch.device, process: Process, resumed: bool = False) -> Trainer:
    """Everything that training needs, from data to callbacks.

    Args:
        resumed: the weights come from a checkpoint of the run itself: those that the config names are not loaded.
    """
    with distributed.main_first():  # it stores the indices of large LMDBs
        data = build_training_data(config, device=device, process=process)
        callbacks = build_callbacks(config, data=data, device=device, process=process)
    model = build_model(with_checkpoint(config, None) if resumed else config)
    model = distributed.synchronized(model, config.training.sync_batchnorm)
    # As a GPU's convolutions want their weights; before the optimiser makes momenta of the same form.
    model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    criterion = build_criterion(config)
    batches = len(data.batch_sampler)
    iterations = config.training.iterations or config.training.epochs * batches
    training = config.training
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(config, model),
        learning_rate_factor=build_schedule(config, batches_per_epoch=batches, iterations=iterations),
        data=data,
        batches_per_epoch=batches,
        iterations=iterations,
        device=device,
        process=process,
        callbacks=callbacks,
        precision=training.precision,
        accumulation=training.accumulation,
        clip_grad=config.optimizer.clip_grad,
        ema_decay=training.ema,
        compile_mode=training.compile_mode if training.compile else None,
        find_unused_parameters=0 in criterion.weights.values(),
        max_skipped_steps=training.max_skipped_steps,
        extra_state={"config": config.to_dict(), "charset": build_charset(config).characters},
    )


def build_callbacks(config: Config, *, data: DataLoader, device: torch.device, process: Process) -> list[Callback]:
    """What happens beside the loop, in the order in which it happens."""
    folder, name, training = config.work_folder, config.run.name, config.training
    tensorboard = TensorBoard(
        folder=folder / "tensorboard", interval=training.show_iters, most_images=training.log_images
    )
    callbacks = [
        Progress(interval=training.show_iters),
        History(path=folder / "history.jsonl", interval=training.show_iters),
        NotFiniteBatches(folder=folder),
        UnreadableSamples(dataset=data.dataset),
        tensorboard,
    ]
    if config.dataset.test.roots:
        evaluator = build_evaluator(
            config,
            device=device,
            process=process,
            model_eval=checked_model_eval(config, None),
            precision=training.precision,
        )
        callbacks.append(
            Evaluation(
                evaluator=evaluator,
                interval=training.eval_iters,
                start=training.start_iters,
                folder=folder,
                name=name,
                observers=[tensorboard],
            )
        )
    rhythm = {"interval": training.save_iters, "start": training.start_iters, "keep": training.keep_checkpoints}
    return [*callbacks, Checkpoints(folder=folder, name=name, **rhythm)]
