"""Match a table against a model: every parameter claimed, every activation that a rule names."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import evolve

from shardspec.diagnostics import Diagnostic
from shardspec.infer import absolute, graphs
from shardspec.kin import BLOCK, Kin, apart
from shardspec.layout import Layout
from shardspec.mesh import Mesh
from shardspec.program import Block, Graph, Program
from shardspec.rules.fit import check_rank, layout_of, learn_sizes
from shardspec.rules.match import assign, idle_batch_axes
from shardspec.rules.parse import STORAGE_AXES, Entry, ParamClaim, Sizes, Storage, Table, change, check_storage
from shardspec.rules.table import Rules
from shardspec.sequence import AXIS
from shardspec.survey import Parameter, Survey, View
from shardspec.units import attribute_sizes


def match_params(table: Table, names: View, mesh: Mesh) -> tuple[dict[str, ParamClaim], Sizes, list[Diagnostic]]:
    """Claim every parameter and buffer of a view, and give each its layout."""

    def what(name: str) -> str:
        return "buffer" if names.parameters[name].is_buffer else "parameter"

    claimed, found = assign(
        table.params,
        names.parameters,
        what=what,
        place=table.rules.location,
        elsewhere=lambda: (*names.arguments, *names.modules),
        ties={name: known.first for name, known in names.parameters.items() if name != known.first},
    )
    shaped: list[tuple[str, Entry, tuple[int, ...]]] = []
    wrong: dict[Entry, Diagnostic] = {}
    for name, entry in claimed.items():
        problem = check_rank(entry, name, names.parameters[name].shape)
        if problem:
            wrong.setdefault(entry, problem)
        else:
            shaped.append((name, entry, names.parameters[name].shape))
    summed = any(dim.counts for entry in table.params for dim in entry.spec.dims)
    hints = attribute_sizes(table.rules, names.modules) if summed else {}
    sizes, conflicts = learn_sizes(shaped, table.rules.sizes, hints=hints)
    clashing = {place for conflict in conflicts for place in conflict.locations[:1]}
    params: dict[str, ParamClaim] = {}
    uneven: dict[Any, Diagnostic] = {}
    fitted: dict[tuple[Entry, tuple[int, ...], bool, bool], tuple[Layout, Storage, Diagnostic | None]] = {}
    stacked = expert_weights(table.rules, names)
    placed: dict[tuple[Entry, bool], Diagnostic | None] = {}
    for name, entry, shape in shaped:
        expert = name in stacked
        if stacked and (entry, expert) not in placed:
            placed[entry, expert] = check_expert_axis(entry, name, expert=expert)
        if misplaced := placed.get((entry, expert)):
            wrong.setdefault(entry, misplaced)
            continue
        stores = not lies_with_sequence(names.parameters[name], entry)
        if (entry, shape, expert, stores) not in fitted:
            fitted[entry, shape, expert, stores] = layout_of(
                entry, name, shape, sizes.known, mesh, storage=stores, expert=expert
            )
        layout, storage, problem = fitted[entry, shape, expert, stores]
        if problem and entry.location not in clashing:
            uneven.setdefault((entry, shape), problem)
        known = names.parameters[name]
        if known.is_buffer and known.persistent and AXIS in storage.axes:
            wrong.setdefault(entry, _in_the_state(name, entry))
        params[name] = ParamClaim(
            name, entry, shape, known.dtype, known.is_buffer, layout, storage, known.requires_grad, expert
        )
    ties = list(_ties(params, names))
    return params, sizes, [*found, *wrong.values(), *conflicts, *uneven.values(), *ties]


def expert_weights(rules: Rules, names: View) -> set[str]:
    """The parameters of the modules that `experts=` matches."""
    if rules.experts is None:
        return set()
    regex = re.compile(rules.experts)
    homes = tuple(f"{path}." for path in names.modules if regex.fullmatch(path))
    return {name for name, known in names.parameters.items() if name.startswith(homes) and not known.is_buffer}


def check_expert_axis(entry: Entry, name: str, *, expert: bool) -> Diagnostic | None:
    """SS218 for ep on another dim of an expert weight than dim 0; SS209 for what only an expert weight may have."""
    spec = entry.spec
    if not expert:
        return next(check_storage(entry.rule, spec), None)
    later = [dim for dim in spec.dims[1:] if "ep" in dim.all_axes]
    inner = "ep" in spec.dims[0].all_axes if spec.dims else False
    if not later and (not inner or spec.dims[0].all_axes[0] == "ep"):
        return None
    where = f"dim {spec.dims.index(later[0])}, {later[0]}" if later else f"dim 0, behind {spec.dims[0].all_axes[0]}"
    return Diagnostic(
        code="SS218",
        what=f"ep stands on {where} of the expert weight {name}",
        why="experts= names its module, whose parameters are stacked over experts on dim 0: there ep says which rank "
        "has which experts, and a row goes to the one that has its own",
        locations=(entry.location,),
        advice=("write E@ep, or E@(ep,fsdp), on dim 0 and leave ep out elsewhere",),
    )


def lies_with_sequence(known: Parameter, entry: Entry) -> bool:
    """Whether a rule lays a buffer over cp as a sequence is: one that is made with the model, and is in no state."""
    storing = {axis for axis in entry.spec.axes if axis in STORAGE_AXES}
    return known.is_buffer and not known.persistent and storing == {AXIS}


def _in_the_state(name: str, entry: Entry) -> Diagnostic:
    """SS209 for a buffer over cp that a state holds: its parts lie as a batch does, which differs from run to run."""
    return Diagnostic(
        code="SS209",
        what=f"the buffer {name} lies over {AXIS}, and is persistent",
        why="a state holds it, in the order of the whole; over cp it lies as the sequence of the batch does",
        locations=(entry.location,),
        advice=(f"register {name} with persistent=False: it is then made with the model, and is in no state",),
    )


def _ties(params: Mapping[str, ParamClaim], names: View) -> Iterable[Diagnostic]:
    for name, known in names.parameters.items():
        one, two = params.get(known.first), params.get(name)
        if name == known.first or one is None or two is None:
            continue
        if (one.layout, one.storage) != (two.layout, two.storage):
            yield Diagnostic(
                code="SS212",
                what=f"{known.first} and {name} are one tensor and have two layouts",
                why=f"{one.entry.rule.value} against {two.entry.rule.value}",
                locations=(one.entry.location, two.entry.location),
                advice=("give both rules the same axes",),
            )


def told_apart(table: Table, program: Program, kin: Kin) -> Kin:
    """The blocks that run the same code and that the table's activations do not tell apart either.

    A block whose parameters are read outside of it, by the model or by another block, stands for itself alone.
    """
    runs: dict[str, tuple[int | str, ...]] = {}
    blocks: dict[int, Block] = {}
    for node in program.nodes:
        if node.op == "block":
            runs[node.func.fqn] = (*runs.get(node.func.fqn, ()), id(node.func.block))
            blocks[id(node.func.block)] = node.func.block
    for name in program.params:
        found = BLOCK.match(name)
        if found is not None:
            runs[found.group()] = (*runs.get(found.group(), ()), found.group())
    inside = {id(block): list(_names_inside(block)) for block in blocks.values()}
    names = {
        fqn: [name for block in called if isinstance(block, int) for name in inside[block]]
        for fqn, called in runs.items()
    }
    return apart(kin, [entry.regex for entry in table.activations], names, runs)


def _names_inside(block: Block) -> Iterator[str]:
    """What the names of the points in a block go on with."""
    for fqn, graph in graphs(block, ""):
        for node in graph.nodes:
            if node.op == "point":
                for name in node.func:
                    inner = absolute(fqn, name)
                    yield f".{inner}" if inner and not inner.startswith(":") else inner


def graphs_of_kinds(program: Program, kin: Kin) -> Iterator[tuple[str, Graph]]:
    """The graphs of a program, with the FQN that their names are relative to; of blocks that are alike, one."""
    yield "", program
    for node in program.nodes:
        if node.op == "block" and kin.heads.get(node.func.fqn, node.func.fqn) == node.func.fqn:
            yield from graphs(node.func.block, node.func.fqn)


def match_points(
    table: Table, names: Survey, program: Program, sizes: Sizes, mesh: Mesh, kin: Kin
) -> tuple[dict[str, Entry], list[Diagnostic]]:
    """Claim the batch entries and the activations that the program makes, in blocks that stand for others.

    The sizes that they tell are added to `sizes`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for name, index in program.entries.items():
        shapes[name] = program.values[index].shape
    for fqn, graph in graphs_of_kinds(program, kin):
        for node in graph.nodes:
            if node.op == "point":
                target = node.outputs[0]
                assert target is not None
                for alias in node.func:
                    full = absolute(fqn, alias)
                    shapes.setdefault(full, graph.values[target].shape)
                    aliases.setdefault(full, absolute(fqn, node.func[0]))
    absent = [name for name in names.arguments if name not in program.entries]
    entries = list(program.entries)

    def alive(entry: Entry) -> bool:
        return any(entry.regex.fullmatch(name) for name in absent)

    inner = [name for name in shapes if name not in program.entries]
    claimed, found = assign(
        table.activations,
        [*entries, *inner],
        needed=program.entries.__contains__,
        what=lambda name: "batch entry" if name in program.entries else "activation",
        alive=alive,
        shapes={name: shapes[name] for name in entries},
        place=table.rules.location,
        elsewhere=lambda: names.whole.parameters,
    )
    for name, entry in list(claimed.items()):
        other = claimed.get(aliases.get(name, name))
        if other is not None and other is not entry:
            found.append(
                Diagnostic(
                    code="SS204",
                    what=f"2 rules claim activation {name}, which is also {aliases[name]}",
                    locations=(other.location, entry.location),
                )
            )
    wrong: dict[Entry, Diagnostic] = {}
    fits: list[tuple[str, Entry, tuple[int, ...]]] = []
    for name, entry in claimed.items():
        problem = check_rank(entry, name, shapes[name])
        if problem:
            wrong.setdefault(entry, problem)
        else:
            fits.append((name, entry, shapes[name]))
    more, conflicts = learn_sizes(fits, sizes.known, sizes.place)
    ruled = {name: claimed[name] for name in entries if name in claimed}
    found += [*wrong.values(), *conflicts, *idle_batch_axes(ruled, mesh), *_pending_entries(ruled, mesh)]
    if not found:
        sizes.known.update(more.known)
        sizes.place.update(more.place)
    return claimed, found


def _pending_entries(ruled: Mapping[str, Entry], mesh: Mesh) -> Iterable[Diagnostic]:
    """SS306 for a batch entry that is declared pending: what is read is complete, on every rank."""
    for entry in dict.fromkeys(ruled.values()):
        axes = [axis for axis in entry.spec.pending if mesh[axis] > 1]
        if axes:
            name = next(name for name, own in ruled.items() if own is entry)
            yield Diagnostic(
                code="SS306",
                what=f"batch entry {name} cannot become {entry.rule.value}",
                why=f"each rank reads it complete: summed over {axes[0]}, it would be counted {mesh[axes[0]]} times",
                locations=(entry.location,),
                hints=(change(entry, evolve(entry.spec, pending=())),),
            )
