"""From one layout to another at a declared point: the collectives that do it, and their adjoints."""

from collections.abc import Iterator, Sequence

from attrs import evolve, frozen

from shardspec.layout import AVG, SUM, Digit, DimLayout, Layout, Sizes, canonical


@frozen
class Move:
    """One step of a transition, on a rank's local tensor.

    `all_gather`, `slice`, `reduce_scatter` and `all_to_all` see dim `dim` of the local tensor as
    (outer, the axis, inner). `all_to_all` gathers `dim` and splits `to_dim` at `to_outer`.
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


def _outer(dim: DimLayout, axis: str) -> int:
    outer = 1
    for digit in dim:
        if digit == axis:
            return outer
        if isinstance(digit, int):
            outer *= digit
    raise AssertionError(f"{axis} is not in {dim}")


def _gathered(dim: DimLayout, axis: str, size: int) -> DimLayout:
    return canonical(size if digit == axis else digit for digit in dim)


def _sliced(dim: DimLayout, axis: str, outer: int, size: int) -> DimLayout | None:
    """Put an axis digit where the local extents before it multiply to `outer`; None where it does not fit."""
    done = 1
    out: list[Digit] = []
    rest = list(dim)
    while rest:
        digit = rest.pop(0)
        if isinstance(digit, str):
            out.append(digit)
            continue
        if done == outer:
            return canonical([*out, axis, digit // size, *rest]) if digit % size == 0 else None
        need = outer // done
        if outer % done or (digit % need and need % digit):
            return None
        if digit % need == 0 and digit != need:
            if (digit // need) % size:
                return None
            return canonical([*out, need, axis, digit // need // size, *rest])
        out.append(digit)
        done *= digit
    return None


def transition(before: Layout, after: Layout, sizes: Sizes) -> tuple[Move, ...]:
    """The moves that turn `before` into `after`.

    Raises:
        NoTransition: the declared layout is pending where the value is not, or in another way.
    """
    for axis, kind in after.pending:
        if before.pending_kind(axis) != kind:
            raise NoTransition(f"the rule leaves the value pending over {axis}, and it is {before.describe(axis)}")
    moves: list[Move] = []
    now = before
    for step in _plan(before, after, sizes):
        moves.append(evolve(step, shape=now.shape))
        now = apply(now, step, sizes)
    assert now == after, f"transition ends in {now}, not in {after}"
    return tuple(moves)


def apply(layout: Layout, move: Move, sizes: Sizes) -> Layout:
    """The layout after a move."""
    dims = list(layout.dims)
    pending = tuple(
        item for item in layout.pending if item[0] != move.axis or move.kind not in ("all_reduce", "reduce_scatter")
    )
    size = sizes[move.axis]
    if move.kind in ("all_gather", "all_to_all"):
        dims[move.dim] = _gathered(dims[move.dim], move.axis, size)
    if move.kind in ("slice", "reduce_scatter", "all_to_all"):
        target, outer = (move.to_dim, move.to_outer) if move.kind == "all_to_all" else (move.dim, move.outer)
        cut = _sliced(dims[target], move.axis, outer, size)
        assert cut is not None, f"{move.axis} does not fit {dims[target]} at {outer}"
        dims[target] = cut
    return Layout(tuple(dims), pending)


def _plan(before: Layout, after: Layout, sizes: Sizes) -> Iterator[Move]:
    """Reduce first, then exchange and gather what must go, then slice, major to minor."""
    now = before
    target = after.sharded
    drop = _misplaced(before, after)
    # An axis that goes from pending to a dim: the sum and the slice are one reduce-scatter, once nothing that
    # must go lies on that dim.
    slices = [
        (axis, dim)
        for dim in range(len(after.dims))
        for axis in after.dims[dim]
        if isinstance(axis, str) and (axis not in before.sharded or axis in drop)
    ]
    for axis, kind in before.pending:
        if after.pending_kind(axis) is None and axis not in target:
            move = Move("all_reduce", axis, reduce=kind)
            now = apply(now, move, sizes)
            yield move
    for axis in sorted(drop, key=lambda axis: now.sharded[axis]):
        dim = now.sharded[axis]
        gather = Move("all_gather", axis, dim, _outer(now.dims[dim], axis))
        if axis in target and target[axis] != dim and not any(other in drop for other in now.dims[target[axis]]):
            swap = evolve(
                gather,
                kind="all_to_all",
                to_dim=target[axis],
                to_outer=_outer(after.dims[target[axis]], axis),
            )
            cut = _sliced(now.dims[swap.to_dim], axis, swap.to_outer, sizes[axis])
            if cut is not None and _in_order(cut, after.dims[swap.to_dim]):
                now = apply(now, swap, sizes)
                slices.remove((axis, swap.to_dim))
                yield swap
                continue
        now = apply(now, gather, sizes)
        yield gather
    for axis, dim in slices:
        kind = before.pending_kind(axis)
        outer = _outer(after.dims[dim], axis)
        if kind in (SUM, AVG):
            move = Move("reduce_scatter", axis, dim, outer, reduce=kind)
        elif kind:
            reduce = Move("all_reduce", axis, reduce=kind)
            now = apply(now, reduce, sizes)
            yield reduce
            move = Move("slice", axis, dim, outer)
        else:
            move = Move("slice", axis, dim, outer)
        now = apply(now, move, sizes)
        yield move


def _in_order(dim: DimLayout, final: DimLayout) -> bool:
    """Whether the axes of `dim` stand in the order that they have in `final`."""
    axes = [digit for digit in dim if isinstance(digit, str)]
    wanted = [digit for digit in final if digit in axes]
    return axes == wanted


def _misplaced(before: Layout, after: Layout) -> list[str]:
    """The axes that must be gathered: those that go, and those that stand after one that comes."""
    target = after.sharded
    drop = [axis for axis, dim in before.sharded.items() if target.get(axis) != dim]
    for old, new in zip(before.dims, after.dims, strict=True):
        kept = [digit for digit in old if isinstance(digit, str) and digit not in drop]
        wanted = [digit for digit in new if isinstance(digit, str)]
        while kept and (kept != wanted[: len(kept)] or not _same_place(kept[-1], old, new)):
            drop.append(kept.pop())
    return drop


def _same_place(axis: str, old: DimLayout, new: DimLayout) -> bool:
    """Whether the extents and axes before an axis multiply to the same stride position in both."""
    return _outer(old, axis) == _outer(new, axis)


def adjoint(
    moves: Sequence[Move], owed: set[str], sizes: Sizes, shape: tuple[int, ...]
) -> tuple[tuple[Move, ...], set[str]]:
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
            back.append(Move(kind, axis, move.dim, move.outer, shape=after))
        elif move.kind == "slice":
            back.append(Move("all_gather", axis, move.dim, move.outer, shape=after))
        elif move.kind == "reduce_scatter":
            back.append(Move("all_gather", axis, move.dim, move.outer, shape=after))
            if move.reduce == AVG:
                back.append(Move("scale", axis, shape=move.shape))
        elif move.kind == "all_to_all":
            back.append(Move("all_to_all", axis, move.to_dim, move.to_outer, move.dim, move.outer, shape=after))
        elif move.kind == "all_reduce":
            if axis in owed:
                back.append(Move("all_reduce", axis, shape=after))
            if move.reduce == AVG:
                back.append(Move("scale", axis, shape=move.shape))
        owed.discard(axis)
        after = move.shape
    return tuple(back), owed
