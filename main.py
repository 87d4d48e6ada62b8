"""Train and test: command line -> config -> build_* -> Trainer.fit / evaluate.

Examples:
    python main.py --config=configs/train.yaml
    python main.py --config=configs/train.yaml training.epochs=1 optimizer.lr=3e-4
    python main.py --config=configs/train.yaml --resume
    python main.py --config=configs/train.yaml --phase test --checkpoint weights.pth --test_root data/evaluation
    torchrun --nproc_per_node=8 main.py --config=configs/train.yaml
"""

import argparse
import contextlib
import errno
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import distributed
from builders import (
    SUB_MODELS,
    build_charset,
    build_criterion,
    build_evaluator,
    build_model,
    build_optimizer,
    build_schedule,
    build_training_data,
    checked_model_eval,
    evaluation_protocol,
    with_checkpoint,
)
from callbacks import (
    AttentionPictures,
    Callback,
    Checkpoints,
    Evaluation,
    History,
    NotFiniteBatches,
    PredictionFiles,
    Progress,
    TensorBoard,
    UnreadableSamples,
    list_as_newest,
    listed_checkpoints,
    newest_whole_checkpoint,
)
from charset import protocol_normalizer
from config import Config, load_config, save_config
from dataset import SkipLog
from distributed import Process
from evaluation import write_scores
from inference import prepare_for_inference
from precision import choose_algorithms, use_tf32
from report import Report
from trainer import Trainer
from utils import (
    ArgumentParser,
    UserError,
    explain_full_disk,
    first_line,
    read_checkpoint,
    run_command_line,
    seed_everything,
    setup_logging,
)

__all__ = ["build_criterion", "build_model", "main", "prepare_for_inference"]

logger = logging.getLogger("main")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    options = parse_arguments(arguments)
    config = load_config(options.config, overrides_of(options))
    check_request(options, config)
    device = distributed.pick_device(options.local_rank)
    process = distributed.start(device.type)
    folder = work_folder(config)
    use_tf32(config.training.tf32)
    choose_algorithms(deterministic=config.training.deterministic, search=config.global_.phase == "train")
    if config.global_.phase == "test":
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
    folder = work_folder(config)
    log_to(folder, process, debug=debug)
    seed_everything(config.global_.seed or 0)
    torch.autograd.set_detect_anomaly(debug)
    state = resume_state(folder, config.global_.name, resume, process) if resume is not None else None
    if state is not None:
        config = continued(config, state)
    trainer = build_trainer(config, device=device, process=process, resumed=state is not None)
    seed_everything((config.global_.seed or 0) + process.rank)  # equal weights everywhere, but not equal dropout
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
    """Evaluate on every test set: scores, prediction files, report and attention pictures in the work folder.

    Args:
        checkpoint: the weights; None: the run's best, else, where nothing was trained, `model.checkpoint`.
    """
    folder = work_folder(config)
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
                title=config.global_.name,
                details={"network": config.model.name, "weights": checkpoint},
                charset=build_charset(config),
                normalize=normalize,
                with_attention=not image_only,
                rank=process.rank,
            )
        )
        if not image_only:
            observers.append(AttentionPictures(folder=folder, model_eval=model_eval))
    scores = evaluator.evaluate(model, observers) | {"checkpoint": checkpoint}
    if process.is_main:
        for file in ("metrics", f"metrics-{model_eval}"):  # the last test, and the last one of this sub-model
            write_scores(folder, scores, evaluator.columns, name=file)
        print(evaluator.table(scores))
        logger.info("scores, predictions and report (report/index.html) are in %s", folder)
    return scores


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
    folder, name, training = work_folder(config), config.global_.name, config.training
    tensorboard = TensorBoard(
        folder=folder / "tensorboard", interval=training.show_iters, most_pictures=training.log_images
    )
    callbacks = [
        Progress(interval=training.show_iters),
        History(path=folder / "history.jsonl", interval=training.show_iters),
        NotFiniteBatches(folder=folder),
        UnreadableSamples(log=SkipLog(data.dataset)),
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


def named_checkpoint(options: argparse.Namespace, config: Config) -> str | None:
    """The weights that the command line names, be it as `--checkpoint` or as `model.checkpoint=FILE`."""
    keys = [override.partition("=")[0].strip() for override in overrides_of(options)]
    return config.model.checkpoint if "model.checkpoint" in keys else None


def weights_to_test(config: Config) -> str:
    """The run's best weights; `model.checkpoint`, which a run starts from, where nothing was trained."""
    folder, name = work_folder(config), config.global_.name
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


# --- the run's folder -------------------------------------------------------------------------------------------------


def work_folder(config: Config) -> Path:
    """Where everything of a run goes."""
    return Path(config.global_.workdir) / config.global_.name


@contextlib.contextmanager
def claimed(folder: Path, process: Process, *, keep: bool) -> Iterator[None]:
    """Hold the work folder for this run; unless it is to be kept, an earlier run's folder is moved out of the way.

    Raises:
        UserError: another run holds it.
    """
    if not process.is_main:
        distributed.barrier()
        yield
        return
    with _open_lock(folder) as lock:
        try:
            # Not flock: forked loader workers would inherit it and hold it for seconds after a kill.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder} is in use by another run; give this one another --name") from error
            logger.warning(
                "%s: its file system has no locks (%s), so nothing keeps a second run out of this folder; see to that "
                "yourself, or set global.workdir to another disk",
                folder,
                error.strerror,
            )
        if not keep and (folder / "history.jsonl").exists():
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        yield


def _open_lock(folder: Path):
    """The lock stands beside the folder, so that it stays when the folder moves."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written ({error.strerror}); set global.workdir") from error


def _move_aside(folder: Path) -> None:
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(moved)
    print(f"an earlier run was in {folder}; it is now {moved} (to go on with it, use --resume)")


def resume_state(folder: Path, name: str, resume: str, process: Process) -> dict[str, Any] | None:
    """Training state to go on from: of a file, or of the folder's newest whole checkpoint; None where it has none.

    A file of the folder itself becomes its newest checkpoint: those after it belong to steps that are taken anew.

    Raises:
        UserError: the file cannot be resumed from, or is none of the run that the folder holds.
    """
    if resume:
        state = read_checkpoint(resume)
        if "training" not in state:
            raise UserError(f"--resume {resume}: holds weights only; start from them with --checkpoint")
        history = folder / "history.jsonl"
        if Path(resume).resolve().parent == folder.resolve():
            if process.is_main:
                list_as_newest(folder, name, Path(resume).name)
        elif history.is_file() and history.stat().st_size:
            raise UserError(
                f"--resume {resume}: {folder} holds another run; give this one another --name, or go on with that one "
                "by --resume alone"
            )
        return state
    if not listed_checkpoints(folder, name):
        logger.warning("%s has no checkpoint to resume from: starting from the beginning", folder)
        return None
    path, state = newest_whole_checkpoint(folder, name)
    logger.info("resuming from %s", path)
    return state


def continued(config: Config, state: Mapping[str, Any]) -> Config:
    """The config of a run that goes on from `state`: it keeps the names of the weights that it started from.

    Raises:
        UserError: a key has changed that must not within a run.
    """
    config, before = config.model_copy(deep=True), state.get("config")
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


def load_training_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Let a run go on from a checkpoint.

    Raises:
        UserError: it is of another network or optimiser, or of other data.
    """
    try:
        trainer.load_state_dict(state)
    except UserError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint to resume from does not fit the run ({type(error).__name__}: {reason}); resume with the "
            "model and the optimizer.type that it was trained with, or start from its weights with --checkpoint"
        ) from error


def log_to(folder: Path, process: Process, *, debug: bool = False) -> None:
    """Log to the terminal and `log.txt`; processes other than the main one only warn."""
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            setup_logging(folder / "log.txt", level=logging.DEBUG if debug else logging.INFO)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); set global.workdir") from error
    else:
        setup_logging(level=logging.WARNING)


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
    parser.add_argument("--image_only", action="store_true", help="test: write no attention pictures")
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
    if config.global_.phase == "test":
        if options.resume is not None:
            raise UserError("--resume goes on with a training; in a test give the weights with --checkpoint FILE")
        return
    scored = checked_model_eval(config, None)
    if options.model_eval not in (None, scored):
        raise UserError(f"--model_eval {options.model_eval}: training scores {scored}; give it with --phase test")
    if config.global_.stage == "train-semi-super":
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
