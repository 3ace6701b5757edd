"""The collectives that a step runs are those of its plan: kind, group, count and bytes."""

from collections import Counter

import pytest
import torch

import shardspec as ss
from models.llama.rules import WITHOUT_SP
from shardspec.mesh import AXES
from tests.distributed import parity
from tests.distributed.harness import CollectiveLog, run_ranks

Calls = Counter[tuple[str, tuple[int, ...], int]]
"""(kind, ranks of the group, bytes of the message) -> how often."""


def ranks_of(mesh: ss.Mesh, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """The ranks that differ from `rank` on `axes` alone."""
    places = list(mesh.coordinates())
    fixed = [axis for axis in AXES if axis not in axes]
    return tuple(i for i, place in enumerate(places) if all(place[a] == places[rank][a] for a in fixed))


def planned(plan: ss.Plan, rank: int) -> Calls:
    calls: Calls = Counter()
    for row in plan.collectives:
        calls[row.kind, ranks_of(plan.mesh, row.axes, rank), row.bytes] += row.count
    return calls


def compare_step(rank: int, world: int, case: parity.Case) -> tuple[Calls, Calls]:
    """What the plan says of a training step, and what one ran after a first that made the groups."""
    torch.set_default_dtype(torch.float64)
    sharded = ss.shard(
        lambda: case.family.make(case.tied),
        case.family.rules[case.sp],
        ss.Mesh.parse(case.mesh),
        policy=ss.Policy(accumulate=case.accumulate, remat=case.remat),
    )
    state = sharded.init(ss.adamw(lr=1e-3))
    step = ss.train_step(sharded, parity.loss_fn, clip=1.0)
    batch = sharded.local_batch(case.family.batch(0))
    state, _ = step(state, batch)
    with CollectiveLog() as log:
        state, _ = step(state, batch)
    plan = sharded.program(batch, parity.loss_fn)
    return planned(plan, rank), Counter((call.kind, call.ranks, call.bytes) for call in log.collectives)


CASES = [
    parity.Case("dp=2"),
    parity.Case("tp=2"),
    parity.Case("tp=2", sp=False),
    parity.Case("tp=2", remat=True),
    parity.Case("fsdp=2"),
    parity.Case("fsdp=2", remat=True),
    parity.Case("fsdp=4"),
    parity.Case("fsdp=4", tied=True),
    parity.Case("dp=2,fsdp=2"),
    parity.Case("fsdp=2,tp=2"),
    parity.Case("fsdp=2,tp=2", tied=True, sp=False),
    parity.Case("fsdp=2,tp=2", accumulate=2),
    parity.Case("dp=2,tp=2"),
    parity.Case("dp=2,fsdp=2,tp=2"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_runs_the_collectives_of_its_plan(case: parity.Case):
    for expected, ran in run_ranks(case.world, compare_step, case):
        assert ran == expected


def test_a_layer_without_sequence_parallelism_has_two_all_reduces_in_backward():
    def count(rank: int, world: int) -> tuple[int, int]:
        torch.set_default_dtype(torch.float64)
        make = lambda: parity.make_model(parity.make_config(tied=False))  # noqa: E731
        sharded = ss.shard(make, WITHOUT_SP, ss.Mesh(tp=2))
        params, batch = sharded.init(ss.sgd(lr=1e-3)).params, sharded.local_batch(parity.make_batch(0))
        grad_fn = sharded.value_and_grad(parity.loss_fn)
        with CollectiveLog() as log:
            grad_fn(params, batch)
        rows = sharded.program(batch, parity.loss_fn).collectives
        backward = sum(row.count for row in rows if row.phase == "backward")
        stream = parity.ROWS * parity.SEQ * parity.SIZES["dim"] * 8
        return sum(call.bytes == stream for call in log.collectives), backward

    layers, embedding, head = parity.SIZES["n_layers"], 1, 1
    for ran, backward in run_ranks(2, count):
        assert backward == 2 * layers + head
        assert ran == 2 * layers + embedding + backward
