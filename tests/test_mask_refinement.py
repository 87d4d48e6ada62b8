import pytest
import torch
from torch.nn import functional as F

from modules.mask_refinement import (
    MaskRefinement,
    PrototypeSimilarity,
    bilinear_matrix,
    min_max_normalize,
    scale_to_one,
)


def similarity_at_full_size(feature, mask):
    """Compute the similarity as published: resize all channels, pool under the mask, cosine at every pixel."""
    resized = F.interpolate(feature, size=mask.shape[-2:], mode="bilinear", align_corners=False)
    prototype = (resized * mask).sum(dim=(2, 3))[..., None, None]
    return F.cosine_similarity(resized, prototype.expand_as(resized), dim=1, eps=1e-8)[:, None]


@pytest.mark.parametrize(
    ("cells", "image_size"),
    [((8, 32), (32, 128)), ((5, 7), (13, 30)), ((3, 4), (3, 4)), ((1, 2), (9, 5)), ((1, 1), (4, 4))],
)
def test_similarity_equals_the_full_size_computation(cells, image_size):
    feature = torch.randn(3, 24, *cells)
    mask = torch.rand(3, 1, *image_size)
    ours = PrototypeSimilarity(cells=cells, image_size=image_size)(feature, mask)
    torch.testing.assert_close(ours, similarity_at_full_size(feature, mask), rtol=0, atol=2e-6)


def test_similarity_gradients_equal_the_full_size_computation():
    gradients = []
    for compute in (PrototypeSimilarity(cells=(4, 6), image_size=(16, 24)), similarity_at_full_size):
        torch.manual_seed(0)
        feature = torch.randn(2, 8, 4, 6, requires_grad=True)
        mask = torch.rand(2, 1, 16, 24, requires_grad=True)
        (compute(feature, mask) * torch.randn(2, 1, 16, 24)).sum().backward()
        gradients.append((feature.grad, mask.grad))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_similarity_of_large_and_small_features():
    similarity = PrototypeSimilarity(cells=(4, 6), image_size=(16, 24))
    feature, mask = torch.randn(1, 8, 4, 6), torch.rand(1, 1, 16, 24)
    expected = similarity(feature, mask)
    for factor in (1e-4, 1e4):
        torch.testing.assert_close(similarity(factor * feature, mask), expected)


def test_mask_scale_does_not_matter():
    similarity = PrototypeSimilarity(cells=(4, 6), image_size=(16, 24))
    feature, mask = torch.randn(1, 8, 4, 6), torch.rand(1, 1, 16, 24)
    torch.testing.assert_close(similarity(feature, mask / 255), similarity(feature, mask))


@pytest.mark.parametrize("black", ["feature", "mask"])
def test_similarity_to_a_black_mask_or_a_zero_feature_is_zero(black):
    feature, mask = torch.randn(1, 8, 4, 6), torch.rand(1, 1, 16, 24)
    (feature if black == "feature" else mask).zero_()
    feature.requires_grad_()
    mask.requires_grad_()
    similarity = PrototypeSimilarity(cells=(4, 6), image_size=(16, 24))(feature, mask)
    assert not similarity.any()
    similarity.sum().backward()
    assert feature.grad.isfinite().all()
    assert mask.grad.isfinite().all()


def test_similarity_stays_in_float32_under_autocast():
    similarity = PrototypeSimilarity(cells=(4, 6), image_size=(16, 24))
    feature, mask = torch.randn(1, 8, 4, 6).bfloat16(), torch.rand(1, 1, 16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = similarity(feature, mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, similarity(feature.float(), mask))


def test_bilinear_matrix_rows_sum_to_one():
    torch.testing.assert_close(bilinear_matrix(5, 13).sum(dim=1), torch.ones(13))


def test_stretch_and_scale():
    maps = torch.stack((torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[0.0, 5.0, 10.0]])))[:, None]
    assert min_max_normalize(maps).tolist() == [[[[0, 0.5, 1]]], [[[0, 0.5, 1]]]]
    torch.testing.assert_close(min_max_normalize(maps, "batch"), maps / 10)
    torch.testing.assert_close(scale_to_one(maps)[0], maps[0] / 4)
    torch.testing.assert_close(scale_to_one(maps, "batch"), maps / 10)


@pytest.mark.parametrize("normalize", ["sample", "batch"])
@pytest.mark.parametrize("value", [0.0, 0.7, -3e5])
def test_constant_maps_become_zero_with_finite_gradients(normalize, value):
    maps = torch.full((2, 1, 3, 4), value)
    rounding = value * torch.finfo(torch.float32).eps * torch.randn(2, 1, 3, 4)
    maps = (maps + rounding).requires_grad_()
    stretched = min_max_normalize(maps, normalize)
    assert not stretched.any()
    (stretched.sum() + scale_to_one(maps, normalize).sum()).backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["sample", "batch"])
def test_gradients_are_finite_where_only_the_saved_maps_are_rounded(normalize):
    """torch's compiler does this on a GPU: it saves maps in 16 bits that it took the extremes of in 32."""
    maps = torch.randn(2, 1, 3, 4, requires_grad=True)

    def round_maps(saved):
        return saved.bfloat16().float() if saved.is_floating_point() and saved.numel() == maps.numel() else saved

    with torch.autograd.graph.saved_tensors_hooks(round_maps, lambda saved: saved):
        stretched = min_max_normalize(maps, normalize)
    stretched.square().sum().backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("normalize", ["sample", "batch"])
def test_refinement_computes_the_equations_of_the_paper(normalize):
    block = MaskRefinement(channels=6, cells=(4, 6), image_size=(16, 24), normalize=normalize)
    torch.nn.init.normal_(block.rf.weight)
    semantic, side, mask = torch.randn(3, 8, 4, 6), torch.randn(3, 6, 4, 6), torch.rand(3, 1, 16, 24)
    resized = F.interpolate(side, size=(16, 24), mode="bilinear", align_corners=False)
    evidence = block.exit_layer(block.classifier_6(resized * similarity_at_full_size(semantic, mask)))
    over = (0, 1, 2, 3) if normalize == "batch" else (1, 2, 3)
    low, high = evidence.amin(over, keepdim=True), evidence.amax(over, keepdim=True)
    evidence, scaled = (evidence - low) / (high - low), mask / mask.amax(over, keepdim=True)
    expected = block.rf2(block.rf(torch.cat((evidence + scaled, scaled), dim=1)) + scaled)
    torch.testing.assert_close(block(semantic, side, mask), expected, rtol=1e-4, atol=1e-4)


def test_the_refined_mask_keeps_float32_under_autocast():
    block = MaskRefinement(channels=6, cells=(4, 6), image_size=(16, 24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = block(
            torch.randn(2, 8, 4, 6).bfloat16(), torch.randn(2, 6, 4, 6).bfloat16(), torch.rand(2, 1, 16, 24)
        )
    assert refined.dtype == torch.float32
    assert not torch.equal(refined, refined.bfloat16().float())
