"""`print(plan)`: what is placed where, every collective, and why; a page also where the model has 126 layers."""

from collections.abc import Callable, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from shardspec.plan import PipelinePlan, Plan
from shardspec.summary import (
    PHASES,
    activation_rows,
    by_block,
    collective_rows,
    facts,
    length_text,
    mesh_text,
    param_rows,
    place_of,
    shape_text,
    size_text,
    span_text,
    stage_rows,
    stored_bytes,
    tied_to,
    volumes,
)

MOST_RULE = 32
"""How much of a rule is shown: enough to find it by; a page and a file have all of it."""


def render(plan: Plan) -> str:
    """The plan as text, repeated layers folded."""
    parts: list[RenderableType] = [Text(f"plan for {mesh_text(plan)}"), _facts(plan), _parameters(plan)]
    if plan.pipeline is not None:
        parts.append(_stages(plan, plan.pipeline))
    if plan.activations:
        parts.append(_activations(plan))
    if plan.collectives:
        parts += [_collectives(plan), _volumes(plan)]
    if plan.usage is not None:
        parts.append(_memory(plan))
    return as_text(parts)


def as_text(parts: list[RenderableType]) -> str:
    """Tables and lines as plain text: nothing wrapped, no blanks at the ends of lines."""
    out = StringIO()
    console = Console(file=out, width=10_000, color_system=None, highlight=False, markup=False, emoji=False)
    for number, part in enumerate(parts):
        if number and isinstance(part, Table) and part.title:
            console.print()
        console.print(part)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before).rstrip()


def new_table(title: str, *columns: str) -> Table:
    """A table with these columns; one whose name ends in `>` is aligned to the right."""
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="", pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def cut(rule: str) -> str:
    """A rule's pattern, or its beginning."""
    return rule if len(rule) <= MOST_RULE else rule[: MOST_RULE - 1] + "…"


def _facts(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in facts(plan).items():
        table.add_row(f"  {name}", text)
    return table


def _named(block: str, name: str) -> str:
    """A row's name, indented below its block."""
    return f"  {name or '(output)'}" if block else name


def _parameters(plan: Plan) -> Table:
    table = new_table("parameters", "name", "n>", "shape", "spec", "on a rank", "bytes>", "owed over")
    for block, rows in by_block(param_rows(plan)).items():
        if block:
            table.add_row(Text(block))
        for row in rows:
            tied = tied_to(row.first, row.plan)
            table.add_row(
                Text(_named(block, row.name) + (f" (is {tied})" if tied else "")),
                str(row.count),
                shape_text(row.plan.shape),
                Text(row.plan.spec),
                shape_text(row.plan.local_shape),
                "" if tied else size_text(stored_bytes(row.plan)),
                ",".join(row.plan.owed),
            )
    return table


def _stages(plan: Plan, pipeline: PipelinePlan) -> Table:
    schedule = plan.schedule
    flying = [max(schedule.held(lambda held, own=stage.index: held == own)) for stage in pipeline.stages]
    kept = _activations_kept(plan, pipeline)
    title = f"stages of {schedule.title}, bubble {schedule.bubble:.1%}"
    columns = ("stage", "on pp", "layers", "parameters>", "bytes on a rank>", "in flight>", "activations>", "receives")
    table = new_table(title, *columns)
    for row in stage_rows(pipeline, plan):
        first, last = row.stages[0], row.stages[-1]
        crossing = ", ".join(f"{plan.layout} {plan.dtype}" for plan in first.crossing)
        table.add_row(
            span_text(stage.index for stage in row.stages),
            span_text(stage.rank for stage in row.stages),
            " to ".join(dict.fromkeys((first.layers[0], last.layers[-1]))),
            f"{row.stored.numbers:,}",
            size_text(row.stored.bytes),
            _ends([int(flying[stage.index]) for stage in row.stages], str),
            _ends([kept[stage.index] for stage in row.stages if stage.index in kept], size_text),
            Text(crossing),
        )
    return table


def _activations_kept(plan: Plan, pipeline: PipelinePlan) -> dict[int, int]:
    """Stage -> the most bytes that it keeps for backwards at a time, where the plan tells."""
    if plan.usage is None:
        return {}
    return {stage.index: plan.memory(stage=stage.index).at(plan.mesh)["activations"] for stage in pipeline.stages}


def _ends(numbers: Sequence[int], text: Callable[[int], str]) -> str:
    """The least and the most of some numbers."""
    return (
        " to ".join(dict.fromkeys(text(number) for number in sorted({min(numbers), max(numbers)}))) if numbers else ""
    )


def _activations(plan: Plan) -> Table:
    table = new_table("declared activations", "name", "n>", "arrives", "leaves", "rule")
    for block, rows in by_block(activation_rows(plan)).items():
        if block:
            table.add_row(Text(block))
        for row in rows:
            table.add_row(
                Text(_named(block, row.name)),
                str(row.count),
                Text(str(row.plan.before) if row.plan.before else ""),
                Text(str(row.plan.layout)),
                Text(cut(row.plan.rule)),
            )
    return table


def _collectives(plan: Plan) -> Table:
    table = new_table("collectives of a step", "phase", "kind", "axes", "where", "count>", "each>", "for")
    for row in collective_rows(plan):
        place = (row.phase, row.kind, ",".join(row.axes), Text(place_of(row)))
        table.add_row(*place, str(row.count), length_text(row), Text(cut(row.why)))
    return table


def _volumes(plan: Plan) -> Table:
    found = volumes(plan)
    table = new_table("bytes of the messages of a step", "axes", *(f"{phase}>" for phase in PHASES), "all>")
    for axes, sizes in found.items():
        table.add_row(axes, *(_amount(sizes[phase]) for phase in PHASES), _amount(sum(sizes.values())))
    if len(found) > 1:
        whole = [sum(sizes[phase] for sizes in found.values()) for phase in PHASES]
        table.add_row("all", *map(_amount, whole), _amount(sum(whole)))
    return table


def _amount(size: int) -> str:
    return size_text(size) if size else ""


def _memory(plan: Plan) -> Table:
    held = plan.memory().at(plan.mesh)
    table = new_table("memory of a rank, with AdamW", "at most", "bytes>")
    for kind, size in held.items():
        if size:
            table.add_row(kind, size_text(size))
    table.add_row("between steps", size_text(held.resident))
    table.add_row(f"at once, in {held.phase}", size_text(held.total))
    return table
