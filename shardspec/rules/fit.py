"""Fit specs to shapes: the sizes of factors, and the layout that a spec gives a tensor."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attrs import evolve

from shardspec.constraints import Constraint
from shardspec.diagnostics import Diagnostic, Location
from shardspec.layout import SUM, Digit, DimLayout, Layout, canonical, direct_sum, local_size
from shardspec.mesh import Mesh, degree
from shardspec.rules.parse import STORAGE_AXES, Entry, MeshEdit, RuleEdit, Sizes, Storage, change
from shardspec.spec import Dim, Factor, Spec


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
    hints: Mapping[str, int] | None = None,
) -> tuple[Sizes, list[Diagnostic]]:
    """The size of every factor that a claimed shape tells; SS206 for a name with two, or another literal.

    Where shapes tell different sizes of a name, the one is meant that most rules tell.

    Args:
        given: sizes that are known, by `sizes=` or, where `places` tells, by a rule.
        hints: sizes of factors of direct sums that nothing else tells: by `attributes=`.
    """
    sizes = Sizes(dict(given), {name: (places or {}).get(name, ("sizes=", None)) for name in given})
    told: dict[str, dict[int, dict[Entry, str]]] = {}
    groups: dict[tuple[Entry, int, int], tuple[str, Entry, Dim, int]] = {}
    shapes: dict[Entry, Sequence[int]] = {}
    found: dict[object, Diagnostic] = {}
    for name, entry, shape in claims:
        shapes.setdefault(entry, shape)
        for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
            if len(dim.factors) > 1 or dim.counts:
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
    summed = [factor.name for _, _, dim, _ in groups.values() if dim.counts for factor in dim.factors]
    told_late = {name: (hints or {})[name] for name in summed if name in (hints or {}) and name not in sizes.known}
    if told_late:
        sizes.known.update(told_late)
        sizes.place.update(dict.fromkeys(told_late, ("attributes=", None)))
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
            unknown = {factor.name for factor in dim.factors if _size(factor, sizes.known) is None}
            if len(unknown) > 1:
                continue
            # The factors make up `fixed`, and `each` for each one of the factor that is not known.
            missing = next(iter(unknown), "")
            fixed, each = _terms(dim, missing, sizes.known)
            if (not missing and fixed != length) or (missing and each and (length <= fixed or (length - fixed) % each)):
                found[entry, dim] = _two_sizes(str(evolve(dim, axes=())), fixed, each, length, name, entry, sizes, dim)
            elif missing and each:
                sizes.known[missing] = (length - fixed) // each
                sizes.place[missing] = (name, entry.location)


def _size(factor: Factor, known: Mapping[str, int]) -> int | None:
    return factor.size if factor.size is not None else known.get(factor.name)


def _terms(dim: Dim, missing: str, known: Mapping[str, int]) -> tuple[int, int]:
    """What the parts of a dim that lack the missing factor add up to, and what those that have it do without it: the
    dim's length is the first plus the second times the factor. Both are 0 where a part has it twice."""
    fixed = each = 0
    for part in dim.parts:
        product = 1
        for factor in part:
            product *= 1 if factor.name == missing and factor.size is None else _size(factor, known) or 0
        times = sum(factor.name == missing for factor in part if factor.size is None)
        if times > 1:
            return 0, 0
        fixed, each = (fixed, each + product) if times else (fixed + product, each)
    return fixed, each


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


def _two_sizes(
    text: str, fixed: int, each: int, length: int, name: str, entry: Entry, sizes: Sizes, dim: Dim
) -> Diagnostic:
    named = dict.fromkeys(factor.name for factor in dim.factors if factor.name in sizes.known)
    parts = ", ".join(f"{factor} is {sizes.known[factor]}" for factor in named)
    made = f"{fixed} and a multiple of {each} do not make up" if fixed and each else f"{fixed or each} does not fit"
    return Diagnostic(
        code="SS206",
        what=f"the factors of {text} do not make up {length}",
        why=f"{parts}: {made} the {length} of {name}",
        locations=(entry.location,),
    )


def layout_of(
    entry: Entry,
    name: str,
    shape: Sequence[int],
    known: Mapping[str, int],
    mesh: Mesh,
    *,
    storage: bool,
    expert: bool = False,
) -> tuple[Layout, Storage, Diagnostic | None]:
    """The layout that an entry gives a tensor of `shape`; storage axes are left out of it and told apart.

    Args:
        expert: it is the weight of an experts module: on dim 0, ep is no storage.
    """
    dims: list[tuple[Digit, ...]] = []
    stored = Storage()
    problem: Diagnostic | None = None
    for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
        kept = [axis for axis in dim.all_axes if mesh[axis] > 1]
        storing = storage_axes(index, storage=storage, expert=expert)
        live = [axis for axis in kept if axis not in storing]
        digits, error = _digits(dim, length, live, known, mesh)
        if error and problem is None:
            problem = _uneven(entry, name, dim, error, mesh, live)
        dims.append(canonical(digits))
        if any(axis in storing for axis in kept):
            stored = Storage(index, tuple(axis for axis in kept if axis in storing))
            if problem is None and uneven_storage(stored, local_size(dims[-1]), mesh):
                problem = _uneven(entry, name, dim, (str(dim), length, True), mesh, [*live, *stored.axes], storage=True)
    pending = tuple(sorted((axis, SUM) for axis in entry.spec.pending if mesh[axis] > 1))
    return Layout(tuple(dims), pending), stored, problem


def storage_axes(dim: int, *, storage: bool, expert: bool) -> tuple[str, ...]:
    """The axes that on a dim say only how a tensor is stored: none where it is not stored, as activations are not."""
    if not storage:
        return ()
    return tuple(axis for axis in STORAGE_AXES if axis != "ep" or dim != 0) if expert else STORAGE_AXES


def uneven_storage(stored: Storage, rows: int, mesh: Mesh) -> bool:
    """Whether FSDP2 cannot store the rows: only along dim 0, and over one axis, does it pad uneven ones."""
    return (stored.dim != 0 or len(stored.axes) > 1) and rows % degree(mesh, stored.axes) != 0


def divisors(
    entry: Entry,
    name: str,
    shape: Sequence[int],
    known: Mapping[str, int],
    mesh: Mesh,
    *,
    storage: bool,
    expert: bool = False,
) -> Iterator[Constraint]:
    """What must divide what for `layout_of` to give a layout, whatever the sizes of the axes."""
    for index, (dim, length) in enumerate(zip(dims_of(entry.spec, len(shape)), shape, strict=True)):
        kept = tuple(axis for axis in dim.all_axes if mesh[axis] > 1)
        storing = storage_axes(index, storage=storage, expert=expert)
        live = tuple(axis for axis in kept if axis not in storing)
        place = entry.location
        for factor in dim.factors:
            own = tuple(axis for axis in factor.axes if axis in live)
            size = length if len(dim.factors) == 1 else _size(factor, known)
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
    if dim.counts and any(axis in live for axis in dim.all_axes if axis not in dim.axes):
        return _sum_digits(dim, length, live, known, mesh)
    digits: list[Digit] = []
    rest = length
    # Where no part of a direct sum is split, its axes split it as one run of rows.
    factors = () if dim.counts else dim.factors
    last = max((i for i, factor in enumerate(factors) if any(axis in live for axis in factor.axes)), default=-1)
    for index, factor in enumerate(factors[: last + 1]):
        axes = tuple(axis for axis in factor.axes if axis in live)
        size = _size(factor, known)
        if size is None and index < last:
            return [length], (factor.name, 0, False)
        size = rest if size is None or len(factors) == 1 else size
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


def _sum_digits(
    dim: Dim, length: int, live: Sequence[str], known: Mapping[str, int], mesh: Mesh
) -> tuple[list[Digit], tuple[str, int, bool] | None]:
    """The digits of a direct sum whose parts are split: of each part, one after another."""
    parts: list[DimLayout] = []
    for factors in dim.parts:
        whole = 1
        for factor in factors:
            size = _size(factor, known)
            if size is None:
                return [length], (factor.name, 0, False)
            whole *= size
        digits, error = _digits(Dim(factors, grouped=True), whole, live, known, mesh)
        if error:
            return [length], error
        parts.append(canonical(digits))
    return list(direct_sum(parts)), None


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
            why=f"{name}: "
            + (
                "the factors of a direct sum need a size"
                if dim.counts
                else "the factors before the split one need a size"
            ),
            locations=(entry.location,),
            advice=(f'give sizes={{"{factor}": ...}} in the table',),
        )
    named = (axis for other in dim.factors if other.name == factor for axis in other.axes if axis in live)
    own = list(dict.fromkeys(named)) or live
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
