"""The command line: flags, overrides, and how they go together."""

import pytest

from command_line import overrides_of, parse_arguments


def test_flags_become_overrides_and_overrides_win():
    line = "--config c.yaml --phase test --name ñ😀 --checkpoint w.pth --test_root a --test_root b --local_rank 1 "
    line += "--image_only --model_strict --model_eval vision global.name=m"
    options = parse_arguments(line.split())
    assert overrides_of(options) == [
        'global.phase="test"',
        'global.name="ñ😀"',
        'dataset.test.roots=["a", "b"]',
        'model.checkpoint="w.pth"',
        "model.strict=false",
        "global.name=m",
    ]
    assert (options.local_rank, options.image_only, options.model_eval) == (1, True, "vision")


def test_resume_takes_a_path_or_nothing_before_an_override():
    assert parse_arguments(["--config", "c", "--resume"]).resume == ""
    assert parse_arguments(["--config", "c", "--resume", "x.pth"]).resume == "x.pth"
    options = parse_arguments(["--config", "c", "--resume", "training.epochs=3"])
    assert (options.resume, options.overrides) == ("", ["training.epochs=3"])


def test_an_override_behind_a_flag_without_value_is_an_override():
    options = parse_arguments(["--config", "c.yaml", "--model_strict", "training.epochs=3"])
    assert (options.model_strict, options.overrides) == ("false", ["training.epochs=3"])
    assert parse_arguments(["--config=c", "--model_strict", "true"]).model_strict == "true"
    with pytest.raises(SystemExit):
        parse_arguments(["--config=c", "--model_strict", "maybe"])


def test_configs_may_be_several_and_help_points_at_every_key(capsys):
    assert parse_arguments(["--config=a.yaml", "--config", "b.yaml"]).config == ["a.yaml", "b.yaml"]
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--help"])
    assert exit_.value.code == 0
    assert "configs/template.yaml" in capsys.readouterr().out
