"""Hypothesis strategies: meshes, and layouts of tensors whose dims are products of small primes."""

from collections.abc import Mapping
from math import prod

from hypothesis import strategies as st

from shardspec.layout import Layout


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
