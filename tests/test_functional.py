"""Resizing keeps 16 bits where autocast would not; on tensors that only say that they are on a GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from modules.functional import resize_aligned, resize_maps


def test_resizing_to_the_same_size_changes_nothing():
    maps = torch.randn(1, 2, 5, 7)
    assert resize_maps(maps, (5, 7)) is maps
    torch.testing.assert_close(resize_maps(maps, (9, 13)), F.interpolate(maps, size=(9, 13), mode="bilinear"))


def test_aligned_corners_keep_their_values():
    maps = torch.randn(1, 2, 5, 7)
    corners = resize_aligned(maps, (9, 13))[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, maps[..., [0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize("align_corners", [False, True])
def test_maps_stay_in_16_bits_under_autocast_of_a_gpu(monkeypatch, align_corners):
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.bfloat16):
        maps = torch.empty(1, 2, 4, 4, device="cuda", dtype=torch.bfloat16)
        assert F.interpolate(maps, size=(8, 8), mode="bilinear").dtype == torch.float32  # why `resize` exists
        assert resize_maps(maps, (8, 8), align_corners=align_corners).dtype == torch.bfloat16
