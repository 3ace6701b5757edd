"""Which repeated blocks a table treats alike: one stands for all, so that a check does not grow with depth."""

import re
from collections.abc import Iterable, Mapping, Sequence
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
        if name in self.heads:
            return self.heads[name]
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
    params = [pattern for pattern in params if spells_digits(pattern.pattern, names.blocks)]
    modules = [pattern for pattern in modules if spells_digits(pattern.pattern, names.blocks)]

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


def apart(
    kin: Kin, patterns: Sequence[re.Pattern[str]], names_in: Mapping[str, Sequence[str]], runs: Mapping[str, object]
) -> Kin:
    """The same, with blocks apart that run other code, or that patterns tell apart by names of what runs in them.

    Args:
        names_in: block -> what those names go on with.
        runs: block -> what is equal where the same code runs.
    """
    patterns = [pattern for pattern in patterns if spells_digits(pattern.pattern, kin.heads)]
    first: dict[object, str] = {}
    heads: dict[str, str] = {}
    for fqn, head in kin.heads.items():
        told = tuple(p.fullmatch(fqn + name) is not None for p in patterns for name in names_in.get(fqn, ()))
        heads[fqn] = first.setdefault((head, runs.get(fqn), told), fqn)
    return Kin(heads)


def spells_digits(pattern: str, blocks: Iterable[str]) -> bool:
    """Whether a regex may treat one digit of a block's index unlike another.

    It does where it spells a digit out, or refers back to what it matched; but not behind the index itself, which
    is the first thing that is not literal where no digit comes before it in the blocks' names.
    """
    text = pattern.replace("[0-9]", r"\d")
    looks_back = "(?<" in text
    if (
        INDEXED.match(text)
        and not looks_back
        and not _has_branches(text)
        and all(PLAIN.fullmatch(fqn) for fqn in blocks)
    ):
        return False
    if not BRACE_IN_SET.search(text):
        text = COUNTS.sub("", text)
    return any(character.isdigit() for character in text) or "(?P=" in text


def _has_branches(pattern: str) -> bool:
    """Whether `|` stands outside of every group."""
    depth = 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            return True
    return False


COUNTS = re.compile(r"\{\d*,?\d*\}")
BRACE_IN_SET = re.compile(r"\[[^\]]*\{")
PLAIN = re.compile(r"\D*\d+")
INDEXED = re.compile(r"(?:[A-Za-z_]|\\\.)*\\d\+(?:\\\.|$)")
