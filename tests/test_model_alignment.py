import pytest
import torch

from modules.model_alignment import AlignmentModel


@pytest.mark.parametrize(("bias", "chosen"), [(50.0, "vision"), (-50.0, "language")])
def test_an_open_gate_takes_vision(bias, chosen):
    model = AlignmentModel(num_classes=5, d_model=8)
    torch.nn.init.zeros_(model.w_att.weight)
    torch.nn.init.constant_(model.w_att.bias, bias)
    features = {"language": torch.randn(2, 3, 8), "vision": torch.randn(2, 3, 8)}
    output = model(**features)
    torch.testing.assert_close(output.feature, features[chosen])
    torch.testing.assert_close(output.logits, model.cls(features[chosen]))


def test_language_comes_first_in_the_gate():
    model = AlignmentModel(num_classes=5, d_model=8)
    torch.nn.init.zeros_(model.w_att.weight[:, 8:])
    language = torch.randn(1, 1, 8)
    gates = []
    for vision in (torch.zeros(1, 1, 8), torch.ones(1, 1, 8)):
        gates.append((model(language, vision).feature - language) / (vision - language))
    torch.testing.assert_close(*gates)
