"""weights/binet-small.pth: what README and the model card say of it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import main
from bundle import load_bundle
from config import load_config
from inference.prepare import prepare_for_inference
from inference.segmenter import Segmenter
from loading.batches import normalize_images, stack_images
from loading.decoding import decode_image
from loading.transforms import ResizeWord, turn
from reader import DEFAULT_CHECKPOINT, Reader
from tests.browser import fill, found, missing_images, overflow, page_data, show
from tests.reference import fill_known_weights

ROOT = Path(__file__).parent.parent
IMAGES = sorted((ROOT / "fig" / "demo").glob("*.png"))  # named after what they say
REAL_WORDS = ROOT.parent / "shared" / "data" / "eval"
LARGEST = 25 * 2**20  # bytes


def test_the_file_is_small_and_whole():
    assert DEFAULT_CHECKPOINT.stat().st_size <= LARGEST
    content = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    assert {"model", "config", "charset", "ssn"} <= set(content)
    parts = content["model"], content["ssn"]["model"]
    numbers = [(tensor.numel(), tensor.dtype) for part in parts for tensor in part.values()]
    halves = sum(count for count, dtype in numbers if dtype == torch.float16)
    assert halves > 0.95 * sum(count for count, _ in numbers)


def test_a_reader_without_arguments_reads_the_images_of_the_demo():
    predictions = Reader(details=True).read(IMAGES)
    right = [prediction.text == path.stem for prediction, path in zip(predictions, IMAGES, strict=True)]
    assert sum(right) >= len(IMAGES) - 1
    assert all(prediction.mask is not None for prediction in predictions)


def test_the_demo_needs_no_flag_but_its_input(capsys, tmp_path):
    assert demo.main(["--input", str(IMAGES[0].parent), "--overlay", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(IMAGES)
    assert len(list(tmp_path.glob("*.png"))) == len(IMAGES)


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory):
    page = tmp_path_factory.mktemp("demo") / "index.html"
    demo.main(["--input", str(IMAGES[0].parent), "--precision", "fp32", "--html", str(page)])
    return page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_the_demo_shows_every_word(browser, demo_page, width):
    show(browser, demo_page, width=width)
    assert not overflow(browser, width)
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.{})"
    texts = browser.execute_script(script.format("textContent"), ".word .prediction")
    assert sum(text == path.stem for text, path in zip(texts, IMAGES, strict=True)) >= len(IMAGES) - 1
    sizes = browser.execute_script(script.format("naturalWidth"), ".word img")
    assert len(sizes) == 3 * len(IMAGES) + sum(map(len, texts))
    assert all(sizes)
    heights = browser.execute_script(script.format("clientHeight"), ".word .steps img")
    assert min(heights) >= 16  # pixels, of long words too
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_picture_in_readme_is_that_page(browser, demo_page, tmp_path):
    """As seen from afar: fonts differ between machines. If it fails, copy what the test took to fig/demo_page.png."""
    show(browser, demo_page, width=1000, height=896)  # four words
    browser.execute_script("document.documentElement.style.overflow = 'hidden'")  # no scroll bar
    taken = tmp_path / "demo_page.png"
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    image.quantize(256, kmeans=2).save(taken, optimize=True)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    stored = ROOT / "fig" / "demo_page.png"
    assert stored.stat().st_size < 150 * 1024
    now, then = (np.array(Image.open(path).convert("RGB").reduce(25), np.int16) for path in (taken, stored))
    assert now.shape == then.shape
    assert np.abs(now - then).mean() < 6, taken


def test_words_turned_by_90_degrees_are_read_where_that_is_asked_for():
    words = {path.stem: decode_image(path.read_bytes()) for path in IMAGES}
    words = {text: word for text, word in words.items() if word.shape[1] > 1.5 * word.shape[0]}
    turned = [turn(word, (90, 270)[i % 2]) for i, word in enumerate(words.values())]
    config, right = load_bundle(DEFAULT_CHECKPOINT).config, {}
    for ratio in (None, 1.5):
        config.dataset.turn_tall = ratio
        read = Reader(config=config, details=True).read(turned)
        right[ratio] = sum(prediction.text == text for prediction, text in zip(read, words, strict=True))
    assert [each.turned for each in read] == [(270, 90)[i % 2] for i in range(len(read))]
    assert all(each.mask.shape == word.shape[:2] for each, word in zip(read, turned, strict=True))
    assert right[None] <= 1
    assert right[1.5] >= len(words) - 1 >= 5


# --- real words -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """Work folder of a test of the weights on real words, masks online."""
    if not REAL_WORDS.is_dir():
        pytest.skip("no real words here")
    folder = tmp_path_factory.mktemp("weights")
    for name in ("ic13_1015", "cute80"):
        convert = [sys.executable, "tools/create_lmdb_dataset.py", REAL_WORDS / name, REAL_WORDS / name / "gt.txt"]
        subprocess.run([*convert, folder / "words" / name], cwd=ROOT, check=True, capture_output=True)
    arguments = ["--config", "configs/small.yaml", "--phase", "test", "--name", "run", "--image_only"]
    arguments += ["--checkpoint", str(DEFAULT_CHECKPOINT), "--test_root", str(folder / "words")]
    main.main([*arguments, f"global.workdir={folder}", "dataset.masks.source=online", "dataset.num_workers=0"])
    return folder / "run"


@pytest.mark.slow
def test_every_real_word_is_accounted_for_and_as_many_are_read_as_readme_says(tested):
    sets = json.loads((tested / "metrics.json").read_text())["datasets"]
    for name, words, least in (("ic13_1015", 1015, 0.88), ("cute80", 288, 0.62)):
        assert sets[name]["samples"] + sum(sets[name]["skipped"].values()) == words
        assert sets[name]["accuracy"] >= least


@pytest.mark.slow
def test_a_reader_reads_real_words_as_main_does(tested):
    folder = REAL_WORDS / "ic13_1015"
    images = [line.split("\t")[0] for line in (folder / "gt.txt").read_text().splitlines()]
    read = [prediction.text for prediction in Reader(precision="fp32").read([folder / image for image in images])]
    lines = (tested / "ic13_1015-alignment" / "alignment.txt").read_text().splitlines()
    assert read == [line.split("\t")[1] for line in lines]


@pytest.mark.slow
def test_the_report_on_real_words_works_in_a_browser(tested, browser):
    page = tested / "report" / "index.html"
    browser.set_window_size(1280, 900)
    browser.get(page.resolve().as_uri())
    words = page_data(page)["words"]
    wrong = sum(1 - each[5] for each in words)
    assert found(browser) == (len(words), wrong)
    assert missing_images(browser) == 0
    fill(browser, wrong=True)
    assert found(browser) == (wrong, wrong)
    assert missing_images(browser) == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def real_inputs():
    """Images (N, 3, 32, 128) and SSN's masks (N, 1, 32, 128) of every real word."""
    if not REAL_WORDS.is_dir():
        pytest.skip("no real words here")
    bundle = load_bundle(DEFAULT_CHECKPOINT)
    images = [decode_image(path.read_bytes()) for path in sorted(REAL_WORDS.glob("*/images/*"))]
    masks = Segmenter(bundle.ssn, bundle.areas)(images)
    resize = ResizeWord(size=bundle.config.dataset.image_size, fit=bundle.config.dataset.fit)
    sized = [resize(image, mask, None) for image, mask in zip(images, masks, strict=True)]
    tensors = normalize_images(stack_images([image for image, _ in sized]))
    return tensors, torch.from_numpy(np.stack([mask for _, mask in sized])).unsqueeze(1).float() / 255


def shipped_network():
    return load_bundle(DEFAULT_CHECKPOINT).model.eval()


def full_size_network():
    nothing = ["model.vision.checkpoint=null", "model.language.checkpoint=null"]
    return fill_known_weights(main.build_model(load_config("configs/train.yaml", nothing))).eval()


@pytest.mark.slow
@pytest.mark.parametrize("make_network", [shipped_network, full_size_network])
def test_the_16_bit_form_reads_the_characters_of_float32(make_network, real_inputs):
    network = make_network()
    fast = prepare_for_inference(network, precision="bf16", compile=True)
    same = []
    with torch.inference_mode():
        for image, mask in zip(*(each.split(32) for each in real_inputs), strict=True):
            expected, read = (form(image, mask).alignment[-1].logits.argmax(-1) for form in (network, fast))
            same.append(read == expected)  # (N, T)
    share = float(torch.cat(same).double().mean())
    print(f"{make_network.__name__}: {100 * share:.3f} % of the positions of {len(real_inputs[0])} words")
    assert share >= 0.999
