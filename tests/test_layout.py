"""Layering: imports lead down only, and no file is imported in a circle."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom to the top. A part (a file of the top or a folder) may import from the levels below its own, and from
# itself; parts of one level do not know each other.
LEVELS = (
    ("utils",),
    ("modules", "yaml_io"),
    ("engine", "loading", "settings"),
    ("inference", "losses", "schema"),
    ("config",),
    ("rendering", "evaluation"),
    ("callbacks", "dataset"),
    ("builders",),
    ("bundle", "command_line", "run_builders"),
    ("reader", "main"),
    ("tools", "demo", "hubconf"),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# (importing file, imported file): imports that lead up or sideways, with the reason why they stay.
EXCEPTIONS = {
    # `utils.load_checkpoint` is promised to others (docs/contracts.md); imported when somebody asks for it.
    ("utils", "engine.checkpoints"),
}


class Import(NamedTuple):
    """One of our files imports another one; `at_start`: as soon as it is imported itself."""

    source: str
    target: str
    at_start: bool


def source_files(root: Path) -> dict[str, Path]:
    """Dotted name -> path of every Python file but the tests."""
    folders = [each for each in root.iterdir() if each.is_dir() and each.name in LEVEL_OF]
    paths = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return dict(sorted(names.items()))


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    """The imports of our own files in one file, those inside functions too."""

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                targets = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: relative import; name the file in full"
                targets = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                targets = []
            for target in targets:
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    yield Import(name, target, at_start)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from visit(child, at_start and not inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), at_start=True)


def all_imports(root: Path) -> list[Import]:
    files = source_files(root)
    return [each for name, path in files.items() for each in imports_of(name, path, set(files))]


def not_down(imports: list[Import]) -> set[tuple[str, str]]:
    """Imports that lead up or sideways."""

    def leads_down(source: str, target: str) -> bool:
        above, below = source.split(".")[0], target.split(".")[0]
        return above == below or LEVEL_OF[above] > LEVEL_OF[below]

    return {(each.source, each.target) for each in imports if not leads_down(each.source, each.target)}


def circle(imports: list[Import]) -> list[str]:
    """Files that import each other in a circle at start, first and last the same; empty where there is none."""
    following: dict[str, set[str]] = {}
    for each in imports:
        if each.at_start:
            following.setdefault(each.source, set()).add(each.target)
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(following.get(name, ())):
                if found := search(target, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(following) if (found := search(name, []))), [])


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return all_imports(ROOT)


def test_every_part_has_a_level():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = tracked.stdout.splitlines() if not tracked.returncode else [path.name for path in ROOT.glob("*.py")]
    parts = {name.split("/")[0].removesuffix(".py") for name in names}
    assert parts - {"tests"} <= set(LEVEL_OF)


def test_imports_lead_down_only(imports):
    assert len(imports) > 100
    assert not not_down(imports) - EXCEPTIONS


def test_no_exception_outlives_its_import(imports):
    assert not_down(imports) >= EXCEPTIONS


def test_exceptions_are_not_imported_at_start(imports):
    assert not EXCEPTIONS & {(each.source, each.target) for each in imports if each.at_start}


def test_no_file_is_imported_in_a_circle(imports):
    assert not circle(imports)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("utils.py", "from engine import trainer\n", ("utils", "engine.trainer")),
        ("engine/trainer.py", "def f():\n    from loading.masks import x\n", ("engine.trainer", "loading.masks")),
        ("loading/masks.py", "import config\n", ("loading.masks", "config")),
        ("engine/trainer.py", "if TYPE_CHECKING:\n    from config import C\n", ("engine.trainer", "config")),
    ],
)
def test_an_import_that_leads_up_or_sideways_is_found(tmp_path, file, text, found):
    for name in ("utils.py", "config.py", "engine/trainer.py", "loading/masks.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import utils\n" if name != "utils.py" else "")
    assert not not_down(all_imports(tmp_path))
    (tmp_path / file).write_text(text)
    assert not_down(all_imports(tmp_path)) == {found}


@pytest.mark.parametrize(("text", "is_circle"), [("import {}", True), ("def f():\n    import {}", False)])
def test_a_circle_is_found(tmp_path, text, is_circle):
    (tmp_path / "modules").mkdir()
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / "modules" / f"{name}.py").write_text(text.format(f"modules.{other}"))
    found = circle(all_imports(tmp_path))
    assert bool(found) == is_circle
    assert not is_circle or set(found) == {"modules.a", "modules.b", "modules.c"}
