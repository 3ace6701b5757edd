"""Experts modules, typed whole: rows travel over ep to the rank of their expert, and back.

A node reads (hidden [N, D], weights [N, k], ids [N, k], *parameters [E, ...]). Tokens may be split over any axes;
experts over ep alone, which must split the tokens too. What tp does within an expert, the typing of its forward tells.
"""

from collections.abc import Sequence

from shardspec.layout import Layout, dim_axes, dim_text, with_pending
from shardspec.rules.operator import Call, Refusal, Type, Typed, unify

FIRST_PARAMETER = 3
"""The operands in front of it are hidden, weights and ids."""

EXPERT_AXIS = "ep"
"""The axis over which experts are laid."""


def type_experts(call: Call) -> tuple[Typed, dict[str, Layout]]:
    """The answer but for what the parameters owe the result, and the layouts with which a rank's forward reads them.

    Raises:
        Refusal: SS302, SS303, SS304 for operands that are laid out otherwise; SS332 for what no exchange mends.
    """
    tokens = Call(call.node, call.values, call.types[:FIRST_PARAMETER], call.sizes, call.refs[:FIRST_PARAMETER])
    answer = unify(tokens, [["n", "D"], ["n", "k"], ["n", "k"]], [["n", "D"]], whole=["D", "k"])
    rows = answer.outputs[0].layout.dims[0]
    over = dim_axes(rows)
    stacked = list(zip(call.node.func.names, range(FIRST_PARAMETER, len(call.types)), strict=True))
    counts = {call.shape(at)[0] if call.shape(at) else 0 for _, at in stacked}
    if len(counts) != 1:
        told = ", ".join(f"{name} {list(call.shape(at))}" for name, at in stacked) or "it has none"
        raise refuse(f"the parameters of {call.node.func.fqn} are not stacked over one number of experts", told)
    layouts = {name: call.types[at].layout for name, at in stacked}
    split = {name: dim_axes(layout.dims[0]) for name, layout in layouts.items()}
    if any(axes not in ((), (EXPERT_AXIS,)) for axes in split.values()) or len(set(split.values())) > 1:
        told = ", ".join(f"{name} {dim_text(layout.dims[0])}" for name, layout in layouts.items())
        raise refuse(
            f"the experts of {call.node.func.fqn} are laid out over other axes than ep, or not all alike",
            f"a row goes to the one rank of ep that has all of its expert; dim 0 is {told}",
            operands=range(FIRST_PARAMETER, len(call.types)),
            advice=(f"write E@{EXPERT_AXIS} on dim 0 of every parameter of the module",),
        )
    exchanged = any(split.values())
    if exchanged and EXPERT_AXIS not in over:
        raise refuse(
            f"{call.operand(0)} is whole on every rank of ep, over which the experts are laid",
            f"its rows are {dim_text(rows)}: each rank of ep would send the same rows, and every expert count them "
            f"{call.sizes[EXPERT_AXIS]} times",
            operands=(0,),
            axis=EXPERT_AXIS,
            advice=("put ep on the batch factor of the entries and of the activations, beside dp and fsdp",),
        )
    for name, at in stacked:
        both = [axis for axis in (*layouts[name].sharded, *(a for a, _ in layouts[name].pending)) if axis in over]
        if [axis for axis in both if axis != EXPERT_AXIS]:
            axis = next(axis for axis in both if axis != EXPERT_AXIS)
            raise refuse(
                f"{call.operand(0)} and {name} are both split over {axis}",
                f"a rank of {axis} would compute its features for its own rows alone: rows {dim_text(rows)}, "
                f"{name} {layouts[name]}",
                operands=(0, at),
                axis=axis,
                advice=(f"gather the rows over {axis} in a rule for the module's input",),
            )
    types = call.types[FIRST_PARAMETER:]
    consumed = (*answer.consumed, *(Type(kind.layout) for kind in types))
    inner = {name: _without_experts(layout) for name, layout in layouts.items()}
    return Typed(answer.outputs, consumed), inner


def _without_experts(layout: Layout) -> Layout:
    """A parameter's layout on the ranks that have the same experts."""
    return Layout((tuple(d for d in layout.dims[0] if d != EXPERT_AXIS), *layout.dims[1:]), layout.pending)


def with_result(answer: Typed, result: Type) -> Typed:
    """The answer with what a rank's forward leaves pending.

    Raises:
        Refusal: SS332 for a result whose features or rows are split.
    """
    if result.layout.sharded:
        axis = next(iter(result.layout.sharded))
        raise refuse(
            f"the experts give {result.layout} for rows that every rank of {axis} has whole",
            "the rows of a result go back to where they came from, with all their features",
            axis=axis,
            advice=(f"split the last product's inner dim over {axis}, not its outer one",),
        )
    made = answer.outputs[0]
    kind = Type(with_pending(made.layout, (*made.layout.pending, *result.layout.pending)))
    return Typed((kind,), answer.consumed)


def refuse(what: str, why: str, operands: Sequence[int] = (), axis: str = "", advice: Sequence[str] = ()) -> Refusal:
    """SS332."""
    return Refusal("SS332", what, why=why, operands=operands, axis=axis, advice=advice)
