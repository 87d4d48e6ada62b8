"""Entry points of `torch.hub`.

    network = torch.hub.load("<owner>/<repo>", "binet_small")
    reader = torch.hub.load("path/of/a/clone", "reader", source="local")

The modules of this project have short names (`config`, `utils`, ...), which the calling program may use for its own.
They are therefore imported as submodules of one private package, `binet_hub_<hash of the folder>`. Their imports of one
another are rewritten to that package when they are compiled: they never get a module of the caller, and `sys.modules`
gets no other name. Pickled networks can be loaded only after `torch.hub.load`, in spawned processes too.
"""

import ast
import importlib.machinery
import os
import pathlib
import sys
import types
import zlib

dependencies = ["cv2", "lmdb", "numpy", "PIL", "pydantic", "rapidfuzz", "torch", "yaml"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"binet_hub_{zlib.crc32(os.fsencode(_ROOT)):08x}"  # two clones are two packages
_OURS = {path.stem for path in _ROOT.glob("*.py")} | {path.parent.name for path in _ROOT.glob("*/__init__.py")}


def binet_small(pretrained: bool = True):
    """Returns the small BINet in eval mode, on the CPU: (image (N, 3, 32, 128), mask (N, 1, 32, 128)) -> output.

    Images are RGB, normalised with ImageNet's mean and deviation; masks lie in [0, 1], 1 = text. The prediction is in
    `output.alignment[-1].logits` (N, 26, 37): class 0 is the end, class i is the character `model.charset[i - 1]`.

    Args:
        pretrained: load `weights/binet-small.pth`; False gives random weights.
    """
    bundle = _import("bundle").load_bundle(_ROOT / "weights" / "binet-small.pth")
    model = bundle.model if pretrained else _import("builders").build_model(bundle.config, bundle.charset)
    model.charset = bundle.charset.characters
    return model.eval().requires_grad_(True)


def reader(checkpoint=None, **options):
    """Returns a `Reader`, which reads files, PIL images and arrays with masks of its own: `reader.read(["word.png"])`.

    Args:
        checkpoint: file of weights; None takes the small BINet.
        options: those of `reader.Reader`, such as `device="cuda"`.
    """
    return _import("reader").Reader(checkpoint, **options)


def _import(name):
    """Import one of this project's modules as part of the private package."""
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(_ROOT)]
        sys.modules[_PACKAGE] = package
        sys.meta_path.insert(0, _Finder)
    return importlib.import_module(f"{_PACKAGE}.{name}")


class _Finder:
    """Finds the modules of the private package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a file with its imports rewritten; apart from the cache, which holds the file as it stands."""

    def get_code(self, fullname):
        tree = _Rewriter().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Rewriter(ast.NodeTransformer):
    """Imports of this project's modules, always `from MODULE import NAME`, come from the private package."""

    def visit_ImportFrom(self, node):
        if not node.level and node.module.split(".")[0] in _OURS:
            node.module = f"{_PACKAGE}.{node.module}"
        return node
