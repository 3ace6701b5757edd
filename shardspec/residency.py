"""The most that a rank holds at a time in a step: a walk over the typed program, forward and then backward.

A value lives until its last reader has run, or until its backward where one keeps it. Blocks that run alike are
walked once, so that the cost does not grow with depth.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field

from shardspec.amounts import NOTHING, Amount, Usage, as_kind, fullest, part, plus, rows_of, stored, times
from shardspec.constraints import Constraint, satisfying
from shardspec.cotangent import Backward, differentiable
from shardspec.expectation import expected
from shardspec.footprint import KEPT, PASSING, Halves, Record
from shardspec.infer import TypedGraph, absolute
from shardspec.layout import Sizes
from shardspec.localrun import COLLECTIVES, LocalRun, moved
from shardspec.lower import compute_dtypes, entry_plan, reduced_by_hand
from shardspec.moments import GATHERED, GRADIENTS, Gathering, Setting, Timeline
from shardspec.peaks import NONE, Noted, Peaks, undominated
from shardspec.plan import ParamPlan, UnitPlan
from shardspec.policy import Policy, chosen
from shardspec.program import Node, Program, Ref, tensors
from shardspec.stages import TypedProgram


@define(eq=False)
class Walk:
    """The records of a program's graphs."""

    setting: Setting
    memo: dict[Any, Record] = field(factory=dict)
    halved: bool = False
    """Whether a backward in two halves is told too."""

    def graph(self, typed: TypedGraph, back: Backward | None, live: tuple[bool, ...], fqn: str) -> Record:
        """What a graph does as a whole, as if it were one operator that reads its inputs."""
        records = self._records(typed, back, live, fqn)
        results = tensors(graph.result) if isinstance(graph := typed.graph, Program) else map(Ref, graph.outputs)
        ends = [ref.index for ref in results]
        record = Timeline(self.setting, typed, records, differentiable(typed, live), fqn, ends).record()
        if not self.halved:
            return record
        halves = [each.halves or Halves() for each in records]
        joins = {at: each.held_outputs for at, each in enumerate(halves) if each.held or each.held_outputs}
        weights = Peaks.of(amount for each in halves for amount in each.weights.total)
        views = {id(each): each.input_view() for each in records}
        inputs, moving = [views[id(each)] for each in records], differentiable(typed, live, params=False)
        timeline = Timeline(self.setting, typed, inputs, moving, fqn, ends, joins=joins)
        return evolve(record, halves=timeline.input_half(weights))

    def _halves(self, run: LocalRun, position: int, record: Record, live: tuple[bool, ...]) -> Record:
        """The same with the halves of its backward, of an operator or a point.

        Args:
            live: which inputs of the graph want a gradient.
        """
        typed, node = run.typed, run.typed.graph.nodes[position]
        every, moving = differentiable(typed, live), differentiable(typed, live, params=False)
        wants = tuple(node.grad and ref.index in moving for ref in node.operands)
        if not any(wants):
            return evolve(record, halves=Halves())
        if node.op == "point":
            return evolve(record, halves=Halves(backward=record.backward, grads=record.grads))
        record_of = self._experts if node.op == "experts" else LocalRun.operator
        inputs = record_of(run, position, wants)
        rest = tuple(node.grad and ref.index in every and ref.index not in moving for ref in node.operands)
        joins = any(rest)
        return evolve(
            record,
            halves=Halves(
                backward=inputs.backward,
                grads=inputs.grads,
                held_outputs=frozenset(at for at, index in enumerate(node.outputs) if joins and index in moving),
                weights=record_of(run, position, rest).backward if joins else NONE,
            ),
        )

    def _records(self, typed: TypedGraph, back: Backward | None, live: tuple[bool, ...], fqn: str) -> list[Record]:
        run = LocalRun(typed, self.setting.sizes, self.setting.dtype_of)
        moving = differentiable(typed, live)
        records: list[Record] = []
        for position, node in enumerate(typed.graph.nodes):
            wants = tuple(node.grad and ref.index in moving for ref in node.operands)
            if node.op == "block":
                inner = typed.calls[position]
                inside = back.calls.get(position) if back else None
                records.append(self._block(inner, inside, wants, absolute(fqn, node.func.fqn)))
                continue
            if node.op == "point":
                record = self._point(run, position, back, wants)
            elif node.op == "experts":
                record = self._experts(run, position, wants)
            else:
                record = run.operator(position, wants)
                record = self._cast(run, node, record, fqn) if self.setting.casts else record
            records.append(self._halves(run, position, record, live) if self.halved else record)
        return records

    def _experts(self, run: LocalRun, position: int, wants: tuple[bool, ...]) -> Record:
        body = LocalRun(run.typed.bodies[position], self.setting.sizes, self.setting.dtype_of)
        moving = differentiable(body.typed, wants[:2])
        records = [
            body.operator(at, tuple(node.grad and ref.index in moving for ref in node.operands))
            for at, node in enumerate(body.typed.graph.nodes)
        ]
        return expected(run, position, body, records, wants)

    def _cast(self, run: LocalRun, node: Node, record: Record, fqn: str) -> Record:
        """The same where the parameters that it reads are cast for it, and their gradients back."""
        for at, ref in enumerate(node.operands):
            value = run.typed.graph.values[ref.index]
            if value.kind != "param" or self.setting.stored(absolute(fqn, value.name)):
                continue
            copy, grad = run.whole(ref.index), record.grads[at] if at < len(record.grads) else None
            wide = part(PASSING, run.typed.layout(ref.index), value.dtype.itemsize, run.sizes)
            kept = plus(record.kept, as_kind(KEPT, copy)) if at in record.operands_kept else record.kept
            record = evolve(
                record,
                kept=kept,
                forward=record.forward.above(copy),
                backward=record.backward.above(wide) if grad is not None else record.backward,
                grads=tuple(wide if i == at and grad is not None else g for i, g in enumerate(record.grads)),
            )
        return record

    def _block(self, typed: TypedGraph, back: Backward | None, wants: tuple[bool, ...], fqn: str) -> Record:
        remat = self.setting.remat(fqn)
        key = (id(typed), id(back), wants, remat, self.setting.inside.get(fqn))
        if key not in self.memo:
            record = self.graph(typed, back, wants, fqn)
            self.memo[key] = rematerialised(record, self.graph(typed, None, (), fqn)) if remat else record
        return self.memo[key]

    def _point(self, run: LocalRun, position: int, back: Backward | None, wants: tuple[bool, ...]) -> Record:
        typed = run.typed
        node = typed.graph.nodes[position]
        source, target = node.args[0].index, node.outputs[0]
        assert target is not None, "a point has a result"
        step = typed.transitions.get(position)
        moves = back.moves.get(position, ()) if back else ()
        if step is None or not (step.moves or moves):
            run.held[target] = run.tensor(source)
            return Record(outputs=(0,), grads=(0 if wants[0] else None,))
        value = typed.graph.values[source]
        size = run.dtype_of(value.dtype).itemsize
        made, shape = run.whole(target), value.shape
        if not step.moves:
            run.held[target] = run.tensor(source)
        return Record(
            outputs=(made if step.moves else 0,),
            forward=moved(step.before, step.moves, size, run.sizes, shape),
            backward=moved(step.after, moves, size, run.sizes, shape),
            grads=((run.whole(source) if moves else 0) if wants[0] else None,),
        )


def rematerialised(record: Record, alone: Record) -> Record:
    """A block whose forward runs again in its backward.

    Args:
        alone: the same block without gradients, which keeps nothing.
    """
    again = Noted()
    again.note(NOTHING, record.forward)
    again.note(record.kept, record.backward)
    return evolve(
        record,
        operands_kept=frozenset(range(len(record.grads))),
        outputs_kept=frozenset(),
        kept=NOTHING,
        forward=alone.forward,
        backward=again.peaks(),
    )


def usage(
    typed: TypedProgram,
    params: Mapping[str, ParamPlan],
    units: Iterable[UnitPlan],
    last: str,
    policy: Policy,
    facts: Iterable[Constraint],
) -> Usage:
    """What a plan's step holds on a rank.

    Args:
        last: the unit that stays gathered between forward and backward.
        facts: what the sizes of the axes must divide; they tell which moment can be the fullest.
    """
    sizes = typed.mesh.shape
    setting = setting_of(typed, params, units, last, policy, {})
    record = Walk(setting).graph(typed.forward, typed.backward, (), "")
    own = [plan for name, plan in params.items() if plan.first == name]
    trained = [plan for plan in own if plan.trained and not plan.buffer]
    gradients = plus(*(of_param(GRADIENTS, plan, sizes) for plan in trained))
    before = gradients if policy.accumulate > 1 else NOTHING
    made = (origin for origin in record.outputs if not isinstance(origin, int))
    phases = {
        "forward": record.forward.above(before),
        "backward": record.backward.above(plus(before, record.kept, *made)),
        "update": Peaks.of(plus(gradients, flat) for flat in flattened(trained, sizes)),
    }
    meshes = satisfying(typed.mesh, facts, MOST_MESHES)
    phase_of = {id(amount): phase for phase, peaks in phases.items() for amount in peaks.total}
    moments = fullest(undominated(amount for peaks in phases.values() for amount in peaks.total), meshes)
    kinds = {
        kind: fullest(undominated(a for peaks in phases.values() for a in peaks.kinds.get(kind, ())), meshes)
        for kind in PASSING_KINDS
    }
    held = (of_param("buffers" if plan.buffer else "parameters", plan, sizes) for plan in own)
    return Usage(
        resident=rows_of(plus(*held, batch(typed, policy))),
        moments=tuple((phase_of[id(amount)], rows_of(amount)) for amount in moments),
        kinds=tuple((kind, tuple(map(rows_of, amounts))) for kind, amounts in kinds.items()),
    )


MOST_MESHES = 512
"""As many sizes of the axes are tried, to leave out the moments that are the fullest on none."""

PASSING_KINDS = (GRADIENTS, GATHERED, KEPT, PASSING, COLLECTIVES)
"""What comes and goes within a step."""


def batch(typed: TypedProgram, policy: Policy) -> Amount:
    """A rank's part of the batch, all microbatches of it."""
    found: Amount = NOTHING
    for name, index in typed.program.entries.items():
        value, entry = typed.program.values[index], typed.claims.points[name]
        layout = typed.forward.layout(index)
        rows = entry_plan(name, entry, layout, str(value.dtype)).batch_dim
        count = policy.accumulate if rows is not None else 1
        found = plus(found, times(part("batch", layout, value.dtype.itemsize, typed.mesh.shape), count))
    return found


def flattened(trained: Iterable[ParamPlan], sizes: Sizes) -> Iterator[Amount]:
    """The messages in which a step sums what gradients are owed: one at a time."""
    groups: dict[tuple[tuple[str, ...], str], list[ParamPlan]] = {}
    for plan in trained:
        axes = reduced_by_hand(plan)
        if axes:
            groups.setdefault((axes, plan.dtype), []).append(plan)
    yield NOTHING
    for owing in groups.values():
        if len(owing) > 1:
            yield plus(*(of_param(COLLECTIVES, plan, sizes) for plan in owing))


def setting_of(
    typed: TypedProgram,
    params: Mapping[str, ParamPlan],
    units: Iterable[UnitPlan],
    last: str,
    policy: Policy,
    known: dict[Any, Gathering],
) -> Setting:
    """What the walk reads of a plan and a policy.

    Args:
        known: what was found of units before, for those that are alike.
    """
    sizes = typed.mesh.shape
    home: dict[str, str] = {}
    gatherings: dict[str, Gathering] = {}
    for unit in units:
        home |= dict.fromkeys(unit.modules, unit.name)
        held = [params[name] for name in unit.params if params[name].storage]
        if held:
            frees = unit.name not in ("", last) and chosen(policy.reshard_after_forward, unit.name)
            key = (
                frees,
                tuple((plan.layout, plan.storage_dim, plan.storage, plan.dtype, plan.trained) for plan in held),
            )
            if key not in known:
                known[key] = gathering(held, sizes, policy, frees=frees)
            gatherings[unit.name] = known[key]
    remat = frozenset(module for module in home if chosen(policy.remat, module))
    inside: dict[str, tuple[Any, ...]] = {}
    for module, unit in home.items():
        path = module.rpartition(".")[0]
        while path:
            said = (module[len(path) :], id(gatherings.get(unit)), module in remat)
            inside[path] = (*inside.get(path, ()), said)
            path = path.rpartition(".")[0]

    def unit_of(path: str) -> str:
        while path and path not in home:
            path = path.rpartition(".")[0]
        return home.get(path, "")

    return Setting(
        sizes=sizes,
        units=gatherings,
        unit_of=unit_of,
        remat=remat.__contains__,
        inside=inside,
        accumulate=policy.accumulate,
        adds=False,
        casts=policy.param_dtype is not None,
        dtype_of=compute_dtypes(params, policy),
        stored=lambda name: bool(params[name].storage),
        prefetch=policy.prefetch,
    )


def of_param(kind: str, plan: ParamPlan, sizes: Sizes) -> Amount:
    """What the first rank stores of a parameter."""
    return stored(kind, plan.layout, plan.storage_dim, plan.storage, itemsize(plan), sizes)


def itemsize(plan: ParamPlan) -> int:
    """Bytes of an element of a parameter."""
    return getattr(torch, plan.dtype).itemsize


def gathering(held: Sequence[ParamPlan], sizes: Sizes, policy: Policy, *, frees: bool) -> Gathering:
    """What FSDP2 holds of a unit's stored parameters."""
    compute = policy.param_dtype.itemsize if policy.param_dtype else 0
    reduced = policy.reduce_dtype.itemsize if policy.reduce_dtype else compute

    def rows(plans: Iterable[ParamPlan], size: int) -> Amount:
        return plus(
            *(
                stored(
                    GATHERED, plan.layout, plan.storage_dim, plan.storage, size or itemsize(plan), sizes, padded=True
                )
                for plan in plans
            )
        )

    def grads(plans: Iterable[ParamPlan]) -> Amount:
        return plus(*(part(GATHERED, plan.layout, compute or itemsize(plan), sizes) for plan in plans))

    trained = [plan for plan in held if plan.trained]
    return Gathering(
        message=rows(held, compute),
        whole=rows(held, compute),
        grads=grads(trained),
        last=grads(trained[-1:]),
        scattered=rows(trained, reduced),
        shards=plus(*(of_param(GRADIENTS, plan, sizes) for plan in trained)),
        frees=frees,
    )
