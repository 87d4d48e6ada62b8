"""tools/export_onnx.py: onnxruntime gives what torch gives, for any batch size."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bundle import load_bundle
from loading.batches import normalize_images, stack_images
from loading.decoding import decode_image
from loading.lmdb_io import LmdbReader, image_key
from loading.transforms import resize
from tests.small_networks import save_networks, write_words
from tools import export_onnx
from utils import UserError

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
    assert facts["fit"] == "stretch"


@pytest.mark.slow
def test_ssn_and_recogniser_in_one_graph(files, images, tmp_path):
    output = tmp_path / "both.onnx"
    arguments = ["--checkpoint", str(files / "both.pth"), "--output", str(output)]
    assert export_onnx.main([*arguments, "--ssn", "--ssn-size", "33", "97"]) == 0
    bundle = load_bundle(files / "both.pth")
    network = export_onnx.SegmentingRecogniser(
        export_onnx.Recogniser(bundle.model, "alignment"), bundle.ssn, bundle.image_size
    )
    sized = np.stack([cv2.resize(each, (97, 33)) for each in images]).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        expected = [each.numpy() for each in network(torch.from_numpy(sized))]
    exported = session(output)
    for count in (1, 4):
        for given, wanted in zip(exported.run(None, {"image": sized[:count]}), expected, strict=True):
            assert np.abs(given - wanted[:count]).max() < TOLERANCE
    logits = exported.run(None, {"image": sized})[0]
    assert texts(bundle, logits) == texts(bundle, expected[0])
    assert json.loads(exported.get_modelmeta().custom_metadata_map["image_size"]) == [33, 97]


def test_mistakes_are_named(files, tmp_path):
    both = ["--checkpoint", str(files / "both.pth"), "--output", str(tmp_path / "x.onnx")]
    with pytest.raises(UserError, match="32 k"):
        export_onnx.main([*both, "--ssn", "--ssn-size", "64", "256"])
    with pytest.raises(UserError, match="carries no SSN"):
        export_onnx.main(["--checkpoint", str(files / "binet.pth"), "--output", str(tmp_path / "x.onnx"), "--ssn"])
    alone = ["--checkpoint", str(files / "abinet.pth"), "--output", str(tmp_path / "x.onnx")]
    with pytest.raises(UserError, match="without --ssn"):
        export_onnx.main([*alone, "--ssn", str(files / "ssn.pth")])
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="--overwrite"):
        export_onnx.main(both)


def test_a_missing_package_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"^no_such_package is not installed; install requirements-dev\.txt"):
        export_onnx.main(["--checkpoint", str(files / "both.pth"), "--output", str(tmp_path / "x.onnx")])
