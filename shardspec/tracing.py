"""Run a model's forward once on meta tensors and record it as a `Program`; no values, no devices, no layouts."""

import copy
import functools
import inspect
import os
import re
import sys
import traceback
import types
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve, field
from torch import nn
from torch.overrides import TorchFunctionMode

from shardspec import functional
from shardspec.aliasing import PARAMETER_WRITE, Aliases, writes, written
from shardspec.diagnostics import Location, shorten
from shardspec.nests import distinct, tensor_leaves
from shardspec.program import Block, ExpertsCall, Graph, Node, Program, Ref, Value, tensors
from shardspec.rules.operator import META, RULES
from shardspec.torch_private import (
    OpOverload,
    TorchDispatchMode,
    no_torch_dispatch,
    no_torch_function,
    set_grad_enabled,
)
from shardspec.twin import argument_names, forward_arguments, like, named_tensors

aten = torch.ops.aten

CONSTANT_LIMIT = 1 << 16
"""Integer tensors of up to this many elements that derive from constants are also computed on the CPU."""

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_FUNCTION = inspect.getfile(torch.autograd.Function)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class HostRead(Exception):
    """The model's Python reads a value that is not known before it runs."""

    code = "SS313"
    advice = "decide by tensors (torch.where, a mask), or do it to the batch before the step"

    def __init__(self, message: str, why: str = "") -> None:
        self.file, self.line = user_line()
        self.why = why or "what Python decides by a value of the batch may differ from rank to rank"
        super().__init__(message)


class UnseenError(HostRead):
    """A tensor comes to its use by a way that the walk does not see."""

    code = "SS318"
    advice = "hand tensors on as arguments and results, in tuples, lists or dicts; hold modules in attributes"


class GradientHookError(HostRead):
    """The model's Python changes, or looks at, what only a backward has."""

    code = "SS319"
    advice = "write what is done to the gradient in a step of your own, on what grad_fn gives"


class ProtocolError(HostRead):
    """A module that `experts=` names does not follow the protocol."""

    code = "SS332"
    advice = "name in experts= the module that holds the stacked weights, and call it with these three"


@define(slots=True, eq=False)
class _Frame:
    """The graph under construction and where each tensor object stands in it."""

    graph: Graph
    ids: dict[int, int] = field(factory=dict)
    params: dict[int, str] = field(factory=dict)
    """id of a parameter or buffer -> its name relative to the graph's module."""
    prefix: str = ""


class Tracer(TorchDispatchMode):
    """Records every operator that runs on meta tensors; a subclass decides what a point and a block do."""

    def __init__(self, graph: Graph, model: nn.Module, originals: set[int]) -> None:
        super().__init__()
        self.model, self.originals = model, originals
        """What is checked, of which a copy runs; and the ids of its tensors."""
        self.left: dict[int, Value] = {}
        """id of a tensor that a block made -> its value in the graph of the block, once that has ended."""
        self.frames = [_Frame(graph)]
        self.kept: list[Any] = []
        self.path = ""
        self.aliases = Aliases()
        self.captured: list[list[torch.Tensor]] = []
        self.signatures: dict[type, list[str]] = {}
        self.whole: re.Pattern[str] | None = None
        """Matches the FQNs of the modules that follow the experts protocol."""

    def takes_whole(self, fqn: str) -> bool:
        """Whether a module follows the experts protocol: its call is one operation."""
        return self.whole is not None and self.whole.fullmatch(fqn) is not None

    @property
    def frame(self) -> _Frame:
        return self.frames[-1]

    def enter(self, tensor: torch.Tensor, value: Value) -> int:
        """Make a tensor object stand for a new value of the current graph."""
        index = self.frame.graph.add(value)
        self.frame.ids[id(tensor)] = index
        self.kept.append(tensor)
        return index

    def value_of(self, tensor: torch.Tensor) -> int:
        """The value that a tensor object stands for; parameters and constants appear when first read."""
        frame = self.frame
        index = frame.ids.get(id(tensor))
        if index is not None:
            return index
        name = frame.params.get(id(tensor))
        if name is not None:
            kind = "param" if isinstance(tensor, nn.Parameter) else "buffer"
            value = Value(tuple(tensor.shape), tensor.dtype, name, kind, tensor.requires_grad)
            index = self.enter(tensor, value)
            frame.graph.params[name] = index
            return index
        for depth in range(len(self.frames) - 2, -1, -1):
            if id(tensor) in self.frames[depth].ids or id(tensor) in self.frames[depth].params:
                return self._capture(tensor)
        data = None if tensor.device.type == "meta" else tensor.detach()
        if id(tensor) in self.left:
            data = self.left[id(tensor)].data
            if data is None:
                raise UnseenError(
                    "a tensor that a repeated block made is read outside of it, and is not in the block's result",
                    why="a repeated block is checked once, by its arguments and its result alone",
                )
        elif id(tensor) in self.originals:
            name = next(name for name, held in named_tensors(self.model) if held is tensor)
            raise UnseenError(
                f"{name} is read through something that is bound to the model itself",
                why="the check runs a copy of the model, and what holds this tensor or its module was not copied: "
                "a closure, functools.partial, or an object of another kind",
            )
        return self.enter(tensor, Value(tuple(tensor.shape), tensor.dtype, "", "constant", False, data))

    def _capture(self, tensor: torch.Tensor) -> int:
        """A value of an outer graph, read inside a block: one more input of the block."""
        index = self.enter(tensor, Value(tuple(tensor.shape), tensor.dtype, "", "formal", tensor.requires_grad))
        self.frame.graph.inputs.append(index)
        self.captured[-1].append(tensor)
        return index

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another tensor object with the same description, made behind the program's back."""
        with no_torch_function(), no_torch_dispatch():
            return like(tensor)

    def refs(self, tree: Any) -> Any:
        """A nest of arguments with a `Ref` for each tensor."""
        if isinstance(tree, torch.Tensor):
            return Ref(self.value_of(tree))
        if isinstance(tree, (list, tuple)):
            items = [self.refs(item) for item in tree]
            if isinstance(tree, list):
                return items
            return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
        if isinstance(tree, dict):
            return {key: self.refs(item) for key, item in tree.items()}
        return tree

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RULES and func._can_decompose() and not _is_atomic(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.record(func, args, kwargs)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator on meta and append its node."""
        args = self._by_number(func, args)
        data = self._constant(func, args, kwargs)
        if func is aten._local_scalar_dense.default or func is aten.item.default:
            if data is None:
                raise HostRead("the model reads a tensor's value on the host")
            return data
        if data is None and torch.Tag.dynamic_output_shape in func.tags and _by_values(func, args):
            raise HostRead(
                f"{_operator_name(func)} makes a tensor whose shape depends on values",
                why="its shape may differ from rank to rank, and no layout says which part a rank holds",
            )
        called = dict(kwargs)
        if called.get("device") is not None or _is_factory(func):
            called["device"] = torch.device("meta")
        arguments = [_on_meta(arg) for arg in args]
        if isinstance(data, torch.Tensor) and torch.Tag.dynamic_output_shape in func.tags:
            out = torch.empty_like(data, device="meta")
        elif isinstance(data, tuple) and torch.Tag.dynamic_output_shape in func.tags:
            out = tuple(torch.empty_like(each, device="meta") for each in data)
        else:
            run: Callable[..., Any] = META.get(func) or func
            out = run(*arguments, **{key: _on_meta(value) for key, value in called.items()})
        return self.append(func, _operator_name(func), args, kwargs, out, data)

    def _by_number(self, func: Any, args: Any) -> Any:
        """The arguments of a lookup by masks that are known with the rows' numbers in their place."""
        if func is not aten.index.Tensor or not _by_values(func, args):
            return args
        found: list[Any] = []
        for index in args[1]:
            value = self.frame.ids.get(id(index))
            data = self.frame.graph.values[value].data if value is not None else None
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            elif data is None:
                return args
            else:
                with no_torch_function(), no_torch_dispatch():
                    found += data.nonzero().unbind(1)
        return (args[0], found)

    def append(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, data: Any = None) -> Any:
        """Append a node with its outputs and give back the outputs."""
        file, line = user_line()
        graph = self.frame.graph
        node = Node(
            name,
            func,
            self.refs(tuple(args)),
            self.refs(kwargs),
            (),
            self.path,
            file,
            line,
            torch.is_grad_enabled(),
        )
        graph.nodes.append(node)
        outs = out if isinstance(out, (list, tuple)) else (out,)
        datas = data if isinstance(data, (list, tuple)) else (data,) * len(outs)
        node.custom = in_custom_function()
        mutated = writes(func)
        if mutated:
            node.unsafe = self._write(_target(outs, args))
        indices: list[int | None] = []
        for made, constant in zip(outs, datas, strict=False):
            if not isinstance(made, torch.Tensor):
                indices.append(None)
                continue
            tensor = made
            if not mutated and any(made is arg for arg in args):
                # `to`, `contiguous` and `reshape` may give back the very tensor: an alias of the same value.
                tensor = self.fresh(made)
                self.aliases.rename(made, tensor)
                outs = tuple(tensor if one is made else one for one in outs)
                out = tensor if isinstance(out, torch.Tensor) else outs
            indices.append(self.enter(tensor, Value(tuple(tensor.shape), tensor.dtype, data=constant)))
        node.outputs = tuple(indices)
        if mutated:
            self._rename(_target(outs, args), node)
        else:
            self.aliases.observe(func, args, out)
        return out

    def _rename(self, target: torch.Tensor, node: Node) -> None:
        """Every other name of a tensor that was written to stands for a new value, which depends on the write."""
        ids, graph, new = self.frame.ids, self.frame.graph, self.frame.ids.get(id(target))
        if new is None:
            return
        family = self.aliases.family(target)
        same = family.whole if id(target) in family.whole else {id(target)}
        others: dict[int, list[int]] = {}
        for member in (family.whole | family.parts) & ids.keys():
            if member in same:
                ids[member] = new
            else:
                others.setdefault(ids[member], []).append(member)
        for old, members in sorted(others.items()):
            value = graph.values[old]
            index = graph.add(Value(value.shape, value.dtype))
            changed = {"args": (Ref(old), Ref(new)), "kwargs": {}, "outputs": (index,), "unsafe": ""}
            graph.nodes.append(evolve(node, op="written", func=written, **changed))
            ids.update(dict.fromkeys(members, index))

    def _write(self, target: torch.Tensor) -> str:
        """Why the typing cannot follow a write to a tensor, or nothing; what was known of its values is forgotten."""
        family = self.aliases.family(target)
        values = self.frame.graph.values
        for member in (family.whole | family.parts) & self.frame.ids.keys():
            values[self.frame.ids[member]].data = None
        kind = values[self.frame.ids[id(target)]].kind if id(target) in self.frame.ids else "param"
        members = (family.whole | family.parts) & self.frame.ids.keys()
        if kind == "param" or any(values[self.frame.ids[member]].kind == "param" for member in members):
            return PARAMETER_WRITE
        if kind in ("buffer", "entry", "constant"):
            return f"it writes to a {kind} of the model"
        if family.parts:
            return "other views of the same tensor see the write"
        outside = any(family.whole & frame.ids.keys() for frame in self.frames[:-1])
        entered = any(values[self.frame.ids[member]].kind == "formal" for member in members)
        return "a tensor from outside the block sees the write" if outside or entered else ""

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's value, where all that it reads is constant, small and not random."""
        known: list[Any] = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                index = self.frame.ids.get(id(arg))
                data = self.frame.graph.values[index].data if index is not None else None
                if data is None and arg.device.type != "meta" and index is None:
                    data = arg.detach()
                if data is None:
                    return None
                known.append(data)
            elif isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
                return None
            else:
                known.append(arg)
        reads = any(isinstance(arg, torch.Tensor) for arg in args)
        if not reads and not _is_factory(func):
            return None
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
            return None
        if any(isinstance(item, torch.Tensor) and item.numel() > CONSTANT_LIMIT for item in known):
            return None
        if not reads and not _is_small_factory(func, args):
            return None
        options = {key: value for key, value in kwargs.items() if key != "device"}
        if func is aten.histc.default and not known[0].is_floating_point():
            # The kernel for whole numbers is an accelerator's alone.
            return func(known[0].double(), *known[1:], **options).to(known[0].dtype)
        out = func(*known, **options, **({"device": torch.device("cpu")} if not reads else {}))
        if isinstance(out, torch.Tensor) and (out.numel() > CONSTANT_LIMIT or (out.is_floating_point() and out.ndim)):
            return None
        return out

    # What happens at a module's boundary.

    def attach(self, fqn: str, module: nn.Module) -> None:
        """Route a module's forward through this tracer."""
        if fqn:
            call = self.experts if self.takes_whole(fqn) else self.call
            module.__dict__["forward"] = functools.partial(call, module, fqn, module.forward)

    def hold(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Make a parameter or buffer behind the program's back, and know it by its name in the model."""
        with no_torch_function(), no_torch_dispatch():
            tensor = make()
        self.frames[0].params.setdefault(id(tensor), name)
        self.kept.append(tensor)
        return tensor

    def call(self, module: nn.Module, fqn: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of a module."""
        if is_block(fqn):
            return self.block(module, fqn, forward, args, kwargs)
        return self.plain(module, fqn, forward, args, kwargs)

    def plain(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward between its input points and its output points."""
        relative = fqn[len(self.frame.prefix) :]
        args, kwargs = self._inputs(module, relative, args, kwargs)
        outer, self.path = self.path, relative
        try:
            out = forward(*args, **kwargs)
        finally:
            self.path = outer
        return self._outputs(relative, out)

    def experts(self, module: nn.Module, fqn: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One call of an experts module, as one operation on hidden [N, D], ids [N, k], weights [N, k]."""
        del forward
        relative = fqn[len(self.frame.prefix) :]
        args, kwargs = self._inputs(module, relative, args, kwargs)
        hidden, ids, weights = protocol_arguments(module, fqn, args, kwargs)
        held = dict(module.named_parameters())
        outer, self.path = self.path, relative
        try:
            with no_torch_function(), no_torch_dispatch():
                out = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")
            func = self.experts_call(module, fqn, relative, tuple(held))
            out = self.append(func, "experts", (hidden, weights, ids, *held.values()), {}, out)
        finally:
            self.path = outer
        return self._outputs(relative, out)

    def experts_call(self, module: nn.Module, fqn: str, relative: str, names: tuple[str, ...]) -> ExpertsCall:
        """What a node says of the experts module that it calls."""
        del module
        return ExpertsCall(relative, self.model.get_submodule(fqn), names)

    def _inputs(self, module: nn.Module, fqn: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        names = self._argument_names(module)
        first = True
        changed: list[Any] = []
        for index, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                changed.append(arg)
                continue
            by_name = f"{fqn}:in.{names[index]}" if index < len(names) else f"{fqn}:in.{index}"
            changed.append(self.point((f"{fqn}:in", by_name) if first else (by_name,), arg))
            first = False
        named: dict[str, Any] = {}
        for key, arg in kwargs.items():
            if not isinstance(arg, torch.Tensor):
                named[key] = arg
                continue
            by_name = f"{fqn}:in.{key}"
            named[key] = self.point((f"{fqn}:in", by_name) if first else (by_name,), arg)
            first = False
        return changed, named

    def _argument_names(self, module: nn.Module) -> list[str]:
        kind = type(module)
        if kind not in self.signatures:
            self.signatures[kind] = argument_names(kind.forward)[1:]
        return self.signatures[kind]

    def _outputs(self, fqn: str, out: Any) -> Any:
        if isinstance(out, torch.Tensor):
            return self.point((fqn,), out)
        if isinstance(out, (tuple, list)):
            items = list(out)
            first = True
            for index, item in enumerate(items):
                if isinstance(item, torch.Tensor):
                    items[index] = self.point((fqn,) if first else (f"{fqn}:out.{index}",), item)
                    first = False
            return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
        if isinstance(out, Mapping):
            first = True
            changed: Any = copy.copy(out)
            for key, item in out.items():
                if isinstance(item, torch.Tensor):
                    changed[key] = self.point((fqn,) if first else (f"{fqn}:out.{key}",), item)
                    first = False
            return changed
        return out

    def append_point(self, names: tuple[str, ...], tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Append a point's node, from the tensor before it to the one behind it."""
        file, line = user_line()
        graph = self.frame.graph
        with no_torch_function():
            source = self.value_of(tensor)
            data = graph.values[source].data if tuple(out.shape) == tuple(tensor.shape) else None
            index = self.enter(out, Value(tuple(out.shape), out.dtype, data=data))
        node = Node("point", names, (Ref(source),), {}, (index,), self.path, file, line, torch.is_grad_enabled())
        graph.nodes.append(node)
        return out

    @abstractmethod
    def point(self, names: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        """A place where a rule may stand; the tensor behind it is another object than the one before."""

    @abstractmethod
    def block(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module that may be repeated."""

    def in_block(
        self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Block, list[torch.Tensor], Any]:
        """Run a block's forward into a graph of its own; give the graph, the tensors that entered, and the result."""
        block = Block(first=fqn)
        names: dict[int, str] = {}
        for name, tensor in named_tensors(module):
            names.setdefault(id(tensor), name)
        entered = distinct(tensor_leaves((args, kwargs)))
        outer, self.path = self.path, ""
        self.frames.append(_Frame(block, params=names, prefix=fqn + "."))
        self.captured.append([])
        try:
            for tensor in entered:
                if id(tensor) not in names:
                    value = Value(tuple(tensor.shape), tensor.dtype, "", "formal", tensor.requires_grad)
                    block.inputs.append(self.enter(tensor, value))
            out = self.plain(module, fqn, forward, args, kwargs)
            self.result_refs = self.refs(out)
        finally:
            ended = self.frames.pop()
            made = ((key, ended.graph.values[index]) for key, index in ended.ids.items())
            self.left.update((key, value) for key, value in made if value.kind == "inner")
            captured = self.captured.pop()
            self.path = outer
        entered = [tensor for tensor in entered if id(tensor) not in names]
        return block, entered + captured, out


def protocol_arguments(module: nn.Module, fqn: str, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """hidden [N, D], ids [N, k] and weights [N, k] of a call of an experts module.

    Raises:
        ProtocolError: for a call or a module that does not follow the protocol.
    """
    names = argument_names(type(module).forward)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors_ = [given[name] for name in names if name in given]
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise ProtocolError(f"the experts module {fqn} holds a buffer, {buffers[0]}", why=PROTOCOL)
    told = ", ".join(f"{name} {list(i.shape) if isinstance(i, torch.Tensor) else repr(i)}" for name, i in given.items())
    if len(args) + len(kwargs) != 3 or not all(isinstance(item, torch.Tensor) for item in tensors_):
        raise ProtocolError(f"the experts module {fqn} is called with ({told})", why=PROTOCOL)
    hidden, ids, weights = tensors_
    shapes = hidden.ndim == ids.ndim == weights.ndim == 2 and ids.shape == weights.shape
    whole = not ids.is_floating_point() and hidden.is_floating_point() and weights.is_floating_point()
    if not (shapes and hidden.shape[0] == ids.shape[0] and whole):
        raise ProtocolError(f"the experts module {fqn} is called with ({told})", why=PROTOCOL)
    return hidden, ids, weights


PROTOCOL = (
    "experts= names modules with forward(hidden [N, D], topk_ids [N, k], topk_weights [N, k]) -> [N, D], whose "
    "parameters are stacked over experts on dim 0"
)

OF_BACKWARD: dict[Any, str] = {
    **{inspect.getattr_static(torch.Tensor, asked).__get__: asked for asked in ("requires_grad", "grad_fn", "is_leaf")},
    torch.Tensor.register_hook: "register_hook",
    torch.Tensor.register_post_accumulate_grad_hook: "register_post_accumulate_grad_hook",
}
"""What a tensor tells of autograd, which does not run here -> its name."""


class Whole(TorchFunctionMode):
    """Hands the functions of our own that are typed whole (`ss.name`, `ss.cross_entropy`) to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.name:
            tensor, label = args
            path = self.tracer.path
            return self.tracer.point((f"{path}.{label}" if path else label,), tensor)
        if func in OF_BACKWARD and not isinstance(args[0], nn.Parameter) and not is_ours(_caller()):
            raise GradientHookError(
                f"the model asks a tensor for its {OF_BACKWARD[func]}",
                why="the check runs forward without autograd: what this leads to in a step is not seen",
            )
        if func is torch.Tensor.new_tensor:
            # On meta its values would be lost: they may hang on a local size, which the dry run compares.
            return torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype)
        if func is torch.Tensor.tolist:
            return _listed(args[0])
        if func in RULES and not isinstance(func, OpOverload):
            with no_torch_function(), no_torch_dispatch():
                out = func.meta(*args, **kwargs)
            return self.tracer.append(func, func.__name__, args, kwargs, out)
        return func(*args, **kwargs)


def _listed(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor, each read as `item` reads one: a tensor on meta has no list of them."""
    return [_listed(row) for row in tensor.unbind()] if tensor.ndim else tensor.item()


def _target(outs: Any, args: Any) -> torch.Tensor:
    """The tensor that an operator writes to: it gives it back, as an operand or as `out=`."""
    return next((out for out in outs if isinstance(out, torch.Tensor)), args[0])


def is_block(fqn: str) -> bool:
    """Whether a module's name ends in an index, as a repeated layer's does."""
    return fqn.rpartition(".")[2].isdecimal()


def user_line() -> tuple[str, int]:
    """File and line of the nearest frame that is neither torch's nor ours."""
    frame = _user_frame()
    return frame.f_code.co_filename, frame.f_lineno


def _caller() -> str:
    """The file of the line that called a mode's `__torch_function__`."""
    return sys._getframe(2).f_code.co_filename


def in_custom_function() -> bool:
    """Whether the forward of an autograd function runs, however deep below it, and wherever it was written."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not run.__code__:
        if frame.f_code.co_filename == _FUNCTION:
            return True
        frame = frame.f_back
    return False


def _user_frame() -> types.FrameType:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if not is_ours(frame.f_code.co_filename):
            break
        frame = frame.f_back
    return frame


@functools.lru_cache(maxsize=4096)
def is_ours(file: str) -> bool:
    """Whether a line of code is torch's, or our own."""
    return file.startswith((_HERE, _TORCH, "<"))


@functools.lru_cache(maxsize=4096)
def _operator_name(func: Any) -> str:
    """`add` for torch's own; with its namespace for any other, which may have the same name."""
    return func._schema.name.removeprefix("aten::")


@functools.lru_cache(maxsize=4096)
def _is_factory(func: Any) -> bool:
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def _is_small_factory(func: Any, args: Any) -> bool:
    if _operator_name(func) in ("arange", "scalar_tensor"):
        return all(not isinstance(arg, (int, float)) or abs(arg) <= CONSTANT_LIMIT for arg in args)
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    count = 1
    for size in sizes:
        count *= int(size)
    return _operator_name(func) in ("full", "zeros", "ones") and count <= 1024


@functools.lru_cache(maxsize=4096)
def _is_atomic(func: Any) -> bool:
    """Whether the operator is left whole although torch could decompose it: nothing stands between it and a kernel."""
    return torch.Tag.pointwise in func.tags


def _by_values(func: Any, args: Any) -> bool:
    """Whether the result's shape depends on values: of a lookup, only where a mask picks the rows.

    Of `one_hot`, only where no number of classes is given.
    """
    if func is aten.one_hot.default:
        return len(args) < 2 or args[1] < 0
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func is not aten.repeat_interleave.Tensor


def _on_meta(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor) and arg.device.type != "meta":
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
    if isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
        return type(arg)(_on_meta(item) for item in arg)
    return arg


IN_THE_LOSS = "raised by the loss"
"""A note on what a loss raises."""


def run(tracer: Tracer, model: nn.Module, batch: Mapping[str, Any], loss_fn: Callable[..., Any] | None) -> Any:
    """Run forward and loss under a tracer; the program's `result` and `outputs` are set."""
    program = tracer.frames[0].graph
    assert isinstance(program, Program)
    arguments = {name: value for name, value in batch.items() if name in forward_arguments(model)}
    with recording(tracer):
        out = model(**arguments)
        program.outputs = [ref.index for ref in tensors(tracer.refs(out))]
        program.forward_nodes = len(program.nodes)
        if loss_fn is not None:
            tracer.path = "loss"
            try:
                out = loss_fn(out, dict(batch))
            except Exception as error:
                error.add_note(IN_THE_LOSS)
                raise
        program.result = tracer.refs(out)
    return out


@contextmanager
def recording(tracer: Tracer) -> Generator[None]:
    """Have a tracer see all that runs, as forward would run in a step, and without autograd."""
    with torch.inference_mode(), torch.no_grad():
        set_grad_enabled(True)
        with Whole(tracer), tracer:
            yield


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Refuse hooks that run in a backward, which the check does not.

    Raises:
        GradientHookError: naming a module or parameter that has one.
    """
    rest = [model]
    while rest:  # `named_modules` makes a name for each, which nobody asks for
        module = rest.pop()
        rest += (child for child in module._modules.values() if child is not None)
        if module._backward_hooks or module._backward_pre_hooks:
            raise GradientHookError(f"{_name_in(model, module) or 'the model'} has a backward hook", why=ON_A_SHARE)
        for leaf, parameter in module._parameters.items():
            if parameter is not None and (parameter._backward_hooks or _after_accumulation(parameter)):
                name = f"{_name_in(model, module)}.{leaf}".removeprefix(".")
                raise GradientHookError(f"{name} has a hook on its gradient", why=ON_A_SHARE)


def _name_in(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, child in model.named_modules() if child is module)


ON_A_SHARE = (
    "on a rank it would be given a part of the gradient, or a share of its sum, and a copy of the model has none"
)


def _after_accumulation(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


OF_AN_OPERATOR = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""What an operator raises for arguments that do not fit: the model's mistake wherever it surfaces."""


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised by this package's own code, not by the model's or torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_HERE)


def user_frame(error: BaseException) -> tuple[Location, ...]:
    """The line of the model at which an error surfaced, if it came from one."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((_HERE, _TORCH))
    ]
    inner = [frame for frame in frames if "importlib" not in frame.filename]
    return tuple(Location(file=shorten(at.filename), line=at.lineno or 0, text=at.line or "") for at in inner[-1:])
