"""The types: what part of a tensor a rank holds, as digits for each dim, and what is still to be summed.

A dim is a tuple of digits, major to minor: an integer (a local extent) or a mesh axis. Adjacent integers
merge and ones vanish, so equal layouts are equal tuples: `(H@tp hd)` with 128 heads of 128 on tp=16 is
`("tp", 1024)`. A direct sum, `(H@tp hd + K@tp hd + K@tp hd)`, is one digit that stands alone in its dim.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from attrs import frozen


@frozen
class Sum:
    """Parts one after another, each split over the same axes: a rank holds its share of each, in their order.

    Made by `direct_sum`, which joins neighbours that are alike: at least two parts, and no two that follow each
    other differ in the count in front of their first axis alone.
    """

    parts: tuple[tuple[int | str, ...], ...]


Digit = int | str | Sum
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


def direct_sum(parts: Iterable[DimLayout]) -> DimLayout:
    """One dim of parts that follow one another, all of them split over the same axes in the same order.

    Each part is a count of one run of rows (`2` of `("tp", 64)` in `(2, "tp", 64)`); neighbours of one run are
    joined, so that equal parts are the digits of `(2 F@tp)`, and one part is that part.
    """
    runs: list[tuple[int, tuple[int | str, ...]]] = []
    for part in (one for dim in parts for one in parts_of(dim)):
        first = next(iter(part), 1)
        count, run = (first, part[1:]) if isinstance(first, int) else (1, part)
        if runs and runs[-1][1] == run:
            runs[-1] = (runs[-1][0] + count, run)
        else:
            runs.append((count, run))
    joined = tuple(_plain(canonical((count, *run))) for count, run in runs)
    assert len({dim_axes(part) for part in joined}) < 2, "the parts of a direct sum are split alike"
    return joined[0] if len(joined) == 1 else (Sum(joined),)


def parts_of(dim: DimLayout) -> tuple[tuple[int | str, ...], ...]:
    """The parts of a direct sum; of another dim, the dim itself."""
    if dim and isinstance(dim[0], Sum):
        return dim[0].parts
    return (_plain(dim),)


def _plain(digits: Iterable[Digit]) -> tuple[int | str, ...]:
    """Digits none of which is a direct sum."""
    return tuple(digit for digit in digits if not isinstance(digit, Sum))


def is_sum(dim: DimLayout) -> bool:
    """Whether a dim is a direct sum of parts that are not alike."""
    return bool(dim) and isinstance(dim[0], Sum)


def local_size(dim: DimLayout) -> int:
    """The length of the dim on a rank."""
    size = 1
    for digit in dim:
        if isinstance(digit, int):
            size *= digit
        elif isinstance(digit, Sum):
            size *= sum(map(local_size, digit.parts))
    return size


def extent(digit: Digit, sizes: Sizes) -> int:
    """How many values a digit has over all ranks."""
    if isinstance(digit, Sum):
        return sum(global_size(part, sizes) for part in digit.parts)
    return digit if isinstance(digit, int) else sizes[digit]


def global_size(dim: DimLayout, sizes: Sizes) -> int:
    """The length of the dim over all ranks."""
    size = 1
    for digit in dim:
        size *= digit if isinstance(digit, int) else extent(digit, sizes)
    return size


def dim_axes(dim: DimLayout) -> tuple[str, ...]:
    """The axes on a dim, major to minor."""
    if dim and isinstance(dim[0], Sum):
        return dim_axes(dim[0].parts[0])
    return tuple(digit for digit in dim if isinstance(digit, str))


def gathered(dim: DimLayout, axis: str, sizes: Sizes) -> DimLayout:
    """The dim with one axis whole on every rank."""
    if is_sum(dim):
        return direct_sum(gathered(part, axis, sizes) for part in parts_of(dim))
    return canonical(sizes[axis] if digit == axis else digit for digit in dim)


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
    """A dim as a reader wants it: `4096`, `1024@tp`, `2.tp.512`, `(512@tp + 128@tp + 128@tp)`."""
    if not dim:
        return "1"
    if is_sum(dim):
        return f"({' + '.join(map(_part_text, parts_of(dim)))})"
    if len(dim) == 1:
        return str(dim[0]) if isinstance(dim[0], int) else f"1@{dim[0]}"
    axes = dim[:-1]
    if isinstance(dim[-1], int) and all(isinstance(axis, str) for axis in axes):
        return f"{dim[-1]}@" + (str(axes[0]) if len(axes) == 1 else f"({','.join(map(str, axes))})")
    return ".".join(map(str, dim))


def _part_text(part: DimLayout) -> str:
    """A part of a direct sum; a few alike one by one, as they were written."""
    count, *run = part
    if isinstance(count, int) and count <= 4:
        return " + ".join([dim_text(tuple(run))] * count)
    return dim_text(part)


def replicated(shape: Sequence[int]) -> Layout:
    """The layout of a tensor that every rank holds whole."""
    return Layout(tuple(canonical((size,)) for size in shape))


def with_pending(layout: Layout, pending: Iterable[tuple[str, str]]) -> Layout:
    """The same dims with other pending reductions."""
    return Layout(layout.dims, tuple(sorted(pending)))


def flatten(dims: Iterable[DimLayout]) -> DimLayout:
    """One dim of several, major to minor.

    Raises:
        CutError: for a direct sum behind another dim: its parts would lie in several places.
    """
    digits = tuple(digit for dim in dims for digit in dim)
    found = [index for index, digit in enumerate(digits) if isinstance(digit, Sum)]
    if not found:
        return canonical(digits)
    if found != [0]:
        axis = dim_axes(digits[found[-1] :])[0]
        raise CutError(axis, f"the direct sum {dim_text(digits[found[-1] :][:1])} lies behind another dim")
    return direct_sum(canonical((*part, *digits[1:])) for part in parts_of(digits))


def split(dim: DimLayout, lengths: Sequence[int], sizes: Sizes) -> tuple[DimLayout, ...]:
    """Cut a dim into dims of the global `lengths`, major to minor.

    Raises:
        CutError: where an axis digit would lie across a cut.
    """
    if is_sum(dim):
        return _split_sum(dim, lengths, sizes)
    rest = list(dim)
    parts: list[DimLayout] = []
    for length in reversed(lengths):
        part: list[Digit] = []
        need = length
        while need > 1:
            if not rest:
                raise AssertionError("split: lengths do not multiply to the dim's size")
            digit = rest.pop()
            length_here = extent(digit, sizes)
            if isinstance(digit, int):
                if need % length_here == 0:
                    part.insert(0, digit)
                    need //= length_here
                elif length_here % need == 0:
                    part.insert(0, need)
                    rest.append(length_here // need)
                    need = 1
                else:
                    axis = next((d for d in reversed(rest) if isinstance(d, str)), "")
                    if not axis:
                        raise AssertionError("split: a plain dim is cut unevenly")
                    raise CutError(axis, f"{need} and {length_here} do not divide each other")
            elif need % length_here == 0:
                part.insert(0, digit)
                need //= length_here
            else:
                raise CutError(str(digit), f"{need} is not a multiple of {digit}={length_here}")
        parts.append(canonical(part))
    leftover = canonical(rest)
    if leftover:
        # Only axis digits or extents beyond the lengths can be left, when a length of one met a sharded rest.
        axis = next((d for d in leftover if isinstance(d, str)), "")
        raise CutError(axis, f"{dim_text(leftover)} is left over")
    return tuple(reversed(parts))


def _split_sum(dim: DimLayout, lengths: Sequence[int], sizes: Sizes) -> tuple[DimLayout, ...]:
    """Cut whole minor dims off every part of a direct sum: `(H@tp hd + K@tp hd)` into `(H@tp + K@tp)` and `hd`."""
    major = next((index for index, length in enumerate(lengths) if length > 1), 0)
    minor = tuple(lengths[major + 1 :])
    inner = 1
    for length in minor:
        inner *= length
    heads: list[DimLayout] = []
    tails: set[tuple[DimLayout, ...]] = set()
    for part in parts_of(dim):
        whole = global_size(part, sizes)
        if whole % inner:
            raise CutError(dim_axes(part)[0], f"{inner} does not divide the part of {whole}")
        head, *tail = split(part, (whole // inner, *minor), sizes)
        heads.append(head)
        tails.add(tuple(tail))
    if len(tails) > 1 or len({dim_axes(head) for head in heads}) > 1:
        raise CutError(dim_axes(dim)[0], "the parts would be cut differently")
    return ((),) * major + (direct_sum(heads), *tails.pop())
