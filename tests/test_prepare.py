import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from inference.prepare import float32_names, prepare_for_inference
from modules.outputs import RecogniserOutput
from tests.reference import known_inputs, small_language, small_recogniser, small_vision
from tests.small_networks import make_ssn

SMALL_SSN = {
    "widths": (8, 16),
    "stem_width": 8,
    "num_modules": (1,),
    "num_blocks": 1,
    "bottlenecks": 1,
    "bottleneck_width": 4,
    "head_width": 8,
}
KINDS = [{"masked": True}, {"masked": True, "attention": "position"}, {"masked": False, "attention": "position"}]


def leaves(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if leaf is not None]


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms that do something: other than 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("options", KINDS)
def test_float32_form_gives_the_same(options):
    model = with_statistics(small_recogniser(**options)).eval()
    image, mask, *_ = known_inputs(5, 3)
    fast = prepare_for_inference(model, precision="fp32", compile=False)
    with torch.no_grad():
        expected = model(image, mask)
    output = fast(image, mask)
    assert isinstance(output, RecogniserOutput)
    for ours, theirs in zip(leaves(output), leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inputs_may_be_named(compiled):
    fast = prepare_for_inference(with_statistics(small_recogniser()), precision="fp32", compile=compiled)
    image, mask, *_ = known_inputs(5, 3)
    expected = leaves(fast(image, mask))
    for output in (fast(image=image, mask=mask), fast(mask=mask, image=image), fast(image, mask=mask)):
        for ours, theirs in zip(leaves(output), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(TypeError, match="image"):
        fast(mask=mask)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_form_is_near_in_float32_outputs(options, precision):
    model = with_statistics(small_recogniser(**options)).eval()
    image, mask, *_ = known_inputs(5, 3)
    output = prepare_for_inference(model, precision=precision, compile=False)(image, mask)
    with torch.no_grad():
        expected = model(image, mask)
    for ours, theirs in zip(leaves(output), leaves(expected), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_nothing_of_the_network_changes():
    model = with_statistics(small_recogniser()).train()
    before = copy.deepcopy(model.state_dict())
    fast = prepare_for_inference(model, compile=False)
    image, mask, *_ = known_inputs(5, 2)
    fast(image, mask)
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert storages.isdisjoint(parameter.data_ptr() for parameter in fast.parameters())


def test_outputs_carry_no_gradient_and_no_batch_norm_is_left():
    fast = prepare_for_inference(with_statistics(small_recogniser()), compile=False)
    image, mask, *_ = known_inputs(5, 2)
    assert not any(leaf.requires_grad for leaf in leaves(fast(image.requires_grad_(), mask)))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not fast.training


def test_a_word_reads_the_same_alone_as_in_a_batch():
    fast = prepare_for_inference(with_statistics(small_recogniser()), precision="fp32", compile=False)
    image, mask, *_ = known_inputs(5, 3)
    together = leaves(fast(image, mask))
    alone = leaves(fast(image[1:2], mask[1:2]))
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours, theirs[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_in_parts_reads_as_in_one(masked, monkeypatch):
    fast = prepare_for_inference(with_statistics(small_recogniser(masked=masked)), precision="fp32", compile=False)
    image, mask, *_ = known_inputs(5, 7)
    inputs = (image, mask) if masked else (image, None)
    together = fast(*inputs)
    calls = []
    fast.network.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    monkeypatch.setattr("inference.prepare.CPU_BATCH", 3)
    in_parts = fast(*inputs)
    assert sorted(calls) == [2, 2, 3]
    assert type(in_parts) is type(together)
    for ours, theirs in zip(leaves(in_parts), leaves(together), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_masks_that_are_normalised_over_the_batch_keep_it_whole():
    model = with_statistics(small_recogniser(normalize="batch")).eval()
    image, mask, *_ = known_inputs(5, 96)
    mask = mask * torch.linspace(0.1, 1, 96)[:, None, None, None]  # so that parts have other extremes than the batch
    with torch.no_grad():
        expected = model(image, mask).vision.refined_mask
    fast = prepare_for_inference(model, precision="fp32", compile=False)
    torch.testing.assert_close(fast(image, mask).vision.refined_mask, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_work_alone(precision):
    image, mask, *_ = known_inputs(5, 2)
    vision = prepare_for_inference(with_statistics(small_vision()), precision=precision, compile=False)
    assert vision(image, mask).logits.shape == (2, 26, 37)
    language = prepare_for_inference(small_language(), precision=precision, compile=False)
    output = language(vision(image, mask).logits.softmax(-1), torch.tensor([4, 9]))
    assert output.logits.dtype == torch.float32


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_segmentation_network_makes_the_same_masks(precision, tolerance):
    ssn = with_statistics(make_ssn(**SMALL_SSN)).eval()
    fast = prepare_for_inference(ssn, precision=precision, compile=False)
    image = torch.randn(2, 3, 33, 65)
    with torch.no_grad():
        expected, mask = ssn(image), ssn.text_probability(image, areas=[65])
    output = fast(image)
    assert output.refined_logits.dtype == torch.float32
    torch.testing.assert_close(output.refined_logits, expected.refined_logits, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(fast.text_probability(image, areas=[65]), mask, rtol=0, atol=tolerance)


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="int3"):
        prepare_for_inference(small_recogniser(), precision="int3")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_form_reads_batches_of_any_size(precision):
    model = with_statistics(small_recogniser()).eval()
    image, mask, *_ = known_inputs(5, 4)
    eager = prepare_for_inference(model, precision=precision, compile=False)
    compiled = prepare_for_inference(model, precision=precision)
    tolerance = 1e-4 if precision == "fp32" else 0.02
    for size in (4, 3, 1):
        for ours, theirs in zip(
            leaves(compiled(image[:size], mask[:size])), leaves(eager(image[:size], mask[:size])), strict=True
        ):
            assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.slow
def test_compiled_networks_of_one_class_stay_apart():
    models = [small_language().eval() for _ in range(2)]
    compiled = [prepare_for_inference(model, precision="fp32") for model in models]
    arguments = torch.rand(3, 26, 37).softmax(-1), torch.tensor([4, 9, 26])
    for _ in range(2):
        for model, fast in zip(models, compiled, strict=True):
            with torch.no_grad():
                expected = model(*arguments).logits
            torch.testing.assert_close(fast(*arguments).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_what_stays_in_float32(kind):
    names = float32_names(small_recogniser(**kind))
    layers = {name.rpartition(".")[0].removeprefix("vision.") for name in names}
    expected = {"backbone.resnet.conv1", "cls", "language.cls", "language.proj", "alignment.cls"}
    expected |= {"backbone.transformer.layers.0.norm2", "language.model.layers.1.norm3", "language.token_encoder"}
    expected |= {"rf", "rf2"} if kind["masked"] else {"backbone.pos_encoder"}
    expected |= {"attention.project"} if kind.get("attention") == "position" else {"attention.we"}
    assert expected <= layers
    assert not layers & {"backbone.resnet.cls.0", "classifier_6.0", "conv0", "backbone.transformer.layers.0.linear1"}
