"""Wrong operator rules, planted by tests: each must be caught by what the ranks compute."""

from math import prod

import torch

from shardspec.layout import MAX, SUM, Layout, dim_axes, local_size
from shardspec.rules import contraction, index, pointwise, reduction, spatial, view
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


def flatten_backwards(call: Call) -> Typed:
    """The digits of a merged dim, minor to major."""
    kind, after = call.types[0], call.out().shape
    if len(after) > 2 or any(len(dim) > 1 and isinstance(dim[0], int) for dim in kind.layout.dims):
        return view.view(call)
    kept = len(after) - 1
    digits = [digit for dim in reversed(kind.layout.dims[kept:]) for digit in dim]
    if not digits or len(kind.layout.dims) == 1:
        return view.view(call)
    return Typed((Type(Layout((*kind.layout.dims[:kept], merge(digits)), kind.layout.pending)),), (kind,))


def embedding_of_global_rows(call: Call) -> Typed:
    """Ids are looked up as they are in the rows that a rank holds."""
    typed = index.embedding(call)
    return Typed(typed.outputs, typed.consumed)


def first_operand_alone(call: Call) -> Typed:
    """Where an operand is 0-dim, the other's type is the result's."""
    if len(call.types) == 2 and not call.types[1].layout.dims:
        return Typed((call.types[0],), call.types)
    return pointwise.pointwise(call)


def whole_meets_split(call: Call) -> Typed:
    """A dim of one on a rank broadcasts against a whole one, and nobody asks."""
    if len(call.types) != 2 or any(kind.layout.pending for kind in call.types):
        return pointwise.pointwise(call)
    labels = aligned(call)
    one = call.types[0].layout.dims
    for at, dim in enumerate(call.types[1].layout.dims):
        beside = at - len(call.types[1].layout.dims) + len(one)
        if beside >= 0 and local_size(dim) == 1 and dim_axes(dim) and not dim_axes(one[beside]):
            labels[1][at] = None
    return unify(call, labels, [aligned_output(call.out().shape)])


def product_of_a_part(call: Call) -> Typed:
    """[m, k] x [k, n] without a look at k."""
    return unify(call, [["m", "k"], ["other k", "n"]], [["m", "n"]], linear=PRODUCT)


def along_a_part(call: Call) -> Typed:
    return unify(call, dims_only(call), dims_only(call), linear=PRODUCT)


def along_a_part_twice(call: Call) -> Typed:
    return unify(call, dims_only(call), dims_only(call) * 2)


def repeat_after(call: Call) -> Typed:
    """As if each element were repeated beside itself."""
    typed = view.repeat(call)
    counts = [int(count) for count in call.named["repeats"]][-len(call.types[0].layout.dims) :]
    dims = [merge([*dim, count]) for dim, count in zip(call.types[0].layout.dims, counts, strict=False)]
    old = typed.outputs[0].layout
    lead = old.dims[: len(old.dims) - len(dims)]
    return Typed((Type(Layout((*lead, *dims), old.pending)),), (Type(call.types[0].layout),), local=typed.local)


def expand_of_a_pending(call: Call) -> Typed:
    """What is owed is forgotten on the way."""
    typed = view.expand(call)
    return Typed((Type(Layout(typed.outputs[0].layout.dims), typed.outputs[0].uniform),), typed.consumed)


def rows_of_a_part(call: Call) -> Typed:
    dim = int(call.named["dim"]) % max(len(call.shape(0)), 1)
    names = dims_only(call)[0]
    out = ["i" if at == dim else name for at, name in enumerate(names)]
    typed = unify(call, [names, ["i"]], [out], linear=PRODUCT)
    return Typed((Type(Layout(typed.outputs[0].layout.dims)),), typed.consumed)


def linear_that_owes_nothing(call: Call) -> Typed:
    typed = contraction.linear(call)
    return Typed((Type(Layout(typed.outputs[0].layout.dims)),), typed.consumed)


def pad_of_shares(call: Call) -> Typed:
    """Every share gets the number."""
    return spatial.over(call, [len(call.shape(0)) - 1], PRODUCT)


def scatter_into_a_part(call: Call) -> Typed:
    """Each rank writes where the index says, in its own part."""
    names = dims_only(call)[0]
    index_names = [("i", name) if at == call.named["dim"] else name for at, name in enumerate(names)]
    return unify(call, [names, index_names], [names], linear=PRODUCT)
