"""Match a table's patterns against names, two-way and total."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from shardspec.diagnostics import Diagnostic, Location
from shardspec.mesh import BATCH_AXES, Mesh
from shardspec.rules.parse import Entry, Table


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
    return f"{fold(names[0])} ({len(names)} names)" if len(names) > 1 else names[0]


def _unclaimed(unclaimed: Sequence[str], dead: list[Entry], names: Sequence[str], what: str) -> Iterator[Diagnostic]:
    """One message for a dead rule and the names that it was meant for, where the two look alike."""
    groups = folded(unclaimed)
    left = list(dead)
    for template, missed in groups.items():
        pattern = as_pattern(template)
        entry = _nearest(pattern, left) or next((each for each in left if each.regex.match(missed[0])), None)
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
            why=(
                f"{len(names)} names were tried; the nearest are {_count(missed)}"
                if not entry.regex.match(missed[0])
                else f"a pattern is matched whole, and {_count(missed)} goes on after it"
            ),
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
