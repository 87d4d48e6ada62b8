"""Decoding, geometry that moves picture and mask alike, deterioration, colour, sizes."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from loading import transforms
from loading.transforms import (
    AugmentWord,
    BrokenPictureError,
    CropSegmentation,
    RandAugmentWord,
    ResizeWord,
    affine,
    color_jitter,
    decode_mask,
    decode_picture,
    fit_canvas,
    gaussian_noise,
    line_kernel,
    motion_blur,
    one_sided,
    perspective,
    rescale,
    rotation,
    symmetric,
    views,
    warp,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pattern(height: int = 40, width: int = 100) -> np.ndarray:
    """Smooth grey blobs, (H, W) uint8, that change under any geometry."""
    noise = rng(3).random((5, 9)).astype(np.float32) * 255
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def as_color(grey: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


class TestDecoding:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16"])
    def test_every_colour_model_becomes_rgb(self, mode):
        color = np.zeros((12, 20, 3), np.uint8)
        color[:, :10] = (200, 40, 40)
        color[:, 10:] = (30, 60, 210)
        expected = color
        if mode == "I;16":
            grey = cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)
            picture, expected = Image.fromarray(grey.astype(np.uint16) * 257), as_color(grey)
        else:
            picture = Image.fromarray(color).convert(mode)
            if mode in ("L", "LA", "P"):
                expected = np.asarray(picture.convert("RGB"))
        decoded = decode_picture(encoded(picture, "JPEG" if mode == "CMYK" else "PNG"))
        assert decoded.shape == (12, 20, 3)
        assert decoded.dtype == np.uint8
        inner = np.s_[:, [3, 16]]  # away from the edge, which JPEG blurs
        assert np.abs(decoded[inner].astype(int) - expected[inner]).max() <= 6

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "palette"])
    def test_letters_on_transparency_stand_on_white(self, kind):
        letter = np.zeros((8, 16, 4), np.uint8)
        letter[2:6, 4:9] = (0, 0, 0, 255)
        picture = Image.fromarray(letter)
        picture, kind = (picture.quantize(4), "PNG") if kind == "palette" else (picture, kind)
        decoded = decode_picture(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert (decoded[2:6, 4:9] == 0).all()
        assert (decoded[:2] == 255).all()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "transparent"])
    def test_orientation_counts_where_it_is_asked_for(self, kind):
        picture = np.zeros((8, 16, 4 if kind == "transparent" else 3), np.uint8)
        picture[:, :8] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        data = encoded(Image.fromarray(picture), "PNG" if kind == "transparent" else kind, exif=exif)
        stored, turned = decode_picture(data), decode_picture(data, oriented=True)
        assert stored.shape == (8, 16, 3)
        assert turned.shape == (16, 8, 3)
        if kind != "transparent":
            assert turned[:6].min() > 128 > turned[10:].max()
        assert decode_mask(data, oriented=True).shape == (16, 8)

    @pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, None])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_deep_pictures_are_scaled(self, top, channels):
        ramp = np.tile(np.linspace(0, 255, 52, dtype=np.float32), (4, 1))  # 5 levels a step
        levels = ramp * 1e6 - 77 if top is None else ramp / 255 * top
        data = cv2.imencode(".tiff", np.repeat(levels[..., None], channels, axis=2))[1].tobytes()
        decoded = decode_picture(data)
        assert decoded.dtype == np.uint8
        assert np.abs(decoded[..., 0] - ramp).max() <= 1
        if channels == 1:
            for deep in (
                ramp.astype(np.int32) * 257,
                ramp.astype(np.uint16) * 257,
                ramp.astype(">u2") * np.uint16(257),
            ):
                assert np.abs(decode_picture(encoded(Image.fromarray(deep), "TIFF"))[..., 0] - ramp).max() <= 1

    def test_what_is_not_finite_and_what_is_flat_does_no_harm(self):
        levels = np.full((4, 8), np.nan, np.float32)
        assert decode_picture(cv2.imencode(".tiff", levels)[1].tobytes()).max() == 0
        levels[:] = 1e9
        assert decode_picture(cv2.imencode(".tiff", levels)[1].tobytes()).shape == (4, 8, 3)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
    def test_a_huge_picture_is_refused_by_its_header(self, kind):
        data = bytearray(encoded(Image.fromarray(as_color(pattern())), kind))
        place = {"PNG": 16, "JPEG": data.find(b"\xff\xc0") + 5, "BMP": 18}[kind]
        size = {"PNG": b"\0\0\x80\0" * 2, "JPEG": b"\xff" * 4, "BMP": b"\0\x80\0\0" * 2}[kind]
        data[place : place + len(size)] = size
        if kind == "PNG":
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with pytest.raises(BrokenPictureError, match="pixels"):
            decode_picture(bytes(data))

    def test_broken_pictures_are_silent(self):
        data = encoded(Image.fromarray(as_color(pattern())), "TIFF")
        code = (
            "import sys; from loading import transforms as t\n"
            "try: t.decode_picture(sys.stdin.buffer.read())\n"
            "except ValueError: print(1)"
        )
        for cut in (len(data) // 2, 3 * len(data) // 4):
            done = subprocess.run([sys.executable, "-c", code], input=data[:cut], capture_output=True, check=True)
            assert (done.stdout, done.stderr) == (b"1\n", b"")

    def test_mask_is_one_channel(self):
        mask = pattern()
        assert (decode_mask(encoded(Image.fromarray(mask), "PNG")) == mask).all()
        assert decode_mask(encoded(Image.fromarray(as_color(mask)), "PNG")).shape == mask.shape

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_truncated_or_empty_is_broken(self, kind, share):
        data = encoded(Image.fromarray(as_color(pattern())), kind)
        with pytest.raises(BrokenPictureError):
            decode_picture(data[: int(len(data) * share)])

    def test_text_is_broken(self):
        with pytest.raises(BrokenPictureError):
            decode_picture(b"this is no picture at all")


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
        picture = as_color(pattern())
        scale = np.diag((128 / 100, 32 / 40, 1.0))
        warped = warp(picture, scale, (32, 128), cv2.INTER_LINEAR)
        assert np.abs(warped.astype(int) - transforms.resize(picture, (32, 128))).max() <= 4  # OpenCV's fixed point

    def test_result_beyond_the_limit_is_scaled_down(self):
        _, (height, width) = fit_canvas(np.diag((100.0, 2.0, 1.0)), (40, 100), max_side=4096)
        assert (height, width) == (80, 4096)

    @pytest.mark.parametrize("interpolation", sorted(set(transforms.INTERPOLATIONS)))
    @pytest.mark.parametrize("resize", [ResizeWord(), ResizeWord(fit="centre", random_aspect=True)])
    def test_picture_and_mask_get_the_same_warp(self, interpolation, resize, monkeypatch):
        monkeypatch.setattr(transforms, "INTERPOLATIONS", (interpolation,))
        augment = AugmentWord(resize, geometry=1.0, deterioration=0.0, color=0.0)
        for mask in (pattern(), pattern(31, 64), pattern(120, 400)):
            for seed in range(20):
                moved, moved_mask = augment(as_color(mask), mask, rng(seed))
                assert (cv2.resize(mask, (128, 32)) != moved_mask).any()
                np.testing.assert_array_equal(moved[..., 0], moved_mask)

    def test_small_canvas_shortcut_changes_next_to_nothing(self, monkeypatch):
        monkeypatch.setattr(transforms, "INTERPOLATIONS", (cv2.INTER_LINEAR,))
        picture, augment = as_color(pattern(90, 300)), AugmentWord(geometry=1.0, deterioration=0.0, color=0.0)
        canvases = []
        monkeypatch.setattr(transforms, "fit_canvas", lambda *args: canvases.append(fit_canvas(*args)) or canvases[-1])
        for seed in range(20):
            direct, _ = augment(picture, None, rng(seed))
            whole = transforms.resize(warp(picture, *canvases[-1], cv2.INTER_LINEAR), (32, 128))
            assert np.abs(direct.astype(int) - whole).mean() < 2.0


class TestDeterioration:
    def test_noise_has_mean_zero_and_a_variance_in_range(self):
        picture = np.full((64, 128, 3), 128, np.uint8)
        variances = []
        for seed in range(200):
            noise = gaussian_noise(picture, rng(seed)).astype(float) - 128
            assert abs(noise.mean()) < 0.1
            variances.append(noise.var())
        assert min(variances) >= 0.9  # at least 1, but for rounding
        assert max(variances) <= 21
        assert np.mean(variances) == pytest.approx(4.0, rel=0.25)  # 20 x the mean of Beta(1, 4)

    def test_noise_fits_any_size(self):
        assert gaussian_noise(np.zeros((700, 900, 3), np.uint8), rng()).shape == (700, 900, 3)

    @pytest.mark.parametrize("pixels", [2, 3, 4, 5, 6])
    def test_blur_kernels_are_centred_lines(self, pixels):
        for direction in range(transforms.DIRECTIONS):
            kernel = line_kernel(pixels, direction)
            assert kernel.sum() == pytest.approx(1.0, abs=1e-5)
            np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-5)
        assert np.count_nonzero(line_kernel(5, 0).sum(1) > 1e-6) == 1

    def test_blur_and_rescale_keep_size_and_mean(self):
        picture = as_color(pattern(40, 160))
        for seed in range(40):
            for kind in (motion_blur, rescale):
                result = kind(picture, rng(seed))
                assert result.shape == picture.shape
                assert abs(result.mean() - picture.mean()) < 6

    def test_rescale_takes_0_to_4_levels_of_a_pyramid_as_often_as_published(self, monkeypatch):
        """As published: to 128 x 512, halved by a Gaussian pyramid round(Uniform(0, 4)) times."""
        levels = []
        monkeypatch.setattr(cv2, "pyrDown", lambda picture: levels.append(picture.shape[:2]) or picture[::2, ::2])
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

    def test_only_the_picture_is_touched(self):
        mask = pattern(32, 128)
        augment = AugmentWord(geometry=0.0, deterioration=1.0, color=1.0)
        changed, kept = augment(as_color(mask), mask, rng())
        np.testing.assert_array_equal(kept, mask)
        assert (changed != as_color(mask)).any()


class TestColor:
    def test_zero_strength_changes_nothing_but_rounding(self):
        picture = as_color(pattern())
        same = color_jitter(picture, rng(), brightness=0, contrast=0, saturation=0, hue=0)
        assert np.abs(same.astype(int) - picture).max() <= 2

    def test_saturates_instead_of_wrapping(self):
        bright = np.full((8, 8, 3), 250, np.uint8)
        for seed in range(50):
            result = color_jitter(bright, rng(seed), brightness=0.5, contrast=0, saturation=0, hue=0)
            assert result.min() >= 124

    def test_hue_moves_colours_and_leaves_greys(self):
        red = np.full((8, 8, 3), (200, 30, 30), np.uint8)
        grey = np.full((8, 8, 3), 90, np.uint8)
        turned = [color_jitter(red, rng(seed), brightness=0, contrast=0, saturation=0) for seed in range(20)]
        assert len({tuple(each[0, 0]) for each in turned}) > 10
        assert np.abs(color_jitter(grey, rng(), brightness=0, contrast=0, saturation=0).astype(int) - 90).max() <= 1


class TestWordTransforms:
    def test_resize_is_plain_bilinear(self):
        picture = as_color(pattern(47, 111))
        resized, mask = ResizeWord(size=(32, 128))(picture, picture[..., 0].copy(), rng())
        np.testing.assert_array_equal(resized, cv2.resize(picture, (128, 32), interpolation=cv2.INTER_LINEAR))
        np.testing.assert_array_equal(resized[..., 0], mask)
        assert ResizeWord()(picture, None, rng())[1] is None

    @pytest.mark.parametrize(("size", "filled"), [((64, 64), (32, 32)), ((10, 400), (3, 128)), ((32, 128), (32, 128))])
    def test_aligned_left_the_rest_is_black(self, size, filled):
        picture = np.full((*size, 3), 200, np.uint8)
        resized, mask = ResizeWord(fit="left")(picture, picture[..., 0].copy(), rng())
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
        sizes = [resize.draw_size((20, 90), rng(seed)) for seed in range(4000)]
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
        monkeypatch.setattr(transforms, "deteriorate", lambda picture, _: calls.append(picture.shape) or picture + 1)
        monkeypatch.setattr(transforms, "color_jitter", lambda picture, _: calls.append(picture.shape) or picture + 10)
        monkeypatch.setattr(transforms, "warp", lambda *args: calls.append(args[0][0, 0, 0]) or warp(*args))
        AugmentWord(geometry=1.0, deterioration=1.0, color=1.0)(np.full((50, 90, 3), 100, np.uint8), None, rng())
        assert calls == [(50, 90, 3), (50, 90, 3), 111]

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1, 40000), (40000, 1), (31, 77), (500, 900)])
    @pytest.mark.parametrize("fit", ["stretch", "centre", "left"])
    def test_any_size_of_picture(self, size, fit):
        picture, mask = np.full((*size, 3), 90, np.uint8), np.full(size, 255, np.uint8)
        resize = ResizeWord(fit=fit, random_aspect=fit == "centre")
        augment = AugmentWord(resize, geometry=1.0, deterioration=0.5, color=0.5)
        for seed in range(6):
            result, moved = augment(picture, mask, rng(seed))
            assert result.shape == (32, 128, 3)
            assert moved.shape == (32, 128)
            assert result.dtype == moved.dtype == np.uint8

    def test_depends_on_the_generator_only_and_leaves_its_input(self):
        picture, mask = as_color(pattern()), pattern()
        before = picture.copy(), mask.copy()
        augment = AugmentWord()
        for seed in range(30):
            first, second = augment(picture, mask, rng(seed)), augment(picture, mask, rng(seed))
            np.testing.assert_array_equal(first[0], second[0])
            np.testing.assert_array_equal(first[1], second[1])
        np.testing.assert_array_equal(picture, before[0])
        np.testing.assert_array_equal(mask, before[1])

    def test_kinds_are_drawn_for_each_sample(self):
        picture, mask = as_color(pattern(32, 128)), pattern(32, 128)
        results = [AugmentWord()(picture, mask, rng(seed)) for seed in range(800)]
        moved = np.mean([(each != mask).any() for _, each in results])
        untouched = np.mean([np.array_equal(each, picture) for each, _ in results])
        assert moved == pytest.approx(0.5, abs=0.06)
        assert untouched == pytest.approx(0.5 * 0.75 * 0.75, abs=0.06)

    def test_result_becomes_a_tensor(self):
        for seed in range(20):
            picture, mask = AugmentWord()(as_color(pattern()), pattern(), rng(seed))
            torch.from_numpy(np.ascontiguousarray(picture))
            torch.from_numpy(np.ascontiguousarray(mask))


class TestRandAugment:
    def test_picture_and_mask_get_the_same_warp(self, monkeypatch):
        monkeypatch.setattr(transforms, "PIXEL_OPERATIONS", {})
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

        for table in (transforms.PIXEL_OPERATIONS, transforms.MATRIX_OPERATIONS):
            for name, change in table.items():
                monkeypatch.setitem(table, name, noting(name, change))
        for seed in range(3000):
            RandAugmentWord()(as_color(pattern(16, 40)), None, rng(seed))
        assert len(applied) == pytest.approx(3000 * 3 / 2, rel=0.05)
        counts = np.array([applied.count(name) for name in set(applied)])
        assert len(counts) == 15
        np.testing.assert_allclose(counts, 300, atol=70)

    @pytest.mark.parametrize("name", transforms.PIXEL_OPERATIONS)
    def test_each_operation_changes_the_image_and_keeps_its_form(self, name):
        picture = cv2.merge([pattern(), pattern()[::-1].copy(), pattern() // 2 + 60])
        before = picture.copy()
        for level in (0.5, -0.5):
            changed = transforms.PIXEL_OPERATIONS[name](picture, level, rng())
            assert changed.shape == picture.shape
            assert changed.dtype == np.uint8
            assert np.abs(changed.astype(int) - picture).max() > 5
        np.testing.assert_array_equal(picture, before)

    @pytest.mark.parametrize("name", ["color", "contrast", "brightness", "rotate", "shear_x", "shear_y"])
    def test_magnitude_decides_how_much(self, name):
        picture = cv2.merge([pattern(), pattern()[::-1].copy(), pattern() // 2 + 60])
        if name in transforms.PIXEL_OPERATIONS:
            changes = [transforms.PIXEL_OPERATIONS[name](picture, level, rng()) for level in (0.0, 0.3, 0.9)]
            sizes = [np.abs(each.astype(int) - picture).mean() for each in changes]
        else:
            sizes = [
                np.abs(transforms.MATRIX_OPERATIONS[name](level, (40, 100)) - np.eye(3)).sum()
                for level in (0, 0.3, 0.9)
            ]
        assert sizes[0] <= 0.6 < 2 * sizes[1] < 2.1 * sizes[2] or sizes[0] == 0 < sizes[1] < sizes[2]

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (1, 40000), (40000, 1), (31, 77), (500, 900)])
    def test_any_size_of_picture_at_bounded_cost(self, size, monkeypatch):
        areas = []
        monkeypatch.setattr(transforms, "warp", lambda *args: areas.append(args[2][0] * args[2][1]) or warp(*args))
        picture, mask = np.full((*size, 3), 90, np.uint8), np.full(size, 255, np.uint8)
        for seed in range(20):
            result, moved = RandAugmentWord(probability=1.0)(picture, mask, rng(seed))
            assert result.shape == (32, 128, 3)
            assert moved.shape == (32, 128)
        assert max(areas) <= 1.05 * 4 * 32 * 128

    def test_depends_on_the_generator_only_and_leaves_its_input(self):
        picture, mask = as_color(pattern()), pattern()
        for seed in range(30):
            first, second = (RandAugmentWord()(picture, mask, rng(seed)) for _ in range(2))
            np.testing.assert_array_equal(first[0], second[0])
            np.testing.assert_array_equal(first[1], second[1])
        np.testing.assert_array_equal(picture, as_color(pattern()))
        np.testing.assert_array_equal(mask, pattern())


class TestCropSegmentation:
    def test_labels_keep_their_values_and_follow_the_picture(self):
        labels = (pattern(120, 200) > 128).astype(np.uint8)
        crop = CropSegmentation(size=(64, 96), scale_range=(0.5, 2.0), color=0.0)
        for seed in range(20):
            picture, cut = crop(as_color(labels * 200), labels, rng(seed))
            assert picture.shape == (64, 96, 3)
            assert set(np.unique(cut)) <= {0, 1, 255}
            known = cut != 255
            assert ((picture[..., 0] > 100) == cut)[known].mean() > 0.97

    def test_outside_is_ignored(self):
        _, cut = CropSegmentation(size=(64, 64), scale_range=(1, 1))(
            np.zeros((20, 30, 3), np.uint8), np.ones((20, 30), np.uint8), rng()
        )
        assert abs(int((cut == 1).sum()) - 600) <= 51
        assert (cut != 0).all()


class TestViews:
    def test_only_tall_pictures_are_turned_both_ways(self):
        picture, mask = rng().integers(0, 256, (31, 20, 3), dtype=np.uint8), rng(1).integers(0, 256, (31, 20), np.uint8)
        as_stored, left, right = views(picture, mask, turn_tall=1.5)
        assert (as_stored.turned, left.turned, right.turned) == (0, 90, 270)
        assert as_stored.picture is picture
        for view, turns in ((left, 1), (right, 3)):
            assert np.array_equal(view.picture, np.rot90(picture, turns))
            assert np.array_equal(view.mask, np.rot90(mask, turns))
            assert view.picture.flags.c_contiguous
        assert [each.mask for each in views(picture[:30], None, turn_tall=1.5)] == [None]
        assert len(views(picture, None)) == 1
