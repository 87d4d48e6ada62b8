import pytest
import torch

from tests.reference import known_inputs, small_vision

KINDS = [{"masked": True}, {"masked": True, "attention": "position"}, {"masked": False, "attention": "position"}]


def images(count: int, size: tuple[int, int] = (32, 128)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, 3, *size, generator=generator)
    return image, torch.rand(count, 1, *size, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_reads_as_single_images_do(kind):
    model = small_vision(**kind).eval()
    image, mask, *_ = known_inputs(5, 4)
    mask[1] = 0
    mask[2] = 1
    with torch.no_grad():
        together = model(image, mask)
        alone = [model(image[i : i + 1], mask[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), rtol=0, atol=1e-5)
    if kind["masked"]:
        torch.testing.assert_close(
            together.refined_mask, torch.cat([one.refined_mask for one in alone]), rtol=0, atol=1e-5
        )


def test_batch_normalisation_of_masks_depends_on_the_batch():
    models = [small_vision(normalize=normalize).eval() for normalize in ("sample", "batch")]
    models[1].load_state_dict(models[0].state_dict())
    image, mask = images(2)
    with torch.no_grad():
        one = [model(image[:1], mask[:1]).refined_mask for model in models]
        two = [model(image, mask).refined_mask for model in models]
    assert torch.equal(*one)
    assert not torch.allclose(*two)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = small_vision(**kind)
    model(*images(2)).logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("normalize", ["sample", "batch"])
@pytest.mark.parametrize("shade", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_plain_masks_and_images_give_finite_outputs_and_gradients(normalize, shade, training):
    model = small_vision(normalize=normalize).train(training)
    mask = torch.full((2, 1, 32, 128), shade, requires_grad=True)
    vision = model(torch.zeros(2, 3, 32, 128), mask)
    (vision.logits.square().mean() + vision.refined_mask.abs().mean()).backward()
    assert vision.logits.isfinite().all()
    assert vision.refined_mask.isfinite().all()
    assert mask.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_other_image_sizes(kind):
    model = small_vision(**kind, image_size=(48, 20)).eval()
    vision = model(*images(2, (48, 20)))
    assert vision.attention.shape == (2, 26, 12, 5)
    with pytest.raises(ValueError, match="32 x 128 pixels but the network is built for 48 x 20"):
        model(*images(2))


def test_odd_sizes_work_without_a_mask():
    vision = small_vision(masked=False, image_size=(31, 101))(*images(2, (31, 101)))
    assert vision.attention.shape[-2:] == (8, 26)


def test_mask_is_needed_and_must_fit():
    image, mask = images(2)
    with pytest.raises(ValueError, match="needs a text mask"):
        small_vision()(image)
    with pytest.raises(ValueError, match="mask is 16 x 128"):
        small_vision()(image, mask[:, :, :16])


def test_inputs_are_not_edited():
    image, mask = images(2)
    before = image.clone(), mask.clone()
    small_vision()(image, mask)
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ValueError, match="normalize='image'"):
        small_vision(normalize="image")


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_finite_outputs(kind):
    model = small_vision(**kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(*images(2)).logits
    logits.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_refined_mask_starts_as_the_mask():
    model = small_vision(masked=True).eval()
    image = images(2)[0]
    mask = torch.zeros(2, 1, 32, 128)
    mask[..., 8:24, 20:90] = 1
    with torch.no_grad():
        refined = model(image, mask).refined_mask
    assert (refined[mask == 1] > 0.7).all()  # the loss keeps these at 1 ...
    assert (refined[mask == 0] < 0.7).all()  # ... and these at 0
