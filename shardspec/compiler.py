"""The stages, in order: parse the table, match it against the model, type the program, lower it to a plan."""

import gc
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from attrs import define, evolve, field

from shardspec import lower as lowering
from shardspec.arguments import as_model, check_arguments
from shardspec.balanced import lies_balanced, unmatched_strategies
from shardspec.batch import Batch, batch_key, check_inputs, entry_plans, global_shapes, host_read, microbatch_shapes
from shardspec.claims import match_params, match_points, told_apart
from shardspec.constraints import Constraint
from shardspec.context import attention_collectives
from shardspec.diagnostics import Diagnostic, ShardingError
from shardspec.dryrun import Difference, dry_run
from shardspec.exchange import calls_that_differ, experts_collectives, lower_experts, routing_size
from shardspec.explain import attribute_edits, explain_differences
from shardspec.fixes import Attempt
from shardspec.hazards import hazards
from shardspec.inflight import pipeline_usage
from shardspec.kin import Kin, kindred
from shardspec.mesh import AXES, Mesh
from shardspec.pipelining import check_pipeline, lay, microbatch_count
from shardspec.plan import ActivationPlan, LossPlan, ParamPlan, PipelinePlan, Plan, UnitPlan
from shardspec.policy import Policy
from shardspec.program import Program
from shardspec.recording import trace
from shardspec.residency import usage
from shardspec.rules.match import as_pattern, assign, fold, unknown_sizes, unused_axes
from shardspec.rules.parse import Table, parse_table
from shardspec.rules.table import Rules
from shardspec.sequence import AXIS
from shardspec.stages import Claims, TypedProgram
from shardspec.staging import sends, staged_params, staged_points, staged_steps, staged_units
from shardspec.survey import Model, Survey, View, survey
from shardspec.tracing import OF_AN_OPERATOR, HostRead, raised_here, refuse_gradient_hooks
from shardspec.typecheck import typecheck
from shardspec.units import check_experts, resolve_attributes, resolve_units

Looked = TypeVar("Looked", bound=tuple[Any, ...])
"""What a stage gives, the diagnostics last."""


@contextmanager
def uncollected() -> Generator[None]:
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


def compile(
    model: Model,
    rules: Rules,
    mesh: Mesh,
    inputs: Mapping[str, Any],
    loss: Callable[..., Any] | None = None,
    policy: Policy | None = None,
) -> Plan:
    """Check `rules` against `model` and return the plan for `mesh`; no process group, no device.

    Args:
        model: a module, on meta or real, or a function that builds one; it is only read.
        rules: the table.
        mesh: the sizes of the axes.
        inputs: the global batch; only shapes and dtypes are read.
        loss: `loss_fn(output, batch) -> (sum, weight)`, typed with the model where it is given.
        policy: how the plan is run: a pipeline's schedule and microbatches, what is computed again.

    Raises:
        ShardingError: with everything that the first stage to fail found.
    """
    check_arguments(rules, mesh, inputs)
    with uncollected():
        return Compiler(survey(as_model(model)), rules, policy or Policy()).plan(mesh, inputs, loss)


@define(eq=False)
class Compiler:
    """One model and one table; what does not depend on the mesh is kept between plans."""

    names: Survey
    rules: Rules
    policy: Policy = field(factory=Policy)
    traces: list[tuple[Any, Program]] = field(factory=list)

    def plan(
        self,
        mesh: Mesh,
        inputs: Mapping[str, Any],
        loss: Callable[..., Any] | None = None,
        *,
        training: bool | None = None,
        fix: bool = True,
    ) -> Plan:
        """The plan for one mesh and one shape of batch.

        Args:
            training: the mode of the model; its own where it is None.
            fix: try the edits that a diagnostic hints at.
        """
        with uncollected():
            table, kin = self.table(mesh)
            settle(unmatched_strategies(self.policy, lambda: self.names.whole.modules))
            whole, mesh = mesh, mesh.replace(pp=1)
            if whole["pp"] > 1:
                settle(check_pipeline(self.rules, self.names.whole, whole, self.policy))
            outline = self.names.outline(kin.heads)
            _, attributes, found = self.look(outline, lambda view: self.declared(view, mesh))
            settle(found)
            params, sizes, found = self.look(outline, lambda view: match_params(table, view, mesh))
            batch, inputs = inputs, microbatch_shapes(table, mesh, inputs, microbatch_count(self.policy, whole))
            attempt = Attempt(
                self.rules,
                mesh,
                lambda rules, other: self.check(rules, other, inputs, loss, training),
                lambda rules, other: self.passes(rules, other, batch, loss, training),
                fix,
            )
            settle(attempt.fixed(found))
            program = self.program(inputs, loss, training)
            outer, kin = kin, told_apart(table, program, kin)
            if kin.heads != outer.heads:
                outline = self.names.outline(kin.heads)
                _, attributes, found = self.look(outline, lambda view: self.declared(view, mesh))
                settle(found)
                params, sizes, _ = match_params(table, outline, mesh)
            points, found = match_points(table, self.names, program, sizes, mesh, kin)
            if found:
                _, found = match_points(table, self.names, program, sizes, mesh, Kin())
            settle(attempt.fixed(found))
            claims = Claims(table, kin, params, points, sizes)
            typed = typecheck(program, claims, mesh, has_loss=loss is not None, hinted=fix, policy=self.policy)
            settle(attempt.fixed(typed.diagnostics))
            differences = dry_run(self.names, typed.forward, program, claims, attributes, inputs, loss, training)
            found = explain_differences(differences, typed)
            if found and fix:
                named = self.named_attributes(differences, claims, mesh, lambda other: attempt.confirm(other, mesh))
                found = [evolve(found[0], fixes=(named,), advice=()), *found[1:]] if named else found
            settle(found)
            outline = outline if typed.kin.heads == kin.heads else self.names.outline(typed.kin.heads)
            summed, found = prove(typed, outline, self.rules, has_loss=loss is not None)
            settle(attempt.fixed(found))
            pipeline = lay(typed, self.names.whole, self.rules, whole, self.policy) if whole["pp"] > 1 else None
        return Plan.deferred(
            whole,
            lambda world: self.legal_meshes(world, batch, loss),
            lambda: assemble(typed, self.names.whole, self.rules, whole, self.policy, summed, pipeline),
        )

    def table(self, mesh: Mesh) -> tuple[Table, Kin]:
        """The parsed table, and the blocks that it cannot tell apart.

        Raises:
            ShardingError: for a table that cannot be read, or that does not go with the mesh.
        """
        table, found = parse_table(self.rules)
        settle(found)
        if self.rules.experts is not None or self.rules.capacity is not None:
            settle(check_experts(self.rules, self.names.whole.modules))
        settle(unknown_sizes(table))
        settle(unused_axes(table, mesh, pipelined=self.rules.pipeline is not None))
        return table, self.kin(table)

    def kin(self, table: Table) -> Kin:
        """The repeated blocks that no pattern of a table tells apart."""
        units = [pattern for unit in self.rules.units for pattern in ((unit,) if isinstance(unit, str) else unit)]
        experts = [table.rules.experts] if table.rules.experts is not None else []
        strategies = [pattern for pattern, _ in self.policy.attention]
        named = (*units, *table.rules.attributes, *experts, *strategies)
        modules = [re.compile(pattern) for pattern in named]
        return kindred(self.names, [entry.regex for entry in table.params], modules)

    def look(self, outline: View, stage: Callable[[View], Looked]) -> Looked:
        """What a stage finds in one block of each kind; where that is a mistake, in all, so that it is told in full."""
        looked = stage(outline)
        return stage(self.names.whole) if looked[-1] else looked

    def declared(
        self, view: View, mesh: Mesh
    ) -> tuple[tuple[UnitPlan, ...], dict[str, dict[str, int]], list[Diagnostic]]:
        """What the table says of modules: units and attributes."""
        units, unknown = resolve_units(self.rules, view)
        attributes, wrong = resolve_attributes(self.rules, view.modules, mesh.shape)
        return units, attributes, [*unknown, *wrong]

    def static(self, mesh: Mesh) -> tuple[dict[str, ParamPlan], tuple[UnitPlan, ...], dict[str, dict[str, int]]]:
        """What holds for every batch: parameters (what they owe is not known yet), units, attributes."""
        table, _ = self.table(mesh)
        mesh = mesh.replace(pp=1)
        units, attributes, found = self.declared(self.names.whole, mesh)
        settle(found)
        claims, _, found = match_params(table, self.names.whole, mesh)
        settle(found)
        return lowering.lower_params(claims.__getitem__, self.names.whole, lambda _: (), units, mesh), units, attributes

    def entries(self, mesh: Mesh, batch: Batch) -> dict[str, ActivationPlan]:
        """The plans of a global batch's entries.

        Raises:
            ShardingError: SS202 for an entry that no rule claims, SS205 and SS301 for one that does not fit.
        """
        table, _ = parse_table(self.rules)
        known = match_params(table, self.names.outline(self.kin(table).heads), mesh)[1].known
        plans, found = entry_plans(table, known, mesh, batch)
        settle(found)
        return plans

    def balanced(self, mesh: Mesh, batch: Batch) -> bool:
        """Whether the sequence of a global batch lies head and tail over cp."""
        if mesh[AXIS] == 1 or self.policy.balance is False:
            return False
        table, _ = parse_table(self.rules)
        whole = microbatch_shapes(table, mesh, batch, microbatch_count(self.policy, mesh))
        program = self.program(whole, None, None)
        points = assign(table.activations, program.entries, what=str, alive=lambda _: True, place=table.rules.location)[
            0
        ]
        return lies_balanced(program, points, mesh, self.policy)

    def global_shapes(self, mesh: Mesh, batch: Batch) -> dict[str, Any]:
        """The whole batch that a local one is a part of, on meta."""
        return global_shapes(parse_table(self.rules)[0], mesh, batch)

    def program(self, inputs: Mapping[str, Any], loss: Callable[..., Any] | None, training: bool | None) -> Program:
        """The trace for a shape of batch, made once."""
        key = (batch_key(inputs), loss, training, self.rules.experts)
        for known, program in self.traces:
            if known == key:
                return program
        check_inputs(inputs, self.names)
        try:
            refuse_gradient_hooks(self.names.model)
            program = trace(self.names, inputs, loss, training, self.rules.experts)
        except HostRead as error:
            raise ShardingError([host_read(error)]) from error
        except (ShardingError, OSError, MemoryError):  # the machine's, not the program's
            raise
        except Exception as error:
            if raised_here(error) and not isinstance(error, OF_AN_OPERATOR):
                raise
            raise ShardingError([lowering.failed(error, inputs)]) from error
        self.traces.append((key, program))
        return program

    def check(
        self, rules: Rules, mesh: Mesh, inputs: Batch, loss: Callable[..., Any] | None, training: bool | None
    ) -> list[Diagnostic]:
        """What is wrong with other rules or on another mesh, up to the types; the trace is not made again."""
        table, found = parse_table(rules)
        if not found:
            kin = evolve(self, rules=rules).kin(table)
            params, sizes, found = match_params(table, self.names.outline(kin.heads), mesh)
            if not found:
                program = evolve(self, rules=rules).program(inputs, loss, training)
                kin = told_apart(table, program, kin)
                params, sizes, _ = match_params(table, self.names.outline(kin.heads), mesh)
                points, found = match_points(table, self.names, program, sizes, mesh, kin)
                if not found:
                    claims = Claims(table, kin, params, points, sizes)
                    found = typecheck(
                        program, claims, mesh, has_loss=loss is not None, hinted=False, policy=self.policy
                    ).diagnostics
        return found

    def named_attributes(
        self, differences: Sequence[Difference], claims: Claims, mesh: Mesh, passes: Callable[[Rules], bool]
    ) -> str:
        """An `attributes=` with which a model that keeps global sizes in its modules passes, or nothing."""
        first = differences[0]
        modules = dict(self.names.model.named_modules())
        module = modules.get(first.path)
        for named in attribute_edits(module, claims, mesh.shape) if module is not None else ():
            edit = {as_pattern(fold(first.path)): named}
            if passes(self.rules.override(attributes=edit)):
                shown = ", ".join(f'"{name}": "{text}"' for name, text in named.items())
                return f'attributes={{r"{as_pattern(fold(first.path))}": {{{shown}}}}}'
        return ""

    def passes(
        self, rules: Rules, mesh: Mesh, inputs: Batch, loss: Callable[..., Any] | None, training: bool | None
    ) -> bool:
        """Whether other rules pass every stage."""
        try:
            Compiler(self.names, rules, self.policy, self.traces).plan(mesh, inputs, loss, training=training, fix=False)
        except ShardingError:
            return False
        return True

    def legal_meshes(self, world: int, inputs: Batch, loss: Callable[..., Any] | None) -> tuple[Mesh, ...]:
        """Every mesh of `world` ranks over the axes of the table that passes the check."""
        return tuple(plan.mesh for plan in self.legal_plans(world, inputs, loss))

    def legal_plans(self, world: int, inputs: Batch, loss: Callable[..., Any] | None) -> Iterator[Plan]:
        """The plan of every mesh of `world` ranks over the axes of the table that passes the check.

        For each set of axes larger than one, the first mesh that passes tells what their sizes must divide; the
        others are checked where that holds. Meshes with pp are among them where the table lays layers over it: whether
        they pass hangs on the policy's schedule and microbatches too, and facts hold for as many microbatches alone.
        """
        table, _ = parse_table(self.rules)
        named = {axis for entry in (*table.params, *table.activations) for axis in entry.spec.axes}
        named |= {"pp"} if self.rules.pipeline is not None else set()
        facts: dict[tuple[tuple[str, ...], int], tuple[Constraint, ...]] = {}
        for mesh in meshes(world, [axis for axis in AXES if axis in named]):
            key = (mesh.axes, microbatch_count(self.policy, mesh))
            if not all(fact.holds(mesh) for fact in facts.get(key, ())):
                continue
            try:
                plan = self.plan(mesh, inputs, loss, fix=False)
            except ShardingError:
                continue
            facts.setdefault(key, plan.constraints)
            yield plan


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


def prove(
    typed: TypedProgram, names: View, rules: Rules, *, has_loss: bool
) -> tuple[LossPlan | None, list[Diagnostic]]:
    """How the loss is summed, and what no type tells: SS307, SS308 and SS310 for gradients or a loss that no
    reduction makes right, and what `hazards` finds."""
    units, _ = resolve_units(rules, names)
    owed, found = lowering.owed_axes(typed, names)
    params = lowering.lower_params(typed.claims.of, names, lambda first: owed.get(first, ()), units, typed.mesh)
    found += [
        *lowering.check_storage(params, owed, typed.claims),
        *hazards(typed, params, units),
        *calls_that_differ(typed),
    ]
    loss, wrong = lowering.lower_loss(typed) if has_loss else (None, [])
    return loss, [*found, *wrong]


def assemble(
    typed: TypedProgram,
    names: View,
    rules: Rules,
    mesh: Mesh,
    policy: Policy,
    loss: LossPlan | None,
    pipeline: PipelinePlan | None,
) -> Plan:
    """The plan of a program that is proved, written out for every layer; `mesh` with pp, of which no type knows."""
    units, _ = resolve_units(rules, names)
    attributes, _ = resolve_attributes(rules, names.modules, typed.mesh.shape)
    owed = lowering.owed_axes(typed, names)[0]
    params = lowering.lower_params(
        typed.claims.of, names, lambda first: owed.get(typed.kin.canonical(first), ()), units, typed.mesh
    )
    activations, entries = lowering.lower_activations(typed)
    last = lowering.last_unit(typed, units)
    facts = lowering.constraints(typed)
    again = lowering.recomputed(units, policy)
    count = microbatch_count(policy, mesh)
    experts = lower_experts(typed)
    loss = loss and evolve(loss, beside=routing_size(experts))
    stepwise = evolve(policy, accumulate=count, microbatches=None)
    dtype_of = lowering.compute_dtypes(params, policy)
    points = [
        *lowering.point_collectives(typed, again, dtype_of),
        *experts_collectives(typed, again, dtype_of),
        *lowering.substitution_collectives(typed, dtype_of),
        *attention_collectives(typed, again, dtype_of),
    ]
    if pipeline is None:
        gathers = lowering.unit_collectives(params, units, typed.mesh, last, policy)
        rows = [
            *lowering.repeated([*lowering.named_by_fold(points), *gathers], count),
            *lowering.step_collectives(params, mesh, loss),
        ]
    else:
        params = staged_params(params, pipeline)
        rows = [
            *lowering.repeated(lowering.named_by_fold(staged_points(points, pipeline, params)), count),
            *sends(pipeline),
            *staged_units(params, units, typed.mesh, pipeline, policy),
            *staged_steps(params, mesh, loss, pipeline),
        ]
    return Plan(
        mesh=mesh,
        params=params,
        activations=activations,
        collectives=lowering.folded_collectives(rows),
        units=units,
        points=lowering.lower_points(typed),
        substitutions=tuple(lowering.substitutions(typed)),
        entries=entries,
        attributes=attributes,
        loss=loss,
        output=lowering.output_layouts(typed),
        constraints=facts,
        last_unit=last,
        pipeline=pipeline,
        experts=experts,
        balanced=typed.inference.balanced,
        counted=(
            (lambda: usage(typed, params, units, last, stepwise, facts))
            if pipeline is None
            else (lambda: pipeline_usage(typed, params, units, stepwise, pipeline, facts))
        ),
    )
