"""What every rank of a mesh holds of a value, by index arithmetic alone: the oracle that layouts are tested against."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from shardspec.layout import AVG, MAX, MIN, SUM, DimLayout, Layout, Sizes

Coordinate = tuple[tuple[str, int], ...]
"""(axis, index) for each axis of a mesh."""

Ranks = dict[Coordinate, Tensor]
"""What each rank holds."""


def coordinates(sizes: Sizes) -> Iterator[Coordinate]:
    """Every rank."""
    for index in itertools.product(*(range(size) for size in sizes.values())):
        yield tuple(zip(sizes, index, strict=True))


def positions(dim: DimLayout, place: Mapping[str, int], sizes: Sizes) -> list[int]:
    """The global indices that a rank holds of a dim, in order: mixed radix, with its own digit at each axis."""
    found = [0]
    for digit in dim:
        if isinstance(digit, str):
            base, choices = sizes[digit], [place[digit]]
        elif isinstance(digit, int):
            base, choices = digit, list(range(digit))
        else:
            base, choices = 0, []
            for part in digit.parts:
                choices += [base + index for index in positions(part, place, sizes)]
                base += prod(sizes[one] if isinstance(one, str) else one for one in part)
        found = [index * base + choice for index in found for choice in choices]
    return found


def part(whole: Tensor, layout: Layout, place: Mapping[str, int], sizes: Sizes) -> Tensor:
    """A rank's part of a complete value."""
    for index, dim in enumerate(layout.dims):
        whole = whole.index_select(index, torch.tensor(positions(dim, place, sizes), dtype=torch.long))
    return whole


def scatter(whole: Tensor, layout: Layout, sizes: Sizes, seed: int = 0) -> Ranks:
    """What every rank holds of a value; where it is pending, a random share."""
    generator = torch.Generator().manual_seed(seed)
    exact = bool(layout.pending) and not whole.is_complex() and bool((whole.remainder(SHARE_UNIT) == 0).all())
    held = _shares(whole, layout.pending, sizes, generator, SHARE_UNIT if exact else 1)
    ranks: Ranks = {}
    for coordinate in coordinates(sizes):
        place = dict(coordinate)
        share = held[tuple(place[axis] for axis, _ in layout.pending)]
        ranks[coordinate] = part(share, layout, place, sizes)
    return ranks


SHARE_UNIT = 12**4
"""Values that are multiples of this get shares that are: means over up to 24 ranks, twice, stay whole, and exact."""


def _shares(
    whole: Tensor, pending: Sequence[tuple[str, str]], sizes: Sizes, generator: torch.Generator, unit: int
) -> dict[tuple[int, ...], Tensor]:
    """A share for each index along the pending axes, of which the reductions give the value."""
    if not pending:
        return {(): whole}
    (axis, kind), *rest = pending
    n = sizes[axis]

    def noise(low: int, high: int) -> Tensor:
        return torch.randint(low, high, whole.shape, generator=generator).to(whole.dtype)

    if kind in (SUM, AVG):
        shares = [unit * noise(-9, 9) for _ in range(n - 1)]
        shares.append(whole * (n if kind == AVG else 1) - sum(shares, torch.zeros_like(whole)))
    else:
        holder = torch.randint(0, n, whole.shape, generator=generator)
        beside = [whole - unit * noise(0, 9) if kind == MAX else whole + unit * noise(0, 9) for _ in range(n)]
        shares = [torch.where(holder == index, whole, other) for index, other in enumerate(beside)]
    return {
        (index, *key): value
        for index, share in enumerate(shares)
        for key, value in _shares(share, rest, sizes, generator, unit).items()
    }


def group(coordinate: Coordinate, axis: str, sizes: Sizes) -> list[Coordinate]:
    """The ranks that differ from one along one axis only, in order."""
    return [tuple((name, index if name == axis else at) for name, at in coordinate) for index in range(sizes[axis])]


REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    SUM: lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    AVG: lambda stacked: stacked.sum(0) / len(stacked),
    MAX: lambda stacked: stacked.amax(0),
    MIN: lambda stacked: stacked.amin(0),
}


def complete(ranks: Ranks, pending: Sequence[tuple[str, str]], sizes: Sizes) -> Ranks:
    """The values behind a reduction over each pending axis."""
    for axis, kind in pending:
        ranks = {at: REDUCE[kind](torch.stack([ranks[other] for other in group(at, axis, sizes)])) for at in ranks}
    return ranks


def difference(ranks: Ranks, whole: Tensor, layout: Layout, sizes: Sizes, *, tolerance: float = 0.0) -> str:
    """Where the ranks do not hold the parts of a value, in words; empty where they all do.

    Args:
        tolerance: of each element, relative to the largest of the whole (and to one).
    """
    scale = 1.0
    if tolerance and whole.numel():
        finite = whole[whole.isfinite()].abs()
        scale = max(scale, float(finite.max())) if finite.numel() else scale
    for coordinate, held in complete(ranks, layout.pending, sizes).items():
        wanted = part(whole, layout, dict(coordinate), sizes)
        if held.shape != wanted.shape:
            return f"{rank_name(coordinate)} holds shape {tuple(held.shape)}, its part has {tuple(wanted.shape)}"
        close = torch.isclose(held, wanted, rtol=0.0, atol=tolerance * scale, equal_nan=True)
        if not close.all():
            at = tuple((~close).nonzero()[0].tolist())
            one, two = (tensor[at].item() for tensor in (held, wanted))
            return f"{rank_name(coordinate)} holds {one:.6g} at {list(at)}, its part has {two:.6g} there"
    return ""


def rank_name(coordinate: Coordinate) -> str:
    """A rank, in words."""
    return "rank " + (",".join(f"{axis}={index}" for axis, index in coordinate) or "0")
