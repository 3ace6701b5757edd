"""Pipelines: which layers make a stage, what crosses from one to the next, and whether a forward can be cut so."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import evolve, frozen

from shardspec.aliasing import writes
from shardspec.balance import balance, layer_costs
from shardspec.diagnostics import Diagnostic, ShardingError
from shardspec.infer import absolute, graphs
from shardspec.mesh import Mesh
from shardspec.plan import ActivationPlan, PipelinePlan, StagePlan
from shardspec.policy import Policy
from shardspec.program import Block, Node, Program, Ref, Value
from shardspec.rules.table import Rules
from shardspec.schedule import needs, placement, stages_per_rank
from shardspec.stages import TypedProgram
from shardspec.survey import View
from shardspec.torch_private import OpOverload

WHOLE = "the forward cannot be cut into stages"


def stage_count(policy: Policy, mesh: Mesh) -> int:
    """How many stages a pipeline has: those of the policy, or as many on each rank as the schedule wants."""
    return len(policy.stages) if policy.stages else mesh["pp"] * stages_per_rank(policy.schedule)


def microbatch_count(policy: Policy, mesh: Mesh) -> int:
    """How many microbatches a step has."""
    if policy.microbatches is not None:
        return policy.microbatches
    return policy.accumulate if mesh["pp"] == 1 else max(policy.accumulate, stage_count(policy, mesh))


def check_pipeline(rules: Rules, names: View, mesh: Mesh, policy: Policy) -> Iterator[Diagnostic]:
    """SS217 and SS405 for layers, stages and microbatches that do not make the pipeline; before anything is traced."""
    layers, found = layers_of(rules, names)
    yield from found
    if found:
        return
    stages, pp = stage_count(policy, mesh), mesh["pp"]
    place = (rules.line_of(rules.pipeline or ""),)
    if len(layers) < stages:
        yield Diagnostic(
            code="SS217",
            what=f"{len(layers)} layers do not fill {stages} stages",
            why=f"{policy.schedule} on pp={pp} has {stages // pp} on each rank, and a stage has at least one layer",
            locations=place,
            advice=(f"pp of at most {len(layers) // max(1, stages // pp)}",) if len(layers) >= stages // pp else (),
        )
    elif policy.stages and (sum(policy.stages) != len(layers) or stages % pp):
        yield Diagnostic(
            code="SS217",
            what=f"stages={list(policy.stages)} does not lay {len(layers)} layers over pp={pp}",
            why=f"they are {stages} stages of {sum(policy.stages)} layers; each rank of pp={pp} runs as many stages",
            locations=place,
        )
    else:
        count = microbatch_count(policy, mesh)
        for unmet in needs(policy.schedule, pp, count, stages // pp):
            yield Diagnostic(
                code="SS405",
                what=f"{policy.schedule} cannot run {count} microbatches through {stages} stages on pp={pp}",
                why=unmet.why,
                advice=(unmet.advice,),
            )


def layers_of(rules: Rules, names: View) -> tuple[tuple[str, ...], list[Diagnostic]]:
    """The modules that `pipeline=` lays over pp, by index."""
    pattern = rules.pipeline or ""
    place = (rules.line_of(pattern),)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        return (), [Diagnostic(code="SS103", what=f'pipeline: r"{pattern}" is no regex: {error}', locations=place)]
    by_index: dict[int, list[str]] = {}
    for name in names.modules:
        match = regex.fullmatch(name)
        index = match.groupdict().get("pp") if match else None
        if index is not None and index.isdecimal():
            by_index.setdefault(int(index), []).append(name)
    if not by_index or any(len(same) > 1 for same in by_index.values()):
        several = next((same for same in by_index.values() if len(same) > 1), None)
        return (), [
            Diagnostic(
                code="SS217",
                what=f'pipeline: r"{pattern}" names no layers'
                if several is None
                else f"pipeline: {several[0]} and {several[1]} have one index",
                why="it is matched whole against the FQN of each module, and its group pp is the layer's index",
                locations=place,
                advice=(r'write r"layers\.(?P<pp>\d+)", say',),
            )
        ]
    return tuple(by_index[index][0] for index in sorted(by_index)), []


@frozen(eq=False)
class Cut:
    """A program with the places where its stages begin."""

    program: Program
    layers: tuple[tuple[str, ...], ...]
    """The layers of each stage."""
    begins: tuple[int, ...]
    """The node of the first layer of each stage; nodes before that of the second stage are the first's, and so on."""

    def stage_at(self, position: int) -> int:
        """The stage that computes a node of the program."""
        return max((stage for stage, begin in enumerate(self.begins) if begin <= position), default=0)

    def carried(self, stage: int) -> dict[int, str]:
        """What crosses into a stage: values that enter its first layer, and the names of the arguments.

        The first argument, whatever it is (""), and those others that no rank can make again; not one whose name
        another has too, as behind a `*args`.
        """
        node = self.program.nodes[self.begins[stage]]
        known = reproducible(self.program, self.begins[stage])
        found = {node.args[0].index: ""}
        block: Block = node.func.block
        points = [inner for inner in block.nodes if inner.op == "point" and str(inner.func[0]).startswith(":in.")]
        count = Counter(point.func[0] for point in points)
        for point in points:
            if count[point.func[0]] == 1 and point.args[0].index in block.inputs:
                value = node.args[block.inputs.index(point.args[0].index)].index
                if known.get(value) is False:
                    found.setdefault(value, point.func[0].removeprefix(":in."))
        return found


def lay(typed: TypedProgram, names: View, rules: Rules, mesh: Mesh, policy: Policy) -> PipelinePlan:
    """The stages of a program that is proved.

    Raises:
        ShardingError: SS331 with the line, where a stage would read what another one made, other than what crosses.
    """
    layers, _ = layers_of(rules, names)
    stages, degree = stage_count(policy, mesh), mesh["pp"]
    found = layer_costs(typed.program, rules.pipeline or "")
    sizes = policy.stages or balance(found.costs, stages, found.first, found.last)
    starts = [sum(sizes[:index]) for index in range(stages)]
    groups = tuple(layers[start:end] for start, end in zip(starts, [*starts[1:], len(layers)], strict=True))
    cut = Cut(typed.program, groups, tuple(begins(typed.program, layers, starts)))
    places = placement(policy.schedule, degree, stages // degree)
    problems = [*crossings(cut), *lost_writes(cut, names)]
    if problems:
        raise ShardingError(problems)
    costs = [sum(found.costs[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    costs[0] += found.first
    costs[-1] += found.last
    readers = readers_of(cut)
    homes = homes_of(cut, names, readers)
    hollow = {stage: tuple(hollow_modules(typed, cut, stage, names)) for stage in range(1, stages)}
    return PipelinePlan(
        schedule=policy.schedule,
        degree=degree,
        microbatches=microbatch_count(policy, mesh),
        stages=tuple(
            StagePlan(
                index=stage,
                rank=places[stage],
                layers=groups[stage],
                cost=costs[stage],
                params=tuple(name for name, at in homes.items() if stage in at),
                names=tuple(names_on(stage, names, homes, readers)),
                hollow=hollow.get(stage, ()),
                dense=stage > 0 and any(map(overwrites, typed.program.nodes[: cut.begins[stage]])),
                receives=received(typed, cut, stage, policy.param_dtype)[0] if stage else None,
                beside=received(typed, cut, stage, policy.param_dtype)[1:] if stage else (),
            )
            for stage in range(stages)
        ),
    )


def refused(node: Node | None, why: str) -> ShardingError:
    """SS331 at a node."""
    return ShardingError(
        [Diagnostic(code="SS331", what=WHOLE, why=why, locations=(node.location,) if node is not None else ())]
    )


def begins(program: Program, layers: Sequence[str], starts: Sequence[int]) -> Iterator[int]:
    """The node of each stage's first layer.

    Raises:
        ShardingError: SS331 for layers that do not run once each, one after another.
    """
    nodes = program.nodes[: program.forward_nodes]
    at: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        if node.op == "block":
            at.setdefault(node.func.fqn, []).append(position)
    last = -1
    for index, layer in enumerate(layers):
        places = at.get(layer, [])
        if len(places) != 1:
            raise refused(
                nodes[places[1]] if places else None,
                f"{layer} runs {len(places)} times in a forward, or inside another layer; a stage's runs once",
            )
        if places[0] < last:
            raise refused(nodes[places[0]], f"{layer} runs before {layers[index - 1]}: layers run in the order of pp")
        last = places[0]
        node = nodes[last]
        if index in starts:
            first = next((inner for inner in node.func.block.nodes if inner.op == "point"), None)
            enters = first is not None and ":in" in first.func and first.args[0].index == node.func.block.inputs[0]
            if not (node.args and enters):
                raise refused(node, f"{layer} is not given what it computes on as its first argument, a tensor")
            yield last


def crossings(cut: Cut) -> Iterator[Diagnostic]:
    """SS331 for each value that a stage reads, cannot make again from the batch and buffers, and is not given."""
    program = cut.program
    said: set[tuple[str, int]] = set()
    for stage in range(1, len(cut.begins)):
        begin, carried = cut.begins[stage], cut.carried(stage)
        known = reproducible(program, begin)
        for position in range(begin, len(program.nodes)):
            node = program.nodes[position]
            for ref in node.operands:
                made = known.get(ref.index)
                given = position == begin and ref.index in carried
                if made is not False or given or (node.file, node.line) in said:
                    continue
                said.add((node.file, node.line))
                first = cut.layers[stage][0]
                yield Diagnostic(
                    code="SS331",
                    what=f"{first} begins a stage, and what comes after reads a value that an earlier stage made",
                    why=f"between two stages the arguments of {first} cross; all else is made again on each stage from "
                    "the batch and buffers, and this takes parameters or layers",
                    locations=(node.location,),
                    advice=("pass it through the layers, as an argument and a result, or make it in each layer",),
                )


def overwrites(node: Node) -> bool:
    """Whether a node writes to a tensor that it is given."""
    return isinstance(node.func, OpOverload) and writes(node.func)


def lost_writes(cut: Cut, names: View) -> Iterator[Diagnostic]:
    """SS331 for a forward's write to a persistent buffer outside of layers: each stage has its own of it."""
    for node in cut.program.nodes:
        target = cut.program.values[node.operands[0].index] if overwrites(node) and node.operands else None
        if target is not None and target.kind == "buffer" and names.parameters[target.name].persistent:
            yield Diagnostic(
                code="SS331",
                what=f"the forward writes to the buffer {target.name}, which every stage has",
                why="not every stage comes by this line, or has what it writes: their buffers would no longer be one",
                locations=(node.location,),
                advice=("keep the buffer in a layer, or make it not persistent",),
            )


def reproducible(program: Program, end: int) -> dict[int, bool]:
    """Value made before a node -> whether any rank can make it: from entries, buffers and constants alone.

    Parameters themselves are in no stage's way, and are not in it.
    """
    known: dict[int, bool] = {
        index: True for index, value in enumerate(program.values) if value.kind in ("entry", "buffer", "constant")
    }
    for node in program.nodes[:end]:
        able = node.op != "block" and all(
            program.values[ref.index].kind != "param" and known.get(ref.index, False) for ref in node.operands
        )
        known.update((index, able) for index in node.outputs if index is not None)
    return known


Readers = Mapping[str, Mapping[int, frozenset[str]]]
"""Name in the program of a parameter or buffer -> stage -> the modules whose own forward reads it there."""


def readers_of(cut: Cut) -> Readers:
    """Who reads each parameter and buffer."""
    found: dict[str, dict[int, frozenset[str]]] = {}
    for position, node in enumerate(cut.program.nodes):
        called = [("", cut.program, [node])]
        if node.op == "block":
            called += [(fqn, graph, graph.nodes) for fqn, graph in graphs(node.func.block, node.func.fqn)]
        for fqn, graph, nodes in called:
            by_value = {index: name for name, index in graph.params.items()}
            for inner in nodes:
                for ref in inner.operands if by_value else ():
                    if ref.index in by_value:
                        at = found.setdefault(absolute(fqn, by_value[ref.index]), {})
                        stage, path = cut.stage_at(position), absolute(fqn, inner.path)
                        at[stage] = at.get(stage, frozenset()) | {path}
    return found


def homes_of(cut: Cut, names: View, readers: Readers) -> dict[str, tuple[int, ...]]:
    """First name of a parameter or buffer -> the stages that read it; a buffer outside of layers is on all."""
    found: dict[str, set[int]] = {}
    for name, at in readers.items():
        found.setdefault(names.parameters[name].first, set()).update(at)
    layer_stage = {layer: stage for stage, layers in enumerate(cut.layers) for layer in layers}
    everywhere = tuple(range(len(cut.begins)))
    homes: dict[str, tuple[int, ...]] = {}
    for name, known in names.parameters.items():
        if known.first != name:
            continue
        parts = name.split(".")
        layer = next((path for end in range(1, len(parts)) if (path := ".".join(parts[:end])) in layer_stage), None)
        if known.is_buffer and layer is None:
            homes[name] = everywhere
        else:
            homes[name] = tuple(sorted(found.get(name, {layer_stage[layer] if layer else 0})))
    return homes


def names_on(stage: int, names: View, homes: Mapping[str, tuple[int, ...]], readers: Readers) -> Iterator[str]:
    """The names under which a stage's modules hold what lies there.

    Of a tied parameter those whose module reads it there; all where another module does, through an attribute.
    """
    owners: dict[str, set[str]] = {}
    for name, known in names.parameters.items():
        owners.setdefault(known.first, set()).add(name.rpartition(".")[0])
    reading: dict[str, frozenset[str]] = {}
    for name, at in readers.items():
        first = names.parameters[name].first
        reading[first] = reading.get(first, frozenset()) | at.get(stage, frozenset())
    for name, known in names.parameters.items():
        if stage in homes[known.first]:
            used = reading.get(known.first, frozenset())
            if name.rpartition(".")[0] in used or not used & owners[known.first]:
                yield name


def hollow_modules(typed: TypedProgram, cut: Cut, stage: int, names: View) -> Iterator[ActivationPlan]:
    """The modules that run before a stage's first layer and read parameters: they return placeholders there.

    Raises:
        ShardingError: SS331 for one that returns anything but one tensor, or a tuple of them.
    """
    program = cut.program
    ancestors = {
        layer.rsplit(".", back)[0] for group in cut.layers for layer in group for back in range(1, layer.count(".") + 1)
    }
    read = {name for name, known in names.parameters.items() if not known.is_buffer}

    called = {
        str(name).partition(":")[0]
        for node in program.nodes[: cut.begins[stage]]
        for name in ((node.func.fqn,) if node.op == "block" else node.func[:1] if node.op == "point" else ())
    }

    def outermost(path: str) -> str:
        """The outermost module around `path` that is called, and that no layer lies in."""
        parts = path.split(".")
        around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return next((outer for outer in around if outer in called and outer not in ancestors), "")

    done: dict[str, ActivationPlan] = {}
    for node in program.nodes[: cut.begins[stage]]:
        if node.op == "block" and node.func.fqn == outermost(node.func.fqn):
            path, outputs = node.func.fqn, [index for index in node.outputs if index is not None]
            nested = node.nested if type(node.nested) is tuple else (node.nested,)
            if len(outputs) != len(nested) or not all(isinstance(item, Ref) for item in nested):
                raise refused(
                    node,
                    f"{path} returns {len(outputs)} tensors in a nest; a layer before the cut returns one, or a tuple",
                )
        elif node.op == "point":
            name = str(node.func[0])
            path, _, side = name.partition(":")
            if path != outermost(path) or path not in names.modules or side.startswith("in"):
                continue
            outputs = [index for index in node.outputs if index is not None]
            if side and any(other.startswith(f"{path}.") for other in read):
                raise refused(node, f"{path} returns several tensors; a module before the cut returns one")
        else:
            continue
        if any(other.startswith(f"{path}.") for other in read):
            for place, index in enumerate(outputs if node.op == "block" else outputs[:1]):
                name = f"{path}:out.{place}" if place else path
                done[name] = activation(typed, name, index)
    yield from done.values()


def activation(typed: TypedProgram, name: str, index: int) -> ActivationPlan:
    """A value of the program as a rank holds it."""
    value: Value = typed.program.values[index]
    return ActivationPlan(name=name, layout=typed.forward.layout(index), dtype=str(value.dtype).removeprefix("torch."))


def received(typed: TypedProgram, cut: Cut, stage: int, dtype: torch.dtype | None) -> tuple[ActivationPlan, ...]:
    """What enters a stage's first layer, its first argument in front.

    A floating-point activation is in the dtype that parameters are read in; a scalar, which changes no other's, is not.
    """
    first = f"{cut.layers[stage][0]}:in"
    found: list[ActivationPlan] = []
    for index, name in cut.carried(stage).items():
        plan, value = activation(typed, f"{first}.{name}" if name else first, index), typed.program.values[index]
        if dtype is not None and value.dtype.is_floating_point and value.shape:
            plan = evolve(plan, dtype=str(dtype).removeprefix("torch."))
        found.append(plan)
    return tuple(found)
