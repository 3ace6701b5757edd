"""The stages, in order: parse the table, match it against the model, type the program, lower it to a plan."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import nn

from shardspec.cotangent import Backward, Cotangents
from shardspec import lower as lowering
from shardspec.diagnostics import Diagnostic, Location, ShardingError, refuse
from shardspec.dryrun import dry_run
from shardspec.infer import Inference, TypedGraph, absolute
from shardspec.layout import Layout
from shardspec.mesh import AXES, Mesh, degree
from shardspec.plan import ActivationPlan, ParamPlan, Plan, UnitPlan
from shardspec.policy import Policy
from shardspec.explain import MeshEdit, explain_conflicts, explain_issues
from shardspec.program import Graph, Program, Ref, tensors
from shardspec.rules import attention, contraction, index, loss, pointwise, reduction, view
from shardspec.rules.match import (
    Entry,
    ParamClaim,
    Sizes,
    Table,
    assign,
    check_rank,
    dims_of,
    idle_batch_axes,
    layout_of,
    learn_sizes,
    parse_table,
    unused_axes,
)
from shardspec.rules.table import Rules
from shardspec.tracing import HostRead, forward_arguments, required_arguments, trace
from shardspec.stages import Claims, Parameter, Survey, TypedProgram
from shardspec.units import resolve_attributes, resolve_units

Model = nn.Module | Callable[[], nn.Module]
OPERATOR_FAMILIES = (attention, contraction, index, loss, pointwise, reduction, view)
"""Importing a family registers its rules."""


def survey(model: Model) -> Survey:
    """Name everything in a model; a function is called once, on the meta device."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    first: dict[int, str] = {}
    found: dict[str, Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        home = first.setdefault(id(tensor), name)
        found[name] = Parameter(tuple(tensor.shape), tensor.dtype, False, tensor.requires_grad, home)
    lost = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, tensor in model.named_buffers(remove_duplicate=False):
        home = first.setdefault(id(tensor), name)
        found[name] = Parameter(tuple(tensor.shape), tensor.dtype, True, False, home, name not in lost)
    modules = tuple(name for name, _ in model.named_modules() if name)
    return Survey(model, found, modules, tuple(forward_arguments(model)))


def match_params(
    table: Table, names: Survey, mesh: Mesh
) -> tuple[dict[str, ParamClaim], Sizes, list[Diagnostic]]:
    """Claim every parameter and buffer, and give each its layout."""
    claimed, found = assign(table.params, names.parameters, total=True, what="parameter")
    shaped: list[tuple[str, Entry, tuple[int, ...]]] = []
    wrong: dict[Entry, Diagnostic] = {}
    for name, entry in claimed.items():
        problem = check_rank(entry, name, names.parameters[name].shape)
        if problem:
            wrong.setdefault(entry, problem)
        else:
            shaped.append((name, entry, names.parameters[name].shape))
    sizes, conflicts = learn_sizes(shaped, table.rules.sizes)
    params: dict[str, ParamClaim] = {}
    uneven: dict[Any, Diagnostic] = {}
    for name, entry, shape in shaped:
        layout, storage, problem = layout_of(entry, name, shape, sizes.known, mesh, storage=True)
        if problem:
            uneven.setdefault((entry, shape), problem)
        known = names.parameters[name]
        params[name] = ParamClaim(
            name, entry, shape, known.dtype, known.is_buffer, layout, storage, known.requires_grad
        )
    ties = list(_ties(params, names))
    return params, sizes, [*found, *wrong.values(), *conflicts, *uneven.values(), *ties]


def _ties(params: Mapping[str, ParamClaim], names: Survey) -> Iterable[Diagnostic]:
    for name, known in names.parameters.items():
        one, two = params.get(known.first), params.get(name)
        if name == known.first or one is None or two is None:
            continue
        if (one.layout, one.storage) != (two.layout, two.storage):
            yield Diagnostic(
                code="SS212",
                what=f"{known.first} and {name} are one tensor and have two layouts",
                why=f"{one.entry.rule.value} against {two.entry.rule.value}",
                locations=(one.entry.location, two.entry.location),
                advice=("give both rules the same axes",),
            )


def match_points(
    table: Table, names: Survey, program: Program, sizes: Sizes, mesh: Mesh
) -> tuple[dict[str, Entry], list[Diagnostic]]:
    """Claim the batch entries and the activations that the program makes."""
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for name, index in program.entries.items():
        shapes[name] = program.values[index].shape
    for fqn, graph in _graphs(program, ""):
        for node in graph.nodes:
            if node.op == "point":
                target = node.outputs[0]
                assert target is not None
                for alias in node.func:
                    full = absolute(fqn, alias)
                    shapes.setdefault(full, graph.values[target].shape)
                    aliases.setdefault(full, absolute(fqn, node.func[0]))
    absent = [name for name in names.arguments if name not in program.entries]
    entries = list(program.entries)

    def alive(entry: Entry) -> bool:
        return any(entry.regex.fullmatch(name) for name in absent)

    inner = [name for name in shapes if name not in program.entries]
    claimed, found = assign(
        table.activations, [*entries, *inner], total=False, what="activation", alive=alive
    )
    missing = [name for name in entries if name not in claimed]
    if missing:
        found += [
            Diagnostic(
                code="SS202",
                what=f"no rule claims the batch entry {name}",
                why="every entry of the batch is claimed, so that each rank knows its part",
                locations=(Location(file=table.rules.origin.file, line=table.rules.origin.line),),
                advice=(f'add r"{name}": "..." to activations',),
            )
            for name in missing
        ]
    for name, entry in list(claimed.items()):
        other = claimed.get(aliases.get(name, name))
        if other is not None and other is not entry:
            found.append(
                Diagnostic(
                    code="SS204",
                    what=f"2 rules claim activation {name}, which is also {aliases[name]}",
                    locations=(other.location, entry.location),
                )
            )
    wrong: dict[Entry, Diagnostic] = {}
    fits: list[tuple[str, Entry, tuple[int, ...]]] = []
    for name, entry in claimed.items():
        problem = check_rank(entry, name, shapes[name])
        if problem:
            wrong.setdefault(entry, problem)
        else:
            fits.append((name, entry, shapes[name]))
    more, conflicts = _learn_more(sizes, fits)
    sizes.known.update(more.known)
    sizes.place.update(more.place)
    idle = idle_batch_axes({name: claimed[name] for name in entries if name in claimed}, mesh)
    return claimed, [*found, *wrong.values(), *conflicts, *idle]


def _learn_more(
    sizes: Sizes, fits: list[tuple[str, Entry, tuple[int, ...]]]
) -> tuple[Sizes, list[Diagnostic]]:
    more, conflicts = learn_sizes(fits, sizes.known)
    for name in sizes.known:
        more.place[name] = sizes.place[name]
    return more, conflicts


def _graphs(graph: Graph, fqn: str) -> Iterable[tuple[str, Graph]]:
    """The program and every call of a block, with the FQN that its names are relative to."""
    yield fqn, graph
    for node in graph.nodes:
        if node.op == "block":
            yield from _graphs(node.func.block, absolute(fqn, node.func.fqn))


def typecheck(program: Program, claims: Claims, mesh: Mesh, *, has_loss: bool) -> TypedProgram:
    """Type a program forward and backward; what is wrong is in `.diagnostics`."""
    uneven: dict[Any, Diagnostic] = {}
    cache: dict[Any, Layout | None] = {}

    def declared(entry: Entry, name: str, shape: tuple[int, ...]) -> Layout | None:
        key = (entry, shape)
        if key not in cache:
            layout, _, problem = layout_of(entry, name, shape, claims.sizes.known, mesh, storage=False)
            if problem:
                uneven[key] = problem
            cache[key] = None if problem else layout
        return cache[key]

    inference = Inference(mesh.shape, claims.params, claims.points, declared)
    forward = inference.program(program)
    cotangents = Cotangents(inference)
    seeds = [ref.index for ref in _seeds(program, has_loss) if forward.types[ref.index] is not None]
    backward = cotangents.program(forward, seeds)
    typed = TypedProgram(program, claims, mesh, forward, backward, inference)
    typed.diagnostics += uneven.values()
    typed.diagnostics += explain_issues(inference, claims)
    if not inference.issues:
        typed.diagnostics += explain_conflicts(cotangents.conflicts, inference, claims)
    return typed


def _seeds(program: Program, has_loss: bool) -> list[Ref]:
    """The values whose cotangents start complete: the loss's sum, or forward's outputs where no loss is known."""
    if has_loss and isinstance(program.result, (tuple, list)):
        return tensors(program.result[:1])
    return [Ref(index) for index in program.outputs]


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the cycle collector off: a walk makes many small objects, and the collector would visit them all."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def settle(found: Iterable[Diagnostic]) -> None:
    """Raise everything that a stage found.

    Raises:
        ShardingError: with all of it, where there is any.
    """
    found = tuple(found)
    if found:
        raise ShardingError(found)


def compile(  # noqa: A001 - the contract's name
    model: Model,
    rules: Rules,
    mesh: Mesh,
    inputs: Mapping[str, Any],
    loss: Callable[..., Any] | None = None,
) -> Plan:
    """Check `rules` against `model` and return the plan for `mesh`; no process group, no device.

    Args:
        model: a module, on meta or real, or a function that builds one; it is only read.
        rules: the table.
        mesh: the sizes of the axes.
        inputs: the global batch; only shapes and dtypes are read.
        loss: `loss_fn(output, batch) -> (sum, weight)`, typed with the model where it is given.

    Raises:
        ShardingError: with everything that the first stage to fail found.
    """
    return Compiler(survey(model), rules).plan(mesh, inputs, loss)


@define(eq=False)
class Compiler:
    """One model and one table; what does not depend on the mesh is kept between plans."""

    names: Survey
    rules: Rules
    policy: Policy = Policy()
    traces: list[tuple[Any, Program]] = field(factory=list)

    def plan(
        self,
        mesh: Mesh,
        inputs: Mapping[str, Any],
        loss: Callable[..., Any] | None = None,
        *,
        training: bool | None = None,
    ) -> Plan:
        """The plan for one mesh and one shape of batch; `training` is the model's own mode where it is None."""
        with uncollected():
            table, units, attributes = self.declared(mesh)
            params, sizes, found = match_params(table, self.names, mesh)
            attempt = Attempt(self, mesh, inputs, loss, training)
            settle(attempt.fixed(found))
            program = self.program(inputs, loss, training)
            points, found = match_points(table, self.names, program, sizes, mesh)
            settle(attempt.fixed(found))
            claims = Claims(table, params, points, sizes)
            typed = typecheck(program, claims, mesh, has_loss=loss is not None)
            settle(attempt.fixed(typed.diagnostics))
            layouts = {name: claim.layout for name, claim in params.items()}
            settle(
                dry_run(self.names.model, typed.forward, program, layouts, attributes, inputs, loss, training)
            )
            plan = lower(typed, self.names, units, attributes, self.policy, has_loss=loss is not None)
        return evolve(plan, legal=lambda world: self.legal_meshes(world, inputs, loss))

    def declared(self, mesh: Mesh) -> tuple[Table, tuple[UnitPlan, ...], dict[str, dict[str, int]]]:
        """What the table says before it meets a batch: rules, units, attributes."""
        table, found = parse_table(self.rules)
        settle(found)
        first = {name: known.first for name, known in self.names.parameters.items() if not known.is_buffer}
        units, unknown = resolve_units(self.rules, self.names.modules, first)
        modules = dict(self.names.model.named_modules())
        attributes, wrong = resolve_attributes(self.rules, modules, mesh.shape)
        settle(
            [
                *unknown,
                *wrong,
                *unused_axes(table, mesh, pipelined=self.rules.pipeline is not None),
                *unbuilt(mesh),
            ]
        )
        return table, units, attributes

    def static(
        self, mesh: Mesh
    ) -> tuple[dict[str, ParamPlan], tuple[UnitPlan, ...], dict[str, dict[str, int]]]:
        """What holds for every batch: parameters (what they owe is not known yet), units, attributes."""
        table, units, attributes = self.declared(mesh)
        claims, _, found = match_params(table, self.names, mesh)
        settle(found)
        return lowering.lower_params(claims, self.names, {}, units, mesh), units, attributes

    def entries(self, mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, ActivationPlan]:
        """The plans of a global batch's entries.

        Raises:
            ShardingError: SS202 for an entry that no rule claims, SS205 and SS301 for one that does not fit.
        """
        table, found = parse_table(self.rules)
        known = match_params(table, self.names, mesh)[1].known
        shapes = {name: tuple(item.shape) for name, item in batch.items() if isinstance(item, torch.Tensor)}
        claimed, wrong = assign(
            table.activations, shapes, total=True, what="batch entry", alive=lambda _: True
        )
        found += wrong
        plans: dict[str, ActivationPlan] = {}
        for name, entry in claimed.items():
            problem = check_rank(entry, name, shapes[name])
            if problem is None:
                layout, _, problem = layout_of(entry, name, shapes[name], known, mesh, storage=False)
                plans[name] = lowering.entry_plan(name, entry, layout, str(batch[name].dtype))
            found += [problem] if problem else []
        settle(found)
        return plans

    def global_shapes(self, mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The whole batch that a local one is a part of, on meta."""
        table, _ = parse_table(self.rules)
        whole: dict[str, Any] = {}
        for name, item in batch.items():
            entry = next((entry for entry in table.activations if entry.regex.fullmatch(name)), None)
            if not isinstance(item, torch.Tensor) or entry is None or len(entry.spec.dims) > item.ndim:
                whole[name] = item
                continue
            dims = dims_of(entry.spec, item.ndim)
            shape = [
                length * degree(mesh, dim.all_axes) for length, dim in zip(item.shape, dims, strict=False)
            ]
            whole[name] = torch.empty(shape, dtype=item.dtype, device="meta")
        return whole

    def program(
        self, inputs: Mapping[str, Any], loss: Callable[..., Any] | None, training: bool | None
    ) -> Program:
        """The trace for a shape of batch, made once."""
        key = (batch_key(inputs), loss, training)
        for known, program in self.traces:
            if known == key:
                return program
        check_inputs(inputs, self.names)
        try:
            program, _ = trace(self.names.model, inputs, loss, training)
        except HostRead as error:
            raise ShardingError([host_read(error)]) from error
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ShardingError([lowering.failed(error, inputs)]) from error
        self.traces.append((key, program))
        return program

    def legal_meshes(
        self, world: int, inputs: Mapping[str, Any], loss: Callable[..., Any] | None
    ) -> tuple[Mesh, ...]:
        """Every mesh of `world` ranks over the axes of the table that passes the check."""
        table, _ = parse_table(self.rules)
        named = {axis for entry in (*table.params, *table.activations) for axis in entry.spec.axes}
        legal: list[Mesh] = []
        for mesh in meshes(world, [axis for axis in AXES if axis in named]):
            try:
                self.plan(mesh, inputs, loss)
            except ShardingError:
                continue
            legal.append(mesh)
        return tuple(legal)


@define(eq=False)
class Attempt:
    """One check, to be repeated with an edit: what it finds then decides whether the edit is a fix."""

    compiler: Compiler
    mesh: Mesh
    inputs: Mapping[str, Any]
    loss: Callable[..., Any] | None
    training: bool | None

    def fixed(self, found: Iterable[Diagnostic]) -> list[Diagnostic]:
        """The diagnostics with those hints as fixes that passed; what one fix mends is told once."""
        left = merged(found)
        before = {identity(each) for each in left}
        told: list[Diagnostic] = []
        mended: set[Any] = set()
        for each in left:
            if identity(each) in mended:
                continue
            passing = sorted(self._passing(each, before), key=lambda fix: -len(fix[1]))
            fixes = tuple(dict.fromkeys((*each.fixes, *(text for text, _ in passing))))[:MOST_FIXES]
            if passing:
                mended |= passing[0][1]
            told.append(evolve(each, hints=(), fixes=fixes))
        return told

    def _passing(self, diagnostic: Diagnostic, before: set[Any]) -> Iterator[tuple[str, set[Any]]]:
        """The hints that mend a mistake and bring no other, with all the mistakes that they mend."""
        own = identity(diagnostic)
        for hint in diagnostic.hints:
            if isinstance(hint, MeshEdit):
                after = {n: self.finds(self.compiler.rules, self._resized(hint.axis, n)) for n in hint.degrees}
                legal = [n for n, left in after.items() if left <= before - {own}]
                if legal:
                    mends = before - set[Any]().union(*(after[n] for n in legal))
                    yield f"{hint.axis} in {{{', '.join(map(str, legal))}}}", mends
                continue
            rules = self.compiler.rules.override(params=hint.params, activations=hint.activations)
            after_edit = self.finds(rules, self.mesh)
            if after_edit <= before - {own}:
                yield hint.text, before - after_edit

    def _resized(self, axis: str, size: int) -> Mesh:
        return self.mesh.replace(**{axis: size})

    def finds(self, rules: Rules, mesh: Mesh) -> set[Any]:
        """What the check finds with other rules or another mesh, up to the types; the trace is not made again."""
        table, found = parse_table(rules)
        if not found:
            params, sizes, found = match_params(table, self.compiler.names, mesh)
        if not found:
            program = self.compiler.program(self.inputs, self.loss, self.training)
            points, found = match_points(table, self.compiler.names, program, sizes, mesh)
        if not found:
            claims = Claims(table, params, points, sizes)
            found = typecheck(program, claims, mesh, has_loss=self.loss is not None).diagnostics
        return {identity(each) for each in merged(found)}


MOST_FIXES = 3


def identity(diagnostic: Diagnostic) -> Any:
    """What makes a mistake the same before and after an edit."""
    places = diagnostic.locations[:1] if diagnostic.matches else ()
    return diagnostic.code, diagnostic.what, places, diagnostic.matches


def merged(found: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics that say the same of several rules, as one with all their locations."""
    kept: dict[Any, Diagnostic] = {}
    for each in found:
        key = identity(each)
        if key in kept:
            places = dict.fromkeys((*kept[key].locations, *each.locations))
            kept[key] = evolve(kept[key], locations=tuple(places))
        else:
            kept[key] = each
    return list(kept.values())


def meshes(world: int, axes: Sequence[str]) -> Iterator[Mesh]:
    """Every way to factor `world` over `axes`."""

    def split(rest: int, left: Sequence[str]) -> Iterator[dict[str, int]]:
        if not left:
            if rest == 1:
                yield {}
            return
        for size in range(1, rest + 1):
            if rest % size == 0:
                for others in split(rest // size, left[1:]):
                    yield {left[0]: size, **others}

    for sizes in split(world, axes):
        yield Mesh(**sizes)  # pyright: ignore[reportArgumentType]


def batch_key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a batch decides its program: names, shapes, dtypes, and what is no tensor."""
    return tuple(
        (name, tuple(item.shape), item.dtype) if isinstance(item, torch.Tensor) else (name, repr(item))
        for name, item in inputs.items()
    )


def check_inputs(inputs: Mapping[str, Any], names: Survey) -> None:
    """SS401 for a batch that forward cannot be called with."""
    missing = [name for name in required_arguments(names.model) if name not in inputs]
    if missing:
        refuse(
            "SS401",
            f"the batch has no entry {missing[0]}, which forward needs",
            why=f"forward takes ({', '.join(names.arguments)}); the batch has ({', '.join(inputs)})",
        )


def host_read(error: HostRead) -> Diagnostic:
    """SS313 for Python that depends on a tensor's value."""
    return Diagnostic(
        code="SS313",
        what=str(error),
        why="what Python decides by a value of the batch may differ from rank to rank",
        locations=(Location(file=error.file, line=error.line),),
    )


def unbuilt(mesh: Mesh) -> Iterator[Diagnostic]:
    """SS214 for an axis that the runtime has no lowering for."""
    for axis in ("pp",):
        if mesh[axis] > 1:
            yield Diagnostic(
                code="SS214",
                what=f"{axis}={mesh[axis]}: this version does not run pipelines",
                why="stages are not lowered yet; dp, fsdp and tp are",
            )


def lower(
    typed: TypedProgram,
    names: Survey,
    units: tuple[UnitPlan, ...],
    attributes: Mapping[str, Mapping[str, int]],
    policy: Policy,
    *,
    has_loss: bool,
) -> Plan:
    """The plan of a typed program.

    Raises:
        ShardingError: SS307, SS308 and SS310, for gradients or a loss that no reduction makes right.
    """
    owed, found = lowering.owed_axes(typed)
    params = lowering.lower_params(typed.claims.params, names, owed, units, typed.mesh)
    found += lowering.check_storage(params, typed.claims)
    loss, wrong = lowering.lower_loss(typed) if has_loss else (None, [])
    settle([*found, *wrong])
    activations, entries = lowering.lower_activations(typed)
    last = lowering.last_unit(typed, units)
    collectives = lowering.folded_collectives(
        [
            *lowering.point_collectives(typed, lowering.recomputed(units, policy)),
            *lowering.substitution_collectives(typed),
            *lowering.unit_collectives(params, units, typed.mesh, last, policy),
            *lowering.step_collectives(params, typed.mesh, loss),
        ]
    )
    return Plan(
        mesh=typed.mesh,
        params=params,
        activations=activations,
        collectives=collectives,
        units=units,
        points=lowering.lower_points(typed),
        substitutions=tuple(lowering.substitutions(typed)),
        entries=entries,
        attributes=attributes,
        loss=loss,
        output=lowering.output_layouts(typed),
        last_unit=last,
    )
