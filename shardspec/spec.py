"""The spec language: one string a tensor, `(H@tp hd)@fsdp D`, parsed into frozen values.

spec   = { dim | "..." } { "+" axis }
dim    = factor | "(" group { "+" group } ")" [ axes ]
group  = factor { factor }
factor = ( name | integer ) [ axes ]
axes   = "@" axis | "@(" axis { "," axis } ")"
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from attrs import frozen

from shardspec.mesh import AXES

TOKEN = re.compile(r"\s*(?:(?P<ellipsis>\.\.\.)|(?P<word>[A-Za-z_]\w*)|(?P<number>\d+)|(?P<mark>[@(),+]))")


class SpecError(ValueError):
    """A spec that does not parse; the message says where and what was expected."""


@frozen
class Factor:
    """A named part of a dim, major to minor in its dim, with the axes that split it."""

    name: str
    size: int | None = None
    axes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (self.name or str(self.size)) + _axes_text(self.axes)


@frozen
class Dim:
    """One dim of a tensor: one factor, or several in a group; `axes` split the whole group."""

    factors: tuple[Factor, ...]
    """Of a direct sum, those of all its parts."""
    axes: tuple[str, ...] = ()
    grouped: bool = False
    counts: tuple[int, ...] = ()
    """Of a direct sum, how many factors each part has."""

    @property
    def parts(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors of each part of a direct sum; of another dim, its factors."""
        rest = iter(self.factors)
        return tuple(tuple(next(rest) for _ in range(count)) for count in self.counts) or (self.factors,)

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Every axis on this dim: the factors' (of a direct sum, those of a part), then the group's."""
        factors = self.parts[0] if self.counts else self.factors
        return tuple(axis for factor in factors for axis in factor.axes) + self.axes

    def __str__(self) -> str:
        text = " + ".join(" ".join(map(str, part)) for part in self.parts)
        return f"({text})" + _axes_text(self.axes) if self.grouped else text


@frozen
class Spec:
    """A parsed spec; `ellipsis` is the index in `dims` where `...` stands, or None."""

    dims: tuple[Dim, ...]
    pending: tuple[str, ...] = ()
    ellipsis: int | None = None
    open_end: bool = False
    """True for `P(...)`, whose missing last dims are replicated."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis that the spec names, in reading order, with repetitions."""
        return tuple(axis for dim in self.dims for axis in dim.all_axes) + self.pending

    def __str__(self) -> str:
        parts = [str(dim) for dim in self.dims]
        if self.ellipsis is not None:
            parts.insert(self.ellipsis, "...")
        return " ".join(parts + [f"+{axis}" for axis in self.pending])


def _axes_text(axes: tuple[str, ...]) -> str:
    if not axes:
        return ""
    return f"@{axes[0]}" if len(axes) == 1 else f"@({','.join(axes)})"


class P:
    """A spec without names, as in JAX: `P("tp", None, ("dp", "fsdp"))`, an entry a dim.

    Dims past the last entry are replicated.
    """

    def __init__(self, *entries: str | tuple[str, ...] | None) -> None:
        self.entries = entries

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self.entries))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, P) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)

    def spec(self) -> Spec:
        """The same as a parsed `Spec`, its factors anonymous."""
        dims: list[Dim] = []
        for entry in self.entries:
            if not isinstance(entry, (str, tuple, type(None))):
                raise SpecError(f"{self!r}: {entry!r} is no axis, tuple of axes, or None")
            axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            for axis in axes:
                _check_axis(axis, repr(self))
            dims.append(Dim((Factor("", None, axes),)))
        return Spec(tuple(dims), open_end=True)


class _Reader:
    """The tokens of one spec, read left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._split())
        self.at = 0

    def _split(self) -> Iterator[tuple[str, str, int]]:
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = TOKEN.match(self.text, position)
            if match is None:
                rest = self.text[position:].lstrip()
                column = len(self.text) - len(rest) + 1
                raise SpecError(f"{self.text!r}: cannot read {rest[0]!r} at column {column}")
            yield match.lastgroup or "", match.group().strip(), match.start(match.lastgroup or 0)
            position = match.end()

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at][:2] if self.at < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.at += 1
        return token

    @property
    def column(self) -> int:
        """Where the next token stands, or the text ends, counted from one."""
        return self.tokens[self.at][2] + 1 if self.at < len(self.tokens) else len(self.text) + 1

    def fail(self, expected: str) -> SpecError:
        if self.at >= len(self.tokens):
            return SpecError(f"{self.text!r} ends where {expected} was expected")
        found = self.tokens[self.at][1]
        return SpecError(f"{self.text!r}: {found!r} at column {self.column} where {expected} was expected")

    def axis(self) -> str:
        if self.peek()[0] != "word":
            raise self.fail("a mesh axis")
        column = self.column
        return _check_axis(self.take()[1], repr(self.text), f" at column {column}")

    def expect(self, mark: str) -> None:
        if self.peek() != ("mark", mark):
            raise self.fail(repr(mark))
        self.at += 1


def _check_axis(axis: str, text: str, where: str = "") -> str:
    if axis not in AXES:
        raise SpecError(f"{text}: unknown mesh axis {axis!r}{where}; the axes are {', '.join(AXES)}")
    return axis


def _parse_axes(reader: _Reader) -> tuple[str, ...]:
    if reader.peek() != ("mark", "@"):
        return ()
    reader.take()
    if reader.peek() != ("mark", "("):
        return (reader.axis(),)
    reader.take()
    axes: list[str] = []
    while True:
        axes.append(reader.axis())
        if reader.peek() == ("mark", ","):
            reader.take()
            continue
        reader.expect(")")
        return tuple(axes)


def _parse_factor(reader: _Reader) -> Factor:
    column = reader.column
    kind, text = reader.take()
    axes = _parse_axes(reader)
    if kind == "number":
        if axes:
            raise SpecError(
                f"{reader.text!r}: the plain number {text} at column {column} cannot be split; give the factor a name"
            )
        return Factor("", int(text), axes)
    return Factor(text, None, axes)


def _parse_group(reader: _Reader) -> Dim:
    reader.expect("(")
    parts: list[tuple[Factor, ...]] = []
    columns: list[int] = []
    while not parts or reader.peek() == ("mark", "+"):
        if parts:
            reader.take()
        columns.append(reader.column)
        parts.append(_parse_factors(reader))
    reader.expect(")")
    if len(parts) > 1:
        _check_parts(reader, parts, columns)
    counts = tuple(map(len, parts)) if len(parts) > 1 else ()
    return Dim(tuple(factor for part in parts for factor in part), _parse_axes(reader), grouped=True, counts=counts)


def _parse_factors(reader: _Reader) -> tuple[Factor, ...]:
    factors: list[Factor] = []
    while reader.peek()[0] in ("word", "number"):
        factors.append(_parse_factor(reader))
    if not factors:
        raise reader.fail("a factor's name")
    return tuple(factors)


def _check_parts(reader: _Reader, parts: Sequence[tuple[Factor, ...]], columns: Sequence[int]) -> None:
    """A rank holds its share of every part of a direct sum: all are split over the same axes in the same order."""
    first, *others = ([axis for factor in part for axis in factor.axes] for part in parts)
    for part, axes, column in zip(parts[1:], others, columns[1:], strict=True):
        if axes != first:
            raise SpecError(
                f"{reader.text!r}: the parts of a direct sum are split alike: {' '.join(map(str, parts[0]))!r} over "
                f"{', '.join(first) or 'nothing'}, {' '.join(map(str, part))!r} at column {column} over "
                f"{', '.join(axes) or 'nothing'}"
            )


@lru_cache(maxsize=4096)
def parse(text: str) -> Spec:
    """Parse one spec.

    Raises:
        SpecError: with the column and what was expected there.
    """
    reader = _Reader(text)
    dims: list[Dim] = []
    pending: list[str] = []
    ellipsis: int | None = None
    while reader.peek()[0] != "end":
        kind, token = reader.peek()
        if token == "+":
            reader.take()
            pending.append(reader.axis())
        elif pending:
            raise reader.fail("'+axis' or the end")
        elif kind == "ellipsis":
            if ellipsis is not None:
                raise reader.fail("at most one '...'")
            reader.take()
            ellipsis = len(dims)
        elif token == "(":
            dims.append(_parse_group(reader))
        elif kind in ("word", "number"):
            dims.append(Dim((_parse_factor(reader),)))
        else:
            raise reader.fail("a dim")
    return Spec(tuple(dims), tuple(pending), ellipsis)
