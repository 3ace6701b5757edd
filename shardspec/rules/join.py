"""Operators that join tensors along a dim."""

from typing import Any

import torch

from shardspec.layout import dim_axes, direct_sum
from shardspec.rules.operator import JOINT, Call, Label, Typed, dim_index, rule, unify
from shardspec.rules.view import read_whole, with_dim

aten = torch.ops.aten


def _joined(call: Call, dim: int, names: list[list[Label]], out: list[Label], whole: list[Any]) -> Typed:
    sizes = {"joined": call.out().shape[dim]}
    return unify(call, names, [out], linear=JOINT, whole=whole, out_sizes=sizes)


@rule(aten.cat.default, aten.concat.default)
def cat(call: Call) -> Typed:
    """Parts joined along a dim, which is whole in each, or split over the same axes: then a direct sum of them."""
    rank = len(call.out().shape)
    dim = dim_index(call.named.get("dim") or 0, rank)
    names: list[list[Label]] = [
        [("part", operand) if index == dim else index for index in range(len(call.shape(operand)))]
        for operand in range(len(call.types))
    ]
    out: list[Label] = ["joined" if index == dim else index for index in range(rank)]
    parts = [kind.layout.dims[dim] for kind in call.types if len(kind.layout.dims) == rank]
    axes = {dim_axes(part) for part in parts}
    if len(parts) < len(call.types) or len(axes) > 1 or axes == {()}:
        return _joined(call, dim, names, out, [("part", operand) for operand in range(len(call.types))])
    # Each rank joins its shares; beside them the operands are typed as if the dim were not there.
    rest = Call(call.node, call.values, tuple(with_dim(kind, dim, ()) for kind in call.types), call.sizes, call.refs)
    for labels in (*names, out):
        labels[dim] = None
    typed = unify(rest, names, [out], linear=JOINT)
    consumed = [with_dim(kind, dim, part) for kind, part in zip(typed.consumed, parts, strict=True)]
    return Typed((with_dim(typed.outputs[0], dim, direct_sum(parts)),), tuple(read_whole(k, dim) for k in consumed))


@rule(aten.stack.default)
def stack(call: Call) -> Typed:
    """Tensors of one shape joined along a new dim."""
    rank = len(call.out().shape)
    dim = dim_index(call.named.get("dim") or 0, rank)
    names: list[list[Label]] = [list(range(rank - 1)) for _ in call.types]
    out: list[Label] = list(range(rank - 1))
    out.insert(dim, "joined")
    return _joined(call, dim, names, out, [])
