"""Match a table's patterns against names, two-way and total."""

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from shardspec.diagnostics import Diagnostic, Location
from shardspec.mesh import BATCH_AXES, Mesh
from shardspec.names import fold
from shardspec.rules.parse import Entry, RuleEdit, Table, quoted


def folded(names: Iterable[str]) -> dict[str, list[str]]:
    """Folded name -> the names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold(name), []).append(name)
    return groups


def as_pattern(folded_name: str) -> str:
    """A folded name as a regex."""
    return re.escape(folded_name).replace(r"\*", r"\d+")


def assign(
    entries: Sequence[Entry],
    names: Iterable[str],
    *,
    needed: Callable[[str], bool] = lambda _: True,
    what: Callable[[str], str],
    alive: Callable[[Entry], bool] = lambda _: False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    place: Location | None = None,
    elsewhere: Callable[[], Iterable[str]] = tuple,
    ties: Mapping[str, str] | None = None,
) -> tuple[dict[str, Entry], list[Diagnostic]]:
    """Match names to entries.

    Args:
        needed: names that must be claimed.
        what: how a message calls a name: "parameter", "batch entry".
        alive: entries that may claim none of the names.
        shapes: of the names, where they are known: what a rule of another name might say is then tried.
        place: where the table is made.
        elsewhere: names that the other part of the table is matched against.
        ties: name -> the first name of the same tensor, which is laid out alike.

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
        elif needed(name):
            unclaimed.append(name)
    dead = [entry for index, entry in enumerate(entries) if index not in used and not alive(entry)]
    found = list(_overlaps(entries, overlaps, what))
    lost = folded(unclaimed)
    for template in list(lost):
        entry = _meant(template, lost[template], dead)
        if entry is not None:
            dead.remove(entry)
            found.append(_misspelt(entry, template, lost.pop(template), names, what))
    if lost:
        tied = {template: ties[group[0]] for template, group in lost.items() if group[0] in ties} if ties else {}
        like = [*_alike(tied, claimed), *_like(lost, claimed, shapes or {})] if len(lost) == 1 else []
        found.append(_unclaimed(lost, what, like, tied, place))
    free = [name for name in names if name not in claimed]
    found += [_dead(entry, names, free, elsewhere) for entry in dead]
    return claimed, found


def _overlaps(
    entries: Sequence[Entry], overlaps: Mapping[tuple[int, ...], list[str]], what: Callable[[str], str]
) -> Iterator[Diagnostic]:
    """One message for rules that overlap, directly or through others."""
    groups: list[tuple[set[int], list[str]]] = []
    for hits, names in overlaps.items():
        touching = [group for group in groups if group[0] & set(hits)]
        rest = [group for group in groups if not group[0] & set(hits)]
        merged = set(hits).union(*(group[0] for group in touching))
        groups = [*rest, (merged, [name for group in touching for name in group[1]] + names)]
    for hits, names in groups:
        together = [entries[index] for index in sorted(hits)]
        several = f"{len(names)} names, {names[0]} first" if len(names) > 1 else names[0]
        yield Diagnostic(
            code="SS204",
            what=f"2 rules claim {what(names[0])} {names[0]}"
            if len(together) == 2
            else f"{len(together)} rules overlap: more than one claims {what(names[0])} {names[0]}",
            why="a name belongs to one rule; there is no order among rules",
            locations=tuple(entry.location for entry in together),
            matches=several,
            hints=tuple(
                RuleEdit(f'drop r"{entry.rule.pattern}"', drop=(entry.rule.pattern,)) for entry in reversed(together)
            ),
        )


def _count(names: Sequence[str]) -> str:
    return f"{fold(names[0])} ({len(names)} names)" if len(names) > 1 else names[0]


def _meant(template: str, missed: Sequence[str], dead: Sequence[Entry]) -> Entry | None:
    """The dead rule that was meant for names: one that reads alike, or that the names begin with."""
    return _nearest(as_pattern(template), dead) or next((entry for entry in dead if entry.regex.match(missed[0])), None)


def _misspelt(
    entry: Entry, template: str, missed: Sequence[str], names: Sequence[str], what: Callable[[str], str]
) -> Diagnostic:
    """SS203 for a dead rule together with the names that it was meant for."""
    pattern = as_pattern(template)
    begins = entry.regex.match(missed[0]) is not None
    renamed = {pattern: entry.rule.value}
    params, activations = (renamed, {}) if entry.rule.kind == "params" else ({}, renamed)
    return Diagnostic(
        code="SS203",
        what=f"the rule matches nothing, and no rule claims {what(missed[0])} {template}",
        why=(
            f"a pattern is matched whole, and {_count(missed)} goes on after it"
            if begins
            else f"{len(names)} names were tried; the nearest are {_count(missed)}"
        ),
        locations=(entry.location,),
        advice=(f'did you mean r"{pattern}"?',),
        hints=(RuleEdit(f'r"{pattern}": {quoted(entry.rule.value)}', params, activations, (entry.rule.pattern,)),),
    )


def _like(
    lost: Mapping[str, list[str]], claimed: Mapping[str, Entry], shapes: Mapping[str, Sequence[int]]
) -> Iterator[RuleEdit]:
    """What other names of the same rank are laid out as, for names that no rule claims."""
    for template, missed in lost.items() if shapes else ():
        alike = [
            entry for name, entry in claimed.items() if len(shapes.get(name, ())) == len(shapes.get(missed[0], ()))
        ]
        for entry in {entry.rule.value: entry for entry in alike}.values() if missed[0] in shapes else ():
            yield _added(template, entry)


def _alike(tied: Mapping[str, str], claimed: Mapping[str, Entry]) -> Iterator[RuleEdit]:
    """The rule of a tensor's first name for another name of it."""
    return (_added(template, claimed[first]) for template, first in tied.items() if first in claimed)


def _added(template: str, entry: Entry) -> RuleEdit:
    """A rule for a folded name that says what another rule says."""
    pattern, value, kind = as_pattern(template), entry.rule.value, entry.rule.kind
    rule = {pattern: value}
    text = f'add to {kind}: r"{pattern}": {quoted(value)}'
    return RuleEdit(text, *((rule, {}) if kind == "params" else ({}, rule)))


def _unclaimed(
    lost: Mapping[str, list[str]],
    what: Callable[[str], str],
    like: Iterable[RuleEdit],
    tied: Mapping[str, str],
    place: Location | None,
) -> Diagnostic:
    """SS202, once for all the names."""
    first = next(iter(lost.values()))[0]
    kinds = f"{what(first)} {next(iter(lost))}"
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    patterns = [f'r"{as_pattern(template)}"' for template in lost]
    part = "params" if what(first) in ("parameter", "buffer") else "activations"
    return Diagnostic(
        code="SS202",
        what=f"no rule claims {kinds}{more}",
        why="replicated is written (a spec with no axis), never assumed"
        + "".join(f"\n{template} is {other} under another name" for template, other in tied.items()),
        locations=(place,) if place else (),
        matches=", ".join(map(_count, lost.values())),
        advice=tuple(f"add a rule to {part} for {pattern}" for pattern in patterns[:MOST_PATTERNS]),
        hints=tuple(itertools.islice(like, MOST_PATTERNS)),
    )


MOST_PATTERNS = 6
"""How many rules a message asks for, or tries."""


def _dead(
    entry: Entry, names: Sequence[str], free: Sequence[str], elsewhere: Callable[[], Iterable[str]]
) -> Diagnostic:
    """SS203 for a rule that claims nothing, and that no unclaimed name needs."""
    pattern = entry.rule.pattern
    near = difflib.get_close_matches(pattern, [as_pattern(name) for name in folded(free)], n=1, cutoff=0.5)
    renamed = {near[0]: entry.rule.value} if near else {}
    edits = [RuleEdit(f'drop r"{pattern}"', drop=(pattern,))]
    if near:
        text = f'r"{near[0]}": {quoted(entry.rule.value)}'
        edits.insert(0, RuleEdit(text, *((renamed, {}) if entry.rule.kind == "params" else ({}, renamed)), (pattern,)))
    other = "activations" if entry.rule.kind == "params" else "params"
    misplaced = next((f"\n{name} is a name of {other}" for name in elsewhere() if entry.regex.fullmatch(name)), "")
    return Diagnostic(
        code="SS203",
        what=f"the rule of {entry.rule.kind} matches nothing" if misplaced else "the rule matches nothing",
        why=f"{len(names)} names were tried{misplaced}",
        locations=(entry.location,),
        advice=(f'did you mean r"{near[0]}"?',) if near else (f"move it to {other}",) if misplaced else ("drop it",),
        hints=tuple(edits),
    )


def _nearest(pattern: str, dead: Sequence[Entry]) -> Entry | None:
    scored = [(difflib.SequenceMatcher(None, pattern, entry.rule.pattern).ratio(), entry) for entry in dead]
    best = max(scored, key=lambda item: item[0], default=(0.0, None))
    return best[1] if best[0] > 0.7 else None


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
                locations=(table.rules.location,),
                advice=(f"split something over {axis} in a rule, or leave {axis} out of the mesh",),
            )


def unknown_sizes(table: Table) -> Iterator[Diagnostic]:
    """SS211 for a factor that `sizes=` tells and no rule has, or a size that is no length."""
    specs = [entry.spec for entry in (*table.params, *table.activations)]
    factors = {factor.name for spec in specs for dim in spec.dims for factor in dim.factors}
    for factor, size in table.rules.sizes.items():
        whole = type(size) is int and size >= 1
        if factor in factors and whole:
            continue
        near = difflib.get_close_matches(factor, sorted(factors), n=1)
        yield Diagnostic(
            code="SS211",
            what=f"sizes: no rule has a factor {factor}" if whole else f"sizes: {factor} is {size!r}",
            why="sizes= tells the lengths of factors that the rules name: whole numbers of at least 1",
            locations=(table.rules.location,),
            advice=(f"did you mean {near[0]}?",) if near and whole else (),
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
