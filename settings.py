"""Settings: sections of typed keys, read from YAML files and `key=value` overrides, with errors that name the key.

`schema.py` holds the keys of a config, `rendering/config.py` those of the renderer.
"""

import logging
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from rapidfuzz import fuzz

from utils import UserError
from yaml_io import parse_yaml, read_yaml

logger = logging.getLogger(__name__)

PROBLEMS_SHOWN = 30  # in one message


def key(default: Any, description: str, **limits: Any) -> Any:
    """Define a key by its default, a sentence about its unit and effect, and pydantic's limits on the value."""
    return Field(default, description=description, **limits)


class Section(BaseModel):
    """Base of all sections: refuses unknown keys, converts int to float only; an empty section is all defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        sections = {field.alias or name for name, field in cls.model_fields.items() if is_section(field)}
        return {name: value for name, value in data.items() if value is not None or name not in sections}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (dotted key, what is wrong) for keys that do not fit together."""
        yield from ()


S = TypeVar("S", bound=Section)


def is_section(field: FieldInfo) -> bool:
    """Return whether a field of the schema holds a section, not a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def walk_schema(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) for every key below a section, in order; sections come before what they hold."""
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        yield dotted, field
        if is_section(field):
            yield from walk_schema(field.annotation, f"{dotted}.")


def merged(defaults: dict, given: dict) -> dict:
    """Return `given`, with `defaults` where it says nothing; neither is edited. A null section says nothing."""
    result = dict(given)
    for name, default in defaults.items():
        value = given.get(name)
        if isinstance(default, dict) and (value is None or isinstance(value, dict)):
            result[name] = merged(default, value or {})
        else:
            result.setdefault(name, default)
    return result


def load_settings(
    schema: type[S], paths: Sequence[str | Path], overrides: Sequence[str] = (), *, gone: Sequence[str] = ()
) -> S:
    """Read YAML files, later ones over earlier ones, and apply `key=value` overrides (YAML values).

    Args:
        gone: dotted keys of earlier versions; one that is set is named in a warning and ignored.

    Raises:
        UserError: a file cannot be read, or any key or value of files or overrides is wrong; one line for each.
    """
    data: dict[str, Any] = {}
    for path in paths:
        try:
            data = merged(data, read_yaml(Path(path)))
        except RecursionError as error:
            raise UserError(f"{path}: nested too deeply; it holds no settings") from error
    places: dict[str, str] = {}  # dotted key -> the override that set it
    problems: list[str] = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        place = f"override {override}".replace("\n", r"\n")
        try:
            if not equals:
                raise UserError(f"{place}: not of the form key=value")
            data = _with(data, dotted.strip().split("."), parse_yaml(text, place))
            places[dotted.strip()] = place
        except UserError as error:
            problems.append(str(error))
    source = " + ".join(map(str, paths)) or "settings"
    return validate_settings(schema, data, source, places=places, problems=problems, gone=gone)


def validate_settings(
    schema: type[S],
    data: Mapping[str, Any],
    source: str,
    *,
    places: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
    gone: Sequence[str] = (),
    drop_unknown: bool = False,
) -> S:
    """Return plain data as settings; `source` names them in messages.

    Args:
        places: dotted key -> what messages about it name in place of the source.
        problems: found already; they are reported with the others.
        gone: dotted keys that are ignored, with a warning unless `drop_unknown` is set.
        drop_unknown: ignore all keys that the schema does not have, and name them.

    Raises:
        UserError: with one line for each thing that is wrong.
    """
    places = places or {}
    ignored = True
    while ignored:
        try:
            settings, ignored = schema.model_validate(data), []
            found = list(settings.problems())
        except ValidationError as invalid:
            errors = invalid.errors(include_url=False)
            unknown = {".".join(each["loc"]): each["loc"] for each in errors if each["type"] == "extra_forbidden"}
            ignored = [dotted for dotted in unknown if drop_unknown or dotted in gone]
            for dotted in ignored:
                data = _without(data, unknown[dotted])
                if not (drop_unknown and dotted in gone):
                    logger.warning("%s: nothing reads this key any more; ignored", _located(dotted, source, places))
            found = [_describe(error, schema) for error in errors]
    problems = [*problems, *(f"{_located(dotted, source, places)}: {message}" for dotted, message in found)]
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration\n  "
        shown = problems[:PROBLEMS_SHOWN]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more: fix these first")
        raise UserError(head + "\n  ".join(shown))
    return settings


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the known dotted key that is nearest, as a whole and in its last word."""

    def likeness(other: str) -> float:
        return fuzz.ratio(other, name) + fuzz.ratio(other.rpartition(".")[2], name.rpartition(".")[2])

    return max(known, key=likeness)


def _with(data: Any, names: Sequence[str], value: Any) -> Any:
    """Return `data` with a nested value set; a wrong thing in a section's place stays, to be reported."""
    if not names:
        return value
    if data is not None and not isinstance(data, dict):
        return data
    return {**(data or {}), names[0]: _with((data or {}).get(names[0]), names[1:], value)}


def _without(data: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return `data` without a nested key."""
    first, *rest = names
    kept = {name: value for name, value in data.items() if rest or name != first}
    return kept | {first: _without(data[first], rest)} if rest else kept


def _describe(error: Mapping[str, Any], schema: type[Section]) -> tuple[str, str]:
    """Return a pydantic error as (dotted key, what is wrong)."""
    dotted = re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in error["loc"]))
    if error["type"] in ("extra_forbidden", "invalid_key"):
        known = [name for name, _ in walk_schema(schema)]
        return dotted, f"unknown key; nearest known key: {nearest(dotted, known)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return dotted, f"must be a section of `key: value` lines, not {reprlib.repr(error['input'])}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("List should", "must")
    message = message.replace("True, False", "true, false")
    message = re.sub(r", not \d+$", "", message.replace(" after validation", "").replace("'", ""))  # a list's length
    return dotted, f"{message}, not {reprlib.repr(error['input'])}"


def _located(dotted: str, source: str, places: Mapping[str, str]) -> str:
    """Return where a key was set, for the start of a message: the override itself, or file and key."""
    if dotted in places:
        return places[dotted]
    near = (
        place
        for name, place in places.items()
        if re.match(rf"{re.escape(name)}[.[]", dotted) or name.startswith(f"{dotted}.")
    )
    return f"{next(near, source)}: {dotted}"
