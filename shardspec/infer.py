"""Type a program: a layout for every value, a transition for every declared point, or the reason why not."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field, frozen

from shardspec.aliasing import PARAMETER_WRITE, writes
from shardspec.diagnostics import Location
from shardspec.kin import Kin
from shardspec.layout import Layout, Sizes, dim_axes, replicated
from shardspec.moves import Move, NoTransition, transition
from shardspec.program import Block, BlockCall, Graph, Node, Program, Ref, tensors
from shardspec.renumbering import check_numbers, check_rows
from shardspec.rules.attention import ATTENTION, check_halves
from shardspec.rules.experts import type_experts, with_result
from shardspec.rules.match import fold
from shardspec.rules.operator import RULES, Call, Refusal, Type, Typed, all_replicated, as_replicated, named_arguments
from shardspec.rules.parse import Entry, ParamClaim
from shardspec.rules.pointwise import is_pointwise, pointwise
from shardspec.sequence import AXIS

LayoutOf = Callable[[Entry, str, tuple[int, ...]], Layout | None]


@frozen(eq=False)
class Transition:
    """What a declared point does: the layouts on both sides and the moves between them."""

    entry: Entry
    before: Layout
    after: Layout
    moves: tuple[Move, ...]


@define(eq=False)
class TypedGraph:
    """A graph with a type for each value, as one table and mesh give it."""

    graph: Graph
    fqn: str
    """Where it was typed: the block's FQN, or "" for the program."""
    types: list[Type | None]
    consumed: dict[int, tuple[Type, ...]] = field(factory=dict)
    """Node -> what its operands were read as."""
    local: dict[int, dict[str, Any]] = field(factory=dict)
    lowering: dict[int, str] = field(factory=dict)
    divides: dict[int, tuple[tuple[tuple[str, ...], int], ...]] = field(factory=dict)
    """Node -> what the sizes of axes must divide there."""
    transitions: dict[int, Transition] = field(factory=dict)
    calls: dict[int, "TypedGraph"] = field(factory=dict)
    names: dict[int, str] = field(factory=dict)
    """Point's node -> the name, relative to the graph, under which a rule claims it."""
    bodies: dict[int, "TypedGraph"] = field(factory=dict)
    """Call of an experts module -> its forward, as a rank runs it on the rows that it receives."""
    live: dict[tuple[bool, ...], set[int]] = field(factory=dict)
    """Whether parameters want a gradient, and each input -> the values that one reaches."""

    def layout(self, index: int) -> Layout:
        """A value's layout."""
        found = self.types[index]
        assert found is not None, "an untyped value has no layout"
        return found.layout


@frozen(eq=False)
class Issue:
    """A refusal with the place where it happened."""

    typed: TypedGraph
    node: int
    fqn: str
    refusal: Refusal
    trails: tuple[tuple["Stop", ...], ...] = ()
    """For each refused operand, the points and parameters that it came through, nearest first."""
    frames: tuple[tuple[TypedGraph, int], ...] = ()
    """The graphs that lead to the place, from the outermost on, each with the node that runs in it."""

    @property
    def trail(self) -> tuple["Stop", ...]:
        """All of them in one row."""
        return tuple(stop for trail in self.trails for stop in trail)


@frozen(eq=False)
class Stop:
    """A point on the way to a refused operand: a place for a rule, or the rule that stands there."""

    name: str
    layout: Layout
    shape: tuple[int, ...]
    entry: Entry | None
    source: bool = False
    """Whether nothing comes before it: a parameter, a buffer or a batch entry."""

    def carries(self, axis: str) -> bool:
        """Whether the value is split or pending over the axis here."""
        return axis in self.layout.sharded or self.layout.pending_kind(axis) is not None


def absolute(fqn: str, relative: str) -> str:
    """A name relative to a block, in full."""
    if not fqn:
        return relative
    if not relative or relative.startswith(":"):
        return fqn + relative
    return f"{fqn}.{relative}"


def graphs(graph: Graph, fqn: str) -> Iterator[tuple[str, Graph]]:
    """A program and every call of a block, with the FQN that its names are relative to."""
    yield fqn, graph
    for node in graph.nodes:
        if node.op == "block":
            yield from graphs(node.func.block, absolute(fqn, node.func.fqn))


def no_attributes(_fqn: str, _module: Any, _axes: tuple[str, ...]) -> Mapping[str, int]:
    """Of a table without `attributes=`."""
    return {}


@define(eq=False)
class Inference:
    """The typing of one program under one table and one mesh."""

    sizes: Sizes
    params: dict[str, ParamClaim]
    points: dict[str, Entry]
    """Activation's name -> the rule that claims it."""
    layout_of: LayoutOf
    kin: Kin
    hinted: bool = True
    """Whether what is refused is to come with edits worth trying."""
    attributes: Callable[[str, Any, tuple[str, ...]], Mapping[str, int]] = no_attributes
    """(FQN, module, axes) -> what the table says of its attributes on a rank of those axes."""
    bodies: dict[Any, TypedGraph] = field(factory=dict)
    strategy: Callable[[str], str] = field(default=lambda _: "")
    """FQN of a module -> how attention that it calls reads a sequence split over cp."""
    balanced: bool = False
    """Whether cp lies head and tail."""
    alike: set[int] = field(factory=set)
    """The forwards of experts modules that are the same for an expert whatever its number and its rows."""
    issues: list[Issue] = field(factory=list)
    memo: dict[Any, tuple[TypedGraph, tuple[Type | None, ...]]] = field(factory=dict)
    stack: list[tuple[TypedGraph, int]] = field(factory=list)
    said: dict[tuple[int, str], int] = field(factory=dict)
    """(block, the FQN that stands for its own) -> a number for what the table says of it."""
    numbers: dict[tuple[Any, ...], int] = field(factory=dict)
    typed_program: Program | None = None

    def program(self, program: Program) -> TypedGraph:
        """Type the whole program; `issues` holds what was refused."""
        typed = TypedGraph(program, "", [None] * len(program.values))
        self.typed_program = program
        for name, index in program.entries.items():
            value = program.values[index]
            entry = self.points.get(name)
            layout = self.layout_of(entry, name, value.shape) if entry else None
            typed.types[index] = Type(layout) if layout else None
        self._body(typed, "")
        return typed

    def _body(self, typed: TypedGraph, fqn: str, params: Mapping[str, Type] | None = None) -> None:
        """Type the nodes of a graph.

        Args:
            params: the types of its parameters, where they are not as the table says.
        """
        graph = typed.graph
        for name, index in graph.params.items():
            typed.types[index] = params[name] if params else Type(self.params[absolute(fqn, name)].layout)
        for index, value in enumerate(graph.values):
            if value.kind == "constant":
                typed.types[index] = Type(Layout(tuple((length,) if length != 1 else () for length in value.shape)))
        for position, node in enumerate(graph.nodes):
            self._node(typed, position, node, fqn)

    def _node(self, typed: TypedGraph, position: int, node: Node, fqn: str) -> None:
        if node.op == "point":
            self._point(typed, position, node, fqn)
        elif node.op == "block":
            self._block(typed, position, node, fqn)
        elif node.op == "experts":
            self._experts(typed, position, node, fqn)
        else:
            self._operator(typed, position, node, fqn)

    def _operator(self, typed: TypedGraph, position: int, node: Node, fqn: str) -> None:
        refs = tuple(node.operands)
        kinds = [typed.types[ref.index] for ref in refs]
        known = tuple(kind for kind in kinds if kind is not None)
        if len(known) < len(kinds):
            return
        call = Call(node, typed.graph.values, known, self.sizes, refs, strategy=self._strategy(node, fqn))
        try:
            answer = type_operator(call)
            check_write(call, answer)
            if self.balanced:
                check_halves(call, answer)
        except Refusal as refusal:
            self._refuse(typed, position, fqn, refusal, refs)
            return
        typed.consumed[position] = answer.consumed
        if answer.local:
            typed.local[position] = answer.local
        if answer.divides:
            typed.divides[position] = answer.divides
        if answer.lowering:
            typed.lowering[position] = answer.lowering
        for index, kind in zip((i for i in node.outputs if i is not None), answer.outputs, strict=True):
            typed.types[index] = kind

    def _strategy(self, node: Node, fqn: str) -> str:
        return self.strategy(absolute(fqn, node.path)) if node.op == ATTENTION else ""

    def _point(self, typed: TypedGraph, position: int, node: Node, fqn: str) -> None:
        source, target = node.args[0].index, node.outputs[0]
        assert target is not None
        kind = typed.types[source]
        name, entry = self._claim(node, fqn)
        if entry is None:
            typed.types[target] = kind
            return
        after = self.layout_of(entry, absolute(fqn, name), typed.graph.values[target].shape)
        if after is None:
            return
        typed.types[target] = Type(after)
        typed.names[position] = name
        if kind is None:
            return
        before = kind.layout
        if kind.uniform and not before.pending:
            # A constant filling takes the declared layout where it stands.
            dims = [after.dims[i] if i in kind.uniform else dim for i, dim in enumerate(before.dims)]
            before = Layout(tuple(dims), before.pending)
        try:
            moves = transition(before, after, self.sizes, (AXIS,) if self.balanced else ())
        except NoTransition as error:
            axis = next((axis for axis, way in after.pending if before.pending_kind(axis) != way), "")
            what = f"{absolute(fqn, name)} cannot become {entry.rule.value}"
            stop = Stop(absolute(fqn, name), after, typed.graph.values[target].shape, entry)
            refusal = Refusal("SS306", what, why=str(error), axis=axis)
            self._refuse(typed, position, fqn, refusal, (node.args[0],), stop)
            return
        typed.consumed[position] = (Type(before),)
        typed.transitions[position] = Transition(entry, before, after, moves)

    def _claim(self, node: Node, fqn: str) -> tuple[str, Entry | None]:
        for name in node.func:
            entry = self.points.get(absolute(fqn, name))
            if entry is not None:
                return name, entry
        return node.func[0], None

    def _block(self, typed: TypedGraph, position: int, node: Node, fqn: str) -> None:
        call: BlockCall = node.func
        block, inner_fqn = call.block, self.kin.canonical(absolute(fqn, call.fqn))
        inputs = tuple(typed.types[ref.index] for ref in node.args)
        key = (id(block), inputs, self._block_key(block, inner_fqn))
        if key not in self.memo:
            inner = TypedGraph(block, inner_fqn, [None] * len(block.values))
            for index, kind in zip(block.inputs, inputs, strict=True):
                inner.types[index] = kind
            self.stack.append((typed, position))
            self._body(inner, inner_fqn)
            self.stack.pop()
            self.memo[key] = (inner, tuple(inner.types[index] for index in block.outputs))
        inner, outputs = self.memo[key]
        typed.calls[position] = inner
        for index, kind in zip(node.outputs, outputs, strict=True):
            if index is not None:
                typed.types[index] = kind

    def _experts(self, typed: TypedGraph, position: int, node: Node, fqn: str) -> None:
        """A call of an experts module: its operands, and then its forward on the rows that a rank receives."""
        refs = node.operands
        kinds = tuple(kind for ref in refs if (kind := typed.types[ref.index]) is not None)
        if len(kinds) < len(refs):
            return
        call = Call(node, typed.graph.values, kinds, self.sizes, refs)
        full = self.kin.canonical(absolute(fqn, node.func.fqn))
        try:
            answer, layouts = type_experts(call)
            body = self._body_of(typed, position, full, layouts)
            if body is None:
                return
            result = body.types[body.graph.outputs[0]]
            if result is None:
                return
            answer = with_result(answer, result)
        except Refusal as refusal:
            self._refuse(typed, position, fqn, refusal, refs)
            return
        typed.bodies[position] = body
        typed.consumed[position] = answer.consumed
        target = node.outputs[0]
        assert target is not None, "an experts module gives a tensor"
        typed.types[target] = answer.outputs[0]

    def _body_of(self, typed: TypedGraph, position: int, fqn: str, layouts: Mapping[str, Layout]) -> TypedGraph | None:
        """The typed forward of an experts module on a rank; None where something in it was refused.

        Raises:
            Refusal: where it cannot be recorded on a rank's part of its parameters.
        """
        node = typed.graph.nodes[position]
        hidden, weights = (typed.graph.values[node.args[at].index] for at in (0, 1))
        attributes = self.attributes(fqn, node.func.module, ("ep",))
        shapes = {name: layout.global_shape(self.sizes) for name, layout in layouts.items()}
        graph = node.func.record(hidden, weights, shapes, attributes)
        names = node.func.names
        whole = {name: typed.graph.values[ref.index].shape for name, ref in zip(names, node.operands[3:], strict=True)}
        if id(graph) not in self.alike:
            choices = min(2, weights.shape[1])
            check_rows(fqn, graph, node.func.record(hidden, weights, shapes, attributes, times=2, choices=choices))
            if whole != shapes:
                check_numbers(fqn, graph, node.func.record(hidden, weights, whole, {}))
            self.alike.add(id(graph))
        key = (id(graph), tuple(layouts.items()))
        if key not in self.bodies:
            inner = self.bodies[key] = TypedGraph(graph, fqn, [None] * len(graph.values))
            for index in graph.inputs:
                inner.types[index] = Type(replicated(graph.values[index].shape))
            self.stack.append((typed, position))
            self._body(inner, fqn, {name: Type(layout) for name, layout in layouts.items()})
            self.stack.pop()
        inner = self.bodies[key]
        return inner if all(kind is not None for kind in inner.types) else None

    def _block_key(self, block: Block, fqn: str) -> int:
        """A number for what the table says of a block: its parameters' layouts and the rules at its points."""
        if (id(block), fqn) in self.said:
            return self.said[id(block), fqn]
        key: list[Any] = []
        for name in block.params:
            claim = self.params.get(absolute(fqn, name))
            key.append(claim and (claim.layout, claim.storage))
        for node in block.nodes:
            if node.op == "point":
                entry = self._claim(node, fqn)[1]
                key.append(id(entry) if entry else 0)
            elif node.op == "block":
                key.append(self._block_key(node.func.block, absolute(fqn, node.func.fqn)))
            elif node.op == ATTENTION:
                key.append(self._strategy(node, fqn))
        number = self.numbers.setdefault(tuple(key), len(self.numbers))
        self.said[id(block), fqn] = number
        return number

    def blocks_like(self, typed: TypedGraph) -> list[str]:
        """The FQNs under which the table lets a block run as it does in `typed`, folded alike."""
        if not isinstance(typed.graph, Block):
            return [typed.fqn]
        assert self.typed_program is not None, "blocks are counted once a program is typed"
        key = self._block_key(typed.graph, typed.fqn)
        return [
            fqn
            for fqn, graph in graphs(self.typed_program, "")
            if graph is typed.graph
            and fold(fqn) == fold(typed.fqn)
            and self._block_key(typed.graph, self.kin.canonical(fqn)) == key
        ]

    def _refuse(
        self,
        typed: TypedGraph,
        position: int,
        fqn: str,
        refusal: Refusal,
        refs: Sequence[Ref],
        *stops: Stop,
    ) -> None:
        frames = [*self.stack, (typed, position)]

        refusal.what, refusal.why = self.named(frames, refusal.what), self.named(frames, refusal.why)
        chosen = dict.fromkeys(refusal.operands or range(len(refs)))
        trails = tuple(
            tuple(self.trail(frames, refs[operand].index, refusal.axis)) for operand in chosen if operand < len(refs)
        )
        trails = (stops, *trails) if stops else trails
        self.issues.append(Issue(typed, position, fqn, refusal, trails, tuple(frames)))

    def named(self, frames: Sequence[tuple[TypedGraph, int]], text: str) -> str:
        """A text with the names of values in place of what stands for them."""
        return VALUE.sub(lambda match: self.describe(frames, int(match.group(1))), text)

    def describe(self, frames: Sequence[tuple[TypedGraph, int]], index: int) -> str:
        """A value as a reader knows it: by its name, or by what was done to the nearest thing that has one.

        An operator's result is called after its first operand.
        """
        done: list[str] = []
        while len(done) < MOST_WORDS:
            typed, at = frames[-1]
            graph = typed.graph
            value = graph.values[index]
            if index in graph.nodes[at].outputs:
                return "the product"
            if value.name:
                return " after ".join([absolute(typed.fqn, value.name), *_listed(done)])
            if index in graph.inputs and len(frames) > 1:
                frames = frames[:-1]
                outer, call = frames[-1]
                index = outer.graph.nodes[call].args[graph.inputs.index(index)].index
                continue
            made = producer(graph, index, at)
            if made is None:
                break
            node = graph.nodes[made]
            name, entry = self._claim(node, typed.fqn) if node.op == "point" else ("", None)
            if name and (entry is not None or ":" not in name):
                return " after ".join([absolute(typed.fqn, name), *_listed(done)])
            sources = list(dict.fromkeys(node.operands))
            if node.op == "block" or not sources:
                text = absolute(typed.fqn, node.func.fqn) if node.op == "block" else f"the result of {node.op}"
                return " after ".join([text, *_listed(done)])
            if node.op not in UNSAID and node.op != "point":
                done.append(node.op)
            index = sources[0].index
        return " after ".join(["a constant" if not done else "a value", *_listed(done)])

    def trail(self, frames: Sequence[tuple[TypedGraph, int]], index: int, axis: str) -> Iterator[Stop]:
        """The points and parameters that a value of the innermost frame came through, nearest first."""
        yield from self._trail(frames, index, set(), axis)

    def _trail(
        self, frames: Sequence[tuple[TypedGraph, int]], index: int, seen: set[tuple[int, int]], axis: str
    ) -> Iterator[Stop]:
        typed, _ = frames[-1]
        graph, fqn = typed.graph, typed.fqn
        if (id(typed), index) in seen or len(seen) > MOST_STEPS:
            return
        seen.add((id(typed), index))
        value = graph.values[index]
        if value.kind in ("param", "buffer", "entry"):
            name = absolute(fqn, value.name)
            claim = self.params.get(name)
            entry = claim.entry if claim else self.points.get(name)
            kind = typed.types[index]
            if entry is not None and kind is not None:
                yield Stop(name, kind.layout, value.shape, entry, source=True)
            return
        if index in graph.inputs and len(frames) > 1:
            outer, position = frames[-2]
            source = outer.graph.nodes[position].args[graph.inputs.index(index)].index
            yield from self._trail(frames[:-1], source, seen, axis)
            return
        node_at = producer(graph, index)
        if node_at is None:
            return
        node = graph.nodes[node_at]
        if node.op == "point":
            kind = typed.types[index]
            name, entry = self._claim(node, fqn)
            if kind is not None:
                yield Stop(absolute(fqn, name), kind.layout, value.shape, entry)
            if entry is not None:
                return
        refs = list(dict.fromkeys(node.operands))
        if contracts(typed, node, axis):
            # The sum over the axis begins here: what came before is not the matter, the parameter is.
            refs = [ref for ref in refs if graph.values[ref.index].kind == "param"] or refs
        for ref in refs:
            yield from self._trail(frames, ref.index, seen, axis)


VALUE = re.compile(r"<value (\d+)>")
"""An operand in a refusal's text."""

MOST_WORDS = 12
"""How many operators a value's description names."""

UNSAID = frozenset({"detach", "clone", "contiguous", "alias", "to", "_to_copy", "lift_fresh"})
"""Operators that a reader need not hear of."""


def _listed(done: Sequence[str]) -> list[str]:
    """The operators of a description, first done first."""
    return [", ".join(reversed(done))] if done else []


MOST_STEPS = 200
"""How far back a refused operand is followed."""


def contracts(typed: TypedGraph, node: Node, axis: str) -> bool:
    """Whether a node's result is pending over an axis that its operands are split over."""
    outs = [kind for index in node.outputs if index is not None and (kind := typed.types[index])]
    reads = [kind for ref in tensors(node.args) if (kind := typed.types[ref.index])]
    return any(kind.layout.pending_kind(axis) for kind in outs) and any(axis in kind.layout.sharded for kind in reads)


def producer(graph: Graph, index: int, before: int | None = None) -> int | None:
    """The node that makes a value, among those in front of another where that is given."""
    return next((at for at, node in enumerate(graph.nodes[:before]) if index in node.outputs), None)


def type_operator(call: Call) -> Typed:
    """Type one operator by its rule; without one, only what is replicated everywhere passes.

    Raises:
        Refusal: by the rule, or SS305 where there is none.
    """
    random = is_random(call.node)
    if random and call.node.func not in RULES and call.sizes:
        raise _random_refusal(call)
    if call.node.custom and call.sizes:
        # On replicated values too: the gradient that reaches them may be a sum that is owed.
        raise Refusal(
            "SS315",
            f"{call.node.op} runs in a custom autograd function",
            why="the backward that such a function declares is not seen, so that nothing says which gradients are owed",
            operands=tuple(i for i, kind in enumerate(call.types) if kind.layout.sharded or kind.layout.pending),
            axis=next((a for kind in call.types for a in kind.layout.sharded), ""),
            advice=(
                "write the function with torch operators, and let autograd derive its backward",
                "or make an operator of it with torch.library.custom_op, and give that one a rule: ss.register_rule",
                "where it is torch's checkpoint, drop it: ss.Policy(remat=...) does the same",
            ),
        )
    whole = all_replicated(call) and not any(kind.uniform for kind in call.types)
    if whole and not random and (call.node.func not in RULES or not _is_view_or_fill(call)):
        # Every rank computes the same.
        return as_zeros(call, as_replicated(call))
    found = RULES.get(call.node.func)
    if found is not None:
        return as_zeros(call, found(call))
    if is_pointwise(call.node.func):
        return pointwise(call)
    raise Refusal(
        "SS305",
        f"no rule is known for {call.node.func}",
        why="an operator without a rule may only read values that are replicated and complete on every axis",
        operands=tuple(i for i, kind in enumerate(call.types) if kind.layout.sharded or kind.layout.pending),
        axis=next(
            (a for kind in call.types for a in (*kind.layout.sharded, *(p[0] for p in kind.layout.pending))),
            "",
        ),
        advice=(f'give it one: ss.register_rule(torch.ops.{call.node.func}, "...", samples=[...])',),
    )


def as_zeros(call: Call, answer: Typed) -> Typed:
    """The answer, which says so where the result is all zeros."""
    copied = call.node.op in UNSAID and call.types[0].zero
    if call.node.op not in ZEROS and not copied:
        return answer
    return Typed(tuple(evolve(kind, zero=True) for kind in answer.outputs), answer.consumed)


ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
"""Operators whose results are all zeros."""


def check_write(call: Call, answer: Typed) -> None:
    """A write in place must leave the layout as it was, and be seen through every alias.

    Raises:
        Refusal: SS314 otherwise.
    """
    if not writes(call.node.func) or not call.types:
        return
    before, after = answer.consumed[0].layout, answer.outputs[0].layout
    if before != after:
        raise Refusal(
            "SS314",
            f"{call.node.op} changes the layout of what it writes to",
            why=f"the tensor is {before}, the result {after}: other names of the tensor would keep the old layout",
            operands=(0,),
            axis=next(iter({*before.sharded, *after.sharded, *(axis for axis, _ in after.pending)}), ""),
            advice=("use the form of the operator that makes a new tensor",),
        )
    if call.node.unsafe == PARAMETER_WRITE:
        raise Refusal(
            "SS314",
            f"{call.node.op} writes to a parameter of the model",
            why="a step reads the parameters and gives back others; what forward writes into them is lost on a mesh",
            operands=(0,),
            advice=("compute a new tensor from the parameter, or make it a buffer",),
        )
    if call.node.unsafe and not all_replicated(call):
        raise Refusal(
            "SS314",
            f"{call.node.op} writes in place, and {call.node.unsafe}",
            why="the typing follows a write only through the tensor's own names",
            operands=(0,),
            axis=next(iter(call.types[0].layout.sharded), ""),
            advice=("use the form of the operator that makes a new tensor",),
        )


def _is_view_or_fill(call: Call) -> bool:
    return not call.types or call.node.op in (
        "expand",
        "broadcast_to",
        "expand_as",
        "repeat",
        "slice",
        "narrow",
        "split",
        "chunk",
    )


def is_random(node: Node) -> bool:
    """Whether a call draws random numbers."""
    if node.op in ("dropout", "alpha_dropout", "feature_dropout"):
        return bool(node.args[1]) and bool(node.args[2])
    if node.op == "scaled_dot_product_attention":
        return bool(named_arguments(node).get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in getattr(node.func, "tags", ())


def _random_refusal(call: Call) -> Refusal:
    return Refusal(
        "SS312",
        f"{call.node.op} draws random numbers",
        why="on a mesh they must agree on replicas and differ on shards; dropout is keyed so, this operator is not",
        advice=("call model.eval(), or set the probability to 0",),
    )


def model_location(issue: Issue) -> Location:
    """The model's line of a refused operation."""
    return issue.typed.graph.nodes[issue.node].location


FRESH = ("X", "Y", "Z")
"""Names for a whole vector of a size that no factor of the table has: of what has rows, a dim may stand for them."""


def spec_text(layout: Layout, shape: Sequence[int], known: dict[str, int], prefer: Sequence[str] = ()) -> str | None:
    """A spec for a layout, with names of factors that have the dims' sizes; None where no name fits.

    Args:
        prefer: the name of each dim, where it has the dim's size.
    """
    parts: list[str] = []
    used: set[str] = set(prefer)
    for position, (dim, length) in enumerate(zip(layout.dims, shape, strict=True)):
        axes = dim_axes(dim)
        if dim[: len(axes)] != axes:
            return None
        names = [prefer[position]] if position < len(prefer) and known.get(prefer[position]) == length else []
        names += [name for name, size in known.items() if size == length and name not in used]
        if not names and len(shape) == 1 and not axes:
            names = [name for name in FRESH if name not in known and name not in used]
        if not names:
            return None
        used.add(names[0])
        mark = "" if not axes else f"@{axes[0]}" if len(axes) == 1 else f"@({','.join(axes)})"
        parts.append(names[0] + mark)
    parts += [f"+{axis}" for axis, _ in layout.pending]
    return " ".join(parts)


def group_issues(issues: Sequence[Issue]) -> list[list[Issue]]:
    """Issues with one cause together: the same operator and axis at the same line of the same folded path."""
    groups: dict[Any, list[Issue]] = {}
    for issue in issues:
        node = issue.typed.graph.nodes[issue.node]
        key = (issue.refusal.code, issue.refusal.axis, node.op, node.file, node.line, fold(issue.fqn))
        groups.setdefault(key, []).append(issue)
    return list(groups.values())
