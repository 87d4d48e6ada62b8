import torch
from torch.utils import _pytree

from modules.outputs import LanguageOutput, RecogniserOutput, VisionOutput, text_lengths


def logits_of(*predictions: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), 5).float()


def test_length_counts_the_first_null():
    logits = logits_of([3, 1, 0, 2], [0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 0])
    assert text_lengths(logits).tolist() == [3, 1, 4, 4]


def test_outputs_are_pytrees():
    output = RecogniserOutput(
        vision=VisionOutput(logits=torch.ones(1), feature=torch.ones(2), attention=torch.ones(3)),
        language=[LanguageOutput(logits=torch.ones(4), feature=torch.ones(5))],
    )
    doubled = _pytree.tree_map_only(torch.Tensor, lambda tensor: 2 * tensor, output)
    assert isinstance(doubled, RecogniserOutput)
    assert doubled.language[0].feature.eq(2).all()
    assert doubled.vision.refined_mask is None
    assert doubled.alignment is None
