"""Geometry that moves image and mask alike, sizes, turned views."""

import cv2
import numpy as np
import pytest
import torch

from loading import augmentation, transforms
from loading.augmentation import (
    AugmentWord,
    affine,
    perspective,
    rotation,
)
from loading.transforms import ResizeWord, fit_canvas, views, warp
from tests.patterns import as_color, pattern, rng


class TestGeometry:
    @pytest.mark.parametrize("kind", [rotation, affine, perspective])
    def test_canvas_holds_the_result_and_no_more(self, kind):
        for seed in range(50):
            matrix, (height, width) = fit_canvas(kind(rng(seed), (40, 100)), (40, 100))
            corners = matrix @ np.array([[0, 100, 100, 0], [0, 0, 40, 40], [1, 1, 1, 1.0]])
            corners = corners[:2] / corners[2]
            np.testing.assert_allclose(corners.min(1), 0, atol=1e-4)
            np.testing.assert_allclose(corners.max(1), (width, height), rtol=1e-4)

    def test_ranges(self):
        for seed in range(200):
            turned = rotation(rng(seed), (40, 100))
            assert abs(np.degrees(np.arctan2(turned[1, 0], turned[0, 0]))) <= 45
            scaled = affine(rng(seed), (40, 100), degrees=0.0)
            assert 0.5 <= scaled[0, 0] <= 2
            assert abs(scaled[0, 1] / scaled[0, 0]) <= 1.0
            assert abs(scaled[1, 0] / scaled[0, 0]) <= np.tan(np.radians(15)) + 1e-9
            assert np.linalg.det(scaled) == pytest.approx(scaled[0, 0] ** 2)  # shears keep areas
            projected = perspective(rng(seed), (40, 100))
            corners = projected @ np.array([[0, 100, 100, 0], [0, 0, 40, 40], [1, 1, 1, 1.0]])
            corners = corners[:2] / corners[2]
            assert (corners >= -1e-3).all()
            assert (np.abs(corners - [[0, 100, 100, 0], [0, 0, 40, 40]]) <= [[25.001], [10.001]]).all()

    def test_affine_turns_too_and_scales_evenly(self):
        """As published: rotation symmetric, 45 degrees; scale even in 0.5..2."""
        only_turns = [affine(rng(seed), (40, 100), scale=(1.0, 1.0), shear=(0.0, 0.0)) for seed in range(2000)]
        degrees = np.degrees([np.arctan2(each[1, 0], each[0, 0]) for each in only_turns])
        assert np.abs(degrees).max() < 45
        assert degrees.std() == pytest.approx(45 * 2 * np.sqrt(16 / (64 * 9)), rel=0.06)  # of Beta(4, 4)
        factors = np.array([np.sqrt(np.linalg.det(affine(rng(seed), (40, 100)))) for seed in range(2000)])
        shares = np.histogram(factors, bins=np.linspace(0.5, 2.0, 4))[0] / len(factors)
        np.testing.assert_allclose(shares, 1 / 3, atol=0.04)

    def test_identity_warp_equals_the_resize(self):
        image = as_color(pattern())
        scale = np.diag((128 / 100, 32 / 40, 1.0))
        warped = warp(image, scale, (32, 128), cv2.INTER_LINEAR)
        assert np.abs(warped.astype(int) - transforms.resize(image, (32, 128))).max() <= 4  # OpenCV's fixed point

    def test_result_beyond_the_limit_is_scaled_down(self):
        _, (height, width) = fit_canvas(np.diag((100.0, 2.0, 1.0)), (40, 100))
        assert (height, width) == (80, 4096)

    @pytest.mark.parametrize("interpolation", sorted(set(augmentation.INTERPOLATIONS)))
    @pytest.mark.parametrize("resize", [ResizeWord(), ResizeWord(fit="centre", random_aspect=True)])
    def test_image_and_mask_get_the_same_warp(self, interpolation, resize, monkeypatch):
        monkeypatch.setattr(augmentation, "INTERPOLATIONS", (interpolation,))
        augment = AugmentWord(resize, geometry=1.0, deterioration=0.0, color=0.0)
        for mask in (pattern(), pattern(31, 64), pattern(120, 400)):
            for seed in range(20):
                moved, moved_mask = augment(as_color(mask), mask, rng(seed))
                assert (cv2.resize(mask, (128, 32)) != moved_mask).any()
                np.testing.assert_array_equal(moved[..., 0], moved_mask)

    def test_small_canvas_shortcut_changes_next_to_nothing(self, monkeypatch):
        monkeypatch.setattr(augmentation, "INTERPOLATIONS", (cv2.INTER_LINEAR,))
        image, augment = as_color(pattern(90, 300)), AugmentWord(geometry=1.0, deterioration=0.0, color=0.0)
        canvases = []
        monkeypatch.setattr(
            augmentation, "fit_canvas", lambda *args: canvases.append(fit_canvas(*args)) or canvases[-1]
        )
        for seed in range(20):
            direct, _ = augment(image, None, rng(seed))
            whole = transforms.resize(warp(image, *canvases[-1], cv2.INTER_LINEAR), (32, 128))
            assert np.abs(direct.astype(int) - whole).mean() < 2.0


class TestWordTransforms:
    def test_resize_is_plain_bilinear(self):
        image = as_color(pattern(47, 111))
        resized, mask = ResizeWord(size=(32, 128))(image, image[..., 0].copy(), rng())
        np.testing.assert_array_equal(resized, cv2.resize(image, (128, 32), interpolation=cv2.INTER_LINEAR))
        np.testing.assert_array_equal(resized[..., 0], mask)
        assert ResizeWord()(image, None, rng())[1] is None

    @pytest.mark.parametrize(("size", "filled"), [((64, 64), (32, 32)), ((10, 400), (3, 128)), ((32, 128), (32, 128))])
    def test_aligned_left_the_rest_is_black(self, size, filled):
        image = np.full((*size, 3), 200, np.uint8)
        resized, mask = ResizeWord(fit="left")(image, image[..., 0].copy(), rng())
        assert resized.shape == (32, 128, 3)
        expected = np.zeros((32, 128), bool)
        expected[: filled[0], : filled[1]] = True
        np.testing.assert_array_equal(resized[..., 0] == 200, expected)
        np.testing.assert_array_equal(mask == 200, expected)

    @pytest.mark.parametrize(("size", "filled"), [((64, 64), (32, 32)), ((10, 400), (3, 128)), ((20, 37), (32, 59))])
    def test_centred_the_borders_are_replicated(self, size, filled):
        mask = pattern(*size)
        resized, moved = ResizeWord(fit="centre")(as_color(mask), mask, rng())
        top, left = (33 - filled[0]) // 2, (129 - filled[1]) // 2
        expected = np.pad(
            cv2.resize(mask, filled[::-1]),
            ((top, 32 - filled[0] - top), (left, 128 - filled[1] - left)),
            mode="edge",
        )
        np.testing.assert_array_equal(moved, expected)
        np.testing.assert_array_equal(resized[..., 0], expected)

    def test_random_aspects_are_half_of_the_words_with_even_widths(self):
        """As published: in training, half of the time, a width drawn evenly from 32 to 128 at height 32."""
        resize = ResizeWord(fit="centre", random_aspect=True)
        sizes = [resize.sample_size((20, 90), rng(seed)) for seed in range(4000)]
        kept = resize.fitted((20, 90))
        assert kept == (28, 128)
        drawn = [width for height, width in sizes if (height, width) != kept]
        assert len(drawn) == pytest.approx(2000, abs=130)
        assert {height for height, _ in sizes} == {28, 32}
        assert (min(drawn), max(drawn)) == (32, 128)
        np.testing.assert_allclose(np.histogram(drawn, bins=[32, 65, 97, 129])[0] / len(drawn), 1 / 3, atol=0.04)

    def test_order_is_deterioration_colour_geometry(self, monkeypatch):
        """As published: the order of BINet, whatever is drawn; geometry sees what the others made of the image."""
        calls = []
        monkeypatch.setattr(augmentation, "deteriorate", lambda image, _: calls.append(image.shape) or image + 1)
        monkeypatch.setattr(augmentation, "color_jitter", lambda image, _: calls.append(image.shape) or image + 10)
        monkeypatch.setattr(transforms, "warp", lambda *args: calls.append(args[0][0, 0, 0]) or warp(*args))
        AugmentWord(geometry=1.0, deterioration=1.0, color=1.0)(np.full((50, 90, 3), 100, np.uint8), None, rng())
        assert calls == [(50, 90, 3), (50, 90, 3), 111]

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1, 40000), (40000, 1), (31, 77), (500, 900)])
    @pytest.mark.parametrize("fit", ["stretch", "centre", "left"])
    def test_any_size_of_image(self, size, fit):
        image, mask = np.full((*size, 3), 90, np.uint8), np.full(size, 255, np.uint8)
        resize = ResizeWord(fit=fit, random_aspect=fit == "centre")
        augment = AugmentWord(resize, geometry=1.0, deterioration=0.5, color=0.5)
        for seed in range(6):
            result, moved = augment(image, mask, rng(seed))
            assert result.shape == (32, 128, 3)
            assert moved.shape == (32, 128)
            assert result.dtype == moved.dtype == np.uint8

    def test_depends_on_the_generator_only_and_leaves_its_input(self):
        image, mask = as_color(pattern()), pattern()
        before = image.copy(), mask.copy()
        augment = AugmentWord()
        for seed in range(30):
            first, second = augment(image, mask, rng(seed)), augment(image, mask, rng(seed))
            np.testing.assert_array_equal(first[0], second[0])
            np.testing.assert_array_equal(first[1], second[1])
        np.testing.assert_array_equal(image, before[0])
        np.testing.assert_array_equal(mask, before[1])

    def test_kinds_are_drawn_for_each_sample(self):
        image, mask = as_color(pattern(32, 128)), pattern(32, 128)
        results = [AugmentWord()(image, mask, rng(seed)) for seed in range(800)]
        moved = np.mean([(each != mask).any() for _, each in results])
        untouched = np.mean([np.array_equal(each, image) for each, _ in results])
        assert moved == pytest.approx(0.5, abs=0.06)
        assert untouched == pytest.approx(0.5 * 0.75 * 0.75, abs=0.06)

    def test_result_becomes_a_tensor(self):
        for seed in range(20):
            image, mask = AugmentWord()(as_color(pattern()), pattern(), rng(seed))
            torch.from_numpy(np.ascontiguousarray(image))
            torch.from_numpy(np.ascontiguousarray(mask))


class TestViews:
    def test_only_tall_images_are_turned_both_ways(self):
        image, mask = rng().integers(0, 256, (31, 20, 3), dtype=np.uint8), rng(1).integers(0, 256, (31, 20), np.uint8)
        as_stored, left, right = views(image, mask, turn_tall=1.5)
        assert (as_stored.turned, left.turned, right.turned) == (0, 90, 270)
        assert as_stored.image is image
        for view, turns in ((left, 1), (right, 3)):
            assert np.array_equal(view.image, np.rot90(image, turns))
            assert np.array_equal(view.mask, np.rot90(mask, turns))
            assert view.image.flags.c_contiguous
        assert [each.mask for each in views(image[:30], None, turn_tall=1.5)] == [None]
        assert len(views(image, None)) == 1
