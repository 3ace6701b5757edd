"""`golden`: a plan as lines of text, to be kept beside a table and compared."""

from collections.abc import Iterable, Iterator

from shardspec.plan import ActivationPlan, ParamPlan, Plan
from shardspec.rules.match import fold


def golden(plan: Plan) -> str:
    """What a table comes to on a mesh, a line for each kind of thing: the same text for the same program.

    Parameters and where they lie, declared activations, every collective with its count and bytes, what the sizes of
    the axes must divide. Repeated layers are one line with their number. There are no lines of source, no paths and
    nothing of torch in it, so that it changes only with what runs. Compare it with a file beside the table:

        def test_the_plan_is_as_committed():
            assert golden(plan) == Path("tests/llama.plan").read_text()
    """
    mesh = str(plan.mesh) or "one rank"
    sections = {
        "parameters": counted(_parameter(name, param) for name, param in plan.params.items()),
        "entries": counted(_activation(name, entry) for name, entry in plan.entries.items()),
        "activations": counted(
            _activation(name, point)
            for name, point in plan.activations.items()
            if point.rule and name not in plan.entries
        ),
        "collectives": sorted(
            f"{row.phase} {row.kind} over {','.join(row.axes)} at {row.where}: {row.count} x {row.bytes} bytes"
            + (f", for {row.why}" if row.why else "")
            for row in plan.collectives
        ),
        "local calls": counted(
            f"{fold(call.path)}: {call.function}"
            + (f" over {','.join(call.axes)} of {call.size}" if call.axes else "")
            + (f" keyed on {call.layout}" if call.layout is not None else "")
            for call in plan.substitutions
            if not call.inert
        ),
        "attributes": counted(
            f"{fold(path)}.{name} = {value}" for path, named in plan.attributes.items() for name, value in named.items()
        ),
        "units": counted(f"{fold(unit.name) or 'the rest'}: {len(unit.params)} parameters" for unit in plan.units),
        "loss": _loss(plan),
        "constraints": sorted({str(constraint) for constraint in plan.constraints}),
    }
    lines = [f"plan for {mesh}"]
    for title, rows in sections.items():
        if rows:
            lines += ["", title, *(f"  {row}" for row in rows)]
    return "\n".join(lines) + "\n"


def counted(rows: Iterable[str]) -> list[str]:
    """Each row once, in order, with how often it stands where that is more than once."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return [row + (f"  (x {count})" if count > 1 else "") for row, count in counts.items()]


def _parameter(name: str, param: ParamPlan) -> str:
    parts: Iterator[str] = iter(
        (
            f'{fold(name)}: "{param.spec}" {list(param.shape)} {param.dtype}, {list(param.local_shape)} on a rank',
            f"read as {param.layout}",
            f"stored over {','.join(param.storage)} on dim {param.storage_dim}" if param.storage else "",
            f"owed over {','.join(param.owed)}" if param.owed else "",
            f"is {fold(param.first)}" if param.first != name else "",
            "buffer" if param.buffer else "" if param.trained else "not trained",
        )
    )
    return "; ".join(part for part in parts if part)


def _activation(name: str, point: ActivationPlan) -> str:
    before = f"{point.before} -> " if point.before is not None and point.before != point.layout else ""
    return f"{fold(name)}: {before}{point.layout} {point.dtype}".rstrip()


def _loss(plan: Plan) -> list[str]:
    if plan.loss is None:
        return []
    sums = {"sum": plan.loss.sum_axes, "weight": plan.loss.weight_axes}
    return [f"{name} summed over {','.join(axes)}" if axes else f"{name} complete" for name, axes in sums.items()]
