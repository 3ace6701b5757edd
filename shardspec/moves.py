"""From one layout to another at a declared point: the collectives that do it, and their adjoints."""

from collections.abc import Collection, Iterator, Sequence

from attrs import evolve, frozen

from shardspec.layout import (
    AVG,
    SUM,
    DimLayout,
    Layout,
    Sizes,
    canonical,
    dim_axes,
    extent,
    gathered,
    global_size,
    is_sum,
    local_size,
    parts_of,
)


@frozen
class Move:
    """One step of a transition, on a rank's local tensor.

    `all_gather`, `slice`, `reduce_scatter` and `all_to_all` see dim `dim` of the local tensor as
    (outer, the axis, inner). `all_to_all` gathers `dim` and splits `to_dim` at `to_outer`. Of a direct sum they see
    runs one after another, each (the axis, inner): `runs` holds the length of each on a rank, and `outer` says nothing.
    With `halves` the axis lies head and tail (`shardspec.sequence`): inner is two chunks, which lie apart in the whole.
    """

    kind: str
    """"all_gather", "slice", "reduce_scatter", "all_reduce", "all_to_all" or "scale"."""
    axis: str
    dim: int = 0
    outer: int = 1
    to_dim: int = 0
    to_outer: int = 1
    reduce: str = SUM
    shape: tuple[int, ...] = ()
    """The local shape before the move."""
    runs: tuple[int, ...] = ()
    """Of `dim`, where they are not alike."""
    to_runs: tuple[int, ...] = ()
    halves: bool = False
    to_halves: bool = False
    """The same of `to_dim`."""

    @property
    def is_collective(self) -> bool:
        return self.kind not in ("slice", "scale")

    def elements(self, sizes: Sizes) -> int:
        """The length of the message: of the whole for a gather or a scatter, of the tensor otherwise."""
        count = 1
        for length in self.shape:
            count *= length
        return count * sizes[self.axis] if self.kind == "all_gather" else count


class NoTransition(ValueError):
    """There is no way from the one layout to the other."""


def transition(before: Layout, after: Layout, sizes: Sizes, balanced: Collection[str] = ()) -> tuple[Move, ...]:
    """The moves that turn `before` into `after`: first those that shrink the tensor, then those that grow it.

    An axis that splits a dim at the same stride in both stays where it is. Each other one is in one move, or is
    gathered and later sliced where no exchange does.

    Args:
        balanced: the axes that lie head and tail; one moves while no other axis divides what it leaves to a rank.

    Raises:
        NoTransition: the declared layout is pending where the value is not, or in another way; or a balanced axis
            would have to move within another.
    """
    for axis, kind in after.pending:
        if before.pending_kind(axis) != kind:
            raise NoTransition(f"the rule leaves the value pending over {axis}, and it is {before.describe(axis)}")
    moves: list[Move] = []
    now = before
    while now != after:
        steps = _steps(now, after, sizes)
        found = next((step for step in steps if step[0].axis not in balanced or _in_halves(*step, now, sizes)), None)
        if found is None:
            assert balanced, f"no move leads from {now} to {after}"
            held = ", ".join(axis for axis in balanced if axis in now.sharded or axis in after.sharded)
            raise NoTransition(f"{held} lies head and tail, and would have to move within another axis")
        move, then = found
        laid = move.axis in balanced
        moves.append(evolve(move, shape=now.shape, halves=laid, to_halves=laid and move.kind == "all_to_all"))
        now = then
    return tuple(moves)


def _in_halves(move: Move, then: Layout, now: Layout, sizes: Sizes) -> bool:
    """Whether a move sees its axis with two chunks behind it, and nothing but numbers."""
    joined = [now.dims[move.dim]] if move.kind in ("all_gather", "all_to_all") else []
    cut = {"slice": move.dim, "reduce_scatter": move.dim, "all_to_all": move.to_dim}.get(move.kind)
    dims = [*joined, *([then.dims[cut]] if cut is not None else [])]
    return all(even_behind(dim, move.axis, sizes) and dim_axes(dim)[-1] == move.axis for dim in dims)


def even_behind(dim: DimLayout, axis: str, sizes: Sizes) -> bool:
    """Whether what an axis leaves of a dim is two chunks; of a direct sum it is not."""
    return not is_sum(dim) and global_size(dim[dim.index(axis) + 1 :], sizes) % 2 == 0


def _steps(now: Layout, after: Layout, sizes: Sizes) -> Iterator[tuple[Move, Layout]]:
    """Moves that lead nearer to `after`, each with the layout behind it, the cheapest first."""
    target = after.sharded
    going = [axis for axis in now.sharded if _weight(now, axis, sizes) != _weight(after, axis, sizes)]
    coming = [axis for axis in target if axis not in now.sharded]
    for axis in coming:
        if not now.pending_kind(axis) and (cut := _cut(now, after, axis, sizes)):
            dim = target[axis]
            yield Move("slice", axis, dim, _outer(cut, axis), runs=_runs(cut, axis)), _with_dims(now, {dim: cut})
    for axis in coming:
        kind = now.pending_kind(axis)
        if kind in (SUM, AVG) and (cut := _cut(now, after, axis, sizes)):
            dim = target[axis]
            move = Move("reduce_scatter", axis, dim, _outer(cut, axis), reduce=kind, runs=_runs(cut, axis))
            yield move, _with_dims(_reduced(now, axis), {dim: cut})
    for axis, kind in now.pending:
        if not after.pending_kind(axis) and (axis not in target or kind not in (SUM, AVG)):
            yield Move("all_reduce", axis, reduce=kind), _reduced(now, axis)
    for axis in going:
        dim = now.sharded[axis]
        if target.get(axis, dim) != dim and (cut := _cut(now, after, axis, sizes)):
            to, old = target[axis], now.dims[dim]
            runs, to_runs = _runs(old, axis), _runs(cut, axis)
            move = Move("all_to_all", axis, dim, _outer(old, axis), to, _outer(cut, axis), runs=runs, to_runs=to_runs)
            yield move, _with_dims(now, {dim: gathered(old, axis, sizes), to: cut})
    for axis in sorted(going, key=lambda axis: axis in target):
        dim = now.sharded[axis]
        old = now.dims[dim]
        move = Move("all_gather", axis, dim, _outer(old, axis), runs=_runs(old, axis))
        yield move, _with_dims(now, {dim: gathered(old, axis, sizes)})


def _outer(dim: DimLayout, axis: str) -> int:
    """The product of the local extents before an axis."""
    return 1 if is_sum(dim) else local_size(dim[: dim.index(axis)])


def _runs(dim: DimLayout, axis: str) -> tuple[int, ...]:
    """The local lengths of the runs of a direct sum that an axis divides; of another dim, nothing."""
    if not is_sum(dim):
        return ()
    return tuple(
        local_size(part[part.index(axis) + 1 :])
        for part in parts_of(dim)
        for _ in range(local_size(part[: part.index(axis)]))
    )


def _weight(layout: Layout, axis: str, sizes: Sizes) -> tuple[int, int | DimLayout] | None:
    """The dim that an axis splits, and how many of its indices lie between two neighbours along the axis; of a direct
    sum, how the axis alone splits it."""
    where = layout.sharded.get(axis)
    if where is None:
        return None
    dim = layout.dims[where]
    if is_sum(dim):
        dim = _restricted(dim, (axis,), sizes)
    if is_sum(dim):
        return where, dim
    return where, global_size(dim[dim.index(axis) + 1 :], sizes)


def _restricted(dim: DimLayout, kept: Sequence[str], sizes: Sizes) -> DimLayout:
    """The dim with every axis but some gathered."""
    for axis in dim_axes(dim):
        if axis not in kept:
            dim = gathered(dim, axis, sizes)
    return dim


def _cut(now: Layout, after: Layout, axis: str, sizes: Sizes) -> DimLayout | None:
    """A dim with an axis at the stride that it has in `after`; None where another axis stands there still."""
    where = after.sharded[axis]
    dim, wanted = now.dims[where], after.dims[where]
    if is_sum(dim) or is_sum(wanted):
        cut = _restricted(wanted, (*dim_axes(dim), axis), sizes)
        return cut if gathered(cut, axis, sizes) == dim else None
    weight, behind = global_size(wanted[wanted.index(axis) + 1 :], sizes), 1
    for index in reversed(range(len(dim))):
        digit = dim[index]
        if behind * extent(digit, sizes) > weight:
            if not isinstance(digit, int) or weight % behind:
                return None
            inner = weight // behind
            outer, rest = divmod(digit, inner * sizes[axis])
            return None if rest else canonical([*dim[:index], outer, axis, inner, *dim[index + 1 :]])
        behind *= extent(digit, sizes)
    return None


def _with_dims(layout: Layout, dims: dict[int, DimLayout]) -> Layout:
    return Layout(tuple(dims.get(index, dim) for index, dim in enumerate(layout.dims)), layout.pending)


def _reduced(layout: Layout, axis: str) -> Layout:
    return Layout(layout.dims, tuple(item for item in layout.pending if item[0] != axis))


def adjoint(moves: Sequence[Move], owed: set[str], shape: tuple[int, ...]) -> tuple[tuple[Move, ...], set[str]]:
    """The moves of the backward, and the axes over which the input's cotangent is owed.

    Args:
        moves: the forward's.
        owed: axes over which the output's cotangent is a pending sum.
        shape: the local shape behind the last move.
    """
    back: list[Move] = []
    owed = set(owed)
    after = shape
    for move in reversed(moves):
        axis = move.axis
        if move.kind == "all_gather":
            kind = "reduce_scatter" if axis in owed else "slice"
            back.append(evolve(move, kind=kind, shape=after))
        elif move.kind == "slice":
            back.append(evolve(move, kind="all_gather", reduce=SUM, shape=after))
        elif move.kind == "reduce_scatter":
            back.append(evolve(move, kind="all_gather", reduce=SUM, shape=after))
            if move.reduce == AVG:
                back.append(Move("scale", axis, shape=move.shape))
        elif move.kind == "all_to_all":
            swapped = evolve(move, dim=move.to_dim, outer=move.to_outer, runs=move.to_runs, halves=move.to_halves)
            back.append(
                evolve(
                    swapped,
                    to_dim=move.dim,
                    to_outer=move.outer,
                    to_runs=move.runs,
                    to_halves=move.halves,
                    shape=after,
                )
            )
        elif move.kind == "all_reduce":
            if axis in owed:
                back.append(Move("all_reduce", axis, shape=after))
            if move.reduce == AVG:
                back.append(Move("scale", axis, shape=move.shape))
        owed.discard(axis)
        after = move.shape
    return tuple(back), owed
