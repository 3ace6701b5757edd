"""`plan.memory`: the bytes on a rank, by what they are for, as formulas in the sizes of the axes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from attrs import field, frozen

from shardspec.amounts import (
    NOTHING,
    Amount,
    PipelineUsage,
    Term,
    Usage,
    amount_of,
    evaluate,
    fixed,
    plus,
    stored,
)
from shardspec.diagnostics import refuse
from shardspec.layout import Sizes
from shardspec.mesh import Mesh
from shardspec.nests import tensor_leaves
from shardspec.peaks import undominated
from shardspec.plan import ParamPlan, Plan

KINDS = (
    "parameters",
    "buffers",
    "optimizer",
    "batch",
    "gradients",
    "gathered",
    "activations",
    "temporary",
    "collectives",
)
"""What bytes are for: the first four lie there between steps, the others come and go within one."""

SLOTS: Mapping[str, int] = {"adamw": 2, "sgd": 0, "momentum": 1}
"""An optimizer's name -> the tensors that it keeps for each parameter, in the parameter's dtype."""

STEP_BYTES = 4
"""An optimizer's count of steps: one float32."""


@frozen(eq=False, kw_only=True)
class Bytes(Mapping[str, int]):
    """Kind -> bytes on a rank of one mesh, the most at any moment of a step; the kinds do not peak at once."""

    kinds: Mapping[str, int]
    resident: int
    """What lies there between steps."""
    total: int
    """The most at any one moment."""
    moment: Mapping[str, int] = field(factory=dict)
    """Kind -> bytes at that moment: they sum to the total."""
    phase: str = ""
    """When that is: "forward", "backward" or "update"."""

    def __getitem__(self, kind: str) -> int:
        return self.kinds[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


@frozen(eq=False, kw_only=True)
class Memory(Mapping[str, sympy.Expr]):
    """Kind -> bytes on the rank that holds the most, the most of it at any moment of a step.

    Formulas in the sizes of the plan's axes larger than one, positive integers named as the axes: they hold for
    meshes with the same axes larger than one that satisfy the plan's constraints. What a kernel allocates and frees
    inside itself, what a backend of collectives allocates, and what an allocator wastes are not in them.
    """

    mesh: Mesh
    constraints: tuple[Any, ...]
    residents: tuple[Amount, ...]
    """What lies there between steps; for each place on pp, where the ranks of a pipeline are meant."""
    moments: tuple[tuple[str, Amount], ...]
    """(phase, all that is held): the moments that are the fullest at some sizes."""
    kinds: Mapping[str, tuple[Amount, ...]]
    """Kind -> the amounts of it that are the most at some sizes."""

    @property
    def total(self) -> sympy.Expr:
        """The most at any one moment: at most the sum of the kinds, which do not all peak at once."""
        return _largest(amount for _, amount in self.moments)

    @property
    def resident(self) -> sympy.Expr:
        """What lies there between steps: parameters, buffers, the optimizer's state, the batch."""
        return _largest(self.residents)

    def __getitem__(self, kind: str) -> sympy.Expr:
        if kind not in KINDS:
            raise KeyError(kind)
        return _largest(self.kinds[kind])

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)

    def at(self, mesh: Mesh) -> Bytes:
        """The bytes on a mesh with the same axes larger than one.

        Raises:
            ShardingError: SS401 for a mesh of other axes, or one that breaks a constraint of the plan.
        """
        if mesh.axes != self.mesh.axes:
            refuse(
                "SS401",
                f"the formulas are for meshes over {', '.join(self.mesh.axes) or 'no axis'}, and {mesh or 'one rank'} "
                f"is over {', '.join(mesh.axes) or 'none'}",
                why="an axis of size one changes what runs: a plan for that mesh has formulas of its own",
                advice=("compile the table for a mesh with those axes",),
            )
        if mesh["pp"] != self.mesh["pp"]:
            refuse(
                "SS401",
                f"the formulas are for pp={self.mesh['pp']}, and {mesh} has pp={mesh['pp']}",
                why="another size of pp has other stages, of which other ranks run other actions",
                advice=("compile the table for that mesh",),
            )
        for fact in self.constraints:
            if not fact.holds(mesh):
                refuse("SS401", f"the plan is not legal on {mesh}", why=f"it needs {fact}")
        found = [(phase, evaluate(amount, mesh.shape)) for phase, amount in self.moments]
        phase, fullest = max(found, key=lambda item: sum(item[1].values()))
        return Bytes(
            kinds={
                kind: max((evaluate(amount, mesh.shape).get(kind, 0) for amount in amounts), default=0)
                for kind, amounts in self.kinds.items()
            },
            resident=max(sum(evaluate(amount, mesh.shape).values()) for amount in self.residents),
            total=sum(fullest.values()),
            moment={kind: fullest.get(kind, 0) for kind in KINDS},
            phase=phase,
        )

    def __repr__(self) -> str:
        return "\n".join(f"{kind}: {self[kind]}" for kind in KINDS) + f"\ntotal: {self.total}"


def memory(plan: Plan, optimizer: Any = "adamw", stage: int | None = None) -> Memory:
    """The memory of a plan's step with an optimizer; see `Plan.memory`."""
    if plan.usage is None:
        refuse("SS401", "the plan does not say what its step holds", why="it was put together by hand")
    stages = plan.pipeline.stages if plan.pipeline is not None else (None,)
    if stage is not None and not (type(stage) is int and 0 <= stage < len(stages)):
        why = f"its stages are 0 to {len(stages) - 1}" if plan.pipeline else "it is not pipelined: its one stage is 0"
        refuse("SS401", f"the plan has no stage {stage}", why=why)
    places = [_place(plan, optimizer, used, names) for used, names in _held(plan, stage)]
    moments = [moment for place in places for moment in place[1]]
    order = {id(amount): phase for phase, amount in moments}
    kept = undominated(amount for _, amount in moments)
    kinds = {kind: undominated(amount for place in places for amount in place[2].get(kind, ())) for kind in KINDS}
    return Memory(
        mesh=plan.mesh,
        constraints=plan.constraints,
        residents=undominated(resident for resident, _, _ in places),
        moments=tuple((order[id(amount)], amount) for amount in kept),
        kinds=kinds,
    )


def _held(plan: Plan, stage: int | None) -> Iterator[tuple[Usage, set[str] | None]]:
    """What a step holds on each place that is asked for, and the first names of the parameters there; None is all."""
    if plan.pipeline is None or not isinstance(plan.usage, PipelineUsage):
        yield plan.usage, None
        return
    places = [plan.pipeline.on(place) for place in range(plan.pipeline.degree)]
    for used, own in zip(
        plan.usage.of(stage), places if stage is None else [(plan.pipeline.stages[stage],)], strict=True
    ):
        yield used, {name for each in own for name in each.params}


def _place(
    plan: Plan, optimizer: Any, used: Usage, names: set[str] | None
) -> tuple[Amount, list[tuple[str, Amount]], dict[str, tuple[Amount, ...]]]:
    """Of one place on pp: what lies there between steps, its moments, its kinds."""
    trained = {
        name: item
        for name, item in plan.params.items()
        if item.first == name and item.trained and not item.buffer and (names is None or name in names)
    }
    resident = plus(amount_of(used.resident), optimizer_state(optimizer, trained, plan.mesh))
    moments = [(phase, plus(resident, amount_of(rows))) for phase, rows in used.moments] or [("update", resident)]
    kinds: dict[str, tuple[Amount, ...]] = {kind: (_only(kind, resident),) for kind in KINDS}
    kinds |= {kind: tuple(map(amount_of, rows)) for kind, rows in used.kinds}
    return resident, moments, kinds


def optimizer_state(optimizer: Any, trained: Mapping[str, ParamPlan], mesh: Mesh) -> Amount:
    """What an optimizer keeps: by its name, or by what its `init` makes of parameters on meta."""
    sizes = mesh.shape
    if optimizer is None:
        return NOTHING
    if isinstance(optimizer, str) and optimizer in SLOTS:
        slots = [_stored(plan, getattr(torch, plan.dtype).itemsize, sizes) for plan in trained.values()]
        slots *= SLOTS[optimizer]
        return plus(fixed("optimizer", STEP_BYTES), *slots)
    init = getattr(optimizer, "init", optimizer[0] if isinstance(optimizer, tuple) and optimizer else None)
    if not callable(init):
        refuse(
            "SS401",
            f"{optimizer!r} is no optimizer",
            why=f"optimizer= is one of {', '.join(SLOTS)}, an optimizer or a pair (init, update), or None",
        )
    params = {
        name: torch.empty(plan.local_shape, dtype=getattr(torch, plan.dtype), device="meta")
        for name, plan in trained.items()
    }
    found: list[Amount] = []
    for name, held in _by_parameter(init(params), params):
        plan = trained.get(name)
        if plan is not None and tuple(held.shape) == plan.local_shape:
            found.append(_stored(plan, held.dtype.itemsize, sizes))
        else:
            found.append(fixed("optimizer", held.nbytes))
    return plus(*found)


def _stored(plan: ParamPlan, itemsize: int, sizes: Sizes) -> Amount:
    return stored("optimizer", plan.layout, plan.storage_dim, plan.storage, itemsize, sizes)


def _by_parameter(state: Any, params: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an optimizer's state, each with the name of the parameter under which it lies."""
    if isinstance(state, Mapping):
        for key, item in state.items():
            yield from _by_parameter(item, params, key if key in params else name)
    else:
        for leaf in tensor_leaves(state):
            yield name, leaf


def _only(kind: str, amount: Amount) -> Amount:
    return {key: number for key, number in amount.items() if key[0] == kind}


def _largest(amounts: Iterable[Amount]) -> sympy.Expr:
    found = [expression(amount) for amount in undominated(amounts)]
    return sympy.Max(*found, evaluate=False) if len(found) > 1 else found[0] if found else sympy.Integer(0)


def expression(amount: Amount) -> sympy.Expr:
    """An amount as a formula; kinds are summed."""
    return sympy.Add(*(term_expression(term, number) for (_, term), number in amount.items() if number))


def term_expression(term: Term, number: int) -> sympy.Expr:
    """A number of bytes times a term."""

    def product(axes: Iterable[str]) -> sympy.Expr:
        return sympy.Mul(*(sympy.Symbol(axis, integer=True, positive=True) for axis in axes))

    value = number * product(term.times) / product(term.over)
    if term.rows:
        share = product(term.storage)
        value *= sympy.ceiling(term.rows / product(term.rows_over) / share) * (share if term.padded else 1)
    return sympy.Min(value, term.most) if term.most else value
