"""Wrong operator rules, planted by tests: each must be caught by what the ranks compute."""

from math import prod

import torch

from shardspec.layout import MAX, SUM, Layout
from shardspec.rules import index, reduction, view
from shardspec.rules.operator import COPY, PRODUCT, Call, Label, Refusal, Type, Typed, aligned, aligned_output, unify
from tests.strategies import merge

aten = torch.ops.aten


def dims_only(call: Call) -> list[list[Label]]:
    return [list(range(-len(kind.layout.dims), 0)) for kind in call.types]


def softmax_of_a_part(call: Call) -> Typed:
    return unify(call, dims_only(call), dims_only(call))


def sum_that_owes_nothing(call: Call) -> Typed:
    typed = reduction.partial(call)
    return Typed(tuple(Type(Layout(kind.layout.dims)) for kind in typed.outputs), typed.consumed)


def mean_that_is_a_sum(call: Call) -> Typed:
    typed = reduction.partial(call)
    pending = tuple((axis, SUM) for axis, _ in typed.outputs[0].layout.pending)
    return Typed((Type(Layout(typed.outputs[0].layout.dims, pending)),), typed.consumed)


def amax_of_a_sum(call: Call) -> Typed:
    return unify(call, dims_only(call), [dims_only(call)[0][:-1]], linear=PRODUCT, contracted=MAX)


def product_of_two_sums(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=COPY)


def sum_of_a_sum_and_a_whole(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=PRODUCT)


def view_cut_from_the_left(call: Call) -> Typed:
    """As DTensor does: the axes of a merged dim fall to its first."""
    kind = call.types[0]
    axes = [digit for dim in kind.layout.dims for digit in dim if isinstance(digit, str)]
    dims = [(length,) if length != 1 else () for length in call.out().shape]
    degree = prod(call.sizes[axis] for axis in axes)
    if axes and call.out().shape[0] % degree == 0:
        dims[0] = merge([*axes, call.out().shape[0] // degree])
    elif axes:
        raise Refusal("SS301", "does not divide")
    return Typed((Type(Layout(tuple(dims), kind.layout.pending)),), (kind,))


def slice_at_the_global_start(call: Call) -> Typed:
    typed = view.slice_(call)
    return Typed(typed.outputs, typed.consumed, local={"start": 0, "end": ...})


def cat_of_parts(call: Call) -> Typed:
    """Parts of each laid side by side are not the parts of the whole."""
    names = dims_only(call)
    typed = unify(call, names, [[*names[0][:-1], "joined"]], out_sizes={"joined": 1})
    last = [kind.layout.dims[-1] for kind in call.types]
    axes = [digit for digit in last[0] if isinstance(digit, str)]
    if any([digit for digit in dim if isinstance(digit, str)] != axes for dim in last):
        raise Refusal("SS302", "laid out differently")
    length = call.out().shape[-1] // prod(call.sizes[axis] for axis in axes)
    dims = (*typed.outputs[0].layout.dims[:-1], merge([*axes, length]))
    return Typed((Type(Layout(dims)),), typed.consumed)


def embedding_that_owes_nothing(call: Call) -> Typed:
    typed = index.embedding(call)
    return Typed((Type(Layout(typed.outputs[0].layout.dims)),), typed.consumed, lowering=typed.lowering)


def attention_to_other_heads(call: Call) -> Typed:
    """Grouped heads laid out in another way than the queries' are not asked about."""
    names = [[f"{operand}{at}" if at == 1 else at for at in range(4)] for operand in range(3)]
    return unify(call, names, [names[0]], whole=[2, 3])


def weight_read_in_part(call: Call) -> Typed:
    """Right forward; but a whole weight that meets parts of rows owes its gradient, and this says that it does not."""
    typed = reduction.norm(call)
    pending = tuple((axis, SUM) for axis in sorted(call.types[0].layout.sharded))
    return Typed(typed.outputs, (typed.consumed[0], Type(Layout(typed.consumed[1].layout.dims, pending))))


def where_with_a_pending_condition(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=PRODUCT)


WRONG = [
    (aten.softmax.int, softmax_of_a_part, "softmax"),
    (aten.sum.dim_IntList, sum_that_owes_nothing, "sum"),
    (aten.mean.dim, mean_that_is_a_sum, "mean"),
    (aten.amax.default, amax_of_a_sum, "amax"),
    (aten.mul.Tensor, product_of_two_sums, "square by mul"),
    (aten.add.Tensor, sum_of_a_sum_and_a_whole, "add"),
    (aten.view.default, view_cut_from_the_left, "merge"),
    (aten.view.default, view_cut_from_the_left, "cut the first"),
    (aten.slice.Tensor, slice_at_the_global_start, "slice from behind"),
    (aten.cat.default, cat_of_parts, "cat of equals"),
    (aten.embedding.default, embedding_that_owes_nothing, "embedding"),
    (aten.scaled_dot_product_attention.default, attention_to_other_heads, "grouped attention"),
    (aten.rms_norm.default, weight_read_in_part, "rms norm"),
    (aten.where.self, where_with_a_pending_condition, "where on a comparison"),
]
