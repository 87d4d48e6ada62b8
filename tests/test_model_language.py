import pytest
import torch

from tests.reference import NUM_CLASSES, NUM_STEPS, small_language


def texts(count: int) -> torch.Tensor:
    return torch.randn(count, NUM_STEPS, NUM_CLASSES, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)


def test_no_step_sees_its_own_character():
    model = small_language(detach=False).eval()
    probabilities = texts(1).requires_grad_()
    logits = model(probabilities, torch.tensor([9])).logits
    for step in range(NUM_STEPS):
        (gradient,) = torch.autograd.grad(logits[0, step].sum(), probabilities, retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1) > 0
        assert seen.tolist() == [other < 9 and other != step for other in range(NUM_STEPS)]


@pytest.mark.parametrize("use_self_attn", [False, True])
def test_a_batch_reads_as_single_texts_do(use_self_attn):
    model = small_language(use_self_attn=use_self_attn).eval()
    probabilities, lengths = texts(4), torch.tensor([2, 5, 26, 13])
    with torch.no_grad():
        together = model(probabilities, lengths).logits
        alone = [model(probabilities[i : i + 1], lengths[i : i + 1]).logits for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_self_attn", [False, True])
def test_lengths_are_clamped_without_editing_them(use_self_attn):
    model = small_language(use_self_attn=use_self_attn).eval()
    lengths = torch.tensor([0, 1, 40])
    logits = model(texts(3), lengths).logits
    assert lengths.tolist() == [0, 1, 40]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, model(texts(3), torch.tensor([2, 2, NUM_STEPS])).logits)


def test_shortest_texts_have_finite_gradients():
    model = small_language(dropout=0.1)
    model(texts(3), torch.tensor([1, 2, 1])).logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("detach", [True, False])
def test_detach_stops_gradients_into_the_text(detach):
    probabilities = texts(1).requires_grad_()
    small_language(detach=detach)(probabilities, torch.tensor([5])).logits.sum().backward()
    assert (probabilities.grad is None) == detach


@pytest.mark.parametrize("use_self_attn", [False, True])
def test_every_parameter_gets_a_gradient(use_self_attn):
    model = small_language(use_self_attn=use_self_attn)
    model(texts(2), torch.tensor([5, 9])).logits.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
