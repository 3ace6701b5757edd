"""The rows of a pipeline's plan: which stage makes which collective, and what crosses between stages."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod

from attrs import evolve

from shardspec.lower import step_collectives, unit_collectives
from shardspec.mesh import Mesh
from shardspec.plan import Collective, LossPlan, ParamPlan, PipelinePlan, StagePlan, UnitPlan
from shardspec.policy import Policy
from shardspec.summary import itemsize


def staged_params(params: Mapping[str, ParamPlan], pipeline: PipelinePlan) -> dict[str, ParamPlan]:
    """The same, each with the first stage that holds it."""
    first = {name: stage.index for stage in reversed(pipeline.stages) for name in stage.params}
    return {name: evolve(plan, stage=first[plan.first]) for name, plan in params.items()}


def staged_points(
    rows: Iterable[Collective], pipeline: PipelinePlan, params: Mapping[str, ParamPlan]
) -> Iterator[Collective]:
    """The collectives of points and of the loss, each with the stage that makes it; None where all do."""
    found: dict[str, int] = {layer: stage.index for stage in pipeline.stages for layer in stage.layers}
    hollow = {module.name for stage in pipeline.stages for module in stage.hollow}
    last = len(pipeline.stages) - 1
    for name, plan in params.items():
        path = name.rpartition(".")[0]
        while path and not plan.buffer:
            homes = [stage.index for stage in pipeline.stages if plan.first in stage.params]
            found.setdefault(path, homes[0] if path in hollow or name == plan.first else homes[-1])
            path = path.rpartition(".")[0]
    for row in rows:
        path = row.where.partition(":")[0]
        while path and path not in found and path != "loss":
            path = path.rpartition(".")[0]
        yield evolve(row, stage=last if path == "loss" else found.get(path))


def stage_units(units: Iterable[UnitPlan], params: Mapping[str, ParamPlan], stage: StagePlan) -> tuple[UnitPlan, ...]:
    """What of each unit lies on a stage; the root unit last, as in `units`."""
    held = set(stage.params)
    hollow = {module.name for module in stage.hollow}
    inside: set[str] = set()
    for name in stage.names:
        path = name.rpartition(".")[0]
        while path and path not in inside and not params[name].buffer:
            inside.add(path)
            path = path.rpartition(".")[0]
    return tuple(
        evolve(
            unit,
            modules=tuple(path for path in unit.modules if path in inside and path not in hollow),
            params=tuple(name for name in unit.params if name in held),
        )
        for unit in units
    )


def staged_units(
    params: Mapping[str, ParamPlan],
    units: tuple[UnitPlan, ...],
    mesh: Mesh,
    pipeline: PipelinePlan,
    policy: Policy,
) -> Iterator[Collective]:
    """What FSDP2 moves on each stage: it gathers once a step, and scatters gradients once."""
    kept = evolve(policy, reshard_after_forward=False)
    for stage in pipeline.stages:
        own = stage_units(units, params, stage)
        yield from (evolve(row, stage=stage.index) for row in unit_collectives(params, own, mesh, "", kept))


def staged_steps(
    params: Mapping[str, ParamPlan], mesh: Mesh, loss: LossPlan | None, pipeline: PipelinePlan
) -> Iterator[Collective]:
    """The reductions of a step on each rank, under the first stage that it runs; those of tied parameters; the loss."""
    for rank in range(pipeline.degree):
        stages = pipeline.on(rank)
        held = {name for stage in stages for name in stage.params}
        own = {name: plan for name, plan in params.items() if plan.first in held}
        yield from (evolve(row, stage=stages[0].index) for row in step_collectives(own, mesh, None))
    shared: Counter[tuple[tuple[int, ...], str]] = Counter()
    for name, plan in params.items():
        homes = pipeline.homes(name)
        if len(homes) > 1 and plan.trained and not plan.buffer:
            shared[(homes, plan.dtype)] += prod(plan.local_shape) * itemsize(plan.dtype)
    for (homes, dtype), size in shared.items():
        for rank in homes:
            yield Collective(
                kind="all_reduce",
                axes=("pp",),
                where="tied gradients",
                phase="step",
                count=1,
                bytes=size,
                why=f"held on pp {' and '.join(map(str, homes))}, {dtype}",
                stage=pipeline.on(rank)[0].index,
            )
    yield from step_collectives({}, mesh, loss)


def sends(pipeline: PipelinePlan) -> Iterator[Collective]:
    """What crosses between stages that lie on different ranks, in a step; each row under the stage that sends."""
    for before, stage in zip(pipeline.stages, pipeline.stages[1:], strict=False):
        if before.rank == stage.rank:
            continue
        back = f"stage {stage.index} to {before.index}"
        for plan in stage.crossing:
            row = Collective(
                kind="send_recv",
                axes=("pp",),
                where=f"stage {before.index} to {stage.index}",
                phase="forward",
                count=pipeline.microbatches,
                bytes=prod(plan.layout.shape) * itemsize(plan.dtype),
                why=plan.name,
                stage=before.index,
            )
            yield row
            if plan.floating:
                yield evolve(row, where=back, phase="backward", why="its gradient", stage=stage.index)
