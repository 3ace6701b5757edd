"""Turn refusals and conflicts into diagnostics: rule, model line, reason, and edits worth trying."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve

from shardspec.cotangent import Conflict
from shardspec.diagnostics import Diagnostic, Location
from shardspec.dryrun import Difference
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
from shardspec.layout import Layout, dim_axes, gathered
from shardspec.mesh import AXES, BATCH_AXES
from shardspec.packed import as_partners, in_parts
from shardspec.positions import counted_by_length, from_the_front
from shardspec.program import Node, Ref, tensors
from shardspec.rules.match import as_pattern, fold
from shardspec.rules.parse import STORAGE_AXES, Entry, MeshEdit, RuleEdit, change, without_axes
from shardspec.spec import Dim, Factor, Spec
from shardspec.stages import Claims, TypedProgram
from shardspec.twin import MODULE_STATE

BY_POLICY = frozenset({"SS341", "SS342", "SS343"})
"""Refusals that the policy mends: a rule that gathers the sequence would pass, and undo what it was split for."""

MOST_HINTS = 8
"""Edits tried for one mistake."""


def explain_issues(inference: Inference, claims: Claims) -> Iterator[Diagnostic]:
    """A diagnostic for each cause of refusals."""
    told: set[object] = set()
    for group in group_issues(inference.issues):
        issue = group[0]
        refusal = issue.refusal
        blame = {id(s.entry) for s in issue.trail if s.entry is not None and s.source and s.carries(refusal.axis)}
        cause = (refusal.axis, fold(issue.fqn), frozenset(blame))
        if blame and cause in told:
            # What a wrong parameter makes is refused again and again on its way: the first place tells it.
            continue
        told.add(cause)
        rules = rule_locations(issue.trails, refusal.axis)
        edits = inference.hinted and refusal.code not in BY_POLICY
        found = Diagnostic(
            code=refusal.code,
            what=refusal.what,
            why=_named_why(issue, claims),
            locations=(model_location(issue), *rules),
            advice=refusal.advice,
            matches=_places(group, inference),
            hints=tuple(_hints(issue, inference, claims)) if edits else (),
        )
        yield from_the_front(issue, inference, claims, found)


def _places(group: Sequence[Issue], inference: Inference) -> str:
    """Where a mistake is made: the module, in how many repeated blocks, and how often in each."""
    issue = group[0]
    node = issue.typed.graph.nodes[issue.node]
    fqns = dict.fromkeys(fqn for each in group for fqn in inference.blocks_like(each.typed))
    path = absolute(issue.fqn, node.path)
    times = sum(each.typed is issue.typed for each in group)
    return _blocks(fold(path) if len(fqns) > 1 else path, list(fqns), times)


def _blocks(path: str, fqns: Sequence[str], times: int = 1) -> str:
    """A path with the number of repeated blocks that it stands for, and of calls in each."""
    notes = [f"{len(fqns)} blocks"] if len(fqns) > 1 else []
    notes += [f"{times} calls" + (" in each" if len(fqns) > 1 else "")] if times > 1 else []
    name = path or "the model's own forward"
    return f"{name} ({', '.join(notes)})" if notes else name


def rule_locations(trails: Sequence[Sequence[Stop]], axis: str) -> tuple[Location, ...]:
    """For each refused operand, the rules that brought the axis to it, or those of what it was made from."""
    chosen: list[Stop] = []
    for trail in trails:
        ruled = [stop for stop in trail if stop.entry is not None]
        carrying = [stop for stop in ruled if stop.carries(axis)]
        sources = [stop for stop in ruled if stop.source]
        chosen += carrying or sources[:2] or ruled[:1]
    return tuple(dict.fromkeys(stop.entry.location for stop in chosen if stop.entry is not None))[:4]


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
    spec, refusal = stop.entry.spec, issue.refusal
    if stop.carries(axis) or axis in spec.axes:
        if stop.entry.rule.kind == "params":
            yield from _put_first(stop.entry, spec, axis)
        if refusal.code == "SS302" and stop.source:
            yield from as_partners(stop, issue, axis)
        if refusal.code == "SS304" and stop.source:
            yield from in_parts(issue, claims)
        yield change(stop.entry, without_axes(spec, (axis,)))
        if stop.entry.rule.kind == "params":
            yield from _put_elsewhere(stop.entry, without_axes(spec, (axis,)), axis)
        return
    if refusal.code == "SS303" and stop.source and stop.entry.rule.kind == "params":
        # Complete beside a pending sum: read as a share, it is counted once.
        for bare in dict.fromkeys((without_axes(spec, STORAGE_AXES), spec)):
            yield change(stop.entry, evolve(bare, pending=(*bare.pending, axis)))
    # A whole operand beside a split one: lay it out as its partner is, along the factor of the same name.
    for partner in issue.trail:
        for factor in dict.fromkeys(factors_with(partner.entry, axis)):
            if any(factor == own.name for dim in spec.dims for own in dim.factors):
                first = stop.entry.rule.kind == "params"
                yield change(stop.entry, with_axis(spec, factor, axis, first=first))
    if stop.entry.rule.kind == "params":
        yield from as_partners(stop, issue, axis)
        yield from _put_elsewhere(stop.entry, spec, axis)


def _put_first(entry: Entry, spec: Spec, axis: str) -> Iterator[RuleEdit]:
    """The axis on the most major factor of its group, and the factor that has it in front of the others."""
    for index, dim in enumerate(spec.dims):
        held = [factor for factor in dim.factors if axis in factor.axes]
        if not held or dim.factors[0] is held[0] or dim.counts:
            continue
        others = [factor for factor in dim.factors if factor is not held[0]]
        bare = evolve(held[0], axes=tuple(name for name in held[0].axes if name != axis))
        swapped = [evolve(others[0], axes=(axis, *others[0].axes)), *others[1:]]
        place = dim.factors.index(held[0])
        for factors in ((held[0], *others), (*swapped[:place], bare, *swapped[place:])):
            dims = (*spec.dims[:index], evolve(dim, factors=factors), *spec.dims[index + 1 :])
            yield change(entry, evolve(spec, dims=dims))


def _put_elsewhere(entry: Entry, spec: Spec, axis: str) -> Iterator[RuleEdit]:
    """The axis on the most major factor of each dim that it did not stand on."""
    for dim, before in zip(spec.dims, entry.spec.dims, strict=True):
        if axis not in before.all_axes and dim.factors and dim.factors[0].name:
            yield change(entry, with_axis(spec, dim.factors[0].name, axis))


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


def with_axis(spec: Spec, factor: str, axis: str, *, first: bool = True) -> Spec:
    """The spec with an axis put on a factor: in front of those that store, or else in the order of the mesh."""

    def put(own: Factor) -> Factor:
        axes = (axis, *own.axes)
        return evolve(own, axes=axes if first else tuple(sorted(axes, key=AXES.index))) if own.name == factor else own

    dims = tuple(evolve(dim, factors=tuple(map(put, dim.factors))) for dim in spec.dims)
    return evolve(spec, dims=dims)


def _without(layout: Layout, axis: str, inference: Inference) -> Layout:
    """The layout with an axis gathered or reduced."""
    dims = tuple(gathered(dim, axis, inference.sizes) if axis in dim_axes(dim) else dim for dim in layout.dims)
    return Layout(dims, tuple(item for item in layout.pending if item[0] != axis))


def declared_as(layout: Layout, shape: tuple[int, ...], claims: Claims, inference: Inference, axis: str) -> str | None:
    """A spec for a layout: one that the table uses, as it is or without `axis`, for it then serves every mesh."""
    for entry in claims.table.activations:
        for spec in (entry.spec, without_axes(entry.spec, (axis,))):
            fits = spec.ellipsis is None and not spec.open_end and _fits(spec, shape, claims)
            if fits and inference.layout_of(evolve(entry, spec=spec), "", shape) == layout:
                return str(spec)
    known = claims.sizes.known
    alike = [[_name(dim) for dim in e.spec.dims] for e in claims.table.activations if len(e.spec.dims) == len(shape)]
    best = max(alike, key=lambda names: sum(known.get(n) == s for n, s in zip(names, shape, strict=True)), default=())
    return spec_text(layout, shape, known, best)


def _name(dim: Dim) -> str:
    """The name of a dim that is one factor."""
    return dim.factors[0].name if len(dim.factors) == 1 else ""


def _fits(spec: Spec, shape: tuple[int, ...], claims: Claims) -> bool:
    """Whether a spec's factors have the sizes of a tensor's dims."""
    if len(spec.dims) != len(shape):
        return False
    return all(
        claims.sizes.known.get(_name(dim), length) == length for dim, length in zip(spec.dims, shape, strict=True)
    )


def explain_conflicts(conflicts: Iterable[Conflict], inference: Inference, claims: Claims) -> Iterator[Diagnostic]:
    """A diagnostic for each value whose uses owe differently."""
    seen: dict[object, Diagnostic] = {}
    for conflict in conflicts:
        graph = conflict.typed.graph
        value = graph.values[conflict.value]
        origin = _origin(conflict)
        owing, complete = graph.nodes[origin], _use(conflict, conflict.complete[0])
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
            locations=(
                owing.location,
                *((entry.entry.location,) if entry else ()),
                *_rules_read(conflict, owing, claims),
            ),
            matches=_blocks(fold(conflict.fqn), inference.blocks_like(conflict.typed)),
            advice=("declare the activation where the uses part, so that the shares are summed there",),
            hints=tuple(_point_hints(conflict, inference, claims)) if inference.hinted else (),
        )
    yield from seen.values()


def _rules_read(conflict: Conflict, node: Node, claims: Claims) -> Iterator[Location]:
    """The rules of the parameters that an operation reads split over the axis."""
    for ref in tensors(node.args):
        name = conflict.typed.graph.values[ref.index].name
        claim = claims.params.get(absolute(conflict.fqn, name)) if name else None
        if claim is not None and conflict.axis in claim.layout.sharded:
            yield claim.entry.location


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
    place = node.location
    name = absolute(conflict.fqn, node.func[0]) if node.op == "point" else node.op
    return f"{name} ({place.file}:{place.line})"


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
    direct = [edit for at in conflict.owing if (edit := _declare(conflict, at, inference, claims)) is not None]
    if len(direct) > 1:
        merged = {pattern: text for edit in direct for pattern, text in edit.activations.items()}
        shown = ", ".join(f'r"{pattern}": "{text}"' for pattern, text in merged.items())
        yield RuleEdit(f"add to activations: {shown}", {}, merged)
    yield from _gathered(conflict, inference, claims)
    wave = list(conflict.owing)
    found = 0
    for at in wave:
        if at < 0 or found == MOST_HINTS:
            continue
        edit = _declare(conflict, at, inference, claims)
        if edit is not None:
            yield edit
            found += 1
        wave += [later for later in users(typed, graph.nodes[at].outputs) if later not in wave]


def _gathered(conflict: Conflict, inference: Inference, claims: Claims) -> Iterator[RuleEdit]:
    """Rules that gather what a parameter is used with, where one of its uses is split."""
    typed, graph = conflict.typed, conflict.typed.graph
    for at in conflict.owing if graph.values[conflict.value].name else ():
        for ref in tensors(graph.nodes[at].args) if at >= 0 else ():
            made, kind = producer(graph, ref.index), typed.types[ref.index]
            if made is None or kind is None or graph.nodes[made].op != "point" or made in typed.transitions:
                continue
            if conflict.axis in kind.layout.sharded:
                layout = _without(kind.layout, conflict.axis, inference)
                text = declared_as(layout, graph.values[ref.index].shape, claims, inference, conflict.axis)
                if text:
                    yield add_point(absolute(conflict.fqn, graph.nodes[made].func[0]), text)


def _declare(conflict: Conflict, at: int, inference: Inference, claims: Claims) -> RuleEdit | None:
    """A rule for an unclaimed point that leaves it as it is."""
    typed, graph = conflict.typed, conflict.typed.graph
    if at < 0 or graph.nodes[at].op != "point" or at in typed.transitions:
        return None
    source = graph.nodes[at].args[0].index
    kind = typed.types[source]
    text = declared_as(kind.layout, graph.values[source].shape, claims, inference, conflict.axis) if kind else None
    return add_point(absolute(conflict.fqn, graph.nodes[at].func[0]), text) if text else None


def explain_differences(differences: Iterable[Difference], typed: TypedProgram) -> list[Diagnostic]:
    """A diagnostic for each place where a rank's program is not the image of the whole one."""
    found: dict[object, Diagnostic] = {}
    for each in differences:
        inference = typed.inference
        frames = frames_to([(typed.forward, 0)], each.typed, each.position or 0)
        key = (each.locations, fold(each.path))
        if key not in found:
            plain = Diagnostic(
                code=each.code,
                what=inference.named(frames, each.what),
                why=inference.named(frames, each.why),
                locations=(*each.locations, *_rules_behind(inference, frames, each.position)),
                matches=_blocks(fold(each.path), inference.blocks_like(each.typed)),
                advice=(each.advice,),
            )
            found[key] = counted_by_length(each, typed, plain)
    return list(found.values())


def frames_to(frames: list[tuple[TypedGraph, int]], target: TypedGraph, position: int) -> list[tuple[TypedGraph, int]]:
    """The frames that lead to a place in a graph, from the outermost on; none where it is not called."""
    outer = frames[-1][0]
    if outer is target:
        return [*frames[:-1], (outer, position)]
    for at, inner in outer.calls.items():
        found = frames_to([*frames[:-1], (outer, at), (inner, 0)], target, position)
        if found:
            return found
    return []


def _rules_behind(
    inference: Inference, frames: Sequence[tuple[TypedGraph, int]], position: int | None
) -> tuple[Location, ...]:
    """The rules that split what an operation of a line reads; those that split the batch where there are no others."""
    typed = frames[-1][0]
    nodes = typed.graph.nodes
    same = [] if position is None else [n for n in nodes[position : position + 4] if n.line == nodes[position].line]
    refs = next((refs for node in same if (refs := _split_operands(typed, node))), [])
    kinds = [kind for ref in refs if (kind := typed.types[ref.index]) is not None]
    axes = dict.fromkeys(axis for kind in kinds for axis in kind.layout.sharded)
    chosen = [axis for axis in axes if axis not in BATCH_AXES] or list(axes)
    stops = [
        stop
        for ref in refs
        for axis in chosen
        for stop in inference.trail(frames, ref.index, axis)
        if stop.carries(axis)
    ]
    return tuple(dict.fromkeys(stop.entry.location for stop in stops if stop.entry is not None))[:3]


def _split_operands(typed: TypedGraph, node: Node) -> list[Ref]:
    """The tensors that an operation reads and that are split, where there are any."""
    kinds = [(ref, typed.types[ref.index]) for ref in node.operands]
    return [ref for ref, kind in kinds if kind is not None and kind.layout.sharded]


def attribute_edits(module: object, claims: Claims, degrees: Mapping[str, int]) -> Iterator[dict[str, str]]:
    """Attributes of a module that hold the size of a factor that is split: all of them first, then all but one.

    After them, one at a time, those that may be the size of a factor whose group alone is known.
    """
    split: dict[int, str] = {}
    groups: dict[str, int] = {}
    for entry, shape in _specs(claims):
        for at, dim in enumerate(entry.spec.dims):
            for factor in dim.factors:
                axes = tuple(axis for axis in factor.axes if axis not in (*STORAGE_AXES, *BATCH_AXES))
                if not any(axis in degrees for axis in axes):
                    continue
                mark = axes[0] if len(axes) == 1 else f"({','.join(axes)})"
                text = f"{factor.name}@{mark}"
                size = claims.sizes.known.get(factor.name)
                if size is not None:
                    split.setdefault(size, text)
                elif shape:
                    groups.setdefault(text, shape[at])
    held = {name: value for name, value in vars(module).items() if type(value) is int and name not in MODULE_STATE}
    named = {name: split[value] for name, value in held.items() if value in split}
    if named:
        yield named
    for name in named if len(named) > 1 else ():
        yield {other: text for other, text in named.items() if other != name}
    likely = [
        (name, text)
        for text, length in groups.items()
        for name, value in held.items()
        if name not in named and 1 < value < length and length % value == 0
    ]
    for name, text in likely[:MOST_HINTS]:
        yield {**named, name: text}


def _specs(claims: Claims) -> Iterator[tuple[Entry, tuple[int, ...]]]:
    """The entries of a table, of those of parameters with the shape of one that they claim."""
    shapes = {claim.entry: claim.shape for claim in claims.params.values()}
    for entry in (*claims.table.params, *claims.table.activations):
        yield entry, shapes.get(entry, ())


def users(typed: TypedGraph, outputs: Sequence[int | None]) -> list[int]:
    """The nodes that read any of the values."""
    wanted = {index for index in outputs if index is not None}
    return [at for at, node in enumerate(typed.graph.nodes) if any(ref.index in wanted for ref in node.operands)]
