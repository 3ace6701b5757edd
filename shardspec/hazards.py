"""What types right and would still run wrong: gradients through maxima, parameters read while they are not gathered,
writes in place across a boundary."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import frozen

from shardspec.aliasing import writes
from shardspec.cotangent import Backward
from shardspec.diagnostics import Diagnostic, Location
from shardspec.infer import TypedGraph, absolute, producer
from shardspec.layout import MAX, MIN
from shardspec.lower import Passed, distinct_calls, passed_points
from shardspec.plan import ParamPlan, UnitPlan
from shardspec.program import Graph, Node, Ref, tensors
from shardspec.rules.match import as_pattern, fold
from shardspec.rules.operator import named_arguments
from shardspec.stages import TypedProgram


def hazards(typed: TypedProgram, params: Mapping[str, ParamPlan], units: Sequence[UnitPlan]) -> Iterator[Diagnostic]:
    """SS216, SS314, SS316 and SS317, each place in the model once."""
    told: set[tuple[str, Location]] = set()
    for found in (
        *gradients_of_maxima(typed),
        *reads_outside_units(typed, params, units),
        *writes_across(typed, params, units),
        *passages_that_differ(typed),
    ):
        place = (found.code, found.locations[0])
        if place not in told:
            told.add(place)
            yield found


def gradients_of_maxima(typed: TypedProgram) -> Iterator[Diagnostic]:
    """SS316 for a gradient that passes a maximum over ranks: it belongs to the rank that holds it alone."""
    for fqn, graph, back in distinct_calls(typed):
        for position in back.alive if back else ():
            step = graph.transitions.get(position)
            for axis, kind in step.before.pending if step else ():
                if step is not None and kind in (MAX, MIN):
                    name, node = absolute(fqn, graph.names[position]), graph.graph.nodes[position]
                    yield Diagnostic(
                        code="SS316",
                        what=f"a gradient passes {name}, the {kind} over {axis} of parts",
                        why="each rank would send it to its own largest element; on the whole only one of them has it",
                        locations=(node.location, step.entry.location),
                        advice=(f"detach what the {kind} is taken of, or gather it before",),
                    )


def passages_that_differ(typed: TypedProgram) -> Iterator[Diagnostic]:
    """SS317 for a point that is passed more than once and would have to do another thing each time."""
    first: dict[str, tuple[Passed, TypedGraph, int]] = {}
    for name, passed, graph, position in passed_points(distinct_calls(typed)):
        known = first.setdefault(name, (passed, graph, position))
        if known[0][1] is None and known[0][0] == passed[0]:
            first[name] = passed, graph, position
        elif known[0][0] != passed[0] or passed[1] not in (None, known[0][1]):
            one, two = known[1].graph.nodes[known[2]], graph.graph.nodes[position]
            way = "forward" if known[0][0] != passed[0] else "backward"
            yield Diagnostic(
                code="SS317",
                what=f"{fold(name)} is passed more than once, and {way} it would have to move something else each time",
                why=f"{_moves(known[0], way)} at {one.location.file}:{one.location.line}, {_moves(passed, way)} here",
                locations=(two.location, graph.transitions[position].entry.location),
                advice=("declare the activations that the calls are made from, so that they are laid out alike",),
            )


def _moves(passed: Passed, way: str) -> str:
    moves = passed[0] if way == "forward" else passed[1] or ()
    return " then ".join(f"{move.kind} over {move.axis}" for move in moves) or "nothing"


def reads_outside_units(
    typed: TypedProgram, params: Mapping[str, ParamPlan], units: Sequence[UnitPlan]
) -> Iterator[Diagnostic]:
    """SS216 for a stored parameter that is read while its unit does not run, and so is not gathered."""
    modules = {unit.name: unit.modules for unit in units}
    known: dict[int, list[tuple[Node, str]]] = {}
    for fqn, graph, _ in distinct_calls(typed):
        if id(graph) not in known:
            known[id(graph)] = list(parameter_reads(graph))
        for node, name in known[id(graph)]:
            plan = params.get(absolute(fqn, name))
            if plan is None or not plan.storage or not plan.unit:
                continue
            path = absolute(fqn, node.path)
            if not any(inside(path, module) for module in modules[plan.unit]):
                yield Diagnostic(
                    code="SS216",
                    what=f"{plan.first} is read in {path or 'the model'}, outside its unit {plan.unit}",
                    why=f"it is stored over {', '.join(plan.storage)}, and whole only while its unit runs",
                    locations=(node.location, typed.claims.of(plan.first).entry.location),
                    advice=(
                        f'write r"{as_pattern(fold(path))}" in units in its place'
                        if path
                        else "leave it to the root unit",
                    ),
                )


def parameter_reads(typed: TypedGraph) -> Iterator[tuple[Node, str]]:
    """Each operation that reads a parameter, with the parameter's name relative to the graph."""
    names = {index: name for name, index in typed.graph.params.items()}
    for node in typed.graph.nodes:
        if node.op not in ("point", "block"):
            for index in dict.fromkeys(ref.index for ref in node.operands):
                if index in names:
                    yield node, names[index]


def inside(path: str, module: str) -> bool:
    """Whether a module is another or lies in it."""
    return path == module or path.startswith(f"{module}.")


@frozen(eq=False)
class Frame:
    """A graph that runs, its backward, and where in it the next inner graph is called."""

    typed: TypedGraph
    back: Backward | None
    at: int


def writes_across(
    typed: TypedProgram, params: Mapping[str, ParamPlan], units: Sequence[UnitPlan]
) -> Iterator[Diagnostic]:
    """SS314 for a write to a tensor that on a mesh is not the one that the caller holds."""
    stored = {plan.unit for plan in params.values() if plan.storage}
    gathered = {module for unit in units if unit.name in stored for module in unit.modules}
    for frames in writing([Frame(typed.forward, typed.backward, 0)], set()):
        typed_graph = frames[-1].typed
        node = typed_graph.graph.nodes[frames[-1].at]
        index = target(node)
        reason, rules = boundary(frames, index, gathered)
        if not reason and typed.mesh.world > 1 and read_again(frames, index):
            reason = "a tensor from outside its block, which is read again there"
        if reason:
            blocks = typed.inference.blocks_like(typed_graph)
            yield Diagnostic(
                code="SS314",
                what=f"{node.op} writes in place to {reason}",
                why="without the mesh the two are one tensor, and the write is seen on both sides",
                locations=(node.location, *rules),
                matches=f"{fold(typed_graph.fqn)} ({len(blocks)} blocks)" if len(blocks) > 1 else "",
                advice=("use the form of the operator that makes a new tensor",),
            )


def writing(frames: list[Frame], without: set[int]) -> Iterator[list[Frame]]:
    """Every write in place, as the frames that lead to it, by each call of a block: what the callers do differs.

    Args:
        without: the typed graphs that are known to write nothing; those found are added.
    """
    outer, wrote = frames[-1], False
    for position, node in enumerate(outer.typed.graph.nodes):
        here = [*frames[:-1], Frame(outer.typed, outer.back, position)]
        inner = outer.typed.calls.get(position)
        if inner is not None and id(inner) not in without:
            back = outer.back.calls.get(position) if outer.back else None
            yield from writing([*here, Frame(inner, back, 0)], without)
            wrote |= id(inner) not in without
        elif inner is None and node.args and writes(node.func):
            wrote = True
            yield here
    if not wrote:
        without.add(id(outer.typed))


def target(node: Node) -> int:
    """The value that an operation writes to: its first operand, or what is given as `out=`."""
    written = [argument.name for argument in node.func._schema.arguments if argument.is_write]
    named = named_arguments(node)
    return next((ref.index for name in written for ref in tensors(named.get(name))), node.args[0].index)


def read_again(frames: Sequence[Frame], index: int) -> bool:
    """Whether a caller of the block in which a value is written reads the tensor afterwards, under any name.

    The caller's graph would hold the value before the write: what the write depends on would get no gradient.
    """
    shared = {index}
    for inner, outer in zip(reversed(frames[1:]), reversed(frames[:-1]), strict=True):
        shared = names_of(inner.typed.graph, shared, inner.at)
        call, graph = outer.typed.graph.nodes[outer.at], outer.typed.graph
        given = zip(inner.typed.graph.inputs, call.args, strict=True)
        shared = names_of(graph, {ref.index for value, ref in given if value in shared}, outer.at)
        later = graph.nodes[outer.at + 1 :]
        if any(value in graph.outputs or any(reads(node, value) for node in later) for value in shared):
            return True
    return False


def names_of(graph: Graph, values: set[int], before: int) -> set[int]:
    """The values that may share memory with some, as far as the operations in front of one tell."""
    shared = set(values)
    pairs = [pair for node in graph.nodes[:before] for pair in renamed(node)]
    while True:
        more = {one for pair in pairs if not shared.isdisjoint(pair) for one in pair} - shared
        if not more:
            return shared
        shared |= more


def renamed(node: Node) -> Iterator[tuple[int, int]]:
    """(operand, result) where the result of an operation may be the operand, or a view of it."""
    if node.op == "block":
        inner = node.func.block
        for out, index in zip(node.outputs, inner.outputs, strict=True):
            shared = names_of(inner, {index}, len(inner.nodes))
            given = zip(inner.inputs, node.args, strict=True)
            yield from ((ref.index, out) for value, ref in given if value in shared and out is not None)
        return
    schema = getattr(node.func, "_schema", None)
    views = isinstance(schema, torch.FunctionSchema) and any(made.alias_info is not None for made in schema.returns)
    if (views or node.op in ("point", "written")) and node.args and isinstance(node.args[0], Ref):
        yield from ((node.args[0].index, out) for out in node.outputs if out is not None)


Crossing = tuple[str, tuple[Location, ...]]
"""What lies between a value and the tensor that its caller holds, and the rule that put it there; or nothing."""


def boundary(frames: Sequence[Frame], index: int, gathered: set[str]) -> Crossing:
    """What a value passed on its way from the tensor that its caller holds."""
    frames = list(frames)
    while True:
        frame = frames[-1]
        typed, graph = frame.typed, frame.typed.graph
        if index in graph.inputs and len(frames) > 1:
            frames.pop()
            index = frames[-1].typed.graph.nodes[frames[-1].at].args[graph.inputs.index(index)].index
            continue
        made = producer(graph, index, frame.at)
        if made is None or graph.nodes[made].op != "point":
            return "", ()
        found = crossing(frame, made, gathered)
        if found[0]:
            return found
        frames[-1] = Frame(typed, frame.back, made)
        index = graph.nodes[made].args[0].index


def crossing(frame: Frame, position: int, gathered: set[str]) -> Crossing:
    """What a point does that a write behind it must not follow."""
    typed, node = frame.typed, frame.typed.graph.nodes[position]
    step, source = typed.transitions.get(position), node.args[0].index
    relative = typed.names.get(position) or str(node.func[0])
    name = absolute(typed.fqn, relative)
    module, colon, _ = name.partition(":")
    if colon and module in gathered:
        return f"an input of {module}, which fully_shard hands on as a view", ()
    if step is None:
        return "", ()
    rules = (step.entry.location,)
    if step.moves:
        later = typed.graph.nodes[frame.at :]
        seen = (
            source in typed.graph.inputs or source in typed.graph.outputs or any(reads(node, source) for node in later)
        )
        return (f"{name}, and what it was made from is read again", rules) if seen else ("", ())
    completes = frame.back is not None and frame.back.moves.get(position)
    return (f"{name}, where a rule completes the gradient", rules) if completes else ("", ())


def reads(node: Node, index: int) -> bool:
    """Whether an operation reads a value."""
    return any(ref.index == index for ref in node.operands)
