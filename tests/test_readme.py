"""README and docs/: their commands parse, what they name exists, the layout is the tree's, nothing is said twice."""

import argparse
import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from command_line import overrides_of, parse_arguments
from config import load_config
from rendering.config import load_render_config

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README, LAYOUT, CONTRACTS = PAGES["README.md"], PAGES["docs/layout.md"], PAGES["docs/contracts.md"]
TEXT = "\n".join(PAGES.values())
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

OPTIONAL = {"wandb"}  # imported where it is installed and asked for
MADE_BY_USE = {"workdir/"}  # in the layout, but not in a fresh clone
PROGRAM = re.compile(r"(?:python|torchrun) .*?\b((?:tools/)?\w+\.py)\b(.*)")
NOT_OUR_WORDS = r"pictures?|readings|opinions?|rims?|whole checkpoints?"  # but image, prediction, boundary, valid


def code_blocks(language="", text=TEXT):
    # All fences at once: the end of a block must not be taken for the start of one without a language.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for found, block in blocks if found == language]


def prose(text):
    """A page without its blocks and inline pieces of code, and with the texts of its links alone."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "` `", text))


def command_lines():
    """Every line of a code block without a language, inline piece of code or comment of a config that starts a program.

    A line that ends with a backslash goes on in the next one.
    """
    comments = [line.removeprefix("#") for path in CONFIGS for line in path.read_text(encoding="utf-8").splitlines()]
    blocks = [*code_blocks(), "\n".join(comments)]
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", TEXT)
    return sorted({line for line in lines if re.match(r"(python|torchrun|make|sbatch) ", line)})


def program_lines():
    # The script hands its arguments on to main.py.
    found = (
        (line, PROGRAM.match(line.replace("sbatch docs/slurm_train.sh", "python main.py"))) for line in command_lines()
    )
    return [pytest.param(match[1], shlex.split(match[2], comments=True), id=line) for line, match in found if match]


def entries(block):
    """(path, what is said of it) for each line of a layout; folders end with a slash."""
    folder = ""
    for line in block.splitlines():
        name, _, meaning = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            yield name, meaning.strip()
        else:
            yield folder + name, meaning.strip()


def layout():
    """The entries of README's layout (the top) and of docs/layout.md (the files in each folder)."""
    top = code_blocks(text=README.split("## Layout", 1)[1])[0]
    folders = code_blocks(text=LAYOUT.split("## Folder by folder", 1)[1])[0]
    return [*entries(top), *(each for each in entries(folders) if each[1])]


def named_keys():
    """Config keys in the text, with a dot inside."""
    sections = "global|dataset|training|optimizer|model"
    return sorted({key for key in re.findall(rf"`\"?((?:{sections})\.[\w.]+)", TEXT) if not key.endswith(".py")})


def sentences(text):
    """Sentences of a page's prose, in lower case, a table's cells among them, but not its first row."""
    text = re.sub(r"^\|.*\n\|[ :|-]+$", "", prose(text), flags=re.MULTILINE)
    for block in re.split(r"\n\s*\n|\n(?=[|#*-])", text):
        for cell in block.split("|"):
            for sentence in re.split(r"(?<=[.:;?!])\s+", cell):
                yield " ".join(re.findall(r"[\w`%]+", sentence.lower()))


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
    if program != "config.py":  # takes no arguments
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        with pytest.raises(ParsedError):
            module.main(arguments)


@pytest.mark.parametrize(("program", "arguments"), program_lines())
def test_keys_and_values_of_overrides_are_known(program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    if program == "main.py":
        options = parse_arguments(arguments)
        of_a_run = options.config[0].startswith("workdir/")  # which is not there; it has every key
        load_config("configs/template.yaml" if of_a_run else options.config, overrides_of(options))
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
    export = [ROOT / "tools" / name for name in ("export_onnx.py", "read_with_onnx.py")]
    needed, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    assert not needed.keys() & dev.keys()

    def unpinned(paths, pinned):
        known = {name.lower() for name in pinned}
        return {name for name in imported(paths) if known.isdisjoint(map(str.lower, distributions.get(name, [name])))}

    assert unpinned([path for path in sources if path not in tests + export], needed) <= OPTIONAL
    assert not unpinned(tests + export, needed | dev)


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


def test_named_configs_and_images_exist():
    configs = set(re.findall(r"configs/\w+\.yaml", TEXT))
    assert configs
    assert not {name for name in configs if not (ROOT / name).is_file()}
    for page, text in PAGES.items():
        images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        assert all(((ROOT / page).parent / image).is_file() for image in images), page
    assert "![" in README


def test_work_folders_have_the_names_of_runs_not_of_config_files():
    files = {path.stem for path in CONFIGS} - {
        load_config(path).run.name for path in CONFIGS if "render" not in path.stem
    }
    texts = [*PAGES.values(), *(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))]
    assert not files & {name for text in texts for name in re.findall(r"workdir/([\w-]+)", text)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            without_code = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
            headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {target}#{anchor}"


def test_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 250
    assert not {page for page in PAGES if page.startswith("docs/") and f"({page}" not in README}


def test_numbers_of_readme_are_those_of_the_model_card():
    table = README.split("## Results", 1)[1].split("##", 1)[0]
    numbers = re.findall(r"\b\d+\.\d\b", table)
    assert numbers
    assert not {number for number in numbers if number not in PAGES["docs/model_card.md"]}


def test_nothing_is_said_twice():
    said = Counter(
        sentence for text in PAGES.values() for sentence in sentences(text) if len(re.findall(r"[a-z]+", sentence)) > 6
    )
    assert len(said) > 200
    assert not {sentence for sentence, count in said.items() if count > 1}


def test_sentences_are_told_apart():
    table = "| first | row |\n| --- | ---: |\n| One more cell | two |\n"
    text = "It reads words. `a b`\nis *one*\nthing: that.\n\n```\ncode it is. Code it is.\n```\n"
    assert list(filter(None, sentences(table))) == ["one more cell", "two"]
    assert list(filter(None, sentences(text))) == ["it reads words", "` ` is one thing", "that"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_use_the_words_of_the_field(page):
    assert not re.findall(rf"\b(?:{NOT_OUR_WORDS})\b", prose(PAGES[page]), re.IGNORECASE)


def test_layout_names_what_exists():
    missing = [name for name, _ in layout() if name not in MADE_BY_USE and not (ROOT / name).exists()]
    assert not missing


def test_layout_says_something_of_every_entry():
    assert all(meaning for _, meaning in layout())


def test_layout_lists_every_source_file_once():
    sources = {path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *CONFIGS]}
    names = {str(path) for path in sources if path.name != "__init__.py" and path.parts[0] != "tests"}
    listed = Counter(name for name, _ in layout())
    assert not names - set(listed)
    assert not {name for name, count in listed.items() if count > 1}


def test_layout_lists_every_folder_and_file_of_the_top():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git clone")
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in tracked.stdout.splitlines()}
    listed = {name.split("/")[0] + "/" if "/" in name else name for name, _ in layout()}
    assert not top - listed - {"README.md", ".gitignore"}


def test_twenty_questions_lead_to_files():
    rows = re.findall(r"^\| (.+\?) \| `([^`]+)` \|$", LAYOUT.split("## Twenty questions", 1)[1], re.MULTILINE)
    assert len(rows) == len(set(rows)) == 20
    assert not {path for _, path in rows if not (ROOT / path).is_file()}


def test_paths_of_the_tables_exist():
    """What README's "to change X" and docs/layout.md name in code is there."""
    table = README.split("## To change X, go to Y", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"`([\w*]+/[\w*/.]+|\w+\.py)`", table + LAYOUT)
    assert len(named) > 30
    assert not {name for name in named if not list(ROOT.glob(name))}


def test_python_examples_name_what_exists():
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_python_calls_that_are_promised_exist():
    promised = re.findall(r"^\| `((?:config|main|utils|reader)\.[\w.]+)\(", CONTRACTS, re.MULTILINE)
    assert len(promised) >= 5
    for dotted in promised:
        module, *names = dotted.split(".")
        value = importlib.import_module(module)
        for name in names:
            value = getattr(value, name)
        assert callable(value)


def test_promised_flags_are_the_programs():
    flags = CONTRACTS.split("**Flags of `main.py`**", 1)[1].split("\n\n", 1)[0]
    for flag in re.findall(r"`(--\w+)", flags):
        value = {"--phase": ["test"], "--model_eval": ["vision"], "--local_rank": ["0"]}
        takes_none = flag in ("--debug", "--image_only", "--model_strict", "--resume", "--print_config")
        arguments = [flag, *([] if takes_none else value.get(flag, ["x"]))]
        parse_arguments(["--config", "configs/train.yaml", *arguments])


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
