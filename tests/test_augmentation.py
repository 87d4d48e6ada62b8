"""Deterioration, colour, RandAugment, crops: what each changes and how strongly."""

import cv2
import numpy as np
import pytest

from loading import augmentation, transforms
from loading.augmentation import (
    AugmentWord,
    CropSegmentation,
    RandAugmentWord,
    color_jitter,
    gaussian_noise,
    line_kernel,
    motion_blur,
    one_sided,
    rescale,
    symmetric,
)
from loading.transforms import ResizeWord, warp
from tests.patterns import as_color, pattern, rng


class TestMagnitudes:
    def test_symmetric_magnitudes_have_the_published_spread(self):
        values = np.array([symmetric(rng(seed), 45.0) for seed in range(2000)])
        assert np.abs(values).max() < 45
        assert abs(values.mean()) < 1.0
        assert values.std() == pytest.approx(45 * 2 * np.sqrt(16 / (64 * 9)), rel=0.06)  # of Beta(4, 4)

    def test_one_sided_magnitudes_have_the_published_mean(self):
        values = np.array([one_sided(rng(seed), 20.0) for seed in range(2000)])
        assert values.min() >= 0
        assert values.max() < 20
        assert values.mean() == pytest.approx(20 * 0.2, rel=0.08)  # Beta(1, 4) has mean 1 / 5


class TestDeterioration:
    def test_noise_has_mean_zero_and_a_variance_in_range(self):
        image = np.full((64, 128, 3), 128, np.uint8)
        variances = []
        for seed in range(200):
            noise = gaussian_noise(image, rng(seed)).astype(float) - 128
            assert abs(noise.mean()) < 0.1
            variances.append(noise.var())
        assert min(variances) >= 0.9  # at least 1, but for rounding
        assert max(variances) <= 21
        assert np.mean(variances) == pytest.approx(4.0, rel=0.25)  # 20 x the mean of Beta(1, 4)

    def test_noise_fits_any_size(self):
        assert gaussian_noise(np.zeros((700, 900, 3), np.uint8), rng()).shape == (700, 900, 3)

    @pytest.mark.parametrize("pixels", [2, 3, 4, 5, 6])
    def test_blur_kernels_are_centred_lines(self, pixels):
        for direction in range(augmentation.DIRECTIONS):
            kernel = line_kernel(pixels, direction)
            assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
            np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-5)
        assert np.count_nonzero(line_kernel(5, 0).sum(1) > 1e-6) == 1

    def test_blur_and_rescale_keep_size_and_mean(self):
        image = as_color(pattern(40, 160))
        for seed in range(40):
            for kind in (motion_blur, rescale):
                result = kind(image, rng(seed))
                assert result.shape == image.shape
                assert abs(result.mean() - image.mean()) < 6

    def test_rescale_takes_0_to_4_levels_of_a_pyramid_as_often_as_published(self, monkeypatch):
        """As published: to 128 x 512, halved by a Gaussian pyramid round(Uniform(0, 4)) times."""
        levels = []
        monkeypatch.setattr(cv2, "pyrDown", lambda image: levels.append(image.shape[:2]) or image[::2, ::2])
        counts = []
        for seed in range(4000):
            before = len(levels)
            rescale(np.zeros((2, 4, 3), np.uint8), rng(seed))
            counts.append(len(levels) - before)
            assert counts[-1] == 0 or levels[before] == (128, 512)
        np.testing.assert_allclose(np.bincount(counts) / 4000, [0.125, 0.25, 0.25, 0.25, 0.125], atol=0.025)

    def test_rescale_loses_detail(self):
        noisy = rng().integers(0, 256, (40, 160, 3), dtype=np.uint8)
        spreads = [rescale(noisy, rng(seed)).std() for seed in range(40)]
        assert min(spreads) < noisy.std() / 8 < noisy.std() / 1.5 < max(spreads)

    def test_only_the_image_is_touched(self):
        mask = pattern(32, 128)
        augment = AugmentWord(geometry=0.0, deterioration=1.0, color=1.0)
        changed, kept = augment(as_color(mask), mask, rng())
        np.testing.assert_array_equal(kept, mask)
        assert (changed != as_color(mask)).any()


class TestColor:
    def test_zero_strength_changes_nothing_but_rounding(self):
        image = as_color(pattern())
        same = color_jitter(image, rng(), (0, 0, 0, 0))
        assert np.abs(same.astype(int) - image).max() <= 2

    def test_saturates_instead_of_wrapping(self):
        bright = np.full((8, 8, 3), 250, np.uint8)
        for seed in range(50):
            result = color_jitter(bright, rng(seed), (0.5, 0, 0, 0))
            assert result.min() >= 124

    def test_hue_moves_colours_and_leaves_greys(self):
        red = np.full((8, 8, 3), (200, 30, 30), np.uint8)
        grey = np.full((8, 8, 3), 90, np.uint8)
        turned = [color_jitter(red, rng(seed), (0, 0, 0, 0.1)) for seed in range(20)]
        assert len({tuple(each[0, 0]) for each in turned}) > 10
        assert np.abs(color_jitter(grey, rng(), (0, 0, 0, 0.1)).astype(int) - 90).max() <= 1


class TestRandAugment:
    def test_image_and_mask_get_the_same_warp(self, monkeypatch):
        monkeypatch.setattr(augmentation, "PIXEL_OPERATIONS", {})
        for mask in (pattern(), pattern(31, 64), pattern(120, 400)):
            for seed in range(20):
                augment = RandAugmentWord(ResizeWord(fit="centre"), probability=1.0)
                moved, moved_mask = augment(as_color(mask), mask, rng(seed))
                assert (ResizeWord(fit="centre")(mask, None, None)[0] != moved_mask).any()
                np.testing.assert_array_equal(moved[..., 0], moved_mask)

    def test_three_of_fifteen_operations_are_drawn_and_half_of_them_applied(self, monkeypatch):
        applied = []

        def noting(name, change):
            return lambda *args: applied.append(name) or change(*args)

        for table in (augmentation.PIXEL_OPERATIONS, augmentation.MATRIX_OPERATIONS):
            for name, change in table.items():
                monkeypatch.setitem(table, name, noting(name, change))
        for seed in range(3000):
            RandAugmentWord()(as_color(pattern(16, 40)), None, rng(seed))
        assert len(applied) == pytest.approx(3000 * 3 / 2, rel=0.05)
        counts = np.array([applied.count(name) for name in set(applied)])
        assert len(counts) == 15
        np.testing.assert_allclose(counts, 300, atol=70)

    @pytest.mark.parametrize("name", augmentation.PIXEL_OPERATIONS)
    def test_each_operation_changes_the_image_and_keeps_its_form(self, name):
        image = cv2.merge([pattern(), pattern()[::-1].copy(), pattern() // 2 + 60])
        before = image.copy()
        for level in (0.5, -0.5):
            changed = augmentation.PIXEL_OPERATIONS[name](image, level, rng())
            assert changed.shape == image.shape
            assert changed.dtype == np.uint8
            assert np.abs(changed.astype(int) - image).max() > 5
        np.testing.assert_array_equal(image, before)

    @pytest.mark.parametrize("name", ["color", "contrast", "brightness", "rotate", "shear_x", "shear_y"])
    def test_magnitude_decides_how_much(self, name):
        image = cv2.merge([pattern(), pattern()[::-1].copy(), pattern() // 2 + 60])
        if name in augmentation.PIXEL_OPERATIONS:
            changes = [augmentation.PIXEL_OPERATIONS[name](image, level, rng()) for level in (0.0, 0.3, 0.9)]
            sizes = [np.abs(each.astype(int) - image).mean() for each in changes]
        else:
            sizes = [
                np.abs(augmentation.MATRIX_OPERATIONS[name](level, (40, 100)) - np.eye(3)).sum()
                for level in (0, 0.3, 0.9)
            ]
        assert sizes[0] <= 0.6 < 2 * sizes[1] < 2.1 * sizes[2] or sizes[0] == 0 < sizes[1] < sizes[2]

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1, 40000), (40000, 1), (31, 77), (500, 900)])
    def test_any_size_of_image_at_bounded_cost(self, size, monkeypatch):
        areas = []
        monkeypatch.setattr(transforms, "warp", lambda *args: areas.append(args[2][0] * args[2][1]) or warp(*args))
        image, mask = np.full((*size, 3), 90, np.uint8), np.full(size, 255, np.uint8)
        for seed in range(20):
            result, moved = RandAugmentWord(probability=1.0)(image, mask, rng(seed))
            assert result.shape == (32, 128, 3)
            assert moved.shape == (32, 128)
        assert max(areas) <= 1.05 * 4 * 32 * 128

    def test_depends_on_the_generator_only_and_leaves_its_input(self):
        image, mask = as_color(pattern()), pattern()
        for seed in range(30):
            first, second = (RandAugmentWord()(image, mask, rng(seed)) for _ in range(2))
            np.testing.assert_array_equal(first[0], second[0])
            np.testing.assert_array_equal(first[1], second[1])
        np.testing.assert_array_equal(image, as_color(pattern()))
        np.testing.assert_array_equal(mask, pattern())


class TestCropSegmentation:
    def test_labels_keep_their_values_and_follow_the_image(self):
        labels = (pattern(120, 200) > 128).astype(np.uint8)
        crop = CropSegmentation(size=(64, 96), scale_range=(0.5, 2.0), color=0.0)
        for seed in range(20):
            image, cut = crop(as_color(labels * 200), labels, rng(seed))
            assert image.shape == (64, 96, 3)
            assert set(np.unique(cut)) <= {0, 1, 255}
            known = cut != 255
            assert ((image[..., 0] > 100) == cut)[known].mean() > 0.97

    def test_outside_is_ignored(self):
        _, cut = CropSegmentation(size=(64, 64), scale_range=(1, 1))(
            np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.uint8), rng()
        )
        assert abs(int((cut == 1).sum()) - 600) <= 51
        assert (cut != 0).all()
