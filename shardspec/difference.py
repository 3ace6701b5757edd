"""Two plans side by side: what moved, and what it costs on a rank and on the wires. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from attrs import fields, frozen
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shardspec.layout import Layout
from shardspec.names import fold
from shardspec.plan import ActivationPlan, LossPlan, ParamPlan, Plan, Substitution, UnitPlan
from shardspec.report import as_text, cut, new_table
from shardspec.summary import PHASES, place_of, shape_text, size_text, stored, volumes

ABSENT = "-"

Aspects = dict[str, str]
"""What is said of a thing: aspect -> text."""


@frozen(kw_only=True)
class Change:
    """One aspect of things that differ in the index of their layer alone."""

    kind: str
    name: str
    aspect: str
    before: str
    after: str


def difference(one: Plan, two: Plan) -> str:
    """What moved from one plan to another, and what it costs; "" for equal plans.

    Raises:
        TypeError: for what is no plan.
    """
    if not isinstance(two, Plan):
        raise TypeError(f"a plan is compared with a plan, not with a {type(two).__name__}")
    if one == two:
        return ""
    parts: list[RenderableType] = []
    if one.mesh != two.mesh:
        parts.append(Text(f"mesh: {one.mesh or 'one rank'} -> {two.mesh or 'one rank'}"))
    for title, columns, rows in (
        ("what it costs", ("bytes", "from>", "to>", "change>"), list(_costs(one, two))),
        ("collectives of a step", ("phase", "kind", "axes", "where", "from>", "to>", "for"), list(_messages(one, two))),
        ("what moved", ("", "name", "n>", "", "from", "to"), list(_moved(one, two))),
    ):
        if rows:
            parts.append(_table(title, columns, rows))
    if not parts:
        names = [each.name for each in fields(Plan) if each.eq and getattr(one, each.name) != getattr(two, each.name)]
        parts.append(Text(f"nothing moves; the plans differ in: {', '.join(names)}"))
    return as_text(parts)


def changes(one: Plan, two: Plan) -> Iterator[Change]:
    """What differs, collectives and costs apart: one for each tensor and aspect.

    Activations that no rule declares are left out, and what runs at a point: they follow from what is declared.
    """
    for kind, before, after, describe in (
        ("parameter", one.params, two.params, _param),
        ("activation", _declared(one), _declared(two), _activation),
        ("unit", _by_name(one.units), _by_name(two.units), _unit),
        ("attribute", one.attributes, two.attributes, _attributes),
        ("local call", _local_calls(one), _local_calls(two), _substitution),
        ("loss", {"": one.loss}, {"": two.loss}, _loss),
        ("output", _numbered(one.output), _numbered(two.output), _output),
        ("sizes", {"": one}, {"": two}, _sizes),
    ):
        yield from _compared(kind, before, after, describe)


def _compared(
    kind: str, before: Mapping[Any, Any], after: Mapping[Any, Any], describe: Callable[[Any], Aspects]
) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name), after.get(name)
        if was == now:
            continue
        left = describe(was) if was is not None else {}
        right = describe(now) if now is not None else {}
        # A thing that comes or goes is said in its first aspect alone.
        told = list(dict.fromkeys([*left, *right]))[: None if left and right else 1]
        for aspect in told:
            texts = left.get(aspect, ABSENT), right.get(aspect, ABSENT)
            if texts[0] != texts[1]:
                yield Change(kind=kind, name=fold(str(name)), aspect=aspect, before=texts[0], after=texts[1])


def _param(param: ParamPlan) -> Aspects:
    on_dim = f" on dim {param.storage_dim}" if param.storage_dim else ""
    stored_over = f", stored over {','.join(param.storage)}{on_dim}" if param.storage else ""
    return {
        "placed": f"{shape_text(param.local_shape)} of {param.layout}{stored_over}",
        "owed over": _listed(param.owed),
        "spec": param.spec,
        "rule": param.rule,
        "shape": shape_text(param.shape),
        "dtype": param.dtype,
        "is": ("trained" if param.trained else "frozen")
        if not param.buffer
        else ("buffer" if param.persistent else "buffer that is not saved"),
        "is the tensor": fold(param.first),
        "unit": fold(param.unit) or ABSENT,
        "stage": str(param.stage),
    }


def _activation(activation: ActivationPlan) -> Aspects:
    return {
        "leaves": str(activation.layout),
        "arrives": str(activation.before) if activation.before else ABSENT,
        "rule": activation.rule or ABSENT,
        "dtype": activation.dtype or ABSENT,
        "microbatches cut dim": ABSENT if activation.batch_dim is None else str(activation.batch_dim),
    }


def _unit(unit: UnitPlan) -> Aspects:
    return {"modules": _listed(map(fold, unit.modules)), "params": _listed(dict.fromkeys(map(fold, unit.params)))}


def _attributes(named: Mapping[str, int]) -> Aspects:
    return {name: str(value) for name, value in named.items()}


def _substitution(call: Substitution) -> Aspects:
    if call.inert:
        return {"runs": "as it is"}
    over = f"over {_listed(call.axes)} of {call.size}" if call.axes else ""
    return {"runs": f"locally {over}{call.layout or ''}".strip()}


def _loss(loss: LossPlan) -> Aspects:
    return {"sum over": _listed(loss.sum_axes), "weight over": _listed(loss.weight_axes)}


def _output(layout: Layout) -> Aspects:
    return {"layout": str(layout)}


def _sizes(plan: Plan) -> Aspects:
    return {"must divide": _listed(map(str, plan.constraints)), "last unit": fold(plan.last_unit) or ABSENT}


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items) or ABSENT


def _numbered(layouts: Iterable[Layout]) -> dict[str, Layout]:
    return {f"#{number}": layout for number, layout in enumerate(layouts)}


def _by_name(units: Iterable[UnitPlan]) -> dict[str, UnitPlan]:
    return {unit.name: unit for unit in units}


def _local_calls(plan: Plan) -> dict[str, Substitution]:
    return {f"{call.path}.{call.function}.{call.ordinal}": call for call in plan.substitutions}


def _declared(plan: Plan) -> dict[str, ActivationPlan]:
    return {name: activation for name, activation in plan.activations.items() if activation.rule}


def _moved(one: Plan, two: Plan) -> Iterator[tuple[str, ...]]:
    for change, count in Counter(changes(one, two)).items():
        yield change.kind, change.name, str(count), change.aspect, change.before, change.after


def _messages(one: Plan, two: Plan) -> Iterator[tuple[str, ...]]:
    """The collectives that differ: their place and count times bytes in each plan."""
    sides: list[dict[tuple[str, ...], Counter[int]]] = []
    for plan in (one, two):
        side: dict[tuple[str, ...], Counter[int]] = {}
        for row in plan.collectives:
            key = (row.phase, row.kind, ",".join(row.axes), place_of(row), row.why)
            side.setdefault(key, Counter())[row.bytes] += row.count
        sides.append(side)
    before, after = sides
    for key in sorted({*before, *after}, key=lambda key: (PHASES.index(key[0]), key)):
        was, now = before.get(key, Counter[int]()), after.get(key, Counter[int]())
        if was != now:
            texts = [_counts(side, size_text) for side in (was, now)]
            if texts[0] == texts[1]:
                texts = [_counts(side, "{:,} B".format) for side in (was, now)]
            *place, why = key
            yield (*place, *texts, cut(why))


def _counts(side: Mapping[int, int], text: Callable[[int], str]) -> str:
    return ", ".join(f"{count} x {text(size)}" for size, count in sorted(side.items())) or ABSENT


def _costs(one: Plan, two: Plan) -> Iterator[tuple[str, ...]]:
    """Bytes on a rank, and of messages by axes and phase, where they differ; the sum of all messages."""
    yield from _cost("parameters on a rank", stored(one).bytes, stored(two).bytes)
    yield from _cost("buffers on a rank", stored(one, buffers=True).bytes, stored(two, buffers=True).bytes)
    before, after = volumes(one), volumes(two)
    none = dict.fromkeys(PHASES, 0)
    for axes in sorted({*before, *after}):
        for phase in PHASES:
            was, now = before.get(axes, none)[phase], after.get(axes, none)[phase]
            yield from _cost(f"messages over {axes}, {phase}", was, now)
    totals = [sum(sum(sizes.values()) for sizes in side.values()) for side in (before, after)]
    yield from _cost("messages of a step", *totals)


def _cost(name: str, was: int, now: int) -> Iterator[tuple[str, ...]]:
    if was != now:
        change = now - was
        share = f" ({100 * change / was:+.1f} %)" if was else ""
        yield name, size_text(was), size_text(now), f"{'+' * (change > 0)}{size_text(change)}{share}"


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = new_table(title, *columns)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
