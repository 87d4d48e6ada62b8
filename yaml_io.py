"""YAML files as plain data: nothing in them can run code, and errors name file and line."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from utils import UserError

MAX_BYTES = 256 << 10  # of a file: PyYAML takes seconds for a megabyte


class Loader(yaml.SafeLoader):
    """Loads plain data only; the one tag besides YAML's own is `!!python/tuple`, which gives a list."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value != "<<":
                if key_node.value in seen:
                    raise ConstructorError(None, None, f"duplicate key {key_node.value!r}", key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the strings that `Loader` would read as numbers."""


def _refuse_tag(loader: Loader, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise ConstructorError(None, None, f"tag {tag} is refused: nothing in a YAML file can run code", node.start_mark)


Loader.add_constructor(None, _refuse_tag)
Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node, deep=True)
)
for _resolver in (Loader, Dumper):
    # YAML 1.1 takes 1e-4 for a string, as it has no point.
    _resolver.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read, is no YAML, is empty or is no mapping; names file and line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{path}: cannot read the file ({getattr(error, 'strerror', error)})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES >> 10} KiB, which no config is; name a YAML file")
    data = parse_yaml(content, str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path}:1: {'the file is empty' if data is None else 'not a mapping'}; write `key: value` lines"
        )
    return data


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Read YAML text; `source` names it in errors, with the line unless it is an override."""
    try:
        return Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None or source.startswith("override ") else f"{source}:{mark.line + 1}"
        raise UserError(f"{place}: {error.problem or error.context}") from error
    except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError) as error:
        # No text at all, or whatever Python raises for a malformed value (`!!int x`, a 13th month).
        raise UserError(f"{source}:1: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source}:1: nested too deeply") from error


def dump_yaml(data: Any, **options: Any) -> str:
    """Return plain data as YAML that `parse_yaml` reads back equal; keys keep their order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, **options)
