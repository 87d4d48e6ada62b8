import pytest
import torch
from torch import nn

from modules.transformer import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
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
