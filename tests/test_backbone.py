import pytest
import torch

from modules.backbone import ResNet, TransformerBackbone


def small_resnet(**options: object) -> ResNet:
    return ResNet(**{"stem_width": 4, "widths": (8, 8, 16), "depths": (1, 2, 1), "strides": (2, 2, 1)} | options)


@pytest.mark.parametrize("size", [(32, 128), (33, 127), (7, 5), (1, 1)])
@pytest.mark.parametrize("strides", [(2, 2, 1), (1, 1, 1), (2, 3, 1), (2, (2, 1), (1, 1))])
def test_output_size_is_that_of_the_output(size, strides):
    resnet = small_resnet(strides=strides, mask_branch=True, side_channels=4).eval()
    features = resnet(torch.randn(1, 3, *size))
    assert features.feature.shape[-2:] == resnet.output_size(size)
    assert features.semantic.shape == features.feature.shape
    assert features.side.shape == (1, 4, *resnet.output_size(size))


def test_paper_sizes():
    assert ResNet().output_size((32, 128)) == (8, 32)


def test_side_outputs_only_with_the_mask_branch():
    features = small_resnet()(torch.randn(2, 3, 8, 16))
    assert features.semantic is None
    assert features.side is None


def test_initial_values():
    resnet = ResNet(mask_branch=True)
    conv = resnet.layer5[1].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    bound = (6 / (9 * (512 + 512))) ** 0.5  # Xavier uniform
    assert resnet.cls[0].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not resnet.side5_1[0].bias.any()


def test_positions_are_added_only_when_asked_for():
    plain, positional = (
        TransformerBackbone(
            resnet=small_resnet(), image_size=(8, 16), num_layers=1, nhead=2, d_inner=8, positional_encoding=wanted
        )
        for wanted in (False, True)
    )
    assert "pos_encoder.pe" not in plain.state_dict()
    assert positional.state_dict()["pos_encoder.pe"].shape == (2 * 4, 1, 16)
    image = torch.randn(2, 3, 8, 16)
    assert positional(image).feature.shape == plain(image).feature.shape == (2, 16, 2, 4)
