"""Lookups by integer tensors, and tensors made from nothing."""

from math import prod

import torch

from shardspec.layout import Layout, dim_axes
from shardspec.program import Ref
from shardspec.rules.operator import (
    FIRST,
    PRODUCT,
    Call,
    Label,
    Refusal,
    Type,
    Typed,
    dim_index,
    rule,
    uniform,
    unify,
    unsplit,
)

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call) -> Typed:
    """weight [v, d], indices [...] -> [..., d]; a split vocabulary leaves a pending sum of masked lookups."""
    lead: list[Label] = [("i", index) for index in range(len(call.shape(1)))]
    for option in ("scale_grad_by_freq", "sparse"):
        if call.named.get(option):
            raise Refusal(
                "SS305",
                f"embedding with {option}=True has no rule",
                why="a row's gradient would be divided by its count in a rank's part of the batch"
                if option == "scale_grad_by_freq"
                else "gradients over ranks are summed as dense tensors",
                operands=(0, 1),
                advice=(f"build the embedding with {option}=False",),
            )
    typed = unify(call, [["v", "d"], lead], [[*lead, "d"]], linear=FIRST)
    rows = call.types[0].layout.dims[0]
    axes = dim_axes(rows)
    if axes:
        if rows[: len(axes)] != axes:
            raise Refusal("SS304", "embedding looks up rows that a rank holds in strides", operands=(0,), axis=axes[0])
        typed.lowering = "embedding"
    return typed


@rule(aten.one_hot.default)
def one_hot(call: Call) -> Typed:
    """ids [...] -> [..., classes]; taken whole, for torch's check of the range reads all ids."""
    lead: list[Label] = list(range(len(call.shape(0))))
    return unify(call, [lead], [[*lead, "class"]], out_sizes={"class": call.out().shape[-1]})


@rule(aten.index.Tensor)
def index(call: Call) -> Typed:
    """x[..., i, j, ...]: the indexed dims must be whole; the result follows the index."""
    indices = call.named["indices"]
    shape = call.shape(0)
    indexed = [dim for dim, item in enumerate(indices) if isinstance(item, Ref)]
    if any(call.dtype(operand) == torch.bool for operand in range(1, len(call.types))):
        raise Refusal("SS305", "indexing by a boolean mask has a shape that depends on values", operands=(1,))
    names: list[Label] = [("x", dim) for dim in range(len(shape))]
    labels: list[list[Label]] = [names]
    rank = 0
    for operand in range(1, len(call.types)):
        found = call.shape(operand)
        rank = max(rank, len(found))
        labels.append([None if length == 1 else ("i", dim - len(found)) for dim, length in enumerate(found)])
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    out_shape = call.out().shape
    taken: list[Label] = [None if out_shape[at + dim] == 1 else ("i", dim - rank) for dim in range(rank)]
    rest: list[Label] = [name for dim, name in enumerate(names) if dim not in indexed]
    whole = [names[dim] for dim in indexed]
    return unify(call, labels, [rest[:at] + taken + rest[at:]], linear=FIRST, whole=whole)


@rule(aten.gather.default, aten.take_along_dim.default)
def gather(call: Call) -> Typed:
    """out[i][j] = x[index[i][j]][j]: of x the dim must be whole; the other dims are alike, or broadcast."""
    shape, wanted, made = call.shape(0), call.shape(1), call.out().shape
    if call.named["dim"] is None and max(len(shape), len(wanted)) > 1:
        raise Refusal("SS305", f"{call.node.op} without a dim reads all of its operands as one row", operands=(0, 1))
    if len(shape) != len(wanted):
        if prod(wanted) != 1:
            raise Refusal("SS305", f"{call.node.op} of a vector by a matrix of indices has no rule", operands=(1,))
        # One of them is 0-dim, and stands for a dim of one.
        return unify(call, [["x"] * len(shape), [None] * len(wanted)], [[None] * len(made)], linear=FIRST, whole=["x"])
    dim = dim_index(call.named["dim"] or 0, len(shape))
    names: list[Label] = [("x", index) for index in range(len(shape))]
    picks: list[Label] = list(range(len(shape)))
    for index in set(range(len(shape))) - {dim}:
        if made[index] == max(shape[index], wanted[index]):
            names[index] = None if shape[index] < made[index] else index
            picks[index] = None if wanted[index] < made[index] else index
    whole = [name for name in names if isinstance(name, tuple)]
    return unify(call, [names, picks], [list(range(len(shape)))], linear=FIRST, whole=whole)


@rule(aten.index_select.default)
def index_select(call: Call) -> Typed:
    """Rows of a whole dim by a vector of indices."""
    dim = dim_index(call.named["dim"], len(call.shape(0)))
    names: list[Label] = list(range(len(call.shape(0))))
    out: list[Label] = ["i" if index == dim else index for index in names]
    return unify(call, [names, ["i" if names else None]], [out], linear=FIRST, whole=[dim])


@rule(
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def fill(call: Call) -> Typed:
    """One value everywhere: each dim adopts the layout of the partner that it meets."""
    return Typed((uniform(call.out().shape),), call.types)


@rule(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
def fill_like(call: Call) -> Typed:
    """One value everywhere, laid out as the operand is."""
    kind = call.types[0]
    return Typed((Type(Layout(kind.layout.dims), kind.uniform),), call.types)


@rule(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.scalar_tensor.default,
    aten.eye.default,
)
def count(call: Call) -> Typed:
    """Values that depend on the index: every rank makes all of them."""
    return Typed((unsplit(call.out().shape),), call.types)


@rule(aten.outer.default)
def outer(call: Call) -> Typed:
    """[m] x [n] -> [m, n]."""
    return unify(call, [["m"], ["n"]], [["m", "n"]], linear=PRODUCT)
