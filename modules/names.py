"""Published names of parameters that are one module deeper here than in the published networks."""

from functools import partial
from typing import Any

from torch import nn


def leave_out_of_names(module: nn.Module, *children: str) -> None:
    """Leave the names of some children out of a module's `state_dict`: `child.x` becomes `x` there.

    `load_state_dict` takes the same names. Both also hold where `module` is part of another one.
    """
    module.register_state_dict_post_hook(partial(_shorten, children))
    module.register_load_state_dict_pre_hook(partial(_lengthen, children))


def _shorten(children: tuple[str, ...], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for child in children:
        long = f"{prefix}{child}."
        for name in [name for name in state if name.startswith(long)]:
            state[prefix + name.removeprefix(long)] = state.pop(name)


def _lengthen(children: tuple[str, ...], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for child in children:
        for name in module.get_submodule(child).state_dict():
            if prefix + name in state:
                state[f"{prefix}{child}.{name}"] = state.pop(prefix + name)
