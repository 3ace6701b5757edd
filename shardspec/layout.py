"""The types: what part of a tensor a rank holds, as digits for each dim, and what is still to be summed.

A dim is a tuple of digits, major to minor: an integer (a local extent) or a mesh axis. Adjacent integers
merge and ones vanish, so equal layouts are equal tuples: `(H@tp hd)` with 128 heads of 128 on tp=16 is
`("tp", 1024)`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from attrs import frozen

Digit = int | str
DimLayout = tuple[Digit, ...]
Sizes = Mapping[str, int]
"""Axis -> size. An axis that is absent has size one and never appears in a layout."""

SUM, AVG, MAX, MIN = "sum", "avg", "max", "min"


class CutError(ValueError):
    """A dim cannot be cut where a view asks, for an axis digit lies across the cut."""

    def __init__(self, axis: str, message: str) -> None:
        self.axis = axis
        super().__init__(message)


def canonical(digits: Iterable[Digit]) -> DimLayout:
    """Merge adjacent integers and drop ones."""
    merged: list[Digit] = []
    for digit in digits:
        if isinstance(digit, int) and merged and isinstance(merged[-1], int):
            merged[-1] *= digit
        elif digit != 1:
            merged.append(digit)
    return tuple(merged)


def local_size(dim: DimLayout) -> int:
    """The length of the dim on a rank."""
    size = 1
    for digit in dim:
        if isinstance(digit, int):
            size *= digit
    return size


def global_size(dim: DimLayout, sizes: Sizes) -> int:
    """The length of the dim over all ranks."""
    size = 1
    for digit in dim:
        size *= digit if isinstance(digit, int) else sizes[digit]
    return size


def dim_axes(dim: DimLayout) -> tuple[str, ...]:
    """The axes on a dim, major to minor."""
    return tuple(digit for digit in dim if isinstance(digit, str))


@frozen(cache_hash=True)
class Layout:
    """Digits for each dim, and the pending reductions as sorted (axis, kind) pairs."""

    dims: tuple[DimLayout, ...]
    pending: tuple[tuple[str, str], ...] = ()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The local shape."""
        return tuple(map(local_size, self.dims))

    def global_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape over all ranks."""
        return tuple(global_size(dim, sizes) for dim in self.dims)

    @cached_property
    def sharded(self) -> Mapping[str, int]:
        """Axis -> the dim that it splits."""
        return {axis: index for index, dim in enumerate(self.dims) for axis in dim_axes(dim)}

    def pending_kind(self, axis: str) -> str | None:
        """How the axis is to be reduced, or None."""
        return next((kind for name, kind in self.pending if name == axis), None)

    def describe(self, axis: str) -> str:
        """The state on one axis, in words."""
        kind = self.pending_kind(axis)
        if kind:
            return f"pending {kind} over {axis}"
        dim = self.sharded.get(axis)
        return f"replicated over {axis}" if dim is None else f"sharded over {axis} on dim {dim}"

    def __str__(self) -> str:
        dims = ", ".join(dim_text(dim) for dim in self.dims)
        return f"[{dims}]" + "".join(f" +{axis}" + ("" if kind == SUM else f":{kind}") for axis, kind in self.pending)


def dim_text(dim: DimLayout) -> str:
    """A dim as a reader wants it: `4096`, `1024@tp`, `2.tp.512`."""
    if not dim:
        return "1"
    if len(dim) == 1:
        return str(dim[0]) if isinstance(dim[0], int) else f"1@{dim[0]}"
    axes = dim[:-1]
    if isinstance(dim[-1], int) and all(isinstance(axis, str) for axis in axes):
        return f"{dim[-1]}@" + (str(axes[0]) if len(axes) == 1 else f"({','.join(map(str, axes))})")
    return ".".join(map(str, dim))


def replicated(shape: Sequence[int]) -> Layout:
    """The layout of a tensor that every rank holds whole."""
    return Layout(tuple(canonical((size,)) for size in shape))


def with_pending(layout: Layout, pending: Iterable[tuple[str, str]]) -> Layout:
    """The same dims with other pending reductions."""
    return Layout(layout.dims, tuple(sorted(pending)))


def flatten(dims: Iterable[DimLayout]) -> DimLayout:
    """One dim of several, major to minor."""
    return canonical(digit for dim in dims for digit in dim)


def split(dim: DimLayout, lengths: Sequence[int], sizes: Sizes) -> tuple[DimLayout, ...]:
    """Cut a dim into dims of the global `lengths`, major to minor.

    Raises:
        CutError: where an axis digit would lie across a cut.
    """
    rest = list(dim)
    parts: list[DimLayout] = []
    for length in reversed(lengths):
        part: list[Digit] = []
        need = length
        while need > 1:
            if not rest:
                raise AssertionError("split: lengths do not multiply to the dim's size")
            digit = rest.pop()
            extent = digit if isinstance(digit, int) else sizes[digit]
            if isinstance(digit, int):
                if need % extent == 0:
                    part.insert(0, digit)
                    need //= extent
                elif extent % need == 0:
                    part.insert(0, need)
                    rest.append(extent // need)
                    need = 1
                else:
                    axis = next((d for d in reversed(rest) if isinstance(d, str)), "")
                    if not axis:
                        raise AssertionError("split: a plain dim is cut unevenly")
                    raise CutError(axis, f"{need} and {extent} do not divide each other")
            elif need % extent == 0:
                part.insert(0, digit)
                need //= extent
            else:
                raise CutError(digit, f"{need} is not a multiple of {digit}={extent}")
        parts.append(canonical(part))
    leftover = canonical(rest)
    if leftover:
        # Only axis digits or extents beyond the lengths can be left, when a length of one met a sharded rest.
        axis = next((d for d in leftover if isinstance(d, str)), "")
        raise CutError(axis, f"{dim_text(leftover)} is left over")
    return tuple(reversed(parts))
