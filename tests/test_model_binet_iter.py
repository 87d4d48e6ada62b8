import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modules.model_binet_iter import LanguageRecogniser, VisionRecogniser
from modules.outputs import RecogniserOutput
from tests.reference import (
    expected_arrays,
    expected_losses,
    expected_tensors,
    fill_known_weights,
    known_inputs,
    published_recogniser,
    relative_error,
    small_language,
    small_recogniser,
    small_vision,
    tensor_shapes,
)

KINDS = [{"masked": True}, {"masked": True, "attention": "position"}, {"masked": False, "attention": "position"}]


def tensors(output: RecogniserOutput) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if leaf is not None]


@pytest.mark.parametrize("name", ["binet", "binet_position", "abinet"])
def test_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        model = published_recogniser(name)
    assert tensor_shapes(model) == expected_tensors(name)


@pytest.mark.parametrize("name", ["binet", "abinet"])
def test_outputs_equal_the_published_ones(name):
    model = fill_known_weights(published_recogniser(name)).eval()
    image, mask, *_ = known_inputs(7, 1)
    with torch.no_grad():
        output = model(image, mask if name == "binet" else None)
    ours = {
        "vision_logits": output.vision.logits,
        "vision_feature": output.vision.feature,
        "attn_scores": output.vision.attention,
        "refined_mask": output.vision.refined_mask,
        "language_logits": output.language[-1].logits,
        "alignment_logits": output.alignment[-1].logits,
    }
    theirs = expected_arrays(f"{name}_eval_n1")
    for key in ours.keys() & theirs.keys():
        assert relative_error(ours[key], theirs[key]) < 1e-4, key
        assert torch.equal(ours[key].argmax(dim=-1), theirs[key].argmax(dim=-1)), key


def test_training_predictions_give_the_published_losses():
    model = fill_known_weights(published_recogniser("binet", dropout=0.0)).train()
    image, mask, labels, lengths = known_inputs(13, 1)
    with torch.no_grad():
        output = model(image, mask)
    length = lengths[0]
    for name, rounds in (("vision", [output.vision]), ("language", output.language), ("alignment", output.alignment)):
        terms = [F.cross_entropy(one.logits[0, :length], labels[0, :length]) for one in rounds]
        assert torch.stack(terms).mean().item() == pytest.approx(expected_losses()[f"{name}_loss"], rel=1e-4)
    refined = output.vision.refined_mask
    text = refined > 0.7
    refinement = (refined[text] - 1).abs().mean() + refined[~text].abs().mean()
    assert refinement.item() == pytest.approx(expected_losses()["refine_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_reads_as_single_images_do(kind):
    model = small_recogniser(**kind).eval()
    image, mask, *_ = known_inputs(5, 3)
    with torch.no_grad():
        together = model(image, mask).alignment[-1].logits
        alone = [model(image[i : i + 1], mask[i : i + 1]).alignment[-1].logits for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("iter_size", [1, 2, 3, 4])
def test_rounds_train_every_parameter(iter_size):
    model = small_recogniser(iter_size=iter_size)
    image, mask, *_ = known_inputs(5, 2)
    output = model(image, mask)
    assert len(output.language) == len(output.alignment) == iter_size
    predictions = [output.vision, *output.language, *output.alignment]
    sum(prediction.logits.square().mean() for prediction in predictions).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_round_corrects_the_round_before():
    three, one = small_recogniser(iter_size=3).eval(), small_recogniser(iter_size=1).eval()
    one.load_state_dict(three.state_dict())
    image, mask, *_ = known_inputs(5, 2)
    with torch.no_grad():
        assert torch.equal(three(image, mask).alignment[0].logits, one(image, mask).alignment[0].logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_equals_eager_without_a_graph_break(kind, backend):
    torch._dynamo.reset()
    model = small_recogniser(**kind, iter_size=2).eval()
    image, mask, *_ = known_inputs(5, 2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(image, mask)
        for ours, expected in zip(tensors(compiled), tensors(model(image, mask)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_under_autocast_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = small_recogniser(iter_size=2)
    image, mask, *_ = known_inputs(5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(image, mask)
    sum(tensor.float().mean() for tensor in tensors(output)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_export_takes_any_number_of_images(kind):
    model = small_recogniser(**kind, iter_size=2).eval()
    image, mask, *_ = known_inputs(5, 3)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (image[:2], mask[:2]), dynamic_shapes=(batch, batch)).module()
    for count in (1, 3):
        for ours, expected in zip(
            tensors(program(image[:count], mask[:count])), tensors(model(image[:count], mask[:count])), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class MatrixProducts(TorchDispatchMode):
    """Records the inner sizes of the batched matrix multiplications inside its context."""

    def __init__(self):
        super().__init__()
        self.inner_sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.inner_sizes.append(args[-2].shape[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_batched_matrix_multiplication_of_inner_size_1_in_the_backward_pass(kind):
    """With torch 2.14 they are Triton kernels on a GPU, which need a C compiler."""
    model = small_recogniser(**kind, iter_size=2)
    image, mask, *_ = known_inputs(5, 3)
    output = model(image, mask)
    loss = sum(tensor.square().mean() for tensor in tensors(output))
    with MatrixProducts() as products:
        loss.backward()
    assert products.inner_sizes
    assert 1 not in products.inner_sizes


def test_sub_models_alone_keep_their_names_and_return_the_output_of_a_recogniser():
    image, mask, *_ = known_inputs(5, 2)
    vision, language = small_vision().eval(), small_language().eval()
    alone = VisionRecogniser(vision)
    assert list(alone.state_dict()) == list(vision.state_dict())
    output = alone(image, mask)
    assert torch.equal(output.vision.logits, vision(image, mask).logits)
    assert output.language is output.alignment is None
    other = VisionRecogniser(small_vision())
    other.load_state_dict(vision.state_dict(), strict=True)
    assert torch.equal(other.eval()(image, mask).vision.logits, output.vision.logits)

    alone = LanguageRecogniser(language)
    assert list(alone.state_dict()) == list(language.state_dict())
    output = alone(output.vision.logits.softmax(dim=-1), torch.tensor([3, 5]))
    assert len(output.language) == 1
    assert output.vision is output.alignment is None
