"""Decoding of images and masks of every kind, and what is refused."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from loading.decoding import BrokenImageError, convert, decode_image, decode_mask
from tests.patterns import as_color, encoded, pattern


class TestDecoding:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "I;16"])
    def test_every_colour_model_becomes_rgb(self, mode):
        color = np.zeros((12, 20, 3), np.uint8)
        color[:, :10] = (200, 40, 40)
        color[:, 10:] = (30, 60, 210)
        expected = color
        if mode == "I;16":
            grey = cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)
            image, expected = Image.fromarray(grey.astype(np.uint16) * 257), as_color(grey)
        else:
            image = Image.fromarray(color).convert(mode)
            if mode in ("L", "LA", "P"):
                expected = np.asarray(image.convert("RGB"))
        decoded = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
        assert decoded.shape == (12, 20, 3)
        assert decoded.dtype == np.uint8
        inner = np.s_[:, [3, 16]]  # away from the edge, which JPEG blurs
        assert np.abs(decoded[inner].astype(int) - expected[inner]).max() <= 6

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "palette"])
    def test_transparent_pixels_become_white(self, kind):
        letter = np.zeros((8, 16, 4), np.uint8)
        letter[2:6, 4:9] = (0, 0, 0, 255)
        image = Image.fromarray(letter)
        image, kind = (image.quantize(4), "PNG") if kind == "palette" else (image, kind)
        decoded = decode_image(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert (decoded[2:6, 4:9] == 0).all()
        assert (decoded[:2] == 255).all()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "transparent"])
    def test_orientation_is_applied_on_request(self, kind):
        image = np.zeros((8, 16, 4 if kind == "transparent" else 3), np.uint8)
        image[:, :8] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        data = encoded(Image.fromarray(image), "PNG" if kind == "transparent" else kind, exif=exif)
        stored, turned = decode_image(data), decode_image(data, oriented=True)
        assert stored.shape == (8, 16, 3)
        assert turned.shape == (16, 8, 3)
        if kind != "transparent":
            assert turned[:6].min() > 128 > turned[10:].max()
        assert decode_mask(data, oriented=True).shape == (16, 8)

    @pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, None])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_deep_images_are_scaled(self, top, channels):
        ramp = np.tile(np.linspace(0, 255, 52, dtype=np.float32), (4, 1))  # 5 levels a step
        levels = ramp * 1e6 - 77 if top is None else ramp / 255 * top
        data = cv2.imencode(".tiff", np.repeat(levels[..., None], channels, axis=2))[1].tobytes()
        decoded = decode_image(data)
        assert decoded.dtype == np.uint8
        assert np.abs(decoded[..., 0] - ramp).max() <= 1
        if channels == 1:
            for deep in (
                ramp.astype(np.int32) * 257,
                ramp.astype(np.uint16) * 257,
                ramp.astype(">u2") * np.uint16(257),
            ):
                assert np.abs(decode_image(encoded(Image.fromarray(deep), "TIFF"))[..., 0] - ramp).max() <= 1

    @pytest.mark.parametrize(
        ("kind", "depth"), [("PNG", np.uint8), ("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)]
    )
    def test_masks_of_any_depth_may_have_levels_up_to_255(self, kind, depth):
        mask = np.array([[0, 255, 0, 255]], depth)
        data = encoded(Image.fromarray(mask), kind)
        assert decode_mask(data).tolist() == [[0, 255, 0, 255]]
        assert np.asarray(convert(Image.open(io.BytesIO(data)), "L")).tolist() == [[0, 255, 0, 255]]

    def test_infinite_levels_and_flat_images_are_decoded(self):
        levels = np.full((4, 8), np.nan, np.float32)
        assert decode_image(cv2.imencode(".tiff", levels)[1].tobytes()).max() == 0
        for value in (1e9, -5):
            levels[:] = value
            decoded = decode_image(cv2.imencode(".tiff", levels)[1].tobytes())
            assert decoded.shape == (4, 8, 3)
            assert decoded.max() == 0

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
    def test_a_huge_image_is_refused_by_its_header(self, kind):
        data = bytearray(encoded(Image.fromarray(as_color(pattern())), kind))
        place = {"PNG": 16, "JPEG": data.find(b"\xff\xc0") + 5, "BMP": 18}[kind]
        size = {"PNG": b"\0\0\x80\0" * 2, "JPEG": b"\xff" * 4, "BMP": b"\0\x80\0\0" * 2}[kind]
        data[place : place + len(size)] = size
        if kind == "PNG":
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with pytest.raises(BrokenImageError, match="pixels"):
            decode_image(bytes(data))

    def test_broken_images_are_silent(self):
        data = encoded(Image.fromarray(as_color(pattern())), "TIFF")
        code = (
            "import sys; from loading import decoding as t\n"
            "try: t.decode_image(sys.stdin.buffer.read())\n"
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
        with pytest.raises(BrokenImageError):
            decode_image(data[: int(len(data) * share)])

    def test_text_is_broken(self):
        with pytest.raises(BrokenImageError):
            decode_image(b"this is no image at all")
