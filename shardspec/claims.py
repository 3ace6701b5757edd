"""Match a table against a model: every parameter claimed, every activation that a rule names."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from shardspec.diagnostics import Diagnostic
from shardspec.infer import absolute, graphs
from shardspec.layout import Layout
from shardspec.mesh import Mesh
from shardspec.program import Program
from shardspec.rules.fit import check_rank, layout_of, learn_sizes
from shardspec.rules.match import assign, idle_batch_axes
from shardspec.rules.parse import Entry, ParamClaim, Sizes, Storage, Table
from shardspec.stages import Model, Parameter, Survey
from shardspec.twin import forward_arguments


def survey(model: Model) -> Survey:
    """Name everything in a model; a function is called once, on the meta device."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    first: dict[int, str] = {}
    found: dict[str, Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        home = first.setdefault(id(tensor), name)
        found[name] = Parameter(tuple(tensor.shape), tensor.dtype, False, tensor.requires_grad, home)
    lost = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, tensor in model.named_buffers(remove_duplicate=False):
        home = first.setdefault(id(tensor), name)
        found[name] = Parameter(tuple(tensor.shape), tensor.dtype, True, False, home, name not in lost)
    modules = tuple(name for name, _ in model.named_modules() if name)
    return Survey(model, found, modules, tuple(forward_arguments(model)))


def match_params(table: Table, names: Survey, mesh: Mesh) -> tuple[dict[str, ParamClaim], Sizes, list[Diagnostic]]:
    """Claim every parameter and buffer, and give each its layout."""

    def what(name: str) -> str:
        return "buffer" if names.parameters[name].is_buffer else "parameter"

    claimed, found = assign(table.params, names.parameters, what=what, place=table.rules.location)
    shaped: list[tuple[str, Entry, tuple[int, ...]]] = []
    wrong: dict[Entry, Diagnostic] = {}
    for name, entry in claimed.items():
        problem = check_rank(entry, name, names.parameters[name].shape)
        if problem:
            wrong.setdefault(entry, problem)
        else:
            shaped.append((name, entry, names.parameters[name].shape))
    sizes, conflicts = learn_sizes(shaped, table.rules.sizes)
    clashing = {place for conflict in conflicts for place in conflict.locations[:1]}
    params: dict[str, ParamClaim] = {}
    uneven: dict[Any, Diagnostic] = {}
    fitted: dict[tuple[Entry, tuple[int, ...]], tuple[Layout, Storage, Diagnostic | None]] = {}
    for name, entry, shape in shaped:
        if (entry, shape) not in fitted:
            fitted[entry, shape] = layout_of(entry, name, shape, sizes.known, mesh, storage=True)
        layout, storage, problem = fitted[entry, shape]
        if problem and entry.location not in clashing:
            uneven.setdefault((entry, shape), problem)
        known = names.parameters[name]
        params[name] = ParamClaim(
            name, entry, shape, known.dtype, known.is_buffer, layout, storage, known.requires_grad
        )
    ties = list(_ties(params, names))
    return params, sizes, [*found, *wrong.values(), *conflicts, *uneven.values(), *ties]


def _ties(params: Mapping[str, ParamClaim], names: Survey) -> Iterable[Diagnostic]:
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


def match_points(
    table: Table, names: Survey, program: Program, sizes: Sizes, mesh: Mesh
) -> tuple[dict[str, Entry], list[Diagnostic]]:
    """Claim the batch entries and the activations that the program makes."""
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for name, index in program.entries.items():
        shapes[name] = program.values[index].shape
    for fqn, graph in graphs(program, ""):
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
    more, conflicts = _learn_more(sizes, fits)
    sizes.known.update(more.known)
    sizes.place.update(more.place)
    idle = idle_batch_axes({name: claimed[name] for name in entries if name in claimed}, mesh)
    return claimed, [*found, *wrong.values(), *conflicts, *idle]


def _learn_more(sizes: Sizes, fits: list[tuple[str, Entry, tuple[int, ...]]]) -> tuple[Sizes, list[Diagnostic]]:
    return learn_sizes(fits, sizes.known, sizes.place)
