"""README: its commands parse, its configs and keys exist, and its layout is the tree's."""

import argparse
import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import main
from config import load_config
from rendering import load_render_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MADE_BY_USE = {"workdir/"}  # in the layout, but not in a fresh clone
PROGRAM = re.compile(r"(?:python|torchrun) .*?\b((?:tools/)?\w+\.py)\b(.*)")


def code_blocks(language=""):
    # All fences at once: the end of a block must not be taken for the start of one without a language.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for found, text in blocks if found == language]


def command_lines():
    """Every line of a code block without a language, and every inline piece of code, that starts a program."""
    lines = [line for block in code_blocks() for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", TEXT)
    return sorted({line for line in lines if re.match(r"(python|torchrun|make) ", line)})


def program_lines():
    found = ((line, PROGRAM.match(line)) for line in command_lines())
    return [pytest.param(match[1], shlex.split(match[2]), id=line) for line, match in found if match]


def layout():
    """Paths of the layout section -> what is said of them; folders end with a slash."""
    entries, folder = {}, ""
    for line in TEXT.split("## Layout", 1)[1].split("```")[1].splitlines():
        if not line.strip():
            continue
        name, _, meaning = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            entries[name] = meaning.strip()
        else:
            entries[folder + name] = meaning.strip()
    return entries


def named_keys():
    """Config keys in the text, with a dot inside."""
    sections = "global|dataset|training|optimizer|model"
    return sorted({key for key in re.findall(rf"`\"?((?:{sections})\.[\w.]+)", TEXT) if not key.endswith(".py")})


class ParsedError(Exception):
    """Ends a program once it has understood its command line."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Programs stop after they parsed their arguments, whichever way they parse them."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def stopping(self, *arguments, parse=parse, **named):
            parse(self, *arguments, **named)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, stopping)


@pytest.mark.parametrize(("program", "arguments"), program_lines())
def test_programs_understand_their_command_lines(program, arguments, stop_after_parsing):
    assert (ROOT / program).is_file(), f"{program} does not exist"
    if program not in ("config.py", "fig/draw_data_flow.py"):  # these take no arguments
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        with pytest.raises(ParsedError):
            module.main(arguments)


@pytest.mark.parametrize(("program", "arguments"), program_lines())
def test_keys_and_values_of_overrides_are_known(program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    if program == "main.py":
        options = main.parse_arguments(arguments)
        of_a_run = options.config.startswith("workdir/")  # which is not there; it has every key
        load_config("configs/template.yaml" if of_a_run else options.config, main.overrides_of(options))
        return
    overrides = [each for each in arguments if re.match(r"[\w.]+\.\w+=", each)]
    if program == "tools/render_words.py":
        load_render_config(None, overrides)
    elif "--config" in arguments and program != "tools/background_study.py":
        load_config(arguments[arguments.index("--config") + 1], overrides)
    else:
        assert not overrides


def test_keys_in_the_text_exist():
    known = load_config(ROOT / "configs" / "template.yaml").to_dict()
    keys = named_keys()
    assert keys
    for key in keys:
        node = known
        for name in key.split("."):
            assert name in node, f"{key} is no key of the config"
            node = node[name]


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", TEXT, re.MULTILINE))
    assert named
    assert named <= targets


def pins(name):
    """Distribution -> version of a file of requirements, without those of files that it names."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))


def imported(paths):
    """Names of the packages that some files import, ours and Python's own left out."""
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    ours |= {path.stem for path in (ROOT / "tests").glob("*.py")}
    return names - ours - set(sys.stdlib_module_names)


def test_requirements_name_what_is_imported_and_the_second_file_what_only_developers_need():
    distributions = importlib.metadata.packages_distributions()
    sources = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "workdir"))]
    tests = [path for path in sources if path.relative_to(ROOT).parts[0] == "tests"]
    export = ROOT / "tools" / "export_onnx.py"
    needed, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    assert not needed.keys() & dev.keys()

    def unpinned(paths, pinned):
        known = {name.lower() for name in pinned}
        return {name for name in imported(paths) if known.isdisjoint(map(str.lower, distributions.get(name, [name])))}

    assert not unpinned([path for path in sources if path not in tests and path != export], needed)
    assert not unpinned([*tests, export], needed | dev)


def test_the_python_that_is_asked_for_can_have_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (oldest,) = re.fullmatch(r">=(\d+\.\d+)", project["requires-python"]).groups()
    assert set(re.findall(r"Python (\d\.\d+) or newer", TEXT)) == {oldest}
    for name, version in (pins("requirements.txt") | pins("requirements-dev.txt")).items():
        try:
            found = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        least = re.search(r">=\s*3\.(\d+)", found["Requires-Python"] or "")
        if found["Version"] == version and least:
            assert int(least[1]) <= int(oldest.removeprefix("3.")), f"{name}=={version}"


def test_named_configs_and_pictures_exist():
    configs = set(re.findall(r"configs/[\w]+\.yaml", TEXT))
    pictures = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT))
    assert configs
    assert pictures
    assert not {name for name in configs | pictures if not (ROOT / name).is_file()}


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_layout_names_what_exists():
    missing = [name for name in layout() if name not in MADE_BY_USE and not (ROOT / name).exists()]
    assert not missing


def test_layout_says_something_of_every_entry():
    silent = {name for name, meaning in layout().items() if not meaning}
    assert silent <= {"modules/", "rendering/", "tools/", "configs/"}  # their files speak for them


def test_layout_lists_every_source_file():
    sources = [ROOT.glob("*.py"), *((ROOT / each).glob("*.py") for each in ("modules", "rendering", "tools"))]
    names = {str(path.relative_to(ROOT)) for paths in sources for path in paths if path.name != "__init__.py"}
    names |= {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")}
    assert not names - set(layout())


def test_layout_lists_every_folder_and_file_of_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git clone")
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in tracked.stdout.splitlines()}
    listed = {name.split("/")[0] + "/" if "/" in name else name for name in layout()}
    assert not top - listed - {"README.md", ".gitignore"}


def test_python_examples_name_what_exists():
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_python_calls_that_are_promised_exist():
    promised = re.findall(r"^\| `((?:config|main|utils|reader)\.[\w.]+)\(", TEXT, re.MULTILINE)
    assert len(promised) >= 5
    for dotted in promised:
        module, *names = dotted.split(".")
        value = importlib.import_module(module)
        for name in names:
            value = getattr(value, name)
        assert callable(value)


def test_promised_flags_are_the_programs():
    flags = TEXT.split("**Flags of `main.py`**", 1)[1].split("\n\n", 1)[0]
    for flag in re.findall(r"`(--\w+)", flags):
        value = {"--phase": ["test"], "--model_eval": ["vision"], "--local_rank": ["0"]}
        takes_none = flag in ("--debug", "--image_only", "--model_strict", "--resume")
        arguments = [flag, *([] if takes_none else value.get(flag, ["x"]))]
        main.parse_arguments(["--config", "configs/train.yaml", *arguments])
