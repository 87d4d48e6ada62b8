"""SSN: parity with the published network, independence of batch mates, and the procedure over several sizes."""

import csv
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules.ssn import PUBLISHED_AREAS, SSN, SegmentationOutput, network_size
from tests.small_networks import make_ssn

DATA = Path(__file__).parent / "data"
SMALL = {
    "widths": (4, 8, 12, 16),
    "stem_width": 8,
    "num_modules": (1, 1, 1),
    "num_blocks": 1,
    "bottlenecks": 1,
    "bottleneck_width": 4,
    "head_width": 8,
}
# The stored outputs were made with these tensors scaled, so that no softmax saturates.
SCALES = {"hrnet.last_layer.1.weight": 0.02, "hrnet.last_layer.1.bias": 0.02, "semrfnhead.conv_ref_last.weight": 0.5}


def known_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the value of the tensor `name` in the network of the stored outputs."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    value = torch.from_numpy(np.asarray(np.random.RandomState(seed).standard_normal(shape), dtype=np.float32))
    if name.endswith("running_var"):
        return value.abs() * 0.1 + 1
    if name.endswith("running_mean"):
        return value * 0.1
    if len(shape) == 1:
        return value * 0.1 + 1 if name.endswith("weight") else value * 0.05
    return value / math.sqrt(math.prod(shape[1:]))


def published_ssn() -> SSN:
    network = SSN().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(known_value(name, tuple(tensor.shape)) * SCALES.get(name, 1.0))
    return network


def small_ssn(seed: int = 0) -> SSN:
    torch.manual_seed(seed)
    return make_ssn(**SMALL)


def known_image(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def test_names_and_shapes_are_the_published_ones():
    with (DATA / "state_dict_ssn.tsv").open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["used"] == "yes"]
    expected = {
        row["name"]: () if row["shape"] == "scalar" else tuple(map(int, row["shape"].split("x"))) for row in rows
    }
    with torch.device("meta"):
        network = SSN()
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected


def test_outputs_are_the_published_ones():
    with torch.inference_mode():
        output = published_ssn()(known_image(7, 1, 3, 65, 193))
    ours = {
        "predsem": output.semantic_logits.softmax(dim=1),
        "predrfn": output.refined_logits.softmax(dim=1),
        "att": output.attention,
        "att_key": output.attention_key,
    }
    with np.load(DATA / "ssn_eval_n1.npz") as stored:
        for name, value in ours.items():
            expected = torch.from_numpy(stored[name])
            assert (value - expected).abs().max() < 1e-4 * expected.abs().max(), name
            assert torch.equal(value.argmax(dim=1), expected.argmax(dim=1)), name


def test_a_batch_equals_its_images_one_by_one():
    network = small_ssn().eval()
    images = torch.randn(3, 3, 65, 97)
    together = network(images)
    for i in range(len(images)):
        alone = network(images[i : i + 1])
        torch.testing.assert_close(together.refined_logits[i : i + 1], alone.refined_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.attention_key[i : i + 1], alone.attention_key, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_none_is_nan():
    network = small_ssn()
    output = network(torch.randn(2, 3, 65, 65))
    (output.semantic_logits.square().mean() + output.refined_logits.square().mean()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [
        ((32, 128), 385, (193, 769)),
        ((100, 100), 513, (513, 513)),
        ((1, 1000), 385, (1, 12161)),
        ((31, 88), 129, (65, 193)),
    ],
)
def test_size_at_which_an_image_enters(size, area, expected):
    assert network_size(size, area) == expected
    assert all(side % 32 == 1 for side in network_size(size, area))


def test_text_probability_is_the_mean_over_areas_of_the_resized_refined_class():
    network = small_ssn().eval()
    image, areas = torch.randn(2, 3, 20, 51), [65, 97]
    expected = torch.zeros(2, 20, 51)
    for area in areas:
        resized = F.interpolate(image, size=network_size((20, 51), area), mode="bilinear", align_corners=True)
        text = network(resized).refined_logits.softmax(dim=1)
        expected += F.interpolate(text, size=(20, 51), mode="bilinear", align_corners=True)[:, 1] / len(areas)
    probability = network.text_probability(image, areas=areas)
    assert probability.shape == (2, 20, 51)
    assert probability.min() >= 0
    assert probability.max() <= 1
    torch.testing.assert_close(probability, expected)


def test_text_probability_refuses_no_areas_and_knows_the_published_ones():
    with pytest.raises(ValueError, match="areas"):
        small_ssn().text_probability(torch.randn(1, 3, 32, 32), areas=[])
    assert PUBLISHED_AREAS == (385, 513, 641, 769, 897, 1025, 1153, 1281)


def test_a_uniform_image_gives_finite_outputs():
    assert small_ssn().eval().text_probability(torch.zeros(1, 3, 9, 9), areas=[33]).isfinite().all()


def test_a_class_without_cells_gives_finite_outputs():
    """The scores are so far apart that the weights of a class are 0 in float32."""
    network = make_ssn(**SMALL).eval()
    with torch.no_grad():
        network.semrfnhead.conv_sem.weight.copy_(torch.tensor([1e4, -1e4]).view(2, 1, 1, 1).expand(2, 40, 1, 1))
    image = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = network(image)
    assert (output.attention_key[:, 1] == 0).all()
    output.refined_logits.sum().backward()
    assert output.refined_logits.isfinite().all()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_close(dtype):
    network = small_ssn().eval()
    image = torch.randn(1, 3, 40, 90)
    full = network.text_probability(image, areas=[65])
    half = network.to(dtype).text_probability(image, areas=[65])
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.02


def test_output_is_a_pytree():
    output = small_ssn().eval()(torch.randn(1, 3, 33, 33))
    moved = torch.utils._pytree.tree_map(lambda tensor: tensor.double(), output)
    assert isinstance(moved, SegmentationOutput)
    assert moved.refined_logits.dtype == torch.float64


def test_training_learns_one_image():
    network = small_ssn()
    image = torch.randn(1, 3, 65, 65)
    label = (image[:, 0, ::4, ::4] > 0).long()  # what the cells' own pixels show
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(network(image).refined_logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
