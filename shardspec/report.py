"""`print(plan)`: what is placed where, every collective, and why."""

from collections.abc import Iterable
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardspec.plan import Plan
from shardspec.rules.match import fold


def render(plan: Plan, width: int = 118) -> str:
    """The plan as text, repeated layers folded."""
    out = StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    console.print(Text(_title(plan)))
    console.print(_parameters(plan))
    console.print(_activations(plan))
    if plan.collectives:
        console.print(_collectives(plan))
    console.print(Text(_totals(plan)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _title(plan: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items()) or "one rank"
    return f"plan for {mesh} ({plan.mesh.world} rank{'s' * (plan.mesh.world > 1)})"


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    return table


def _parameters(plan: Plan) -> Table:
    table = _table(
        "parameters",
        ("name", "left"),
        ("n", "right"),
        ("shape", "left"),
        ("on a rank", "left"),
        ("spec", "left"),
        ("owed over", "left"),
    )
    rows: dict[tuple[str, ...], int] = {}
    for name, param in plan.params.items():
        owed = ",".join(param.owed)
        tied = f" (is {fold(param.first)})" if param.first != name else ""
        key = (fold(name) + tied, _shape(param.shape), _shape(param.local_shape), param.spec, owed)
        rows[key] = rows.get(key, 0) + 1
    for (name, *rest), count in rows.items():
        table.add_row(name, str(count), *rest)
    return table


def _activations(plan: Plan) -> Table:
    table = _table(
        "declared activations",
        ("name", "left"),
        ("n", "right"),
        ("arrives", "left"),
        ("leaves", "left"),
        ("rule", "left"),
    )
    rows: dict[tuple[str, ...], int] = {}
    for name, activation in plan.activations.items():
        if activation.rule:
            before = str(activation.before) if activation.before else ""
            key = (fold(name), before, str(activation.layout), activation.rule)
            rows[key] = rows.get(key, 0) + 1
    for (name, *rest), count in rows.items():
        table.add_row(name, str(count), *rest)
    return table


def _collectives(plan: Plan) -> Table:
    table = _table(
        "collectives of a step", ("phase", "left"), ("kind", "left"), ("axes", "left"), ("where", "left"),
        ("count", "right"), ("each", "right"), ("for", "left"),
    )  # fmt: skip
    order = {"forward": 0, "backward": 1, "step": 2}
    for row in sorted(plan.collectives, key=lambda row: order[row.phase]):
        table.add_row(row.phase, row.kind, ",".join(row.axes), row.where, str(row.count), size_text(row.bytes), row.why)
    return table


def _totals(plan: Plan) -> str:
    trained = [param for name, param in plan.params.items() if param.first == name and not param.buffer]
    count = sum(_product(param.shape) for param in trained)
    local = sum(_product(param.local_shape) for param in trained)
    lines = [f"{count:,} parameters, {local:,} on a rank; {len(plan.units)} units"]
    volumes: dict[str, int] = {}
    for row in plan.collectives:
        for_axes = ",".join(row.axes)
        volumes[for_axes] = volumes.get(for_axes, 0) + row.total_bytes
    if volumes:
        calls = sum(row.count for row in plan.collectives)
        each = ", ".join(f"{axes} {size_text(size)}" for axes, size in volumes.items())
        lines.append(f"{calls} collectives a step; message bytes by axes: {each}")
    return "\n".join(lines)


def _product(shape: Iterable[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def size_text(size: int) -> str:
    """Bytes as a reader wants them: `1.5 MiB`."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
