"""Type the backward: over which axes each cotangent is still owed, and where it is completed.

On an axis where a value is replicated its cotangent is complete on every rank, or a pending sum ("owed").
An obligation is discharged once: at the outermost declared point that all the uses that owe it share and no
complete use does, or with the parameter's gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
from attrs import define, field, frozen

from shardspec.infer import Inference, TypedGraph
from shardspec.mesh import BATCH_AXES
from shardspec.moves import Move, adjoint
from shardspec.program import Node, Ref
from shardspec.rules.operator import Type


@frozen
class Cot:
    """A cotangent's obligations: `owed` axes, and axes owed but held by points that can discharge them."""

    owed: frozenset[str] = frozenset()
    held: tuple[tuple[str, frozenset[int]], ...] = ()
    """axis -> nodes of the points, in this graph, that would complete it."""

    def holders(self, axis: str) -> frozenset[int] | None:
        return next((nodes for name, nodes in self.held if name == axis), None)


COMPLETE = Cot()


@frozen(eq=False)
class Conflict:
    """A value some of whose uses owe a sum that others do not."""

    typed: TypedGraph
    value: int
    axis: str
    owing: tuple[int, ...]
    """Nodes of the uses that owe."""
    complete: tuple[int, ...]
    fqn: str


@define(eq=False)
class Backward:
    """The backward of a typed graph: what each point does, what enters, and what its parameters owe."""

    typed: TypedGraph
    moves: dict[int, tuple[Move, ...]] = field(factory=dict)
    """Point's node -> the moves of its backward."""
    owed: dict[int, frozenset[str]] = field(factory=dict)
    """Value of a parameter -> axes over which its gradient is a pending sum."""
    inputs: tuple[Cot | None, ...] = ()
    calls: dict[int, "Backward"] = field(factory=dict)
    alive: set[int] = field(factory=set)
    """Points that a gradient passes, and operators with a local form of their own."""
    completed: dict[int, tuple[frozenset[str] | None, ...]] = field(factory=dict)
    """Call of an experts module that a gradient passes -> the axes over which it completes the gradients of the rows
    that enter it, and of their weights; None for what wants no gradient."""


@define(eq=False)
class Cotangents:
    """The backward pass of one typed program."""

    inference: Inference
    conflicts: list[Conflict] = field(factory=list)
    memo: dict[Any, Backward] = field(factory=dict)

    def program(self, typed: TypedGraph, seeds: Iterable[int]) -> Backward:
        """The backward from `seeds`, values whose cotangents are complete."""
        live = differentiable(typed)
        return self._graph(typed, dict.fromkeys((seed for seed in seeds if seed in live), COMPLETE), live)

    def _graph(self, typed: TypedGraph, seeds: dict[int, Cot], live: set[int]) -> Backward:
        back = Backward(typed)
        uses: dict[int, list[tuple[int, Cot]]] = {index: [(-1, cot)] for index, cot in seeds.items()}
        discharged: dict[int, set[str]] = {}
        arrived: dict[int, frozenset[str]] = {}
        self._walk(typed, back, uses, discharged, arrived, live)
        for index in typed.graph.params.values():
            if index in uses and index in live:
                back.owed[index] = self._settle(typed, index, uses[index], discharged).owed
        back.inputs = tuple(
            self._settle(typed, index, uses[index], discharged) if index in uses and index in live else None
            for index in typed.graph.inputs
        )
        for position, owed in arrived.items():
            back.alive.add(position)
            step = typed.transitions.get(position)
            if step is None:
                continue
            extra = discharged.get(position, set())
            moves, _ = adjoint(step.moves, set(owed) | extra, step.after.shape)
            moved = {move.axis for move in step.moves}
            shape = step.before.shape
            last = tuple(Move("all_reduce", axis, shape=shape) for axis in sorted(extra - moved))
            if moves or last:
                back.moves[position] = moves + last
        return back

    def _walk(
        self,
        typed: TypedGraph,
        back: Backward,
        uses: dict[int, list[tuple[int, Cot]]],
        discharged: dict[int, set[str]],
        arrived: dict[int, frozenset[str]],
        live: set[int],
    ) -> None:
        for position in range(len(typed.graph.nodes) - 1, -1, -1):
            node = typed.graph.nodes[position]
            cots = {
                index: self._merge(typed, index, uses[index], discharged)
                for index in node.outputs
                if index is not None and index in uses
            }
            if not cots:
                continue
            if node.op == "point":
                cot = next(iter(cots.values()))
                source = node.args[0].index
                if source in live:
                    sent = self._point(typed, position, cot, arrived)
                    uses.setdefault(source, []).append((position, sent))
            elif node.op == "block":
                self._block(typed, back, position, node, cots, uses, discharged, live)
            elif node.op == "experts":
                self._experts(typed, back, position, node, cots, uses, discharged, live)
            else:
                self._operator(typed, back, position, node, cots, uses, discharged, live)

    def _point(self, typed: TypedGraph, position: int, cot: Cot, arrived: dict[int, frozenset[str]]) -> Cot:
        step = typed.transitions.get(position)
        arrived[position] = cot.owed | {axis for axis, _ in cot.held}
        if step is None:
            return cot
        moved = {move.axis for move in step.moves}
        axes = sorted(arrived[position] - moved)
        arrived[position] &= moved
        owed = adopted(typed, typed.graph.nodes[position].args[0].index, Type(step.before))
        return Cot(owed, tuple((axis, frozenset({position})) for axis in axes if axis not in owed))

    def _operator(
        self,
        typed: TypedGraph,
        back: Backward,
        position: int,
        node: Node,
        cots: dict[int, Cot],
        uses: dict[int, list[tuple[int, Cot]]],
        discharged: dict[int, set[str]],
        live: set[int],
    ) -> None:
        if not node.grad or node.op == "detach" or position not in typed.consumed:
            return
        refs = differentiated(node)
        moving = {ref.index for ref in refs if ref.index in live}
        if not moving:
            return
        if position in typed.lowering:
            back.alive.add(position)
        if len(moving) > 1 or any(typed.graph.values[index].kind == "param" for index in moving):
            cots = {index: self._complete(cot, discharged) for index, cot in cots.items()}
        for ref, read in zip(refs, typed.consumed[position], strict=False):
            if ref.index in live:
                cot = self._operand(typed, position, ref.index, read, cots)
                uses.setdefault(ref.index, []).append((position, cot))

    def _operand(self, typed: TypedGraph, position: int, operand: int, read: Type, cots: dict[int, Cot]) -> Cot:
        """Rule of the design: a replicated operand's cotangent is owed where an output is split or pending.

        Of several outputs all must be so: what comes of the others is complete on every rank.
        """
        owed = set(adopted(typed, operand, read))
        held: dict[str, frozenset[int]] = {}
        for axis in self.inference.sizes:
            if axis in read.layout.sharded or read.layout.pending_kind(axis):
                continue
            shares = complete = False
            for index, cot in cots.items():
                layout = typed.layout(index)
                holders = cot.holders(axis)
                if axis in layout.sharded or layout.pending_kind(axis) or axis in cot.owed:
                    shares = True
                elif holders:
                    held[axis] = held.get(axis, frozenset()) | holders
                else:
                    complete = True
            if shares:
                owed.add(axis)
            if shares and complete:
                self.conflicts.append(Conflict(typed, operand, axis, (position,), (position,), typed.fqn))
        return Cot(frozenset(owed), tuple(sorted((a, n) for a, n in held.items() if a not in owed)))

    def _block(
        self,
        typed: TypedGraph,
        back: Backward,
        position: int,
        node: Node,
        cots: dict[int, Cot],
        uses: dict[int, list[tuple[int, Cot]]],
        discharged: dict[int, set[str]],
        live: set[int],
    ) -> None:
        inner = typed.calls.get(position)
        if inner is None:
            return
        settled = {index: self._complete(cot, discharged) for index, cot in cots.items()}
        live_args = tuple(ref.index in live for ref in node.args)
        ends = tuple(settled.get(index) if index is not None else None for index in node.outputs)
        key = (id(inner), ends, live_args)
        if key not in self.memo:
            seeds = {i: cot for i, cot in zip(inner.graph.outputs, ends, strict=True) if cot is not None}
            inside = differentiable(inner, live_args)
            self.memo[key] = self._graph(inner, {i: cot for i, cot in seeds.items() if i in inside}, inside)
        found = self.memo[key]
        back.calls[position] = found
        for ref, cot in zip(node.args, found.inputs, strict=True):
            if cot is not None:
                uses.setdefault(ref.index, []).append((position, cot))

    def _experts(
        self,
        typed: TypedGraph,
        back: Backward,
        position: int,
        node: Node,
        cots: dict[int, Cot],
        uses: dict[int, list[tuple[int, Cot]]],
        discharged: dict[int, set[str]],
        live: set[int],
    ) -> None:
        """An experts module completes what its own forward owes its inputs; its parameters owe that, and over the
        axes that split the tokens and not the parameter."""
        body = typed.bodies.get(position)
        if body is None or not node.grad:
            return
        refs, read = node.operands, typed.consumed[position]
        entering = tuple(ref.index in live for ref in refs[:2])
        cot = self._complete(next(iter(cots.values())), discharged)
        inside = differentiable(body, entering)
        result = body.graph.outputs[0]
        found = self._graph(body, {result: cot} if result in inside else {}, inside)
        done: list[frozenset[str] | None] = []
        for ref, inner in zip(refs[:2], found.inputs, strict=True):
            owed = inner.owed if inner is not None else frozenset[str]()
            done.append(owed - cot.owed if ref.index in live else None)
            if ref.index in live:
                uses.setdefault(ref.index, []).append((position, Cot(owed & cot.owed)))
        back.completed[position] = tuple(done)
        rows = read[0].layout.sharded.keys()
        for name, ref, kind in zip(node.func.names, refs[3:], read[3:], strict=True):
            if ref.index in live:
                index = body.graph.params.get(name)
                owed = found.owed.get(index, frozenset[str]()) if index is not None else frozenset[str]()
                owed |= rows - kind.layout.sharded.keys()
                uses.setdefault(ref.index, []).append((position, Cot(owed)))

    def _complete(self, cot: Cot, discharged: dict[int, set[str]]) -> Cot:
        """Have the points that hold an obligation discharge it; but what is owed over axes that split only data and
        storage goes with the parameters' gradients, which are summed over them in any case."""
        owed = {axis for axis, _ in cot.held if axis in (*BATCH_AXES, "cp")}
        for axis, nodes in cot.held:
            for position in nodes if axis not in owed else ():
                discharged.setdefault(position, set()).add(axis)
        return Cot(cot.owed | owed)

    def _settle(
        self, typed: TypedGraph, index: int, uses: list[tuple[int, Cot]], discharged: dict[int, set[str]]
    ) -> Cot:
        return self._complete(self._merge(typed, index, uses, discharged), discharged)

    def _merge(
        self, typed: TypedGraph, index: int, uses: list[tuple[int, Cot]], discharged: dict[int, set[str]]
    ) -> Cot:
        """The sum of the uses' cotangents: all owe, or none does, or points make them complete."""
        if len(uses) == 1:
            return uses[0][1]
        owed: set[str] = set()
        held: dict[str, frozenset[int]] = {}
        for axis in self.inference.sizes:
            owing = [at for at, cot in uses if axis in cot.owed]
            holders = [cot.holders(axis) for _, cot in uses]
            holding = [nodes for nodes in holders if nodes]
            done = [at for (at, cot), nodes in zip(uses, holders, strict=True) if axis not in cot.owed and not nodes]
            if owing and done:
                if self._state(typed, index, axis):
                    self.conflicts.append(Conflict(typed, index, axis, tuple(owing), tuple(done), typed.fqn))
            elif owing:
                owed.add(axis)
            elif holding and done:
                for nodes in holding:
                    for position in nodes:
                        discharged.setdefault(position, set()).add(axis)
            elif holding:
                held[axis] = frozenset().union(*holding)
        return Cot(frozenset(owed), tuple(sorted(held.items())))

    def _state(self, typed: TypedGraph, index: int, axis: str) -> bool:
        """Whether the value is replicated on the axis, so that its cotangent has a state there."""
        kind = typed.types[index]
        return kind is not None and axis not in kind.layout.sharded and not kind.layout.pending_kind(axis)


def adopted(typed: TypedGraph, value: int, read: Type) -> frozenset[str]:
    """The axes that split a use of a value along a dim that is uniform in the value itself.

    Each rank then holds a part of the dim, of whose cotangent `expand` makes a sum: a sum that is owed.
    """
    return frozenset(read.layout.sharded.keys() - typed.layout(value).sharded.keys())


SHAPE_ONLY = frozenset(
    f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | frozenset(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty"))
"""Operators that read no value of an operand."""

AS_ANOTHER = frozenset({"view_as", "expand_as", "reshape_as", "type_as"})
"""Operators that read of their second operand its shape or dtype alone."""


def differentiated(node: Node) -> tuple[Ref, ...]:
    """The operands that a gradient may reach: the first ones."""
    if node.op in SHAPE_ONLY:
        return ()
    return node.operands[:1] if node.op in AS_ANOTHER else node.operands


def differentiable(typed: TypedGraph, live_inputs: tuple[bool, ...] = (), *, params: bool = True) -> set[int]:
    """The values that a gradient reaches: floating point, and made from what wants one.

    Args:
        live_inputs: which of the graph's inputs do.
        params: whether parameters do, those that are trained.
    """
    graph = typed.graph
    key = (params, *live_inputs)
    if key in typed.live:
        return typed.live[key]
    live = {index for index, alive in zip(graph.inputs, live_inputs, strict=False) if alive}
    live |= {i for i, value in enumerate(graph.values) if params and value.kind == "param" and value.requires_grad}
    for position, node in enumerate(graph.nodes):
        if not node.grad or node.op == "detach":
            continue
        reached = any(ref.index in live for ref in differentiated(node))
        if not reached and node.op != "block":
            continue
        outs = [index for index in node.outputs if index is not None and _carries_gradient(graph.values[index].dtype)]
        if node.op == "block":
            inner = typed.calls.get(position)
            if inner is None:
                continue
            inside = differentiable(inner, tuple(ref.index in live for ref in node.args), params=params)
            outs = [i for i, o in zip(node.outputs, inner.graph.outputs, strict=True) if o in inside and i is not None]
        live.update(outs)
    typed.live[key] = live
    return live


def _carries_gradient(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
