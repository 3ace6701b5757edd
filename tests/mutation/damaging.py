"""Edits that damage by intent: many of them make a table wrong, and some of them another right one."""

import random
import re
from collections.abc import Callable

import attrs

import shardspec as ss
from shardspec.spec import Dim, Spec, parse
from tests.mutation.table import (
    CLASS,
    GROUP,
    Edit,
    bars,
    pick,
    respecified,
    specs,
    with_axis,
    with_entries,
    without,
)

Damage = Callable[[ss.Rules, list[str], random.Random], Edit | None]
"""A table, names of activations of one block and outside, and chance -> an edit; none where it finds no place."""
DAMAGES: list[Damage] = []
AXES = ("dp", "fsdp", "tp")


def damage(edit: Damage) -> Damage:
    """List the decorated function."""
    DAMAGES.append(edit)
    return edit


def spec_damage(change: Callable[[Spec, random.Random], Spec | None]) -> Callable[[Spec, random.Random], Spec | None]:
    """List a change of one spec, to be made to a random entry."""

    def edit(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
        kind, pattern, text = pick(rules, rng)
        new = change(parse(text), rng)
        return None if new is None else respecified(rules, kind, pattern, str(new))

    edit.__name__ = change.__name__
    DAMAGES.append(edit)
    return change


def _axes(spec: Spec) -> list[str]:
    return [axis for dim in spec.dims for axis in dim.all_axes]


def _anywhere(spec: Spec, axis: str, rng: random.Random) -> Spec | None:
    places = [(at, f) for at, dim in enumerate(spec.dims) for f, own in enumerate(dim.factors) if own.name]
    if not places:
        return None
    dim, factor = rng.choice(places)
    grouped = spec.dims[dim].grouped and rng.random() < 0.5
    return with_axis(spec, dim, axis, front=rng.random() < 0.5, factor=None if grouped else factor)


@spec_damage
def drop_an_axis(spec: Spec, rng: random.Random) -> Spec | None:
    axes = _axes(spec)
    return without(spec, rng.choice(axes)) if axes else None


@spec_damage
def move_an_axis(spec: Spec, rng: random.Random) -> Spec | None:
    axes = _axes(spec)
    axis = rng.choice(axes) if axes else ""
    return _anywhere(without(spec, axis), axis, rng) if axis else None


@spec_damage
def add_an_axis(spec: Spec, rng: random.Random) -> Spec | None:
    return _anywhere(spec, rng.choice(AXES), rng)


@spec_damage
def exchange_an_axis_for_another(spec: Spec, rng: random.Random) -> Spec | None:
    axes = _axes(spec)
    if not axes:
        return None
    old, new = rng.choice(axes), rng.choice(AXES)

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new if name == old else old if name == new else name for name in names)

    dims = tuple(
        Dim(tuple(attrs.evolve(f, axes=renamed(f.axes)) for f in dim.factors), renamed(dim.axes), dim.grouped)
        for dim in spec.dims
    )
    return attrs.evolve(spec, dims=dims)


@spec_damage
def swap_two_dims(spec: Spec, rng: random.Random) -> Spec | None:
    if len(spec.dims) < 2:
        return None
    dims = list(spec.dims)
    one, two = rng.sample(range(len(dims)), 2)
    dims[one], dims[two] = dims[two], dims[one]
    return attrs.evolve(spec, dims=tuple(dims))


@spec_damage
def swap_the_axes_of_two_dims(spec: Spec, rng: random.Random) -> Spec | None:
    """The factors stay where they are: only what splits them changes places."""
    plain = [at for at, dim in enumerate(spec.dims) if len(dim.factors) == 1 and not dim.grouped]
    if len(plain) < 2:
        return None
    dims = list(spec.dims)
    one, two = rng.sample(plain, 2)
    first, second = dims[one].factors[0], dims[two].factors[0]
    dims[one] = Dim((attrs.evolve(first, axes=second.axes),))
    dims[two] = Dim((attrs.evolve(second, axes=first.axes),))
    return attrs.evolve(spec, dims=tuple(dims))


@spec_damage
def turn_the_order_of_axes_or_factors(spec: Spec, rng: random.Random) -> Spec | None:
    turned = [
        Dim(tuple(attrs.evolve(f, axes=f.axes[::-1]) for f in dim.factors), dim.axes[::-1], dim.grouped)
        for dim in spec.dims
    ]
    swapped = [attrs.evolve(dim, factors=dim.factors[::-1]) for dim in spec.dims]
    choices = [new for new in (turned, swapped) if tuple(new) != spec.dims]
    return attrs.evolve(spec, dims=tuple(rng.choice(choices))) if choices else None


@spec_damage
def toggle_pending_over_tp(spec: Spec, rng: random.Random) -> Spec | None:
    if spec.pending:
        return attrs.evolve(spec, pending=())
    return attrs.evolve(without(spec, "tp") if rng.random() < 0.5 else spec, pending=("tp",))


@damage
def drop_a_rule(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    _, pattern, _ = pick(rules, rng)
    return f'drop r"{pattern}"', rules.override(drop=[pattern])


@damage
def drop_a_declared_point(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    """Only one of the names that a pattern claims, where it claims several."""
    _, pattern, _ = pick(rules, rng, ["activations"])
    kept = bars(pattern)
    if len(kept) > 1:
        kept.remove(rng.choice(kept))
        entries = [("|".join(kept) if p == pattern else p, t) for p, t in specs(rules, "activations")]
        return f'r"{pattern}" becomes r"{"|".join(kept)}"', with_entries(rules, "activations", entries)
    return f'drop r"{pattern}"', rules.override(drop=[pattern])


@damage
def declare_another_point(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    """A random point under the spec of another, or of one with an axis moved."""
    name = rng.choice(points)
    text = rng.choice([t for _, t in specs(rules, "activations") if len(parse(t).dims) > 1])
    if rng.random() < 0.5:
        changed = rng.choice((drop_an_axis, move_an_axis, toggle_pending_over_tp))(parse(text), rng)
        text = text if changed is None else str(changed)
    return f'add r"{name}": "{text}"', rules.override(activations={name: text})


@damage
def give_a_rule_the_spec_of_another(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    kind, pattern, text = pick(rules, rng)
    others = [t for p, t in specs(rules, kind) if t != text and len(parse(t).dims) == len(parse(text).dims)]
    return respecified(rules, kind, pattern, rng.choice(others)) if others else None


@damage
def shrink_a_pattern(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    """A digit for a class of them, one letter of two, one alternative of a group."""
    kind, pattern, _ = pick(rules, rng)
    smaller = [
        pattern.replace(r"\d+", "0"),
        pattern.replace(r"\d+", "1"),
        CLASS.sub(lambda match: match[1], pattern),
        GROUP.sub(lambda match: f"({match[1].rpartition('|')[0]}){match[2]}", pattern),
        re.sub(r"(\(.*\))\?", lambda match: match[1], pattern),
    ]
    choices = [new for new in smaller if new != pattern]
    if not choices:
        return None
    new = rng.choice(choices)
    entries = [(new if p == pattern else p, t) for p, t in specs(rules, kind)]
    return f'r"{pattern}" becomes r"{new}"', with_entries(rules, kind, entries)


@damage
def let_two_rules_change_specs(rules: ss.Rules, points: list[str], rng: random.Random) -> Edit | None:
    kind = rng.choice(["params", "activations"])
    (one, first), (two, second) = rng.sample(specs(rules, kind), 2)
    edit = rules.override(**{kind: {one: second, two: first}})
    return (f'r"{one}" and r"{two}" change specs', edit) if first != second else None


def damaged(rules: ss.Rules, points: list[str], rng: random.Random) -> tuple[str, Edit]:
    """A random damage: its name, and the edit, which changes something."""
    while True:
        chosen = rng.choice(DAMAGES)
        edit = chosen(rules, points, rng)
        if edit is not None and entries_of(edit[1]) != entries_of(rules):
            return chosen.__name__, edit


def entries_of(rules: ss.Rules) -> object:
    """What two tables that say the same share."""
    return specs(rules, "params"), specs(rules, "activations"), rules.units, rules.sizes, rules.pipeline
