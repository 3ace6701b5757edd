"""What the ranks of a pipeline hold while they run the action lists of its schedule."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import define, evolve, field, frozen

from shardspec.amounts import NOTHING, Amount, PipelineUsage, Usage, fullest, minus, part, plus, rows_of
from shardspec.constraints import Constraint, satisfying
from shardspec.excerpt import excerpt
from shardspec.footprint import KEPT, Halves, Record
from shardspec.layout import Sizes
from shardspec.localrun import COLLECTIVES
from shardspec.messages import Step, orders_of
from shardspec.moments import GRADIENTS, Gathering
from shardspec.peaks import NONE, Noted, Peaks, undominated
from shardspec.plan import ParamPlan, PipelinePlan, StagePlan, UnitPlan
from shardspec.policy import Policy
from shardspec.residency import (
    MOST_MESHES,
    PASSING_KINDS,
    Walk,
    batch,
    flattened,
    gathering,
    of_param,
    setting_of,
)
from shardspec.schedule import SPLIT_BACKWARD
from shardspec.stages import TypedProgram
from shardspec.staging import stage_units
from shardspec.summary import itemsize


@frozen(kw_only=True, eq=False)
class StageBytes:
    """What a stage's forward and backward of one microbatch do to memory."""

    gathers: Record
    """Its first forward, which gathers what is stored over data ranks, to stay gathered to the end of the step."""
    first: Record
    """Its first backward, which leaves the gradients to which the others add; and any later forward."""
    later: Record
    wide: Amount
    """What the first backward leaves beyond that: gradients are summed in another dtype than they are made in."""
    units: tuple[Gathering, ...]
    """In the order in which gradients are reduced, whole gradients in the dtype in which they are summed."""
    enters: Amount
    """What crosses into it."""

    @property
    def gathered(self) -> Amount:
        """What is gathered of all its units."""
        return plus(*(unit.whole for unit in self.units))


Key = tuple[str, int, int]
"""(kind, stage, microbatch): F what crosses into a stage, B its gradient."""


@define(eq=False)
class Rank:
    """A rank as it runs its actions, or those of one of its stages."""

    stages: Mapping[int, StageBytes]
    crossing: Sequence[Amount]
    """By stage, what crosses into it."""
    whole_backward: bool
    """Both halves of a backward run in the place of the first."""
    now: Amount = NOTHING
    noted: dict[str, Noted] = field(factory=lambda: {"forward": Noted(), "backward": Noted()})
    seen: set[Any] = field(factory=set)
    holders: dict[Key, int] = field(factory=dict)
    started: set[int] = field(factory=set)
    graded: set[int] = field(factory=set)
    parted: dict[tuple[int, int], list[Key]] = field(factory=dict)
    """(stage, microbatch) between the halves of its backward -> what the graph still holds of what crosses."""
    left: dict[int, int] = field(factory=dict)

    def run(self, steps: Sequence[Step], acknowledged: Mapping[int, tuple[Step, ...]]) -> None:
        """Run a rank's steps, those of stages that are not looked at left out."""
        sent = {step for step in steps if step[0].startswith("SEND")}
        self.left = {stage: sum(step[:2] == ("F", stage) for step in steps) for stage in self.stages}
        for position, step in enumerate(steps):
            kind, stage, microbatch = step
            if stage not in self.stages:
                continue
            if kind == "F":
                self._forward(stage, microbatch, sends=("SEND_F", stage, microbatch) in sent)
            elif kind == "RECV_F":
                self._hold(("F", stage, microbatch))
            elif kind == "RECV_B":
                self._hold(("B", stage + 1, microbatch))
            elif kind == "B" or (kind == "W" and not stage):
                self._backward(stage, microbatch, sends=("SEND_B", stage, microbatch) in sent)
                self._done(stage)
            elif kind == "I" and stage:
                half = self._backward if self.whole_backward else self._input_half
                half(stage, microbatch, sends=("SEND_B", stage, microbatch) in sent)
            elif kind == "W":
                self._weight_half(stage, microbatch)
                self._done(stage)
            for way, of, index in acknowledged.get(position, ()):
                if of in self.stages:
                    self._drop(("F", of + 1, index) if way == "SEND_F" else ("B", of, index))

    def _note(self, phase: str, beyond: Peaks = NONE) -> None:
        key = (phase, id(beyond), frozenset(item for item in self.now.items() if item[1]))
        if key not in self.seen:
            self.seen.add(key)
            self.noted[phase].note(self.now, beyond)

    def _hold(self, key: Key) -> None:
        if not self.holders.get(key):
            self.now = plus(self.now, self._size(key))
        self.holders[key] = self.holders.get(key, 0) + 1

    def _drop(self, key: Key) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now = minus(self.now, self._size(key))

    def _size(self, key: Key) -> Amount:
        kind, stage, _ = key
        return {
            (KEPT if kind == "F" else COLLECTIVES, term): number for (_, term), number in self.crossing[stage].items()
        }

    def _forward(self, stage: int, microbatch: int, *, sends: bool) -> None:
        held = self.stages[stage]
        record = held.first if stage in self.started else held.gathers
        self.started.add(stage)
        if stage and ("F", stage, microbatch) not in self.holders:  # of a stage of this rank that is not looked at
            self._hold(("F", stage, microbatch))
        self._note("forward", record.forward)
        self.now = plus(self.now, record.kept)
        if stage + 1 < len(self.crossing):
            out = ("F", stage + 1, microbatch)
            for _ in range(1 + (sends or stage + 1 in self.stages)):
                self._hold(out)
        self._note("forward")

    def _seed(self, stage: int, microbatch: int) -> Key | None:
        """The gradient of what a stage made; None on the last, which made the loss."""
        if stage + 1 == len(self.crossing):
            return None
        key = ("B", stage + 1, microbatch)
        if key not in self.holders:
            self._hold(key)
        return key

    def _backward(self, stage: int, microbatch: int, *, sends: bool) -> None:
        held = self.stages[stage]
        record = held.later if stage in self.graded else held.first
        seed = self._seed(stage, microbatch)
        self._note("backward", record.backward)
        self.now = minus(plus(self.now, record.left), held.first.kept)
        self._add_wide(stage)
        self._hand_back(stage, microbatch, sends=sends)
        for key in (seed, *self._crossed(stage, microbatch)):
            if key is not None:
                self._drop(key)

    def _input_half(self, stage: int, microbatch: int, *, sends: bool) -> None:
        record = self.stages[stage].first
        halves = record.halves or Halves()
        seed, (received, *made) = self._seed(stage, microbatch), self._crossed(stage, microbatch)
        self._note("backward", halves.backward)
        self.now = minus(plus(self.now, halves.held), halves.over)
        self._hand_back(stage, microbatch, sends=sends)
        still = [received] if 0 in record.operands_kept else []
        still += made if 0 in record.outputs_kept else []
        still += [seed] if seed is not None and 0 in halves.held_outputs else []
        self.parted[stage, microbatch] = still
        for key in (seed, received, *made):
            if key is not None and key not in still:
                self._drop(key)

    def _weight_half(self, stage: int, microbatch: int) -> None:
        held = self.stages[stage]
        if (stage, microbatch) not in self.parted:
            return
        record = held.later if stage in self.graded else held.first
        halves = held.first.halves or Halves()
        self._note("backward", halves.weights)
        self.now = minus(plus(self.now, record.left, halves.over), plus(held.first.kept, halves.held))
        self._add_wide(stage)
        for key in self.parted.pop((stage, microbatch)):
            self._drop(key)
        self._note("backward")

    def _add_wide(self, stage: int) -> None:
        if stage not in self.graded:
            self.graded.add(stage)
            self.now = plus(self.now, self.stages[stage].wide)

    def _crossed(self, stage: int, microbatch: int) -> list[Key]:
        """What crosses into a stage, and out of it, for a microbatch."""
        keys = [("F", stage, microbatch)] if stage else []
        return keys + ([("F", stage + 1, microbatch)] if stage + 1 < len(self.crossing) else [])

    def _hand_back(self, stage: int, microbatch: int, *, sends: bool) -> None:
        if stage and (sends or stage - 1 in self.stages):
            self._hold(("B", stage, microbatch))

    def _done(self, stage: int) -> None:
        """Count a backward; the last one of a stage scatters its gradients, as FSDPParamGroup.post_backward does."""
        self.left[stage] -= 1
        if self.left[stage]:
            return
        message: Amount = NOTHING
        for unit in self.stages[stage].units:
            self.now = plus(minus(self.now, plus(unit.whole, message)), unit.scattered)
            self._note("backward")
            self.now = plus(minus(self.now, unit.grads), unit.shards, unit.last)
            self._note("backward")
            self.now, message = minus(self.now, unit.last), unit.scattered
        self.now = minus(self.now, message)


def pipeline_usage(
    typed: TypedProgram,
    params: Mapping[str, ParamPlan],
    units: Iterable[UnitPlan],
    policy: Policy,
    pipeline: PipelinePlan,
    facts: Iterable[Constraint],
) -> PipelineUsage:
    """What a step holds on the ranks of each place on pp, and for each stage alone."""
    sizes, meshes = typed.mesh.shape, satisfying(typed.mesh, facts, MOST_MESHES)
    stages = stage_bytes(typed, params, tuple(units), policy, pipeline)
    crossing = [stage.enters for stage in stages]
    whole_backward = bool(policy.remat or policy.compile)
    per_rank = len(stages) // pipeline.degree
    orders = orders_of(pipeline.schedule, pipeline.degree, per_rank, pipeline.microbatches)
    entries = batch(typed, policy)

    def held_for(own: Sequence[StagePlan]) -> Usage:
        rank = Rank({stage.index: stages[stage.index] for stage in own}, crossing, whole_backward)
        rank.run(orders.steps[own[0].rank], orders.acknowledged[own[0].rank])
        phases = {phase: noted.peaks() for phase, noted in rank.noted.items()}
        phases["update"] = Peaks.of(updating(params, own, pipeline, sizes))
        phase_of = {id(amount): phase for phase, peaks in phases.items() for amount in peaks.total}
        moments = fullest(undominated(amount for peaks in phases.values() for amount in peaks.total), meshes)
        kinds = {
            kind: fullest(undominated(a for peaks in phases.values() for a in peaks.kinds.get(kind, ())), meshes)
            for kind in PASSING_KINDS
        }
        return Usage(
            resident=rows_of(plus(resident(params, own, sizes), entries)),
            moments=tuple((phase_of[id(amount)], rows_of(amount)) for amount in moments),
            kinds=tuple((kind, tuple(map(rows_of, amounts))) for kind, amounts in kinds.items()),
        )

    return PipelineUsage(
        ranks=tuple(held_for(pipeline.on(place)) for place in range(pipeline.degree)),
        stages=tuple(held_for((stage,)) for stage in pipeline.stages) if per_rank > 1 else (),
    )


def stage_bytes(
    typed: TypedProgram,
    params: Mapping[str, ParamPlan],
    units: tuple[UnitPlan, ...],
    policy: Policy,
    pipeline: PipelinePlan,
) -> tuple[StageBytes, ...]:
    """What each stage does to memory; blocks that run alike are walked once."""
    sizes = typed.mesh.shape
    single = evolve(policy, accumulate=1, microbatches=None, reshard_after_forward=False)
    summed = evolve(single, param_dtype=policy.reduce_dtype or policy.param_dtype)
    halved = pipeline.schedule in SPLIT_BACKWARD and not (policy.remat or policy.compile)
    known: dict[Any, Gathering] = {}
    walks: dict[str, dict[Any, Record]] = {"gathers": {}, "first": {}, "later": {}}
    found: list[StageBytes] = []
    for stage in pipeline.stages:
        own = stage_units(units, params, stage)
        setting = setting_of(typed, params, own, "", single, known)
        alone = evolve(setting, units={})
        graph, back = excerpt(typed, pipeline, stage.index)
        live = tuple(plan.floating for plan in stage.crossing)
        first = Walk(alone, walks["first"], halved).graph(graph, back, live, "")
        gathers = Walk(setting, walks["gathers"]).graph(graph, back, live, "") if setting.units else first
        later = Walk(evolve(alone, adds=True), walks["later"]).graph(graph, back, live, "")
        rest = {unit.name: [params[name] for name in unit.params if params[name].storage] for unit in own}
        order = sorted(setting.units, key=lambda name: name != "")
        wide = {name: gathering(rest[name], sizes, summed, frees=False).grads for name in order}
        enters = plus(NOTHING, *(part(KEPT, plan.layout, itemsize(plan.dtype), sizes) for plan in stage.crossing))
        found.append(
            StageBytes(
                gathers=gathers,
                first=first,
                later=later,
                wide=minus(plus(*wide.values()), plus(*(setting.units[name].grads for name in order))),
                units=tuple(evolve(setting.units[name], grads=wide[name]) for name in order),
                enters=enters,
            )
        )
    return tuple(found)


def resident(params: Mapping[str, ParamPlan], own: Sequence[StagePlan], sizes: Sizes) -> Amount:
    """The parameters and buffers of stages on one rank; each stage has its own of a buffer that is not state."""
    found: Amount = NOTHING
    for name, plan in params.items():
        homes = sum(name in stage.params for stage in own) if plan.first == name else 0
        if homes:
            copies = homes if plan.buffer and not plan.persistent else 1
            kind = "buffers" if plan.buffer else "parameters"
            found = plus(found, *[of_param(kind, plan, sizes)] * copies)
    return found


def updating(
    params: Mapping[str, ParamPlan], own: Sequence[StagePlan], pipeline: PipelinePlan, sizes: Sizes
) -> Iterable[Amount]:
    """The gradients once every microbatch is through, with each message in which some of them are summed."""
    trained: list[ParamPlan] = []
    gradients: Amount = NOTHING
    shared: dict[tuple[tuple[int, ...], str], list[ParamPlan]] = {}
    for name, plan in params.items():
        homes = sum(name in stage.params for stage in own) if plan.first == name else 0
        if homes and plan.trained and not plan.buffer:
            trained.append(plan)
            # One of each stage's, and their sum.
            gradients = plus(gradients, *[of_param(GRADIENTS, plan, sizes)] * (homes if homes == 1 else homes + 1))
            if len(ranks := pipeline.homes(name)) > 1:
                shared.setdefault((ranks, plan.dtype), []).append(plan)
    for flat in flattened(trained, sizes):
        yield plus(gradients, flat)
    for tied in shared.values():
        if len(tied) > 1:
            yield plus(gradients, *(of_param(COLLECTIVES, plan, sizes) for plan in tied))
