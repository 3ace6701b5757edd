"""Parse a table: compile its patterns, read its specs, and refuse axes that stand where they cannot."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import define, evolve, field, frozen

from shardspec.diagnostics import Diagnostic, Location
from shardspec.layout import Layout
from shardspec.mesh import AXES
from shardspec.rules.table import Rule, Rules
from shardspec.spec import P, Spec, SpecError, parse

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
class RuleEdit:
    """A change of the table that may mend a mistake."""

    text: str
    params: Mapping[str, str | P] = field(factory=dict)
    activations: Mapping[str, str | P] = field(factory=dict)
    drop: tuple[str, ...] = ()


def change(entry: Entry, spec: Spec) -> RuleEdit:
    """Give an entry another spec, written as its own is."""
    pattern, old = entry.rule.pattern, entry.rule.value
    new = str(spec) if isinstance(old, str) else P(*(_bare(dim.all_axes) for dim in spec.dims))
    words = f'r"{pattern}": {quoted(new)} (was {quoted(old)})'
    return RuleEdit(words, *(({pattern: new}, {}) if entry.rule.kind == "params" else ({}, {pattern: new})))


def quoted(value: str | P) -> str:
    """A spec as it stands in a table."""
    return f'"{value}"' if isinstance(value, str) else f"ss.{value!r}"


def _bare(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes if len(axes) > 1 else axes[0] if axes else None


def without_axes(spec: Spec, gone: Sequence[str]) -> Spec:
    """The spec with axes taken off."""

    def drop(axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in axes if name not in gone)

    dims = tuple(
        evolve(dim, factors=tuple(evolve(f, axes=drop(f.axes)) for f in dim.factors), axes=drop(dim.axes))
        for dim in spec.dims
    )
    return evolve(spec, dims=dims, pending=drop(spec.pending))


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
    expert: bool = False
    """Whether its dim 0 is of experts, which ep lays out."""


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
        if not isinstance(rule.value, (str, P)):
            found.append(_no_spec(rule))
            continue
        try:
            regex = re.compile(rule.pattern)
            spec = rule.value.spec() if isinstance(rule.value, P) else parse(rule.value)
        except re.error as error:
            found.append(
                Diagnostic(
                    code="SS103",
                    what=f"pattern cannot be read: {error}",
                    why="a pattern is a Python regex, matched whole against a name",
                    locations=(rule.location,),
                )
            )
            continue
        except SpecError as error:
            found.append(_bad_spec(rule, str(error)))
            continue
        problems = list(_check_axes(rule, spec, stacked=rules.experts is not None))
        found += problems
        if not problems:
            entries[rule.kind].append(Entry(rule, regex, spec))
    return Table(rules, tuple(entries["params"]), tuple(entries["activations"])), found


def _no_spec(rule: Rule) -> Diagnostic:
    entries = ", ".join(map(repr, rule.value)) if isinstance(rule.value, tuple) else ""
    return Diagnostic(
        code="SS103",
        what=f"{rule.value!r} is no spec",
        why="a spec is a string with a factor for each dim, or ss.P(...) with an axis or None for each",
        locations=(rule.location,),
        advice=(f"write ss.P({entries})" if entries else 'write "D" for one whole dim, "" for a scalar',),
    )


def _bad_spec(rule: Rule, message: str) -> Diagnostic:
    advice: tuple[str, ...] = ()
    axis = re.search(r"unknown mesh axis '(\w+)'", message)
    if axis:
        near = difflib.get_close_matches(axis.group(1), AXES, n=1, cutoff=0.3)
        advice = (f"did you mean {near[0]}?",) if near else ()
    return Diagnostic(
        code="SS103",
        what=f"spec cannot be read: {message}",
        why="a spec names a factor for each dim, with @axis or @(axis,axis) on what is split",
        locations=(rule.location,),
        advice=advice,
    )


def _check_axes(rule: Rule, spec: Spec, *, stacked: bool) -> Iterator[Diagnostic]:
    for axis in sorted({axis for axis in spec.axes if spec.axes.count(axis) > 1}):
        yield Diagnostic(
            code="SS207",
            what=f"{axis} stands twice in one tensor",
            why=f"an axis splits one factor of a tensor; here it stands {spec.axes.count(axis)} times",
            locations=(rule.location,),
        )
    yield from _check_sums(rule, spec)
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
        yield from check_storage(rule, as_stored(spec) if stacked else spec)


def _check_sums(rule: Rule, spec: Spec) -> Iterator[Diagnostic]:
    """SS207 for an axis that splits a whole direct sum whose parts are split, other than for storage."""
    for dim in spec.dims:
        storing = STORAGE_AXES if rule.kind == "params" else ()
        inner = dim.all_axes[: len(dim.all_axes) - len(dim.axes)] if dim.counts else ()
        outer = [axis for axis in dim.axes if axis not in storing]
        if inner and outer:
            yield Diagnostic(
                code="SS207",
                what=f"{outer[0]} splits a direct sum whose parts are split over {', '.join(inner)}",
                why=f"consecutive rows of what {', '.join(inner)} left end anywhere in a part; only how a parameter is "
                "stored may be divided so",
                locations=(rule.location,),
                advice=(f"put {outer[0]} on a factor of every part",),
            )


def as_stored(spec: Spec) -> Spec:
    """The spec of an expert weight without the ep that lays its experts out, for the rest says how it is stored."""
    if not spec.dims or spec.dims[0].all_axes[:1] != ("ep",):
        return spec
    return evolve(spec, dims=(*without_axes(evolve(spec, dims=spec.dims[:1]), ("ep",)).dims, *spec.dims[1:]))


def check_storage(rule: Rule, spec: Spec) -> Iterator[Diagnostic]:
    """SS205, SS208 and SS209 for a parameter's spec that no storage fits."""
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
            advice=("where dim 0 is of experts, name their module in experts=: ep then says which rank has which",)
            if stored[0] is spec.dims[0] and stored[0].all_axes[0] == "ep"
            else (),
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
                why=f"fully_shard divides the rows that {right[0]} left: they lie {', then '.join(right)}",
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
