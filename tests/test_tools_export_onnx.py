"""tools/export_onnx.py, tools/read_with_onnx.py: onnxruntime gives what torch gives, for any batch and image size."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bundle import load_bundle
from inference.segmenter import Segmenter
from loading.batches import normalize_images, stack_images
from loading.decoding import decode_image
from loading.lmdb_io import LmdbReader, image_key
from loading.transforms import resize
from reader import Reader
from tests.small_networks import save_networks, write_words
from tools import export_onnx
from utils import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REAL_WORDS = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_networks(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[np.ndarray]:
    """Real words where they are, drawn ones elsewhere."""
    real = sorted(path for path in REAL_WORDS.rglob("*") if path.suffix.lower() in (".jpg", ".png"))[:5]
    if len(real) == 5:
        return [decode_image(path.read_bytes()) for path in real]
    path = tmp_path_factory.mktemp("words") / "words"
    write_words(path, 5)
    reader = LmdbReader(path)
    return [decode_image(reader.get(image_key(number))) for number in range(1, 6)]


def session(path: Path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def texts(bundle, logits: np.ndarray) -> list[str]:
    return [bundle.charset.decode(row) for row in logits.argmax(-1).tolist()]


@pytest.mark.parametrize("network", ["binet", pytest.param("abinet", marks=pytest.mark.slow)])
def test_the_recogniser_reads_as_in_torch(files, images, tmp_path, network, capsys):
    output = tmp_path / "net.onnx"
    assert export_onnx.main(["--checkpoint", str(files / f"{network}.pth"), "--output", str(output)]) == 0
    assert "wrote" in capsys.readouterr().out
    bundle = load_bundle(files / f"{network}.pth")
    tensors = normalize_images(stack_images([resize(each, (32, 128)) for each in images]))
    masks = torch.stack([torch.from_numpy(resize(each, (32, 128)).mean(2) / 255).float()[None] for each in images])
    inputs = {"image": tensors} | ({"mask": masks} if network == "binet" else {})
    with torch.inference_mode():
        expected = bundle.model(tensors, inputs.get("mask"))
    exported = session(output)
    for count in (1, 3, 5):
        fed = {name: tensor[:count].numpy() for name, tensor in inputs.items()}
        logits, attention = exported.run(None, fed)
        assert np.abs(logits - expected.alignment[-1].logits[:count].numpy()).max() < TOLERANCE
        assert np.abs(attention - expected.vision.attention[:count].numpy()).max() < TOLERANCE
        assert texts(bundle, logits) == texts(bundle, expected.alignment[-1].logits[:count].numpy())
    facts = exported.get_modelmeta().custom_metadata_map
    assert facts["charset"] == bundle.charset.characters
    assert json.loads(facts["image_size"]) == [32, 128]
    assert (facts["fit"], facts["opset"]) == ("stretch", "18")


@pytest.fixture(scope="module")
def graphs(files, tmp_path_factory):
    """Recogniser and SSN of a bundle, exported."""
    folder = tmp_path_factory.mktemp("graphs")
    outputs = ["--output", str(folder / "binet.onnx"), "--ssn-output", str(folder / "ssn.onnx")]
    assert export_onnx.main(["--checkpoint", str(files / "both.pth"), *outputs]) == 0
    return folder


@pytest.mark.slow
def test_ssn_segments_images_of_any_size_as_the_segmenter(files, graphs):
    bundle = load_bundle(files / "both.pth")
    exported = session(graphs / "ssn.onnx")
    random = np.random.default_rng(0)
    for count, height, width in ((2, 31, 100), (1, 64, 64), (3, 10, 900), (1, 200, 50), (1, 1, 1)):
        images = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        (probability,) = exported.run(None, {"image": images.transpose(0, 3, 1, 2).astype(np.float32)})
        assert probability.shape == (count, 1, height, width)
        expected = np.stack(Segmenter(bundle.ssn, bundle.areas)(list(images)))
        assert np.abs(255 * probability[:, 0] - expected).max() < 0.51
    assert [each.name for each in exported.get_inputs()] == ["image"]
    assert not [each.name for each in exported.get_overridable_initializers()]
    facts = exported.get_modelmeta().custom_metadata_map
    assert json.loads(facts["areas"]) == list(bundle.areas)
    assert facts["opset"] == "18"


@pytest.mark.slow
def test_the_mean_over_several_areas(graphs, files):
    """The graph of one area, with the list of areas replaced."""
    bundle = load_bundle(files / "both.pth")
    model = onnx.load(graphs / "ssn.onnx")
    values = {"count": np.int64(2), "areas": np.array([65.0, 97.0])}
    for each in model.graph.initializer:
        if each.name in values:
            each.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values[each.name]), each.name))
    exported = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (20, 70, 3), dtype=np.uint8)
    (probability,) = exported.run(None, {"image": image.transpose(2, 0, 1)[None].astype(np.float32)})
    (expected,) = Segmenter(bundle.ssn, [65, 97])([image])
    assert np.abs(255 * probability[0, 0] - expected).max() < 0.51


@pytest.mark.slow
def test_the_example_reads_as_a_reader(files, graphs, images, tmp_path, capsys):
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(path, image[..., ::-1])
    from tools import read_with_onnx  # imports onnxruntime

    read_with_onnx.main([str(graphs / "binet.onnx"), str(graphs / "ssn.onnx"), *paths])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    predictions = Reader(files / "both.pth", device="cpu", precision="fp32").read(paths)
    assert [(path, text) for path, text, _ in lines] == [
        (path, prediction.text) for path, prediction in zip(paths, predictions, strict=True)
    ]
    for (*_, confidence), prediction in zip(lines, predictions, strict=True):
        assert abs(float(confidence) - prediction.confidence) < TOLERANCE
    with pytest.raises(SystemExit):
        read_with_onnx.main([str(graphs / "binet.onnx"), str(graphs / "ssn.onnx"), __file__])
    assert f"{__file__} is missing or no image" in capsys.readouterr().err


def test_mistakes_are_named(files, tmp_path):
    output = ["--output", str(tmp_path / "x.onnx")]
    with pytest.raises(UserError, match="carries no SSN"):
        export_onnx.main(["--checkpoint", str(files / "binet.pth"), *output, "--ssn-output", str(tmp_path / "s.onnx")])
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.onnx: exists.*--overwrite"):
        export_onnx.main(["--checkpoint", str(files / "both.pth"), *output])


def test_a_missing_package_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"^no_such_package is not installed; install requirements-dev\.txt"):
        export_onnx.main(["--checkpoint", str(files / "both.pth"), "--output", str(tmp_path / "x.onnx")])
