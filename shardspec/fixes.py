"""Try the edits that a diagnostic hints at: those that mend the mistake, and bring no other, are its fixes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from attrs import define, evolve

from shardspec.diagnostics import Diagnostic
from shardspec.mesh import Mesh
from shardspec.rules.parse import MeshEdit, RuleEdit
from shardspec.rules.table import Rules


@define(eq=False)
class Attempt:
    """One check, to be repeated with an edit: what it finds then decides whether the edit is a fix."""

    rules: Rules
    mesh: Mesh
    check: Callable[[Rules, Mesh], Iterable[Diagnostic]]
    """What the check finds with other rules or another mesh."""
    confirm: Callable[[Rules, Mesh], bool]
    """Whether the whole compilation passes with other rules or on another mesh."""
    wanted: bool = True
    """Whether anybody will read the fixes."""

    def fixed(self, found: Iterable[Diagnostic]) -> list[Diagnostic]:
        """The diagnostics with those hints as fixes that passed; what one fix mends is told once."""
        left = merged(found)
        if not self.wanted:
            return left
        before = {identity(each) for each in left}
        told: list[Diagnostic] = []
        mended: set[Any] = set()
        for each in left:
            if identity(each) in mended:
                continue
            passing = self._best(each, before)
            fixes = tuple(dict.fromkeys((*each.fixes, *(text for text, _ in passing))))
            if passing:
                mended |= passing[0][1]
            told.append(evolve(each, hints=(), fixes=fixes, advice=() if fixes else each.advice))
        return told

    def _best(self, diagnostic: Diagnostic, before: set[Any]) -> list[tuple[str, set[Any]]]:
        """The fixes that mend most; one that leaves no mistake must pass the later stages too.

        What the first mends is told once: one that mends less would leave a mistake that nobody was told of.
        """
        best: list[tuple[str, set[Any]]] = []
        partial: list[tuple[str, set[Any]]] = []
        for text, mends, edit in self._passing(diagnostic, before):
            if mends < before:
                partial.append((text, mends))
            elif self._confirmed(edit):
                best.append((text, mends))
                if len(best) == MOST_FIXES:  # none mends more: the other hints need not be tried
                    return best
        most = max(partial, key=lambda fix: len(fix[1]), default=None)
        if best or most is None:
            return best
        return [most, *(fix for fix in partial if fix is not most and fix[1] >= most[1])][:MOST_FIXES]

    def _confirmed(self, edit: RuleEdit | None) -> bool:
        return edit is None or self.confirm(self._edited(edit), self.mesh)

    def _edited(self, edit: RuleEdit) -> Rules:
        return self.rules.override(params=edit.params, activations=edit.activations, drop=edit.drop)

    def _passing(self, diagnostic: Diagnostic, before: set[Any]) -> Iterator[tuple[str, set[Any], RuleEdit | None]]:
        """The hints that mend a mistake and bring no other, with all the mistakes that they mend."""
        own = identity(diagnostic)
        for hint in diagnostic.hints:
            if isinstance(hint, MeshEdit):
                after = {n: self.finds(self.rules, self.mesh.replace(**{hint.axis: n})) for n in hint.degrees}
                legal = [n for n, left in after.items() if left <= before - {own}]
                if legal:
                    mends = before - set[Any]().union(*(after[n] for n in legal))
                    yield f"{hint.axis} in {{{', '.join(map(str, legal))}}}", mends, None
                continue
            after_edit = self.finds(self._edited(hint), self.mesh)
            if after_edit <= before - {own}:
                yield hint.text, before - after_edit, hint

    def finds(self, rules: Rules, mesh: Mesh) -> set[Any]:
        """The mistakes that are left with an edit."""
        return {identity(each) for each in merged(self.check(rules, mesh))}


MOST_FIXES = 2
"""Fixes told of one mistake: each is a compilation of its own."""


def identity(diagnostic: Diagnostic) -> Any:
    """What makes a mistake the same before and after an edit."""
    places = diagnostic.locations[:1] if diagnostic.matches else ()
    return diagnostic.code, diagnostic.what, places, diagnostic.matches


def merged(found: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Diagnostics that say the same of several rules, as one with all their locations."""
    kept: dict[Any, Diagnostic] = {}
    for each in found:
        key = identity(each)
        if key in kept:
            places = dict.fromkeys((*kept[key].locations, *each.locations))
            kept[key] = evolve(kept[key], locations=tuple(places))
        else:
            kept[key] = each
    return list(kept.values())
