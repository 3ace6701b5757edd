"""The part of a typed program that one stage of a pipeline runs, as a graph that reads what crosses into it."""

from attrs import evolve

from shardspec.cotangent import Backward
from shardspec.infer import TypedGraph
from shardspec.plan import PipelinePlan, StagePlan
from shardspec.program import Block, Graph, Node, Program, tensors
from shardspec.stages import TypedProgram


def excerpt(typed: TypedProgram, pipeline: PipelinePlan, stage: int) -> tuple[TypedGraph, Backward]:
    """The nodes that a stage runs, with what is known of each.

    Its inputs are what crosses into its first layer (nothing on the first stage), its outputs what crosses to the next,
    or the program's. What comes before the first layer runs again there, without gradients, beside hollow modules.
    """
    program, whole, back = typed.program, typed.forward, typed.backward
    begin, end = (_begin(program, pipeline, index) for index in (stage, stage + 1))
    hollow = {module.name for module in pipeline.stages[stage].hollow}
    positions = [at for at, node in enumerate(program.nodes[:end]) if at >= begin or not _is_within(node, hollow)]
    nodes = [
        evolve(node, grad=node.grad and (at >= begin or not stage))
        for at, node in ((at, program.nodes[at]) for at in positions)
    ]
    graph = Graph(
        values=program.values,
        nodes=nodes,
        params=program.params,
        inputs=crossing(program.nodes[begin], pipeline.stages[stage]) if stage else [],
        outputs=(
            crossing(program.nodes[end], pipeline.stages[stage + 1])
            if stage + 1 < len(pipeline.stages)
            else [ref.index for ref in tensors(program.result)]
        ),
    )
    new = {old: at for at, old in enumerate(positions)}
    kept = evolve(
        whole,
        graph=graph,
        consumed={new[at]: item for at, item in whole.consumed.items() if at in new},
        local={new[at]: item for at, item in whole.local.items() if at in new},
        lowering={new[at]: item for at, item in whole.lowering.items() if at in new},
        transitions={new[at]: item for at, item in whole.transitions.items() if at in new},
        calls={new[at]: item for at, item in whole.calls.items() if at in new},
        bodies={new[at]: item for at, item in whole.bodies.items() if at in new},
        live={},
    )
    moves = {new[at]: item for at, item in back.moves.items() if at in new}
    calls = {new[at]: item for at, item in back.calls.items() if at in new}
    return kept, evolve(back, typed=kept, moves=moves, calls=calls)


def crossing(layer: Node, stage: StagePlan) -> list[int]:
    """The values that cross into a stage, by the call of its first layer."""
    block: Block = layer.func.block
    points = {inner.func[0]: inner.args[0].index for inner in block.nodes if inner.op == "point"}
    beside = (points[f":in.{plan.name.rpartition(':in.')[2]}"] for plan in stage.beside)
    return [layer.args[0].index, *(layer.args[block.inputs.index(index)].index for index in beside)]


def _begin(program: Program, pipeline: PipelinePlan, stage: int) -> int:
    """The node of a stage's first layer; the end of the program behind the last stage."""
    if stage == len(pipeline.stages):
        return len(program.nodes)
    first = pipeline.stages[stage].layers[0]
    return next(at for at, node in enumerate(program.nodes) if node.op == "block" and node.func.fqn == first)


def _is_within(node: Node, hollow: set[str]) -> bool:
    """Whether a node is of a module that computes on another stage."""
    name = node.func.fqn if node.op == "block" else str(node.func[0]) if node.op == "point" else node.path
    path = name.partition(":")[0]
    while path and path not in hollow:
        path = path.rpartition(".")[0]
    return path in hollow
