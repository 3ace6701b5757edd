"""Apply a fix as a reader of the message would: by its text."""

import re
from collections.abc import Iterator

import attrs

import shardspec as ss
from tests.mutation.outcome import Mutant, Outcome

ENTRY = re.compile(r'r"(?P<pattern>[^"]*)": (?:"(?P<spec>[^"]*)"|ss\.(?P<bare>P\(.*?\))(?= \(was|$))')
DEGREES = re.compile(r"(\w+) in \{(.*)\}")
LARGEST = 4
"""Ranks that a mended mesh may have, to be run here."""


def mended(outcome: Outcome) -> Iterator[tuple[str, Mutant]]:
    """The fixes of a refusal with one diagnostic, each with the mutant that it makes."""
    if len(outcome.diagnostics) != 1:
        return
    (diagnostic,) = outcome.diagnostics
    for text in diagnostic.fixes:
        for changed in _applied(outcome.mutant, diagnostic, text):
            yield text, attrs.evolve(changed, mutator="a fix", text=f"{outcome.mutant.text}; then {text}")


def _applied(mutant: Mutant, diagnostic: ss.Diagnostic, text: str) -> Iterator[Mutant]:
    degrees = DEGREES.fullmatch(text)
    if degrees:
        for size in map(int, degrees[2].split(", ")):
            mesh = ss.Mesh.parse(mutant.mesh).replace(**{degrees[1]: size})
            if mesh.world <= LARGEST:
                yield attrs.evolve(mutant, mesh=",".join(f"{axis}={mesh[axis]}" for axis in mesh.axes))
        return
    rules = mutant.rules
    if text.startswith("drop "):
        yield attrs.evolve(mutant, rules=rules.override(drop=[text.removeprefix('drop r"').removesuffix('"')]))
        return
    entries = {match["pattern"]: _value(match) for match in ENTRY.finditer(text.partition(" (was ")[0])}
    assert entries, f"a fix that cannot be read: {text}"
    added = re.match(r"add to (\w+): ", text)
    if added:
        yield attrs.evolve(mutant, rules=rules.override(**{added[1]: entries}))
        return
    known = {rule.pattern: rule.kind for rule in rules.rules}
    first = next(iter(entries))
    if first in known:
        yield attrs.evolve(mutant, rules=rules.override(**{known[first]: entries}))
        return
    # A pattern that the table does not have is another one's, which the message shows, written right.
    (dead,) = [rule for rule in rules.rules if f'r"{rule.pattern}"' in diagnostic.locations[0].text]
    yield attrs.evolve(mutant, rules=rules.override(drop=[dead.pattern], **{dead.kind: entries}))


def _value(match: re.Match[str]) -> str | ss.P:
    if match["bare"] is None:
        return match["spec"]
    return eval(match["bare"], {"P": ss.P})
