"""Segmenter: the published procedure in batches, in every precision, and independence of batch mates."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inference import segmenter as segmentation
from inference.segmenter import Segmenter, fold_batch_norms
from modules.ssn import SSN
from tests.small_networks import make_ssn
from utils import UserError

SMALL = {
    "widths": (4, 8, 12, 16),
    "stem_width": 8,
    "num_modules": (1, 1, 1),
    "num_blocks": 1,
    "bottlenecks": 1,
    "bottleneck_width": 4,
    "head_width": 8,
}
ROOT = Path(__file__).resolve().parents[1]
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.fixture(scope="module")
def ssn() -> SSN:
    torch.manual_seed(0)
    network = make_ssn(**SMALL)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
    return network.eval()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = [(20, 60), (21, 62), (32, 100), (20, 60), (8, 5), (40, 41), (1, 1), (64, 193)]
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def published_way(ssn: SSN, image: np.ndarray, areas: list[int]) -> np.ndarray:
    tensor = (torch.from_numpy(image).permute(2, 0, 1) / 255 - MEAN) / STD
    with torch.no_grad():
        return ssn.text_probability(tensor[None], areas=areas)[0].numpy()


@pytest.mark.parametrize("batch_pixels", [1, 9000, None])
def test_masks_are_the_published_probabilities_in_8_bits(ssn, images, batch_pixels):
    segmenter = Segmenter(ssn, [65, 97], batch_pixels=batch_pixels)
    for image, mask in zip(images, segmenter(images), strict=True):
        assert mask.dtype == np.uint8
        assert mask.shape == image.shape[:2]
        assert np.abs(mask / 255.0 - published_way(ssn, image, [65, 97])).max() <= 1 / 510 + 2e-5


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2000, 1300)])
def test_images_of_any_size_get_the_published_mask(ssn, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = Segmenter(ssn, [65])([image])[0]
    assert mask.shape == size
    assert np.abs(mask / 255.0 - published_way(ssn, image, [65])).max() <= 1 / 510 + 1e-3


def test_large_images_are_taken_a_few_at_a_time(ssn, images, monkeypatch):
    monkeypatch.setattr(segmentation, "IMAGE_PIXELS", 2500)
    segmenter, sizes = Segmenter(ssn, [65]), []
    whole = segmenter._segment
    monkeypatch.setattr(
        segmenter, "_segment", lambda some: sizes.append([len(p) * len(p[0]) for p in some]) or whole(some)
    )
    masks = segmenter(images)
    assert [mask.shape for mask in masks] == [image.shape[:2] for image in images]
    assert len(sizes) > 2
    assert all(sum(each) <= 2500 or len(each) == 1 for each in sizes)


def test_algorithms_are_not_timed_for_each_size(ssn, images, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(
        SSN, "probability", lambda self, image: seen.append(torch.backends.cudnn.benchmark) or image[:, :1]
    )
    Segmenter(ssn, [33])(images[:2])
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.benchmark


def test_the_process_keeps_its_number_of_threads(ssn, images):
    """Several threads share one segmenter, which computes on several threads: none of them is left with one."""
    code = """
import sys, threading, torch
from tests.test_segmenter import SMALL, Segmenter, make_ssn, np
torch.set_num_threads(3)
segmenter = Segmenter(make_ssn(**SMALL).eval(), [65, 97])
images = [np.zeros((20, 50 + 9 * k, 3), np.uint8) for k in range(8)]
threads = []
def work():
    for _ in range(3):
        segmenter(images)
    threads.append(torch.get_num_threads())
started = [threading.Thread(target=work) for _ in range(6)]
for each in started: each.start()
for each in started: each.join()
later = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
later.start()
later.join()
print(threads + [torch.get_num_threads()])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == str([3] * 8), done.stderr


def test_masks_are_made_in_one_precision_on_every_machine(ssn, monkeypatch):
    monkeypatch.setattr(segmentation, "fastest_precision", lambda device: "bf16")
    assert Segmenter(ssn, [65]).precision == "fp32"
    assert Segmenter(ssn, [65], precision="auto").precision == "bf16"


def test_a_word_does_not_depend_on_its_batch(ssn, images):
    segmenter = Segmenter(ssn, [65])
    together = segmenter(images)
    for i, image in enumerate(images):
        alone = segmenter([image])[0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_words_of_one_network_size_share_a_forward_pass(ssn, images):
    segmenter = Segmenter(ssn, [65])
    batches = list(segmenter._batches([image.shape[:2] for image in images], 65))
    assert any({0, 1, 3} <= set(members) for _, members in batches)  # (20, 60), (21, 62), (20, 60)
    assert sorted(i for _, members in batches for i in members) == list(range(len(images)))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_other_precisions_stay_within_a_few_levels(ssn, images, precision):
    exact = Segmenter(ssn, [65])(images)
    for mask, expected in zip(Segmenter(ssn, [65], precision=precision)(images), exact, strict=True):
        assert np.abs(mask.astype(int) - expected).mean() < 3


def test_the_network_given_is_left_alone(ssn, images):
    before = {name: tensor.clone() for name, tensor in ssn.state_dict().items()}
    Segmenter(ssn, [65], precision="bf16")(images[:1])
    after = ssn.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_folding_removes_every_batch_norm_and_changes_nothing(ssn):
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = ssn(image).refined_logits
        folded = fold_batch_norms(make_ssn(**SMALL).eval().requires_grad_(False))
        assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
        copied = make_ssn(**SMALL).eval().requires_grad_(False)
        copied.load_state_dict(ssn.state_dict())
        torch.testing.assert_close(fold_batch_norms(copied)(image).refined_logits, expected, rtol=1e-4, atol=1e-5)


def test_no_images_give_no_masks(ssn):
    assert Segmenter(ssn, [65])([]) == []


def test_read_only_and_strided_images_are_taken(ssn, images):
    image = images[2].copy()
    image.setflags(write=False)
    flipped = image[:, ::-1]
    segmenter = Segmenter(ssn, [65])
    assert np.array_equal(segmenter([flipped])[0], segmenter([flipped.copy()])[0])


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
)
def test_what_is_no_image_is_named(ssn, image):
    with pytest.raises(ValueError, match="image 0"):
        Segmenter(ssn, [65])([image])


def test_overflow_is_an_error_and_no_mask(images):
    network = make_ssn(**SMALL)
    nn.init.constant_(network.semrfnhead.conv_ref_last.bias, float("nan"))
    with pytest.raises(UserError, match="fp32"):
        Segmenter(network, [65])(images[:1])


def test_can_be_sent_to_a_worker_process(ssn, images):
    segmenter = Segmenter(ssn, [65])
    assert np.array_equal(pickle.loads(pickle.dumps(segmenter))(images[:1])[0], segmenter(images[:1])[0])


def test_wrong_settings_are_named(ssn):
    with pytest.raises(ValueError, match="areas"):
        Segmenter(ssn, [])
    with pytest.raises(ValueError, match="precision"):
        Segmenter(ssn, [65], precision="int8")
