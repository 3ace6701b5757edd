"""Experts over ep on real ranks, against the plain program in float64: loss, every gradient, parameters after steps."""

from collections import Counter

import pytest
import torch

import shardspec as ss
from tests.distributed import test_pipeline
from tests.distributed.harness import CollectiveLog, run_ranks
from tests.distributed.parity import TOLERANCE, Case, Family, loss_fn, plain_loss, run_cases
from tests.distributed.test_collectives import Calls, ranks_of
from tests.mixture import PLAIN_RULES, RULES, Config, Mixture, Plain, make_batch


def family(name: str, rules=RULES, **options) -> Family:
    """A family of one model and one table."""
    return Family(
        name=name,
        make=lambda _: Mixture(Config(**options)),
        rules={True: rules},
        batch=make_batch,
        plain_loss=plain_loss,
    )


LOOPED = family("looped")
PLAIN = family("plain", PLAIN_RULES, kind=Plain)

CASES = [
    Case("", family=LOOPED),
    Case("ep=2", family=LOOPED),
    Case("tp=2", family=LOOPED),
    Case("ep=2", family=PLAIN, accumulate=2, remat=True),
    Case("ep=2", family=family("one-expert-a-token", bias=(9.0, 8.0, 0.0, 0.0))),
    Case("ep=2", family=family("last-rank-only", bias=(0.0, 0.0, 8.0, 9.0)), remat=True),
    Case("ep=2", family=family("ties", flat=True)),
    Case("ep=2,fsdp=2", family=LOOPED, remat=True),
    Case("ep=2,fsdp=2", family=PLAIN),
    Case("ep=2,fsdp=2", family=family("skewed", bias=(9.0, 8.0, 0.0, 0.0)), accumulate=2),
    Case("ep=2,tp=2", family=LOOPED, remat=True),
    Case("ep=2,tp=2", family=PLAIN),
    Case("ep=2,dp=2", family=LOOPED),
    Case("ep=4", family=LOOPED),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, float]]:
    return {str(case): found for case, found in run_cases(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_over_ep_train_as_the_plain_program_does(case: Case, outcomes: dict[str, dict[str, float]]):
    found = outcomes[str(case)]
    assert max(found.values()) <= TOLERANCE, found


def compare_step(rank: int, world: int, case: Case) -> tuple[Calls, Calls, Calls]:
    """What the plan says of a step exactly, what it expects, and what ran."""
    torch.set_default_dtype(torch.float64)
    policy = ss.Policy(accumulate=case.accumulate, remat=case.remat)
    rules, mesh = case.family.rules[True], ss.Mesh.parse(case.mesh)
    sharded = ss.shard(lambda: case.family.make(False), rules, mesh, policy=policy)
    step, batch = ss.train_step(sharded, loss_fn, clip=1.0), sharded.local_batch(make_batch(0))
    state, _ = step(sharded.init(ss.adamw(lr=1e-3)), batch)
    with CollectiveLog() as log:
        step(state, batch)
    exact, expected = Counter(), Counter()
    for row in sharded.program(batch, loss_fn).collectives:
        (expected if row.expected else exact)[row.kind, ranks_of(mesh, row.axes, rank), row.bytes] += row.count
    return exact, expected, Counter((call.kind, call.ranks, call.bytes) for call in log.collectives)


@pytest.mark.parametrize(
    "case",
    [
        Case("ep=2", family=LOOPED),
        Case("ep=2,fsdp=2", family=LOOPED, remat=True, accumulate=2),
        Case("ep=2,tp=2", family=PLAIN),
        Case("ep=2,dp=2", family=LOOPED),
    ],
    ids=str,
)
def test_a_step_runs_the_messages_of_its_plan_and_over_all_ranks_those_that_it_expects(case: Case):
    found = run_ranks(case.world, compare_step, case)
    promised = ran = 0
    for exact, expected, calls in found:
        rest = calls - exact
        assert not exact - calls
        assert rest.total() == expected.total()
        assert {kind for kind, _, _ in rest} == {"all_to_all"}
        promised += sum(size * times for (_, _, size), times in expected.items())
        ran += sum(size * times for (_, _, size), times in rest.items())
    assert promised == ran


PIPELINED = [
    test_pipeline.Case("pp=2,ep=2", "1F1B", remat=True, other=family("deep", n_layers=4)),
    test_pipeline.Case(
        "pp=2,ep=2", "ZBVZeroBubble", other=family("deep, skewed", n_layers=4, bias=(9.0, 8.0, 0.0, 0.0))
    ),
]


def test_experts_on_stages_train_as_the_plain_program_does():
    for found in run_ranks(4, lambda rank, world: [test_pipeline.run_case(case) for case in PIPELINED])[0]:
        assert max(found.values()) <= TOLERANCE, found
