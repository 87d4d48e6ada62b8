"""tools/create_masks.py: masks that pair with their source, resuming, and everything that must be refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config import Config
from inference.segmenter import Segmenter
from loading.lmdb_io import DATA_FILE, LmdbReader, LmdbWriter, image_key, label_key
from loading.masks import LmdbMasks
from tests import small_networks
from tools import create_masks
from utils import UserError, run_command_line

TINY = {key: value for key, value in small_networks.SSN.items() if key != "areas"}
REPOSITORY = Path(__file__).resolve().parents[1]


def write_words(path: Path, count: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    images = []
    with LmdbWriter(path) as writer:
        for index in range(1, count + 1):
            size = (int(random.integers(12, 40)), int(random.integers(20, 90)))
            images.append(random.integers(0, 256, (*size, 3), dtype=np.uint8))
            data = cv2.imencode(".png", images[-1][..., ::-1])[1].tobytes()
            writer.append(b"no image" if index in broken else data, f"wörd{index}")
    return images


@pytest.fixture
def setup(tmp_path):
    """Config, checkpoint, words, and the arguments of a plain run."""
    config = tmp_path / "ssn.yaml"
    config.write_text(json.dumps({"model": {"name": "ssn", "ssn": TINY | {"areas": [65]}}}))
    torch.manual_seed(0)
    ssn = small_networks.make_ssn(**TINY)
    torch.save(ssn.state_dict(), tmp_path / "ssn.pth")
    images = write_words(tmp_path / "words", 9)
    common = ["--config", str(config), "--checkpoint", str(tmp_path / "ssn.pth"), "--device", "cpu"]
    plain = [*common, "--input", str(tmp_path / "words"), "--output", str(tmp_path / "masks")]
    return {"folder": tmp_path, "ssn": ssn, "images": images, "common": common, "plain": plain}


def decoded(reader: LmdbReader, index: int) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(reader.get(image_key(index)), np.uint8), cv2.IMREAD_UNCHANGED)


def contents(path: Path) -> dict[str, bytes]:
    reader = LmdbReader(path)
    return {key: reader.get(key) for key in reader.keys()}  # noqa: SIM118 (a reader is no mapping)


def test_masks_have_the_keys_sizes_and_labels_of_the_words(setup):
    assert create_masks.main([*setup["plain"], "--precision", "fp32", "--batch-size", "4"]) == 0
    words, masks = (LmdbReader(setup["folder"] / name) for name in ("words", "masks"))
    assert sorted(masks.keys()) == sorted(words.keys())
    expected = Segmenter(setup["ssn"], [65], precision="fp32")(setup["images"])
    for index, mask in enumerate(expected, start=1):
        stored = decoded(masks, index)
        assert stored.dtype == np.uint8
        assert stored.shape == setup["images"][index - 1].shape[:2]
        assert np.abs(stored.astype(int) - mask).max() <= 1
        assert masks.get(label_key(index)) == f"wörd{index}".encode()
    record = json.loads((setup["folder"] / "masks-masks.json").read_text())
    assert record["words"] == 9
    assert record["settings"]["areas"] == [65]


def test_large_images_are_held_a_few_at_a_time(setup, monkeypatch):
    create_masks.main([*setup["plain"], "--precision", "fp32"])
    sizes: list[list[int]] = []
    call = Segmenter.__call__

    def counted(self, images):
        sizes.append([image[..., 0].size for image in images])
        return call(self, images)

    monkeypatch.setattr(Segmenter, "__call__", counted)
    monkeypatch.setattr(create_masks, "CHUNK_PIXELS", 3000, raising=False)
    create_masks.main([*setup["plain"][:-1], str(setup["folder"] / "again"), "--precision", "fp32"])
    assert sum(map(len, sizes)) == 9
    assert len(sizes) > 2
    assert all(sum(chunk[:-1]) < 3000 for chunk in sizes)
    assert contents(setup["folder"] / "again") == contents(setup["folder"] / "masks")


def test_a_folder_of_lmdbs_keeps_its_layout(setup):
    root = setup["folder"] / "real"
    write_words(root / "a", 2)
    write_words(root / "deep" / "b", 3, seed=1)
    create_masks.main([*setup["common"], "--input", str(root), "--output", str(setup["folder"] / "out")])
    assert len(LmdbReader(setup["folder"] / "out" / "a")) == 2
    assert len(LmdbReader(setup["folder"] / "out" / "deep" / "b")) == 3


def test_areas_of_the_command_line_and_overrides_are_used(setup):
    create_masks.main([*setup["plain"], "--areas", "33", "65"])
    record = json.loads((setup["folder"] / "masks-masks.json").read_text())
    assert record["settings"]["areas"] == [33, 65]
    with pytest.raises(UserError, match=r"model\.ssn\.width"):
        create_masks.main([*setup["plain"], "model.ssn.width=[1]"])


class StopError(Exception):
    """Stands for a crash."""


def stop(*_arguments, **_options):
    raise StopError


def test_goes_on_where_it_was_interrupted_and_ends_equal(setup, monkeypatch):
    create_masks.main([*setup["plain"], "--batch-size", "3"])
    uninterrupted = contents(setup["folder"] / "masks")
    again = [*setup["plain"][:-1], str(setup["folder"] / "again"), "--batch-size", "3"]
    seen: list[int] = []
    call = Segmenter.__call__

    def counted(self, images):
        if len(seen) == 2:
            seen.append(0)
            raise StopError
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Segmenter, "__call__", counted)
    with pytest.raises(StopError):
        create_masks.main(again)
    assert not (setup["folder"] / "again").exists()
    assert (setup["folder"] / "again.part-0.partial").exists()
    seen[:] = [0, 0, 0]
    create_masks.main(again)
    assert seen[3:] == [3]
    assert contents(setup["folder"] / "again") == uninterrupted
    assert not list(setup["folder"].glob("again*.partial"))


def test_a_part_made_with_other_settings_is_refused(setup, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(create_masks.LmdbWriter, "_rename", stop)
        with pytest.raises(StopError):
            create_masks.main(setup["plain"])
    with pytest.raises(UserError, match="other input or settings"):
        create_masks.main([*setup["plain"], "--areas", "33"])
    create_masks.main([*setup["plain"], "--areas", "33", "--overwrite"])
    assert len(LmdbReader(setup["folder"] / "masks")) == 9


def test_a_complete_output_is_left_alone_and_another_set_refused(setup, capsys):
    create_masks.main(setup["plain"])
    before = contents(setup["folder"] / "masks")
    assert create_masks.main(setup["plain"]) == 0
    assert "complete already" in capsys.readouterr().out
    write_words(setup["folder"] / "others", 4, seed=3)
    others = [*setup["common"], "--input", str(setup["folder"] / "others"), "--output", str(setup["folder"] / "masks")]
    with pytest.raises(UserError, match="--overwrite"):
        create_masks.main(others)
    with pytest.raises(UserError, match="--overwrite"):
        create_masks.main([*setup["plain"], "--areas", "33"])
    assert contents(setup["folder"] / "masks") == before
    create_masks.main([*others, "--overwrite"])
    assert len(LmdbReader(setup["folder"] / "masks")) == 4


def test_all_outputs_are_checked_before_the_first_is_made(setup):
    root = setup["folder"] / "real"
    write_words(root / "a", 2)
    write_words(root / "b", 2)
    write_words(setup["folder"] / "out" / "b", 2)
    with pytest.raises(UserError, match="out/b"):
        create_masks.main([*setup["common"], "--input", str(root), "--output", str(setup["folder"] / "out")])
    assert not (setup["folder"] / "out" / "a").exists()


@pytest.mark.parametrize("place", ["words", "words/inside"])
def test_an_output_in_the_input_is_refused(setup, place):
    arguments = [*setup["plain"][:-1], str(setup["folder"] / place), "--overwrite"]
    with pytest.raises(UserError, match="choose another output"):
        create_masks.main(arguments)
    assert len(LmdbReader(setup["folder"] / "words")) == 9


def test_broken_images_are_counted_named_and_have_no_mask(setup, capsys):
    write_words(setup["folder"] / "some", 5, broken=(1, 4))
    create_masks.main(
        [*setup["common"], "--input", str(setup["folder"] / "some"), "--output", str(setup["folder"] / "out")]
    )
    masks = LmdbReader(setup["folder"] / "out")
    assert len(masks) == 5
    assert [index for index in range(1, 6) if masks.get(image_key(index)) is None] == [1, 4]
    assert masks.get(label_key(4)) == "wörd4".encode()
    listed = (setup["folder"] / "out-rejected.tsv").read_text()
    assert image_key(1) in listed
    assert image_key(4) in listed
    assert "damaged image" in capsys.readouterr().out
    LmdbMasks(setup["folder"] / "out").check(LmdbReader(setup["folder"] / "some"), np.arange(1, 6))


def test_other_widths_name_tensors_and_key(setup):
    with pytest.raises(UserError, match=r"hrnet\..*model\.ssn"):
        create_masks.main([*setup["plain"], "model.ssn.widths=[8, 8, 12, 16]"])
    assert not (setup["folder"] / "masks").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--input", "nowhere"], "nowhere"),
        (["--device", "abacus"], "device abacus"),
    ],
)
def test_wrong_arguments_are_named(setup, changed, message):
    with pytest.raises(UserError, match=message):
        create_masks.main([*setup["plain"], *changed])


def test_a_checkpoint_that_describes_itself_needs_no_config(setup):
    described = Config.from_dict({"model": {"name": "ssn", "ssn": TINY | {"areas": [65]}}})
    ssn = {"model": setup["ssn"].state_dict(), "config": described.to_dict()}
    torch.save(ssn, setup["folder"] / "own.pth")
    torch.save({"model": {}, "ssn": ssn}, setup["folder"] / "bundle.pth")  # as beside a recogniser
    create_masks.main(setup["plain"])
    expected = contents(setup["folder"] / "masks")
    common = ["--device", "cpu", "--input", str(setup["folder"] / "words")]
    for name in ("own", "bundle"):
        checkpoint, output = setup["folder"] / f"{name}.pth", setup["folder"] / f"masks-{name}"
        create_masks.main([*common, "--checkpoint", str(checkpoint), "--output", str(output)])
        assert contents(output) == expected
        create_masks.main([*setup["plain"], "--checkpoint", str(checkpoint), "--output", str(output) + "-configured"])
        assert contents(Path(f"{output}-configured")) == expected


def test_a_checkpoint_brings_its_areas_where_the_config_names_none(setup):
    described = Config.from_dict({"model": {"name": "ssn", "ssn": TINY | {"areas": [65]}}})
    torch.save({"model": setup["ssn"].state_dict(), "config": described.to_dict()}, setup["folder"] / "own.pth")
    create_masks.main(setup["plain"])
    config = setup["folder"] / "no_areas.yaml"
    config.write_text(json.dumps({"model": {"name": "ssn", "ssn": TINY}}))
    arguments = ["--config", str(config), "--checkpoint", str(setup["folder"] / "own.pth"), "--device", "cpu"]
    arguments += ["--input", str(setup["folder"] / "words"), "--output", str(setup["folder"] / "own")]
    create_masks.main(arguments)
    assert contents(setup["folder"] / "own") == contents(setup["folder"] / "masks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_is_needed(setup):
    with pytest.raises(UserError, match="--device cuda"):
        create_masks.main([*setup["plain"], "--device", "cuda"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{folder}/ssn.pth"], "--config"),
        (["--checkpoint", "{folder}/ssn.pth", "model.ssn.stem_width=8"], "model.ssn.stem_width=8.*--config"),
        ([], "--checkpoint"),
    ],
)
def test_without_a_config_the_checkpoint_must_describe_its_network(setup, arguments, message):
    arguments = [each.format(folder=setup["folder"]) for each in arguments]
    with pytest.raises(UserError, match=message):
        create_masks.main([*arguments, *setup["plain"][-4:]])


def test_weights_are_needed(setup):
    arguments = [each for each in setup["plain"] if each not in ("--checkpoint", str(setup["folder"] / "ssn.pth"))]
    with pytest.raises(UserError, match="--checkpoint"):
        create_masks.main(arguments)


@pytest.mark.slow
def test_survives_being_killed(setup):
    write_words(setup["folder"] / "many", 400, seed=5)
    command = [sys.executable, str(REPOSITORY / "tools" / "create_masks.py"), *setup["common"]]
    command += ["--input", str(setup["folder"] / "many"), "--output", str(setup["folder"] / "out"), "--batch-size", "8"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    data = setup["folder"] / "out.part-0.partial" / "data.mdb"
    while not (data.exists() and data.stat().st_size > 60_000) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (setup["folder"] / "out").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert len(LmdbReader(setup["folder"] / "out")) == 400
    whole = contents(setup["folder"] / "out")
    shutil.rmtree(setup["folder"] / "out")
    subprocess.run(command, check=True, capture_output=True)
    assert contents(setup["folder"] / "out") == whole


def test_a_kill_before_the_record_leaves_none_of_the_masks_that_were_replaced(setup, monkeypatch):
    create_masks.main([*setup["plain"], "--areas", "33"])
    with monkeypatch.context() as patch:
        patch.setattr(create_masks, "write_atomically", stop)
        with pytest.raises(StopError):
            create_masks.main([*setup["plain"], "--areas", "65", "--overwrite"])
    with pytest.raises(UserError, match="--overwrite"):  # the masks are those of 65 by now
        create_masks.main([*setup["plain"], "--areas", "33"])
    create_masks.main([*setup["plain"], "--areas", "65"])
    masks = contents(setup["folder"] / "masks")
    create_masks.main([*setup["plain"], "--areas", "65", "--overwrite"])
    assert contents(setup["folder"] / "masks") == masks
    assert not list(setup["folder"].glob("*.partial"))


def test_masks_below_the_words_are_not_taken_for_words(setup, capsys):
    root = setup["folder"] / "root"
    write_words(root / "a", 2)
    arguments = [*setup["common"], "--input", str(root), "--output", str(root / "masks")]
    create_masks.main(arguments)
    assert create_masks.main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert not (root / "masks" / "masks").exists()


# --- several processes ------------------------------------------------------------------------------------------------


def _as_rank(rank: int, count: int, port: int, arguments: list[str], dies_after: int | None) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    calls, call = [], Segmenter.__call__

    def mortal(self, images):
        if len(calls) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(len(images))
        return call(self, images)

    Segmenter.__call__ = mortal
    run_command_line(lambda: create_masks.main(arguments))


def run_processes(count: int, arguments: list[str], *, die_after: tuple[int | None, ...] = (None,) * 3) -> list[int]:
    """The tool in so many processes, each killed after so many forward passes; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_as_rank, args=(rank, count, port, arguments, die_after[rank])) for rank in range(count)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    return [each.exitcode for each in ranks]


def file_of(path: Path) -> bytes:
    return (path / DATA_FILE).read_bytes()


@pytest.fixture
def some_broken(setup):
    """Arguments up to the output for 23 words, three of them damaged, and the file of one process."""
    write_words(setup["folder"] / "many", 23, broken=(3, 8, 23))
    arguments = [*setup["common"], "--input", str(setup["folder"] / "many"), "--batch-size", "3", "--output"]
    create_masks.main([*arguments, str(setup["folder"] / "alone")])
    return arguments, file_of(setup["folder"] / "alone")


def test_two_processes_make_the_file_of_one(setup, some_broken, capfd):
    arguments, expected = some_broken
    capfd.readouterr()
    assert run_processes(2, [*arguments, str(setup["folder"] / "shared")]) == [0, 0]
    assert file_of(setup["folder"] / "shared") == expected
    rejected = [(setup["folder"] / f"{name}-rejected.tsv").read_text().splitlines() for name in ("alone", "shared")]
    assert [line.split("\t")[:2] for line in rejected[0]] == [line.split("\t")[:2] for line in rejected[1]]
    records = [(setup["folder"] / f"{name}-masks.json").read_text() for name in ("alone", "shared")]
    assert records[0] == records[1]
    assert not list(setup["folder"].glob("*.partial"))
    assert capfd.readouterr().out.count("made in this run") == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_processes_that_were_killed_are_continued_by_any_number(setup, some_broken, count):
    arguments, expected = some_broken
    output = setup["folder"] / "cut"
    killed = run_processes(2, [*arguments, str(output)], die_after=(2, 1))
    assert -signal.SIGKILL in killed
    assert not output.exists()
    made = [len(list(LmdbReader(each).keys("image-"))) for each in sorted(setup["folder"].glob("cut.part-*"))]
    assert sum(made) > 0
    assert run_processes(count, [*arguments, str(output)]) == [0] * count
    assert file_of(output) == expected
    assert not list(setup["folder"].glob("*.partial"))


def test_a_kill_while_parts_are_merged_loses_no_mask(setup, some_broken, monkeypatch):
    arguments, expected = some_broken
    output = setup["folder"] / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(create_masks.LmdbWriter, "_rename", stop)
        with pytest.raises(StopError):
            create_masks.main([*arguments, str(output)])
    monkeypatch.setattr(Segmenter, "__call__", lambda self, images: [][: len(images)] if not images else 1 / 0)
    create_masks.main([*arguments, str(output)])
    assert file_of(output) == expected


def test_processes_that_would_make_other_masks_are_refused(monkeypatch, setup):
    monkeypatch.setattr(create_masks.distributed, "gather", lambda items: [*items, items[0] | {"precision": "fp16"}])
    with pytest.raises(UserError, match="--precision"):
        create_masks.main(setup["plain"])


def test_a_part_of_another_machine_that_cannot_be_seen_is_told(monkeypatch, setup):
    monkeypatch.setattr(create_masks.MaskOutput, "_parts", lambda self: [])
    with pytest.raises(UserError, match=r"0 of 9 masks.*share the folder"):
        create_masks.main(setup["plain"])
