"""Fit specs to shapes: the sizes of factors, and the layout that a spec gives a tensor."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve

from shardspec.constraints import Constraint
from shardspec.diagnostics import Diagnostic, Location
from shardspec.layout import SUM, Digit, DimLayout, Layout, canonical, local_size
from shardspec.mesh import Mesh, degree
from shardspec.rules.parse import STORAGE_AXES, Entry, MeshEdit, RuleEdit, Sizes, Storage, change
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
    claims: Iterable[tuple[str, Entry, Sequence[int]]],
    given: Mapping[str, int],
    places: Mapping[str, tuple[str, Location | None]] | None = None,
) -> tuple[Sizes, list[Diagnostic]]:
    """The size of every factor that a claimed shape tells; SS206 for a name with two, or another literal.

    Where shapes tell different sizes of a name, the one is meant that most rules tell.

    Args:
        given: sizes that are known, by `sizes=` or, where `places` tells, by a rule.
    """
    sizes = Sizes(dict(given), {name: (places or {}).get(name, ("sizes=", None)) for name in given})
    told: dict[str, dict[int, dict[Entry, str]]] = {}
    groups: dict[tuple[Entry, int, int], tuple[str, Entry, Dim, int]] = {}
    shapes: dict[Entry, Sequence[int]] = {}
    found: dict[object, Diagnostic] = {}
    for name, entry, shape in claims:
        shapes.setdefault(entry, shape)
        for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
            if len(dim.factors) > 1:
                groups.setdefault((entry, index, length), (name, entry, dim, length))
            elif dim.factors and dim.factors[0].name:
                told.setdefault(dim.factors[0].name, {}).setdefault(length, {}).setdefault(entry, name)
            elif dim.factors and dim.factors[0].size not in (None, length):
                found[entry, index] = _another_literal(entry, dim, name, length)
    clashes: dict[Entry, list[tuple[str, int, str]]] = {}
    for factor, lengths in told.items():
        if factor not in sizes.known:
            length = max(lengths, key=lambda length: len(lengths[length]))
            entry, name = next(iter(lengths[length].items()))
            sizes.known[factor], sizes.place[factor] = length, (name, entry.location)
        for length, entries in lengths.items():
            for entry, name in entries.items() if length != sizes.known[factor] else ():
                clashes.setdefault(entry, []).append((factor, length, name))
    _learn_groups(groups.values(), sizes, found)
    found.update((entry, _clash(entry, listed, shapes[entry], sizes)) for entry, listed in clashes.items())
    return sizes, list(found.values())


def _learn_groups(
    groups: Iterable[tuple[str, Entry, Dim, int]],
    sizes: Sizes,
    found: dict[object, Diagnostic],
) -> None:
    """The sizes of factors inside groups, where all but one of a group are known."""
    for _ in range(2):
        for name, entry, dim, length in groups:
            product, unknown = 1, []
            for factor in dim.factors:
                size = factor.size or sizes.known.get(factor.name)
                if size is None:
                    unknown.append(factor.name)
                else:
                    product *= size
            if (not unknown and product != length) or (len(unknown) == 1 and length % product):
                text = f"({' '.join(map(str, dim.factors))})"
                found[entry, dim] = _two_sizes(text, product, length, name, entry, sizes, dim)
            elif len(unknown) == 1:
                sizes.known[unknown[0]] = length // product
                sizes.place[unknown[0]] = (name, entry.location)


def _another_literal(entry: Entry, dim: Dim, name: str, length: int) -> Diagnostic:
    return Diagnostic(
        code="SS206",
        what=f"the spec says {dim.factors[0].size}, the dim has {length}",
        why=f"{entry.spec} against {name}",
        locations=(entry.location,),
    )


def _clash(entry: Entry, listed: Sequence[tuple[str, int, str]], shape: Sequence[int], sizes: Sizes) -> Diagnostic:
    """SS206 for an entry that gives names other sizes than the rest of the table."""
    parts = [f"{factor} has two sizes: {sizes.known[factor]} and {length}" for factor, length, _ in listed]
    reasons = [
        f"{factor} is {sizes.known[factor]} by {sizes.place[factor][0]}, {length} by {name}"
        for factor, length, name in listed
    ]
    places = [sizes.place[factor][1] for factor, _, _ in listed]
    return Diagnostic(
        code="SS206",
        what="; ".join(parts),
        why="\n".join([*reasons, "a name has one size in a table"]),
        locations=tuple(dict.fromkeys(place for place in (entry.location, *places) if place is not None)),
        advice=("give one of the two another name",) if len(listed) == 1 else (),
        hints=tuple(_other_specs(entry, shape, sizes)),
    )


def _other_specs(entry: Entry, shape: Sequence[int], sizes: Sizes) -> Iterator[RuleEdit]:
    """The spec with its dims in another order, or with other names, where the sizes then fit the shape."""
    spec = entry.spec
    if spec.ellipsis is not None or len(spec.dims) != len(shape) or len(shape) > 4:
        return

    def fits(dim: Dim, length: int) -> bool:
        return len(dim.factors) != 1 or sizes.known.get(dim.factors[0].name, length) == length

    for dims in itertools.permutations(spec.dims):
        if dims != spec.dims and all(map(fits, dims, shape)):
            yield change(entry, evolve(spec, dims=dims))
    used = {factor.name for dim in spec.dims for factor in dim.factors}
    choices = [
        [dim]
        if fits(dim, length)
        else [
            evolve(dim, factors=(evolve(dim.factors[0], name=name),))
            for name, size in sizes.known.items()
            if size == length and name not in used
        ]
        for dim, length in zip(spec.dims, shape, strict=True)
    ]
    for dims in itertools.islice(itertools.product(*choices), 4):
        yield change(entry, evolve(spec, dims=dims))


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
                problem = _uneven(entry, name, dim, (str(dim), length, True), mesh, [*live, *stored.axes], storage=True)
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
        size = rest if size is None or len(dim.factors) == 1 else size
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
    entry: Entry,
    name: str,
    dim: Dim,
    error: tuple[str, int, bool],
    mesh: Mesh,
    live: Sequence[str],
    *,
    storage: bool = False,
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
    own = [axis for other in dim.factors if other.name == factor for axis in other.axes if axis in live] or live
    share = degree(mesh, tuple(own))
    must = "what compute reads is split evenly"
    if storage:
        must = "only rows along the first dim, over one axis, are stored unevenly"
    return Diagnostic(
        code="SS301",
        what=f"{factor} of {size} cannot be split over {' x '.join(f'{axis}={mesh[axis]}' for axis in own)}",
        why=f"{name}: {share} does not divide {size}, and {must}",
        locations=(entry.location,),
        hints=tuple(
            MeshEdit(axis, tuple(n for n in range(1, size + 1) if size % n == 0 and n <= 1024)) for axis in own
        ),
    )
