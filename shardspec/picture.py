"""Pictures of a mesh and of how a tensor is cut, as inline SVG: shapes by class, so that a page colours them.

An axis larger than four is drawn as its first two places, a gap, and its last place; no picture is to scale. Imports
no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from attrs import frozen

from shardspec.layout import Digit, Layout, Sum, dim_axes, dim_text, global_size, is_sum
from shardspec.mesh import Mesh
from shardspec.plan import ParamPlan

MOST_PLACES = 4
"""The largest size of an axis that is drawn place for place."""

MANY_AXES, FEW_PLACES = 3, 2
"""In a mesh of more axes than the first, no axis is drawn with more places than the second."""

BOX_W, BOX_H = 96, 64
"""A tensor's picture, in pixels; one of a single dim is a strip."""

STRIP_H = 20

CELL_H, PAD, GAP, LABEL = 26, 8, 18, 18
"""Of the mesh: a rank's height, the room inside a box, that of a gap, that of an axis's name."""

DIGIT_W = 9
"""How wide a digit of a rank's number is."""

Cut = tuple[Digit, ...]
"""How a dim is cut, major to minor: an axis, or an integer for an extent that no axis cuts."""


@frozen
class Span:
    """A part of a dim: where it is drawn, 0 to 1, and whose it is."""

    start: float
    end: float
    compute: bool = True
    """Whether rank 0 reads it in compute."""
    stored: bool = True
    """Whether rank 0 stores it."""
    gap: bool = False
    """Stands for the places that are not drawn."""

    def within(self, outer: "Span") -> "Span":
        """The same part of a part."""
        length = outer.end - outer.start
        return Span(
            outer.start + self.start * length,
            outer.start + self.end * length,
            outer.compute and self.compute,
            outer.stored and self.stored,
            outer.gap or self.gap,
        )


def places(size: int, most: int = MOST_PLACES) -> list[int | None]:
    """The places along an axis that are drawn; None is a gap."""
    return list(range(size)) if size <= most else [*range(most // 2), None, size - 1]


def spans(cut: Cut, mesh: Mesh, storage: Sequence[str] = ()) -> list[Span]:
    """The parts of a dim, in order."""
    axes = [index for index, digit in enumerate(cut) if not isinstance(digit, int)]
    inner = [Span(0.0, 1.0)]
    # What is behind the last axis is one piece: a rank's own rows.
    for digit in reversed(cut[: axes[-1] + 1] if axes else ()):
        if isinstance(digit, Sum):
            inner = [own if own.gap else part.within(own) for own in _parts(digit, mesh) for part in inner]
            continue
        shown = places(mesh[digit] if isinstance(digit, str) else digit)
        split: list[Span] = []
        for index, place in enumerate(shown):
            first = place == 0 or isinstance(digit, int)
            outer = Span(
                index / len(shown),
                (index + 1) / len(shown),
                compute=first or digit in storage,
                stored=first,
                gap=place is None,
            )
            split += [outer] if outer.gap else [part.within(outer) for part in inner]
        inner = split
    return inner


def _parts(summed: Sum, mesh: Mesh) -> Iterator[Span]:
    """The parts of a direct sum, each as long as its share of the rows, cut like a dim of its own."""
    lengths = [global_size(part, mesh.shape) for part in summed.parts]
    start = 0
    for part, length in zip(summed.parts, lengths, strict=True):
        whole = Span(start / sum(lengths), (start + length) / sum(lengths))
        yield from (own.within(whole) for own in spans(part, mesh))
        start += length


def cuts_of(param: ParamPlan) -> list[Cut]:
    """How each dim of a parameter is cut, storage included; a dim of several pieces shows what compute reads only."""
    cuts: list[Cut] = [tuple(dim) for dim in param.layout.dims]
    if param.storage and not is_sum(cuts[param.storage_dim]):
        *outer, rows = cuts[param.storage_dim] or (1,)
        if isinstance(rows, str):
            outer, rows = [*outer, rows], 1
        if all(isinstance(digit, str) for digit in outer):
            cuts[param.storage_dim] = (*outer, *param.storage, rows)
    return cuts


def draw_param(param: ParamPlan, mesh: Mesh) -> str:
    """A parameter's shards; rank 0's part is filled, what it gathers for compute is shaded."""
    return draw_cuts(cuts_of(param), mesh, param.storage)


def draw_layout(layout: Layout, mesh: Mesh) -> str:
    """A value's shards."""
    return draw_cuts([tuple(dim) for dim in layout.dims], mesh)


def draw_cuts(cuts: Sequence[Cut], mesh: Mesh, storage: Sequence[str] = ()) -> str:
    """The shards of a tensor: its first dim downwards and the others to the right, those that are cut first of all."""
    down, right = two_dims(cuts)
    rows, columns = spans(down, mesh, storage), spans(right, mesh, storage)
    height = BOX_H if len(cuts) > 1 else STRIP_H
    shapes: list[str] = []
    for row in rows:
        for column in columns:
            kind = "own" if row.stored and column.stored else "read" if row.compute and column.compute else "other"
            kind += " gap" if row.gap or column.gap else ""
            shapes.append(_rect(kind, column.start * BOX_W, row.start * height, column.end * BOX_W, row.end * height))
    title = escape("; ".join(captions(cuts, mesh)) or "whole on every rank")
    return _svg(BOX_W + 2, height + 2, f"shards: {title}", "".join(shapes), shift=1)


def two_dims(cuts: Sequence[Cut]) -> tuple[Cut, Cut]:
    """What is drawn downwards, and to the right: of more than two dims those that are cut, the last ones together."""
    if len(cuts) < 2:
        return (), (cuts[0] if cuts else ())
    if len(cuts) == 2:
        return cuts[0], cuts[1]
    split = [cut for cut in cuts if _axes(cut)]
    if len(split) < 2:
        return (cuts[0], ()) if _axes(cuts[0]) else ((), split[0] if split else ())
    first, *others = split
    return first, tuple(digit for cut in others for digit in cut)


def captions(cuts: Sequence[Cut], mesh: Mesh) -> Iterator[str]:
    """In words, how each dim is cut: `dim 0: tp 8 x fsdp 2048`."""
    for number, cut in enumerate(cuts):
        if _axes(cut):
            pieces = [f"{digit} {mesh[digit]}" if isinstance(digit, str) else dim_text((digit,)) for digit in cut]
            last = pieces[:-1] if isinstance(cut[-1], int) else pieces
            yield f"dim {number}: {' x '.join(last)}"


def _axes(cut: Cut) -> list[str]:
    return [axis for digit in cut for axis in dim_axes((digit,))]


@frozen
class Block:
    """A box of the mesh that is drawn already."""

    width: float
    height: float
    shapes: tuple[str, ...]
    """Drawn from (0, 0) on."""


def draw_mesh(mesh: Mesh) -> str:
    """Every axis of a mesh, the innermost in the smallest boxes; a number is a rank."""
    if not mesh.axes:
        block = _rank(0, len("0") * DIGIT_W + 2 * PAD)
    else:
        block = _level(mesh, mesh.axes, 0, len(str(mesh.world - 1)) * DIGIT_W + 2 * PAD)
    words = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()) or "one rank"
    return _svg(block.width + 2, block.height + 2, f"mesh: {words}", "".join(block.shapes), shift=1)


def _level(mesh: Mesh, axes: Sequence[str], rank: int, cell: float) -> Block:
    """The box of the ranks from `rank` on that differ along `axes` alone: to the right and downwards in turn."""
    if not axes:
        return _rank(rank, cell)
    axis, *inner = axes
    stride = 1
    for name in inner:
        stride *= mesh[name]
    shown = places(mesh[axis], MOST_PLACES if len(mesh.axes) <= MANY_AXES else FEW_PLACES)
    blocks = [None if place is None else _level(mesh, inner, rank + place * stride, cell) for place in shown]
    label = f"{axis} 0..{mesh[axis] - 1}"
    return _row(label, blocks, down=len(inner) % 2 == 1)


def _rank(rank: int, width: float) -> Block:
    shape = _rect("own" if rank == 0 else "other", 0, 0, width, CELL_H, radius=3)
    return Block(width, CELL_H, (shape, _text(width / 2, CELL_H / 2, str(rank), "middle")))


def _row(label: str, blocks: Iterable[Block | None], *, down: bool) -> Block:
    """Boxes in a row, to the right or downwards, in a box of their own; None is a gap."""
    shapes: list[str] = []
    dots: list[float] = []
    at, across = (LABEL + PAD / 2 if down else float(PAD)), 0.0
    for block in blocks:
        if block is None:
            dots.append(at + GAP / 2 - PAD / 4)
            at += GAP + PAD / 2
            continue
        shapes.append(_moved(*((PAD, at) if down else (at, LABEL + PAD / 2)), block.shapes))
        at += (block.height if down else block.width) + PAD / 2
        across = max(across, block.width if down else block.height)
    if down:
        shapes += [_text(PAD + across / 2, place, "⋮", "middle") for place in dots]
        return _boxed(label, across + 2 * PAD, at + PAD / 2, shapes)
    shapes += [_text(place, LABEL + PAD / 2 + across / 2, "…", "middle") for place in dots]
    return _boxed(label, at + PAD / 2, LABEL + across + 1.5 * PAD, shapes)


def _boxed(label: str, width: float, height: float, shapes: Iterable[str]) -> Block:
    width = max(width, len(label) * DIGIT_W + 2 * PAD)
    frame = _rect("frame", 0, 0, width, height, radius=5)
    return Block(width, height, (frame, _text(PAD, LABEL / 2 + 2, label, "start", "axis"), *shapes))


def _moved(x: float, y: float, shapes: Iterable[str]) -> str:
    return f'<g transform="translate({_number(x)} {_number(y)})">{"".join(shapes)}</g>'


def _rect(kind: str, left: float, top: float, right: float, bottom: float, radius: int = 0) -> str:
    rounded = f' rx="{radius}"' if radius else ""
    return (
        f'<rect class="{kind}" x="{_number(left)}" y="{_number(top)}" width="{_number(right - left)}" '
        f'height="{_number(bottom - top)}"{rounded}/>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "rank") -> str:
    place = f'x="{_number(x)}" y="{_number(y)}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}" dominant-baseline="central">{escape(text)}</text>'


def _svg(width: float, height: float, title: str, shapes: str, shift: int) -> str:
    size = f'width="{_number(width)}" height="{_number(height)}" viewBox="0 0 {_number(width)} {_number(height)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{title}</title>'
        f'<g transform="translate({shift} {shift})">{shapes}</g></svg>'
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
