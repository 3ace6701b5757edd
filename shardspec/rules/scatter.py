"""Operators that write some elements of a tensor: scatter, rows by index, copies and fillings in place."""

import torch

from shardspec.program import Ref
from shardspec.rules.operator import (
    FIRST,
    JOINT,
    NONLINEAR,
    PRODUCT,
    Call,
    Label,
    Refusal,
    Typed,
    aligned,
    aligned_output,
    dim_index,
    rule,
    unify,
)

aten = torch.ops.aten


@rule(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.scatter_add.default,
    aten.scatter_add_.default,
)
def scatter(call: Call) -> Typed:
    """x[i][index[i][j]] = or += src[i][j]: the dim must be whole, and so must one that the index covers in part."""
    shape = call.shape(0)
    others = [call.shape(operand) for operand in range(1, len(call.types))]
    if any(len(other) != len(shape) for other in others):
        raise Refusal("SS305", f"{call.node.op} of a 0-dim tensor has no rule", operands=(0, 1))
    dim = dim_index(call.named["dim"], len(shape))
    alike = [all(other[at] == length for other in others) and at != dim for at, length in enumerate(shape)]
    labels: list[list[Label]] = [
        [at if same else (operand, at) for at, same in enumerate(alike)] for operand in range(len(call.types))
    ]
    whole = [label for names in labels for label in names if isinstance(label, tuple)]
    value = call.named.get("value")
    linear = JOINT if isinstance(call.named.get("src"), Ref) else FIRST if value == 0 else NONLINEAR
    return unify(call, labels, labels[:1], linear=linear, whole=whole, fixed=(1,))


@rule(
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_copy.default,
    aten.index_copy_.default,
)
def write_rows(call: Call) -> Typed:
    """Rows of a whole dim, by a vector of indices, from `source`, whose rows are whole too."""
    rank = len(call.shape(0))
    if not rank or len(call.shape(2)) != rank:
        raise Refusal("SS305", f"{call.node.op} of a 0-dim tensor has no rule", operands=(0, 2))
    dim = dim_index(call.named["dim"], rank)
    names: list[Label] = list(range(rank))
    source: list[Label] = ["row" if index == dim else index for index in range(rank)]
    index: list[Label] = ["row"] if call.shape(1) else []
    return unify(call, [names, index, source], [names], linear=JOINT, whole=[dim, "row"], fixed=(1,))


@rule(aten.index_fill.int_Scalar, aten.index_fill_.int_Scalar)
def fill_rows(call: Call) -> Typed:
    """A number into rows of a whole dim; zero is linear."""
    rank = len(call.shape(0))
    names: list[Label] = list(range(rank))
    index: list[Label] = ["row"] if call.shape(1) else []
    linear = FIRST if call.named["value"] == 0 else NONLINEAR
    dim = dim_index(call.named["dim"], rank)
    return unify(call, [names, index], [names], linear=linear, whole=[dim, "row"])


@rule(aten.copy_.default)
def copy_into(call: Call) -> Typed:
    """Another's elements in place of its own: what it owed must be what the other owes."""
    mine, other = call.dtype(0), call.dtype(1)
    kept = mine == other or mine.is_floating_point or mine.is_complex
    linear = JOINT if kept else NONLINEAR
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=linear)


@rule(aten.fill_.Scalar, aten.fill.Scalar, aten.zero_.default)
def fill(call: Call) -> Typed:
    """A number everywhere; zero is what the shares of a sum may all be."""
    linear = PRODUCT if call.named.get("value", 0) == 0 else NONLINEAR
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=linear)
