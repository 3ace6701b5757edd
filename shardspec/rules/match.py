"""Match a table against a model's names, two-way and total, and turn its specs into layouts."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from attrs import define, field, frozen

from shardspec.diagnostics import Diagnostic, Location
from shardspec.layout import SUM, Digit, Layout, canonical
from shardspec.mesh import AXES, BATCH_AXES, Mesh, degree
from shardspec.rules.table import Rule, Rules
from shardspec.spec import Dim, P, Spec, SpecError, parse

STORAGE_AXES = ("fsdp", "ep", "cp")
"""Axes that divide how a parameter is stored; its rows are gathered before it is used."""


@frozen(eq=False)
class Entry:
    """A rule with its pattern compiled and its spec parsed."""

    rule: Rule
    regex: re.Pattern[str]
    spec: Spec

    @property
    def location(self) -> Location:
        return self.rule.location


@frozen(eq=False)
class MeshEdit:
    """Other sizes of one axis that may mend a mistake."""

    axis: str
    degrees: tuple[int, ...]


@frozen(eq=False)
class Table:
    """A parsed table."""

    rules: Rules
    params: tuple[Entry, ...]
    activations: tuple[Entry, ...]


@frozen
class Storage:
    """How a parameter's local rows are divided further: a dim, and axes major to minor."""

    dim: int = 0
    axes: tuple[str, ...] = ()


@frozen(eq=False)
class ParamClaim:
    """A parameter or buffer with its rule and what the rule says."""

    fqn: str
    entry: Entry
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    layout: Layout
    """As compute sees it: gathered over the storage axes."""
    storage: Storage
    requires_grad: bool = True


@define(eq=False)
class Sizes:
    """The size of each factor of a table, and where it was first seen."""

    known: dict[str, int] = field(factory=dict)
    place: dict[str, tuple[str, Location | None]] = field(factory=dict)


def parse_table(rules: Rules) -> tuple[Table, list[Diagnostic]]:
    """Compile patterns and parse specs; SS103 for what cannot be read, SS207 to SS209 for axes out of place."""
    found: list[Diagnostic] = []
    entries: dict[str, list[Entry]] = {"params": [], "activations": []}
    for rule in rules.rules:
        try:
            regex = re.compile(rule.pattern)
            spec = rule.value.spec() if isinstance(rule.value, P) else parse(rule.value)
        except re.error as error:
            found.append(
                Diagnostic(code="SS103", what=f"pattern cannot be read: {error}", locations=(rule.location,))
            )
            continue
        except SpecError as error:
            found.append(_bad_spec(rule, str(error)))
            continue
        problems = list(_check_axes(rule, spec))
        found += problems
        if not problems:
            entries[rule.kind].append(Entry(rule, regex, spec))
    return Table(rules, tuple(entries["params"]), tuple(entries["activations"])), found


def _bad_spec(rule: Rule, message: str) -> Diagnostic:
    advice: tuple[str, ...] = ()
    axis = re.search(r"unknown mesh axis '(\w+)'", message)
    if axis:
        near = difflib.get_close_matches(axis.group(1), AXES, n=1, cutoff=0.3)
        advice = (f"did you mean {near[0]}?",) if near else ()
    return Diagnostic(
        code="SS103", what=f"spec cannot be read: {message}", locations=(rule.location,), advice=advice
    )


def _check_axes(rule: Rule, spec: Spec) -> Iterator[Diagnostic]:
    for axis in sorted({axis for axis in spec.axes if spec.axes.count(axis) > 1}):
        yield Diagnostic(
            code="SS207",
            what=f"{axis} stands twice in one tensor",
            why=f"an axis splits one factor of a tensor, or is pending on it; here it stands {spec.axes.count(axis)} times",
            locations=(rule.location,),
        )
    forbidden = {"params": ("dp", "pp"), "activations": ("pp",)}[rule.kind]
    for axis in forbidden:
        if axis in spec.axes:
            reason = {
                "dp": "the ranks of dp are replicas; to split a parameter's storage over data ranks, write fsdp",
                "pp": "pp is never written: it comes from pipeline=",
            }[axis]
            what = "a parameter" if rule.kind == "params" else "an activation"
            yield Diagnostic(code="SS208", what=f"{axis} on {what}", why=reason, locations=(rule.location,))
    if rule.kind == "params":
        yield from _check_storage(rule, spec)


def _check_storage(rule: Rule, spec: Spec) -> Iterator[Diagnostic]:
    if spec.ellipsis is not None:
        yield Diagnostic(
            code="SS205",
            what="'...' in a parameter's spec",
            why="every dim of a parameter is named",
            locations=(rule.location,),
        )
    stored = [dim for dim in spec.dims if any(axis in STORAGE_AXES for axis in dim.all_axes)]
    if len(stored) > 1:
        yield Diagnostic(
            code="SS209",
            what="storage axes on two dims of one parameter",
            why=f"{' and '.join(map(str, stored))}: a parameter is stored in slices along one dim",
            locations=(rule.location,),
        )
    for dim in stored:
        axes = dim.all_axes
        kinds = [axis in STORAGE_AXES for axis in axes]
        inner = [axis for factor in dim.factors for axis in factor.axes if axis in STORAGE_AXES]
        if kinds != sorted(kinds):
            right = [axis for axis in axes if axis not in STORAGE_AXES] + [
                axis for axis in axes if axis in STORAGE_AXES
            ]
            yield Diagnostic(
                code="SS209",
                what=f"{axes[0]} before {right[0]} on one dim: storage is split after compute",
                why=f"fully_shard divides the rows that {right[0]} left to a rank, so the rows lie {', then '.join(right)}",
                locations=(rule.location,),
                advice=(f"write @({','.join(right)})",),
            )
        elif inner and len(dim.factors) > 1:
            yield Diagnostic(
                code="SS209",
                what=f"{inner[0]} inside a group: storage divides the whole dim",
                why=f"fully_shard cuts the rows of {dim} in consecutive slices and knows no factor",
                locations=(rule.location,),
                advice=("put the storage axis on the group: (...)@" + inner[0],),
            )
    for axis in spec.pending:
        if axis in STORAGE_AXES:
            yield Diagnostic(
                code="SS208",
                what=f"+{axis} on a parameter",
                why=f"{axis} only stores",
                locations=(rule.location,),
            )


def fold(name: str) -> str:
    """A name with its indices as `*`: names that differ in them alone are told of together."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def folded(names: Iterable[str]) -> dict[str, list[str]]:
    """Folded name -> the names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold(name), []).append(name)
    return groups


def as_pattern(folded_name: str) -> str:
    """A folded name as a regex."""
    return r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in folded_name.split("."))


def assign(
    entries: Sequence[Entry],
    names: Iterable[str],
    *,
    total: bool,
    what: str,
    alive: Callable[[Entry], bool] = lambda _: False,
) -> tuple[dict[str, Entry], list[Diagnostic]]:
    """Match names to entries.

    Args:
        total: every name must be claimed.
        what: how a message calls a name.
        alive: entries that may claim none of the names.

    Returns:
        name -> entry, and SS202 (unclaimed), SS203 (dead rule), SS204 (overlap).
    """
    names = list(names)
    claimed: dict[str, Entry] = {}
    used: set[int] = set()
    overlaps: dict[tuple[int, ...], list[str]] = {}
    unclaimed: list[str] = []
    for name in names:
        hits = [index for index, entry in enumerate(entries) if entry.regex.fullmatch(name)]
        used.update(hits)
        if len(hits) > 1:
            overlaps.setdefault(tuple(hits), []).append(name)
        elif hits:
            claimed[name] = entries[hits[0]]
        elif total:
            unclaimed.append(name)
    dead = [entry for index, entry in enumerate(entries) if index not in used and not alive(entry)]
    found = list(_overlaps(entries, overlaps, what))
    found += _unclaimed(unclaimed, dead, names, what)
    return claimed, found


def _overlaps(
    entries: Sequence[Entry], overlaps: Mapping[tuple[int, ...], list[str]], what: str
) -> Iterator[Diagnostic]:
    for hits, names in overlaps.items():
        yield Diagnostic(
            code="SS204",
            what=f"{len(hits)} rules claim {what} {names[0]}",
            why="a name belongs to one rule; there is no order among rules",
            locations=tuple(entries[index].location for index in hits),
            matches=_count(names),
        )


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} names: {names[0]} ..." if len(names) > 1 else names[0]


def _unclaimed(
    unclaimed: Sequence[str], dead: list[Entry], names: Sequence[str], what: str
) -> Iterator[Diagnostic]:
    """One message for a dead rule and the names that it was meant for, where the two look alike."""
    groups = folded(unclaimed)
    left = list(dead)
    for template, missed in groups.items():
        pattern = as_pattern(template)
        entry = _nearest(pattern, left)
        if entry is None:
            yield Diagnostic(
                code="SS202",
                what=f"no rule claims {what} {template}",
                why="replicated is written (a spec with no axis), never assumed",
                matches=_count(missed),
                advice=(f'add r"{pattern}": "..."',),
            )
            continue
        left.remove(entry)
        regex = re.compile(pattern)
        safe = all(regex.fullmatch(name) is None or name in missed for name in names)
        fix = f'r"{pattern}": "{entry.rule.value}"'
        yield Diagnostic(
            code="SS203",
            what=f"the rule matches nothing, and no rule claims {what} {template}",
            why=f"{len(names)} names were tried; the nearest are {_count(missed)}",
            locations=(entry.location,),
            fixes=(fix,) if safe and all(regex.fullmatch(name) for name in missed) else (),
        )
    for entry in left:
        near = difflib.get_close_matches(
            entry.rule.pattern, [as_pattern(name) for name in folded(names)], n=1, cutoff=0.5
        )
        yield Diagnostic(
            code="SS203",
            what="the rule matches nothing",
            why=f"{len(names)} names were tried",
            locations=(entry.location,),
            advice=(f'did you mean r"{near[0]}"?',) if near else ("drop it",),
        )


def _nearest(pattern: str, dead: Sequence[Entry]) -> Entry | None:
    scored = [(difflib.SequenceMatcher(None, pattern, entry.rule.pattern).ratio(), entry) for entry in dead]
    best = max(scored, key=lambda item: item[0], default=(0.0, None))
    return best[1] if best[0] > 0.7 else None


# From a spec to a layout.


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
    """The size of every factor that a claimed shape tells; SS206 for a name with two sizes or a literal that differs."""
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


def _two_sizes(
    text: str, product: int, length: int, name: str, entry: Entry, sizes: Sizes, dim: Dim
) -> Diagnostic:
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
        if storage and any(axis in STORAGE_AXES for axis in kept):
            stored = Storage(index, tuple(axis for axis in kept if axis in STORAGE_AXES))
        live = [axis for axis in kept if not (storage and axis in STORAGE_AXES)]
        digits, error = _digits(dim, length, live, known, mesh)
        if error and problem is None:
            problem = _uneven(entry, name, dim, error, mesh, live)
        dims.append(canonical(digits))
    pending = tuple(sorted((axis, SUM) for axis in entry.spec.pending if mesh[axis] > 1))
    return Layout(tuple(dims), pending), stored, problem


def _digits(
    dim: Dim, length: int, live: Sequence[str], known: Mapping[str, int], mesh: Mesh
) -> tuple[list[Digit], tuple[str, int, bool] | None]:
    """The digits of one dim, or the factor that does not divide with its size (and whether the size is known)."""
    if not live:
        return [length], None
    digits: list[Digit] = []
    rest = length
    group = [axis for axis in dim.axes if axis in live]
    last = max(
        (i for i, factor in enumerate(dim.factors) if any(axis in live for axis in factor.axes)), default=-1
    )
    if group:
        digits += group
        rest, left = divmod(rest, degree(mesh, tuple(group)))
        if left:
            return [length], (str(dim), length, True)
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
    return [*digits, rest], None


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
        hints=tuple(MeshEdit(axis, tuple(n for n in range(1, size + 1) if size % n == 0 and n <= 1024)) for axis in live),
    )


def unused_axes(table: Table, mesh: Mesh, pipelined: bool) -> Iterator[Diagnostic]:
    """SS210 for an axis larger than one that no rule names."""
    used = {axis for entry in (*table.params, *table.activations) for axis in entry.spec.axes}
    if pipelined:
        used.add("pp")
    for axis in mesh.axes:
        if axis not in used:
            yield Diagnostic(
                code="SS210",
                what=f"no rule uses the mesh axis {axis}={mesh[axis]}",
                why=f"its {mesh[axis]} ranks would do the same work {mesh[axis]} times",
                locations=(Location(file=table.rules.origin.file, line=table.rules.origin.line),),
            )


def idle_batch_axes(entries: Mapping[str, Entry], mesh: Mesh) -> Iterator[Diagnostic]:
    """SS213 for a batch axis that divides no batch entry."""
    for axis in mesh.axes:
        if axis in BATCH_AXES and entries and all(axis not in entry.spec.axes for entry in entries.values()):
            yield Diagnostic(
                code="SS213",
                what=f"{axis}={mesh[axis]} divides no batch entry",
                why=f"the ranks of {axis} are data ranks; all {mesh[axis]} would read the same rows",
                locations=tuple({entry.location: None for entry in entries.values()}),
                advice=(f"put {axis} on the batch factor of an entry",),
            )
