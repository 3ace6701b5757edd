"""Name everything in a model, and say which repeated blocks are alike: most stages then look at one of each kind."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from shardspec.twin import forward_arguments, function_of, named_tensors

Model = nn.Module | Callable[[], nn.Module]


@frozen(eq=False)
class Parameter:
    """What the survey knows of a parameter or buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    requires_grad: bool
    first: str
    """The first name of the tensor: its own, unless it is tied."""
    persistent: bool = True


@frozen(eq=False)
class Structure:
    """What blocks with the same class tree, parameters, modes and hooks share; names begin with `.`, or are empty."""

    parameters: Mapping[str, Parameter]
    modules: tuple[str, ...]
    """The names of the modules in a block, its own first."""


@frozen(eq=False)
class View:
    """Names of a model to look at: all of them, or those of one block of each kind."""

    parameters: dict[str, Parameter]
    modules: dict[str, nn.Module]
    arguments: tuple[str, ...] = ()
    """Of the model's forward."""


@define(eq=False)
class Survey:
    """The names of a model."""

    model: nn.Module
    arguments: tuple[str, ...]
    """Of its forward."""
    blocks: dict[str, Structure]
    """FQN of each repeated block, outermost ones only, that shares no tensor with what is outside it."""
    tangled: bool = False
    """Whether modules are shared, or tensors by blocks: what a name stands for then hangs on which came first."""
    ids: set[int] = field(factory=set)
    """ids of the model's tensors and modules."""

    @cached_property
    def whole(self) -> View:
        """Every name, in the model's order."""
        modules = {name: module for name, module in self.model.named_modules() if name}
        return View(parameters_of(self.model), modules, self.arguments)

    def outline(self, heads: Mapping[str, str]) -> View:
        """The names outside of repeated blocks, and those inside the blocks that stand for others.

        Args:
            heads: block -> the block that stands for it.
        """
        found = View({}, {}, self.arguments)
        self._outline(self.model, "", heads, found, {})
        return found

    def _outline(
        self, module: nn.Module, path: str, heads: Mapping[str, str], found: View, first: dict[int, str]
    ) -> None:
        if path in self.blocks:
            if heads.get(path, path) == path:
                for name, known in self.blocks[path].parameters.items():
                    found.parameters[path + name] = evolve(known, first=path + known.first)
                found.modules.update(
                    (f"{path}.{name}" if name else path, child) for name, child in module.named_modules()
                )
            return
        if path:
            found.modules.setdefault(path, module)
        prefix = f"{path}." if path else ""
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    home = first.setdefault(id(tensor), prefix + name)
                    lost = name in module._non_persistent_buffers_set
                    found.parameters[prefix + name] = describe(tensor, home, persistent=not lost)
        for name, child in module._modules.items():
            if child is not None:
                self._outline(child, prefix + name, heads, found, first)


def survey(model: Model) -> Survey:
    """Name everything in a model; a function is called once, on the meta device."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    found = _Blocks()
    found.visit(model, "")
    blocks = {fqn: structure for fqn, structure in found.blocks.items() if fqn not in found.tied}
    return Survey(model, tuple(forward_arguments(model)), blocks, bool(found.tied), found.seen)


def parameters_of(module: nn.Module) -> dict[str, Parameter]:
    """Every parameter and buffer of a module by name, tied ones under each."""
    first: dict[int, str] = {}
    found: dict[str, Parameter] = {}
    lost = {
        f"{path}.{name}" if path else name
        for path, child in module.named_modules(remove_duplicate=False)
        for name in child._non_persistent_buffers_set
    }
    for name, tensor in named_tensors(module):
        home = first.setdefault(id(tensor), name)
        found[name] = describe(tensor, home, persistent=name not in lost)
    return found


def describe(tensor: torch.Tensor, home: str, *, persistent: bool) -> Parameter:
    """A parameter or buffer whose first name is `home`."""
    is_parameter = isinstance(tensor, nn.Parameter)
    wants = is_parameter and tensor.requires_grad
    return Parameter(tuple(tensor.shape), tensor.dtype, not is_parameter, wants, home, persistent)


@define(eq=False)
class _Blocks:
    """A walk that finds the repeated blocks of a tree and what they share."""

    blocks: dict[str, Structure] = field(factory=dict)
    tied: set[str] = field(factory=set)
    """Blocks that share a tensor or a module with something outside of them, or hold one twice."""
    seen: set[int] = field(factory=set)
    """ids of the tensors and modules so far."""
    held: dict[str, list[int]] = field(factory=dict)
    """Block -> the ids of what it holds."""
    known: dict[type, list[tuple[list[Any], Structure]]] = field(factory=dict)

    def visit(self, module: nn.Module, path: str) -> None:
        """Look at a module outside of repeated blocks."""
        if id(module) in self.seen:
            self.tied.add(path)
        own = (*module._parameters.values(), *module._buffers.values())
        self._keep([id(module), *(id(tensor) for tensor in own if tensor is not None)])
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is None:
                continue
            if not name.isdecimal():
                self.visit(child, prefix + name)
                continue
            traits: list[Any] = []
            members: list[int] = []
            read_traits(child, traits, members)
            self._keep(members, prefix + name)
            self.blocks[prefix + name] = self._structure(child, traits)

    def _structure(self, block: nn.Module, traits: list[Any]) -> Structure:
        alike = self.known.setdefault(type(block), [])
        for other, structure in reversed(alike):
            if other == traits:
                return structure
        parameters = {
            f".{name}": evolve(known, first=f".{known.first}") for name, known in parameters_of(block).items()
        }
        modules = tuple(f".{name}" if name else "" for name, _ in block.named_modules())
        structure = Structure(parameters, modules)
        alike.append((traits, structure))
        return structure

    def _keep(self, members: list[int], block: str = "") -> None:
        """Note what was met, and the blocks that hold something of it already."""
        before = len(self.seen)
        self.seen.update(members)
        if block:
            self.held[block] = members
        if len(self.seen) < before + len(members):
            met = set(members)
            self.tied.update(other for other, held in self.held.items() if not met.isdisjoint(held))


def read_traits(module: nn.Module, traits: list[Any], members: list[int]) -> None:
    """Append what two blocks must share to run the same code, and the ids of their modules and tensors."""
    state = module.__dict__
    members.append(id(module))
    traits += (type(module), state["training"], function_of(state.get("forward")))
    if state["_forward_pre_hooks"] or state["_forward_hooks"]:
        traits += (*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values())
    if state["_non_persistent_buffers_set"]:
        traits.append(sorted(state["_non_persistent_buffers_set"]))
    for kept in (state["_parameters"], state["_buffers"]):
        for name, tensor in kept.items() if kept else ():
            if tensor is None:
                traits += (name, None)
            else:
                members.append(id(tensor))
                traits += (name, tensor.shape, tensor.dtype, tensor.requires_grad, type(tensor))
    if state["_modules"]:
        for name, child in state["_modules"].items():
            if child is not None:
                traits.append(name)
                read_traits(child, traits, members)
        traits.append("")
