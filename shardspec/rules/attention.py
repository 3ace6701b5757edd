"""Attention, taken whole: batch and heads may be split, features may not, and the sequence over cp alone, where a
strategy of the policy reads it (`shardspec.policy`)."""

from collections.abc import Sequence

import torch

from shardspec.layout import DimLayout, Layout, Sizes, canonical, dim_axes, dim_text, global_size, local_size
from shardspec.moves import even_behind
from shardspec.program import Ref
from shardspec.rules.operator import Call, Label, Refusal, Type, Typed, rule, unify
from shardspec.sequence import AXIS

aten = torch.ops.aten

ATTENTION = "scaled_dot_product_attention"
"""The name of the operator in a program."""

QUERIES, KEYS, MASK = 0, 1, 3


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Typed:
    """q [..., Hq, L, E], k and v [..., Hk, S, E] -> [..., Hq, L, E]; Hk may be smaller with `enable_gqa`."""
    original = call.types
    over, whole_rows = _is_over_context(call), list[Label]()
    if over:
        _check_strategy(call)
        whole = tuple(_with_dim(kind, -2, canonical((call.shape(1)[-2],))) for kind in original[1:3])
        call.types = (original[0], *whole, *original[3:])
    grouped = bool(call.named.get("enable_gqa")) and call.shape(0)[-3] != call.shape(1)[-3]
    if grouped:
        _check_groups(call)
        heads = original[0].layout.dims[-3]
        call.types = (original[0], *(_with_dim(kind, -3, heads) for kind in call.types[1:3]), *original[3:])
    names = [_names(call.shape(operand), grouped) for operand in range(3)]
    labels = [[*names[0], "L", "E"], [*names[1], "S", "E"], [*names[2], "S", "Ev"]]
    if isinstance(call.named.get("attn_mask"), Ref):
        mask = call.shape(3)
        # Where heads are exchanged for the sequence, a mask has the rows of all queries.
        rows, whole_rows = ("rows", ["rows"]) if over and call.strategy == "ulysses" else ("L", [])
        ends = [None if mask[-2] == 1 else rows, None if mask[-1] == 1 else "S"]
        lead = names[0][max(0, len(names[0]) - len(mask) + 2) :] if len(mask) > 2 else []
        labels.append([*(None if size == 1 else label for size, label in zip(mask[:-2], lead, strict=True)), *ends])
    # Where the queries are of one batch and the keys of several, the result is of several.
    batch = max(names, key=lambda labels: sum(label is not None for label in labels))
    # Without a causal mask a rank's queries read whole keys as all queries do.
    free = over or not call.named.get("is_causal")
    typed = unify(call, labels, [[*batch, "L", "Ev"]], whole=["S", "E", *whole_rows, *(() if free else ("L",))])
    if call.named.get("dropout_p"):
        typed.lowering = "attention"
    if over:
        typed.lowering, typed.divides = call.strategy, _facts(call, original)
    if grouped or over:
        typed.consumed = (typed.consumed[0], *original[1:3], *typed.consumed[3:])
    return typed


def _with_dim(kind: Type, dim: int, digits: DimLayout) -> Type:
    """A type with other digits for one dim."""
    dims = list(kind.layout.dims)
    dims[dim] = digits
    return Type(Layout(tuple(dims), kind.layout.pending), kind.uniform)


def _names(shape: Sequence[int], grouped: bool) -> list[Label]:
    """Labels of batch and heads; of size one they broadcast, but for the heads of a group."""
    heads = len(shape) - 3 if grouped else None
    return [
        None if size == 1 and index != heads else ("b", index - len(shape)) for index, size in enumerate(shape[:-2])
    ]


def _check_groups(call: Call) -> None:
    """Query head i reads key head i // (Hq / Hk): the queries' heads are the keys', times the group's."""
    heads: list[DimLayout] = [call.types[operand].layout.dims[-3] for operand in range(3)]
    axes = dim_axes(heads[0])
    for operand, dim in enumerate(heads):
        if canonical((*dim, call.shape(0)[-3] // call.shape(operand)[-3])) != heads[0]:
            held = [axis for axis in (*axes, *dim_axes(dim)) if axis not in axes or axis not in dim]
            raise Refusal(
                "SS302",
                "attention meets query and key heads that are laid out differently",
                why=f"the heads of {call.operand(0)} are {dim_text(heads[0])}, those of {call.operand(operand)} "
                f"{dim_text(dim)}: a rank's queries "
                "would read other heads than theirs",
                operands=(operand, 0),
                axis=(held or list(axes))[0],
            )


# A sequence over cp.


def _is_over_context(call: Call) -> bool:
    """Whether queries, keys and values are split along the sequence, over cp and nothing else."""
    rows = [kind.layout.dims[-2] for kind in call.types[:3]]
    return bool(call.strategy) and all(len(dim) > 0 and dim[0] == AXIS and dim_axes(dim) == (AXIS,) for dim in rows)


def _check_strategy(call: Call) -> None:
    """SS341 for what a strategy cannot do, with those that can; SS342 for heads that cp does not divide."""
    strategy, named = call.strategy, call.named
    if named.get("dropout_p"):
        raise _cannot(
            call,
            "drops attention weights",
            "each block of scores would need the random numbers of its own place in the whole",
            (),
            "set the dropout of attention to 0 where the sequence is split over cp",
        )
    masked = isinstance(named.get("attn_mask"), Ref)
    if masked and strategy == "ring":
        raise _cannot(
            call,
            "has a mask",
            "a mask holds the rank's rows and all columns; the ring sees the columns of one rank at a time",
            ("allgather", "ulysses"),
        )
    if named.get("is_causal") and call.shape(QUERIES)[-2] != call.shape(KEYS)[-2] and strategy != "ulysses":
        raise _cannot(
            call,
            f"is causal, with {call.shape(QUERIES)[-2]} queries and {call.shape(KEYS)[-2]} keys",
            "the blocks of scores that a rank computes are those of one sequence with itself",
            ("ulysses",),
        )
    if masked and strategy == "allgather":
        _check_mask(call)
    if masked and strategy == "ulysses":
        _check_whole_mask(call)
    if strategy == "ulysses":
        _check_heads(call)


def _check_mask(call: Call) -> None:
    """SS302 for a mask without the rank's rows, or without all columns."""
    rows, columns = call.types[MASK].layout.dims[-2:]
    wanted = call.types[QUERIES].layout.dims[-2]
    if dim_axes(columns):
        raise Refusal(
            "SS302",
            f"attention by allgather reads a mask whose columns are split over {dim_axes(columns)[0]}",
            why=f"the columns of {call.operand(MASK)} are {dim_text(columns)}: keys are gathered, so that a rank's "
            "queries meet all of them",
            operands=(MASK,),
            axis=dim_axes(columns)[0],
            advice=("make the mask of all keys: gather what its columns are made of at a declared point",),
        )
    if call.shape(MASK)[-2] != 1 and rows != wanted:
        raise Refusal(
            "SS302",
            f"attention meets queries and rows of a mask that disagree: {dim_text(wanted)} against {dim_text(rows)}",
            why=f"{call.operand(QUERIES)} holds a rank's part of the sequence, {call.operand(MASK)} the rows of all: "
            "a rank would mask its queries by the rows of others",
            operands=(MASK, QUERIES),
            axis=AXIS,
            advice=(f"lay the mask's rows over {AXIS} as the queries are, and leave its columns whole",),
        )


def _check_whole_mask(call: Call) -> None:
    """SS341 for a mask that is split where heads are exchanged for the sequence."""
    for dim in call.types[MASK].layout.dims[-2:]:
        if dim_axes(dim):
            raise _cannot(
                call,
                f"has a mask that is split over {dim_axes(dim)[0]}",
                "after the exchange a rank holds all queries and all keys of some heads, and needs the whole mask",
                ("allgather",),
                operand=MASK,
            )


def _check_heads(call: Call) -> None:
    """SS342 where the heads that other axes left cannot be shared among the ranks of cp."""
    ranks = call.sizes[AXIS]
    for operand in range(3):
        shape, dim = call.shape(operand), call.types[operand].layout.dims
        held = local_size(dim[-3]) if len(shape) > 2 else 1
        if held % ranks:
            what = "query" if operand == 0 else "key-value"
            heads = shape[-3] if len(shape) > 2 else 1
            split = [f"{axis}={call.sizes[axis]}" for axis in dim_axes(dim[-3])] if len(shape) > 2 else []
            left = f"{' x '.join(split)} leaves {held} of {heads} to a rank" if split else f"there are {heads}"
            legal = [str(degree) for degree in range(1, held + 1) if held % degree == 0]
            raise Refusal(
                "SS342",
                f"{held} {what} head{'s' * (held != 1)} cannot be exchanged over {AXIS}={ranks}",
                why=f"ulysses gives each rank of {AXIS} whole heads, for all of the sequence: {left}, and "
                f"{ranks} does not divide {held}\n{AXIS} may be {', '.join(legal)} here",
                operands=(operand,),
                axis=AXIS,
                advice=('ss.Policy(attention="ring") and "allgather" split no heads',),
            )


def _facts(call: Call, kinds: Sequence[Type]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """What the sizes of axes must divide for heads to be exchanged."""
    found: list[tuple[tuple[str, ...], int]] = []
    for operand, kind in enumerate(kinds[:3]) if call.strategy == "ulysses" else ():
        heads = kind.layout.dims[-3]
        axes = dim_axes(heads)
        if heads[: len(axes)] == axes:
            found.append(((*axes, AXIS), call.shape(operand)[-3]))
    return tuple(found)


def _cannot(
    call: Call, what: str, why: str, others: Sequence[str], advice: str = "", operand: int = QUERIES
) -> Refusal:
    named = ", ".join(f'ss.Policy(attention="{other}")' for other in others)
    return Refusal(
        "SS341",
        f'attention="{call.strategy}": the call {what}, and its sequence is split over {AXIS}',
        why=why,
        operands=(operand,),
        axis=AXIS,
        advice=(advice or f"what can: {named}",),
    )


# Head and tail.


def in_halves(layout: Layout, sizes: Sizes) -> bool:
    """Whether a layout leaves a rank two chunks of each dim that cp splits."""
    return all(even_behind(dim, AXIS, sizes) for dim in layout.dims if AXIS in dim_axes(dim))


def uneven_halves(what: str, layout: Layout, sizes: Sizes, operands: Sequence[int] = (0,)) -> Refusal:
    """SS343 for a value of which ranks cannot hold two chunks."""
    dim = next(dim for dim in layout.dims if AXIS in dim_axes(dim) and not even_behind(dim, AXIS, sizes))
    length = global_size(dim, sizes)
    return Refusal(
        "SS343",
        f"{what}: {length} cannot be laid head and tail over {AXIS}={sizes[AXIS]}",
        why=f"each rank holds two chunks, one from the front and one from the back: {2 * sizes[AXIS]} chunks, and a "
        f"rank would hold {dim_text(dim)}",
        operands=operands,
        axis=AXIS,
        advice=("ss.Policy(balance=False) leaves the sequence in order",),
    )


def check_halves(call: Call, answer: Typed) -> None:
    """Refuse a result that cuts the two chunks of a rank.

    Raises:
        Refusal: SS343.
    """
    for kind in answer.outputs:
        if not in_halves(kind.layout, call.sizes):
            held = [at for at, read in enumerate(call.types) if AXIS in read.layout.sharded]
            raise uneven_halves(f"the result of {call.node.op}", kind.layout, call.sizes, held)
