"""Operators that move or cut dims and compute nothing: views, slices."""

from collections.abc import Sequence

import torch

from shardspec.layout import (
    CutError,
    DimLayout,
    Layout,
    Sizes,
    canonical,
    dim_axes,
    dim_text,
    direct_sum,
    extent,
    flatten,
    global_size,
    is_sum,
    local_size,
    parts_of,
    split,
)
from shardspec.rules.operator import COPY, PRODUCT, Call, Label, Refusal, Type, Typed, dim_index, rule, unify

aten = torch.ops.aten


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dims, before and after, that hold the same number of elements; ones left aside."""
    left = [index for index, length in enumerate(before) if length != 1]
    right = [index for index, length in enumerate(after) if length != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) or j < len(right):
        one, two = [left[i]], [right[j]]
        size_one, size_two = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while size_one != size_two:
            if size_one < size_two:
                one.append(left[i])
                size_one *= before[left[i]]
                i += 1
            else:
                two.append(right[j])
                size_two *= after[right[j]]
                j += 1
        groups.append((one, two))
    return groups


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view_as.default,
)
def view(call: Call) -> Typed:
    """Concatenate the digits of each group of dims and cut them anew, from the right."""
    kind, before, after = call.types[0], call.shape(0), call.out().shape
    dims: list[DimLayout] = [()] * len(after)
    same: set[int] = set()
    still: set[int] = set()
    divides: list[tuple[tuple[str, ...], int]] = []
    if 0 in before:
        return _empty(call)
    for one, two in _groups(before, after):
        try:
            parts = split(flatten(kind.layout.dims[i] for i in one), [after[j] for j in two], call.sizes)
        except CutError as error:
            raise _cut(call, error, one, two) from error
        for j, part in zip(two, parts, strict=True):
            dims[j] = part
            divides += cuts(part, call.sizes) if len(two) > 1 else []
        if all(i in kind.uniform for i in one):
            same.update(two)
            still.update(one)
    layout = Layout(tuple(dims), kind.layout.pending)
    read = (Type(kind.layout, frozenset(still)), *call.types[1:])
    return Typed((Type(layout, frozenset(same)),), read, divides=tuple(divides))


def _empty(call: Call) -> Typed:
    """A view of a tensor without elements, which must be whole."""
    for axis in call.types[0].layout.sharded:
        raise Refusal("SS305", f"{call.node.op} of an empty tensor that is split over {axis}", operands=(0,), axis=axis)
    out = Layout(tuple(canonical((length,)) for length in call.out().shape), call.types[0].layout.pending)
    return Typed((Type(out),), (Type(call.types[0].layout), *call.types[1:]))


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call) -> Typed:
    """A view without the dims of length one; on a rank, a split dim may have length one too, and must stay."""
    named, shape = call.named.get("dim"), call.shape(0)
    asked = range(len(shape)) if named is None else named if isinstance(named, (list, tuple)) else [named]
    for dim in (int(one) % max(len(shape), 1) for one in asked):
        digits = call.types[0].layout.dims[dim] if shape else ()
        if dim_axes(digits) and local_size(digits) == 1:
            raise Refusal(
                "SS304",
                f"squeeze would drop dim {dim}, of which each rank holds one of {shape[dim]}",
                why="the dim stays on the whole; on a rank it would go",
                operands=(0,),
                axis=dim_axes(digits)[0],
                advice=("name a dim that is of length one on the whole",),
            )
    return view(call)


def cuts(dim: DimLayout, sizes: Sizes) -> list[tuple[tuple[str, ...], int]]:
    """What must divide the length of a cut dim, or of each part of it, to hold its axes, whatever their sizes."""
    axes = dim_axes(dim)
    if not axes:
        return []
    return [(axes, global_size(part[part.index(axes[0]) :], sizes)) for part in parts_of(dim)]


def _cut(call: Call, error: CutError, one: Sequence[int], two: Sequence[int]) -> Refusal:
    axis = error.axis
    held = [call.types[0].layout.dims[i] for i in one]
    lengths = [call.out().shape[j] for j in two]
    degree = call.sizes[axis]
    if any(map(is_sum, held)):
        shapes = " x ".join(str(call.shape(0)[i]) for i in one), " x ".join(map(str, lengths))
        return Refusal(
            "SS301",
            f"the view of {shapes[0]} as {shapes[1]} cuts through a direct sum over {axis}={degree}",
            f"{' x '.join(map(dim_text, held))}: {error}\nonly whole minor dims can be cut off all its parts alike, or "
            "put behind it",
            operands=(0,),
            axis=axis,
        )
    digits = flatten(held)
    position = _cut_dim(digits, lengths, axis, call)
    what = f"a dim of {lengths[position]} cannot be split over {axis}={degree}"
    why = (
        f"the view cuts {global_size(digits, call.sizes)}, laid out as {dim_text(digits)}, into "
        f"{' x '.join(map(str, lengths))}: {degree} does not divide {lengths[position]}"
        if lengths[position] % degree
        else f"the view cuts {dim_text(digits)} into {' x '.join(map(str, lengths))}, and {axis} would lie across a cut"
    )
    return Refusal("SS301", what, why, operands=(0,), axis=axis)


def _cut_dim(digits: DimLayout, lengths: Sequence[int], axis: str, call: Call) -> int:
    """Which of the new dims the axis falls into: the one that holds its most major element."""
    left = 1
    for digit in digits:
        if digit == axis:
            break
        left *= extent(digit, call.sizes)
    for position, length in enumerate(lengths):
        if left < length:
            return position
        left //= length
    return len(lengths) - 1


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(call: Call) -> Typed:
    """A dim that is new, or was of size one, is uniform after."""
    kind, before, after = call.types[0], call.shape(0), call.out().shape
    new = len(after) - len(before)
    dims: list[DimLayout] = []
    same: set[int] = set()
    for index, length in enumerate(after):
        if index < new or before[index - new] != length:
            dims.append(canonical((length,)))
            same.add(index)
        else:
            dims.append(kind.layout.dims[index - new])
            if index - new in kind.uniform:
                same.add(index)
    return Typed((Type(Layout(tuple(dims), kind.layout.pending), frozenset(same)),), (kind, *call.types[1:]))


@rule(aten.repeat.default)
def repeat(call: Call) -> Typed:
    """Copies of a dim one after another: one more digit before its own; new dims and those of one are uniform."""
    kind, before, repeats = call.types[0], call.shape(0), [int(count) for count in call.named["repeats"]]
    new = len(repeats) - len(before)
    dims = [
        direct_sum([digits] * count) if is_sum(digits) else canonical((count, *digits))
        for count, digits in zip(repeats, ((),) * new + kind.layout.dims, strict=True)
    ]
    same = {i for i in range(len(dims)) if i < new or before[i - new] == 1 or i - new in kind.uniform}
    still = {i - new for i in same if i >= new and repeats[i] == 1}
    out = Type(Layout(tuple(dims), kind.layout.pending), frozenset(same))
    return Typed((out,), (Type(kind.layout, kind.uniform & still),), local={"repeats": ...})


def _moved(call: Call, order: Sequence[int]) -> Typed:
    names: list[Label] = list(range(len(order)))
    return unify(call, [names], [[order[index] for index in range(len(order))]], linear=COPY)


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(call: Call) -> Typed:
    """Two dims change places."""
    rank = len(call.shape(0))
    one, two = (dim_index(index, rank) for index in call.node.args[1:3])
    order = list(range(rank))
    if rank:
        order[one], order[two] = two, one
    return _moved(call, order)


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def t(call: Call) -> Typed:
    """The last two dims change places."""
    rank = len(call.shape(0))
    order = list(range(rank))
    if rank > 1:
        order[-2], order[-1] = order[-1], order[-2]
    return _moved(call, order)


@rule(aten.permute.default)
def permute(call: Call) -> Typed:
    """The dims in another order."""
    rank = len(call.shape(0))
    return _moved(call, [dim_index(index, rank) for index in call.node.args[1]])


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(call: Call) -> Typed:
    """Dims moved to given places."""
    order = torch.empty(tuple(range(2, 2 + len(call.shape(0)))), device="meta").movedim(*call.node.args[1:]).shape
    return _moved(call, [length - 2 for length in order])


def _suffix(dim: DimLayout) -> DimLayout:
    """The shortest suffix that holds all the axes."""
    first = next((index for index, digit in enumerate(dim) if isinstance(digit, str)), len(dim))
    return dim[first:]


def _part(call: Call, dim: int, start: int, length: int) -> tuple[DimLayout, int]:
    """The layout of rows [start, start + length) of a dim, and the local start."""
    digits = call.types[0].layout.dims[dim]
    whole = global_size(digits, call.sizes)
    if not dim_axes(digits):
        return canonical((length,)), start
    if start == 0 and length == whole:
        return digits, 0
    taken: list[DimLayout] = []
    position = local = 0
    first: int | None = None
    for part in parts_of(digits):
        suffix = _suffix(part)
        step = global_size(suffix, call.sizes)
        end = position + global_size(part, call.sizes)
        low, high = max(start, position) - position, min(start + length, end) - position
        if low < high and (low % step or high % step):
            break
        if low < high:
            taken.append(canonical(((high - low) // step, *suffix)))
            first = local + low // step * local_size(suffix) if first is None else first
        position, local = end, local + local_size(part)
    else:
        if first is not None:
            return direct_sum(taken), first
    axis = dim_axes(digits)[0]
    raise Refusal(
        "SS304",
        f"{call.node.op} takes {length} of {whole} from dim {dim}, which is split over {axis}",
        why=f"each rank holds {dim_text(digits)}: the rows asked for lie on some ranks only",
        operands=(0,),
        axis=axis,
    )


def with_dim(kind: Type, dim: int, digits: DimLayout | None) -> Type:
    """The type with another layout for one dim, or without the dim."""
    dims = list(kind.layout.dims)
    same = set(kind.uniform)
    if digits is None:
        del dims[dim]
        same = {index - (index > dim) for index in same if index != dim}
    else:
        dims[dim] = digits
    return Type(Layout(tuple(dims), kind.layout.pending), frozenset(same))


def read_whole(kind: Type, dim: int) -> Type:
    """The type with a dim that is no longer uniform."""
    return Type(kind.layout, kind.uniform - {dim})


@rule(aten.slice.Tensor, aten.narrow.default)
def slice_(call: Call) -> Typed:
    """Rows of one dim."""
    kind, shape = call.types[0], call.shape(0)
    named = call.named
    dim = dim_index(named.get("dim") or 0, len(shape))
    start = int(named.get("start") or 0)
    start = max(0, start + shape[dim]) if start < 0 else min(start, shape[dim])
    length, step = call.out().shape[dim], int(named.get("step") or 1)
    if step != 1 and dim_axes(kind.layout.dims[dim]):
        raise Refusal(
            "SS304",
            f"a slice with step {step} of a split dim",
            operands=(0,),
            axis=dim_axes(kind.layout.dims[dim])[0],
        )
    if step != 1:
        digits, local = canonical((length,)), start
    else:
        digits, local = _part(call, dim, start, length)
    kept = length == shape[dim]
    out = with_dim(kind, dim, digits)
    if not kept:
        out = read_whole(out, dim)
    # A negative start counts from the local end: it must name the same row there.
    expected = {"start": local, "end": ..., "length": local_size(digits)}
    return Typed((out,), (kind if kept else read_whole(kind, dim),), local=expected)


@rule(aten.select.int)
def select(call: Call) -> Typed:
    """One row of a dim, which must be whole."""
    kind = call.types[0]
    dim = dim_index(call.named["dim"], len(call.shape(0)))
    digits = kind.layout.dims[dim]
    if dim_axes(digits):
        raise Refusal(
            "SS304",
            f"select takes one row of dim {dim}, which is split over {dim_axes(digits)[0]}",
            why=f"each rank holds {dim_text(digits)}: the row lies on some ranks only",
            operands=(0,),
            axis=dim_axes(digits)[0],
        )
    return Typed((with_dim(kind, dim, None),), (read_whole(kind, dim),))


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
)
def split_(call: Call) -> Typed:
    """A dim cut into consecutive parts."""
    kind = call.types[0]
    dim = dim_index(call.named.get("dim") or 0, len(call.shape(0)))
    outputs: list[Type] = []
    start = 0
    for index in range(len(call.node.outputs)):
        length = call.out(index).shape[dim]
        digits, _ = _part(call, dim, start, length)
        outputs.append(read_whole(with_dim(kind, dim, digits), dim))
        start += length
    return Typed(tuple(outputs), (read_whole(kind, dim),), local={"split_size": ..., "split_sizes": ...})


@rule(aten.unbind.int)
def unbind(call: Call) -> Typed:
    """Each row of a dim, which must be whole."""
    dim = dim_index(call.named.get("dim") or 0, len(call.shape(0)))
    one = select_all(call, dim)
    return Typed((one,) * len(call.node.outputs), (read_whole(call.types[0], dim),))


def select_all(call: Call, dim: int) -> Type:
    """The type of a row of a whole dim."""
    digits = call.types[0].layout.dims[dim]
    if dim_axes(digits):
        raise Refusal(
            "SS304",
            f"unbind of dim {dim}, which is split over {dim_axes(digits)[0]}",
            operands=(0,),
            axis=dim_axes(digits)[0],
        )
    return with_dim(call.types[0], dim, None)


@rule(aten.view_as_complex.default)
def as_complex(call: Call) -> Typed:
    """[..., 2] -> [...]; of complex numbers there is no maximum."""
    lead: list[Label] = list(range(len(call.out().shape)))
    return unify(call, [[*lead, "pair"]], [lead], linear=PRODUCT, whole=["pair"])


@rule(aten.view_as_real.default)
def as_real(call: Call) -> Typed:
    """[...] -> [..., 2]."""
    lead: list[Label] = list(range(len(call.shape(0))))
    return unify(call, [lead], [[*lead, "pair"]], linear=COPY, out_sizes={"pair": 2})


@rule(aten.roll.default, aten.flip.default)
def reorder(call: Call) -> Typed:
    """Rows of the named dims in another order; those dims must be whole."""
    rank = len(call.shape(0))
    named = call.named.get("dims")
    dims = range(rank) if not named else [dim_index(dim, rank) for dim in named]
    names: list[Label] = list(range(rank))
    return unify(call, [names], [names], linear=COPY, whole=list(dims))


@rule(aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default)
def triangle(call: Call) -> Typed:
    """Zeroes one triangle of the last two dims, which must be whole."""
    rank = len(call.shape(0))
    names: list[Label] = list(range(rank))
    return unify(call, [names], [names], linear=COPY, whole=[rank - 2, rank - 1])


@rule(aten.diagonal.default)
def diagonal(call: Call) -> Typed:
    """The diagonal of two whole dims, as a new last dim."""
    rank = len(call.shape(0))
    dims = [dim_index(call.named[name], rank) for name in ("dim1", "dim2")]
    names: list[Label] = list(range(rank))
    out: list[Label] = [*(index for index in range(rank) if index not in dims), "diagonal"]
    return unify(call, [names], [out], linear=COPY, whole=dims, out_sizes={"diagonal": call.out().shape[-1]})
