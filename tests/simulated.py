"""Layouts by index arithmetic of their own: what each simulated rank holds, and hypothesis strategies for layouts."""

import itertools
from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
from hypothesis import strategies as st

from shardspec.layout import Layout

Coordinate = tuple[tuple[str, int], ...]
"""Axis -> index, as sorted pairs."""

Ranks = dict[Coordinate, np.ndarray]


SCALE = 12**4
"""Multiples of this stay whole numbers, and so exact, under the means over any mesh of up to 24 ranks, twice."""


def coordinates(sizes: Mapping[str, int]) -> Iterator[Coordinate]:
    """Every rank of a mesh."""
    for index in itertools.product(*(range(size) for size in sizes.values())):
        yield tuple(zip(sizes, index, strict=True))


def positions(dim: tuple, place: Mapping[str, int], sizes: Mapping[str, int]) -> list[int]:
    """The global indices that a rank holds of a dim: mixed radix, its own digit at each axis."""
    found = [0]
    for digit in dim:
        choices = [place[digit]] if isinstance(digit, str) else range(digit)
        base = sizes[digit] if isinstance(digit, str) else digit
        found = [index * base + choice for index in found for choice in choices]
    return found


def part(whole: np.ndarray, layout: Layout, place: Mapping[str, int], sizes: Mapping[str, int]) -> np.ndarray:
    """A rank's part of a complete value."""
    return whole[np.ix_(*(positions(dim, place, sizes) for dim in layout.dims))]


def shares(whole: np.ndarray, axes: tuple, sizes: Mapping[str, int], rng: np.random.Generator) -> Ranks:
    """Random shares of a value for every index along the pending axes; multiples of SCALE stay whole."""
    if not axes:
        return {(): whole}
    (axis, kind), *rest = axes
    n = sizes[axis]
    if kind in ("sum", "avg"):
        pieces = [SCALE * rng.integers(-9, 9, whole.shape).astype(whole.dtype) for _ in range(n - 1)]
        pieces.append(whole * (1 if kind == "sum" else n) - sum(pieces))
    else:
        lower = -1 if kind == "max" else 1
        pieces = [whole + lower * rng.integers(0, 9, whole.shape) for _ in range(n)]
        holder = rng.integers(0, n, whole.shape)
        pieces = [np.where(holder == index, whole, piece) for index, piece in enumerate(pieces)]
    return {
        ((axis, index), *key): value
        for index, piece in enumerate(pieces)
        for key, value in shares(piece, tuple(rest), sizes, rng).items()
    }


def scatter(whole: np.ndarray, layout: Layout, sizes: Mapping[str, int], seed: int = 0) -> Ranks:
    """What every rank holds of a global value under a layout; pending ones as random shares."""
    held = shares(whole, layout.pending, sizes, np.random.default_rng(seed))
    ranks: Ranks = {}
    for place in coordinates(sizes):
        index = dict(place)
        share = held[tuple((axis, index[axis]) for axis, _ in layout.pending)]
        ranks[place] = part(share, layout, index, sizes)
    return ranks


def group(place: Coordinate, axis: str, sizes: Mapping[str, int]) -> list[Coordinate]:
    """The ranks that differ from `place` along one axis only, in order."""
    return [tuple((name, n if name == axis else at) for name, at in place) for n in range(sizes[axis])]


def reduced(ranks: Ranks, layout: Layout, sizes: Mapping[str, int]) -> Ranks:
    """The values with every pending axis reduced, as each rank would then see them."""
    work = {"sum": sum, "avg": lambda pieces: sum(pieces) / len(pieces)}
    for axis, kind in layout.pending:
        reduce = work.get(kind) or (lambda pieces, kind=kind: getattr(np, kind)(np.stack(pieces), axis=0))
        ranks = {place: reduce([ranks[other] for other in group(place, axis, sizes)]) for place in ranks}
    return ranks


def holds(ranks: Ranks, whole: np.ndarray, layout: Layout, sizes: Mapping[str, int]) -> bool:
    """Whether the ranks hold exactly the parts of a value."""
    complete = reduced(ranks, layout, sizes)
    return all(
        np.array_equal(complete[place], part(whole, layout, dict(place), sizes)) for place in coordinates(sizes)
    )


# Strategies


def merge(digits: list) -> tuple:
    """Adjacent integers merged: the canonical form."""
    merged: list = []
    for digit in digits:
        if isinstance(digit, int) and merged and isinstance(merged[-1], int):
            merged[-1] *= digit
        elif digit != 1:
            merged.append(digit)
    return tuple(merged)


@st.composite
def meshes(draw, most: int = 24) -> dict[str, int]:
    """Axis -> size, each at least two, in mesh order."""
    names = draw(st.lists(st.sampled_from(["dp", "fsdp", "cp", "tp"]), min_size=1, max_size=4, unique=True))
    sizes: dict[str, int] = {}
    for name in sorted(names, key=["dp", "fsdp", "cp", "tp"].index):
        size = draw(st.sampled_from([2, 3, 4]))
        if prod(sizes.values()) * size <= most:
            sizes[name] = size
    return sizes or {"tp": 2}


PRIMES = st.lists(st.sampled_from([2, 2, 3]), max_size=4)


@st.composite
def cut(draw, primes: list[int], free: list[str], sizes: Mapping[str, int]) -> tuple:
    """One dim of the length that the primes make, axes from `free` put where a factor has their size.

    Axes that are used are taken out of `free`.
    """
    digits: list = list(draw(st.permutations(primes)))
    for axis in list(draw(st.permutations(free))):
        n = sizes[axis]
        spots = [(i, 1) for i, digit in enumerate(digits) if digit == n]
        if n == 4:
            spots += [(i, 2) for i in range(len(digits) - 1) if digits[i] == digits[i + 1] == 2]
        if spots and draw(st.booleans()):
            at, length = draw(st.sampled_from(spots))
            digits[at : at + length] = [axis]
            free.remove(axis)
    return merge(digits)


@st.composite
def layouts(draw, dims: list[list[int]], sizes: Mapping[str, int], kinds=("sum", "avg"), may_pend=None) -> Layout:
    """A layout of a tensor whose dims' prime factors are given.

    `may_pend` maps an axis to its kind where only those may be pending.
    """
    free = list(sizes)
    order = draw(st.permutations(range(len(dims))))
    found: dict[int, tuple] = {}
    for dim in order:
        found[dim] = draw(cut(dims[dim], free, sizes))
    pending = []
    for axis in free:
        if may_pend is not None:
            if axis in may_pend and draw(st.booleans()):
                pending.append((axis, may_pend[axis]))
        elif draw(st.integers(0, 2)) == 0:
            pending.append((axis, draw(st.sampled_from(kinds))))
    return Layout(tuple(found[dim] for dim in range(len(dims))), tuple(sorted(pending)))


@st.composite
def laid_out(draw, kinds=("sum", "avg"), most: int = 24) -> tuple[dict[str, int], list[list[int]], Layout]:
    """A mesh, the prime factors of a tensor's dims, and a layout of it."""
    sizes = draw(meshes(most))
    dims = draw(st.lists(PRIMES, max_size=3))
    return sizes, dims, draw(layouts(dims, sizes, kinds))
