import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.transformer import CrossAttentionLayer, TransformerDecoder, TransformerEncoder, sinusoids

WIDTH = 16


def test_encoder_layers_start_from_different_values():
    first, second = TransformerEncoder(num_layers=2, d_model=WIDTH, nhead=2, d_inner=24).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_decoder_layer_equals_torchs_without_self_attention():
    ours = CrossAttentionLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
    theirs = nn.TransformerDecoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"self_attn", "norm1"}
    nn.init.zeros_(theirs.self_attn.out_proj.weight)  # its self-attention adds 0
    theirs.norm1 = nn.Identity()
    query, memory = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH)
    masks = {"memory_mask": torch.eye(5, 7, dtype=torch.bool), "memory_key_padding_mask": torch.arange(7) > 4}
    masks["memory_key_padding_mask"] = masks["memory_key_padding_mask"].expand(3, -1)
    torch.testing.assert_close(ours(query, memory, **masks), theirs(query, memory, **masks))


@pytest.mark.parametrize("use_self_attn", [False, True])
def test_parameters_keep_the_order_of_earlier_optimiser_states(use_self_attn):
    decoder = TransformerDecoder(num_layers=1, d_model=WIDTH, nhead=2, d_inner=24, use_self_attn=use_self_attn)
    encoder = TransformerEncoder(num_layers=1, d_model=WIDTH, nhead=2, d_inner=24)
    own = ["self_attn", "norm1"] if use_self_attn else []
    for module, expected in (
        (decoder, ["linear1", "linear2", *own, "multihead_attn", "norm2", "norm3"]),
        (encoder, ["linear1", "linear2", "self_attn", "norm1", "norm2"]),
    ):
        assert list(dict.fromkeys(name.split(".")[0] for name in module.layers[0].state_dict())) == expected


def test_train_and_eval_agree_without_dropout():
    """torch's fused kernel of eval mode, which rounds otherwise and knows nothing of autocast, stays off."""
    encoder = TransformerEncoder(num_layers=2, d_model=WIDTH, nhead=2, d_inner=24, dropout=0.0)
    sequence = torch.randn(2, 5, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
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


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_no_layer_multiplies_by_copies_of_its_weights(part):
    """Transposed sequences would turn each linear layer into a batched multiplication in inference."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append(function.name())
            return function(*arguments, **(keywords or {}))

    called = []
    sizes = {"num_layers": 1, "d_model": 16, "nhead": 2, "d_inner": 32}
    sequence = torch.randn(3, 5, 16)
    with torch.no_grad():
        if part == "encoder":
            network, inputs = TransformerEncoder(**sizes).eval(), (sequence,)
        else:
            network, inputs = TransformerDecoder(**sizes).eval(), (sequence, torch.randn(3, 7, 16))
        with Operations():
            assert network(*inputs).shape == sequence.shape
    assert "aten::addmm" in called
    assert "aten::bmm" not in called
