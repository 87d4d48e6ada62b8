import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modules.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    attend,
    sinusoids,
)

WIDTH = 16


def test_attention_equals_torch():
    ours = MultiheadAttention(d_model=WIDTH, nhead=4, dropout=0.0)
    theirs = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, memory = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)
    allowed = torch.rand(5, 7) > 0.3
    allowed[:, 0] = True
    expected, _ = theirs(query, memory, memory, attn_mask=~allowed)
    torch.testing.assert_close(ours(query, memory, allowed), expected)
    expected, _ = theirs(query, query, query)
    torch.testing.assert_close(ours(query, query), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_16_bit_training_equals_the_fused_kernel(masked):
    q, k, v = (torch.randn(2, 4, length, 8) for length in (5, 7, 7))
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 7) > 0.3
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    lowered = attend(*(each.bfloat16().requires_grad_() for each in (q, k, v)), mask)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), expected, rtol=0.03, atol=0.03)


def test_attention_drops_cells_only_where_asked():
    q, k, v = (torch.randn(2, 4, length, 8) for length in (5, 7, 7))
    torch.testing.assert_close(attend(q, k, v, p=0.0), F.scaled_dot_product_attention(q, k, v))
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, p=0.2) for _ in range(2000)]).mean(dim=0)
    assert not torch.equal(attend(q, k, v, p=0.2), attend(q, k, v, p=0.2))
    torch.testing.assert_close(mean, attend(q, k, v), rtol=0, atol=0.08)


def test_a_shared_query_equals_a_repeated_one():
    attention = MultiheadAttention(d_model=WIDTH, nhead=4, dropout=0.0)
    query, memory = torch.randn(1, 5, WIDTH), torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(attention(query, memory), attention(query.repeat(3, 1, 1), memory))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_equals_torch(activation):
    ours = TransformerEncoderLayer(d_model=WIDTH, nhead=4, d_inner=24, dropout=0.0, activation=activation)
    theirs = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, activation=activation, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    sequence = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(ours(sequence), theirs(sequence))


def test_decoder_layer_equals_torch():
    ours = TransformerDecoderLayer(d_model=WIDTH, nhead=4, d_inner=24, dropout=0.0, use_self_attn=True)
    theirs = nn.TransformerDecoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, memory = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)
    torch.testing.assert_close(ours(query, memory), theirs(query, memory))


def test_train_and_eval_agree_without_dropout():
    encoder = TransformerEncoder(num_layers=2, d_model=WIDTH, nhead=2, d_inner=24, dropout=0.0)
    sequence = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(encoder.train()(sequence), encoder.eval()(sequence))


def test_dropout_acts_in_training_only():
    encoder = TransformerEncoder(num_layers=1, d_model=WIDTH, nhead=2, d_inner=24, dropout=0.5)
    sequence = torch.randn(2, 5, WIDTH)
    assert not torch.equal(encoder(sequence), encoder(sequence))
    encoder.eval()
    assert torch.equal(encoder(sequence), encoder(sequence))


def test_sinusoids():
    positions = sinusoids(3, 4)
    expected = (
        torch.tensor([2.0]).sin(),
        torch.tensor([2.0]).cos(),
        torch.tensor([0.02]).sin(),
        torch.tensor([0.02]).cos(),
    )
    torch.testing.assert_close(positions[2], torch.cat(expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sinusoids(3, 5), "d_model=5"),
        (lambda: MultiheadAttention(d_model=10, nhead=4), "nhead=4"),
        (lambda: TransformerEncoderLayer(d_model=8, nhead=2, activation="swish"), "relu, gelu"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
