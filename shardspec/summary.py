"""A plan as a reader sees it: equal layers folded into one row, bytes and messages summed. Imports no torch."""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from math import prod
from typing import Generic, TypeVar

from attrs import evolve, frozen

from shardspec.names import block_of, fold
from shardspec.plan import ActivationPlan, Collective, ParamPlan, PipelinePlan, Plan, StagePlan

Item = TypeVar("Item")

PHASES = ("forward", "backward", "step")

MOST_STAGES = 4
"""A pipeline of more is told in groups of stages."""


@frozen(kw_only=True)
class Row(Generic[Item]):
    """Tensors that differ in the index of their layer alone."""

    block: str
    """The repeated module, as `layers.*`; empty outside of one."""
    name: str
    """Below the block; empty for the block itself."""
    count: int
    first: str
    """The whole name of the first of them."""
    plan: Item
    """Of the first of them."""


@frozen(kw_only=True)
class Stored:
    """How many numbers, and how many bytes they take."""

    numbers: int
    bytes: int


def itemsize(dtype: str) -> int:
    """The bytes of one number of a dtype, by its name: `bfloat16`, `torch.int64`, `bool`."""
    bits = re.search(r"\d+", dtype.removeprefix("torch."))
    return max(1, int(bits.group()) // 8) if bits else 1


def stored_bytes(param: ParamPlan) -> int:
    """What rank 0 stores of a parameter."""
    return prod(param.local_shape) * itemsize(param.dtype)


def param_rows(plan: Plan) -> list[Row[ParamPlan]]:
    """The parameters and buffers, equal layers folded, in the order in which they first come."""

    def alike(name: str, param: ParamPlan) -> tuple[object, ...]:
        placed = (param.spec, param.layout, param.shape, param.local_shape, param.dtype)
        return (*placed, tied_to(name, param), param.owed, param.trained)

    return _rows(plan.params.items(), alike)


def activation_rows(plan: Plan) -> list[Row[ActivationPlan]]:
    """The activations that a rule declares, equal layers folded, in the order in which they first come."""
    declared = ((name, activation) for name, activation in plan.activations.items() if activation.rule)
    return _rows(declared, lambda _, activation: (activation.before, activation.layout, activation.rule))


def _rows(items: Iterable[tuple[str, Item]], alike: Callable[[str, Item], tuple[object, ...]]) -> list[Row[Item]]:
    groups: dict[tuple[object, ...], list[tuple[str, Item]]] = {}
    for full, item in items:
        groups.setdefault((fold(full), *alike(full, item)), []).append((full, item))
    rows: list[Row[Item]] = []
    for group in groups.values():
        first, plan = group[0]
        block, name = block_of(fold(first))
        rows.append(Row(block=block, name=name, count=len(group), first=first, plan=plan))
    return rows


def by_block(rows: Iterable[Row[Item]]) -> dict[str, list[Row[Item]]]:
    """Block -> its rows; blocks in the order in which they first come."""
    groups: dict[str, list[Row[Item]]] = {}
    for row in rows:
        groups.setdefault(row.block, []).append(row)
    return groups


def tied_to(name: str, param: ParamPlan) -> str:
    """The folded name of the tensor that a parameter is, where it is another's."""
    return fold(param.first) if param.first != name else ""


def collective_rows(plan: Plan) -> list[Collective]:
    """The collectives of a step, phase after phase; in a long pipeline what stages make alike is one row."""
    rows = sorted(plan.collectives, key=lambda row: PHASES.index(row.phase))
    if plan.pipeline is None or len(plan.pipeline.stages) <= MOST_STAGES:
        return rows
    groups: dict[tuple[object, ...], list[Collective]] = {}
    for row in rows:
        where = row.where if row.kind != "send_recv" else ""
        key = (row.phase, row.kind, row.axes, where, row.count, row.bytes, row.stage is None)
        groups.setdefault((*key, row.why if where else ""), []).append(row)
    return [_of_stages(group) for group in groups.values()]


def _of_stages(group: list[Collective]) -> Collective:
    """Rows that differ in their stages alone as one; its count is that of each."""
    first = group[0]
    stages = [row.stage for row in group if row.stage is not None]
    if len(stages) < 2:
        return first
    where = f"each of stages {span_text(stages)}"
    if first.kind == "send_recv":
        to = "next" if first.phase == "forward" else "one before"
        return evolve(first, where=f"{where} to the {to}", why="", stage=None)
    return evolve(first, where=f"{first.where} ({where})", stage=None)


def span_text(numbers: Iterable[int]) -> str:
    """Whole numbers in words, each once: `0, 2 to 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


@frozen(kw_only=True)
class StageRow:
    """Stages that a reader need not tell apart: neighbours that hold as much and receive the same."""

    stages: tuple[StagePlan, ...]
    stored: Stored
    """Of the parameters of each."""


def stage_rows(pipeline: PipelinePlan, plan: Plan) -> list[StageRow]:
    """The stages of a plan; in a long pipeline those that are alike are one row."""
    rows: list[StageRow] = []
    for stage in pipeline.stages:
        row = StageRow(stages=(stage,), stored=stored_of(plan, set(stage.params)))
        same = rows and _alike(rows[-1], row)
        if same and len(pipeline.stages) > MOST_STAGES:
            rows[-1] = evolve(row, stages=(*rows[-1].stages, stage))
        else:
            rows.append(row)
    return rows


def _alike(one: StageRow, other: StageRow) -> bool:
    before, after = one.stages[-1], other.stages[0]
    entering = [[(plan.layout, plan.dtype) for plan in stage.crossing] for stage in (before, after)]
    return one.stored == other.stored and len(before.layers) == len(after.layers) and entering[0] == entering[1]


def place_of(row: Collective) -> str:
    """Where a collective is made, in words; under pp with the stage."""
    return row.where if row.stage is None or row.kind == "send_recv" else f"{row.where} (stage {row.stage})"


def length_text(row: Collective) -> str:
    """How long one message is; of one whose length hangs on a router, what is expected."""
    return size_text(row.bytes) + (" expected" if row.expected else "")


def volumes(plan: Plan) -> dict[str, dict[str, int]]:
    """Axes -> phase -> the bytes of the messages of a step; axes that go together are one entry, as "dp,fsdp"."""
    found: dict[str, dict[str, int]] = {}
    for row in plan.collectives:
        by_phase = found.setdefault(",".join(row.axes), dict.fromkeys(PHASES, 0))
        by_phase[row.phase] += row.total_bytes
    return dict(sorted(found.items()))


def stored(plan: Plan, *, buffers: bool = False) -> Stored:
    """What a rank stores of the parameters, or of the buffers; a tied tensor counts once.

    Of the first rank, which stores the most; under pp of the first of those that do.
    """
    pipeline = plan.pipeline
    if pipeline is None:
        return stored_of(plan, plan.params, buffers=buffers)
    each = [
        stored_of(plan, {name for stage in pipeline.on(rank) for name in stage.params}, buffers=buffers)
        for rank in range(pipeline.degree)
    ]
    return max(each, key=lambda held: held.bytes)


def stored_of(plan: Plan, names: Container[str], *, buffers: bool = False) -> Stored:
    """What is stored of the parameters, or buffers, of these first names."""
    held = [
        param
        for name, param in plan.params.items()
        if param.first == name and param.buffer == buffers and name in names
    ]
    return Stored(numbers=sum(prod(param.local_shape) for param in held), bytes=sum(map(stored_bytes, held)))


def parameters(plan: Plan) -> int:
    """How many numbers the model's parameters hold, over all ranks; a tied tensor counts once."""
    return sum(prod(param.shape) for name, param in plan.params.items() if param.first == name and not param.buffer)


def facts(plan: Plan) -> dict[str, str]:
    """What a reader asks first: name -> text."""
    held, kept = stored(plan), stored(plan, buffers=True)
    found = {
        "parameters": f"{parameters(plan):,}",
        "parameters on a rank": f"{held.numbers:,} ({size_text(held.bytes)})",
        "buffers on a rank": size_text(kept.bytes),
        "units": str(len(plan.units)),
        "collectives a step": f"{sum(row.count for row in plan.collectives):,}",
    }
    if plan.pipeline is not None:
        found["pipeline"] = f"{plan.pipeline.schedule}, {plan.pipeline.microbatches} microbatches"
    if plan.balanced:
        found["sequence"] = f"head and tail over cp: rank r holds chunks r and {2 * plan.mesh['cp'] - 1} - r"
    if plan.constraints:
        found["sizes must divide"] = ", ".join(map(str, plan.constraints))
    return found


def mesh_text(plan: Plan) -> str:
    """The mesh in words: `fsdp=2, tp=2 (4 ranks)`."""
    sizes: Mapping[str, int] = plan.mesh.shape
    if not sizes:
        return "one rank"
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items()) + f" ({plan.mesh.world:,} ranks)"


def shape_text(shape: Iterable[int]) -> str:
    """`128x64`; "scalar" where there is no dim."""
    return "x".join(map(str, shape)) or "scalar"


def size_text(size: int) -> str:
    """Bytes as a reader wants them: `1.5 MiB`."""
    amount, sign = float(abs(size)), "-" if size < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        shown = f"{amount:.0f}" if unit == "B" or amount >= 99.95 else f"{amount:.1f}"
        if float(shown) < 1024 or unit == "PiB":
            return f"{sign}{shown} {unit}"
        amount /= 1024
    raise AssertionError("the last unit takes what is left")
