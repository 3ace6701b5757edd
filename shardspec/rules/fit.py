"""Fit specs to shapes: the sizes of factors, and the layout that a spec gives a tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from shardspec.constraints import Constraint
from shardspec.diagnostics import Diagnostic
from shardspec.layout import SUM, Digit, DimLayout, Layout, canonical, local_size
from shardspec.mesh import Mesh, degree
from shardspec.rules.parse import STORAGE_AXES, Entry, MeshEdit, Sizes, Storage
from shardspec.spec import Dim, Spec


def check_rank(entry: Entry, name: str, shape: Sequence[int]) -> Diagnostic | None:
    """SS205 where the spec has another number of dims than the tensor."""
    count, rank = len(entry.spec.dims), len(shape)
    fits = count <= rank if entry.spec.ellipsis is not None or entry.spec.open_end else count == rank
    if fits:
        return None
    return Diagnostic(
        code="SS205",
        what=f"the spec has {count} dims, {name} has {rank}",
        why=f"{entry.spec} against shape {tuple(shape)}",
        locations=(entry.location,),
    )


def dims_of(spec: Spec, rank: int) -> list[Dim]:
    """A dim of the spec for each of the tensor's."""
    dims = list(spec.dims)
    free = Dim(())
    if spec.ellipsis is not None:
        return dims[: spec.ellipsis] + [free] * (rank - len(dims)) + dims[spec.ellipsis :]
    return dims + [free] * (rank - len(dims))


def learn_sizes(
    claims: Iterable[tuple[str, Entry, Sequence[int]]], given: Mapping[str, int]
) -> tuple[Sizes, list[Diagnostic]]:
    """The size of every factor that a claimed shape tells; SS206 for a name with two, or another literal."""
    sizes = Sizes(dict(given), {name: ("sizes=", None) for name in given})
    found: dict[object, Diagnostic] = {}
    groups: list[tuple[str, Entry, Dim, int]] = []
    for name, entry, shape in claims:
        for dim, length in zip(dims_of(entry.spec, len(shape)), shape, strict=True):
            if len(dim.factors) == 1:
                _learn(sizes, dim.factors[0].name, dim.factors[0].size, length, name, entry, found)
            elif dim.factors:
                groups.append((name, entry, dim, length))
    for _ in range(2):
        for name, entry, dim, length in groups:
            product, unknown = 1, ""
            several = False
            for factor in dim.factors:
                size = factor.size or sizes.known.get(factor.name)
                if size is None:
                    several, unknown = bool(unknown), factor.name
                else:
                    product *= size
            if not unknown and product != length:
                found[(entry, dim)] = _two_sizes(
                    f"({' '.join(map(str, dim.factors))})", product, length, name, entry, sizes, dim
                )
            elif unknown and not several:
                if length % product:
                    found[(entry, dim)] = _two_sizes(str(dim), product, length, name, entry, sizes, dim)
                else:
                    _learn(sizes, unknown, None, length // product, name, entry, found)
    return sizes, list(found.values())


def _learn(
    sizes: Sizes,
    factor: str,
    literal: int | None,
    length: int,
    name: str,
    entry: Entry,
    found: dict[object, Diagnostic],
) -> None:
    if literal is not None and literal != length:
        found[(entry, factor, literal)] = Diagnostic(
            code="SS206",
            what=f"the spec says {literal}, the dim has {length}",
            why=f"{entry.spec} against {name}",
            locations=(entry.location,),
        )
    if not factor:
        return
    if factor not in sizes.known:
        sizes.known[factor] = length
        sizes.place[factor] = (name, entry.location)
    elif sizes.known[factor] != length and (entry, factor) not in found:
        where, other = sizes.place[factor]
        found[(entry, factor)] = Diagnostic(
            code="SS206",
            what=f"{factor} has two sizes: {sizes.known[factor]} and {length}",
            why=f"{sizes.known[factor]} by {where}, {length} by {name}; a name has one size in a table",
            locations=tuple(place for place in (other, entry.location) if place is not None),
            advice=("give one of the two another name",),
        )


def _two_sizes(text: str, product: int, length: int, name: str, entry: Entry, sizes: Sizes, dim: Dim) -> Diagnostic:
    parts = ", ".join(f"{f.name} is {sizes.known[f.name]}" for f in dim.factors if f.name in sizes.known)
    return Diagnostic(
        code="SS206",
        what=f"the factors of {text} do not make up {length}",
        why=f"{parts}: {product} does not fit the {length} of {name}",
        locations=(entry.location,),
    )


def layout_of(
    entry: Entry, name: str, shape: Sequence[int], known: Mapping[str, int], mesh: Mesh, *, storage: bool
) -> tuple[Layout, Storage, Diagnostic | None]:
    """The layout that an entry gives a tensor of `shape`; storage axes are left out of it and told apart."""
    dims: list[tuple[Digit, ...]] = []
    stored = Storage()
    problem: Diagnostic | None = None
    for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
        kept = [axis for axis in dim.all_axes if mesh[axis] > 1]
        live = [axis for axis in kept if not (storage and axis in STORAGE_AXES)]
        digits, error = _digits(dim, length, live, known, mesh)
        if error and problem is None:
            problem = _uneven(entry, name, dim, error, mesh, live)
        dims.append(canonical(digits))
        if storage and any(axis in STORAGE_AXES for axis in kept):
            stored = Storage(index, tuple(axis for axis in kept if axis in STORAGE_AXES))
            if problem is None and pieces(dims[-1]) > 1:
                problem = _stored_in_pieces(entry, name, dim, stored, pieces(dims[-1]))
            elif problem is None and uneven_storage(stored, local_size(dims[-1]), mesh):
                problem = _uneven(entry, name, dim, (str(dim), length, True), mesh, [*live, *stored.axes])
    pending = tuple(sorted((axis, SUM) for axis in entry.spec.pending if mesh[axis] > 1))
    return Layout(tuple(dims), pending), stored, problem


def pieces(dim: DimLayout) -> int:
    """In how many runs of consecutive rows the part of a dim lies that a rank holds."""
    axes = [index for index, digit in enumerate(dim) if isinstance(digit, str)]
    return local_size(dim[: axes[-1]]) if axes else 1


def _stored_in_pieces(entry: Entry, name: str, dim: Dim, stored: Storage, count: int) -> Diagnostic:
    axes = ",".join(stored.axes)
    return Diagnostic(
        code="SS209",
        what=f"{axes} divides rows that lie in {count} pieces: {dim}",
        why=f"{name}: fully_shard cuts what a rank holds in consecutive slices, which would end anywhere in a piece: "
        "no placement says which rows they are",
        locations=(entry.location,),
        advice=(f"put {axes} on another dim, or leave it off",),
    )


def uneven_storage(stored: Storage, rows: int, mesh: Mesh) -> bool:
    """Whether FSDP2 cannot store the rows: only along dim 0, and over one axis, does it pad uneven ones."""
    return (stored.dim != 0 or len(stored.axes) > 1) and rows % degree(mesh, stored.axes) != 0


def divisors(
    entry: Entry, name: str, shape: Sequence[int], known: Mapping[str, int], mesh: Mesh, *, storage: bool
) -> Iterator[Constraint]:
    """What must divide what for `layout_of` to give a layout, whatever the sizes of the axes."""
    for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
        kept = tuple(axis for axis in dim.all_axes if mesh[axis] > 1)
        live = tuple(axis for axis in kept if not (storage and axis in STORAGE_AXES))
        place = entry.location
        for factor in dim.factors:
            own = tuple(axis for axis in factor.axes if axis in live)
            size = length if len(dim.factors) == 1 else factor.size or known.get(factor.name)
            if own and size is not None:
                yield Constraint(own, size, factor.name, name, place)
        if live:
            yield Constraint(live, length, dim.factors[0].name if len(dim.factors) == 1 else str(dim), name, place)
        if storage and kept != live and (index != 0 or len(kept) - len(live) > 1):
            yield Constraint(kept, length, str(dim), name, place)


def _digits(
    dim: Dim, length: int, live: Sequence[str], known: Mapping[str, int], mesh: Mesh
) -> tuple[list[Digit], tuple[str, int, bool] | None]:
    """The digits of one dim, or the factor that does not divide with its size (and whether the size is known)."""
    if not live:
        return [length], None
    digits: list[Digit] = []
    rest = length
    last = max((i for i, factor in enumerate(dim.factors) if any(axis in live for axis in factor.axes)), default=-1)
    for index, factor in enumerate(dim.factors[: last + 1]):
        axes = tuple(axis for axis in factor.axes if axis in live)
        size = factor.size or known.get(factor.name)
        if size is None and index < last:
            return [length], (factor.name, 0, False)
        size = size if size is not None and len(dim.factors) > 1 else rest if size is None else size
        share = degree(mesh, axes)
        if size % share or rest % size:
            return [length], (factor.name or "the dim", size, True)
        digits += [*axes]
        if index < last:
            digits.append(size // share)
            rest //= size
        else:
            rest //= share
    # The group's own axes divide what those inside it left, as one run of rows.
    group = tuple(axis for axis in dim.axes if axis in live)
    before = local_size(canonical(digits))
    if group and (before != 1 or rest % degree(mesh, group)):
        return [length], (str(dim), length, True)
    return [*digits, *group, rest // degree(mesh, group)], None


def _uneven(
    entry: Entry, name: str, dim: Dim, error: tuple[str, int, bool], mesh: Mesh, live: Sequence[str]
) -> Diagnostic:
    factor, size, known = error
    if not known:
        return Diagnostic(
            code="SS215",
            what=f"nothing tells the size of {factor} in {dim}",
            why=f"{name}: the factors before the split one need a size",
            locations=(entry.location,),
            advice=(f'give sizes={{"{factor}": ...}} in the table',),
        )
    share = degree(mesh, tuple(live))
    axes = ",".join(live)
    text = f"@({axes})" if len(live) > 1 else f"@{axes}"
    return Diagnostic(
        code="SS301",
        what=f"{factor} of {size} cannot be split over {' x '.join(f'{axis}={mesh[axis]}' for axis in live)}",
        why=f"{name}: {share} does not divide {size}, and what compute reads is split evenly ({text})",
        locations=(entry.location,),
        hints=tuple(
            MeshEdit(axis, tuple(n for n in range(1, size + 1) if size % n == 0 and n <= 1024)) for axis in live
        ),
    )
