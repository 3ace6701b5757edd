"""Layouts of an operator's inputs on one axis, many of them, and joined into layouts on two."""

import itertools
from collections.abc import Sequence
from math import prod
from random import Random

import torch
from torch import Tensor

from shardspec.layout import AVG, MAX, MIN, SUM, DimLayout, Layout, dim_axes, replicated
from tests.strategies import merge

Layouts = tuple[Layout, ...]
"""One for each input."""


def axis_sizes(inputs: Sequence[Tensor]) -> list[int]:
    """The axis sizes that can split a dim of the inputs, most often fitting first; two where none can."""
    lengths = [length for tensor in inputs for length in tensor.shape if length > 1]
    fits = {size: sum(length % size == 0 for length in lengths) for size in (2, 3, 5)}
    return [size for size in sorted(fits, key=lambda size: -fits[size]) if fits[size]] or [2]


def on_one_axis(tensor: Tensor, axis: str, size: int) -> list[Layout]:
    """A tensor's layouts on one axis: whole, each dim split (contiguously and in strides), pending."""
    whole = replicated(tensor.shape)
    found = [whole]
    for dim, length in enumerate(tensor.shape):
        if length and length % size == 0:
            splits = dict.fromkeys([merge([axis, length // size]), merge([length // size, axis])])
            found += [Layout((*whole.dims[:dim], split, *whole.dims[dim + 1 :])) for split in splits]
    return found + [Layout(whole.dims, ((axis, kind),)) for kind in _kinds(tensor.dtype)]


def _kinds(dtype: torch.dtype) -> tuple[str, ...]:
    """In which ways a tensor may be pending: of whole numbers there is no mean, of complex ones no maximum."""
    if dtype is torch.bool:
        return ()
    if dtype.is_complex:
        return (SUM,)
    return (SUM, AVG, MAX, MIN) if dtype.is_floating_point else (SUM, MAX)


def choices(rng: Random, inputs: Sequence[Tensor], axis: str, size: int, most: int) -> list[Layouts]:
    """Choices of a layout for each input, not all whole: every one where they are few, else a sample of them.

    The sample holds each layout of each input with the others whole, and what splits the same dim of several.
    """
    options = [on_one_axis(tensor, axis, size) for tensor in inputs]
    if prod(map(len, options)) <= most:
        return list(itertools.product(*options))[1:]
    whole = tuple(one[0] for one in options)
    found: dict[Layouts, None] = {}
    for at, one in enumerate(options):
        for layout in one[1:]:
            found[(*whole[:at], layout, *whole[at + 1 :])] = None
            found[tuple(_like(layout, options[other]) for other in range(len(options)))] = None
    kept = rng.sample(list(found), min(len(found), most * 3 // 4))
    for _ in range(most * 4):
        if len(kept) >= most:
            break
        pattern = rng.choice(rng.choice(options))
        kept.append(
            tuple(
                rng.choice(one) if rng.random() < 0.2 else _like(pattern, one) if rng.random() < 0.8 else one[0]
                for one in options
            )
        )
    return [layouts for layouts in dict.fromkeys(kept) if layouts != whole]


def _like(pattern: Layout, options: Sequence[Layout]) -> Layout:
    """The option that splits the same dim counted from the end, or is pending alike; else the whole."""
    for option in options[1:]:
        if pattern.pending and option.pending == pattern.pending:
            return option
        if not pattern.pending and option.dims and _last(option) == _last(pattern):
            return option
    return options[0]


def _last(layout: Layout) -> tuple[int, bool] | None:
    """Which dim is split, from the end, and whether contiguously."""
    for dim, digits in enumerate(reversed(layout.dims)):
        if dim_axes(digits):
            return dim, isinstance(digits[0], str)
    return None


def joined(rng: Random, one: Layouts, two: Layouts, axis: str, size: int) -> Layouts | None:
    """Two choices on different axes as one on both; `axis` is that of `two`. None where a dim has not the room."""
    memo: dict[tuple[DimLayout, DimLayout], DimLayout | None] = {}
    found: list[Layout] = []
    for left, right in zip(one, two, strict=True):
        kinds = {kind for _, kind in (*left.pending, *right.pending)}
        if len(kinds) > 1 and not kinds <= {SUM, AVG}:
            return None
        dims: list[DimLayout] = []
        for first, second in zip(left.dims, right.dims, strict=True):
            if (first, second) not in memo:
                memo[first, second] = _joined_dim(rng, first, second, axis, size)
            digits = memo[first, second]
            if digits is None:
                return None
            dims.append(digits)
        found.append(Layout(tuple(dims), tuple(sorted((*left.pending, *right.pending)))))
    return tuple(found)


def _joined_dim(rng: Random, one: DimLayout, two: DimLayout, axis: str, size: int) -> DimLayout | None:
    if not dim_axes(one) or not dim_axes(two):
        return one if dim_axes(one) else two
    spots = [at for at, digit in enumerate(one) if isinstance(digit, int) and digit % size == 0]
    if not spots:
        return None
    at = rng.choice(spots)
    inner = int(one[at]) // size
    pair = [axis, inner] if rng.random() < 0.5 else [inner, axis]
    return merge([*one[:at], *pair, *one[at + 1 :]])


def renamed(layout: Layout) -> Layout:
    """The layout on "dp" in place of "tp"."""
    dims = tuple(tuple("dp" if digit == "tp" else digit for digit in dim) for dim in layout.dims)
    return Layout(dims, tuple(("dp", kind) for _, kind in layout.pending))
