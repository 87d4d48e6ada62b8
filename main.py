"""Train and test: command line -> config -> build_* -> Trainer.fit / evaluate.

Examples:
    python main.py --config=configs/train.yaml
    python main.py --config=configs/train.yaml training.epochs=1 optimizer.lr=3e-4
    python main.py --config=configs/train.yaml --resume
    python main.py --config=configs/train.yaml --phase test --checkpoint weights.pth --test_root data/evaluation
    torchrun --nproc_per_node=8 main.py --config=configs/train.yaml
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from builders import (
    SUB_MODELS,
    build_charset,
    build_criterion,
    build_evaluator,
    build_model,
    build_trainer,
    checked_model_eval,
    evaluation_protocol,
    with_checkpoint,
)
from config import Config, continued, load_config, save_config
from engine import distributed
from engine.checkpoints import listed_checkpoints, load_training_state, resume_state
from engine.distributed import Process
from engine.precision import choose_algorithms, use_tf32
from engine.run_folder import claimed, log_to
from evaluation.dumps import AttentionImages, PredictionFiles
from evaluation.evaluator import write_scores
from evaluation.report import Report
from inference.prepare import prepare_for_inference
from loading.charset import protocol_normalizer
from utils import ArgumentParser, UserError, explain_full_disk, first_line, run_command_line, seed_everything

__all__ = ["build_criterion", "build_model", "main", "prepare_for_inference"]

logger = logging.getLogger("main")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    config = load_config(options.config, overrides_of(options))
    check_request(options, config)
    device = distributed.pick_device(options.local_rank)
    process = distributed.start(device.type)
    folder = config.work_folder
    use_tf32(config.training.tf32)
    choose_algorithms(deterministic=config.training.deterministic, search=config.run.phase == "train")
    if config.run.phase == "test":
        test(
            config,
            device=device,
            process=process,
            model_eval=options.model_eval,
            image_only=options.image_only,
            checkpoint=named_checkpoint(options, config),
        )
        status = 0
    else:
        with claimed(folder, process, keep=options.resume is not None), explain_full_disk(folder):
            status = train(config, device=device, process=process, resume=options.resume, debug=options.debug)
    distributed.barrier()  # a launcher ends all processes when one ends with a status, and the main one may be saving
    distributed.stop()  # not after a failure, see `run_command_line`
    return status


def train(
    config: Config, *, device: torch.device, process: Process, resume: str | None = None, debug: bool = False
) -> int:
    """Train what the config describes in its work folder.

    Args:
        resume: a checkpoint to go on from, or "" for the newest one.

    Returns:
        the exit status: 0, or 128 and the number of the signal that stopped the run, as shells have it.
    """
    folder = config.work_folder
    log_to(folder, process, debug=debug)
    seed_everything(config.run.seed or 0)
    torch.autograd.set_detect_anomaly(debug)
    state = resume_state(folder, config.run.name, resume, process) if resume is not None else None
    if state is not None:
        config = continued(config, state.get("config"))
    trainer = build_trainer(config, device=device, process=process, resumed=state is not None)
    seed_everything((config.run.seed or 0) + process.rank)  # equal weights everywhere, but not equal dropout
    if process.is_main:
        save_config(config, folder / "config.yaml")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        logger.info(
            "%s: %.2f M parameters, %d iterations, %s", config.model.name, parameters / 1e6, trainer.iterations, device
        )
    if state is not None:
        load_training_state(trainer, state)
        logger.info("resumed after iteration %d", trainer.iteration)
        state = None  # weights and momenta, which would stay in memory to the end
    try:
        trainer.fit()
    except RuntimeError as error:
        if "deterministic" not in str(error) or not config.training.deterministic:
            raise
        raise UserError(f"training.deterministic: torch cannot ({first_line(error)}); set it to false") from error
    return 0 if trainer.stop_signal is None else 128 + trainer.stop_signal


def test(
    config: Config,
    *,
    device: torch.device,
    process: Process,
    model_eval: str | None,
    image_only: bool,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Evaluate on every test set: scores, prediction files, report and attention images in the work folder.

    Args:
        checkpoint: the weights; None: the run's best, else, where nothing was trained, `model.checkpoint`.
    """
    folder = config.work_folder
    log_to(folder, process)
    model_eval = checked_model_eval(config, model_eval)
    checkpoint = checkpoint or weights_to_test(config)
    # In float32 and not compiled the fast form gives the network's own answers, at no start-up cost.
    model = build_model(with_checkpoint(config, checkpoint)).to(device)
    model = prepare_for_inference(model, precision="fp32", compile=False)
    evaluator = build_evaluator(config, device=device, process=process, model_eval=model_eval)
    if process.is_main and not (folder / "config.yaml").exists():  # that of a training stays
        save_config(config, folder / "config.yaml")
    observers = []
    if config.model.kind != "ssn":
        normalize = protocol_normalizer(evaluation_protocol(config))
        observers.append(PredictionFiles(folder=folder, model_eval=model_eval, normalize=normalize))
        observers.append(
            Report(
                folder=folder / "report",
                title=config.run.name,
                details={"network": config.model.name, "weights": checkpoint},
                charset=build_charset(config),
                normalize=normalize,
                with_attention=not image_only,
                rank=process.rank,
            )
        )
        if not image_only:
            observers.append(AttentionImages(folder=folder, model_eval=model_eval))
    scores = evaluator.evaluate(model, observers) | {"checkpoint": checkpoint}
    if process.is_main:
        for file in ("metrics", f"metrics-{model_eval}"):  # the last test, and the last one of this sub-model
            write_scores(folder, scores, evaluator.columns, name=file)
        print(evaluator.table(scores))
        logger.info("scores, predictions and report (report/index.html) are in %s", folder)
    return scores


def named_checkpoint(options: argparse.Namespace, config: Config) -> str | None:
    """The weights that the command line names, be it as `--checkpoint` or as `model.checkpoint=FILE`."""
    keys = [override.partition("=")[0].strip() for override in overrides_of(options)]
    return config.model.checkpoint if "model.checkpoint" in keys else None


def weights_to_test(config: Config) -> str:
    """The run's best weights; `model.checkpoint`, which a run starts from, where nothing was trained."""
    folder, name = config.work_folder, config.run.name
    best, start = folder / f"best-{name}.pth", config.model.checkpoint
    if best.is_file():
        logger.info("testing %s", best)
        return str(best)
    if saved := listed_checkpoints(folder, name):
        raise UserError(f"{best} does not exist: give the weights to test, such as --checkpoint {folder / saved[-1]}")
    if start is None:
        raise UserError(f"there are no weights to test: give --checkpoint, or train first ({best} does not exist)")
    logger.info("nothing was trained in %s: testing model.checkpoint, %s", folder, start)
    return start


# --- the command line -------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The published flags and ours; see `--help`."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="what to build and how (configs/)")
    parser.add_argument("--phase", choices=("train", "test"), help="train, or evaluate only")
    parser.add_argument("--name", help="name of the run: its folder below global.workdir")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of the whole network to start from or to test")
    parser.add_argument("--test_root", action="append", metavar="LMDB", help="test set, or folder of them; repeatable")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="accepted for the old launcher; torchrun is the way"
    )
    parser.add_argument("--debug", action="store_true", help="no workers, anomaly detection, verbose log")
    parser.add_argument("--image_only", action="store_true", help="test: write no attention images")
    parser.add_argument(
        "--model_strict",
        nargs="?",
        const="false",
        metavar="{true,false}",
        help="false (or no value): load what fits of a checkpoint",
    )
    parser.add_argument("--model_eval", choices=SUB_MODELS, help="sub-model to score")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="go on from FILE or the newest checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, YAML values")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand anywhere
    # An override behind a flag whose value may be left out is no value of it.
    if options.resume and "=" in options.resume and not Path(options.resume).exists():
        options.overrides.append(options.resume)
        options.resume = ""
    if options.model_strict and "=" in options.model_strict:
        options.overrides.append(options.model_strict)
        options.model_strict = "false"
    if options.model_strict not in (None, "true", "false"):
        parser.error(f"argument --model_strict: {options.model_strict!r} is neither true nor false")
    return options


def check_request(options: argparse.Namespace, config: Config) -> None:
    """Raises `UserError` for what would be ignored: a flag of the other phase, a stage that is not built."""
    if config.run.phase == "test":
        if options.resume is not None:
            raise UserError("--resume goes on with a training; in a test give the weights with --checkpoint FILE")
        return
    scored = checked_model_eval(config, None)
    if options.model_eval not in (None, scored):
        raise UserError(f"--model_eval {options.model_eval}: training scores {scored}; give it with --phase test")
    if config.run.stage == "train-semi-super":
        raise UserError("global.stage: train-semi-super is not built; set train-super to train on labelled words alone")


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The flags as overrides of config keys, before those that are given as such."""
    flags = {
        "global.phase": options.phase,
        "global.name": options.name,
        "dataset.test.roots": options.test_root,
        "model.checkpoint": options.checkpoint,
        "model.strict": {"true": True, "false": False}.get(options.model_strict),
        "dataset.num_workers": 0 if options.debug else None,
    }
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None] + options.overrides


if __name__ == "__main__":
    run_command_line(main)
