"""Random meshes, and layouts of tensors whose dims are products of small primes.

Each takes a `random.Random`: a seeded one is fast, and hypothesis' own (`st.randoms`) shrinks.
"""

from collections.abc import Mapping, Sequence
from math import prod
from random import Random

from shardspec.layout import DimLayout, Layout, Sum

NAMES = ("dp", "fsdp", "cp", "tp")


def a_mesh(rng: Random, most: int = 24) -> dict[str, int]:
    """Axis -> size, each at least two, in mesh order, of at most so many ranks."""
    sizes: dict[str, int] = {}
    chosen = rng.sample(NAMES, rng.randint(1, len(NAMES)))
    for name in NAMES:
        size = rng.choice((2, 2, 3, 4))
        if name in chosen and prod(sizes.values()) * size <= most:
            sizes[name] = size
    return sizes or {"tp": 2}


def primes(rng: Random, most: int = 4, least: int = 0) -> list[int]:
    """The prime factors of a dim's length."""
    return [rng.choice((2, 2, 3)) for _ in range(rng.randint(least, most))]


def a_dim(rng: Random, factors: Sequence[int], free: list[str], sizes: Mapping[str, int], eager: float) -> DimLayout:
    """A dim of the length that the factors make, axes from `free` put where a factor has their size.

    Axes that are used are taken out of `free`; `eager` is the chance that one that fits is.
    """
    digits: list = rng.sample(list(factors), len(factors))
    for axis in rng.sample(free, len(free)):
        size = sizes[axis]
        spots = [(at, 1) for at, digit in enumerate(digits) if digit == size]
        if size == 4:
            spots += [(at, 2) for at in range(len(digits) - 1) if digits[at] == digits[at + 1] == 2]
        if spots and rng.random() < eager:
            at, length = rng.choice(spots)
            digits[at : at + length] = [axis]
            free.remove(axis)
    return merge(digits)


def a_sum(rng: Random, factors: Sequence[int], free: list[str], sizes: Mapping[str, int]) -> DimLayout:
    """A dim of the length that the factors make, as a direct sum over axes from `free`; or one that is split alike.

    It is drawn as blocks of the axes' rows, cut into parts: the first axes lie in front of each part, and each part
    has its share of the rows behind them.
    """
    fits = [axis for axis in rng.sample(free, len(free)) if prod(factors) % sizes[axis] == 0]
    axes = fits[: rng.choice((1, 1, 2))]
    while prod(factors) % prod(sizes[axis] for axis in axes):
        axes = axes[:-1]
    rows = prod(factors) // prod(sizes[axis] for axis in axes)
    if not axes or rows < 2:
        return a_dim(rng, factors, free, sizes, eager=0.5)
    for axis in axes:
        free.remove(axis)
    cuts = sorted(rng.sample(range(1, rows), min(rng.randint(1, 3), rows - 1)))
    lengths = [stop - start for start, stop in zip([0, *cuts], [*cuts, rows], strict=True)]
    parts: list[list[int]] = []
    for length in lengths:
        if parts and parts[-1][1] == length:
            parts[-1][0] += 1
        else:
            parts.append([1, length])
    dims = tuple(merge([count, *axes, length]) for count, length in parts)
    return (Sum(dims),) if len(dims) > 1 else dims[0]


def merge(digits: Sequence[int | str]) -> DimLayout:
    """Adjacent integers merged: the canonical form."""
    merged: list = []
    for digit in digits:
        if isinstance(digit, int) and merged and isinstance(merged[-1], int):
            merged[-1] *= digit
        elif digit != 1:
            merged.append(digit)
    return tuple(merged)


def a_layout(
    rng: Random,
    dims: Sequence[Sequence[int]],
    sizes: Mapping[str, int],
    kinds: Sequence[str] = ("sum", "avg"),
    may_pend: Mapping[str, str] | None = None,
    sums: float = 0.0,
) -> Layout:
    """A layout of a tensor whose dims' factors are given; only the axes in `may_pend` are pending, where it is.

    Args:
        sums: the chance that a dim is a direct sum.
    """
    free = list(sizes)
    found: dict[int, DimLayout] = {}
    for dim in rng.sample(range(len(dims)), len(dims)):
        if sums and rng.random() < sums:
            found[dim] = a_sum(rng, dims[dim], free, sizes)
        else:
            found[dim] = a_dim(rng, dims[dim], free, sizes, eager=0.5)
    if may_pend is not None:
        pending = [(axis, may_pend[axis]) for axis in free if axis in may_pend and rng.random() < 0.5]
    else:
        # A maximum and a sum do not commute, and no operator leaves both.
        kind = rng.choice(kinds)
        alike = [one for one in kinds if one in ("sum", "avg")] if kind in ("sum", "avg") else [kind]
        pending = [(axis, rng.choice(alike)) for axis in free if rng.random() < 0.3]
    return Layout(tuple(found[dim] for dim in range(len(dims))), tuple(sorted(pending)))


LaidOut = tuple[dict[str, int], list[list[int]], Layout]


def laid_out(rng: Random, kinds: Sequence[str] = ("sum", "avg"), most: int = 24, sums: float = 0.0) -> LaidOut:
    """A mesh, the factors of a tensor's dims, and a layout of it."""
    sizes = a_mesh(rng, most)
    dims = [primes(rng) for _ in range(rng.randint(0, 3))]
    return sizes, dims, a_layout(rng, dims, sizes, kinds, sums=sums)
