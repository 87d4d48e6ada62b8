import pytest
import torch
from torch import nn

from modules.dropout import Dropout, dropout, relu_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_the_share_is_dropped_and_the_mean_kept(dtype, p):
    torch.manual_seed(0)
    values = dropout(torch.ones(400, 1001, dtype=dtype), p)
    assert values.dtype == dtype
    assert float((values == 0).double().mean()) == pytest.approx(p, abs=0.003)
    assert values.unique().double().tolist() == pytest.approx([0, 1 / (1 - p)], rel=0.01)
    # Neighbours are drawn independently: four numbers share one draw of 64 bits.
    dropped = (values == 0).double().flatten() - p
    for distance in (1, 2, 3, 4):
        assert float((dropped[distance:] * dropped[:-distance]).mean()) == pytest.approx(0, abs=0.003)


def test_the_gradient_is_that_of_the_kept_numbers():
    values = torch.randn(64, 65, requires_grad=True)
    result = dropout(values, 0.3)
    result.sum().backward()
    torch.testing.assert_close(values.grad * values.detach(), result.detach())
    assert set((values.grad == 0).flatten().tolist()) == {False, True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_and_dropout_in_one_are_both_in_turn(dtype):
    values = torch.randn(64, 65).to(dtype).requires_grad_()
    results, gradients = [], []
    for function in (relu_dropout, lambda values, p: dropout(values.relu(), p)):
        torch.manual_seed(5)
        results.append(function(values, 0.3))
        gradients += torch.autograd.grad(results[-1].square().sum(), values)
    assert torch.equal(*results)
    assert torch.equal(*gradients)
    assert torch.equal(relu_dropout(values, 0.0), values.relu())


def test_the_generator_of_torch_decides():
    torch.manual_seed(3)
    first, second = dropout(torch.ones(1000), 0.5), dropout(torch.ones(1000), 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(1000), 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (5, 7)])
def test_any_shape(shape):
    assert dropout(torch.ones(shape), 0.5).shape == shape


def test_the_module_acts_in_training_only():
    layer, values = Dropout(0.5), torch.ones(100)
    assert isinstance(layer, nn.Dropout)
    assert layer.eval()(values) is values
    assert (layer.train()(values) == 0).any()
    assert Dropout(0.0).train()(values) is values
