"""What a call of an experts module holds on a rank, where every expert is chosen as often as any other.

Its forward was recorded on a few rows. What it keeps of them is counted value by value, and multiplied.
"""

from collections.abc import Sequence
from math import prod

from attrs import evolve

from shardspec.amounts import NOTHING, Amount, as_kind, part, plus, times
from shardspec.bodies import ROWS
from shardspec.footprint import KEPT, PASSING, Record
from shardspec.layout import Layout
from shardspec.localrun import COLLECTIVES, LocalRun
from shardspec.mesh import AXES
from shardspec.peaks import Peaks
from shardspec.rules.experts import EXPERT_AXIS, FIRST_PARAMETER


def expected(run: LocalRun, position: int, body: LocalRun, records: Sequence[Record], wants: Sequence[bool]) -> Record:
    """The record of a call.

    Args:
        body: its forward, as one rank runs it.
        records: what each node of that does.
        wants: which operands of the call a gradient reaches.
    """
    node = run.typed.graph.nodes[position]
    hidden, weights, ids = (ref.index for ref in node.operands[:3])
    tokens = run.typed.layout(ids)
    choices = tokens.shape[1]
    travels = EXPERT_AXIS in run.typed.consumed[position][FIRST_PARAMETER].layout.sharded
    rows = times(run.whole(hidden), choices) if travels else NOTHING
    shares = plus(run.whole(weights), times(part(PASSING, Layout(tokens.dims), 8, run.sizes), 2))
    inner, widest = _of_rows(body, records, prod(tokens.global_shape(run.sizes)), tuple(tokens.sharded))
    own = run.whole(node.outputs[0] or 0)
    grads = tuple(run.whole(ref.index) if wanted else None for ref, wanted in zip(node.operands, wants, strict=True))
    held = plus(rows, shares, inner)
    moved = as_kind(COLLECTIVES, rows)
    return Record(
        outputs=(own,),
        kept=as_kind(KEPT, held) if any(wants) else NOTHING,
        forward=Peaks.of([plus(rows, moved, shares), plus(held, rows, widest), plus(held, rows, moved, own)]),
        backward=Peaks.of([plus(rows, moved), plus(rows, widest), plus(*(grad for grad in grads if grad is not None))]),
        grads=grads,
    )


def _of_rows(body: LocalRun, records: Sequence[Record], rows: int, axes: tuple[str, ...]) -> tuple[Amount, Amount]:
    """What is kept of rows within a forward besides the rows themselves, and the widest value made of them.

    Args:
        rows: those of all ranks together, which `axes` divide.
    """
    graph = body.typed.graph
    made_of_rows, roots = set(graph.inputs), {index: index for index in graph.inputs}
    kept: set[int] = set()
    more: Amount = NOTHING
    widest: Amount = NOTHING
    for node, record in zip(graph.nodes, records, strict=True):
        operands = [ref.index for ref in node.operands]
        kept |= {roots.get(operands[at], operands[at]) for at in record.operands_kept if at < len(operands)}
        if made_of_rows.isdisjoint(operands):
            continue
        outs = [index for index in node.outputs if index is not None]
        for at, index in enumerate(outs):
            made_of_rows.add(index)
            origin = record.outputs[at] if at < len(record.outputs) else NOTHING
            root = operands[origin] if isinstance(origin, int) and 0 <= origin < len(operands) else index
            roots[index] = roots.get(root, root)
            widest = max(widest, body.whole(index), key=lambda amount: sum(amount.values()))
        kept |= {roots[outs[at]] for at in record.outputs_kept if at < len(outs)}
        more = plus(more, record.kept)
    values = sorted((kept & made_of_rows) - set(graph.inputs))
    held = plus(more, *(body.whole(index) for index in values))
    return _for_all(held, rows, axes), _for_all(widest, rows, axes)


def _for_all(amount: Amount, rows: int, axes: tuple[str, ...]) -> Amount:
    """Bytes of the recorded rows, for a rank's share of all."""
    found: Amount = NOTHING
    for (kind, term), number in amount.items():
        over = tuple(axis for axis in AXES if axis in (*term.over, *axes))
        found = plus(found, {(kind, evolve(term, over=over)): number * rows // ROWS})
    return found
