"""Bytes on a rank as sums of monomials in the sizes of the mesh's axes, so that one walk holds for all sizes."""

import functools
from collections.abc import Iterable, Mapping, Sequence

from attrs import frozen

from shardspec.layout import Layout, Sizes, dim_axes, global_size
from shardspec.mesh import AXES


@frozen(cache_hash=True)
class Term:
    """What a number of bytes over all ranks is multiplied with, to give those of one.

    1 / product of `over`; with `rows`, times ceil(rows / product of `rows_over` / product of `storage`), which a
    gathered and padded tensor has product of `storage` times.
    """

    over: tuple[str, ...] = ()
    rows: int = 0
    rows_over: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()
    padded: bool = False
    times: tuple[str, ...] = ()
    """Axes whose sizes multiply: the parts that a collective has of every rank."""
    most: int = 0
    """Bytes that it never exceeds, where it is not 0: what is worked on in chunks."""

    def of(self, number: int, sizes: Sizes) -> int:
        """`number` times the term, at given sizes of the axes."""
        number = number * _product(self.times, sizes) // _product(self.over, sizes)
        if not self.rows:
            return min(number, self.most) if self.most else number
        share = _product(self.storage, sizes)
        rows = -(-(self.rows // _product(self.rows_over, sizes)) // share)
        return number * rows * (share if self.padded else 1)


def _product(axes: Iterable[str], sizes: Sizes) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product


Key = tuple[str, Term]
"""What bytes are for, and their term."""

Amount = Mapping[Key, int]
"""Bytes on a rank by what they are for; a difference of two may hold negative numbers."""

NOTHING: Amount = {}


def plus(*amounts: Amount) -> Amount:
    """The sum of amounts."""
    total: dict[Key, int] = {}
    for amount in amounts:
        for key, number in amount.items():
            total[key] = total.get(key, 0) + number
    return total


def minus(one: Amount, other: Amount) -> Amount:
    """The difference of two amounts, without what cancels."""
    rest = dict(one)
    for key, number in other.items():
        rest[key] = rest.get(key, 0) - number
    return {key: number for key, number in rest.items() if number}


def times(amount: Amount, count: int) -> Amount:
    """An amount several times."""
    return {key: number * count for key, number in amount.items()}


def as_kind(kind: str, amount: Amount) -> Amount:
    """The same bytes, for something else."""
    total: dict[Key, int] = {}
    for (_, term), number in amount.items():
        total[kind, term] = total.get((kind, term), 0) + number
    return total


def fixed(kind: str, number: int) -> Amount:
    """Bytes that are the same whatever the sizes of the axes."""
    return {(kind, Term()): number} if number else NOTHING


def part(
    kind: str,
    layout: Layout,
    itemsize: int,
    sizes: Sizes,
    times: Iterable[str] = (),
    over: Iterable[str] = (),
    most: int = 0,
) -> Amount:
    """A rank's part of a tensor of that layout: `times` axes as often, `over` axes less, and at most `most` bytes."""
    number, split = _whole(layout, tuple(sizes.items()))
    over, times = {*split, *over}, set(times)
    under = tuple(axis for axis in AXES if axis in over - times)
    term = Term(under, times=tuple(axis for axis in AXES if axis in times - over), most=most)
    return {(kind, term): number * itemsize} if number else NOTHING


@functools.lru_cache(maxsize=4096)
def _whole(layout: Layout, sizes: tuple[tuple[str, int], ...]) -> tuple[int, tuple[str, ...]]:
    """The elements of the whole tensor, and the axes that divide them."""
    number = 1
    for length in layout.global_shape(dict(sizes)):
        number *= length
    return number, tuple(axis for axis in AXES if axis in layout.sharded)


def stored(
    kind: str, layout: Layout, dim: int, storage: tuple[str, ...], itemsize: int, sizes: Sizes, *, padded: bool = False
) -> Amount:
    """The rows of a parameter that the first rank stores; with `padded`, all of them as they are gathered.

    Args:
        layout: the parameter's as compute reads it.
        dim: the dim that `storage` divides, rounded up.
    """
    if not storage:
        return part(kind, layout, itemsize, sizes)
    rest = Layout((*layout.dims[:dim], *layout.dims[dim + 1 :]))
    number, over = _whole(rest, tuple(sizes.items()))
    rows = layout.dims[dim]
    term = Term(over, global_size(rows, sizes), tuple(a for a in AXES if a in dim_axes(rows)), storage, padded)
    return {(kind, term): number * itemsize} if number else NOTHING


def evaluate(amount: Amount, sizes: Sizes) -> dict[str, int]:
    """Kind -> bytes at given sizes of the axes."""
    found: dict[str, int] = {}
    for (kind, term), number in amount.items():
        found[kind] = found.get(kind, 0) + term.of(number, sizes)
    return found


def fullest(amounts: Iterable[Amount], meshes: Sequence[Sizes]) -> tuple[Amount, ...]:
    """The amounts that are the largest in total on one of some meshes; of equal ones the first."""
    amounts = tuple(amounts)
    if not meshes or len(amounts) < 2:
        return amounts
    best: dict[int, None] = {}
    totals = [total_of(amount) for amount in amounts]
    for sizes in meshes:
        known = {item: item[0].of(item[1], sizes) for item in {item for total in totals for item in total.items()}}
        found = [sum(known[item] for item in total.items()) for total in totals]
        best[found.index(max(found))] = None
    return tuple(amounts[index] for index in sorted(best))


def total_of(amount: Amount) -> dict[Term, int]:
    """An amount's numbers by term, whatever they are for."""
    total: dict[Term, int] = {}
    for (_, term), number in amount.items():
        total[term] = total.get(term, 0) + number
    return total


@frozen
class Row:
    """Bytes of one kind on a rank: `number` times `term`."""

    kind: str
    term: Term
    number: int


@frozen(kw_only=True)
class Usage:
    """What a plan's step holds on a rank, before an optimizer's state: what lies there always, and what is held
    besides at each moment that could be the fullest."""

    resident: tuple[Row, ...] = ()
    moments: tuple[tuple[str, tuple[Row, ...]], ...] = ()
    """("forward", "backward" or "update", what is held then)."""
    kinds: tuple[tuple[str, tuple[tuple[Row, ...], ...]], ...] = ()
    """Kind -> the amounts of it of which one is the most, at whatever moment."""


@frozen(kw_only=True)
class PipelineUsage:
    """What a pipeline's step holds."""

    ranks: tuple[Usage, ...]
    """By place on pp."""
    stages: tuple[Usage, ...] = ()
    """By stage, where a rank runs several: what it holds for that one alone."""

    def of(self, stage: int | None) -> tuple[Usage, ...]:
        """Those of all ranks, or that of a stage."""
        return self.ranks if stage is None else ((self.stages or self.ranks)[stage],)

    def most(self, kind: str, sizes: Sizes) -> tuple[int, ...]:
        """By place on pp, the most bytes of a kind that a rank holds at a time, at given sizes of the axes."""
        return tuple(
            max((sum(evaluate(amount_of(rows), sizes).values()) for rows in dict(used.kinds)[kind]), default=0)
            for used in self.ranks
        )


def rows_of(amount: Amount) -> tuple[Row, ...]:
    """An amount as rows: equal amounts give equal rows."""
    found = (Row(kind, term, number) for (kind, term), number in amount.items() if number)
    return tuple(sorted(found, key=lambda row: (row.kind, str(row.term))))


def amount_of(rows: Iterable[Row]) -> Amount:
    """What `rows_of` was given."""
    return {(row.kind, row.term): row.number for row in rows}
