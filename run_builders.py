"""Build what a run needs from a config: data, evaluators, callbacks and the trainer.

Networks, losses and optimisers are built in `builders.py`.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from builders import (
    build_charset,
    build_criterion,
    build_model,
    build_optimizer,
    build_schedule,
    build_segmenter,
    checked_model_eval,
    with_checkpoint,
)
from callbacks import Callback, Checkpoints, Evaluation, MetricLog, UnreadableSamples
from config import Config, mask_problems
from dataset import JoinedDataset, LanguageDataset, WordDataset, open_segmentation_datasets, open_word_datasets
from engine import distributed
from engine.distributed import Process
from engine.trainer import Trainer
from engine.writers import Console, History, TensorBoard, WeightsAndBiases, Writer
from evaluation.dumps import AttentionImages, PredictionFiles
from evaluation.evaluator import Evaluator, SegmentationEvaluator, WordEvaluator
from evaluation.lexicon import Lexicon, StoredLexicons, read_lexicon
from evaluation.report import Report
from inference.segmenter import Segmenter
from loading.augmentation import AugmentWord, CropSegmentation, RandAugmentWord
from loading.batches import LabelRule, LanguageCollate, WordCollate, collate_segmentation
from loading.charset import PROTOCOLS, Charset
from loading.sampling import MixtureBatchSampler, ResumableBatchSampler
from loading.transforms import ResizeWord
from loading.word_index import default_cache_dir
from loading.workers import make_loader
from utils import RENDER_SCHEME, UserError

logger = logging.getLogger(__name__)

SPLITS = TRAIN, TEST, VALID = "train", "test", "valid"  # of `dataset`; render:// roots have other words in each
AUGMENTATIONS = {True: AugmentWord, "rand": RandAugmentWord}  # by dataset.data_aug
MIN_TRAINING_SIDE = 7  # pixels; words of smaller images are left out of training, as published

# --- training data ----------------------------------------------------------------------------------------------------


def build_training_data(config: Config, *, device: torch.device, process: Process) -> DataLoader:
    """Return endless, resumable batches of the training roots.

    Raises:
        UserError: there are no roots, a root is missing, or images and masks do not belong together.
    """
    roots = config.dataset.train.roots
    if not roots:
        raise UserError("dataset.train.roots is empty; name the LMDBs to train on")
    open_sets = {"language": _open_language, "ssn": _open_segmentation}.get(config.model.kind, _open_words)
    datasets, collate = open_sets(config, roots, split=TRAIN, device=device)
    dataset = JoinedDataset(datasets)
    if not len(dataset):
        raise UserError(f"dataset.train.roots {roots} hold no usable sample; see the counts above")
    sampler = build_training_sampler(config, datasets, process=process)
    return make_loader(dataset, collate, batch_sampler=sampler, **_loading(config))


def build_training_sampler(config: Config, datasets: Sequence[Any], *, process: Process) -> ResumableBatchSampler:
    """Return the order of training samples: over all data sets alike, or by the shares of their roots."""
    train = config.dataset.train
    options = {"seed": config.run.seed, "rank": process.rank, "world_size": process.world_size}
    if train.shares is None:
        sampler = ResumableBatchSampler(sum(map(len, datasets)), train.batch_size, **options)
    else:
        lengths = [sum(len(each) for each in datasets if each.root == place) for place in range(len(train.roots))]
        options |= {"lengths": lengths, "shares": train.shares, "length": train.length}
        sampler = MixtureBatchSampler(train.batch_size, **options)
    sampler.run_batches = config.training.iterations or config.training.epochs * len(sampler)
    return sampler


def _open_words(config: Config, roots: list[str], *, split: str, device: torch.device) -> tuple[list, Callable]:
    data, training = config.dataset, split == TRAIN
    case_sensitive = data.case_sensitive if training else data.eval_case_sensitive
    labels = LabelRule(build_charset(config), max_length=data.max_length, case_sensitive=case_sensitive)
    if training and not data.case_sensitive and len(labels.charset.folded()) < len(labels.charset):
        logger.warning(
            "%s has upper case, but labels are lower-cased: set dataset.case_sensitive=true to train on it",
            data.charset_path,
        )
    resize = ResizeWord(size=data.image_size, fit=data.fit, random_aspect=training and data.multiscales)
    datasets = open_word_datasets(
        roots,
        labels=labels,
        transform=AUGMENTATIONS[data.data_aug](resize) if training and data.data_aug else resize,
        masks=_mask_source(config, roots, device=device),
        seed=config.run.seed,
        cache_dir=data.cache_dir or default_cache_dir(),
        min_side=MIN_TRAINING_SIDE if training else 1,
        length=data.train.length if training and data.train.shares is None else None,
        split=SPLITS.index(split),
        difficulty=data.train.difficulty if training else None,
        turn_tall=None if training else data.turn_tall,
    )
    return datasets, WordCollate(labels)


def _mask_source(config: Config, roots: Sequence[str], *, device: torch.device) -> str | Segmenter | None:
    """Return the source of the masks of words from `roots`; None for a network that takes none."""
    masks = config.dataset.masks
    if not config.model.takes_masks:
        return None
    if masks.source == "none":
        raise UserError("dataset.masks.source: none, but the network takes masks; set lmdb or online")
    if masks.source == "online":
        # Worker processes cannot use the GPU: with workers, SSN runs on their cores.
        return build_segmenter(config, device="cpu" if config.dataset.num_workers else device)
    if not all(root.startswith(RENDER_SCHEME) for root in roots):
        for key, message in mask_problems(config):
            raise UserError(f"{key}: {message}")
    return masks.root or ""


def _open_language(config: Config, roots: list[str], *, split: str, device: torch.device) -> tuple[list, Callable]:
    data = config.dataset
    labels = LabelRule(build_charset(config), max_length=data.max_length, case_sensitive=data.case_sensitive)
    options = {
        "labels": labels,
        "use_sm": data.use_sm and split == TRAIN,
        "smooth_label": data.smooth_label and split == TRAIN,
        "smooth_factor": data.smooth_factor,
        "seed": config.run.seed,
    }
    datasets = [LanguageDataset(root, stream=number, root=number, **options) for number, root in enumerate(roots)]
    return datasets, LanguageCollate(labels)


def _open_segmentation(config: Config, roots: list[str], *, split: str, device: torch.device) -> tuple[list, Callable]:
    settings = config.dataset.segmentation
    crop = CropSegmentation(size=tuple(settings.crop_size), scale_range=tuple(settings.scale_range))
    datasets = open_segmentation_datasets(
        roots,
        transform=crop if split == TRAIN else None,
        mask_root=config.dataset.masks.root,
        ignore_level=settings.ignore_level,
        seed=config.run.seed,
    )
    return datasets, collate_segmentation


def _loading(config: Config) -> dict:
    return config.dataset.model_dump(include={"num_workers", "multiprocessing_context", "pin_memory"})


# --- evaluation -------------------------------------------------------------------------------------------------------


def build_evaluator(
    config: Config,
    *,
    device: torch.device,
    process: Process,
    model_eval: str,
    precision: str = "fp32",
    split: str = TEST,
) -> Evaluator:
    """Return the evaluator of the roots of `dataset.test` or `dataset.valid`; each word counts once over all processes.

    Raises:
        UserError: there are no roots, or one is missing.
    """
    settings = getattr(config.dataset, split)
    if not settings.roots:
        raise UserError(f"dataset.{split}.roots is empty; name the LMDBs to test on, or give --test_root")
    open_sets = {"language": _open_language, "ssn": _open_segmentation}.get(config.model.kind, _open_words)
    datasets, collate = open_sets(config, settings.roots, split=split, device=device)
    is_ssn = config.model.kind == "ssn"
    loaders = {}
    for dataset in datasets:
        first, end = (rank * len(dataset) // process.world_size for rank in (process.rank, process.rank + 1))
        options = {"sampler": range(first, end), "batch_size": settings.batch_size}  # this process's share
        loaders[dataset.name] = make_loader(dataset, list if is_ssn else collate, **options, **_loading(config))
    filtered = {dataset.name: dataset.filtered for dataset in datasets}
    common = {"loaders": loaders, "filtered": filtered, "device": device}
    if is_ssn:
        return SegmentationEvaluator(areas=config.model.ssn.areas, **common)
    # During training every evaluation costs training time; a language model is given no image.
    augments = config.run.phase == "test" and config.model.kind != "language"
    return WordEvaluator(
        charset=build_charset(config),
        protocol=evaluation_protocol(config),
        model_eval=model_eval,
        precision=precision,
        tta_below=config.dataset.tta_below if augments else 0.0,
        numbers={dataset.name: dataset.number for dataset in datasets if isinstance(dataset, WordDataset)},
        lexicons=_build_lexicons(config, datasets, split=split),
        **common,
    )


def _build_lexicons(config: Config, datasets: Sequence[Any], *, split: str) -> dict[str, Callable[[int], Lexicon]]:
    """Return name of a test set -> number of a word -> the list that its prediction is chosen from."""
    settings = getattr(config.dataset, split)
    if settings.lexicon is None:
        return {}
    make = functools.partial(
        Lexicon,
        charset=build_charset(config),
        steps=config.dataset.max_length + 1,
        match=settings.lexicon_match,
        protocol=evaluation_protocol(config),
    )
    if Path(settings.lexicon).is_file():
        lexicon = make(read_lexicon(settings.lexicon))
        return {dataset.name: lambda number: lexicon for dataset in datasets}
    for dataset in datasets:
        if not isinstance(dataset, WordDataset):
            raise UserError(
                f"dataset.{split}.lexicon {settings.lexicon}: is not a file, and {dataset.name} is not an LMDB of words"
            )
    return {dataset.name: StoredLexicons(dataset.reader, settings.lexicon, make) for dataset in datasets}


def evaluation_protocol(config: Config) -> Charset:
    """Return the characters that are compared: those of `dataset.eval_protocol`, or by default what suits the charset.

    All of them are compared if case counts, or if some are in no published protocol (another language); else 36.
    """
    settings, charset = config.dataset, build_charset(config)
    if settings.eval_protocol is not None:
        return Charset(PROTOCOLS[settings.eval_protocol])
    if settings.eval_case_sensitive:
        return charset
    is_published = set(PROTOCOLS[94] + " ").issuperset(charset.characters)
    return Charset(PROTOCOLS[36]) if is_published else charset.folded()


def build_observers(
    config: Config, *, process: Process, model_eval: str, image_only: bool, weights: str
) -> list[PredictionFiles | Report | AttentionImages]:
    """Return what a test of `weights` writes besides scores: prediction files, report, attention images if wanted."""
    if config.model.kind == "ssn":
        return []
    protocol = evaluation_protocol(config)
    report = Report(
        folder=config.work_folder / "report",
        title=config.run.name,
        details={"network": config.model.name, "weights": weights},
        charset=build_charset(config),
        protocol=protocol,
        with_attention=not image_only,
        rank=process.rank,
    )
    common = {"folder": config.work_folder, "model_eval": model_eval}
    files = [PredictionFiles(normalize=protocol.normalize, **common), report]
    return files if image_only else [*files, AttentionImages(**common)]


# --- training ---------------------------------------------------------------------------------------------------------


def build_trainer(config: Config, *, device: torch.device, process: Process, resumed: bool = False) -> Trainer:
    """Return the trainer with all that it needs, from data to callbacks.

    Args:
        resumed: the weights come from a checkpoint of the run itself: those that the config names are not loaded.
    """
    with distributed.main_first():  # it stores the indices of large LMDBs
        data = build_training_data(config, device=device, process=process)
        callbacks = build_callbacks(config, data=data, device=device, process=process)
    model = build_model(with_checkpoint(config, None) if resumed else config)
    model = distributed.synchronized(model, config.training.sync_batchnorm)
    # The layout that convolutions are fastest in; before the optimiser makes momenta in the same one.
    model.to(device, memory_format=torch.channels_last)
    criterion, sampler, training = build_criterion(config), data.batch_sampler, config.training
    length = {"batches_per_epoch": len(sampler), "iterations": sampler.run_batches}
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(config, model),
        learning_rate_factor=build_schedule(config, **length),
        data=data,
        **length,
        device=device,
        process=process,
        callbacks=callbacks,
        precision=training.precision,
        accumulation=training.accumulation,
        clip_grad=config.optimizer.clip_grad,
        ema_decay=training.ema,
        compile_mode=training.compile_mode if training.compile else None,
        find_unused_parameters=0 in criterion.weights.values(),
        extra_state={"config": config.to_dict(), "charset": build_charset(config).characters},
    )


def build_callbacks(config: Config, *, data: DataLoader, device: torch.device, process: Process) -> list[Callback]:
    """Return the callbacks of training, in the order in which they run."""
    folder, training = config.work_folder, config.training
    common = {"folder": folder, "name": config.run.name, "start": training.start_iters}
    writers: list[Writer] = [Console(), History(folder / "history.jsonl"), TensorBoard(folder / "tensorboard")]
    if training.wandb is not None:
        about = {"name": config.run.name, "folder": folder, "config": config.to_dict()}
        writers.append(WeightsAndBiases(training.wandb, **about))
    metric_log = MetricLog(writers=writers, interval=training.show_iters)

    def interval(iterations: int | str) -> int:
        return len(data.batch_sampler) if iterations == "epoch" else iterations

    callbacks = [metric_log, UnreadableSamples(dataset=data.dataset)]
    split = VALID if config.dataset.valid.roots else TEST
    if split == TEST and config.dataset.test.roots and process.is_main:
        logger.warning(
            "dataset.valid.roots is empty: dataset.test.roots choose the best weights, as in the published code; name "
            "other words there to keep the test sets unseen"
        )
    if getattr(config.dataset, split).roots:
        scored = {"model_eval": checked_model_eval(config, None), "precision": training.precision, "split": split}
        evaluator = build_evaluator(config, device=device, process=process, **scored)
        often = {"interval": interval(training.eval_iters), **common}
        callbacks.append(Evaluation(evaluator=evaluator, observers=[metric_log], **often))
    often = {"interval": interval(training.save_iters), **common}
    return [*callbacks, Checkpoints(keep=training.keep_checkpoints, **often)]
