"""What each stage makes, as text: the parsed rules, the claims, the typed program, the plan."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.text import Text

from shardspec.claims import match_params, match_points
from shardspec.cli.target import Target
from shardspec.diagnostics import Diagnostic, Location
from shardspec.infer import TypedGraph, absolute
from shardspec.kin import Kin
from shardspec.mesh import Mesh
from shardspec.names import fold
from shardspec.program import Block, Node, Ref
from shardspec.report import as_text, new_table
from shardspec.rules.parse import Table, parse_table
from shardspec.rules.table import Rules
from shardspec.stages import Claims
from shardspec.summary import shape_text
from shardspec.typecheck import typecheck

STAGES = ("rules", "claims", "program", "plan")


def emit(stage: str, target: Target, rules: Rules, mesh: Mesh) -> tuple[str, list[Diagnostic]]:
    """What the stages up to "rules", "claims" or "program" make, as far as they come, and what is wrong with it."""
    table, found = parse_table(rules)
    if stage == "rules" or found:
        return rules_text(table), found
    params, sizes, found = match_params(table, target.names.whole, mesh)
    each = Kin()  # every block for itself: all names are shown
    program = target.compiler(rules).program(target.inputs, target.loss, None)
    points, more = match_points(table, target.names, program, sizes, mesh, each)
    claims, found = Claims(table, each, params, points, sizes), [*found, *more]
    if stage == "claims" or found:
        return claims_text(claims), found
    typed = typecheck(program, claims, mesh, has_loss=target.loss is not None)
    return program_text(typed.forward), typed.diagnostics


def rules_text(table: Table) -> str:
    """Every rule with its parsed spec, and where it stands."""
    shown = new_table("", "", "pattern", "spec", "at")
    for entry in (*table.params, *table.activations):
        place = entry.location
        shown.add_row(entry.rule.kind, Text(entry.rule.pattern), Text(str(entry.spec)), Text(_place(place)))
    return as_text([shown])


def claims_text(claims: Claims) -> str:
    """Every parameter, buffer and activation that a rule claims, with its rule; and the sizes of the factors."""
    rows: dict[tuple[str, ...], int] = {}
    for name, claim in claims.params.items():
        kind = "buffer" if claim.is_buffer else "parameter"
        key = (kind, fold(name), shape_text(claim.shape), claim.entry.rule.pattern, str(claim.entry.spec))
        rows[key] = rows.get(key, 0) + 1
    for name, entry in claims.points.items():
        key = ("activation", fold(name), "", entry.rule.pattern, str(entry.spec))
        rows[key] = rows.get(key, 0) + 1
    shown = new_table("", "", "name", "n>", "shape", "rule", "spec")
    for (kind, name, shape, rule, spec), count in rows.items():
        shown.add_row(kind, Text(name), str(count), shape, Text(rule), Text(spec))
    sizes = ", ".join(f"{name} = {size}" for name, size in claims.sizes.known.items())
    return as_text([shown, Text(f"factors: {sizes}")])


def program_text(typed: TypedGraph) -> str:
    """Every operation with its layout, its line, and what a declared point does; a repeated block once."""
    shown: list[Any] = []
    for graph, names in _graphs(typed):
        blocks = f"{fold(names[0])} ({len(names)} blocks)" if len(names) > 1 else names[0]
        table = new_table(blocks or "the model", "", "", "layout", "moves", "at")
        for row in _operations(graph):
            table.add_row(*map(Text, row))
        shown.append(table)
    return as_text(shown)


def _graphs(typed: TypedGraph) -> list[tuple[TypedGraph, list[str]]]:
    """Each graph once, with the names under which it is called."""
    found: dict[int, tuple[TypedGraph, list[str]]] = {}

    def walk(graph: TypedGraph, fqn: str) -> None:
        known = id(graph) in found
        found.setdefault(id(graph), (graph, []))[1].append(fqn)
        for position, inner in () if known else graph.calls.items():
            walk(inner, absolute(fqn, graph.graph.nodes[position].func.fqn))

    walk(typed, "")
    return list(found.values())


def _operations(typed: TypedGraph) -> Iterator[tuple[str, str, str, str, str]]:
    graph = typed.graph
    names = {index: value.name or f"%{index}" for index, value in enumerate(graph.values)}
    if isinstance(graph, Block):
        for index in graph.inputs:
            yield names[index], "input", _layouts(typed, (index,)), "", ""
    position = 0
    while position < len(graph.nodes):
        node, step = graph.nodes[position], typed.transitions.get(position)
        behind = _run(typed, position)
        if behind - position > 1:
            outputs = graph.nodes[behind - 1].outputs
            made = f"{names[node.outputs[0] or 0]} .. {', '.join(names[at] for at in outputs if at is not None)}"
            call = f"{fold(node.func.fqn)}({', '.join(_argument(item, names) for item in node.args)}) and so on"
            yield made, f"{call}, {behind - position} calls", _layouts(typed, outputs), "", _place(node.location)
        elif node.op == "point" and step is None:
            # A boundary that no rule declares: the value goes by the name that it has.
            names[node.outputs[0] or 0] = names[node.args[0].index]
        else:
            made = ", ".join(names[index] for index in node.outputs if index is not None)
            moves = ", ".join(f"{move.kind} {move.axis}" for move in step.moves) if step else ""
            yield made, _call(node, typed, names), _layouts(typed, node.outputs), moves, _place(node.location)
        position = behind


def _run(typed: TypedGraph, position: int) -> int:
    """Where the calls of one block that follow one another end."""
    inner, behind = typed.calls.get(position), position + 1
    while inner is not None and typed.calls.get(behind) is inner:
        behind += 1
    return behind


def _call(node: Node, typed: TypedGraph, names: dict[int, str]) -> str:
    if node.op == "point":
        return f"{names[node.args[0].index]} declared as {fold(absolute(typed.fqn, str(node.func[0])))}"
    shown = [_argument(item, names) for item in node.args]
    shown += [f"{name}={_argument(item, names)}" for name, item in node.kwargs.items()]
    return f"{node.func.fqn if node.op == 'block' else node.op}({', '.join(shown)})"


def _argument(item: Any, names: dict[int, str]) -> str:
    if isinstance(item, Ref):
        return names[item.index]
    if isinstance(item, (tuple, list)):
        return f"[{', '.join(_argument(each, names) for each in item)}]"
    return str(item)


def _layouts(typed: TypedGraph, outputs: Iterable[int | None]) -> str:
    kinds = [typed.types[index] for index in outputs if index is not None]
    return ", ".join(str(kind.layout) if kind else "refused" for kind in kinds)


def _place(location: Location) -> str:
    return f"{location.file}:{location.line}"
