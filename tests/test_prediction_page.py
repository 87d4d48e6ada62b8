"""The page of predictions: what it shows of each word, and that it needs nothing else."""

import base64
import re

import cv2
import numpy as np

import demo
from evaluation.prediction_page import HEIGHT, page_entry
from evaluation.report import render_page
from reader import Character, Prediction
from tests.small_networks import save_networks


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition("base64,")[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def prediction(text: str, image: np.ndarray, **more) -> Prediction:
    attention = np.zeros((len(text), 8, 32), np.float32)
    for place in range(len(text)):
        attention[place, :, place] = 1 / 8
    return Prediction(text, 0.5, tuple(Character(each, 0.75) for each in text), attention=attention, **more)


def test_an_entry_has_the_image_its_masks_and_the_attention_of_each_character():
    image = np.full((32, 128, 3), 200, np.uint8)
    mask = np.zeros((32, 128), np.uint8)
    mask[:, :64] = 255
    entry = page_entry("a.png", image, prediction("ab", image, mask_levels=mask, refined_mask=mask / 255.0))
    names, images = zip(*entry["images"], strict=True)
    assert names == ("image", "text mask", "refined mask")
    shown, masked, refined = map(decoded, images)
    assert shown.shape == masked.shape == refined.shape == (HEIGHT, 4 * HEIGHT, 3)
    assert np.abs(shown.astype(int) - 200).max() < 3
    assert masked[48, 300].min() > 190  # no text there
    assert masked[48, 50, 1] < 130  # red
    assert (refined[48, 50] > 250).all()
    assert (refined[48, 300] < 5).all()
    first, second = (decoded(each["image"]) for each in entry["characters"])
    assert [(each["text"], each["confidence"]) for each in entry["characters"]] == [("a", 0.75), ("b", 0.75)]
    brightest = [int(each[24, :, 0].argmax()) for each in (first, second)]
    assert brightest[0] < brightest[1] < 15


def test_turned_words_are_shown_upright():
    image = np.zeros((128, 32, 3), np.uint8)
    image[:64] = 255
    entry = page_entry("a.png", image, prediction("a", image, turned=90, mask_levels=image[..., 0]))
    shown, masked = (decoded(each) for _, each in entry["images"])
    assert shown.shape[1] == 4 * shown.shape[0]
    assert masked.shape == shown.shape
    assert abs(int(shown[48, 50, 0]) - int(shown[48, 300, 0])) > 250


def test_demo_writes_a_page_that_needs_no_other_file(tmp_path, capsys):
    weights = save_networks(tmp_path) / "both.pth"
    words = tmp_path / "words"
    words.mkdir()
    cv2.imwrite(str(words / "one.png"), np.random.default_rng(0).integers(0, 255, (30, 90, 3), np.uint8))
    (words / "two <b>.png").write_bytes(b"no image")
    page = tmp_path / "new" / "page.html"
    arguments = ["--input", str(words), "--checkpoint", str(weights), "--device", "cpu", "--html", str(page)]
    assert demo.main(arguments) == 0
    assert str(page) in capsys.readouterr().err
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert text.count('class="seen"') == 1
    assert text.count("<figure>") >= 3
    assert "two &lt;b&gt;.png: not an image" in text


def test_names_and_texts_stay_text():
    entry = page_entry("<i>.png", None, Prediction("", 0.0, error="<script>"))
    page = render_page("demo.html.j2", title="<em>", details={"<u>": "&"}, words=[entry])
    assert not re.search("<(i|em|u)>|<script>", page)
