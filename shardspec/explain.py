"""Turn refusals and conflicts into diagnostics: rule, model line, reason, and edits worth trying."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve, frozen

from shardspec.cotangent import Conflict
from shardspec.diagnostics import Diagnostic, Location
from shardspec.infer import (
    Inference,
    Issue,
    Stop,
    TypedGraph,
    absolute,
    group_issues,
    model_location,
    producer,
    spec_text,
)
from shardspec.layout import Layout, canonical
from shardspec.program import tensors
from shardspec.rules.match import as_pattern, fold
from shardspec.rules.parse import Entry, MeshEdit
from shardspec.spec import Dim, Factor, Spec
from shardspec.stages import Claims

MOST_HINTS = 8
"""Edits tried for one mistake."""


@frozen(eq=False)
class RuleEdit:
    """A change of the table that may mend a mistake."""

    text: str
    params: Mapping[str, str]
    activations: Mapping[str, str]


def explain_issues(inference: Inference, claims: Claims) -> Iterator[Diagnostic]:
    """A diagnostic for each cause of refusals."""
    for group in group_issues(inference.issues):
        issue = group[0]
        refusal = issue.refusal
        rules = rule_locations(issue.trail, refusal.axis)
        places = f"{len(group)} places: {_place(group[0])} ..." if len(group) > 1 else _place(issue)
        yield Diagnostic(
            code=refusal.code,
            what=refusal.what,
            why=_named_why(issue, claims),
            locations=(model_location(issue), *rules),
            advice=refusal.advice,
            matches=places,
            hints=tuple(_hints(issue, inference, claims)),
        )


def _place(issue: Issue) -> str:
    path = absolute(issue.fqn, issue.typed.graph.nodes[issue.node].path)
    return path or "the model's own forward"


def rule_locations(trail: Sequence[Stop], axis: str) -> tuple[Location, ...]:
    """The rules that brought the axis to the refused operands, and the first that left it out."""
    ruled = [stop for stop in trail if stop.entry is not None]
    with_axis = [stop for stop in ruled if stop.carries(axis)]
    without = [stop for stop in ruled if not stop.carries(axis)]
    chosen = [stop.entry.location for stop in (*with_axis, *without[:1]) if stop.entry is not None]
    return tuple(dict.fromkeys(chosen))[:4]


def _named_why(issue: Issue, claims: Claims) -> str:
    """The reason, with the factor's name where a view shows its size: K is 8."""
    refusal = issue.refusal
    if refusal.code != "SS301":
        return refusal.why
    for stop in issue.trail:
        for dim in stop.entry.spec.dims if stop.entry else ():
            for factor in dim.factors:
                if refusal.axis in factor.axes and len(dim.factors) > 1 and factor.name not in claims.sizes.known:
                    return f"{refusal.why}\nthe dim is the factor {factor.name} of {stop.name}"
    return refusal.why


def _hints(issue: Issue, inference: Inference, claims: Claims) -> Iterator[RuleEdit | MeshEdit]:
    """Edits for a refusal: declare a point on the way, or take the axis off a rule that brought it."""
    axis = issue.refusal.axis
    if not axis:
        return
    if issue.refusal.code == "SS301":
        yield MeshEdit(axis, tuple(n for n in range(1, 4 * inference.sizes[axis]) if n & (n - 1) == 0))
    count = 0
    for stop in dict.fromkeys(issue.trail):
        for edit in _edits(stop, axis, inference, claims, issue):
            yield edit
            count += 1
            if count == MOST_HINTS:
                return


def _edits(stop: Stop, axis: str, inference: Inference, claims: Claims, issue: Issue) -> Iterator[RuleEdit]:
    if stop.entry is None:
        if stop.carries(axis):
            text = declared_as(_without(stop.layout, axis, inference), stop.shape, claims, inference, axis)
            if text:
                yield add_point(stop.name, text)
        return
    spec = stop.entry.spec
    if stop.carries(axis) or axis in spec.axes:
        yield change(stop.entry, str(without_axis(spec, axis)))
        if stop.entry.rule.kind == "params":
            yield from _put_elsewhere(stop.entry, without_axis(spec, axis), axis)
        return
    # A whole operand beside a split one: lay it out as its partner is, along the factor of the same name.
    for partner in issue.trail:
        for factor in factors_with(partner.entry, axis):
            if any(factor == own.name for dim in spec.dims for own in dim.factors):
                yield change(stop.entry, str(with_axis(spec, factor, axis)))
    if stop.entry.rule.kind == "params":
        yield from _put_elsewhere(stop.entry, spec, axis)


def _put_elsewhere(entry: Entry, spec: Spec, axis: str) -> Iterator[RuleEdit]:
    """The axis on the most major factor of each dim that it did not stand on."""
    for dim, before in zip(spec.dims, entry.spec.dims, strict=True):
        if axis not in before.all_axes and dim.factors and dim.factors[0].name:
            yield change(entry, str(with_axis(spec, dim.factors[0].name, axis)))


def factors_with(entry: Entry | None, axis: str) -> list[str]:
    """The names of the factors that an entry splits over an axis."""
    if entry is None:
        return []
    return [factor.name for dim in entry.spec.dims for factor in dim.factors if axis in (*factor.axes, *dim.axes)]


def add_point(name: str, text: str) -> RuleEdit:
    """Declare an activation, in all repeated blocks alike."""
    head, colon, tail = name.partition(":")
    pattern = as_pattern(fold(head)) + colon + tail
    return RuleEdit(f'add to activations: r"{pattern}": "{text}"', {}, {pattern: text})


def change(entry: Entry, text: str) -> RuleEdit:
    """Give an entry another spec."""
    pattern = entry.rule.pattern
    edit = {pattern: text}
    words = f'r"{pattern}": "{text}" (was "{entry.rule.value}")'
    return RuleEdit(words, *((edit, {}) if entry.rule.kind == "params" else ({}, edit)))


def without_axis(spec: Spec, axis: str) -> Spec:
    """The spec with an axis taken off."""

    def drop(axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in axes if name != axis)

    dims = tuple(
        evolve(dim, factors=tuple(evolve(f, axes=drop(f.axes)) for f in dim.factors), axes=drop(dim.axes))
        for dim in spec.dims
    )
    return evolve(spec, dims=dims, pending=drop(spec.pending))


def with_axis(spec: Spec, factor: str, axis: str) -> Spec:
    """The spec with an axis put on a factor."""

    def put(own: Factor) -> Factor:
        return evolve(own, axes=(axis, *own.axes)) if own.name == factor else own

    dims = tuple(Dim(tuple(map(put, dim.factors)), dim.axes, dim.grouped) for dim in spec.dims)
    return evolve(spec, dims=dims)


def _without(layout: Layout, axis: str, inference: Inference) -> Layout:
    """The layout with an axis gathered or reduced."""
    size = inference.sizes[axis]
    dims = tuple(canonical(size if digit == axis else digit for digit in dim) for dim in layout.dims)
    return Layout(dims, tuple(item for item in layout.pending if item[0] != axis))


def declared_as(layout: Layout, shape: tuple[int, ...], claims: Claims, inference: Inference, axis: str) -> str | None:
    """A spec for a layout: one that the table uses, as it is or without `axis`, for it then serves every mesh."""
    for entry in claims.table.activations:
        for spec in (entry.spec, without_axis(entry.spec, axis)):
            fits = spec.ellipsis is None and not spec.open_end and _fits(spec, shape, claims)
            if fits and inference.layout_of(evolve(entry, spec=spec), "", shape) == layout:
                return str(spec)
    return spec_text(layout, shape, claims.sizes.known)


def _fits(spec: Spec, shape: tuple[int, ...], claims: Claims) -> bool:
    """Whether a spec's factors have the sizes of a tensor's dims."""
    if len(spec.dims) != len(shape):
        return False
    names = [dim.factors[0].name if len(dim.factors) == 1 else "" for dim in spec.dims]
    return all(claims.sizes.known.get(name, length) == length for name, length in zip(names, shape, strict=True))


def explain_conflicts(conflicts: Iterable[Conflict], inference: Inference, claims: Claims) -> Iterator[Diagnostic]:
    """A diagnostic for each value whose uses owe differently."""
    seen: dict[object, Diagnostic] = {}
    for conflict in conflicts:
        graph = conflict.typed.graph
        value = graph.values[conflict.value]
        owing, complete = graph.nodes[_origin(conflict)], _use(conflict, conflict.complete[0])
        what = _value_name(conflict)
        key = (owing.file, owing.line, conflict.axis, fold(what))
        if key in seen:
            continue
        entry = claims.params.get(absolute(conflict.fqn, value.name)) if value.name else None
        seen[key] = Diagnostic(
            code="SS307",
            what=f"the gradient of {what} is a pending sum over {conflict.axis} by one use and complete by another",
            why=(
                f"{owing.op} splits its work over {conflict.axis} and leaves each rank a share of the gradient; "
                f"{complete} gives every rank the whole of it\n"
                f"added, the complete part would be counted {inference.sizes[conflict.axis]} times"
            ),
            locations=(owing.location, *((entry.entry.location,) if entry else ())),
            advice=("declare the activation where the uses part, so that the shares are summed there",),
            hints=tuple(_point_hints(conflict, inference, claims)),
        )
    yield from seen.values()


def _origin(conflict: Conflict) -> int:
    """The operation that splits a use's work: the first behind it whose result has the axis."""
    typed = conflict.typed
    wave = [at for at in conflict.owing if at >= 0]
    for at in wave:
        node = typed.graph.nodes[at]
        layouts = [kind.layout for index in node.outputs if index is not None and (kind := typed.types[index])]
        split = any(conflict.axis in layout.sharded or layout.pending_kind(conflict.axis) for layout in layouts)
        if split and node.op not in ("point", "block"):
            return at
        wave += [later for later in users(typed, node.outputs) if later not in wave]
    return conflict.owing[0]


def _use(conflict: Conflict, at: int) -> str:
    if at < 0:
        return "the output"
    node = conflict.typed.graph.nodes[at]
    return f"{node.op if node.op != 'point' else node.func[0]} ({node.location})"


def _value_name(conflict: Conflict) -> str:
    value = conflict.typed.graph.values[conflict.value]
    if value.name:
        return absolute(conflict.fqn, value.name)
    made = producer(conflict.typed.graph, conflict.value)
    if made is None:
        return f"an input of {conflict.fqn or 'the model'}"
    node = conflict.typed.graph.nodes[made]
    if node.op == "point":
        return absolute(conflict.fqn, node.func[0])
    return f"the result of {node.op} in {absolute(conflict.fqn, node.path) or 'the model'}"


def _point_hints(conflict: Conflict, inference: Inference, claims: Claims) -> Iterator[RuleEdit]:
    """Unclaimed points behind the owing uses: declared as they are, they complete the gradient."""
    typed, graph = conflict.typed, conflict.typed.graph
    wave = list(conflict.owing)
    found = 0
    for at in wave:
        if at < 0 or found == MOST_HINTS:
            continue
        node = graph.nodes[at]
        if node.op == "point" and at not in typed.transitions:
            kind = typed.types[node.args[0].index]
            shape = graph.values[node.args[0].index].shape
            text = declared_as(kind.layout, shape, claims, inference, conflict.axis) if kind else None
            if text:
                yield add_point(absolute(conflict.fqn, node.func[0]), text)
                found += 1
        wave += [later for later in users(typed, node.outputs) if later not in wave]


def users(typed: TypedGraph, outputs: Sequence[int | None]) -> list[int]:
    """The nodes that read any of the values."""
    wanted = {index for index in outputs if index is not None}
    return [
        at
        for at, node in enumerate(typed.graph.nodes)
        if any(ref.index in wanted for ref in tensors(node.args) + tensors(node.kwargs))
    ]
