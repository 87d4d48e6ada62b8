"""The fast form of a network for inference: folded batch norms, 16-bit weights, channels-last maps, compiled."""

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from engine.precision import PRECISIONS, channels_last
from inference.segmenter import fold_batch_norms
from modules.mask_refinement import MaskRefinement
from modules.ssn import PUBLISHED_AREAS, SSN

# Images that go through the network together on a CPU. A larger batch is read in parts: its maps would leave the
# caches, and from 32 MiB on the C library has the system clear the memory of each map anew. Only
# networks whose masks are normalised over the batch (`normalize="batch"`) get it whole.
CPU_BATCH = 64


def prepare_for_inference(model: nn.Module, precision: str = "bf16", compile: bool = True) -> nn.Module:
    """Return the fast form of a network, for inference only; `model` itself stays as it is and shares nothing with it.

    Args:
        model: a recogniser, one of its stages, or SSN, on the device that it shall run on.
        precision: of most weights and maps: "fp32", "bf16" or "fp16"; similarities, min-max normalisations and
            classifiers stay in float32. 16 bits are only faster on devices with native 16-bit arithmetic.
        compile: let torch.compile fuse the network, at the first call, for batches of any size.

    Returns:
        A network that is called as `model` is and gives what it gives, all in float32, without gradients.

    Raises:
        ValueError: `precision` is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    network = fold_batch_norms(copy.deepcopy(model).eval().requires_grad_(False).float())
    network.to(memory_format=torch.channels_last)
    if PRECISIONS[precision] != torch.float32:
        _lower_precision(network, PRECISIONS[precision])
    if compile:
        network.compile(fullgraph=True, dynamic=True)
    frozen = compile and next(network.parameters()).device.type == "cpu"
    return (PreparedSSN if isinstance(model, SSN) else PreparedNetwork)(network, frozen=frozen)


class PreparedNetwork(nn.Module):
    """Calls a network without gradients; what `prepare_for_inference` returns.

    Args:
        network: what is called.
        frozen: whether a compiler folds what depends on weights alone, and lays weights out for the processor's matrix
            instructions. torch takes that as a global setting only, to be on whenever it compiles: at any call.
    """

    def __init__(self, network: nn.Module, *, frozen: bool):
        super().__init__()
        self.network = network
        self.frozen = frozen
        refinements = (module for module in network.modules() if isinstance(module, MaskRefinement))
        self._divisible = all(each.normalize == "sample" for each in refinements)
        self._signature = inspect.signature(network.forward)
        self.eval()

    @torch.no_grad()
    def forward(self, *inputs: Tensor | None, **named: Tensor | None) -> Any:
        """Call the network with its inputs, by position or name; the outputs are float32."""
        if named:
            inputs = self._signature.bind(*inputs, **named).args
        parts = _parts(inputs) if self._divisible else [inputs]
        with self._compiler_settings():
            outputs = [self.network(*map(channels_last, part)) for part in parts]
        return outputs[0] if len(outputs) == 1 else _pytree.tree_map(_concatenated, *outputs)

    def _compiler_settings(self) -> contextlib.AbstractContextManager:
        if not self.frozen:
            return contextlib.nullcontext()
        from torch._inductor import config  # here, as the compiler takes seconds to import

        return config.patch(freezing=True)


class PreparedSSN(PreparedNetwork):
    """A prepared SSN, which also makes whole masks."""

    @torch.no_grad()
    def text_probability(self, image: Tensor, *, areas: Sequence[int] = PUBLISHED_AREAS) -> Tensor:
        """Do as `SSN.text_probability`: (N, 3, H, W) -> (N, H, W) in [0, 1]."""
        with self._compiler_settings():
            return self.network.text_probability(image, areas=areas)


def _parts(inputs: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
    """Cut the inputs along the batch into parts of nearly one size, at most CPU_BATCH, where a CPU reads them."""
    first = next(value for value in inputs if value is not None)
    parts = -(-len(first) // CPU_BATCH)
    if first.device.type != "cpu" or parts <= 1:
        return [tuple(inputs)]
    cut = [[None] * parts if value is None else value.tensor_split(parts) for value in inputs]
    return list(zip(*cut, strict=True))


def _concatenated(*leaves: Tensor | None) -> Tensor | None:
    """Join the outputs of the parts of a batch."""
    return None if leaves[0] is None else torch.cat(leaves)


def float32_layers(network: nn.Module) -> set[nn.Module]:
    """Return the layers that always compute in float32: layer norms and what `float32_layers` of a class names.

    Layer norms, so that the transformer's residual stream is not rounded at every layer; the classes name what decides
    about a character, a cell or a pixel, what takes probabilities or positions, and the first stages on the image,
    where rounding was seen to change most characters. They are about 3 % of the arithmetic.
    """
    named = [layer for layer in _named_by_classes(network, "float32_layers") for layer in layer.modules()]
    return {*named, *(module for module in network.modules() if isinstance(module, nn.LayerNorm))}


def float32_names(network: nn.Module) -> set[str]:
    """Return the names in the network's `state_dict` of what its `float32_layers` hold."""
    kept = {id(each) for layer in float32_layers(network) for each in (*layer.parameters(), *layer.buffers())}
    return {name for name, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in kept}


def _named_by_classes(network: nn.Module, attribute: str) -> list[nn.Module]:
    """Return the children that the classes of a network's modules name in an attribute; of a list, its entries."""
    found: list[nn.Module] = []
    for module in network.modules():
        for name in getattr(module, attribute, ()):
            child = getattr(module, name, None)
            found += child if isinstance(child, nn.ModuleList) else [] if child is None else [child]
    return found


def _lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the network to `dtype`, in place, except its `float32_layers`; every layer converts what it is given."""
    kept = float32_layers(network)
    for module in network.modules():
        if module not in kept:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        parameter = next(module.parameters(recurse=False), None)
        if parameter is not None and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(_Convert(parameter.dtype))
    # Where a sum over many residual blocks starts, or a softmax follows, the output goes on in float32.
    for module in (*_named_by_classes(network, "float32_outputs"), network):
        module.register_forward_hook(_to_float32)


class _Convert:
    """Pre-hook that converts the floating-point tensors among a layer's arguments to the precision of its weights."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_converted(argument, self.dtype) for argument in arguments)


def _to_float32(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook that converts the output to float32."""
    return _pytree.tree_map(lambda leaf: _converted(leaf, torch.float32), output)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
