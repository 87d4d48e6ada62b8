"""Build networks, losses and optimisers from a config; `run_builders.py` builds data, evaluators and trainers.

Networks, losses, data sets and optimisers are built from a config in these two files only: their classes take named
values, and configs hold only values.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import Config, differing, function_differences
from engine import distributed
from engine.checkpoints import load_weights, read_checkpoint
from engine.optimization import (
    Schedule,
    cosine_schedule,
    make_optimizer,
    one_cycle_schedule,
    parameter_groups,
    poly_schedule,
    step_schedule,
    with_warmup,
)
from inference.segmenter import Segmenter
from loading.charset import Charset
from losses import RecogniserCriterion, SegmentationCriterion
from modules.attention import PositionAttention, ReadingOrderAttention
from modules.backbone import ResNet, TransformerBackbone
from modules.hrnet import HRNet
from modules.model_alignment import AlignmentModel
from modules.model_binet_iter import BINet, LanguageRecogniser, VisionRecogniser
from modules.model_language import LanguageModel
from modules.model_vision import MaskedVisionModel, VisionModel
from modules.ssn import SSN
from schema import LanguageConfig, SSNConfig, VisionConfig
from utils import UserError

logger = logging.getLogger(__name__)

SUB_MODELS = ("alignment", "vision", "language")
KEYS_SHOWN = 3  # of those in which a config differs from a checkpoint's
# Keys of `model` that change no tensor's shape, and the section of another network.
NOT_OF_THE_NETWORK = {"activation", "areas", "attention_mode", "checkpoint", "detach", "dropout", "freeze"} | {
    *("iter_size", "loss_weight", "nhead", "normalize", "ssn", "strict", "threshold")
}

# --- networks ---------------------------------------------------------------------------------------------------------


def build_model(config: Config, charset: Charset | None = None) -> nn.Module:
    """Return the network that `model.name` names, with the checkpoints that the config names loaded.

    Args:
        charset: its characters; None: those of `dataset.charset_path`.

    Raises:
        UserError: a checkpoint is missing, does not fit, or has another charset.
    """
    kind = config.model.kind
    if kind == "ssn":
        return _with_weights(build_ssn(config), config.model.checkpoint, config)
    charset = charset or build_charset(config)
    if kind == "vision":
        model = VisionRecogniser(build_vision_model(config, charset))
    elif kind == "language":
        model = LanguageRecogniser(build_language_model(config, charset))
    else:
        parts = {"vision": build_vision_model(config, charset), "language": build_language_model(config, charset)}
        alignment = AlignmentModel(num_classes=charset.num_classes, d_model=config.model.alignment.d_model)
        alignment.requires_grad_(not config.model.alignment.freeze)
        model = BINet(**parts, alignment=alignment, iter_size=config.model.iter_size)
    return _with_weights(model, config.model.checkpoint, config, charset=charset)


def build_vision_model(config: Config, charset: Charset) -> VisionModel:
    """Return backbone, mask blocks if `model.vision.segmentation` is enabled, attention and classifier."""
    vision, size = config.model.vision, config.dataset.image_size
    masks, options = vision.segmentation, vision.model_dump(include={"stem_width", "widths", "depths", "strides"})
    backbone = ResNet(mask_branch=masks.enabled, side_channels=masks.side_channels, **options)
    if vision.backbone == "transformer":
        options = vision.model_dump(include={"nhead", "d_inner", "dropout", "activation", "positional_encoding"})
        backbone = TransformerBackbone(resnet=backbone, image_size=size, num_layers=vision.backbone_ln, **options)
    common = {
        "backbone": backbone,
        "attention": build_attention(config, cells=backbone.output_size(size)),
        "num_classes": charset.num_classes,
        "image_size": size,
    }
    if not masks.enabled:
        model = VisionModel(**common)
    else:
        blocks = {"normalize", "sft_blocks", "sft_channels", "condition_channels", "hidden_channels"}
        model = MaskedVisionModel(**common, **masks.model_dump(include=blocks))
    return _started(model, vision, config, "model.vision", charset)


def build_attention(config: Config, *, cells: tuple[int, int]) -> nn.Module:
    """Return attention over the cells (h, w) of the feature map, with one map for each step of a text."""
    vision = config.model.vision
    common = {"num_steps": config.dataset.max_length + 1, "cells": cells, "d_model": vision.d_model}
    if vision.attention == "attention":
        return ReadingOrderAttention(**common)
    return PositionAttention(**common, **vision.model_dump(include={"attention_channels", "attention_mode"}))


def build_language_model(config: Config, charset: Charset) -> LanguageModel:
    """Return the bidirectional cloze network (ABINet)."""
    language = config.model.language
    options = language.model_dump(exclude={"checkpoint", "freeze", "loss_weight"})
    model = LanguageModel(num_classes=charset.num_classes, num_steps=config.dataset.max_length + 1, **options)
    return _started(model, language, config, "model.language", charset)


def build_ssn(config: Config) -> SSN:
    """Return the text segmentation network, with the weights of `model.ssn.checkpoint`."""
    settings = config.model.ssn
    hrnet = HRNet(**settings.model_dump(exclude={"checkpoint", "areas", "head_width"}))
    return _with_weights(SSN(hrnet, head_width=settings.head_width), settings.checkpoint, config)


def build_charset(config: Config) -> Charset:
    """Return the characters of the network."""
    return Charset.from_file(config.dataset.charset_path)


def with_checkpoint(config: Config, checkpoint: str | None) -> Config:
    """Return the config with these weights for the whole network and none for its sub-models."""
    config = config.model_copy(deep=True)
    config.model.checkpoint = checkpoint
    config.model.vision.checkpoint = config.model.language.checkpoint = None
    if config.model.kind == "ssn":
        config.model.ssn.checkpoint = None
    return config


def _with_weights(
    model: nn.Module, path: str | None, config: Config, section: str = "model", charset: Charset | None = None
) -> nn.Module:
    """Load the weights of `path`, if any, into the network that this section of the config describes."""
    if path is not None:
        state = read_checkpoint(path)
        if isinstance(model, SSN):
            state, section = ssn_part(state), "model.ssn"
        if charset is not None:
            check_charset(state, path, charset, config)
        load_described(model, state, path, config, section, strict=config.model.strict)
        tested = config.run.phase == "test" and section == "model"
        if tested and (changed := _phrases(function_differences(config, state.get("config")))):
            logger.warning("checkpoint %s is tested with other settings than its own: %s", path, "; ".join(changed))
    return model


def check_charset(state: Mapping[str, Any], path: Path | str, charset: Charset, config: Config) -> None:
    """Check that the classes of a checkpoint are the network's characters, if the checkpoint says what they are.

    Without `model.strict`, a network of another number of classes may take what fits.

    Raises:
        UserError: they are others, or in another order.
    """
    theirs, ours = state.get("charset"), charset.characters
    if not isinstance(theirs, str) or theirs == ours or (len(theirs) != len(ours) and not config.model.strict):
        return
    place, (there, here) = next(
        (place, pair) for place, pair in enumerate(itertools.zip_longest(theirs, ours)) if pair[0] != pair[1]
    )
    raise UserError(
        f"{path}: its charset is not that of dataset.charset_path, {config.dataset.charset_path}: with id {place} it "
        f"has {there!r}, not {here!r}; set dataset.charset_path to the file that it was trained with"
    )


def load_described(
    model: nn.Module,
    state: Mapping[str, Any],
    path: Path | str,
    config: Config,
    section: str = "model",
    *,
    strict: bool = True,
) -> None:
    """Load a checkpoint as `load_weights` does; an error names keys of the section that differ in its own config."""
    try:
        load_weights(model, state, path, strict=strict)
    except UserError as error:
        ours, theirs = config.to_dict(), state.get("config")
        for name in section.split("."):
            ours, theirs = ours[name], theirs.get(name) if isinstance(theirs, Mapping) else None
        keys = _phrases(differing(ours, theirs, section, NOT_OF_THE_NETWORK))
        if not keys:
            raise
        raise UserError(f"{error}. {'; '.join(keys[:KEYS_SHOWN])}") from error


def _phrases(differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return what to say of keys that a checkpoint's config has otherwise: (key, its value, ours)."""
    return [f"{key} is {theirs} in its config, {ours} here" for key, theirs, ours in differences]


def _started(
    model: nn.Module, section: VisionConfig | LanguageConfig, config: Config, name: str, charset: Charset
) -> nn.Module:
    """Load the checkpoint of a sub-model's section, and freeze the sub-model if the section says so."""
    return _with_weights(model, section.checkpoint, config, name, charset).requires_grad_(not section.freeze)


def checked_model_eval(config: Config, requested: str | None) -> str:
    """Return the sub-model to score: the requested one, else the last one that the network has."""
    available = {"recogniser": SUB_MODELS, "ssn": ("ssn",)}.get(config.model.kind, (config.model.kind,))
    if requested is not None and requested not in available:
        raise UserError(f"--model_eval {requested}: {config.model.name} has only {', '.join(available)}")
    return requested or available[0]


# --- masks ------------------------------------------------------------------------------------------------------------


def build_segmenter(config: Config, *, device: torch.device | str) -> Segmenter:
    """Return the network that makes masks, for images of any size; for weights and areas see `build_mask_maker`."""
    return Segmenter(*build_mask_maker(config), device=device)


def build_mask_maker(config: Config) -> tuple[SSN, tuple[int, ...]]:
    """Return the SSN that makes masks, and its areas.

    Its weights are those of `model.ssn.checkpoint`, else those that `model.checkpoint` carries beside the recogniser.
    If the checkpoint carries a config, that describes the network, else `model.ssn` does. Areas that differ from the
    default in `model.ssn` are used in any case.

    Raises:
        UserError: the config names no weights.
    """
    path = config.model.ssn.checkpoint or config.model.checkpoint
    state = {} if path is None else read_checkpoint(path)
    if config.model.ssn.checkpoint is None and "ssn" not in state:
        raise UserError("model.ssn.checkpoint: missing; name the weights of the SSN that makes the masks")
    carried = build_carried_ssn(state, path)
    ssn, areas = carried or (build_ssn(config), None)
    return ssn, _areas_of(config, areas)


def build_carried_ssn(state: Mapping[str, Any], path: Path | str) -> tuple[SSN, tuple[int, ...]] | None:
    """Return the SSN that a checkpoint describes, in eval mode, and its areas; None if it describes none.

    Its weights and config are the checkpoint's own, or stand beside a recogniser's as `state["ssn"]`.

    Args:
        path: what the checkpoint was read from, for messages.
    """
    config = _carried_ssn_config(state, path)
    if config is None:
        return None
    ssn = build_ssn(config)
    load_weights(ssn, ssn_part(state), path)
    return ssn.eval().requires_grad_(False), tuple(config.model.ssn.areas)


def areas_to_test(config: Config, checkpoint: str) -> list[int]:
    """Return the areas that an SSN is tested with: those of the config, or at its default those of the checkpoint."""
    carried = _carried_ssn_config(read_checkpoint(checkpoint), checkpoint)
    return list(_areas_of(config, carried and carried.model.ssn.areas))


def _areas_of(config: Config, carried: Sequence[int] | None) -> tuple[int, ...]:
    areas = config.model.ssn.areas
    return tuple(areas if carried is None or areas != SSNConfig().areas else carried)


def _carried_ssn_config(state: Mapping[str, Any], path: Path | str) -> Config | None:
    """Return the config of the SSN in a checkpoint, without the weights that it started from; None if it has none."""
    part = ssn_part(state)
    if "config" not in part:
        return None
    carried = Config.from_dict(part["config"], source=f"{path} (config)", drop_unknown=True)
    return with_checkpoint(carried, None) if carried.model.kind == "ssn" else None


def ssn_part(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a checkpoint that belongs to the SSN: the part beside a recogniser, else all of it."""
    return state.get("ssn", state)


# --- losses and optimisation ------------------------------------------------------------------------------------------


def build_criterion(config: Config) -> nn.Module:
    """Return the loss of the network that `model.name` names: `criterion(output, *batch.targets())` -> named terms."""
    if config.model.kind == "ssn":
        return SegmentationCriterion()
    vision = config.model.vision
    weights = {
        "vision": vision.loss_weight,
        "language": config.model.language.loss_weight,
        "alignment": config.model.alignment.loss_weight,
    }
    if config.model.takes_masks:
        weights["refinement"] = vision.segmentation.loss_weight
    return RecogniserCriterion(weights=weights, refinement_threshold=vision.segmentation.threshold)


def build_schedule(config: Config, *, batches_per_epoch: int, iterations: int) -> Schedule:
    """Return the factor on the learning rate at each iteration."""
    scheduler = config.optimizer.scheduler
    if scheduler.type == "one_cycle":
        return one_cycle_schedule(iterations, scheduler.pct_start)
    falling = max(iterations - scheduler.warmup_iters, 1)  # iterations after the warm-up
    if scheduler.type == "poly":
        schedule = poly_schedule(falling, scheduler.power)
    elif scheduler.type == "cosine":
        schedule = cosine_schedule(falling)
    else:
        total, epochs = sum(scheduler.periods), config.training.epochs
        if config.training.iterations is None and total != epochs and distributed.is_main():
            logger.warning("optimizer.scheduler.periods add up to %d epochs, training.epochs is %d", total, epochs)
        ends = [epoch * batches_per_epoch for epoch in itertools.accumulate(scheduler.periods[:-1])]
        schedule = step_schedule([end - scheduler.warmup_iters for end in ends], scheduler.gamma)
    return with_warmup(schedule, scheduler.warmup_iters)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters that are trained."""
    settings = config.optimizer
    groups = parameter_groups(
        model, lr=settings.lr, weight_decay=settings.wd, decay_norms=settings.bn_wd, lr_factors=settings.lr_groups
    )
    decoupled = settings.true_wd and settings.wd > 0
    return make_optimizer(
        settings.type, groups, lr=settings.lr, decoupled_decay=decoupled, **settings.args.model_dump()
    )
