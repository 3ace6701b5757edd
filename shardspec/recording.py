"""Record a model's forward as a program: every module boundary a point, repeated blocks run once."""

import functools
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import define, evolve
from torch import nn

from shardspec.bodies import record_body
from shardspec.nests import distinct, replace_tensors, tensor_leaves
from shardspec.program import Block, BlockCall, ExpertsCall, Graph, Node, Program, Ref, Value, tensors
from shardspec.survey import Survey
from shardspec.torch_private import no_torch_function
from shardspec.tracing import Tracer, is_ours, run, user_line
from shardspec.twin import ABSENT, MODULE_STATE, Twin, attributes_of, function_of, to_meta


def trace(
    names: Survey,
    inputs: Mapping[str, Any],
    loss_fn: Callable[..., Any] | None = None,
    training: bool | None = None,
    experts: str | None = None,
) -> Program:
    """Record forward, and the loss if one is given, on the global shapes; the model is only read.

    Args:
        inputs: the global batch; entries named as forward's arguments go to forward, all go to the loss.
        experts: matches the modules that follow the experts protocol, whose calls are taken whole.

    Raises:
        HostRead: the model reads a value that is not known before it runs.
    """
    program = Program()
    tracer = Recorder(program, names)
    tracer.whole = re.compile(experts) if experts is not None else None
    ghost = Twin(
        names.model,
        lambda name, tensor: tracer.hold(name, lambda: to_meta(tensor)),
        tracer.attach,
        at_once=names.tangled,
    ).root
    if training is not None:
        ghost.train(training)
    batch = {name: to_meta(item) if isinstance(item, torch.Tensor) else item for name, item in inputs.items()}
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor):
            program.entries[name] = tracer.enter(tensor, Value(tuple(tensor.shape), tensor.dtype, name, "entry"))
    run(tracer, ghost, batch, loss_fn)
    return program


class Recorder(Tracer):
    """Records the global program: points are kept with their names, repeated blocks are run once and called."""

    def __init__(self, graph: Program, names: Survey) -> None:
        super().__init__(graph, names.model, names.ids)
        self.blocks = names.blocks
        self.recorded: dict[type, list[_Recorded]] = {}
        self.watched: dict[type, type] = {}
        self.reads: list[tuple[nn.Module, str]] = []

    def point(self, names: tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        return self.append_point(names, tensor, self.fresh(tensor))

    def block(self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with no_torch_function():
            structure = _structure((args, kwargs))
            inputs = (torch.is_grad_enabled(), structure)
            for known in self.recorded.get(self._kind(module), ()):
                if known.inputs == inputs and self._same(known, module, fqn):
                    if known.reads and len(self.frames) > 1:
                        modules = dict(module.named_modules())
                        self.reads.extend(
                            (modules[".".join(path)], name) for path in known.reads for name in known.reads[path]
                        )
                    return self._again(known, fqn, args, kwargs)
        return self._record_block(module, fqn, forward, args, kwargs, structure)

    def _shape(self, module: nn.Module, fqn: str) -> Any:
        """What two blocks share that run the same code: the survey's structure, or what can be read off a nested
        block or one that shares tensors."""
        whole = tuple(path for path, _ in module.named_modules() if self.takes_whole(f"{fqn}.{path}" if path else fqn))
        if len(self.frames) == 1 and fqn in self.blocks:
            return self.blocks[fqn], whole
        return self._traits(module, fqn), whole

    def experts_call(self, module: nn.Module, fqn: str, relative: str, names: tuple[str, ...]) -> ExpertsCall:
        call = super().experts_call(module, fqn, relative, names)
        # Its forward is recorded later, apart: whatever it holds may be read there.
        for child in module.modules():
            self.reads += [(child, name) for name in child.__dict__ if name not in MODULE_STATE]
        known: dict[Any, Graph] = {}

        def record(
            hidden: Value,
            weights: Value,
            shapes: Mapping[str, tuple[int, ...]],
            attributes: Mapping[str, int],
            times: int = 1,
            choices: int = 1,
        ) -> Graph:
            key = (tuple(shapes.items()), tuple(attributes.items()), times, choices)
            if key not in known:
                known[key] = record_body(
                    call.module, self.originals, fqn, hidden, weights, shapes, attributes, times, choices
                )
            return known[key]

        return evolve(call, record=record)

    def _record_block(
        self, module: nn.Module, fqn: str, forward: Callable[..., Any], args: Any, kwargs: Any, structure: Any
    ) -> Any:
        before = _attributes(module)
        shape = self._shape(module, fqn)
        outer, self.reads = self.reads, []
        restore = self._watch(module)
        try:
            block, entered, out = self.in_block(module, fqn, forward, args, kwargs)
        finally:
            for watched, kind in restore:
                watched.__class__ = kind
            reads, self.reads = self.reads, outer
            outer.extend(reads)
        paths = {id(child): path for path, child in module.named_modules()}
        read: dict[tuple[str, ...], dict[str, Any]] = {}
        for child, name in reads:
            if id(child) in paths:
                path = tuple(paths[id(child)].split(".")) if paths[id(child)] else ()
                read.setdefault(path, {})[name] = child.__dict__.get(name, ABSENT)
        block.outputs = [ref.index for ref in tensors(self.result_refs)]
        # A forward that writes to its module or to its arguments does not do the same thing twice.
        pure = _attributes(module) == before and _structure((args, kwargs)) == structure
        plain = not any(id(tensor) in self.frame.ids for tensor in tensor_leaves(out))
        opened = any(name == "__dict__" for _, name in reads)
        closed = not opened and len(entered) == len(distinct(tensor_leaves((args, kwargs))))
        if pure and plain and closed:
            known = _Recorded(block, shape, read, (torch.is_grad_enabled(), structure), out)
            self.recorded.setdefault(self._kind(module), []).append(known)
        return self._call(block, fqn, entered, out)

    def _call(self, block: Block, fqn: str, entered: list[torch.Tensor], out: Any) -> Any:
        file, line = user_line()
        graph = self.frame.graph
        args = tuple(Ref(self.value_of(tensor)) for tensor in entered)
        outputs: list[int | None] = []
        for tensor, index in zip(tensor_leaves(out), block.outputs, strict=True):
            found = block.values[index]
            outputs.append(self.enter(tensor, Value(found.shape, found.dtype)))
        relative = fqn[len(self.frame.prefix) :]
        call = BlockCall(block, relative)
        node = Node(
            "block",
            call,
            args,
            {},
            tuple(outputs),
            self.path,
            file,
            line,
            torch.is_grad_enabled(),
            self.refs(out),
        )
        graph.nodes.append(node)
        return out

    def _again(self, known: "_Recorded", fqn: str, args: Any, kwargs: Any) -> Any:
        if isinstance(known.result, torch.Tensor):
            out = self.fresh(known.result)
        else:
            fresh = {id(tensor): self.fresh(tensor) for tensor in tensor_leaves(known.result)}
            out = replace_tensors(known.result, lambda tensor: fresh[id(tensor)])
        return self._call(known.block, fqn, distinct(tensor_leaves((args, kwargs))), out)

    def _same(self, known: "_Recorded", module: nn.Module, fqn: str) -> bool:
        if known.shape != self._shape(module, fqn):
            return False
        for path, read in known.reads.items():
            held = attributes_of(module, path)
            for name, value in read.items():
                found = held.get(name, ABSENT)
                if type(found) in (list, dict, set) or (found is not value and not _equal(found, value)):
                    return False
        return True

    def _traits(self, module: nn.Module, fqn: str) -> Any:
        """The class tree with what is registered in it."""
        prefix = fqn + "."
        seen: dict[int, int] = {}
        parts: list[Any] = []

        def visit(child: nn.Module, path: str) -> None:
            state = child.__dict__
            hooks = tuple(state["_forward_pre_hooks"].values()) + tuple(state["_forward_hooks"].values())
            forward = state.get("forward")
            run = function_of(forward.args[2]) if isinstance(forward, functools.partial) else None
            parts.append((path, self._kind(child), state["training"], hooks, run))
            for kept in (state["_parameters"], state["_buffers"]):
                for name, tensor in kept.items():
                    if tensor is None:
                        parts.append((name, None))
                        continue
                    first = self.frames[0].params[id(tensor)]
                    inside = seen.setdefault(id(tensor), len(seen))
                    home = inside if first.startswith(prefix) else first
                    parts.append((name, tensor.shape, tensor.dtype, tensor.requires_grad, home))
            for name, grandchild in state["_modules"].items():
                if grandchild is not None:
                    visit(grandchild, f"{path}.{name}")

        visit(module, "")
        return parts

    def _watch(self, module: nn.Module) -> list[tuple[nn.Module, type]]:
        """Have every module of a block note the attributes that are read from it."""
        restore: list[tuple[nn.Module, type]] = []
        for child in module.modules():
            kind = type(child)
            if kind in self.watched:
                continue
            restore.append((child, kind))
            child.__class__ = self._watcher(kind)
        return restore

    def _kind(self, module: nn.Module) -> type:
        """The module's own class, also while it is watched."""
        return self.watched.get(type(module), type(module))

    def _watcher(self, kind: type) -> type:
        for watcher, watched in self.watched.items():
            if watched is kind:
                return watcher
        tracer = self
        inherited: Any = kind.__getattribute__

        def getter(self: Any, name: str) -> Any:
            if name == "__dict__":
                if not is_ours(sys._getframe(1).f_code.co_filename):
                    tracer.reads.append((self, name))
            elif not name.startswith("__") and name not in MODULE_STATE:
                tracer.reads.append((self, name))
            return inherited(self, name)

        body = {"__getattribute__": getter, "__module__": kind.__module__}
        watcher = types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))
        self.watched[watcher] = kind
        return watcher


@define(slots=True, eq=False)
class _Recorded:
    """A block that was run once, and what a later module must share with it to be the same."""

    block: Block
    shape: Any
    reads: dict[tuple[str, ...], dict[str, Any]]
    """Path in the block -> {attribute: value}, for the attributes that forward read; `ABSENT` where the module has
    none of its own, and its class does, or nobody."""
    inputs: Any
    result: Any


def _equal(one: Any, two: Any) -> bool:
    plain = (bool, int, float, str, tuple, torch.dtype, torch.device, frozenset)
    return type(one) is type(two) and isinstance(one, plain) and one == two


def _attributes(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(value)) for child in module.modules() for name, value in child.__dict__.items()]


def _structure(tree: Any) -> Any:
    """A nest of arguments as something that compares: shapes and dtypes for tensors, which is which, constants."""
    order: dict[int, int] = {}

    def visit(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return ("tensor", tuple(item.shape), item.dtype, order.setdefault(id(item), len(order)))
        if isinstance(item, (list, tuple)):
            return (type(item).__name__, *(visit(one) for one in item))
        if isinstance(item, dict):
            return ("dict", *((key, visit(one)) for key, one in item.items()))
        if isinstance(item, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            return (type(item), item)
        return ("object", id(item))

    return visit(tree)
