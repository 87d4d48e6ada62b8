"""The command line of main.py: flags, `key=value` overrides, and what they ask for together."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from builders import SUB_MODELS, checked_model_eval
from config import Config
from engine.writers import import_wandb
from utils import ArgumentParser, UserError


def parse_arguments(arguments: Sequence[str] | None = None, *, description: str | None = None) -> argparse.Namespace:
    """Parse the published flags and ours (see `--help`).

    Args:
        arguments: None takes those of the process.
    """
    parser = ArgumentParser(
        description=description,
        epilog="Every key of a config, with its default and effect: configs/template.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--config",
        action="append",
        required=True,
        metavar="YAML",
        help="what to build and how (configs/); repeatable, later files override earlier ones",
    )
    add("--phase", choices=("train", "test"), help="train, or evaluate only")
    add("--name", help="name of the run: its folder below global.workdir")
    add("--checkpoint", metavar="FILE", help="weights of the whole network to start from or to test")
    add("--test_root", action="append", metavar="LMDB", help="test set, or folder of them; repeatable")
    add("--local_rank", "--local-rank", type=int, help="accepted for the old launcher; use torchrun")
    add("--debug", action="store_true", help="no workers, anomaly detection, verbose log")
    add("--image_only", action="store_true", help="test: write no attention images")
    add(
        "--model_strict",
        nargs="?",
        const="false",
        metavar="{true,false}",
        help="false (or no value): load what fits of a checkpoint",
    )
    add("--model_eval", choices=SUB_MODELS, help="sub-model to score")
    add("--resume", nargs="?", const="", metavar="FILE", help="continue from FILE or the newest checkpoint")
    add("--print_config", action="store_true", help="print the resolved config as YAML and stop")
    add("overrides", nargs="*", metavar="key=value", help="any key of the config, with a YAML value")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand anywhere
    # An override after a flag whose value is optional is not that value.
    if options.resume and "=" in options.resume and not Path(options.resume).exists():
        options.overrides.append(options.resume)
        options.resume = ""
    if options.model_strict and "=" in options.model_strict:
        options.overrides.append(options.model_strict)
        options.model_strict = "false"
    if options.model_strict not in (None, "true", "false"):
        parser.error(f"argument --model_strict: {options.model_strict!r} is neither true nor false")
    return options


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Return the flags as overrides of config keys, before those that are given as such."""
    flags = {
        "global.phase": options.phase,
        "global.name": options.name,
        "dataset.test.roots": options.test_root,
        "model.checkpoint": options.checkpoint,
        "model.strict": {"true": True, "false": False}.get(options.model_strict),
        "dataset.num_workers": 0 if options.debug else None,
    }
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None
    ] + options.overrides


def check_request(options: argparse.Namespace, config: Config) -> None:
    """Raise `UserError` for what would be ignored or cannot be done: a flag of the other phase, a missing wandb."""
    if config.run.phase == "test":
        if options.resume is not None:
            raise UserError("--resume continues a training; in a test give the weights with --checkpoint FILE")
        return
    scored = checked_model_eval(config, None)
    if options.model_eval not in (None, scored):
        raise UserError(f"--model_eval {options.model_eval}: training scores {scored}; give it with --phase test")
    if config.run.stage == "train-semi-super":
        raise UserError("global.stage: train-semi-super is not built; set train-super to train on labelled words alone")
    if config.training.wandb is not None:
        import_wandb()


def requested_checkpoint(options: argparse.Namespace, config: Config) -> str | None:
    """Return the weights that the command line names, as `--checkpoint` or as `model.checkpoint=FILE`."""
    keys = [override.partition("=")[0].strip() for override in overrides_of(options)]
    return config.model.checkpoint if "model.checkpoint" in keys else None
