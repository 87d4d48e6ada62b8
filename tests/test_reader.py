"""The reader: every form of an image, batches, broken images, threads, and checkpoints that are enough alone."""

import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import reader as reader_module
from bundle import load_bundle
from engine.checkpoints import read_checkpoint
from reader import Reader
from tests.small_networks import save_networks, small_config
from tools import bundle_weights
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a recogniser with masks, one without, and an SSN; the two in one file."""
    return save_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def reader(files):
    return Reader.from_checkpoint(files / "both.pth", device="cpu", batch_size=4, precision="fp32", details=True)


def image(seed: int = 0, height: int = 30, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array[..., ::-1])[1].tobytes()


def texts(predictions) -> list[str]:
    return [prediction.text for prediction in predictions]


def test_the_extent_says_what_of_the_input_an_image_fills(reader, files):
    assert reader.read([image(height=40, width=40)])[0].extent == (0, 0, 1, 1)
    expected = {
        "align_left": [(0, 0, 1, 0.25), (0, 0, 0.5, 1)],
        "multiscales": [(0, 0.375, 1, 0.25), (0.25, 0, 0.5, 1)],
    }
    for key, extents in expected.items():
        keeping = Reader(files / "both.pth", device="cpu", config=small_config(**{key: True}))
        read = keeping.read([image(height=h, width=w) for h, w in ((40, 40), (16, 128))])
        assert [each.extent for each in read] == extents


def test_neither_a_reader_nor_the_start_of_a_test_imports_the_compiler():
    code = (
        "import sys, torch, reader; from engine.precision import choose_algorithms; "
        "choose_algorithms(deterministic=False, search=True); "
        "print({'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_form_of_an_image_gives_the_same_prediction(reader, tmp_path):
    array = image()
    (tmp_path / "word.png").write_bytes(png(array))
    opaque = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    tensor = torch.from_numpy(array)
    forms = [
        tmp_path / "word.png",
        str(tmp_path / "word.png"),
        png(array),
        array,
        opaque,
        array / 255,
        (array / 255).astype(np.float32) * 1.00001,
        (array / 255).astype(np.float16),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1) / 255,
        Image.fromarray(array),
        Image.open(io.BytesIO(png(array))),
    ]
    predictions = reader.read(forms)
    assert len({prediction.text for prediction in predictions}) == 1
    assert predictions[0].text
    assert [each.confidence for each in predictions] == pytest.approx(
        [predictions[0].confidence] * len(forms), rel=1e-4
    )


def test_grey_images_are_repeated_and_deep_ones_scaled(reader):
    grey = image()[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    predictions = reader.read([grey, grey[..., None], np.repeat(grey[..., None], 3, 2), Image.fromarray(grey), deep])
    assert len(set(texts(predictions))) == 1
    assert not any(prediction.error for prediction in predictions)


def test_booleans_are_black_and_white(reader):
    levels = np.where(image() > 127, 255, 0).astype(np.uint8)
    mask = levels[..., 0]
    expected = reader.read([levels, mask], masks=[mask, mask])
    for form in (np.asarray, torch.from_numpy):
        read = reader.read([form(levels > 0), form(mask > 0)], masks=[form(mask > 0)] * 2)
        assert read == expected
        assert all(np.array_equal(each.mask_levels, mask) for each in read)


def test_a_prediction_has_what_it_promises(reader):
    prediction = reader.read([image(3, 41, 77)])[0]
    assert prediction.error is None
    assert prediction.mask.shape == (41, 77)
    assert prediction.mask.dtype == np.float32
    assert prediction.mask.min() >= 0
    assert prediction.mask.max() <= 1
    assert prediction.refined_mask.shape == (32, 128)
    assert "".join(each.text for each in prediction.characters) == prediction.text
    assert prediction.attention.shape == (len(prediction.text), 8, 32)
    assert prediction.attention.sum(axis=(1, 2)) == pytest.approx(np.ones(len(prediction.text)), abs=1e-3)
    product = np.prod([each.confidence for each in prediction.characters])
    assert 0 <= prediction.confidence <= product + 1e-6


def test_batches_change_nothing(files):
    images = [image(seed, 20 + seed, 60 + 3 * seed) for seed in range(9)]
    one = Reader(files / "both.pth", device="cpu", batch_size=1, precision="fp32").read(images)
    many = Reader(files / "both.pth", device="cpu", batch_size=64, precision="fp32").read(images)
    assert texts(one) == texts(many)
    assert [each.confidence for each in one] == pytest.approx([each.confidence for each in many], abs=1e-5)
    assert len(set(texts(one))) > 1


def test_a_batch_may_be_one_array(reader):
    images = np.stack([image(seed) for seed in range(3)])
    expected = reader.read(list(images))
    tensor = torch.from_numpy(images)
    for batch in (images, images / 255, tensor, tensor.permute(0, 3, 1, 2), images[:0]):
        assert texts(reader.read(batch)) == texts(expected)[: len(batch)]
    masks = np.zeros((3, 30, 90), np.float32)
    assert [each.mask.max() for each in reader.read(images, masks=masks)] == [0, 0, 0]


def test_a_broken_image_fails_alone(reader, tmp_path):
    whole = image()
    (tmp_path / "broken.png").write_bytes(png(whole)[:40])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    closed = Image.open(io.BytesIO(png(whole)))
    closed.close()
    bad = [
        tmp_path / "broken.png",
        tmp_path / "text.jpg",
        tmp_path / "missing.png",
        tmp_path / "folder.png",
        tmp_path / "pipe.png",
        "nul\0byte.png",
        "x" * 5000,
        b"",
        b"\x89PNG",
        Image.open(io.BytesIO(png(image(5, 200, 400))[:9000])),
        Image.new("RGB", (0, 5)),
        Image.new("1", (1 << 14, 1 << 14)),
        closed,
        whole[:0],
        torch.zeros(3, 0, 5),
    ]
    predictions = reader.read([whole, *bad, whole])
    for each in predictions[1:-1]:
        assert (each.text, each.confidence, each.error.count("\n")) == ("", 0, 0)
    assert "broken.png" in predictions[1].error
    assert "missing.png" in predictions[3].error
    assert predictions[0].error is None
    assert texts(predictions)[0] == texts(predictions)[-1] == reader.read([whole])[0].text
    assert reader.read([bad[0]])[0].error
    assert reader.read([]) == []


@pytest.mark.parametrize(
    "mistake",
    [
        3,
        None,
        image().astype(np.int64),
        image().astype(np.uint16),
        image().astype(np.float32),
        image() / 255 - 0.5,
        np.full((9, 9, 3), np.nan),
        image().transpose(2, 0, 1),
        np.zeros((2, 9, 9, 3), np.uint8),
        np.zeros(9, np.uint8),
        torch.zeros(2, 9, 9),
    ],
)
def test_mistakes_of_the_caller_are_raised(reader, mistake):
    with pytest.raises((TypeError, ValueError)):
        reader.read([image(), mistake])
    with pytest.raises((TypeError, ValueError)):
        reader.read([image()], masks=[3 if mistake is None else mistake])


def test_a_single_image_is_a_mistake(reader):
    for single in (image(), torch.zeros(3, 9, 9), "word.png", b"bytes", Image.new("RGB", (9, 9))):
        with pytest.raises(TypeError, match="list"):
            reader.read(single)
    with pytest.raises(TypeError, match="list of images"):
        reader.stream(iter([image()]))
    with pytest.raises(ValueError, match="2 masks for 1"):
        reader.read([image()], masks=[None, None])


def test_a_folder_is_told_from_a_missing_file(reader, tmp_path):
    errors = [each.error for each in reader.read([tmp_path, tmp_path / "gone.png"])]
    assert errors == [f"{tmp_path}: a folder; name its files", f"{tmp_path / 'gone.png'}: no such file"]


def test_files_are_turned_as_their_orientation_says(reader, tmp_path):
    upright = cv2.resize(image(), (90, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image is to be turned clockwise
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    stored.save(tmp_path / "turned.png", exif=exif)
    forms = [tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes(), Image.open(tmp_path / "turned.png")]
    predictions = reader.read([upright, *forms])
    assert [each.mask.shape for each in predictions] == [(30, 90)] * 4
    assert predictions[1:] == predictions[:1] * 3


def test_letters_on_transparency_stand_on_white(reader, tmp_path):
    clear = np.zeros((30, 90, 4), np.uint8)
    clear[10:20, 20:60, 3] = 255
    white = np.where(clear[..., 3:] > 0, 0, 255).astype(np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for forms in ([clear, clear / 255], [tmp_path / "clear.png", Image.fromarray(clear)]):
        predictions = reader.read([white, *forms])
        assert predictions[1:] == predictions[:1] * 2


def test_predictions_can_be_compared_and_hashed(reader):
    first, again, other = reader.read([image(), image(), image(1)])
    assert first == again != other
    assert len({first, again, other}) == 2
    assert "array" not in repr(first)


def test_a_network_that_gives_no_numbers_is_sure_of_nothing(files):
    reader = Reader(files / "abinet.pth", device="cpu")
    with torch.no_grad():
        for tensor in reader._model.parameters():
            tensor.fill_(float("nan"))
    prediction = reader.read([image()])[0]
    assert prediction.confidence == 0
    assert all(each.confidence == 0 for each in prediction.characters)


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_batches_of_no_size_are_refused(files, size):
    with pytest.raises(UserError, match="batch_size"):
        Reader(files / "both.pth", device="cpu", batch_size=size)


def test_large_images_are_read_in_small_batches(reader, monkeypatch):
    sizes = []
    read = reader._read_images
    monkeypatch.setattr(reader_module, "single_threads", lambda count: None)
    monkeypatch.setattr(reader_module, "IMAGE_PIXELS", 3 * 30 * 90)
    monkeypatch.setattr(
        reader, "_read_images", lambda *some, **options: sizes.append(len(some[0])) or read(*some, **options)
    )
    images = [image(), image(1, 300, 90), b"", *map(image, range(2, 7))]
    predictions = reader.stream(images)
    assert sizes == []
    assert next(predictions).text
    assert sizes == [2]
    assert len(list(predictions)) == 7
    assert sizes == [2, 3, 2]


def test_details_are_kept_only_when_asked_for(files, reader):
    images = [image(seed) for seed in range(3)]
    detailed = reader.read(images)
    plain = Reader(files / "both.pth", device="cpu", batch_size=4, precision="fp32").read(images)
    assert plain == detailed
    for prediction in plain:
        assert (prediction.mask_levels, prediction.attention, prediction.refined_mask) == (None, None, None)
        assert prediction.mask is None


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_batches_are_read_side_by_side_as_one_after_the_other(reader, two_threads, monkeypatch):
    images = [image(seed, 20 + seed, 60 + 3 * seed) for seed in range(9)]
    readers, read = set(), reader._read_images

    def noted(*some, **options):
        readers.add((threading.current_thread().name, torch.get_num_threads()))
        return read(*some, **options)

    monkeypatch.setattr(reader, "_read_images", noted)
    together = reader.read(images)
    assert all(name.startswith("side-by-side") and threads == 1 for name, threads in readers)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(reader_module, "single_threads", lambda count: None)
    alone = reader.read(images)
    assert texts(together) == texts(alone)
    assert [each.confidence for each in together] == pytest.approx([each.confidence for each in alone], abs=1e-5)


def test_a_stream_decodes_only_a_few_batches_ahead(reader, two_threads, monkeypatch):
    decoded, decode = [], reader_module.to_image
    monkeypatch.setattr(reader_module, "to_image", lambda source: decoded.append(1) or decode(source))
    predictions = reader.stream([image()] * 60)
    assert not decoded
    next(predictions)
    assert 4 <= len(decoded) <= 4 * 3  # batches of 4: two are read, one waits
    predictions.close()
    assert len(decoded) <= 4 * 3


def test_a_reader_takes_16_bits_where_the_device_has_them(files, monkeypatch):
    for fastest, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        monkeypatch.setattr(reader_module, "fastest_precision", lambda device, fastest=fastest: fastest)
        reader = Reader(files / "both.pth", device="cpu")
        assert reader.precision == fastest
        assert {each.dtype for each in reader._model.parameters()} == {torch.float32, dtype}
        assert reader._segmenter.precision == fastest
        assert reader.read([image()])[0].text
    half = Reader(files / "both.pth", device="cpu", precision="fp16")
    assert (half.precision, half._segmenter.precision) == ("fp16", "fp32")  # masks might overflow
    with pytest.raises(UserError, match="precision 'int3' is unknown; give auto, fp32, bf16, fp16"):
        Reader(files / "both.pth", precision="int3")


@pytest.mark.slow
def test_a_compiled_reader_reads_the_same(files, reader, two_threads):
    images = [image(seed) for seed in range(5)]
    compiled = Reader(files / "both.pth", device="cpu", batch_size=4, precision="fp32", compile=True, details=True)
    for count in (5, 1):
        expected = reader.read(images[:count])
        read = compiled.read(images[:count])
        assert texts(read) == texts(expected)
        assert [each.confidence for each in read] == pytest.approx([each.confidence for each in expected], abs=1e-4)


def test_unsure_words_are_predicted_again_where_the_caller_or_the_config_says_so(files, reader):
    images = [image(seed, width=40 + 20 * seed) for seed in range(6)]
    once = reader.read(images)
    settings = {"device": "cpu", "precision": "fp32", "details": True, "batch_size": 4}
    for options in ({"tta_below": 1.0}, {"config": small_config(tta_below=1.0)}):
        more = Reader(files / "both.pth", **settings, **options).read(images)
        assert all(a.confidence >= b.confidence for a, b in zip(more, once, strict=True))
        assert any(a.confidence > b.confidence for a, b in zip(more, once, strict=True))
        assert all(np.allclose(each.attention.sum((1, 2)), 1, atol=1e-3) for each in more)
    assert Reader(files / "both.pth", **settings, tta_below=0, config=small_config(tta_below=1.0)).read(images) == once


@pytest.mark.parametrize("threshold", ["0.7", -0.1, 2, float("nan")])
def test_thresholds_that_are_no_confidence_are_refused(files, threshold):
    with pytest.raises(UserError, match="tta_below"):
        Reader(files / "both.pth", device="cpu", tta_below=threshold)


def test_the_most_probable_words_and_characters_are_given(reader):
    for prediction in reader.read([image(seed) for seed in range(4)], topk=3):
        confidences = [each.confidence for each in prediction.candidates]
        assert len({each.text for each in prediction.candidates}) == 3
        assert confidences == sorted(confidences, reverse=True)
        assert confidences[0] >= prediction.confidence * 0.999
        ends = [] if len(prediction.text) == 26 else [""]  # the last step may read a character, too
        assert [step[0].text for step in prediction.steps[: len(prediction.text) + 1]] == [*prediction.text, *ends]
        assert [len(step) for step in prediction.steps] == [3] * len(prediction.steps)
        for character, step in zip(prediction.characters, prediction.steps, strict=False):
            assert step[0].confidence == pytest.approx(character.confidence, rel=1e-4)
    assert reader.read([image()])[0].candidates == reader.read([image()])[0].steps == ()
    for mistake in (-1, 1.5):
        with pytest.raises(UserError, match="topk"):
            reader.read([image()], topk=mistake)


def test_the_closest_word_of_a_list_is_given(reader):
    best, second = [word for word in reader.read([image()], topk=3)[0].candidates if word.text][:2]
    prediction = reader.read([image()], lexicon=["zzzzzz", second.text, "the"])[0]
    assert prediction.match.text == second.text
    both = reader.read([image()], lexicon=[second.text, best.text])[0].match
    assert both.text == best.text
    assert both.confidence == pytest.approx(best.confidence / (best.confidence + second.confidence), rel=1e-3)
    assert reader.read([image()])[0].match is None
    with pytest.raises(UserError, match="lexicon"):
        reader.read([image()], lexicon=["---"])
    with pytest.raises(TypeError, match="lexicon"):
        reader.read([image()], lexicon="word")


def test_masks_stay_in_8_bits(reader):
    prediction = reader.read([image(0, 300, 900)])[0]
    assert prediction.mask_levels.dtype == np.uint8
    held = sum(each.nbytes for each in vars(prediction).values() if isinstance(each, np.ndarray))
    assert held < 300 * 900 + 100_000
    assert prediction.mask.dtype == np.float32


def test_threads_share_a_reader(reader):
    groups = [[image(10 * group + k) for k in range(3)] for group in range(6)]
    expected = [texts(reader.read(group)) for group in groups]
    with ThreadPoolExecutor(4) as pool:
        assert [texts(predictions) for predictions in pool.map(reader.read, groups)] == expected


def test_given_masks_replace_ssn(reader):
    array = image()
    own = reader.read([array])[0]
    assert reader.read([array], masks=[np.rint(own.mask * 255).astype(np.uint8)])[0].text == own.text
    white = reader.read([array], masks=[np.full(array.shape[:2], 255, np.uint8)])[0]
    assert white.mask.min() == 1
    assert reader.read([array], masks=[np.zeros((3, 3), np.uint8)])[0].error


def test_a_network_without_masks_needs_no_ssn(files):
    prediction = Reader(files / "abinet.pth", device="cpu", details=True).read([image()])[0]
    assert prediction.text
    assert prediction.attention is not None
    assert prediction.mask is None
    assert prediction.refined_mask is None


def test_masks_without_ssn_are_refused_unless_they_are_empty(files):
    with pytest.raises(UserError, match="carries no SSN"):
        Reader(files / "binet.pth", device="cpu")
    blind = Reader(files / "binet.pth", device="cpu", masks="none", details=True)
    assert blind.read([image()])[0].mask.max() == 0
    separate = Reader(files / "binet.pth", device="cpu", ssn=files / "ssn.pth")
    bundled = Reader(files / "both.pth", device="cpu", ssn=files / "both.pth")
    assert separate.read([image()])[0].text == bundled.read([image()])[0].text


def test_any_sub_model_may_be_read(files):
    for name in ("vision", "language", "alignment"):
        assert Reader(files / "abinet.pth", device="cpu", model_eval=name).read([image()])[0].error is None
    with pytest.raises(UserError, match="model_eval"):
        Reader(files / "abinet.pth", device="cpu", model_eval="ssn")


def test_a_checkpoint_is_enough_without_its_charset_file(files, tmp_path):
    state = read_checkpoint(files / "abinet.pth")
    state["config"]["dataset"]["charset_path"] = "gone/charset.txt"
    torch.save(state, tmp_path / "moved.pth")
    original = Reader(files / "abinet.pth", device="cpu").read([image()])[0]
    assert Reader(tmp_path / "moved.pth", device="cpu").read([image()])[0].text == original.text


def test_plain_weights_need_a_config(files, tmp_path):
    torch.save(read_checkpoint(files / "abinet.pth")["model"], tmp_path / "plain.pth")
    with pytest.raises(UserError, match="carries no config"):
        Reader(tmp_path / "plain.pth", device="cpu")
    assert Reader(tmp_path / "plain.pth", device="cpu", config=small_config("abinet")).read([image()])[0].text


def test_mistakes_are_named(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        Reader(tmp_path / "none.pth")
    with pytest.raises(UserError, match="reads no images"):
        Reader(files / "ssn.pth")
    with pytest.raises(UserError, match="holds no SSN"):
        Reader(files / "binet.pth", ssn=files / "abinet.pth")
    for device in ("toaster", "meta"):
        with pytest.raises(UserError, match="device"):
            Reader(files / "abinet.pth", device=device)
    monkeypatch.setattr(reader_module, "DEFAULT_CHECKPOINT", tmp_path / "weights.pth")
    with pytest.raises(UserError, match="--checkpoint"):
        Reader()
    monkeypatch.setattr(reader_module, "DEFAULT_CHECKPOINT", files / "both.pth")
    assert Reader(device="cpu").read([image()])[0].text


def test_a_bundle_that_cannot_be_used_takes_no_name(files, tmp_path):
    output = tmp_path / "bundle.pth"
    arguments = ["--recogniser", str(files / "binet.pth"), "--output", str(output), "--overwrite"]
    assert bundle_weights.main([*arguments, "--ssn", str(files / "ssn.pth")]) == 0
    before = output.read_bytes()
    with pytest.raises(UserError, match="no SSN"):
        bundle_weights.main([*arguments, "--ssn", str(files / "binet.pth")])
    with pytest.raises(UserError, match="no images"):
        bundle_weights.main(["--recogniser", str(files / "ssn.pth"), "--output", str(output), "--overwrite"])
    assert output.read_bytes() == before


def test_a_half_precision_bundle_reads_the_same_and_carries_no_paths(files, tmp_path, capsys):
    arguments = ["--recogniser", str(files / "binet.pth"), "--ssn", str(files / "ssn.pth"), "--half"]
    output = tmp_path / "half.pth"
    assert bundle_weights.main([*arguments, "--output", str(output)]) == 0
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        bundle_weights.main([*arguments, "--output", str(output)])
    state = read_checkpoint(output)
    assert state["model"]["vision.backbone.transformer.layers.0.linear1.weight"].dtype == torch.float16
    assert state["model"]["vision.backbone.transformer.layers.0.linear1.bias"].dtype == torch.float32
    assert state["model"]["vision.cls.weight"].dtype == torch.float32  # decides about characters
    assert str(Path(__file__).parents[1]) not in str(state["config"]) + str(state["ssn"]["config"])
    images = [image(seed) for seed in range(6)]
    half, whole = Reader(output, device="cpu"), Reader(files / "both.pth", device="cpu")
    assert load_bundle(output).model.vision.cls.weight.dtype == torch.float32
    bundle_weights.main([*arguments, "--output", str(output), "--areas", "97", "129", "--overwrite"])
    assert load_bundle(files / "both.pth").areas == (65,)
    assert load_bundle(output).areas == (97, 129)
    similar = [a.text == b.text for a, b in zip(half.read(images), whole.read(images), strict=True)]
    assert sum(similar) >= 4  # random weights read at the edge of many characters
