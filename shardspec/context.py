"""What attention over cp moves: the rows of a plan, by strategy."""

from collections.abc import Callable, Iterator
from math import prod

import torch
from attrs import evolve

from shardspec.functional import accumulation_dtype
from shardspec.infer import TypedGraph, absolute
from shardspec.lower import calls
from shardspec.plan import Collective
from shardspec.policy import STRATEGIES
from shardspec.program import Ref
from shardspec.rules.operator import named_arguments
from shardspec.sequence import AXIS
from shardspec.stages import TypedProgram


def attention_collectives(
    typed: TypedProgram, again: tuple[str, ...], dtype_of: Callable[[torch.dtype], torch.dtype]
) -> Iterator[Collective]:
    """The messages of each attention over cp, forward and backward; inside `again` those of forward run twice.

    Of n ranks, with k and v the bytes that a rank holds of keys and values, in the dtype of sums for their gradients:
    gathered, two messages of n k and n v, again in backward, and as much scattered; in the ring n - 1 messages of
    k + v, in backward as many and as many of gradients; exchanged, one of each of queries, keys, values and the result.
    """
    ranks = typed.mesh[AXIS]
    for fqn, graph, back in calls(typed.forward, typed.backward, ""):
        for position, strategy in graph.lowering.items():
            if strategy not in STRATEGIES:
                continue
            path = absolute(fqn, graph.graph.nodes[position].path)
            twice = any(path == module or path.startswith(f"{module}.") for module in again)
            row = Collective(
                kind="", axes=(AXIS,), where=path, phase="forward", count=1, bytes=0, why=f"attention by {strategy}"
            )
            alive = back is not None and position in back.alive
            for found in messages(graph, position, strategy, ranks, row, dtype_of):
                if found.phase == "forward" or alive:
                    yield found
                if found.phase == "forward" and twice and alive:
                    yield evolve(found, phase="backward")


def messages(
    graph: TypedGraph,
    position: int,
    strategy: str,
    ranks: int,
    row: Collective,
    dtype_of: Callable[[torch.dtype], torch.dtype],
) -> Iterator[Collective]:
    """The messages of one attention."""
    node = graph.graph.nodes[position]
    sizes, sums = zip(*(held(graph, ref.index, dtype_of) for ref in node.operands[:3]), strict=True)
    keys, values = sizes[1:]
    if strategy == "ring":
        there = evolve(row, kind="send_recv", count=ranks - 1, bytes=keys + values)
        yield from (there, evolve(there, phase="backward"))
        yield evolve(there, phase="backward", bytes=sums[1] + sums[2], why=f"{row.why}: gradients")
    elif strategy == "ulysses":
        made = node.outputs[0]
        assert made is not None, "attention has a result"
        for size in (*sizes, held(graph, made, dtype_of)[0]):
            yield from (evolve(row, kind="all_to_all", phase=phase, bytes=size) for phase in ("forward", "backward"))
    else:
        masked = isinstance(named_arguments(node).get("attn_mask"), Ref)
        for size, summed in ((keys, sums[1]), (values, sums[2])):
            yield evolve(row, kind="all_gather", bytes=ranks * size)
            if not masked:
                yield evolve(row, kind="all_gather", phase="backward", bytes=ranks * size)
            bytes_scattered = ranks * (size if masked else summed)
            yield evolve(row, kind="reduce_scatter", phase="backward", bytes=bytes_scattered)


def held(graph: TypedGraph, index: int, dtype_of: Callable[[torch.dtype], torch.dtype]) -> tuple[int, int]:
    """The bytes that a rank holds of a value, and of its gradient where that is summed."""
    dtype = dtype_of(graph.graph.values[index].dtype)
    count = prod(graph.layout(index).shape)
    return count * dtype.itemsize, count * accumulation_dtype(dtype).itemsize
