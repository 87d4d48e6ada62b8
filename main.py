"""Train and test: command line -> config -> build_* -> Trainer.fit / evaluate.

Examples:
    python main.py --config=configs/train.yaml
    python main.py --config=configs/train.yaml training.epochs=1 optimizer.lr=3e-4
    python main.py --config=configs/train.yaml --resume
    python main.py --config=configs/train.yaml --phase test --checkpoint weights.pth
    torchrun --nproc_per_node=8 main.py --config=configs/train.yaml
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from builders import (
    areas_to_test,
    build_charset,
    build_criterion,
    build_model,
    check_charset,
    checked_model_eval,
    with_checkpoint,
)
from command_line import check_request, overrides_of, parse_arguments, requested_checkpoint
from config import Config, continued, load_config, save_config
from engine import distributed
from engine.checkpoints import load_training_state, resume_state, set_aside_later, weights_to_test
from engine.distributed import Process
from engine.precision import choose_algorithms, use_tf32
from engine.run_folder import claimed, dropped_if_refused, log_to
from evaluation.evaluator import score_table, write_scores
from inference.prepare import prepare_for_inference
from run_builders import build_evaluator, build_observers, build_trainer
from utils import UserError, explain_full_disk, first_line, run_command_line

__all__ = ["build_criterion", "build_model", "main", "prepare_for_inference"]

logger = logging.getLogger("main")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status."""
    options = parse_arguments(arguments, description=__doc__)
    config = load_config(options.config, overrides_of(options))
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    check_request(options, config)
    device = distributed.pick_device(options.local_rank)
    process = distributed.start(device.type)
    folder = config.work_folder
    use_tf32(config.training.tf32)
    choose_algorithms(deterministic=config.training.deterministic, search=config.run.phase == "train")
    if config.run.phase == "test":
        with dropped_if_refused(folder, process):
            test(
                config,
                device=device,
                process=process,
                model_eval=options.model_eval,
                image_only=options.image_only,
                checkpoint=requested_checkpoint(options, config),
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
    """Train the network of a config in its work folder.

    Args:
        resume: a checkpoint to continue from, or "" for the newest one.

    Returns:
        the exit status: 0, or 128 and the number of the signal that stopped the run, as in shells.
    """
    folder = config.work_folder
    log_to(folder, process, debug=debug)
    torch.manual_seed(config.run.seed)
    torch.autograd.set_detect_anomaly(debug)
    state = resume_state(folder, config.run.name, resume) if resume is not None else None
    if state is not None:
        config = continued(config, state.get("config"))
        if config.model.kind != "ssn":
            check_charset(state, "the run to resume", build_charset(config), config)
    trainer = build_trainer(config, device=device, process=process, resumed=state is not None)
    torch.manual_seed(config.run.seed + process.rank)  # equal weights everywhere, but not equal dropout
    if process.is_main:
        save_config(config, folder / "config.yaml")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        logger.info(
            "%s: %.2f M parameters, %d iterations, %s", config.model.name, parameters / 1e6, trainer.iterations, device
        )
    if state is not None:
        load_training_state(trainer, state)
        if process.is_main:
            set_aside_later(folder, config.run.name, trainer.iteration)
        logger.info("resumed after iteration %d", trainer.iteration)
        state = None  # frees the memory of its weights and momenta
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
    """Evaluate on every test set, write scores, predictions, report and attention images, and return the scores.

    Args:
        checkpoint: the weights; None: the run's best or, if nothing was trained, `model.checkpoint`.
    """
    folder = config.work_folder
    log_to(folder, process)
    model_eval = checked_model_eval(config, model_eval)
    checkpoint = checkpoint or weights_to_test(folder, config.run.name, config.model.checkpoint)
    # In float32 and not compiled, the fast form gives the network's own results without start-up costs.
    model = build_model(with_checkpoint(config, checkpoint)).to(device)
    model = prepare_for_inference(model, precision="fp32", compile=False)
    if config.model.kind == "ssn":
        config = config.model_copy(deep=True)
        config.model.ssn.areas = areas_to_test(config, checkpoint)
    evaluator = build_evaluator(config, device=device, process=process, model_eval=model_eval)
    observers = build_observers(
        config, process=process, model_eval=model_eval, image_only=image_only, weights=checkpoint
    )
    scores = evaluator.evaluate(model, observers) | {"checkpoint": checkpoint}
    if process.is_main:
        if not (folder / "config.yaml").exists():  # a training's own stays
            save_config(config, folder / "config.yaml")
        for file in ("metrics", f"metrics-{model_eval}"):  # of the last test, and of the last one of this sub-model
            write_scores(folder, scores, name=file)
        print(score_table(scores))
        what = "scores, predictions and report (report/index.html)" if observers else "scores"
        logger.info("%s are in %s", what, folder)
    return scores


if __name__ == "__main__":
    run_command_line(main)
