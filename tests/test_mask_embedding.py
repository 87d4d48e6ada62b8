import torch
from torch.nn import functional as F

from modules.mask_embedding import ConditionNetwork, MaskEmbedding, ModulatedStack, SpatialFeatureTransform


def test_condition_has_one_vector_per_cell():
    condition = ConditionNetwork(stride=(4, 2), hidden_channels=8, condition_channels=4)
    assert condition(torch.rand(3, 1, 16, 24)).shape == (3, 4, 4, 12)


def test_condition_repeats_the_mask():
    network = ConditionNetwork(stride=(4, 4), hidden_channels=8, condition_channels=4)
    mask = torch.rand(2, 1, 8, 8)
    first = network[0]
    expected = F.conv2d(mask, first.weight.sum(dim=1, keepdim=True), first.bias, stride=4)
    for layer in list(network)[1:]:
        expected = layer(expected)
    torch.testing.assert_close(network(mask), expected)


def test_transform_scales_and_shifts():
    transform = SpatialFeatureTransform(sft_channels=6, condition_channels=4)
    for conv, value in ((transform.SFT_scale_conv1, 2.0), (transform.SFT_shift_conv1, 5.0)):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(conv.bias, value)
    feature = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(transform(feature, torch.randn(2, 4, 3, 5)), 3 * feature + 5)


def test_stack_depends_on_the_condition_and_reaches_every_parameter():
    stack = ModulatedStack(sft_blocks=2, sft_channels=6, condition_channels=4)
    feature = torch.randn(2, 6, 3, 5)
    one, other = stack(feature, torch.randn(2, 4, 3, 5)), stack(feature, torch.randn(2, 4, 3, 5))
    assert one.shape == feature.shape
    assert not torch.allclose(one, other)
    one.sum().backward()
    assert [name for name, parameter in stack.named_parameters() if parameter.grad is None] == []


def test_embedding_adds_the_output_of_the_stack():
    block = MaskEmbedding(channels=12, stride=(4, 2), sft_blocks=1, sft_channels=6, hidden_channels=8)
    feature, mask = torch.randn(2, 12, 3, 5), torch.rand(2, 1, 12, 10)
    modulated = block.conv0(feature)
    expected = block.back(modulated + block.sft(modulated, block.condnet(mask)))
    torch.testing.assert_close(block(feature, mask), expected)
    assert not torch.allclose(block(feature, mask), block(feature, torch.zeros_like(mask)))
