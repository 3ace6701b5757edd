"""Which repeated blocks a table treats alike: one stands for all, so that a check does not grow with depth."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from attrs import define, field

from shardspec.survey import Structure, Survey

BLOCK = re.compile(r"(?:[^.:]+\.)*?\d+(?=[.:]|$)")
"""The outermost repeated block that a name lies in."""


@define(eq=False)
class Kin:
    """Block -> the block that stands for it."""

    heads: Mapping[str, str] = field(factory=dict)

    def canonical(self, name: str) -> str:
        """A name in terms of the block that stands for its own."""
        found = BLOCK.match(name)
        if found is None:
            return name
        head = self.heads.get(found.group(), found.group())
        return head + name[found.end() :]

    @cached_property
    def members(self) -> dict[str, list[str]]:
        """The block that stands for others -> all that it stands for, itself first."""
        members: dict[str, list[str]] = {}
        for fqn, head in self.heads.items():
            members.setdefault(head, []).append(fqn)
        return members


def kindred(names: Survey, params: Iterable[re.Pattern[str]], modules: Iterable[re.Pattern[str]]) -> Kin:
    """Let one block of each structure stand for the others, where no pattern can tell them apart.

    A pattern that spells no digit out takes every digit as any other: what it says of a name hangs on how long the
    index is, not on which. Patterns that do spell one are tried on all names.

    Args:
        params: the patterns that are matched against names of parameters.
        modules: those that are matched against names of modules.
    """
    params = [pattern for pattern in params if spells_digits(pattern.pattern)]
    modules = [pattern for pattern in modules if spells_digits(pattern.pattern)]

    def told(fqn: str, structure: Structure) -> tuple[bool, ...]:
        return (
            *(pattern.fullmatch(fqn + name) is not None for pattern in params for name in structure.parameters),
            *(pattern.fullmatch(fqn + name) is not None for pattern in modules for name in structure.modules),
        )

    first: dict[object, str] = {}
    heads: dict[str, str] = {}
    for fqn, structure in names.blocks.items():
        container, _, index = fqn.rpartition(".")
        kind = (id(structure), container, len(index), told(fqn, structure))
        heads[fqn] = first.setdefault(kind, fqn)
    return Kin(heads)


def apart(kin: Kin, patterns: Sequence[re.Pattern[str]], names_in: Callable[[str], Iterable[str]]) -> Kin:
    """The same, with blocks apart that patterns tell apart by names that the survey does not know.

    Args:
        names_in: block -> what its names go on with.
    """
    patterns = [pattern for pattern in patterns if spells_digits(pattern.pattern)]
    if not patterns:
        return kin
    first: dict[object, str] = {}
    heads: dict[str, str] = {}
    for fqn, head in kin.heads.items():
        told = tuple(pattern.fullmatch(fqn + name) is not None for pattern in patterns for name in names_in(head))
        heads[fqn] = first.setdefault((head, told), fqn)
    return Kin(heads)


def spells_digits(pattern: str) -> bool:
    """Whether a regex may treat one digit unlike another: it spells one out, or refers back to what it matched."""
    text = pattern.replace("[0-9]", r"\d")
    if not BRACE_IN_SET.search(text):
        text = COUNTS.sub("", text)
    return any(character.isdigit() for character in text) or "(?P=" in text


COUNTS = re.compile(r"\{\d*,?\d*\}")
BRACE_IN_SET = re.compile(r"\[[^\]]*\{")
