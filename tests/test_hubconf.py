"""hubconf.py: as torch.hub calls it, from a program that has modules of our modules' names."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from reader import Reader
from tests.test_layout import LEVEL_OF, all_imports, source_files
from tests.test_readme import imported

ROOT = Path(__file__).parent.parent
IMAGES = sorted(str(path) for path in (ROOT / "fig" / "demo").glob("*.png"))

HOST = """
import json, pickle, sys
import config, utils, dataset                        # the host's own
import torch
from torch.utils.data import DataLoader

names, path = set(sys.modules), list(sys.path)
network = torch.hub.load(ROOT, "binet_small", source="local")
reader = torch.hub.load(ROOT, "reader", source="local", device="cpu")
import loading, engine.trainer                       # the host's, imported after ours

package = type(reader).__module__.rpartition(".")[0]
predictions = reader.read(IMAGES)
inputs = torch.rand(2, 3, 32, 128), torch.rand(2, 1, 32, 128)
with torch.inference_mode():
    expected = network(*inputs).alignment[-1].logits
    copied = pickle.loads(pickle.dumps(network))(*inputs).alignment[-1].logits
    compiled = torch.compile(network, backend="eager")(*inputs).alignment[-1].logits

class Words:
    def __len__(self): return len(IMAGES)
    def __getitem__(self, i): return reader.read([IMAGES[i]])[0]

from_workers = [each for [each] in DataLoader(Words(), num_workers=1, collate_fn=list, multiprocessing_context="fork")]
# What is imported when it is called for: utils.load_checkpoint, SSN's checkpoints.
lazy = sys.modules[f"{package}.utils"].load_checkpoint.__module__
print(json.dumps({
    "texts": [each.text for each in predictions],
    "from_workers": [each.text for each in from_workers],
    "flat": [name for name in OURS if name in sys.modules and sys.modules[name].__file__.startswith(ROOT)],
    "hosts": [config.MARK, utils.MARK, dataset.MARK, loading.MARK, engine.trainer.MARK],
    "leaked": sorted(name for name in set(sys.modules) - names
                     if (getattr(sys.modules[name], "__file__", "") or "").startswith(ROOT + "/")
                     and "site-packages" not in sys.modules[name].__file__
                     and name.partition(".")[0] != package),
    "same_path": sys.path == path,
    "lazy": lazy == f"{package}.engine.checkpoints",
    "trains": all(each.requires_grad for each in network.parameters()) and not network.training,
    "same": [bool(torch.allclose(expected, each, atol=1e-4)) for each in (copied, compiled)],
    "equal_classes": type(torch.hub.load(ROOT, "reader", source="local")) is type(reader),
}))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What a program with modules of our names, in a folder of its own, finds after it used the hub."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "engine").mkdir()
    for name in ("config", "utils", "dataset", "loading", "engine/__init__", "engine/trainer"):
        (folder / f"{name}.py").write_text('MARK = "host"\n')
    program = f"ROOT, IMAGES, OURS = {str(ROOT)!r}, {IMAGES!r}, {sorted(LEVEL_OF)!r}\n{HOST}"
    (folder / "host.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TORCH_HOME"] = str(folder / "hub")
    done = subprocess.run(
        [sys.executable, "host.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_reader_reads_as_ours(host):
    assert host["texts"] == host["from_workers"] == [each.text for each in Reader().read(IMAGES)]


def test_modules_of_the_caller_and_ours_are_kept_apart(host):
    assert host["hosts"] == ["host"] * 5
    assert host["flat"] == host["leaked"] == []
    assert host["same_path"]
    assert host["lazy"]
    assert host["equal_classes"]


def test_the_network_is_an_ordinary_one(host):
    assert host["trains"]
    assert host["same"] == [True, True]  # pickled, traced by the compiler


def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf.py", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hub_finds_two_entry_points_that_say_what_they_return():
    entries = [value for name, value in vars(hubconf()).items() if callable(value) and not name.startswith("_")]
    assert [each.__name__ for each in entries] == ["binet_small", "reader"]  # as torch.hub.list tells them
    assert all(each.__doc__.startswith("Returns ") for each in entries)


def test_logits_are_decoded_as_the_entry_point_says():
    network = torch.hub.load(str(ROOT), "binet_small", source="local")
    image = cv2.resize(cv2.imread(str(ROOT / "fig" / "demo" / "hereunder.png"))[..., ::-1], (128, 32))
    inputs = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    inputs = torch.from_numpy(inputs).float().permute(2, 0, 1)[None]
    mask = Reader(details=True).read([IMAGES[3]])[0].mask
    mask = torch.from_numpy(cv2.resize(mask, (128, 32)) / 255).float()[None, None]
    classes = network(inputs, mask).alignment[-1].logits[0].argmax(1).tolist()
    assert "".join(network.charset[each - 1] for each in classes[: classes.index(0)]) == "hereunder"


def test_two_clones_are_two_packages(tmp_path):
    (tmp_path / "hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    (tmp_path / "reader.py").write_text("class Reader:\n    def __init__(self, checkpoint): self.clone = True\n")
    assert torch.hub.load(str(tmp_path), "reader", source="local").clone
    assert not hasattr(torch.hub.load(str(ROOT), "reader", source="local"), "clone")


def test_random_weights_on_request():
    shipped, fresh = (
        torch.hub.load(str(ROOT), "binet_small", source="local", pretrained=pretrained) for pretrained in (True, False)
    )
    assert shipped.state_dict().keys() == fresh.state_dict().keys()
    assert not torch.equal(shipped.alignment.cls.weight, fresh.alignment.cls.weight)
    assert type(pickle.loads(pickle.dumps(fresh))) is type(fresh)


def test_dependencies_are_the_packages_that_reading_imports():
    """Those of every file that `reader` imports, at start and later."""
    files, edges = source_files(ROOT), all_imports(ROOT)
    reached, waiting = set(), ["reader"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += {each.target for each in edges if each.source == name} - reached
    found = imported([files[name] for name in reached])
    assert set(hubconf().dependencies) == found
