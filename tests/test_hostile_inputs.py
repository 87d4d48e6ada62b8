"""Hostile inputs of every kind that a user hands over: each ends in a result, a counted skip or one line.

`pytest -m slow tests/test_hostile_inputs.py` runs thousands and prints the counts; the ordinary suite runs a sample.
"""

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from hostile import (
    FAULTS,
    LINE,
    ODD_VALUES,
    RAISED,
    RESULT,
    SKIP,
    _cyclic,
    _shared,
    mutated,
    mutated_text,
    mutated_value,
    run_cases,
    table,
    with_sides,
)
from PIL import Image
from small_networks import SSN, save_networks, small_config
from tiny_run import NAME, WORDS, start, write_config

from builders import build_model
from config import load_config
from dataset import LanguageDataset, open_segmentation_datasets, open_word_datasets
from engine.checkpoints import load_checkpoint
from loading.augmentation import CropSegmentation
from loading.batches import LabelRule, LanguageCollate, WordCollate, collate_segmentation
from loading.charset import Charset
from loading.decoding import BrokenImageError, decode_image, decode_mask
from loading.lmdb_io import NUM_SAMPLES, LmdbWriter, image_key, label_key, mask_key
from loading.transforms import ResizeWord
from rendering.config import load_render_config
from rendering.engine import WordRenderer
from utils import UserError

SEED = 0
CASES = {  # of the slow test
    "image": 500,
    "reader": 250,
    "demo": 120,
    "word LMDB": 200,
    "mask LMDB": 150,
    "segmentation": 200,
    "config": 350,
    "override": 200,
    "render config": 150,
    "charset": 80,
    "checkpoint": 350,
    "bundle": 200,
    "test": 60,
    "resume": 80,
    "language CSV": 200,
    "word list": 150,
    "SynthText": 120,
    "MJSynth": 80,
    "segmentation sets": 200,
}
PER_KIND = 5  # of the ordinary suite

Rng = np.random.Generator
Run = Callable[[], str]


# --- material ---------------------------------------------------------------------------------------------------------


def encoded_images() -> dict[str, bytes]:
    """A word as many formats and colour models hold it."""
    base = np.full((24, 72, 3), 200, np.uint8)
    cv2.putText(base, "exit", (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (10, 20, 60), 2)
    image = Image.fromarray(base)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.asarray(image.convert("L"))
    forms = {
        "rgb.png": (image, {}),
        "rgba.png": (image.convert("RGBA"), {}),
        "palette.png": (image.convert("P"), {"transparency": 3}),
        "16.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "1.png": (image.convert("1"), {}),
        "la.png": (image.convert("LA"), {}),
        "grey.jpg": (image.convert("L"), {}),
        "turned.jpg": (image, {"exif": exif, "progressive": True}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "rgb.bmp": (image, {}),
        "moving.gif": (image, {"save_all": True, "append_images": [image, image]}),
        "lzw.tiff": (image, {"compression": "tiff_lzw"}),
        "16.tiff": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "float.tiff": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "rgb.webp": (image, {}),
        "lossless.webp": (image.convert("RGBA"), {"lossless": True}),
        "rgb.ppm": (image, {}),
        "long.png": (Image.new("RGB", (20000, 1)), {}),
        "high.png": (Image.new("L", (1, 20000)), {}),
        "large.png": (Image.new("1", (8000, 8000)), {}),
    }
    encoded = {}
    for name, (each, options) in forms.items():
        each.save(
            stream := io.BytesIO(),
            {"jpg": "JPEG", "tiff": "TIFF"}.get(name.split(".")[1], name.split(".")[1]),
            **options,
        )
        encoded[name] = stream.getvalue()
    return encoded


def mask_png() -> bytes:
    mask = np.zeros((24, 72), np.uint8)
    mask[6:18, 5:50] = 255
    return cv2.imencode(".png", mask)[1].tobytes()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """What is mutated: images, networks, and a run that was stopped on its way."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "images").mkdir()
    for name, data in encoded_images().items():
        (folder / "images" / name).write_bytes(data)
    (folder / "mask.png").write_bytes(mask_png())
    save_networks(folder)
    run = folder / "run"
    run.mkdir()
    config = write_config(run, train=16, test=4)
    trained = start(config, "training.iterations=4", "training.eval_iters=4", "training.save_iters=2")
    assert trained.wait() == 0, trained.text()
    return folder


def draw_image(rng: Rng, material: Path, *, large: bool = True) -> bytes:
    """An encoded image: mutated, of a false size, or whole in one of many forms.

    Args:
        large: of many pixels or false sizes, too: not for lists, which name an image thousands of times.
    """
    names = sorted(os.listdir(material / "images"))
    name = str(rng.choice(names))
    if name in ("large.png", "long.png", "high.png") and (not large or rng.random() < 0.8):
        name = "rgb.png"
    data, kind = (material / "images" / name).read_bytes(), rng.random()
    if kind < 0.15:
        return data
    if kind < 0.4 and large:
        return with_sides(rng, data)
    return mutated(rng, data)


# --- images -----------------------------------------------------------------------------------------------------------


def image(rng: Rng, folder: Path, material: Path) -> Run:
    data, decode, oriented = draw_image(rng, material), rng.choice([decode_image, decode_mask]), bool(rng.integers(2))

    def run() -> str:
        try:
            decoded = decode(data, oriented=oriented)
        except BrokenImageError:
            return SKIP
        assert decoded.dtype == np.uint8
        assert decoded.ndim == (3 if decode is decode_image else 2)
        return RESULT

    return run


def odd_image(rng: Rng, folder: Path, material: Path):
    """Something that may be given to a reader as an image."""
    kind = int(rng.integers(8))
    if kind <= 2:
        return draw_image(rng, material)
    if kind == 3:
        path = folder / f"{rng.integers(10**6)}.png"
        path.write_bytes(draw_image(rng, material))
        return [str(path), path][int(rng.integers(2))]
    if kind == 4:
        odd = ["a\0b.png", "", "nothing.png", str(folder), "/dev/null", "x" * 5000, "\ud800.png", Path("\n")]
        return odd[int(rng.integers(len(odd)))]
    if kind == 5:
        mode = str(
            rng.choice(["RGB", "RGBA", "L", "P", "1", "CMYK", "I", "F", "I;16", "LAB", "HSV", "YCbCr", "LA", "PA"])
        )
        size = [(0, 5), (5, 0), (1, 1), (40, 20), (20000, 1)][int(rng.integers(5))]
        return Image.new(mode, size)
    if kind == 6:
        shape = [
            (0, 5, 3),
            (20, 40, 3),
            (20, 40),
            (3, 20, 40),
            (20, 40, 4),
            (20, 40, 5),
            (2, 20, 40, 3),
            (),
            (7,),
            (1, 1, 3),
        ]
        types = ["uint8", "float32", "float64", "bool", "int64", "uint16", "complex64", "object", "U1", "datetime64[s]"]
        array = np.zeros(shape[int(rng.integers(len(shape)))], types[int(rng.integers(len(types)))])
        if array.dtype.kind == "f" and array.size:
            array.flat[0] = (np.nan, np.inf, -1, 300, 1e300)[int(rng.integers(5))]
        if rng.random() < 0.3 and array.dtype.kind in "fbi":
            return torch.from_numpy(array)
        return array
    odd = (None, 7, 0.5, {}, [], (), object(), b"", bytearray(b"x"), memoryview(b"x"), io.BytesIO(b"x"), torch.zeros(3))
    return odd[int(rng.integers(len(odd)))]


_made: dict[str, object] = {}


def made_once(name: str, make: Callable[[], object]):
    if name not in _made:
        _made[name] = make()
    return _made[name]


def reader(rng: Rng, folder: Path, material: Path) -> Run:
    """A good image stands before and behind hostile ones, and is read as ever."""
    from reader import Reader

    checkpoint = str(rng.choice(["both.pth", "abinet.pth"]))
    network = made_once(checkpoint, lambda: Reader(material / checkpoint, device="cpu"))
    good = (material / "images" / "rgb.png").read_bytes()
    given = [good, *(odd_image(rng, folder, material) for _ in range(int(rng.integers(1, 4)))), good]
    masks = None
    if rng.random() < 0.3:
        masks = [None, *(odd_image(rng, folder, material) for _ in given[2:]), None]
    expected = network.read([good])[0]

    def run() -> str:
        try:
            predictions = network.read(given, masks)
        except (TypeError, ValueError) as error:
            where = error.__traceback__
            while where.tb_next is not None:
                where = where.tb_next
            if isinstance(error, UserError) or Path(where.tb_frame.f_code.co_filename).name != "reader.py":
                raise
            return RAISED
        assert len(predictions) == len(given)
        for prediction in (predictions[0], predictions[-1]):
            assert prediction.text == expected.text
            assert abs(prediction.confidence - expected.confidence) < 1e-4
        assert all(each.error is None or not each.text for each in predictions)
        return SKIP if any(each.error for each in predictions) else RESULT

    return run


def demo(rng: Rng, folder: Path, material: Path) -> Run:
    import demo as program

    images = folder / "in"
    images.mkdir()
    names = ["a.png", "b\tc.jpg", "d\n.png", "é.tif", "UPPER.PNG", "x.gif"]
    for name in names[: int(rng.integers(1, len(names)))]:
        (images / name).write_bytes(draw_image(rng, material))
    if rng.random() < 0.2:
        (images / "folder.png").mkdir()
    count = len(list(images.iterdir()))
    checkpoint = str(rng.choice(["both.pth", "abinet.pth"]))
    arguments = ["--input", str(images), "--checkpoint", str(material / checkpoint), "--device", "cpu"]
    as_json = bool(rng.integers(2))
    arguments += ["--json"] if as_json else []
    arguments += ["--overlay", str(folder / "out")] if rng.random() < 0.6 else []

    def run() -> str:
        told = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(told):
            status = program.main(arguments)
        lines = printed.getvalue().split("\n")[:-1]
        assert count - 1 <= len(lines) <= count, lines  # a folder is no image
        rows = [json.loads(line, parse_constant=_refuse) for line in lines] if as_json else lines
        assert as_json or all(row.count("\t") == 2 for row in rows)
        errors = sum("error" in row for row in rows) if as_json else told.getvalue().count("\nerror: ")
        errors += told.getvalue().startswith("error: ")
        assert status == (2 if errors == len(rows) else 0)
        return SKIP if errors else RESULT

    return run


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


# --- LMDBs ------------------------------------------------------------------------------------------------------------

NUMBERS = (
    b"",
    b"-1",
    b"0",
    b"7.0",
    b"1e3",
    b" 6",
    b"99",
    b"9" * 12,
    b"9" * 30,
    b"\xff\xfe",
    "٦".encode(),
    b"6\0",
    b"x" * 2000,
)
KEYS = ("image-000000000", "image-1", "label-99999999x", "image--00000001", "image-000000099", "x", "label-000000003\0")


def write_entries(path: Path, entries: dict[str, bytes]) -> None:
    with LmdbWriter(path) as writer:
        for name, value in entries.items():
            writer.put(name, value)


def damage_entries(rng: Rng, entries: dict[str, bytes], material: Path) -> dict[str, bytes]:
    entries = dict(entries)
    for _ in range(int(rng.integers(1, 5))):
        name, kind = str(rng.choice(sorted(entries))), rng.random()
        if name == NUM_SAMPLES and kind < 0.7:
            entries[name] = NUMBERS[int(rng.integers(len(NUMBERS)))]
        elif kind < 0.1:
            del entries[name]
        elif kind < 0.2:
            entries[str(rng.choice(KEYS))] = entries[name]
        elif kind < 0.6 and not name.startswith("label"):
            entries[name] = draw_image(rng, material)
        elif name.startswith("label"):
            entries[name] = mutated_text(rng, entries[name].decode(errors="replace"))
        else:
            entries[name] = mutated(rng, entries[name])
    return entries


def damage_file(rng: Rng, path: Path) -> None:
    """Cut a file short, seldom: LMDB trusts what stands in its pages."""
    if rng.random() < 0.1:
        data = (path / "data.mdb").read_bytes()
        (path / "data.mdb").write_bytes(data[: int(rng.integers(len(data)))])


def word_entries(material: Path, count: int = 6, *, masks: bool = False) -> dict[str, bytes]:
    data = (material / ("mask.png" if masks else "images/rgb.png")).read_bytes()
    entries = {NUM_SAMPLES: str(count).encode()}
    for number in range(1, count + 1):
        entries |= {image_key(number): data, label_key(number): WORDS[number].encode()}
    return entries


def read_words(root: Path, masks: Path | None) -> str:
    """Every word of a root, in batches; counts what is left out."""
    labels = LabelRule(Charset.from_file("data/charset_36.txt"))
    datasets = open_word_datasets([root], labels=labels, transform=ResizeWord(), masks=masks)
    left_out = 0
    for dataset in datasets:
        left_out += sum(dataset.filtered.values())
        assert len(dataset) + sum(dataset.filtered.values()) == len(dataset.reader)
        for first in range(0, len(dataset), 4):
            samples = dataset.__getitems__(range(first, min(first + 4, len(dataset))))
            batch = WordCollate(labels)(samples)
            assert len(batch) + len(batch.skipped) == len(samples)
            left_out += len(batch.skipped)
    return SKIP if left_out else RESULT


def word_lmdb(rng: Rng, folder: Path, material: Path) -> Run:
    path = folder / "images" / "set"
    write_entries(path, damage_entries(rng, word_entries(material), material))
    damage_file(rng, path)
    way = rng.random()
    if way < 0.25:
        from tools import check_lmdb

        options = [["--contact-sheet", str(folder / "sheet.png")], ["--fix", str(folder / "fixed")], []]
        return lambda: ended(check_lmdb.main, [str(path), *options[int(rng.integers(3))]], statuses=(0, 1))
    if way < 0.35:
        from tools import create_masks

        config = folder / "ssn.yaml"
        config.write_text(yaml.safe_dump({"model": {"name": "ssn", "ssn": SSN}}))
        arguments = ["--config", str(config), "--checkpoint", str(material / "ssn.pth"), "--device", "cpu"]
        arguments += ["--workers", "1"] if "--workers" in Path("tools/create_masks.py").read_text() else []
        arguments += ["--input", str(path), "--output", str(folder / "masks")]
        return lambda: ended(create_masks.main, arguments)
    return lambda: read_words(path, None)


def mask_lmdb(rng: Rng, folder: Path, material: Path) -> Run:
    images, masks = folder / "images" / "set", folder / "masks" / "set"
    write_entries(images, word_entries(material))
    write_entries(masks, damage_entries(rng, word_entries(material, masks=True), material))
    damage_file(rng, masks)
    if rng.random() < 0.2:
        from tools import check_lmdb

        return lambda: ended(check_lmdb.main, [str(images), "--masks", str(masks)], statuses=(0, 1))
    return lambda: read_words(images, folder / "masks")


def ended(main: Callable, arguments: list[str], statuses: tuple[int, ...] = (0,)) -> str:
    """Run a command line; argparse's own exit counts as a line."""
    try:
        status = main(arguments) or 0
    except SystemExit as error:
        if error.code != 2:
            raise AssertionError(f"exit status {error.code}") from error
        raise UserError("see the usage") from error
    assert status in statuses, status
    return RESULT if status == 0 else SKIP


def segmentation(rng: Rng, folder: Path, material: Path) -> Run:
    image, mask = (material / "images" / "rgb.png").read_bytes(), (material / "mask.png").read_bytes()
    root = folder / "set"
    if rng.random() < 0.5:
        entries = {NUM_SAMPLES: b"3"}
        for number in range(1, 4):
            entries |= {image_key(number): image, mask_key(number): mask}
        write_entries(root, damage_entries(rng, entries, material))
        damage_file(rng, root)
    else:
        for name, data in (("images", image), ("masks", mask)):
            (root / name).mkdir(parents=True)
            for number in range(3):
                (root / name / f"{number}.png").write_bytes(data)
        for _ in range(int(rng.integers(1, 4))):
            broken = root / str(rng.choice(["images", "masks"])) / str(rng.choice(["0.png", "1.png", "2.jpg", "é.png"]))
            broken.write_bytes(draw_image(rng, material))
        if rng.random() < 0.2:
            (root / str(rng.choice(["images", "masks"])) / "3.png").mkdir()
        if rng.random() < 0.2:
            (root / "images" / "4.png").symlink_to(folder / "nowhere")
            (root / "masks" / "4.png").write_bytes(mask)
    transform = CropSegmentation(size=(33, 33), scale_range=(0.5, 2.0))

    def run() -> str:
        left_out = 0
        for dataset in open_segmentation_datasets([root], transform=transform, ignore_level=128):
            left_out += sum(dataset.filtered.values())
            if len(dataset) > 1000:
                return SKIP  # a number that is only said; samplers do not list them
            batch = collate_segmentation([dataset[index] for index in range(len(dataset))])
            assert len(batch) + len(batch.skipped) == len(dataset)
            left_out += len(batch.skipped)
        return SKIP if left_out else RESULT

    return run


# --- texts ------------------------------------------------------------------------------------------------------------


def yaml_text(rng: Rng, text: str) -> bytes:
    """A YAML with another value, or mutated as text."""
    if rng.random() < 0.6:
        value = mutated_value(rng, yaml.safe_load(text))
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        odd = (
            "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n",
            "model: &m {vision: *m}\n",
            "model: !!python/object/apply:os.system ['true']\n",
            "dataset: " + "[" * 5000,
            "dataset: " + "{a: " * 2000,
            "model: !!int x\n",
            "model: !!binary '@'\n",
            "? [a, b]\n: c\n",
            "? {a: b}\n: c\n",
            "training: {iterations: 190:20:30}\n",
            "global: {name: 2001-13-01}\n",
            "<<: [1]\n",
            "<<: {model: 1}\nmodel: {}\n",
            "--- 1\n--- 2\n",
            "%YAML 9.9\n---\nmodel: {}\n",
            "global: {seed: 0x1p-2, name: .nan}\n",
            "? \n: \n",
        )
        return odd[int(rng.integers(len(odd)))].encode()
    return mutated_text(rng, text)


def config_file(rng: Rng, folder: Path, material: Path) -> Run:
    names = [name for name in sorted(os.listdir("configs")) if "render" not in name]
    path = folder / "config.yaml"
    path.write_bytes(yaml_text(rng, (Path("configs") / str(rng.choice(names))).read_text()))

    def run() -> str:
        config = load_config(path)
        saved = folder / "saved.yaml"
        saved.write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(saved) == config
        return RESULT

    return run


def override(rng: Rng, folder: Path, material: Path) -> Run:
    from config import Config
    from settings import walk_schema

    keys = [name for name, _ in walk_schema(Config)]
    chosen = [keys[int(rng.integers(len(keys)))] for _ in range(int(rng.integers(1, 4)))]
    values = [str(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]()) for _ in chosen]
    texts = [f"{name}={value}" for name, value in zip(chosen, values, strict=True)]
    if rng.random() < 0.5:
        texts = [mutated_text(rng, text).decode(errors="surrogateescape") for text in texts]

    def run() -> str:
        load_config("configs/small.yaml", texts)
        return RESULT

    return run


def render_config(rng: Rng, folder: Path, material: Path) -> Run:
    path = folder / "render.yaml"
    path.write_bytes(yaml_text(rng, Path("configs/render.yaml").read_text()))

    def run() -> str:
        renderer = WordRenderer(load_render_config(path))
        for index in range(2):
            word = renderer.render(0, index)
            assert word.image.shape[:2] == word.mask.shape
            assert word.text
        return RESULT

    return run


def charset_file(rng: Rng, folder: Path, material: Path) -> Run:
    path = folder / "charset.txt"
    path.write_bytes(mutated_text(rng, Path("data/charset_36.txt").read_text()))

    def run() -> str:
        charset = Charset.from_file(path)
        labels = LabelRule(charset)
        assert charset.decode(charset.encode(labels.normalize("stop7"))) == labels.normalize("stop7")
        return RESULT

    return run


def language_csv(rng: Rng, folder: Path, material: Path) -> Run:
    rows = [f"{word}\t{word}" for word in WORDS] + ['"quo""ted"\tquoted', "é\té", "\t", "a\tb\tc"]
    text = "inp\tgt\n" + "\n".join(rows) + "\n"
    path = folder / "words.csv"
    path.write_bytes(mutated_text(rng, text))
    labels = LabelRule(Charset.from_file(str(rng.choice(["data/charset_36.txt", "data/charset_94.txt"]))))

    def run() -> str:
        dataset = LanguageDataset(path, labels=labels, use_sm=True, smooth_label=True)
        chosen = range(min(len(dataset), 300))
        batch = LanguageCollate(labels)([dataset[index] for index in chosen])
        assert len(batch) == len(chosen)
        return SKIP if dataset.filtered else RESULT

    return run


# --- checkpoints ------------------------------------------------------------------------------------------------------

ODD_IN_CHECKPOINTS = (
    *ODD_VALUES,
    _cyclic,
    _shared,
    lambda: torch.zeros(0),
    lambda: torch.zeros(3, 3, dtype=torch.complex64),
    lambda: torch.full((2,), float("nan")),
    lambda: torch.ones(4, dtype=torch.bool),
    lambda: torch.zeros(1).expand(2**40),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.empty(10**6, 10**6, device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
)


def zip_bomb(data: bytes) -> bytes:
    """The archive of a checkpoint with its entries compressed, and one of them a gigabyte of zeros."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        names = old.namelist()
        largest = max(names, key=lambda name: old.getinfo(name).file_size)
        for name in names:
            with new.open(name, "w", force_zip64=True) as entry:
                if name == largest:
                    for _ in range(1500):
                        entry.write(bytes(1 << 20))
                else:
                    entry.write(old.read(name))
    return stream.getvalue()


def tensor_of_large_size(data: bytes) -> bytes:
    """Sizes in the pickle of a checkpoint made huge."""
    for size in (b"K\x10", b"K\x08", b"K ", b"K\x04"):
        data = data.replace(size, b"J\xff\xff\xff\x7f"[: len(size)], 3)
    return data


def draw_checkpoint(rng: Rng, path: Path, *, value: bool = True) -> bytes:
    """A checkpoint's file, mutated as bytes or in what it holds, plain, as ours or as fastai's."""
    data, kind = path.read_bytes(), rng.random()
    if kind < 0.02:
        return zip_bomb(data)
    if kind < 0.3 or not value:
        return tensor_of_large_size(data) if kind < 0.06 else mutated(rng, data)
    state = torch.load(path, weights_only=True)
    form = rng.random()
    if form < 0.2 and "training" not in state:
        state = dict(state["model"])
    elif form < 0.3 and "training" not in state:
        state = {"model": {f"module.{name}": each for name, each in state["model"].items()}, "opt": {"state": {}}}
    if kind < 0.5 and isinstance(state.get("config"), dict):
        state["config"] = mutated_value(rng, state["config"], ODD_IN_CHECKPOINTS)
    else:
        state = mutated_value(rng, state, ODD_IN_CHECKPOINTS)
    stream = io.BytesIO()
    try:
        torch.save(state, stream, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    except (RuntimeError, ValueError, TypeError, RecursionError, NotImplementedError, AttributeError):
        return mutated(rng, data)
    return stream.getvalue()


def checkpoint(rng: Rng, folder: Path, material: Path) -> Run:
    name = str(rng.choice(["binet", "abinet", "ssn"]))
    path = folder / "weights.pth"
    path.write_bytes(draw_checkpoint(rng, material / f"{name}.pth"))
    strict = bool(rng.integers(2))
    model = made_once(name, lambda: build_model(small_config(name)))

    def run() -> str:
        load_checkpoint(model, path, strict=strict)
        return RESULT

    return run


def bundle(rng: Rng, folder: Path, material: Path) -> Run:
    from reader import Reader
    from tools import bundle_weights

    path, way = folder / "weights.pth", rng.random()
    if way < 0.2:
        path.write_bytes(draw_checkpoint(rng, material / "ssn.pth"))
        options = {"checkpoint": material / "binet.pth", "ssn": path}
    else:
        path.write_bytes(draw_checkpoint(rng, material / str(rng.choice(["both.pth", "abinet.pth"]))))
        options = {"checkpoint": path}
    if way > 0.8:
        arguments = ["--recogniser", str(path), "--ssn", str(material / "ssn.pth"), "--output", str(folder / "out.pth")]
        return lambda: ended(bundle_weights.main, arguments)

    def run() -> str:
        prediction = Reader(device="cpu", **options).read([material / "images" / "rgb.png"])[0]
        return SKIP if prediction.error else RESULT

    return run


def run_folder(folder: Path, material: Path) -> tuple[Path, Path]:
    """A copy of the stopped run, and its config."""
    for name in ("images", "masks", "runs"):
        shutil.copytree(material / "run" / name, folder / name)
    text = (material / "run" / "tiny.yaml").read_text().replace(str(material / "run"), str(folder))
    (folder / "tiny.yaml").write_text(text)
    return folder / "runs" / NAME, folder / "tiny.yaml"


def evaluate(rng: Rng, folder: Path, material: Path) -> Run:
    import main

    results, config = run_folder(folder, material)
    path = folder / "weights.pth"
    path.write_bytes(draw_checkpoint(rng, results / f"best-{NAME}.pth"))
    arguments = [f"--config={config}", "--phase=test", f"--checkpoint={path}", "--image_only"]
    arguments += ["--model_strict"] if rng.random() < 0.4 else []
    return lambda: ended(main.main, [*arguments, f"global.workdir={folder / 'tests'}"])


def resume(rng: Rng, folder: Path, material: Path) -> Run:
    import main

    results, config = run_folder(folder, material)
    newest = max(results.glob(f"{NAME}_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    damaged = draw_checkpoint(rng, newest)
    path = [newest, results / "other.pth"][int(rng.integers(2))]
    path.write_bytes(damaged)
    if rng.random() < 0.2:
        listed = results / "checkpoint.yaml"
        listed.write_bytes(mutated_text(rng, listed.read_text()))
    if rng.random() < 0.2:
        lines = results / "history.jsonl"
        lines.write_bytes(mutated_text(rng, lines.read_text()))
    arguments = [f"--config={config}", "--resume", *([str(path)] if path != newest else [])]
    arguments += ["training.iterations=6", "training.eval_iters=6", "training.save_iters=2", "global.seed=5"]
    kept = {each: each.read_bytes() for each in results.glob("*.pth")}
    # A run goes on writing these: what a refused one leaves is compared here.
    return lambda: _unless_refused(lambda: ended(main.main, arguments), kept)


def _unless_refused(run: Run, kept: dict[Path, bytes]) -> str:
    try:
        return run()
    except UserError:
        lost = [path.name for path, content in kept.items() if not path.is_file() or path.read_bytes() != content]
        assert not lost, f"{lost} are lost, though the run was refused"
        raise


# --- tools ------------------------------------------------------------------------------------------------------------


def occupied(rng: Rng, output: Path) -> Path:
    """An output that is sometimes taken already, and must stay as it is."""
    if rng.random() < 0.2:
        output.mkdir()
        (output / "data.mdb").write_bytes(b"mine")
    return output


def word_list(rng: Rng, folder: Path, material: Path) -> Run:
    from tools import create_lmdb_dataset

    images = folder / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").write_bytes(draw_image(rng, material, large=False))
    (images / "good.png").write_bytes((material / "images" / "rgb.png").read_bytes())
    text = '0.png\tzero\n1.png,one\n2.png, "two"\n3.png\té\ngood.png\tgood\n../x.png\tup\n'
    (folder / "gt.txt").write_bytes(mutated_text(rng, text))
    output = occupied(rng, folder / "out")
    arguments = [str(images), str(folder / "gt.txt"), str(output), "--workers", "1"]
    return lambda: ended(create_lmdb_dataset.main, arguments)


def synthtext(rng: Rng, folder: Path, material: Path) -> Run:
    from scipy.io import savemat

    from tools import crop_by_word_bb

    (folder / "1").mkdir()
    for name in ("1/a.png", "1/b.png"):
        data = (material / "images" / "rgb.png").read_bytes()
        (folder / name).write_bytes(data if rng.random() < 0.5 else draw_image(rng, material))
    box = np.array([[2, 40, 40, 2], [2, 2, 20, 20]], np.float32)
    odd = (np.nan, np.inf, -1e30, 1e30, 0, 1e9)
    boxes = [box, np.stack([box, box + 3], -1)]
    if rng.random() < 0.5:
        boxes[0].flat[int(rng.integers(8))] = odd[int(rng.integers(len(odd)))]
    if rng.random() < 0.3:
        boxes[1] = [np.zeros(3), np.zeros((2, 4, 0)), np.array("x"), np.zeros((4, 2, 2)), np.zeros((2, 4, 1), complex)][
            int(rng.integers(5))
        ]
    names = np.array(["1/a.png", str(rng.choice(["1/b.png", "../b.png", "", "1", "/etc/passwd"]))], object)
    texts = np.array([np.array(["one"]), np.array(["two three", ""][int(rng.integers(2)) :])], object)
    content = {"imnames": names[None], "wordBB": np.empty((1, 2), object), "txt": texts[None]}
    content["wordBB"][0, 0], content["wordBB"][0, 1] = boxes
    if rng.random() < 0.2:
        content[str(rng.choice(sorted(content)))] = [np.zeros(2), np.array(["x"]), np.zeros((1, 0), object)][
            int(rng.integers(3))
        ]
    savemat(stream := io.BytesIO(), content, do_compression=bool(rng.integers(2)))
    data = stream.getvalue()
    (folder / "gt.mat").write_bytes(mutated(rng, data) if rng.random() < 0.5 else data)
    arguments = [str(folder / "gt.mat"), str(occupied(rng, folder / "out")), "--workers", "1"]
    return lambda: ended(crop_by_word_bb.main, arguments)


def mjsynth(rng: Rng, folder: Path, material: Path) -> Run:
    from tools import crop_by_word_bb

    (folder / "1").mkdir()
    text = ""
    for number, word in enumerate(("Lube", "one_two", "é")):
        (folder / "1" / f"{number}_{word}_4.jpg").write_bytes(draw_image(rng, material, large=False))
        text += f"./1/{number}_{word}_4.jpg {number}\n"
    (folder / "annotation_train.txt").write_bytes(mutated_text(rng, text))
    arguments = [str(folder / "annotation_train.txt"), str(occupied(rng, folder / "out")), "--workers", "1"]
    return lambda: ended(crop_by_word_bb.main, arguments)


def segmentation_sets(rng: Rng, folder: Path, material: Path) -> Run:
    from tools import create_segmentation_data as tool

    name, source = str(rng.choice(sorted(tool.FORMATS))), folder / "source"
    image, mask = (material / "images" / "rgb.png").read_bytes(), (material / "mask.png").read_bytes()
    text = {
        "icdar13": '255 0 0 12 15 10 10 13 19 "H"\n0 0 255 18 15 16 10 19 19 "i"\n\n#1 2 3 52 4 49 1 55 7 "?"\n',
        "totaltext": "x: [[ 8 20 31 31  8]], y: [[10 10 10\n 17 17]], ornt: [u'h'], transcriptions: [u'Ab']\n",
        "textseg": json.dumps({"0": {"text": "HI", "bbox": [6, 4, 29, 4, 29, 11, 6, 11]}}),
    }.get(name, "")
    files = {
        "icdar13": ("a.png", "a_GT.png", "a_GT.txt"),
        "totaltext": ("Images/a.png", "groundtruth_pixel/a.png", "text/poly_gt_a.txt"),
        "textseg": ("image/a.png", "semantic_label/a_maskfg.png", "annotation/a_anno.json"),
        "coco_ts": ("train/a.png", "COCO_TS_labels/a.png", ""),
        "mlt_s": ("train/a.png", "MLT_masks/a.png", ""),
    }[name]
    chosen = int(rng.integers(3 if files[2] else 2))
    for number, (file, data) in enumerate(zip(files, (image, mask, text.encode()), strict=True)):
        if not file:
            continue
        if number == chosen:
            data = mutated_text(rng, text) if number == 2 else draw_image(rng, material)
            if number == 2 and name == "textseg" and rng.random() < 0.5:
                with contextlib.suppress(TypeError, ValueError):
                    data = json.dumps(mutated_value(rng, json.loads(text))).encode()
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes(data)
    if rng.random() < 0.1:
        (source / "b.png").symlink_to(folder / "nowhere")
    arguments = ["--format", name, "--source", str(source), "--output", str(occupied(rng, folder / "out"))]
    arguments += ["--words"] if text and rng.random() < 0.7 else []
    arguments += ["--lmdb"] if rng.random() < 0.5 else []
    return lambda: ended(tool.main, arguments)


KINDS = {
    "image": image,
    "reader": reader,
    "demo": demo,
    "word LMDB": word_lmdb,
    "mask LMDB": mask_lmdb,
    "segmentation": segmentation,
    "config": config_file,
    "override": override,
    "render config": render_config,
    "charset": charset_file,
    "checkpoint": checkpoint,
    "bundle": bundle,
    "test": evaluate,
    "resume": resume,
    "language CSV": language_csv,
    "word list": word_list,
    "SynthText": synthtext,
    "MJSynth": mjsynth,
    "segmentation sets": segmentation_sets,
}


def check(cases: list[tuple[str, int]], material: Path, folder: Path, capsys, *, seed: int, workers: int) -> None:
    before = {path: path.read_bytes() for path in material.rglob("*") if path.is_file()}
    outcomes = run_cases(KINDS, cases, material=material, scratch=folder, seed=seed, workers=workers)
    assert len(outcomes) == len(cases)
    faults = [outcome for outcome in outcomes if outcome.ending in FAULTS]
    with capsys.disabled():
        print("\n" + table(outcomes), *faults, sep="\n")
    assert {path: path.read_bytes() for path in before} == before
    assert not faults
    endings = Counter(outcome.ending for outcome in outcomes)
    assert min(endings[each] for each in (RESULT, SKIP, LINE)) > 0


@pytest.mark.slow
def test_thousands_of_hostile_inputs_end_in_a_result_a_skip_or_one_line(material, tmp_path, capsys):
    """HOSTILE_SEED draws other ones; HOSTILE_KINDS="bundle,image" runs some kinds only."""
    seed = int(os.environ.get("HOSTILE_SEED", SEED))
    kinds = os.environ.get("HOSTILE_KINDS", ",".join(CASES)).split(",")
    cases = [(kind, number) for kind in kinds for number in range(CASES[kind])]
    check(cases, material, tmp_path, capsys, seed=seed, workers=1)


def test_a_sample_of_hostile_inputs(material, tmp_path, capsys):
    cases = [(kind, number) for kind in CASES for number in range(PER_KIND)]
    check(cases, material, tmp_path, capsys, seed=SEED, workers=1)
