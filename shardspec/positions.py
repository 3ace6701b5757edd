"""Positions that every rank counts from the front, where the sequence is split over cp: the flagship error.

A model that makes its positions by the length at hand, or reads the first rows of a table for them, would take each
rank's tokens for the first of the sequence. No shape differs, so that nothing would ever raise.
"""

from collections.abc import Iterator, Sequence

from attrs import evolve, frozen

from shardspec.diagnostics import Diagnostic
from shardspec.dryrun import Difference
from shardspec.infer import Inference, Issue, TypedGraph, absolute, producer
from shardspec.layout import dim_text
from shardspec.program import Node, tensors
from shardspec.sequence import AXIS
from shardspec.stages import Claims, TypedProgram

COUNTED = frozenset({"arange", "linspace", "cumsum", "ones", "full", "zeros"})
"""Operators that make numbers by a length alone, or count along one."""

CUT = frozenset({"slice", "narrow"})


@frozen(eq=False)
class Origin:
    """Where an operand comes from: the operators that made or cut it, and the tensors that it was read of."""

    counted: tuple[Node, ...] = ()
    cut: tuple[Node, ...] = ()
    tables: tuple[str, ...] = ()
    """Names of parameters and buffers."""
    entries: tuple[str, ...] = ()


@frozen
class Split:
    """The operand that a whole one met: its part of the sequence."""

    length: int
    part: int
    text: str


def from_the_front(issue: Issue, inference: Inference, claims: Claims, found: Diagnostic) -> Diagnostic:
    """SS340 in the place of a disagreement over cp that comes of positions counted on each rank."""
    if issue.refusal.axis != AXIS or issue.refusal.code != "SS302" or not issue.frames:
        return found
    typed, at = issue.frames[-1]
    refs = typed.graph.nodes[at].operands
    met = next((split for ref in refs if (split := split_of(typed, ref.index))), None)
    for ref in refs:
        kind = typed.types[ref.index]
        if met is None or kind is None or AXIS in kind.layout.sharded:
            continue
        origin = origin_of(issue.frames, ref.index)
        if origin.entries or not (origin.counted or origin.tables):
            continue
        return told(origin, met, typed.graph.nodes[at], inference, claims, found)
    return found


def counted_by_length(difference: Difference, typed: TypedProgram, found: Diagnostic) -> Diagnostic:
    """SS340 for numbers that a model counts along a rank's part of the sequence; else what was found."""
    nodes, inference = difference.typed.graph.nodes, typed.inference
    if difference.position is None or difference.code != "SS309":
        return found
    node = nodes[difference.position]
    made = difference.typed.graph.values[node.outputs[0]].shape if node.outputs and node.outputs[0] is not None else ()
    splits = (split_of(typed.forward, index) for index in typed.program.entries.values())
    met = next((split for split in splits if split is not None and split.length in made), None)
    if met is None or node.op not in COUNTED or tensors(node.args):
        return found
    return told(Origin((node,)), met, None, inference, typed.claims, found)


def split_of(typed: TypedGraph, index: int) -> Split | None:
    """What cp leaves of a value along the dim that it splits."""
    kind = typed.types[index]
    if kind is None or AXIS not in kind.layout.sharded:
        return None
    dim = kind.layout.sharded[AXIS]
    return Split(typed.graph.values[index].shape[dim], kind.layout.shape[dim], dim_text(kind.layout.dims[dim]))


def told(
    origin: Origin, met: Split, node: Node | None, inference: Inference, claims: Claims, found: Diagnostic
) -> Diagnostic:
    """The diagnostic: what counts from the front, which positions a rank holds instead, and the way out.

    Args:
        node: where it meets a part of the sequence, if that is what was found.
    """
    length, ranks = met.length, inference.sizes[AXIS]
    table = origin.tables[0] if origin.tables else ""
    last = length - 1
    if origin.counted and node is None:
        what = f"{origin.counted[0].op} counts positions by a length at hand, which on a rank is that of its part"
    elif origin.counted:
        what = f"{origin.counted[0].op} counts positions from 0 on every rank"
    elif origin.cut:
        what = f"the first rows of {table} are read on every rank"
    else:
        what = f"{table} lies whole on every rank"
    meets = "them" if origin.counted or origin.cut else "it"
    what += f", and {node.op} meets {meets} with a part of the sequence" if node is not None else ""
    held = (
        f"with head and tail on each, rank 0 holds positions 0 to {met.part // 2 - 1} and "
        f"{length - met.part // 2} to {last}"
        if inference.balanced
        else f"rank {ranks - 1} holds positions {length - met.part} to {last}"
    )
    why = [f"the sequence of {length} is split over {AXIS}={ranks} ({met.text}): {held}"]
    if origin.counted or origin.cut:
        why.append(
            f"a length at hand is {met.part} there: counted from 0, every rank would take its tokens for the first "
            f"{met.part} of the sequence, and no shape would tell"
        )
    places = tuple(cut.location for cut in (*origin.counted, *origin.cut)[:1])
    locations = [found.locations[0], *(place for place in places if place != found.locations[0]), *found.locations[1:]]
    return evolve(
        found,
        code="SS340",
        what=what,
        why="\n".join(why),
        locations=tuple(dict.fromkeys(locations)),
        advice=tuple(ways_out(origin, length, table, claims)),
        hints=found.hints if not (origin.counted or origin.cut) else (),
    )


def ways_out(origin: Origin, length: int, table: str, claims: Claims) -> Iterator[str]:
    """What to do: hand positions in; or lay a table of just that length with the sequence."""
    name = next(
        (
            entry.rule.pattern
            for entry in claims.table.activations
            if AXIS in entry.spec.axes and len(entry.spec.dims) == 1 and entry.regex.pattern not in claims.points
        ),
        "",
    )
    read = f"{table}[positions]" if table else "positions"
    if name:
        yield (
            f'put positions into the batch, as {{"{name}": torch.arange({length}), ...}}: the table lays them over '
            f'{AXIS} by its rule r"{name}", and each rank gets those of its own tokens'
        )
    else:
        yield (
            f"have forward take positions and read {read}; put torch.arange({length}) into the batch under that name, "
            f'with the rule "S@{AXIS}": each rank then gets those of its own tokens'
        )
    if table and not origin.counted and table in claims.params and claims.params[table].is_buffer:
        yield (
            f"or register {table} with just {length} rows, read it uncut, and lay it with the sequence: "
            f'"S@{AXIS} ..." in params'
        )


def origin_of(frames: Sequence[tuple[TypedGraph, int]], index: int) -> Origin:
    """Where a value of the innermost frame comes from, back through the frames that call it."""
    counted: dict[int, Node] = {}
    cut: dict[int, Node] = {}
    tables: dict[str, None] = {}
    entries: dict[str, None] = {}
    seen: set[tuple[int, int]] = set()
    wave: list[tuple[Sequence[tuple[TypedGraph, int]], int]] = [(frames, index)]
    for inside, at in wave:
        typed, _ = inside[-1]
        if (id(typed), at) in seen:
            continue
        seen.add((id(typed), at))
        value = typed.graph.values[at]
        if value.kind in ("param", "buffer"):
            tables[absolute(typed.fqn, value.name)] = None
        elif value.kind == "entry":
            entries[value.name] = None
        elif at in typed.graph.inputs and len(inside) > 1:
            outer, position = inside[-2]
            wave.append((inside[:-1], outer.graph.nodes[position].args[typed.graph.inputs.index(at)].index))
        elif (made := producer(typed.graph, at)) is not None:
            node = typed.graph.nodes[made]
            if node.op in COUNTED and not tensors(node.args):
                counted[id(node)] = node
            if node.op in CUT:
                cut[id(node)] = node
            wave += [(inside, ref.index) for ref in node.operands]
    return Origin(tuple(counted.values()), tuple(cut.values()), tuple(tables), tuple(entries))
