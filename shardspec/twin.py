"""Copies of a module tree with other tensors, and what a module tells of itself."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

MODULE_STATE = frozenset(name for name in nn.Module().__dict__ if name.startswith("_") or name == "training") | {
    "forward"
}


ABSENT = object()
"""What stands for an attribute that a module does not have of its own."""

PLAIN = frozenset({str, int, float, bool, type(None), torch.dtype, torch.device})
"""What an attribute may hold that cannot lead to a module or a tensor."""


class Twin:
    """A structural copy of a module tree with other tensors: same classes and attributes, nothing shared that a
    forward could change.

    The children of a module are copied when it is first asked for them: of a hundred repeated blocks, those that run.

    Args:
        model: the tree to copy; it is only read.
        place: (FQN, tensor) -> the tensor that stands for it; asked once a tensor.
        made: called with (FQN, module) for each copy.
        at_once: copy everything now, in the order of `named_modules`, so that what is shared goes by its first name.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Callable[[str, torch.Tensor], torch.Tensor],
        made: Callable[[str, nn.Module], None],
        *,
        at_once: bool = False,
    ) -> None:
        self._model, self._place, self._made, self._at_once = model, place, made, at_once
        self._copies: dict[int, Any] = {}
        self._unfinished: list[tuple[str, nn.Module]] = []
        self.root = self._copy(model, "")
        self.finish()

    def child(self, module: nn.Module | None, path: str) -> nn.Module | None:
        """The copy of a module, without what its attributes lead to."""
        if module is None:
            return None
        return self._copies[id(module)] if id(module) in self._copies else self._copy(module, path)

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        new = module.__class__.__new__(module.__class__)
        self._copies[id(module)] = new
        prefix = f"{path}." if path else ""
        state = new.__dict__
        state.update(module.__dict__)
        for kept in ("_parameters", "_buffers"):
            held = state[kept]
            state[kept] = {name: self._tensor(prefix + name, held[name]) for name in held} if held else {}
        state["_modules"] = {}
        if module._modules:
            state["_modules"] = children = Children(self, module._modules, prefix)
            if self._at_once:
                children.fill()
        self._unfinished.append((path, new))
        return new

    def finish(self) -> None:
        """Let the attributes of new copies hold copies too."""
        while self._unfinished:
            path, new = self._unfinished.pop()
            state = new.__dict__
            for name in state.keys() - (MODULE_STATE - {"forward"}):
                if type(state[name]) not in PLAIN:
                    state[name] = self._redirect(state[name])
            self._made(path, new)

    def _tensor(self, name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        if id(value) not in self._copies:
            self._copies[id(value)] = self._place(name, value)
        return self._copies[id(value)]

    @functools.cached_property
    def _paths(self) -> dict[int, str]:
        """id of a module or tensor of the old tree -> its first name."""
        paths = {id(module): name for name, module in self._model.named_modules()}
        for name, tensor in named_tensors(self._model):
            paths.setdefault(id(tensor), name)
        return paths

    def _redirect(self, value: Any) -> Any:
        """An attribute that holds modules or tensors of the old tree, holding those of the new one."""
        if isinstance(value, (nn.Module, torch.Tensor)):
            return self._of(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._of(value.__self__))
        if type(value) is tuple:
            return tuple(self._redirect(item) for item in value) if self._leads_back(value) else value
        if type(value) in (list, dict, set):
            return self._container(value)
        return value

    def _container(self, value: Any) -> Any:
        """The copy of a list, dict or set: one for all modules that hold it, who may hand things on by it."""
        if id(value) not in self._copies:
            self._copies[id(value)] = new = copy.copy(value)
            if self._leads_back(value):
                pairs = value.items() if type(value) is dict else enumerate(value)
                for key, item in pairs:
                    new[key] = self._redirect(item)
        return self._copies[id(value)]

    def _leads_back(self, item: Any) -> bool:
        """Whether an item is a module or tensor of the old tree, or a nest of lists, tuples and dicts with one."""
        if type(item) is dict:
            return any(self._leads_back(one) for one in item.values())
        if type(item) is list or type(item) is tuple:
            return any(self._leads_back(one) for one in item if type(one) not in PLAIN)
        if isinstance(item, types.MethodType):
            return isinstance(item.__self__, nn.Module) and id(item.__self__) in self._paths
        return isinstance(item, (nn.Module, torch.Tensor)) and id(item) in self._paths

    def _of(self, old: Any) -> Any:
        """The copy of a module or tensor of the old tree; anything else is itself."""
        if id(old) in self._copies or id(old) not in self._paths:
            return self._copies.get(id(old), old)
        path = self._paths[id(old)]
        return self.root.get_submodule(path) if isinstance(old, nn.Module) else self._tensor(path, old)


class Children(dict[str, "nn.Module | None"]):
    """The children of a copy, which are made when they are first asked for."""

    __slots__ = ("_prefix", "_twin", "made", "old")

    def __init__(self, twin: Twin, old: dict[str, nn.Module | None], prefix: str) -> None:
        self.old, self._twin, self._prefix, self.made = old, twin, prefix, False

    def fill(self) -> None:
        """Make them."""
        if not self.made:
            self.made = True
            for name, child in self.old.items():
                super().__setitem__(name, self._twin.child(child, self._prefix + name))

    def _ready(self) -> None:
        if not self.made:
            self.fill()
            self._twin.finish()

    def __getitem__(self, name: str) -> nn.Module | None:
        self._ready()
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        return name in self.old if not self.made else super().__contains__(name)

    def __len__(self) -> int:
        return len(self.old) if not self.made else super().__len__()

    def __iter__(self) -> Iterator[str]:
        self._ready()
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self._ready()
        return super().__reversed__()

    def __setitem__(self, name: str, module: nn.Module | None) -> None:
        self._ready()
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        self._ready()
        super().__delitem__(name)

    def items(self) -> Any:
        self._ready()
        return super().items()

    def keys(self) -> Any:
        self._ready()
        return super().keys()

    def values(self) -> Any:
        self._ready()
        return super().values()

    def get(self, name: str, default: Any = None) -> Any:
        self._ready()
        return super().get(name, default)

    def pop(self, *args: Any) -> Any:
        self._ready()
        return super().pop(*args)

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._ready()
        super().update(*args, **kwargs)

    def copy(self) -> dict[str, nn.Module | None]:
        self._ready()
        return dict(super().items())


def attributes_of(module: nn.Module, path: tuple[str, ...]) -> dict[str, Any]:
    """What a module below `module` holds by name; one that was not copied yet is still as the old one is."""
    for part in path:
        children: Any = module.__dict__["_modules"]
        if isinstance(children, Children) and not children.made:
            children = children.old
        module = cast("nn.Module", children[part])
    return module.__dict__


def function_of(forward: Any) -> Any:
    """What runs when a bound method is called, whatever it is bound to."""
    return forward.__func__ if isinstance(forward, types.MethodType) else forward


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its values."""
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
