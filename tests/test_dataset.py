"""Data sets: what a sample is, what is skipped and why, and that nothing but seed, epoch and index changes one."""

import functools
import gc
import itertools
import logging
import os
import pickle
import time
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch

from callbacks import UnreadableSamples
from dataset import (
    JoinedDataset,
    LanguageDataset,
    RenderedDataset,
    SampleSet,
    SegmentationDataset,
    WordDataset,
    open_segmentation_datasets,
    open_word_datasets,
)
from evaluation.drawing import to_images
from loading import word_index
from loading.augmentation import AugmentWord, CropSegmentation, mutate_spelling
from loading.batches import LabelRule, LanguageCollate, Skipped, WordCollate, collate_segmentation
from loading.charset import PROTOCOLS, Charset
from loading.lmdb_io import LmdbReader, LmdbWriter
from loading.masks import LmdbMasks, find_mask_lmdb
from loading.pairs import PairFolder
from loading.sampling import ResumableBatchSampler, SampleKey
from loading.transforms import ResizeWord
from loading.workers import make_loader
from rendering.engine import RenderedWord, WordRenderer
from utils import UserError

ALPHANUMERIC = "0123456789abcdefghijklmnopqrstuvwxyz"
RULE = LabelRule(Charset(ALPHANUMERIC), max_length=25)
WORDS = ["Hello", "w0rld", "a", "It's", "SALE!", "x" * 25, "open", "exit", "café", "taxi", "stop", "77"]


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def word_image(number: int, height: int = 24) -> np.ndarray:
    """An image (H, W, 3) whose grey rectangle and level tell its number."""
    image = np.full((height, 40 + number, 3), 20 + number, np.uint8)
    image[6:18, 8:30] = 220 - number
    return image


def word_mask(number: int, height: int = 24) -> np.ndarray:
    mask = np.zeros((height, 40 + number), np.uint8)
    mask[6:18, 8:30] = 255
    return mask


def write_words(path: Path, words: list, *, masks: Path | None = None) -> Path:
    """A word LMDB (and its mask LMDB); a word given as bytes is a raw label."""
    with LmdbWriter(path) as writer:
        for number, word in enumerate(words, start=1):
            writer.append(png(word_image(number)), word)
    if masks is not None:
        with LmdbWriter(masks) as writer:
            for number, word in enumerate(words, start=1):
                writer.append(png(word_mask(number)), word)
    return path


def edit(path: Path, changes: dict[str, bytes | None]) -> None:
    """Put (or with None remove) entries of an LMDB."""
    gc.collect()  # readers that are no longer used let go of it
    with (
        lmdb.open(str(path), lock=False, map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in changes.items():
            if value is None:
                transaction.delete(key.encode())
            else:
                transaction.put(key.encode(), value)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_words(tmp_path / "images" / "set", WORDS, masks=tmp_path / "masks" / "set")


def open_set(path: Path, **arguments) -> WordDataset:
    arguments = {"labels": RULE, "transform": ResizeWord(), **arguments}
    return WordDataset(path, **arguments)


def open_masked(path: Path, **arguments) -> WordDataset:
    return open_set(path, masks=LmdbMasks(path.parents[1] / "masks" / path.name), **arguments)


class TestWords:
    def test_sample_holds_image_mask_and_label_as_stored(self, words):
        data = open_masked(words)
        assert len(data) == len(WORDS)
        for index, word in enumerate(WORDS):
            sample = data[index]
            assert (sample.text, sample.index) == (word, index)
            expected = cv2.resize(word_image(index + 1), (128, 32))
            np.testing.assert_array_equal(sample.image, expected)
            np.testing.assert_array_equal(sample.mask, cv2.resize(word_mask(index + 1), (128, 32)))

    def test_colours_are_rgb(self, tmp_path):
        red = np.zeros((20, 50, 3), np.uint8)
        red[..., 2] = 255  # OpenCV encodes BGR
        with LmdbWriter(tmp_path / "set") as writer:
            writer.append(png(red), "red")
        assert (open_set(tmp_path / "set")[0].image == (255, 0, 0)).all()

    def test_index_means_the_same_sample_whatever_is_left_out(self, tmp_path):
        path = write_words(tmp_path / "set", ["one", "!!", "two", "x" * 26, "three"])
        data = open_set(path)
        assert [data[index].text for index in range(len(data))] == ["one", "two", "three"]
        assert data.describe(2).endswith("image-000000005")
        assert data.number(2) == 5

    def test_a_stray_key_does_not_hide_words(self, tmp_path):
        with LmdbWriter(tmp_path / "set") as writer:
            for text in ("one", "two"):
                writer.append(png(word_image(1)), text)
            writer.put("label-000000002-old", "x")
            writer.put("image-999999999x", "x")
        assert [open_set(tmp_path / "set")[index].text for index in range(2)] == ["one", "two"]

    def test_plain_index_means_epoch_0(self, words):
        data = open_masked(words, transform=AugmentWord())
        for index in range(len(data)):
            np.testing.assert_array_equal(data[index].image, data[SampleKey(0, index)].image)

    def test_epoch_seed_stream_and_index_change_a_sample_and_nothing_else_does(self, words):
        always = AugmentWord(geometry=1.0, deterioration=1.0, color=1.0)

        def image(key, **arguments):
            return open_set(words, transform=always, **arguments)[key].image

        first = image(SampleKey(3, 5))
        np.testing.assert_array_equal(first, image(SampleKey(3, 5)))
        assert (first != image(SampleKey(4, 5))).any()
        assert (first != image(SampleKey(3, 5), seed=1)).any()
        assert (first != image(SampleKey(3, 5), stream=1)).any()
        data = open_set(words, transform=always)
        backwards = data.__getitems__([SampleKey(3, index) for index in (7, 5, 0)])
        np.testing.assert_array_equal(backwards[1].image, first)

    def test_pickled_copy_reads_the_same(self, words, tmp_path):
        for cache_dir in (None, tmp_path / "cache"):
            data = open_masked(words, cache_dir=cache_dir)
            copy = pickle.loads(pickle.dumps(data))
            np.testing.assert_array_equal(copy[3].image, data[3].image)
            assert copy.filtered == data.filtered


class TestFilter:
    def test_counts_by_reason_add_up(self, tmp_path, caplog):
        labels = ["good", "", "?!", "é", "y" * 26, "y" * 25 + "!", b"\xff\xfebad", "gone", "lost", "fine"]
        path = write_words(tmp_path / "set", labels)
        edit(path, {"label-000000008": None, "image-000000009": None, "num-samples": b"13"})
        with caplog.at_level(logging.INFO):
            data = open_set(path)
        assert data.filtered == {"empty": 3, "too_long": 1, "not_utf8": 1, "missing": 5}
        assert [data[i].text for i in range(len(data))] == ["good", "y" * 25 + "!", "fine"]
        assert len(data) + sum(data.filtered.values()) == 13
        assert "3 words" in caplog.text
        assert "5 missing" in caplog.text

    def test_samples_beyond_num_samples_are_left_out(self, words):
        edit(words, {"num-samples": b"4"})
        data = open_set(words)
        assert len(data) == 4
        assert data.filtered == {}

    def test_absurd_num_samples_is_counted_not_allocated(self, words):
        edit(words, {"num-samples": b"1000000000000"})
        data = open_set(words)
        assert data.filtered == {"missing": 10**12 - len(WORDS)}

    def test_unknown_keys_are_ignored(self, words):
        edit(words, {"label-12": b"x", "label-00000000x": b"y", "label-000000000": b"z", "meta": b"m", "zebra": b""})
        assert len(open_set(words)) == len(WORDS)

    def test_empty_lmdb(self, tmp_path):
        path = write_words(tmp_path / "set", ["!"])
        edit(path, {"num-samples": b"0", "label-000000001": None, "image-000000001": None})
        assert len(open_set(path)) == 0

    def test_case_rule(self):
        mixed = Charset(ALPHANUMERIC + "ABC")
        assert LabelRule(mixed, case_sensitive=True).normalize("aBc!") == "aBc"
        assert LabelRule(mixed).normalize("aBc!") == "abc"
        assert LabelRule(mixed).normalize("İ") == ""

    def test_filter_judges_as_the_label_rule(self, tmp_path):
        rng = np.random.default_rng(0)
        alphabet = list("abcXYZ019 -!'éß漢")
        texts = ["".join(rng.choice(alphabet, rng.integers(0, 12))) for _ in range(60)]
        rule = LabelRule(Charset(ALPHANUMERIC), max_length=5)
        data = open_set(write_words(tmp_path / "set", texts), labels=rule)
        kept = [text for text in texts if 1 <= len(rule.normalize(text)) <= 5]
        assert [data[i].text for i in range(len(data))] == kept
        assert [rule.unusable(text) for text in kept] == [None] * len(kept)


class TestIndexCache:
    def test_second_opening_does_not_scan(self, words, tmp_path, monkeypatch):
        first = open_set(words, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(word_index, "scan_words", lambda *_: pytest.fail("scanned again"))
        second = open_set(words, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(first.numbers, second.numbers)

    def test_other_rule_or_file_is_another_index(self, words, tmp_path):
        cache = tmp_path / "cache"
        assert len(open_set(words, cache_dir=cache)) == len(WORDS)
        assert len(open_set(words, cache_dir=cache, labels=LabelRule(Charset("0123456789"), max_length=25))) == 2
        assert len(open_set(words, cache_dir=cache, labels=LabelRule(RULE.charset, max_length=4))) < len(WORDS)
        time.sleep(0.01)
        edit(words, {"label-000000001": b"!"})
        assert len(open_set(words, cache_dir=cache)) == len(WORDS) - 1

    @pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "other"])
    def test_damaged_files_are_made_again(self, words, tmp_path, damage):
        cache = tmp_path / "cache"
        open_set(words, cache_dir=cache)
        (path,) = cache.iterdir()
        whole = path.read_bytes()
        if damage == "other":
            np.savez(path, x=1)
        else:
            path.write_bytes({"empty": b"", "garbage": b"garbage", "cut": whole[: len(whole) // 2]}[damage])
        assert len(open_set(words, cache_dir=cache)) == len(WORDS)
        assert path.read_bytes() == whole

    def test_folder_that_cannot_be_written_costs_only_time(self, words, tmp_path, caplog):
        (tmp_path / "file").write_text("in the way")
        assert len(open_set(words, cache_dir=tmp_path / "file" / "cache")) == len(WORDS)
        assert "cannot be stored" in caplog.text

    def test_folder_that_cannot_be_entered_costs_only_time(self, words, tmp_path, monkeypatch):
        real = os.stat

        def stat(path, **options):
            if "locked" in str(path):
                raise PermissionError(13, "Permission denied")
            return real(path, **options)

        monkeypatch.setattr(os, "stat", stat)
        assert len(open_set(words, cache_dir=tmp_path / "locked" / "cache")) == len(WORDS)


class TestBrokenSamples:
    @pytest.fixture
    def damaged(self, words):
        edit(words, {"image-000000002": b"no image", "image-000000004": png(word_image(4))[:60]})
        edit(words.parents[1] / "masks" / "set", {"image-000000009": None, "image-000000010": png(word_mask(3))})
        edit(words.parents[1] / "masks" / "set", {"image-000000011": b"no mask"})
        return words

    def test_each_damage_has_its_reason_and_the_rest_is_read(self, damaged, monkeypatch):
        monkeypatch.setattr("loading.masks.PAIRS_CHECKED", 1)
        data = open_masked(damaged)
        samples = data.__getitems__([SampleKey(0, index) for index in range(len(data))])
        skipped = {sample.index: sample.reason for sample in samples if isinstance(sample, Skipped)}
        assert skipped == {1: "broken", 3: "broken", 8: "mask_missing", 9: "mask_size", 10: "mask_broken"}
        batch = WordCollate(RULE)(samples)
        assert batch.skipped == skipped
        assert batch.indices.tolist() == [0, 2, 4, 5, 6, 7, 11]
        assert batch.texts == [WORDS[index] for index in batch.indices]

    def test_tiny_images_are_left_out_on_request(self, words):
        """As published: in training (only there) an image with a side of 6 pixels or less is left out."""
        edit(words, {"image-000000003": png(np.zeros((6, 60, 3), np.uint8))})
        edit(words, {"image-000000005": png(np.zeros((7, 60, 3), np.uint8))})
        assert all(not isinstance(open_set(words)[index], Skipped) for index in range(len(WORDS)))
        training = open_set(words, min_side=7)
        assert [training[index] for index in (2,)] == [Skipped(2, "tiny")]
        assert not isinstance(training[4], Skipped)

    def test_key_that_went_missing_later(self, words):
        data = open_set(words)
        data.reader = LmdbReader(words)
        edit(words, {"label-000000003": None})
        assert data[2] == Skipped(2, "missing")

    def test_batch_of_nothing_has_every_field(self):
        batch = WordCollate(RULE)([Skipped(3, "broken")])
        assert len(batch) == 0
        assert len(batch.images) == 0
        assert batch.labels.shape == (0, 26)
        assert batch.skipped == {3: "broken"}

    def test_log_names_each_once(self, damaged, caplog):
        log = UnreadableSamples(dataset=JoinedDataset([open_set(damaged)]))
        for skipped in ({1: "broken"}, {1: "broken", 3: "broken"}):
            log.on_batch_loaded(None, WordCollate(RULE)([Skipped(*each) for each in skipped.items()]))
        assert caplog.text.count("image-000000002") == 1
        log.on_fit_end(None)
        assert "2 broken" in caplog.text


class TestMasks:
    def test_pairs_are_checked_at_start(self, words):
        masks = words.parents[1] / "masks" / "set"

        def message():
            with pytest.raises(UserError) as error:
                open_masked(words)
            assert str(masks) in str(error.value)
            assert str(words) in str(error.value)
            return str(error.value)

        edit(masks, {"num-samples": b"11"})
        assert "12 samples against 11" in message()
        edit(masks, {"num-samples": b"12", "label-000000003": b"other"})
        assert "label-000000003" in message()
        edit(masks, {"label-000000003": b"a", "image-000000005": png(word_mask(9))})
        assert "and its mask differ in size" in message()
        edit(masks, {"image-000000005": None})
        assert "image-000000005 has no mask" in message()

    def test_one_root_for_all_sets(self, tmp_path):
        for name in ("one", "more/two"):
            write_words(tmp_path / "images" / name, WORDS[:3], masks=tmp_path / "masks" / name)
        found = open_word_datasets([tmp_path / "images"], labels=RULE, transform=ResizeWord(), masks=tmp_path / "masks")
        assert [each.name for each in found] == ["two", "one"]
        assert [each.masks.reader.path for each in found] == [tmp_path / "masks/more/two", tmp_path / "masks/one"]
        images = tmp_path / "images"
        for root, lmdb_path, expected in [
            (images / "one", images / "one", "masks/one"),
            (images / "more", images / "more/two", "masks/more/two"),
        ]:
            assert find_mask_lmdb(tmp_path / "masks", root, lmdb_path) == tmp_path / expected
        assert find_mask_lmdb(tmp_path / "masks/one", images / "one", images / "one") == tmp_path / "masks/one"
        with pytest.raises(UserError, match="create_masks"):
            find_mask_lmdb(tmp_path / "nowhere", images, images / "one")

    def test_online_masks_are_made_once_a_batch_of_the_stored_images(self, words):
        calls = []

        def segmenter(images):
            calls.append([each.shape for each in images])
            return [np.where(each[..., 0] > 128, 255, 0).astype(np.uint8) for each in images]

        online, stored = open_set(words, segmenter=segmenter), open_masked(words)
        keys = [SampleKey(0, index) for index in (4, 0, 7)]
        for one, other in zip(online.__getitems__(keys), stored.__getitems__(keys), strict=True):
            np.testing.assert_array_equal(one.mask, other.mask)
        assert calls == [[(24, 45, 3), (24, 41, 3), (24, 48, 3)]]


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Build data sets of three words, of which two cannot be used; each epoch draws them anew."""

    def render(renderer, seed, number, *, difficulty):
        epoch, index = divmod(number, 3)
        text = ("word", "!!!", "w" * 30)[index]
        return RenderedWord(word_image(epoch + 1), word_mask(epoch + 1), text, "", "", 0.0, 0.0)

    monkeypatch.setattr(WordRenderer, "render", render)
    (tmp_path / "render.yaml").write_text("length: 3\n")
    return functools.partial(RenderedDataset, tmp_path / "render.yaml", labels=RULE, transform=ResizeWord())


class TestJoined:
    def test_indices_go_on_and_sets_keep_their_order(self, tmp_path):
        first = open_set(write_words(tmp_path / "a", ["one", "two"]))
        second = open_set(write_words(tmp_path / "b", ["three", "!", "four"]))
        data = JoinedDataset([first, second])
        assert len(data) == 4
        samples = data.__getitems__([SampleKey(0, index) for index in (3, 0, 2, 1)])
        assert [(sample.index, sample.text) for sample in samples] == [
            (3, "four"),
            (0, "one"),
            (2, "three"),
            (1, "two"),
        ]
        assert data[2].index == 2
        assert "b image-000000003" in data.describe(3)
        with pytest.raises(IndexError):
            data[4]

    def test_equal_folder_names_are_told_apart(self, tmp_path):
        for folder in ("x/set", "y/set"):
            write_words(tmp_path / folder, ["one"])
        roots = [tmp_path / "x", tmp_path / "y/set"]
        assert [d.name for d in open_word_datasets(roots, labels=RULE, transform=ResizeWord())] == ["x-set", "y-set"]
        twice = open_word_datasets([roots[1]] * 2, labels=RULE, transform=ResizeWord())
        assert [d.name for d in twice] == ["set-1", "set-2"]
        write_words(tmp_path / "x/mean", ["one"])  # would hide a row of the scores
        one = open_word_datasets([tmp_path / "x/mean"], labels=RULE, transform=ResizeWord())
        assert [d.name for d in one] == ["x-mean"]

    def test_missing_root_is_named(self, tmp_path):
        with pytest.raises(UserError, match="nowhere"):
            open_word_datasets([tmp_path / "nowhere"], labels=RULE, transform=ResizeWord())

    def test_renderer_is_asked_with_the_epoch(self, rendered):
        data = JoinedDataset([rendered()])
        assert (data[SampleKey(0, 0)].image != data[SampleKey(9, 0)].image).any()
        samples = data.__getitems__([SampleKey(2, index) for index in range(3)])
        batch = WordCollate(RULE)(samples)
        assert batch.texts == ["word"]
        assert batch.skipped == {1: "empty", 2: "too_long"}

    def test_a_network_that_makes_masks_makes_those_of_rendered_words_too(self, rendered):
        calls = []

        def segmenter(images):
            calls.append(len(images))
            return [np.full(each.shape[:2], 7, np.uint8) for each in images]

        keys = [SampleKey(2, index) for index in range(3)]
        exact = rendered().__getitems__(keys)
        made = rendered(segmenter=segmenter).__getitems__(keys)
        assert calls == [1], "one call for a batch, without the words that are skipped"
        assert (made[0].image == exact[0].image).all()
        assert (made[0].mask == 7).all()
        assert len(np.unique(exact[0].mask)) > 1


def image_and_mask(image, mask, _):
    return image, mask


class TestRendered:
    @pytest.fixture
    def open_rendered(self, tmp_path):
        """Open words as they are drawn, with a short list of words, which loads at once."""
        (tmp_path / "words.txt").write_text("street\nmarket\ncoffee\nopen\nexit\nnorth\njolly\nquiz\n")
        (tmp_path / "render.yaml").write_text(f"length: 7\nwords: {{file: {tmp_path / 'words.txt'}}}\n")
        options = {
            "labels": LabelRule(Charset(PROTOCOLS[94]), case_sensitive=True),
            "transform": image_and_mask,
        }
        return functools.partial(RenderedDataset, tmp_path / "render.yaml", **options)

    def test_epochs_have_words_of_their_own(self, open_rendered):
        words = open_rendered(seed=3)
        assert len(words) == 7
        first, again, later = words[2], words[SampleKey(0, 2)], words[SampleKey(1, 2)]
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.mask, again.mask)
        assert first.text == again.text
        assert np.array_equal(later.image, words.renderer.render(words.renderer_seed, 9).image)
        assert len(open_rendered(length=4)) == 4
        assert open_rendered(with_masks=False)[0].mask is None
        with pytest.raises(IndexError):
            words[7]

    def test_splits_and_data_sets_of_a_run_share_no_word(self, open_rendered, tmp_path):
        """Of 50 words none is one of another part's, image and text."""
        (tmp_path / "render.yaml").write_text("length: 50\n")  # with all English words

        def words_of(**part):
            words = open_rendered(**{"seed": 3, **part})
            return {(sample.text, sample.image.tobytes()) for sample in words.__getitems__(range(50))}

        training = words_of()
        assert training == words_of(split=0, stream=0)
        for part in ({"split": 1}, {"stream": 1}, {"seed": 4}):
            others = words_of(**part)
            assert not training & others
            assert len({text for text, _ in training} & {text for text, _ in others}) < 10  # numbers and short words

    def test_difficulty_changes_over_the_run(self, open_rendered):
        words = pickle.loads(pickle.dumps(open_rendered(difficulty=(0.2, 0.8))))
        for progress, difficulty in ((0.0, 0.2), (0.5, 0.5), (1.0, 0.8)):
            expected = words.renderer.render(words.renderer_seed, 9, difficulty=difficulty).image
            assert np.array_equal(words[SampleKey(1, 2, progress)].image, expected)


class TestBatches:
    def test_shapes_values_and_normalisation(self, words):
        data = open_masked(words)
        batch = WordCollate(RULE)(data.__getitems__(range(4)))
        assert batch.images.shape == (4, 3, 32, 128)
        assert batch.masks.shape == (4, 1, 32, 128)
        assert batch.images.dtype == batch.masks.dtype == torch.uint8
        np.testing.assert_array_equal(to_images(batch.images)[1], data[1].image)
        images, masks = batch.inputs()
        assert images.dtype == masks.dtype == torch.float32
        assert images.is_contiguous()
        assert (masks.min(), masks.max()) == (0.0, 1.0)
        expected = (data[1].image[10, 50] / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        np.testing.assert_allclose(images[1, :, 10, 50], expected, atol=1e-5)
        assert torch.equal(batch.inputs()[0], images), "inputs must not change the batch"

    def test_labels_are_normalised_texts_are_raw_lengths_count_the_end(self, words):
        batch = WordCollate(RULE)(open_set(words).__getitems__([3, 5]))
        assert batch.texts == ["It's", "x" * 25]
        assert RULE.charset.decode(batch.labels[0].tolist()) == "its"
        assert batch.lengths.tolist() == [4, 26]
        assert batch.labels.shape == (2, 26)
        assert batch.labels[0, 3:].eq(0).all()
        assert batch.masks is None
        assert batch.inputs()[1] is None
        assert batch.targets() == (batch.labels, batch.lengths)

    def test_parts_hold_every_sample_once_in_order(self, words):
        batch = WordCollate(RULE)(open_masked(words).__getitems__(range(7)))
        batch.skipped = {9: "broken"}
        for parts in (1, 2, 3, 7, 20):
            split = batch.split(parts)
            assert len(split) == min(parts, 7)
            assert torch.equal(torch.cat([part.images for part in split]), batch.images)
            assert torch.equal(torch.cat([part.masks for part in split]), batch.masks)
            assert [text for part in split for text in part.texts] == batch.texts
            assert sum(len(part.skipped) for part in split) == 1
        empty = WordCollate(RULE)([Skipped(0, "broken")])
        assert [len(part) for part in empty.split(2)] == [0]

    def test_to_keeps_fields(self, words):
        batch = WordCollate(RULE)(open_masked(words).__getitems__(range(3)))
        moved = batch.to("meta")
        assert moved.images.device.type == moved.labels.device.type == "meta"
        assert moved.texts == batch.texts


def batches_of(loader, count):
    result = []
    for batch in loader:
        result.append(batch)
        if len(result) == count:
            return result
    return result


class TestWorkers:
    @pytest.mark.parametrize(
        ("workers", "context"), [(1, "fork"), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
    )
    def test_workers_change_nothing(self, words, tmp_path, workers, context):
        data = JoinedDataset([open_masked(words, transform=AugmentWord(), cache_dir=tmp_path / "cache")])
        _ = data[0]  # the LMDB is open before the workers start
        sampler = ResumableBatchSampler(len(data), 5, seed=3)

        def load(number, method):
            loader = make_loader(
                data, WordCollate(RULE), batch_sampler=sampler, num_workers=number, multiprocessing_context=method
            )
            return batches_of(loader, 5)

        for one, other in zip(load(0, None), load(workers, context), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.masks, other.masks)
            assert one.texts == other.texts

    def test_evaluation_loader_reads_every_word_once(self, words):
        data = open_set(words)
        seen = []
        for rank in range(3):
            sampler = range(rank * len(data) // 3, (rank + 1) * len(data) // 3)
            for batch in make_loader(data, WordCollate(RULE), sampler=sampler, batch_size=3):
                seen += batch.indices.tolist()
        assert seen == list(range(len(data)))


class TestSamplers:
    def test_generators_depend_on_all_four_numbers_and_can_be_set_back(self):
        draws = {}
        for seed in (0, 1):
            for stream in (0, 1):
                samples = SampleSet(seed=seed, stream=stream)
                for epoch in (0, 1):
                    for index in (0, 1, 2**40):
                        draws[seed, stream, epoch, index] = tuple(samples.random(SampleKey(epoch, index)).random(4))
        assert len(set(draws.values())) == len(draws)
        samples = pickle.loads(pickle.dumps(SampleSet(seed=1, stream=1)))
        samples.random(SampleKey(0, 5)).integers(7, size=3)  # leaves half-used numbers behind
        assert tuple(samples.random(SampleKey(1, 2**40)).random(4)) == draws[1, 1, 1, 2**40]

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_processes_share_the_same_global_batches(self, world_size):
        def batches(rank, size):
            sampler = ResumableBatchSampler(50, 8, seed=5, rank=rank, world_size=size)
            return batches_of(sampler, 2 * len(sampler))

        alone = batches(0, 1)
        parts = [batches(rank, world_size) for rank in range(world_size)]
        assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == alone
        epoch = [key.index for batch in alone[: len(alone) // 2] for key in batch]
        assert len(epoch) == len(set(epoch)) == 48
        assert {key.epoch for batch in alone[len(alone) // 2 :] for key in batch} == {1}
        assert [key.index for batch in alone[len(alone) // 2 :] for key in batch] != epoch

    def test_resumes_anywhere(self):
        sampler = ResumableBatchSampler(40, 6, seed=1)
        whole = batches_of(sampler, 15)
        for position in range(15):
            sampler.set_position(*divmod(position, len(sampler)))
            assert batches_of(sampler, 15 - position) == whole[position:]
        sampler.set_position(0, len(sampler))  # the end of an epoch is the start of the next
        assert batches_of(sampler, 1) == whole[len(sampler) : len(sampler) + 1]

    def test_few_samples_and_bad_sizes(self):
        sampler = ResumableBatchSampler(3, 8)
        assert len(sampler) == 1
        assert sorted(key.index for key in next(iter(sampler))) == [0, 1, 2]
        with pytest.raises(UserError, match="batch_size is 9"):
            ResumableBatchSampler(10, 9, world_size=2)


class TestLanguage:
    @pytest.fixture
    def table(self, tmp_path):
        rows = [
            "gt\tinp\tmore",
            "Hello\thelo\t1",
            "!\tx\t1",
            "fine\t" + "z" * 30 + "\t1",
            'say\t"say"\t2',
            "short\tline",
        ]
        path = tmp_path / "words.csv"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path

    def test_reads_columns_by_name_and_counts_what_it_drops(self, table):
        data = LanguageDataset(table, labels=RULE)
        assert len(data) == 2
        assert data.filtered == {"empty": 1, "too_long": 1, "fields": 1}
        batch = LanguageCollate(RULE)([data[0], data[1]])
        assert batch.texts == ["hello", "say"]
        assert batch.probabilities.shape == (2, 26, 37)
        assert batch.probabilities.sum(-1).eq(1).all()
        assert RULE.charset.decode(batch.probabilities[0].argmax(-1).tolist()) == "helo"
        assert batch.input_lengths.tolist() == [5, 4]
        assert batch.lengths.tolist() == [6, 4]
        assert batch.inputs() == (batch.probabilities, batch.input_lengths)
        assert sum(len(part) for part in batch.split(2)) == 2
        nothing = LanguageCollate(RULE)([])  # the share of a process in a batch smaller than the processes
        assert len(nothing) == 0
        assert nothing.probabilities.shape == (0, 26, 37)

    def test_smoothing_keeps_distributions(self, table):
        data = LanguageDataset(table, labels=RULE, smooth_label=True, smooth_factor=0.1)
        batch = LanguageCollate(RULE)([data[SampleKey(epoch, 0)] for epoch in range(20)])
        np.testing.assert_allclose(batch.probabilities.sum(-1), 1.0, atol=1e-5)
        assert batch.probabilities.max(-1).values.min() >= 0.9
        assert batch.probabilities.max(-1).values[:, 0].unique().numel() == 20

    def test_mutations_have_the_published_shares(self):
        samples = SampleSet(seed=0)
        text, count = "recognition", 4000
        results = [
            mutate_spelling(text, ALPHANUMERIC, samples.random(SampleKey(0, i)), max_length=25) for i in range(count)
        ]
        assert np.mean([each == text for each in results]) == pytest.approx(0.7, abs=0.03)
        longer = np.mean([len(each) > len(text) for each in results])
        shorter = np.mean([len(each) < len(text) for each in results])
        assert longer == pytest.approx(shorter, abs=0.02)
        assert 0.04 < longer < 0.1

    @pytest.mark.parametrize(("text", "most"), [("a", 1), ("abcd", 1), ("abcde", 2), ("abcdefgh", 3)])
    def test_mutations_are_few_and_never_empty(self, text, most):
        samples = SampleSet(seed=1)
        for index in range(1500):
            mutated = mutate_spelling(text, "#", samples.random(SampleKey(0, index)), max_length=len(text))
            assert 1 <= len(mutated) <= len(text)
            assert mutated.count("#") <= most
            assert len(mutated.replace("#", "")) >= len(text) - 2 * most

    def test_numbers_are_not_mutated(self):
        samples = SampleSet(seed=2)
        for index in range(200):
            key = SampleKey(0, index)
            assert mutate_spelling("1234a", ALPHANUMERIC, samples.random(key), max_length=25) == "1234a"

    def test_wrong_files_are_named(self, tmp_path):
        (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
        (tmp_path / "latin.csv").write_bytes(b"inp\tgt\n\xff\xfe\tx\n")
        for name, message in [("bad.csv", "header"), ("latin.csv", "UTF-8"), ("none.csv", "cannot be read")]:
            with pytest.raises(UserError, match=message) as error:
                LanguageDataset(tmp_path / name, labels=RULE)
            assert name in str(error.value)


class TestSegmentation:
    @pytest.fixture
    def folder(self, tmp_path):
        for part in ("images", "masks"):
            (tmp_path / "pairs" / part).mkdir(parents=True)
        for number in range(1, 5):
            (tmp_path / f"pairs/images/w{number}.jpg").write_bytes(png(word_image(number)))
            (tmp_path / f"pairs/masks/w{number}.png").write_bytes(png(word_mask(number)))
        (tmp_path / "pairs/images/alone.png").write_bytes(png(word_image(9)))
        return tmp_path / "pairs"

    def test_folder_lmdb_and_pair_of_lmdbs_give_the_same(self, folder, words, tmp_path):
        with LmdbWriter(tmp_path / "segmentation") as writer:
            for number in range(1, 5):
                writer.append(png(word_image(number)), mask=png(word_mask(number)))
        opened = open_segmentation_datasets([folder, tmp_path / "segmentation", words], mask_root=tmp_path / "masks")
        assert [each.name for each in opened] == ["pairs", "segmentation", "set"]
        assert opened[0].filtered == {"missing": 1}
        for index in range(4):
            for data in opened:
                np.testing.assert_array_equal(data[index].image, word_image(index + 1))
                np.testing.assert_array_equal(data[index].labels, word_mask(index + 1) // 255)

    def test_training_crops_are_of_one_size_and_drawn_by_epoch(self, folder):
        data = open_segmentation_datasets([folder], transform=CropSegmentation(size=(48, 64)))[0]
        batch = collate_segmentation([data[SampleKey(epoch, 1)] for epoch in range(3)])
        assert batch.images.shape == (3, 3, 48, 64)
        assert batch.labels.shape == (3, 48, 64)
        assert batch.inputs()[0].dtype == torch.float32
        assert batch.targets()[0].dtype == torch.int64
        assert set(batch.labels.unique().tolist()) <= {0, 1, 255}
        assert not torch.equal(batch.images[0], batch.images[1])
        again = collate_segmentation([data[SampleKey(0, 1)]])
        assert torch.equal(again.images[0], batch.images[0])

    def test_ignore_level_and_broken_pairs(self, folder):
        mask = word_mask(1)
        mask[0] = 100
        (folder / "masks/w1.png").write_bytes(png(mask))
        (folder / "masks/w2.png").write_bytes(png(word_mask(7)))
        (folder / "images/w3.jpg").write_bytes(b"no image")
        data = SegmentationDataset(PairFolder(folder), ignore_level=100)
        assert (data[0].labels[0] == 255).all()
        assert (data[0].labels[1:] < 2).all()
        assert [data[1].reason, data[2].reason] == ["mask_size", "broken"]
        batch = collate_segmentation([data[0], data[1], data[2]])
        assert batch.skipped == {1: "mask_size", 2: "broken"}
        assert batch.indices.tolist() == [0]
        assert len(collate_segmentation([data[1]])) == 0

    def test_a_word_without_an_image_is_counted(self, tmp_path):
        for root, picture in (("words", word_image), ("masks", word_mask)):
            with LmdbWriter(tmp_path / root) as writer:
                for number in range(1, 4):
                    writer.append(png(picture(number)), f"w{number}")
            edit(tmp_path / root, {"image-000000002": None})
        (data,) = open_segmentation_datasets([tmp_path / "words"], mask_root=tmp_path / "masks")
        assert data[1].reason

    def test_word_lmdb_without_masks_is_named(self, words):
        with pytest.raises(UserError, match="mask-000000001"):
            open_segmentation_datasets([words])


REAL_WORDS = Path(__file__).parents[2] / "shared" / "data" / "train"


@pytest.mark.slow
@pytest.mark.skipif(not REAL_WORDS.exists(), reason="needs the real training words")
def test_throughput_of_one_thread(tmp_path):
    """Small real words with masks and all augmentation: the whole way from the LMDB to the batch, CPU time."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with LmdbWriter(tmp_path / "images") as writer, LmdbWriter(tmp_path / "masks") as masks:
        for name in ("iiit5k", "ic15"):
            for line in (REAL_WORDS / name / "gt.txt").read_text(encoding="utf-8").splitlines():
                file, label = line.split("\t", 1)
                data = (REAL_WORDS / name / file).read_bytes()
                grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
                if grey.size <= 64 * 160:
                    writer.append(data, label)
                    masks.append(png(cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)[1]), label)
    data = open_set(tmp_path / "images", masks=LmdbMasks(tmp_path / "masks"), transform=AugmentWord())
    loader = iter(ResumableBatchSampler(len(data), 128))
    rates = []
    for _ in range(6):
        started = time.process_time()
        for _ in range(10):
            WordCollate(RULE)(data.__getitems__(next(loader)))
        rates.append(1280 / (time.process_time() - started))
    print(f"{max(rates):.0f} samples a second")
    assert max(rates) > 1500


@pytest.mark.slow
def test_two_million_words_open_in_a_second_the_second_time(tmp_path):
    path = tmp_path / "large"
    image = png(np.zeros((1, 1, 3), np.uint8))
    with LmdbWriter(path) as writer:
        for number in range(2_000_000):
            writer.append(image, f"w{number}")
    open_set(path, cache_dir=tmp_path / "cache")
    started = time.perf_counter()
    data = open_set(path, cache_dir=tmp_path / "cache")
    assert time.perf_counter() - started < 1.0
    assert len(data) == len(LmdbReader(path)) == 2_000_000
    assert data[1_999_999].text == "w1999999"


def test_segmentation_files_that_cannot_be_read_are_skipped(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for number in range(3):
            (tmp_path / part / f"{number}.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "0.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "masks" / "1.png").unlink()
    (tmp_path / "masks" / "1.png").mkdir()
    data = open_segmentation_datasets([tmp_path])[0]
    assert [getattr(data[index], "reason", None) for index in range(3)] == ["missing", "mask_missing", None]
