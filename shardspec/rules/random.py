"""Operators that draw random numbers: keyed by the global index, so that every mesh draws the same."""

import torch

from shardspec.rules.operator import COPY, Call, Refusal, Typed, aligned, aligned_output, rule, unify

aten = torch.ops.aten


@rule(aten.dropout.default)
def dropout(call: Call) -> Typed:
    """An element is kept or not by its global index: replicas agree, shards differ, remat repeats."""
    active = bool(call.named["train"]) and float(call.named["p"]) > 0
    labels, out = aligned(call), [aligned_output(call.out().shape)]
    if not active:
        return unify(call, labels, out, linear=COPY)
    if call.types[0].layout.pending:
        axis = call.types[0].layout.pending[0][0]
        raise Refusal(
            "SS303",
            f"dropout reads {call.operand(0)}, which is still to be summed over {axis}",
            why="dropped before it is summed, a value's shares must be dropped alike, which only luck would ensure",
            operands=(0,),
            axis=axis,
        )
    typed = unify(call, labels, out)
    typed.lowering = "dropout"
    return typed
