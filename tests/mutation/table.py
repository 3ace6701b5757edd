"""Read a table's entries, and write the table again with some of them changed."""

import random
import re
from collections.abc import Callable, Sequence

import attrs

import shardspec as ss
from shardspec.spec import Dim, Factor, Spec, parse

Edit = tuple[str, ss.Rules]
"""What was changed, in words, and the table with it."""
Entries = Sequence[tuple[str, str]]


def specs(rules: ss.Rules, kind: str) -> list[tuple[str, str]]:
    """The entries of "params" or "activations" as (pattern, spec)."""
    return [(rule.pattern, rule.value) for rule in getattr(rules, kind)]


def rewritten(rules: ss.Rules, params: Entries | None = None, activations: Entries | None = None) -> ss.Rules:
    """The table with other entries, in their order; the rest is as it was."""
    return ss.Rules(
        params=dict(specs(rules, "params") if params is None else params),
        activations=dict(specs(rules, "activations") if activations is None else activations),
        units=rules.units,
        pipeline=rules.pipeline,
        sizes=rules.sizes,
    )


def with_entries(rules: ss.Rules, kind: str, entries: Entries) -> ss.Rules:
    """The table with other entries of one kind."""
    return rewritten(rules, **{kind: entries})


def mapped(
    rules: ss.Rules, change: Callable[[Spec], Spec], kinds: Sequence[str] = ("params", "activations")
) -> ss.Rules:
    """The table with each spec changed."""
    new = {kind: [(pattern, str(change(parse(text)))) for pattern, text in specs(rules, kind)] for kind in kinds}
    return rewritten(rules, **new)


def pick(rules: ss.Rules, rng: random.Random, kinds: Sequence[str] = ("params", "activations")) -> tuple[str, str, str]:
    """A random entry: kind, pattern, spec."""
    return rng.choice([(kind, *entry) for kind in kinds for entry in specs(rules, kind)])


def respecified(rules: ss.Rules, kind: str, pattern: str, text: str | ss.P) -> Edit:
    """The table with another spec for one pattern."""
    old = dict(specs(rules, kind))[pattern]
    return f'r"{pattern}": "{old}" becomes "{text}"', rules.override(**{kind: {pattern: text}})


def map_factors(spec: Spec, change: Callable[[Factor], Factor]) -> Spec:
    """The spec with each factor changed."""
    return attrs.evolve(spec, dims=tuple(attrs.evolve(d, factors=tuple(map(change, d.factors))) for d in spec.dims))


def map_axes(spec: Spec, change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Spec:
    """The spec with each list of axes changed: a factor's, and a group's."""
    dims = tuple(
        Dim(tuple(attrs.evolve(f, axes=change(f.axes)) for f in dim.factors), change(dim.axes), dim.grouped)
        for dim in spec.dims
    )
    return attrs.evolve(spec, dims=dims)


def without(spec: Spec, *gone: str) -> Spec:
    """The spec with axes taken off its dims."""
    return map_axes(spec, lambda axes: tuple(axis for axis in axes if axis not in gone))


def with_axis(spec: Spec, dim: int, axis: str, *, front: bool = False, factor: int | None = None) -> Spec:
    """The spec with an axis on a dim: on a factor where one is told, on the group where the dim is one."""
    own = spec.dims[dim]

    def put(axes: tuple[str, ...]) -> tuple[str, ...]:
        return (axis, *axes) if front else (*axes, axis)

    if own.grouped and factor is None:
        new = attrs.evolve(own, axes=put(own.axes))
    else:
        at = factor or 0
        factors = [attrs.evolve(f, axes=put(f.axes)) if index == at else f for index, f in enumerate(own.factors)]
        new = attrs.evolve(own, factors=tuple(factors))
    return attrs.evolve(spec, dims=(*spec.dims[:dim], new, *spec.dims[dim + 1 :]))


def bars(pattern: str) -> list[str]:
    """The alternatives of a pattern outside its groups."""
    parts, depth = [""], 0
    for letter in pattern:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


GROUP = re.compile(r"\(([^()|]*(?:\|[^()|]*)+)\)(\??)")
CLASS = re.compile(r"\[(\w)(\w+)\]")


NESTED = re.compile(r"\([^()]*\([^()]*\)[^()]*\)\?")


def splits(pattern: str) -> list[tuple[str, str]]:
    """Ways to say a pattern as two that share no name."""
    first, *rest = bars(pattern)
    if rest:
        return [(first, "|".join(rest))]
    if NESTED.search(pattern):  # both halves would claim what lies outside the optional group
        return []
    found: list[tuple[str, str]] = []
    for match in GROUP.finditer(pattern):
        before, after = pattern[: match.start()], pattern[match.end() :]
        one, *others = match[1].split("|")
        found.append(
            (before + after, f"{before}({match[1]}){after}")
            if match[2]
            else (before + one + after, f"{before}({'|'.join(others)}){after}")
        )
    if "|" in pattern:
        return found
    for match in CLASS.finditer(pattern):
        before, after = pattern[: match.start()], pattern[match.end() :]
        found.append((before + match[1] + after, f"{before}[{match[2]}]{after}"))
    if pattern.count(r"\d+") == 1:
        found.append((pattern.replace(r"\d+", "0"), pattern.replace(r"\d+", r"[1-9]\d*")))
    return found
