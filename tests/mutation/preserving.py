"""Edits that are meant to keep a table right: its words change, or a layout moves with all its partners."""

import random
from collections.abc import Callable

import attrs

import shardspec as ss
from shardspec.mesh import Mesh
from shardspec.spec import Spec, parse
from tests.mutation.damaging import entries_of
from tests.mutation.subjects import Subject, inert_points, moves
from tests.mutation.table import (
    Edit,
    map_axes,
    map_factors,
    mapped,
    pick,
    respecified,
    rewritten,
    specs,
    splits,
    with_axis,
    with_entries,
    without,
)

Kept = Callable[[Subject, Mesh, random.Random], Edit | None]
"""A subject, a mesh and chance -> an edit of the subject's table; none where it finds no place."""
KEEPS: list[Kept] = []
STORAGE = ("fsdp",)


def keep(edit: Kept) -> Kept:
    """List the decorated function."""
    KEEPS.append(edit)
    return edit


@keep
def permute_the_table(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    rules = subject.rules
    shuffled = {kind: rng.sample(entries := specs(rules, kind), len(entries)) for kind in ("params", "activations")}
    order = "; ".join(pattern for entries in shuffled.values() for pattern, _ in entries)
    return f"permuted: {order}", rewritten(rules, **shuffled)


@keep
def rename_a_factor(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    names = {f.name for kind in ("params", "activations") for _, t in specs(subject.rules, kind) for f in factors(t)}
    old = rng.choice(sorted(names - {""}))
    new = rng.choice(("width", "x", f"{old}_", f"my{old}"))

    def renamed(spec: Spec) -> Spec:
        return map_factors(spec, lambda own: attrs.evolve(own, name=new) if own.name == old else own)

    return f"factor {old} becomes {new}", mapped(subject.rules, renamed)


def factors(text: str) -> list:
    """The factors of a spec."""
    return [factor for dim in parse(text).dims for factor in dim.factors]


@keep
def split_a_pattern_in_two(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    kind, pattern, _ = pick(subject.rules, rng)
    ways = splits(pattern)
    if not ways:
        return None
    one, two = rng.choice(ways)
    entries = [e for p, t in specs(subject.rules, kind) for e in ([(one, t), (two, t)] if p == pattern else [(p, t)])]
    return f'r"{pattern}" becomes r"{one}" and r"{two}"', with_entries(subject.rules, kind, entries)


@keep
def join_two_patterns(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    kind = rng.choice(["params", "activations"])
    entries = specs(subject.rules, kind)
    pairs = [(one, two) for one, t in entries for two, u in entries if t == u and one != two]
    if not pairs:
        return None
    one, two = rng.choice(pairs)
    joined = [(f"(?:{one})|(?:{two})" if p == one else p, t) for p, t in entries if p != two]
    return f'r"{one}" and r"{two}" become one', with_entries(subject.rules, kind, joined)


@keep
def write_a_pattern_otherwise(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    kind, pattern, _ = pick(subject.rules, rng)
    ways = {f"(?:{pattern})", f"({pattern})", pattern.replace(r"\d+", "[0-9]+"), pattern.replace(r"\d", "[01]")}
    new = rng.choice(sorted(ways - {pattern}))
    entries = [(new if p == pattern else p, t) for p, t in specs(subject.rules, kind)]
    return f'r"{pattern}" becomes r"{new}"', with_entries(subject.rules, kind, entries)


@keep
def write_a_spec_without_names(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    """`ss.P` for a spec whose axes stand on whole dims, or on the most major factor of a group."""
    kind, pattern, text = pick(subject.rules, rng)
    spec = parse(text)
    if spec.pending or any(f.axes for dim in spec.dims for f in dim.factors[1:]) or any(f.size for f in factors(text)):
        return None
    entries = [dim.all_axes if len(dim.all_axes) > 1 else (dim.all_axes or (None,))[0] for dim in spec.dims]
    return respecified(subject.rules, kind, pattern, ss.P(*entries))


@keep
def declare_what_is_there(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    pattern, text = rng.choice(sorted(inert_points(subject).items()))
    return f'add r"{pattern}": "{text}"', subject.rules.override(activations={pattern: text})


@keep
def move_a_layout_with_its_partners(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    name, override = rng.choice(sorted(moves(subject).items()))
    return name, subject.rules.override(**override)


@keep
def drop_a_storage_axis(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    """Of one rule, of the two of a tied weight, or of all: fsdp is then what dp is."""
    rules = subject.rules
    if rng.random() < 0.2:
        return "no storage at all", mapped(rules, lambda spec: without(spec, *STORAGE), ["params"])
    chosen = _stored(subject, rng)
    new = {pattern: str(without(parse(text), *STORAGE)) for pattern, text in chosen.items()}
    return f"stored whole: {', '.join(chosen)}", rules.override(params=new)


@keep
def move_a_storage_axis(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    """To another dim, behind the axes that are there.

    Not to a dim whose most major factor is not the one that is split: storage cuts consecutive rows, which three
    pieces are not.
    """
    chosen = _stored(subject, rng)
    moved: dict[str, str] = {}
    for pattern, text in chosen.items():
        bare = without(parse(text), *STORAGE)
        here = next(at for at, dim in enumerate(parse(text).dims) if "fsdp" in dim.all_axes)
        others = [at for at, dim in enumerate(bare.dims) if at != here and not dim.factors[0].size]
        if not others:
            return None
        moved[pattern] = str(with_axis(bare, others[0], "fsdp"))
    return f"stored along the other dim: {', '.join(chosen)}", subject.rules.override(params=moved)


def _stored(subject: Subject, rng: random.Random) -> dict[str, str]:
    """A rule that stores in slices, with the rule of the weight that is tied to it."""
    stored = {pattern: text for pattern, text in specs(subject.rules, "params") if "fsdp" in text}
    pattern = rng.choice(sorted(stored))
    ties = (r"tok_embeddings\.weight", r"output\.weight")
    return {name: stored[name] for name in (ties if subject.tied and pattern in ties else (pattern,))}


@keep
def turn_the_batch_axes(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    """Everywhere at once: which rows a rank reads changes, and all that it computes with them."""

    def turned(axes: tuple[str, ...]) -> tuple[str, ...]:
        return ("fsdp", "dp") if axes == ("dp", "fsdp") else axes

    return "B@(fsdp,dp)", mapped(subject.rules, lambda spec: map_axes(spec, turned), ["activations"])


@keep
def write_or_drop_an_axis_of_size_one(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    kind, pattern, text = pick(subject.rules, rng)
    spec = parse(text)
    present = [axis for axis in spec.axes if mesh[axis] == 1 and axis not in spec.pending]
    if present and rng.random() < 0.6:
        return respecified(subject.rules, kind, pattern, str(without(spec, rng.choice(present))))
    absent = [axis for axis in ("ep", "cp") if axis not in spec.axes]
    places = [at for at, dim in enumerate(spec.dims) if not dim.factors[0].size]
    stored = [at for at in places if "fsdp" in spec.dims[at].all_axes]
    if not places or not absent or (kind == "params" and not stored):
        return None
    at = stored[0] if stored else rng.choice(places)
    return respecified(subject.rules, kind, pattern, str(with_axis(spec, at, rng.choice(absent))))


@keep
def group_the_units_otherwise(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    block = r"layers\.\d+" if subject.family == "llama" else r"h\.\d+"
    halves = r"\.(attention|feed_forward)" if subject.family == "llama" else r"\.(attn|mlp)"
    ends = ("tok_embeddings", "norm", "output") if subject.family == "llama" else ("wte", "ln_f", "lm_head")
    ways = [
        [],
        [block],
        [block, ends],
        [block + halves],
        [(block,)],
        [(block, ends[1])],
        [block, ends[0]],
        [block, ends[2]],
        [block, ends[1]],
        [block + halves, ends[1:]],
        [block.replace(r"\d+", "0"), ends],
    ]
    units = rng.choice(ways)
    return f"units {units}", subject.rules.override(units=units)


@keep
def give_a_size(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    known = {"D": 32, "hd": 4, "H": 8, "V": 40, "B": 8, "S": 8, "F": 24 if subject.family == "llama" else 48}
    names = rng.sample(sorted(known), rng.randint(1, 3))
    given = {name: known[name] for name in names}
    return f"sizes {given}", subject.rules.override(sizes=given)


@keep
def write_dots_for_whole_dims(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit | None:
    """`B@dp S D` as `B@dp ...`, where nothing splits what the dots stand for."""
    _, pattern, text = pick(subject.rules, rng, ["activations"])
    dims = parse(text).dims
    whole = [at for at, dim in enumerate(dims) if not any(mesh[axis] > 1 for axis in dim.all_axes)]
    if not whole or parse(text).pending:
        return None
    at = rng.choice(whole)
    words = [str(dim) for dim in dims]
    return respecified(subject.rules, "activations", pattern, " ".join([*words[:at], "...", *words[at + 1 :]]))


@keep
def leave_pipelines_out(subject: Subject, mesh: Mesh, rng: random.Random) -> Edit:
    entries = {kind: dict(specs(subject.rules, kind)) for kind in ("params", "activations")}
    return "no pipeline", ss.Rules(**entries, units=subject.rules.units)


def kept(subject: Subject, mesh: Mesh, rng: random.Random) -> tuple[str, Edit]:
    """A random edit that keeps the meaning: its name, and the edit, which changes something."""
    while True:
        chosen = rng.choice(KEEPS)
        edit = chosen(subject, mesh, rng)
        if edit is not None and (entries_of(edit[1]) != entries_of(subject.rules) or chosen is permute_the_table):
            return chosen.__name__, edit
