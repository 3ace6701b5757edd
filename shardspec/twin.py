"""Copies of a module tree with other tensors, and what a module tells of itself."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MODULE_STATE = frozenset(name for name in nn.Module().__dict__ if name.startswith("_") or name == "training") | {
    "forward"
}


def twin(model: nn.Module, place: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A structural copy of a module tree with other tensors: same classes and attributes, nothing shared that
    a forward could change.

    Args:
        model: the tree to copy; it is only read.
        place: (FQN, tensor) -> the tensor that stands for it; asked once a tensor, under its first name.
    """
    made: dict[int, Any] = {}

    def tensor(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        if id(value) not in made:
            made[id(value)] = place(name, value)
        return made[id(value)]

    def build(module: nn.Module, prefix: str) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        new = module.__class__.__new__(module.__class__)
        made[id(module)] = new
        state = new.__dict__
        state.update(module.__dict__)
        state["_parameters"] = {name: tensor(prefix + name, value) for name, value in module._parameters.items()}
        state["_buffers"] = {name: tensor(prefix + name, value) for name, value in module._buffers.items()}
        state["_modules"] = {
            name: None if child is None else build(child, f"{prefix}{name}.") for name, child in module._modules.items()
        }
        return new

    root = build(model, "")
    for new in root.modules():
        for name, value in new.__dict__.items():
            if name not in MODULE_STATE:
                new.__dict__[name] = _redirect(value, made)
    return root


def _redirect(value: Any, made: dict[int, Any]) -> Any:
    """An attribute that holds modules or tensors of the old tree, holding those of the new one."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if id(value) in made and isinstance(value, (nn.Module, torch.Tensor)):
        return made[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in made:
        return types.MethodType(value.__func__, made[id(value.__self__)])
    if (type(value) is list or type(value) is tuple) and any(id(item) in made for item in value):
        return type(value)(_redirect(item, made) for item in value)
    if type(value) is dict and any(id(item) in made for item in value.values()):
        return {key: _redirect(item, made) for key, item in value.items()}
    return copy.copy(value) if type(value) in (list, dict, set) else value


def to_meta(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its values."""
    del name
    if tensor.device.type == "meta":
        return tensor
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Another meta tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@functools.lru_cache(maxsize=1024)
def argument_names(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, in order."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]


def forward_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments of a model's forward."""
    return argument_names(type(model).forward)[1:]


def required_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments that forward cannot be called without."""
    parameters = inspect.signature(type(model).forward).parameters
    return [name for name in forward_arguments(model) if parameters[name].default is inspect.Parameter.empty]
