"""Attention over a split sequence: the numbers stay those of the plain program, by each strategy."""

from collections import Counter

import pytest
import torch

import shardspec as ss
from models.llama import RULES
from shardspec.testing import assert_parity
from tests import reader
from tests.distributed import parity
from tests.distributed.context import TOLERANCE, Case, compare
from tests.distributed.harness import CollectiveLog, run_ranks
from tests.distributed.test_collectives import Calls, ranks_of
from tests.test_context import whole_table

COVERING = [
    Case("cp=2", "allgather", balance=True, kv_heads=2),
    Case("cp=2", "allgather", balance=False, value_dim=2),
    Case("cp=2", "allgather", "documents", balance=True, kv_heads=1),
    Case("cp=2", "allgather", "biased"),
    Case("cp=2", "allgather", "padded", balance=True),
    Case("cp=2", "ring", balance=True, kv_heads=1, remat=True),
    Case("cp=2", "ring", "full", balance=True, value_dim=2),
    Case("cp=2", "ring", balance=False, accumulate=2),
    Case("cp=2", "ulysses", balance=True, kv_heads=2),
    Case("cp=2", "ulysses", "documents"),
    Case("cp=2", "ulysses", "biased", balance=True),
    Case("cp=2,tp=2", "ring", kv_heads=2),
    Case("cp=2,tp=2", "allgather", "biased", remat=True),
    Case("cp=2,tp=2", "ulysses"),
    Case("fsdp=2,cp=2", "ring", "full"),
    Case("fsdp=2,cp=2", "allgather", accumulate=2),
    Case("dp=2,cp=2", "ulysses", "documents"),
    Case("pp=2,cp=2", "ring", kv_heads=2),
    Case("pp=2,cp=2", "allgather", "documents", remat=True),
    Case("cp=4", "ring", kv_heads=2),
    Case("cp=4", "ring", balance=False),
    Case("cp=4", "allgather", "full", value_dim=2),
    Case("cp=4", "allgather", kv_heads=1),
]


@pytest.mark.parametrize("world", sorted({case.world for case in COVERING}))
def test_loss_gradients_and_parameters_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]

    def run(rank: int, size: int) -> list[dict[str, float]]:
        return [compare(case) for case in cases]

    found = dict(zip(cases, run_ranks(world, run)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if not max(wrong.values()) <= TOLERANCE} == {}


def planned(plan: ss.Plan, rank: int) -> Calls:
    """What the plan says of a step; a message of the ring is an exchange in which each rank sends to one other."""
    calls: Calls = Counter()
    for row in plan.collectives:
        kind = "all_to_all" if row.kind == "send_recv" else row.kind
        calls[kind, ranks_of(plan.mesh, row.axes, rank), row.bytes] += row.count
    return calls


MESSAGES = [
    *(Case("cp=2", strategy, kv_heads=2) for strategy in ("allgather", "ring", "ulysses")),
    Case("cp=2", "allgather", "documents"),
    Case("cp=2", "ring", remat=True),
    Case("cp=2", "allgather", remat=True, accumulate=2),
    Case("cp=4", "ring"),
    Case("fsdp=2,cp=2", "ulysses", remat=True),
    Case("cp=2,tp=2", "allgather", kv_heads=4),
]


@pytest.mark.parametrize("world", sorted({case.world for case in MESSAGES}))
def test_a_step_runs_the_messages_of_its_plan(world: int):
    cases = [case for case in MESSAGES if case.world == world]

    def run(rank: int, size: int) -> list[tuple[Calls, Calls]]:
        found: list[tuple[Calls, Calls]] = []
        for case in cases:
            sharded = case.shard()
            state = sharded.init(ss.sgd(lr=1e-3))
            step, batch = ss.train_step(sharded, reader.loss_fn), sharded.local_batch(case.batch())
            state, _ = step(state, batch)
            with CollectiveLog() as log:
                step(state, batch)
            ran = Counter((call.kind, call.ranks, call.bytes) for call in log.collectives)
            found.append((planned(sharded.program(batch, reader.loss_fn), rank), ran))
        return found

    for found in run_ranks(world, run):
        for case, (expected, ran) in zip(cases, found, strict=True):
            assert ran == expected, case


def drop(case: Case) -> list[float]:
    """The losses of three steps with dropout between layers."""
    torch.set_default_dtype(torch.float64)
    model = lambda: reader.build(reader.Shape(hidden_dropout=0.3))  # noqa: E731
    sharded = ss.shard(
        model, reader.table("causal", case.strategy), ss.Mesh.parse(case.mesh), case.batch(), policy=case.policy
    )
    state, step = sharded.init(ss.sgd(lr=0.1), seed=1), ss.train_step(sharded, reader.loss_fn)
    losses: list[float] = []
    for index in range(3):
        state, metrics = step(state, sharded.local_batch(case.batch(index)))
        losses.append(float(metrics["loss"]))
    return losses


def test_dropout_drops_the_same_whichever_part_of_the_sequence_a_rank_holds():
    cases = [Case("cp=2", "ring", balance=balance) for balance in (True, False)]
    found = run_ranks(2, lambda _rank, _world: [drop(case) for case in cases])[0]
    alone = run_ranks(1, lambda _rank, _world: drop(Case("", "ring")))[0]
    assert [pytest.approx(alone, abs=1e-12)] * 2 == found


@pytest.mark.parametrize("balance", [True, False])
def test_a_table_that_lies_with_the_sequence_gives_each_rank_its_own_rows(balance: bool):
    model = parity.make_model(parity.make_config(tied=False))
    model.register_buffer("rope_cos", model.rope_cos[:8], persistent=False)
    model.register_buffer("rope_sin", model.rope_sin[:8], persistent=False)
    whole_table(model)
    rules = RULES.override(drop=["positions"], params={r"rope_(cos|sin)": "S@cp hd"})
    policy = ss.Policy(balance=balance)
    assert_parity(model, rules, ss.Mesh(cp=2), parity.make_batch(0), parity.loss_fn, policy=policy)


def test_strategies_may_differ_from_layer_to_layer():
    model, batch = reader.build(reader.Shape()), reader.make_batch(documents=False)
    policy = ss.Policy(attention={r"layers\.0\..*": "ulysses", ".*": "ring"})
    assert_parity(model, reader.table("causal", "ring"), ss.Mesh(cp=2), batch, reader.loss_fn, policy=policy)


def test_parts_that_follow_one_another_are_refused_where_ranks_hold_head_and_tail():
    def run(rank: int, _: int) -> str:
        case = Case("cp=2", "ring")
        sharded = case.shard()
        state, step = sharded.init(ss.sgd(lr=0.1)), ss.train_step(sharded, reader.loss_fn)
        own = {name: item.chunk(2, -1)[rank] for name, item in case.batch().items()}
        with pytest.raises(ss.ShardingError) as caught:
            step(state, own)
        step(state, sharded.local_batch(case.batch()))
        return caught.value.diagnostics[0].code

    assert run_ranks(2, run) == ["SS411"] * 2


def test_parts_that_follow_one_another_are_what_an_unbalanced_plan_reads():
    def run(rank: int, _: int) -> bool:
        case = Case("cp=2", "ring", balance=False)
        sharded = case.shard()
        own = {name: item.chunk(2, -1)[rank] for name, item in case.batch().items()}
        cut = sharded.local_batch(case.batch())
        return all(torch.equal(own[name], cut[name]) for name in own)

    assert run_ranks(2, run) == [True, True]
