"""What can be known of the GPU path without a GPU: everything but the kernels runs, on fake CUDA tensors.

They have a shape, a type and a device, and no numbers: an operation that needs a number on the host, as `.item()` and
a selection by a mask do, raises, and so does one that mixes devices. Copies between host and device that block are
refused here as well. torch's own backward pass does not run on them, so gradients are filled in.
"""

import contextlib
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from builders import build_charset, build_criterion, build_model, build_optimizer
from config import Config, load_config
from engine import distributed
from engine.distributed import Process
from engine.trainer import Trainer
from evaluation.evaluator import WordEvaluator
from inference.prediction import VARIANTS
from inference.prepare import prepare_for_inference
from inference.segmenter import Segmenter
from loading import batches
from loading.batches import Batch, LanguageBatch, SegmentationBatch
from loading.charset import PROTOCOLS, Charset
from reader import Reader
from run_builders import build_training_data
from tests import small_networks

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
FULL_SIZE = (
    "pretrain_vision_model",
    "pretrain_vision_model_abinet",
    "pretrain_language_model",
    "train",
    "train_abinet",
    "train_ssn",
)
WORDS = 4
PIXELS = (3, 65, 129)  # of SSN's images; its crops have 513 x 513
aten = torch.ops.aten


class NoBlockingCopy(TorchDispatchMode):
    """Refuses copies between host and device that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr):
            return None  # torch lacks the fake form of this kernel, and would run the real one
        result = function(*args, **kwargs)
        if function is aten._to_copy.default:
            self._check(args[0], result, kwargs.get("non_blocking"))
        elif function is aten.copy_.default:
            self._check(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return result

    @staticmethod
    def _check(source, target, non_blocking):
        if source.device.type != target.device.type and not non_blocking:
            raise AssertionError(f"a copy of {tuple(source.shape)} from {source.device} to {target.device} waits")


def copy_fake(tensor: FakeTensor, memo: dict) -> FakeTensor:
    """A fake tensor's deep copy: torch's own reads from memory that there is none of."""
    copied = torch.empty_like(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


@contextlib.contextmanager
def fake_cuda(*, made_before: bool = False):
    """Tensors are fake, and torch believes in a GPU as far as the step and the reader ask it.

    Args:
        made_before: tensors that were made before, and are real, may be used, too.
    """
    batches._scale_and_offset.cache_clear()
    try:
        with (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
            mock.patch("torch.cuda.is_bf16_supported", return_value=True),
            mock.patch("torch.random.fork_rng", return_value=contextlib.nullcontext()),
            mock.patch.object(FakeTensor, "__deepcopy__", copy_fake, create=True),
            FakeTensorMode(allow_non_fake_inputs=made_before),
        ):
            yield
    finally:
        batches._scale_and_offset.cache_clear()


def load(name: str, *overrides: str) -> Config:
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    for part in (config.model, config.model.vision, config.model.language, config.model.ssn):
        part.checkpoint = None
    config.dataset.charset_path = str(ROOT / config.dataset.charset_path)
    return config


def make_batch(config: Config):
    """As the loader gives it: on the host."""
    steps, classes = config.dataset.max_length + 1, build_charset(config).num_classes
    indices = torch.arange(WORDS)
    labels, lengths = torch.ones(WORDS, steps, dtype=torch.int64), torch.ones(WORDS, dtype=torch.int64)
    if config.model.kind == "ssn":
        images = torch.zeros(WORDS, *PIXELS, dtype=torch.uint8)
        return SegmentationBatch(images=images, labels=images[:, 0], indices=indices)
    common = {"labels": labels, "lengths": lengths, "texts": ["x"] * WORDS, "indices": indices}
    if config.model.kind == "language":
        probabilities = torch.zeros(WORDS, steps, classes)
        return LanguageBatch(probabilities=probabilities, input_lengths=lengths, **common)
    size = (config.dataset.image_height, config.dataset.image_width)
    masks = torch.zeros(WORDS, 1, *size, dtype=torch.uint8) if config.model.takes_masks else None
    return Batch(images=torch.zeros(WORDS, 3, *size, dtype=torch.uint8), masks=masks, **common)


def make_trainer(config: Config, criterion: nn.Module | None = None) -> Trainer:
    with CUDA:
        model = build_model(config)
    return Trainer(
        model=model,
        criterion=criterion or build_criterion(config),
        optimizer=build_optimizer(config, model),
        learning_rate_factor=lambda iteration: 1.0,
        data=None,
        batches_per_epoch=10,
        iterations=10,
        device=CUDA,
        process=Process(),
        precision=config.training.precision,
        accumulation=2,
        ema_decay=0.999,
    )


def train_one_step(config: Config, criterion: nn.Module | None = None):
    """Forward and loss of two parts, update, EMA."""
    trainer = make_trainer(config, criterion)

    def fill_in_gradients(loss: torch.Tensor) -> None:
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        assert loss.requires_grad
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    batches._scale_and_offset(CUDA)  # once in a run
    with mock.patch("torch.Tensor.backward", fill_in_gradients), NoBlockingCopy():
        return trainer, trainer.train_step(make_batch(config))


# --- training ---------------------------------------------------------------------------------------------------------


EACH_PRECISION = [
    pytest.param(name, precision, marks=[] if name == "train" or precision == "bf16" else pytest.mark.slow)
    for name in FULL_SIZE
    for precision in ("fp32", "bf16", "fp16")
]


@pytest.mark.parametrize(("name", "precision"), EACH_PRECISION)
def test_a_training_step_never_waits_for_the_gpu(name, precision):
    with fake_cuda():
        trainer, step = train_one_step(load(name, f"training.precision={precision}"))
        tensors = [*step.terms.values(), step.gradient_norm, step.finite]
        tensors += [*trainer.ema.module.parameters(), *trainer.ema.module.buffers()]
        state = [each for state in trainer.optimizer.state.values() for each in state.values()]
        assert state
        assert {each.device.type for each in tensors + state} == {"cuda"}
        assert len(step.terms) > 1


class Injected(nn.Module):
    """A criterion with something in it that a step must not do."""

    def __init__(self, criterion, fault):
        super().__init__()
        self.criterion, self.fault = criterion, fault
        self.counts_outputs, self.counts = criterion.counts_outputs, criterion.counts

    def forward(self, output, *targets, **options):
        terms = self.criterion(output, *targets, **options)
        self.fault(terms["total"], output)
        return terms


FAULTS = {
    "item": (lambda total, output: total.item(), DataDependentOutputException),
    "truth": (lambda total, output: total > 0 and None, DataDependentOutputException),
    "boolean mask": (
        lambda total, output: output.language[-1].logits[output.language[-1].logits > 0],
        DynamicOutputShapeException,
    ),
    "tensor of the CPU": (lambda total, output: output.language[-1].logits + torch.ones(3, 1, 1), Exception),
    "copy to the GPU": (lambda total, output: torch.zeros(3).to(total.device), AssertionError),
    "copy from the GPU": (lambda total, output: output.language[-1].logits.cpu(), AssertionError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_operations_that_wait_for_the_gpu_are_detected(fault):
    cause, error = FAULTS[fault]
    config = small_networks.small_config("language")
    if fault == "tensor of the CPU":
        error = RuntimeError
    with fake_cuda():
        train_one_step(config)
        with pytest.raises(error):
            train_one_step(config, Injected(build_criterion(config), cause))


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_batch_norm_over_processes_does_not_wait(kind):
    """torch's own selects the processes that have samples by a mask: the host waits three times a layer."""
    with fake_cuda(), fake_group(2), CUDA:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        if kind == "ours":
            network = distributed.synchronized(network, True)
            values = torch.zeros(2, 3, 8, 8)
            with NoBlockingCopy(), torch.autocast("cuda", torch.bfloat16):
                output = network(values)
                assert output.shape == (2, 8, 6, 6)
                distributed._Sum.backward(None, torch.zeros(2, 17))
            assert output.dtype == torch.bfloat16
        else:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            statistics = mock.patch("torch.batch_norm_stats", return_value=(torch.zeros(8), torch.zeros(8)))
            with statistics, pytest.raises(DynamicOutputShapeException):  # the kernel has no fake form
                network(torch.zeros(2, 3, 8, 8))


@contextlib.contextmanager
def fake_group(size: int):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def operations(wanted, run) -> list:
    """Return the operations in a call of `run` for which `wanted(operation, arguments)` is true."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if wanted(function, args):
                found.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        run()
    return found


def outer_product(function, args) -> bool:
    """A `bmm` of inner size 1: torch 2.14 hands it to a Triton kernel, eager too, and that needs a C compiler."""
    return function in (aten.bmm.default, aten.baddbmm.default) and args[-2].shape[2] == 1


def comparison_of_floats(function, args) -> bool:
    """As in the gradient of `amax`. Compiled for a GPU, one of both may be rounded: nothing is equal, and 0 / 0."""
    return function is aten.eq.Tensor and args[0].is_floating_point()


NETWORKS = ("binet", "abinet", "vision", "language", "ssn")


def small_step(name: str):
    """A small network, its inputs, and its loss as a function."""
    config = small_networks.small_config(name)
    batch = make_batch(config)
    model, criterion = build_model(config).train(), build_criterion(config)
    return model, batch, lambda network: criterion(network(*batch.inputs()), *batch.targets())["total"]


@pytest.mark.parametrize("unwanted", [outer_product, comparison_of_floats])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_backward_pass_has_what_fails_on_a_gpu(name, unwanted):
    model, _, loss = small_step(name)
    assert operations(unwanted, lambda: loss(model).backward()) == []


def test_what_fails_on_a_gpu_is_detected():
    maps, weights = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert operations(outer_product, lambda: torch.einsum("nehw,ne->nhw", maps, weights).sum().backward())
    assert operations(comparison_of_floats, lambda: maps.amax(dim=(1, 2, 3)).sum().backward())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model, batch, _ = small_step(name)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, fullgraph=True, backend="eager")(*batch.inputs())


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned():
    """Addresses of the tensors in page-locked memory, which there is none of without a GPU."""
    found = set()

    def pin(tensor, device=None):
        copy = tensor.clone()
        found.add(copy.data_ptr())
        return copy

    with (
        mock.patch("torch.Tensor.pin_memory", pin),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.accelerator.is_available", return_value=True),
        mock.patch("torch.accelerator.current_accelerator", return_value=torch.device("cuda")),
    ):
        yield found


@pytest.mark.parametrize("name", ["binet", "language", "ssn"])
def test_batches_are_handed_over_in_pinned_memory(name, tmp_path, pinned):
    config = small_networks.small_config(name)
    config.dataset.train.roots, config.dataset.train.batch_size = [str(write_data(name, tmp_path))], 4
    config.dataset.masks.root = str(tmp_path / "masks") if name == "binet" else None
    config.dataset.segmentation.crop_size = [33, 65]
    loader = build_training_data(config, device=CUDA, process=Process())
    loader.batch_sampler.set_position(0, 0)
    batch = next(iter(loader))
    tensors = {field: value for field, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) >= 3
    for field, tensor in tensors.items():
        assert tensor.data_ptr() in pinned, field


def write_data(name: str, folder: Path) -> Path:
    if name == "binet":
        images = small_networks.write_words(folder / "images", 6)
        small_networks.write_masks(folder / "masks" / "images", folder / "images", images)
        (folder / "masks" / "images").rename(folder / "m")
        (folder / "masks").rmdir()
        (folder / "m").rename(folder / "masks")
        return folder / "images"
    if name == "language":
        (folder / "words.csv").write_text("inp\tgt\n" + "helo\thello\n" * 6)
        return folder / "words.csv"
    for part, value in (("images", 90), ("masks", 255)):
        (folder / part).mkdir()
        for number in range(6):
            image = np.full((40, 80, 3) if part == "images" else (40, 80), value, np.uint8)
            cv2.imwrite(str(folder / part / f"{number}.png"), image)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


def to_fake_cuda(network: nn.Module) -> nn.Module:
    """The network with fake CUDA tensors for its own."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=CUDA), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    return network


@contextlib.contextmanager
def fake_results():
    """Fake CUDA, where a tensor that is brought to the host as an array or a list is one of zeros; counts these."""
    arrived = []

    def to_array(tensor, *_, **__):
        arrived.append(tuple(tensor.shape))
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    with (
        fake_cuda(made_before=True),
        mock.patch("torch.Tensor.numpy", to_array),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: to_array(tensor).tolist()),
    ):
        yield arrived


def word_images(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (20 + 4 * i, 50 + 10 * i, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_segmenter(precision):
    segmenter = Segmenter(build_model(small_networks.small_config("ssn")), [65, 129], precision=precision)
    images = word_images(3)
    with fake_results() as arrived:
        to_fake_cuda(segmenter._ssn)
        segmenter.device = CUDA
        masks = segmenter(images)
    assert [each.shape for each in masks] == [each.shape[:2] for each in images]
    assert len(arrived) == 1 + len(images)  # whether anything overflowed; the masks


@pytest.mark.parametrize("tta_below", [0, 0.7])
def test_reader(tmp_path, tta_below):
    small_networks.save_networks(tmp_path)
    reader = Reader(tmp_path / "both.pth", device="cpu", tta_below=tta_below)
    with fake_results() as arrived, mock.patch("reader.GPU_THREADS", 1):  # fake tensors are known to one thread alone
        to_fake_cuda(reader._model)
        to_fake_cuda(reader._segmenter._ssn)
        reader.device = reader._segmenter.device = CUDA
        predictions = reader.read(word_images(3))
    assert [each.error for each in predictions] == [None] * 3
    assert len(arrived) <= 1 + 3 + 5 + (
        1 + len(VARIANTS) if tta_below else 0
    )  # overflow, masks; arrays of the whole batch


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_evaluation(precision):
    config = small_networks.small_config("binet")
    network = prepare_for_inference(build_model(config), precision="fp32", compile=False)
    charset = Charset.from_file(config.dataset.charset_path)
    with fake_results() as arrived:
        to_fake_cuda(network)
        evaluator = WordEvaluator(
            loaders={"test": [make_batch(config)]},
            filtered={"test": {}},
            charset=charset,
            protocol=Charset(PROTOCOLS[36]),
            model_eval="alignment",
            device=CUDA,
            precision=precision,
        )
        scores = evaluator.evaluate(network)
    assert scores["datasets"]["test"]["samples"] == WORDS
    assert len(arrived) <= 3 * 3  # classes, confidences and places of each sub-model's words


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_prepared_form_never_waits_for_the_gpu(name, precision):
    config = small_networks.small_config(name)
    network = prepare_for_inference(build_model(config), precision=precision, compile=False)
    with fake_cuda(made_before=True):
        to_fake_cuda(network)
        batch = make_batch(config).to(CUDA)
        inputs = batch.inputs()
        with NoBlockingCopy():
            output = network(*inputs)
        assert {leaf.device for leaf in tree_leaves(output) if leaf is not None} == {CUDA}
