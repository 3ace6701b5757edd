"""From a typed program to a plan: parameters, points, collectives, units."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from attrs import evolve

from shardspec.constraints import Constraint, strongest
from shardspec.cotangent import Backward
from shardspec.diagnostics import Diagnostic, Location
from shardspec.functional import accumulation_dtype
from shardspec.infer import TypedGraph, absolute
from shardspec.layout import Layout, dim_axes
from shardspec.mesh import AXES, BATCH_AXES, Mesh, degree
from shardspec.moves import Move
from shardspec.placement import part_shape
from shardspec.plan import ActivationPlan, Collective, LossPlan, ParamPlan, PointPlan, Substitution, UnitPlan
from shardspec.policy import STRATEGIES, Policy, chosen
from shardspec.program import Node, Ref, tensors
from shardspec.rules.fit import dims_of, divisors
from shardspec.rules.match import fold
from shardspec.rules.operator import named_arguments
from shardspec.rules.parse import STORAGE_AXES, Entry, ParamClaim, Storage, change, without_axes
from shardspec.sequence import AXIS
from shardspec.stages import Claims, TypedProgram
from shardspec.survey import View
from shardspec.tracing import IN_THE_LOSS, user_frame


def in_order(axes: Any) -> tuple[str, ...]:
    """Axes in mesh order."""
    return tuple(axis for axis in AXES if axis in axes)


def owed_axes(typed: TypedProgram, names: View) -> tuple[dict[str, frozenset[str]], list[Diagnostic]]:
    """First name of a parameter that has a gradient -> the axes over which it is a pending sum.

    SS307 for one whose uses differ: a tied weight used on both sides of a split, say.
    """
    found: dict[str, dict[str, frozenset[str]]] = {}
    for fqn, graph, back in distinct_calls(typed):
        for name, index in graph.graph.params.items() if back else ():
            if back is not None and index in back.owed:
                full = absolute(fqn, name)
                found.setdefault(names.parameters[full].first, {})[f"{fqn} {full}"] = back.owed[index]
    owed: dict[str, frozenset[str]] = {}
    problems: list[Diagnostic] = []
    for name, uses in found.items():
        kinds = set(uses.values())
        owed[name] = next(iter(kinds))
        if len(kinds) > 1:
            differ = sorted(frozenset[str]().union(*kinds) - frozenset.intersection(*kinds))
            problems.append(
                Diagnostic(
                    code="SS307",
                    what=f"the gradient of {name} is owed over {', '.join(differ)} by some of its uses only",
                    why="a sum over ranks would count the complete uses several times",
                    locations=(typed.claims.of(name).entry.location,),
                )
            )
    return owed, problems


def distinct_calls(typed: TypedProgram) -> Iterator[tuple[str, TypedGraph, Backward | None]]:
    """Every graph as it is called, of blocks that run alike one."""
    yield "", typed.forward, typed.backward
    for position, inner in typed.forward.calls.items():
        fqn = typed.forward.graph.nodes[position].func.fqn
        if typed.kin.heads.get(fqn, fqn) == fqn:
            yield from calls(inner, typed.backward.calls.get(position), fqn)


def calls(typed: TypedGraph, back: Backward | None, fqn: str) -> Iterator[tuple[str, TypedGraph, Backward | None]]:
    """Every graph as it is called: its FQN, its types, its backward."""
    yield fqn, typed, back
    for position, inner in typed.calls.items():
        call = typed.graph.nodes[position].func
        inside = back.calls.get(position) if back else None
        yield from calls(inner, inside, absolute(fqn, call.fqn))


def lower_params(
    claim_of: Callable[[str], ParamClaim],
    names: View,
    owed_by: Callable[[str], Iterable[str]],
    units: tuple[UnitPlan, ...],
    mesh: Mesh,
) -> dict[str, ParamPlan]:
    """A plan for every parameter and buffer of a view.

    Args:
        owed_by: first name of a parameter -> the axes over which its gradient is a pending sum.
    """
    origin = dict.fromkeys(AXES, 0)
    unit_of = {name: unit.name for unit in units for name in unit.params}
    sizes = mesh.shape
    shapes: dict[tuple[Layout, Storage], tuple[int, ...]] = {}
    plans: dict[str, ParamPlan] = {}
    for name, known in names.parameters.items():
        claim = claim_of(name)
        key = (claim.layout, claim.storage)
        if key not in shapes:
            shapes[key] = part_shape(claim.layout, claim.storage, origin, mesh)
        plans[name] = ParamPlan(
            spec=str(claim.entry.rule.value),
            rule=claim.entry.rule.pattern,
            layout=claim.layout,
            shape=claim.shape,
            local_shape=shapes[key],
            dtype=str(claim.dtype).removeprefix("torch."),
            storage_dim=claim.storage.dim,
            storage=claim.storage.axes,
            owed=in_order(owed_by(known.first)),
            trained=claim.requires_grad,
            buffer=claim.is_buffer,
            persistent=known.persistent,
            first=known.first,
            unit=unit_of.get(known.first, ""),
            mesh_sizes=sizes,
        )
    return plans


def check_storage(
    params: Mapping[str, ParamPlan], owed: Mapping[str, frozenset[str]], claims: Claims
) -> Iterator[Diagnostic]:
    """SS308 for storage over an axis on which the gradient is complete already; SS209 for a stored buffer.

    FSDP2 sums the gradients of what it stores over dp too, so that dp must be owed as well.
    """
    seen: set[tuple[str, str]] = set()
    for name, plan in params.items():
        entry = claims.of(name).entry
        if plan.buffer and plan.storage and (plan.rule, "") not in seen:
            seen.add((plan.rule, ""))
            yield Diagnostic(
                code="SS209",
                what=f"the buffer {name} is stored over {plan.storage[0]}",
                why="only parameters are gathered before they are used",
                locations=(entry.location,),
                hints=(change(entry, without_axes(entry.spec, STORAGE_AXES)),),
            )
        summed = (*plan.storage, "dp") if plan.storage and "dp" in plan.mesh_sizes else plan.storage
        for axis in summed if plan.first in owed else ():
            if axis not in owed[plan.first] and (plan.rule, axis) not in seen:
                seen.add((plan.rule, axis))
                off = plan.storage if axis == "dp" else (axis,)
                where = f"over {', '.join(off)}" + (" in replicas over dp" if axis == "dp" else "")
                yield Diagnostic(
                    code="SS308",
                    what=f"{name} is stored {where}, and its gradient is complete over {axis}",
                    why=f"fully_shard would sum its gradient over {axis}, where every rank already holds all of it",
                    locations=(entry.location,),
                    advice=(f"take {', '.join(off)} off the rule, or split what it is used with over {axis}",),
                    hints=(change(entry, without_axes(entry.spec, off)),),
                )


def lower_points(typed: TypedProgram) -> dict[str, PointPlan]:
    """Name -> what the runtime does there, for the points that do anything.

    Where a module runs more than once, a call that no gradient passes takes what the others do.
    """
    points: dict[str, PointPlan] = {}
    for name, passed, _, _ in passed_points(calls(typed.forward, typed.backward, "")):
        forward, backward = passed
        if (forward or backward) and (name not in points or backward):
            points[name] = PointPlan(name=name, forward=forward, backward=backward or ())
    return points


Passed = tuple[tuple[Move, ...], tuple[Move, ...] | None]
"""What one passage of a point moves forward, and backward; None where no gradient passes it."""


def passed_points(
    called: Iterable[tuple[str, TypedGraph, Backward | None]],
) -> Iterator[tuple[str, Passed, TypedGraph, int]]:
    """Each passage of a declared point: its name, what moves there, its graph and its place there."""
    for fqn, graph, back in called:
        for position, step in graph.transitions.items():
            alive = back is not None and position in back.alive
            backward = back.moves.get(position, ()) if back is not None and alive else None
            yield absolute(fqn, graph.names[position]), (step.moves, backward), graph, position


def point_collectives(
    typed: TypedProgram, again: tuple[str, ...], dtype_of: Callable[[torch.dtype], torch.dtype]
) -> Iterator[Collective]:
    """The collectives of declared points, forward and backward; those inside `again` run once more in backward.

    Args:
        dtype_of: the dtype that a value has in compute, by the one that it was recorded with.
    """
    sizes = typed.mesh.shape
    twice = run_again(typed, again)
    for fqn, graph, back in calls(typed.forward, typed.backward, ""):
        for position, step in graph.transitions.items():
            node = graph.graph.nodes[position]
            value = graph.graph.values[node.args[0].index]
            name = absolute(fqn, graph.names[position])
            phases = [("forward", step.moves), ("backward", back.moves.get(position, ()) if back else ())]
            if name in twice:
                phases.append(("backward", step.moves))
            for phase, moves in phases:
                for move in moves:
                    if move.is_collective:
                        size = move.elements(sizes) * dtype_of(value.dtype).itemsize
                        yield Collective(
                            kind=move.kind,
                            axes=(move.axis,),
                            where=name,
                            phase=phase,
                            count=1,
                            bytes=size,
                            why=step.entry.rule.pattern,
                        )


POINT_LIKE = frozenset(
    {"point", "block", "add", "sub", "neg", "cat", "stack", "chunk", "split", "clone", "to", "contiguous"}
)
MOVES_ONLY = frozenset(
    [
        "view",
        "view_as",
        "reshape",
        "flatten",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "squeeze",
        "unsqueeze",
        "unflatten",
    ]
)
SAVES_NOTHING = POINT_LIKE | MOVES_ONLY
"""Operators whose backward needs no tensor of the forward."""


def run_again(typed: TypedProgram, again: tuple[str, ...]) -> set[str]:
    """The points that run again where the modules `again` are rematerialised.

    Of an experts module, `:exchange` and `:return`: the way there is run again for its forward's sake.
    torch.utils.checkpoint stops once it has all that was saved, so that what follows the last operator that saves
    anything does not run again.
    """
    found: set[str] = set()
    ended: set[str] = set()
    for fqn, graph, position in reversed(list(in_sequence(typed.forward, "")) if again else []):
        node = graph.graph.nodes[position]
        is_point = node.op == "point"
        name = (graph.names.get(position) or str(node.func[0])) if is_point else node.path
        place = absolute(fqn, name)
        inside = [module for module in again if place.startswith(f"{module}.") or (place == module and not is_point)]
        if node.op == "experts" and inside:
            found.add(f"{place}:exchange")
            found |= {f"{place}:return"} if not ended.isdisjoint(inside) else set()
        if node.op not in SAVES_NOTHING and not is_idle(node):
            ended.update(inside)
        elif is_point and not ended.isdisjoint(inside):
            found.add(place)
    return found


def is_idle(node: Node) -> bool:
    """Whether a dropout drops nothing: it gives back its operand."""
    if node.op != "dropout":
        return False
    named = named_arguments(node)
    return not (named["p"] and named["train"])


def in_sequence(typed: TypedGraph, fqn: str) -> Iterator[tuple[str, TypedGraph, int]]:
    """Every node in the order in which it runs: the FQN of its graph, the graph, its position there."""
    for position, node in enumerate(typed.graph.nodes):
        inner = typed.calls.get(position)
        if inner is None:
            yield fqn, typed, position
        else:
            yield from in_sequence(inner, absolute(fqn, node.func.fqn))


def unit_collectives(
    params: Mapping[str, ParamPlan], units: tuple[UnitPlan, ...], mesh: Mesh, last: str, policy: Policy
) -> Iterator[Collective]:
    """What FSDP2 moves: gather forward, gather again backward (not the root, nor the last unit), scatter gradients."""
    for unit in units:
        held = [params[name] for name in unit.params if params[name].storage]
        for axes in dict.fromkeys(plan.storage for plan in held):
            yield from _stored_collectives(unit, [plan for plan in held if plan.storage == axes], mesh, last, policy)


def _stored_collectives(
    unit: UnitPlan, stored: Sequence[ParamPlan], mesh: Mesh, last: str, policy: Policy
) -> Iterator[Collective]:
    """What FSDP2 moves of the parameters of a unit that are stored over the same axes."""
    axes = stored[0].storage
    where = fold(unit.name) or "(root)"
    read, summed = policy.param_dtype, policy.reduce_dtype or policy.param_dtype
    gathered = sum(_padded(plan, mesh) * (read.itemsize if read else _itemsize(plan.dtype)) for plan in stored)
    over = in_order(axes)
    moved = functools.partial(Collective, where=where, count=1)
    yield moved(kind="all_gather", axes=over, phase="forward", bytes=gathered, why="parameters")
    if unit.name not in ("", last) and chosen(policy.reshard_after_forward, unit.name):
        yield moved(kind="all_gather", axes=over, phase="backward", bytes=gathered, why="parameters")
    trained = sum(
        _padded(plan, mesh) * (summed.itemsize if summed else _itemsize(plan.dtype)) for plan in stored if plan.trained
    )
    if trained:
        yield moved(kind="reduce_scatter", axes=over, phase="backward", bytes=trained, why="gradients")
        if mesh["dp"] > 1:
            share = trained // degree(mesh, axes)
            yield moved(kind="all_reduce", axes=("dp",), phase="backward", bytes=share, why="gradients")


def _padded(plan: ParamPlan, mesh: Mesh) -> int:
    """Elements of the gathered parameter, its rows padded so that every rank sends the same number."""
    shape = list(plan.layout.shape)
    share = degree(mesh, plan.storage)
    shape[plan.storage_dim] = -(-shape[plan.storage_dim] // share) * share
    return prod(shape)


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def compute_dtypes(params: Mapping[str, ParamPlan], policy: Policy) -> Callable[[torch.dtype], torch.dtype]:
    """The dtype that a value has in compute, by the one that it was recorded with: what has the parameters' takes that
    in which they are read."""
    main = next((getattr(torch, plan.dtype) for plan in params.values() if not plan.buffer), torch.float32)
    return lambda dtype: policy.param_dtype if policy.param_dtype and dtype == main else dtype


def reduced_by_hand(plan: ParamPlan) -> tuple[str, ...]:
    """The axes of the all-reduce that a step does itself: what FSDP2 does not reduce."""
    if not plan.trained or plan.buffer:
        return ()
    done = {*plan.storage, "dp"} if plan.storage else set()
    return tuple(axis for axis in plan.owed if axis not in done)


def step_collectives(params: Mapping[str, ParamPlan], mesh: Mesh, loss: LossPlan | None) -> Iterator[Collective]:
    """One coalesced all-reduce for each set of axes that parameters owe, and one for the loss and the norm."""
    groups: Counter[tuple[tuple[str, ...], str]] = Counter()
    for name, plan in params.items():
        axes = reduced_by_hand(plan)
        if axes and plan.first == name:
            groups[(axes, plan.dtype)] += prod(plan.local_shape) * _itemsize(plan.dtype)
    for (axes, dtype), size in groups.items():
        yield Collective(
            kind="all_reduce",
            axes=axes,
            where="gradients",
            phase="step",
            count=1,
            bytes=size,
            why=f"owed, {dtype}",
        )
    if loss is not None and mesh.world > 1:
        yield Collective(
            kind="all_reduce",
            axes=mesh.axes,
            where="loss",
            phase="step",
            count=1,
            bytes=(3 + loss.beside) * 8,
            why="loss, weight and squared norm" + (", tokens by expert" if loss.beside else ""),
        )


LOCAL_CALLS = ("embedding", "cross_entropy", "dropout", "scaled_dot_product_attention")
"""The functions whose local form may be another one."""


def substitutions(typed: TypedProgram) -> Iterator[Substitution]:
    """The calls whose local form is another one, and those of the same functions between them."""
    found: list[Substitution] = []
    for fqn, graph, _ in calls(typed.forward, typed.backward, ""):
        counts: Counter[tuple[str, str]] = Counter()
        for position, node in enumerate(graph.graph.nodes):
            if node.op not in LOCAL_CALLS:
                continue
            path = absolute(fqn, node.path) if node.path != "loss" else "loss"
            ordinal = counts[(path, node.op)]
            counts[(path, node.op)] += 1
            found.append(substitution(graph, position, path, ordinal, balanced=typed.inference.balanced))
    changed = {entry.function for entry in found if not entry.inert}
    return (entry for entry in found if entry.function in changed)


def substitution(graph: TypedGraph, position: int, path: str, ordinal: int, *, balanced: bool) -> Substitution:
    """How one call runs on a rank."""
    node = graph.graph.nodes[position]
    plain = Substitution(path=path, function=node.op, ordinal=ordinal)
    if position not in graph.lowering:
        return evolve(plain, inert=True)
    plain = evolve(plain, balanced=balanced)
    first = graph.consumed[position][0].layout
    if graph.lowering[position] in STRATEGIES:
        return evolve(plain, strategy=graph.lowering[position])
    if node.op == "dropout":
        return evolve(plain, layout=first)
    if node.op == "scaled_dot_product_attention":
        keys = graph.consumed[position][1].layout
        return evolve(plain, layout=Layout((*first.dims[:-1], keys.dims[-2])))
    shape = graph.graph.values[tensors(node.args)[0].index].shape
    dim = 0 if node.op == "embedding" else len(shape) - 1
    return evolve(plain, axes=dim_axes(first.dims[dim]), size=shape[dim])


def substitution_collectives(
    typed: TypedProgram, dtype_of: Callable[[torch.dtype], torch.dtype]
) -> Iterator[Collective]:
    """Vocabulary-parallel cross-entropy: a maximum, and one sum for normaliser and picked logit."""
    for _, graph, _ in calls(typed.forward, typed.backward, ""):
        for position, lowering in graph.lowering.items():
            if lowering != "cross_entropy":
                continue
            labels = graph.consumed[position][1].layout
            logits = graph.consumed[position][0].layout
            read = graph.graph.values[graph.graph.nodes[position].operands[0].index]
            rows = prod(labels.shape) * accumulation_dtype(dtype_of(read.dtype)).itemsize
            axes = dim_axes(logits.dims[-1])
            yield Collective(
                kind="all_reduce",
                axes=axes,
                where="loss",
                phase="forward",
                count=1,
                bytes=rows,
                why="maximum",
            )
            yield Collective(
                kind="all_reduce",
                axes=axes,
                where="loss",
                phase="forward",
                count=1,
                bytes=2 * rows,
                why="normaliser and picked logit",
            )


def repeated(rows: Iterable[Collective], count: int) -> Iterator[Collective]:
    """The collectives of a microbatch, as many times as a step has microbatches."""
    return (evolve(row, count=row.count * count) for row in rows)


def named_by_fold(found: Iterable[Collective]) -> Iterator[Collective]:
    """The same, with layers that differ in their index alone under one name."""
    return (evolve(row, where=fold(row.where)) for row in found)


def folded_collectives(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """Equal collectives as one row with their count."""
    rows: dict[Collective, int] = {}
    for row in found:
        key = evolve(row, count=1)
        rows[key] = rows.get(key, 0) + row.count
    return tuple(evolve(row, count=count) for row, count in rows.items())


def lower_activations(typed: TypedProgram) -> tuple[dict[str, ActivationPlan], dict[str, ActivationPlan]]:
    """Every boundary with its layout, declared or inferred; and the batch entries."""
    entries: dict[str, ActivationPlan] = {}
    program, points = typed.program, typed.claims.points
    for name, index in program.entries.items():
        value = program.values[index]
        entries[name] = entry_plan(name, points[name], typed.forward.layout(index), str(value.dtype))
    found: dict[str, ActivationPlan] = dict(entries)
    for fqn, graph, _ in calls(typed.forward, typed.backward, ""):
        for position, node in enumerate(graph.graph.nodes):
            if node.op != "point":
                continue
            target = node.outputs[0]
            assert target is not None
            step = graph.transitions.get(position)
            name = absolute(fqn, str(graph.names.get(position, node.func[0])))
            found[name] = ActivationPlan(
                name=name,
                layout=graph.layout(target),
                rule=step.entry.rule.pattern if step else "",
                before=step.before if step and step.before != step.after else None,
                dtype=str(graph.graph.values[target].dtype).removeprefix("torch."),
            )
    return found, entries


def entry_plan(name: str, entry: Entry, layout: Layout, dtype: str) -> ActivationPlan:
    """The plan of a batch entry."""
    axes = [dim.all_axes for dim in dims_of(entry.spec, len(layout.dims))]
    batch_dim = next((index for index, on in enumerate(axes) if any(axis in BATCH_AXES for axis in on)), None)
    return ActivationPlan(
        name=name,
        layout=layout,
        rule=entry.rule.pattern,
        dtype=dtype.removeprefix("torch."),
        batch_dim=batch_dim,
    )


def lower_loss(typed: TypedProgram) -> tuple[LossPlan | None, list[Diagnostic]]:
    """The axes over which the loss and its weight are pending; SS310 for a result of any other kind."""
    nodes = typed.program.nodes[typed.program.forward_nodes :]
    location = nodes[-1].location if nodes else None
    result = typed.program.result
    if not (isinstance(result, (tuple, list)) and len(result) == 2):
        return None, [_bad_loss(f"the loss returned {_kind(result)}", location)]
    found: list[tuple[str, ...]] = []
    problems: list[Diagnostic] = []
    for what, item in zip(("sum", "weight"), result, strict=True):
        if isinstance(item, (int, float)) and what == "weight":
            found.append(())
            continue
        if not isinstance(item, Ref):
            problems.append(_bad_loss(f"the loss's {what} is {_kind(item)}", location))
            continue
        value = typed.program.values[item.index]
        kind = typed.forward.types[item.index]
        if value.shape != ():
            problems.append(_bad_loss(f"the loss's {what} has shape {value.shape}, not ()", location))
        elif what == "sum" and not value.dtype.is_floating_point:
            problems.append(_bad_loss(f"the loss's sum is {value.dtype}: it has no gradient", location))
        elif kind is not None and any(way != "sum" for _, way in kind.layout.pending):
            axis, way = next(pair for pair in kind.layout.pending if pair[1] != "sum")
            problems.append(
                _bad_loss(
                    f"the loss's {what} is pending {way} over {axis}",
                    location,
                    why="ranks may hold different numbers of tokens, so that a mean of means is not the mean",
                )
            )
        elif kind is not None:
            found.append(in_order({axis for axis, _ in kind.layout.pending}))
    if problems:
        return None, problems
    number = isinstance(result[1], (int, float))
    return LossPlan(sum_axes=found[0], weight_axes=found[1], number=number), []


def _kind(item: Any) -> str:
    if isinstance(item, Ref):
        return "one tensor"
    return f"a {type(item).__name__}" if not isinstance(item, (tuple, list)) else f"{len(item)} values"


def _bad_loss(what: str, location: Location | None, why: str = "") -> Diagnostic:
    return Diagnostic(
        code="SS310",
        what=what,
        why=why or "a loss returns (sum, weight): two scalars over this rank's part",
        locations=(location,) if location else (),
        advice=("return ss.cross_entropy(output, batch[...]), or a sum and the count it is over",),
    )


def output_layouts(typed: TypedProgram) -> tuple[Layout, ...]:
    """The layouts of forward's outputs."""
    return tuple(
        typed.forward.layout(index) for index in typed.program.outputs if typed.forward.types[index] is not None
    )


def last_unit(typed: TypedProgram, units: tuple[UnitPlan, ...]) -> str:
    """The unit whose modules run last: its backward comes at once, so that it stays gathered."""
    home = {module: unit.name for unit in units for module in unit.modules}
    for node in reversed(typed.program.nodes[: typed.program.forward_nodes]):
        path = node.func.fqn if node.op == "block" else node.func[0] if node.op == "point" else node.path
        path = path.partition(":")[0]
        while path and path not in home:
            path = path.rpartition(".")[0]
        if path:
            return home[path]
    return ""


def failed(error: Exception, inputs: Mapping[str, Any]) -> Diagnostic:
    """SS402 for a forward or a loss that does not run on the batch's shapes, whatever the mesh."""
    shapes = ", ".join(
        f"{name} {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}" if hasattr(item, "dtype") else name
        for name, item in inputs.items()
    )
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, KeyError):
        message = f"nothing is there under {error}"
    in_loss = IN_THE_LOSS in getattr(error, "__notes__", ())
    return Diagnostic(
        code="SS402",
        what=f"the {'loss' if in_loss else 'model'} does not run on this batch: {message}",
        why=f"run once on meta tensors, before any layout matters; the batch is {shapes}",
        locations=user_frame(error),
        advice=("a loss is called with what forward returns and the batch: loss(output, batch)",) if in_loss else (),
    )


def recomputed(units: tuple[UnitPlan, ...], policy: Policy) -> tuple[str, ...]:
    """The modules whose forward runs again in backward."""
    return tuple(module for unit in units for module in unit.modules if chosen(policy.remat, module))


def constraints(typed: TypedProgram) -> tuple[Constraint, ...]:
    """What the sizes of axes must divide: by the rules' own splits, and by the cuts of views."""
    claims, mesh = typed.claims, typed.mesh
    known = claims.sizes.known
    found: list[Constraint] = []
    split: dict[tuple[Entry, tuple[int, ...]], tuple[str, bool, bool]] = {}
    for name, claim in claims.params.items():
        split.setdefault((claim.entry, claim.shape), (name, AXIS not in claim.layout.sharded, claim.expert))
    for name, index in typed.program.entries.items():
        split.setdefault((claims.points[name], typed.program.values[index].shape), (name, False, False))
    seen: set[int] = set()
    for fqn, graph, _ in calls(typed.forward, typed.backward, ""):
        if id(graph) in seen:
            continue
        seen.add(id(graph))
        values, nodes = graph.graph.values, graph.graph.nodes
        for position, step in graph.transitions.items():
            shape = values[nodes[position].args[0].index].shape
            split.setdefault((step.entry, shape), (absolute(fqn, graph.names[position]), False, False))
        for position, facts in graph.divides.items():
            node = nodes[position]
            found += [Constraint(axes, number, "", absolute(fqn, node.path), node.location) for axes, number in facts]
    for (entry, shape), (name, storage, expert) in split.items():
        found += divisors(entry, name, shape, known, mesh, storage=storage, expert=expert)
    return strongest(found)
