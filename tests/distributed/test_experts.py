"""Experts over ep on real ranks, against the plain program in float64: loss, every gradient, parameters after steps."""

from collections import Counter

import attrs
import pytest
import torch

import shardspec as ss
from benchmarks.measure import own_bytes
from tests.distributed import test_pipeline
from tests.distributed.harness import CollectiveLog, run_ranks
from tests.distributed.parity import TOLERANCE, Case, Family, loss_fn, plain_loss, run_cases
from tests.distributed.test_collectives import Calls, ranks_of
from tests.mixture import PLAIN_RULES, RULES, SEQUENCE_RULES, Config, Mixture, Plain, make_batch


def family(name: str, rules=RULES, **options) -> Family:
    """A family of one model and one table."""
    return Family(
        name=name,
        make=lambda _: Mixture(Config(**options)),
        rules={True: rules},
        batch=make_batch,
        plain_loss=plain_loss,
    )


def tight_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The plain loss where an expert takes no more than its even share of the assignments: 16 * 8 * 2 / 4."""
    for layer in model.layers:
        layer.moe.capacity = 64
    return plain_loss(model, batch)


TIGHT = attrs.evolve(family("tight", RULES.override(capacity=1.0)), plain_loss=tight_loss)
TIGHT_RUNS = attrs.evolve(TIGHT, name="tight-runs", rules={True: SEQUENCE_RULES.override(capacity=1.0)})
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
    Case("", family=TIGHT),
    Case("ep=2", family=TIGHT, remat=True),
    Case("fsdp=2", family=TIGHT),
    Case("ep=2,dp=2", family=TIGHT),
    Case("ep=2,tp=2", family=TIGHT),
    Case("ep=2,fsdp=2", family=TIGHT_RUNS),
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
        Case("ep=2,tp=2", family=attrs.evolve(LOOPED, rules={True: RULES.override(capacity=9.0)}), remat=True),
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


def told(rank: int, world: int, mesh: ss.Mesh, capacity: float) -> dict[str, torch.Tensor]:
    """The metrics of experts in a step of two microbatches."""
    torch.set_default_dtype(torch.float64)
    rules = RULES.override(capacity=capacity)
    make = lambda: Mixture(Config())  # noqa: E731
    sharded = ss.shard(make, rules, mesh, make_batch(), policy=ss.Policy(accumulate=2))
    _, metrics = ss.train_step(sharded, loss_fn)(sharded.init(ss.sgd(lr=1.0)), sharded.local_batch(make_batch()))
    return {name: torch.tensor(value.tolist()) for name, value in metrics.items() if name.startswith("experts/")}


def asked_in_first_layer(rank: int, world: int) -> torch.Tensor:
    """How many assignments ask for each expert of the first layer of the plain model, with the same weights."""
    torch.set_default_dtype(torch.float64)
    sharded = ss.shard(lambda: Mixture(Config()), RULES, ss.Mesh(), make_batch())
    model, chosen = Mixture(Config()), []
    model.load_state_dict(sharded.state_dict(sharded.init(ss.sgd(lr=1.0))))
    model.layers[0].moe.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    model(make_batch()["tokens"])
    return torch.bincount(chosen[0].flatten(), minlength=4).double()


def test_a_step_tells_every_rank_how_many_tokens_asked_for_each_expert_and_how_many_were_dropped():
    alone = run_ranks(1, told, ss.Mesh(), 0.75)[0]
    tokens, (most, _) = alone["experts/tokens"], alone["experts/tokens"].max(1)
    assert tokens.sum(1).tolist() == [16 * 8 * 2, 16 * 8 * 2]
    assert torch.equal(tokens[0], run_ranks(1, asked_in_first_layer)[0])
    assert float(alone["experts/imbalance"]) == pytest.approx(float(most.max()) / 64)
    # An expert takes 0.75 * 32 = 24 of a microbatch's 128: 96 of 256 are taken at most.
    assert 2 * (256 - 192) <= float(alone["experts/dropped"]) < 2 * 256
    for mesh in (ss.Mesh(ep=2, tp=2), ss.Mesh(pp=2, ep=2)):
        for found in run_ranks(4, told, mesh, 0.75):
            assert found.keys() == alone.keys()
            assert all(torch.equal(found[name], alone[name]) for name in alone), (mesh, found, alone)


def held(rank: int, world: int, mesh: ss.Mesh, batch: dict[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """Bytes of this rank's parameters and what a step adds at most, each measured and as the plan has it."""
    torch.set_num_threads(1)
    config = Config(n_experts=8, dim=64, ffn_dim=128)
    sharded = ss.shard(lambda: Mixture(config), RULES, mesh, batch)
    state, part = sharded.init(ss.adamw(lr=1e-3)), sharded.local_batch(batch)
    own = sum(local.untyped_storage().nbytes() for local in state.live().params.locals.values())
    step = ss.train_step(sharded, loss_fn)

    def again() -> None:
        nonlocal state
        state, _ = step(state, part)

    again()
    at = sharded.program(part, loss_fn).memory("adamw").at(mesh)
    return own, own_bytes(again, 2), at.kinds["parameters"], at.total - at.resident


def test_memory_counts_the_weights_of_experts_exactly_and_activations_as_for_tokens_that_choose_evenly():
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randint(0, 40, (16, 32), generator=generator) for name in ("tokens", "labels")}
    found = run_ranks(2, held, ss.Mesh(ep=2), batch)
    assert [own for own, _, _, _ in found] == [planned for _, _, planned, _ in found]
    measured, expected = (sum(each[at] for each in found) for at in (1, 3))
    assert 0.8 < expected / measured < 1.3


def dropping(rank: int, world: int, mesh: ss.Mesh) -> list[float]:
    """Loss, norm and dropped assignments of two steps in which sequences lie head and tail over cp."""
    torch.set_default_dtype(torch.float64)
    rules = RULES.override(
        capacity=1.0,
        params={r"embed\.weight": "V D@(fsdp,ep,cp)"},
        activations={r"tokens|labels": "B@(dp,fsdp,ep) S@cp", r"layers\.\d+\.moe": "B@(dp,fsdp,ep) S@cp D"},
    )
    sharded = ss.shard(lambda: Mixture(Config()), rules, mesh, make_batch(), policy=ss.Policy(balance=True))
    state, step, found = sharded.init(ss.sgd(lr=0.1), seed=2), ss.train_step(sharded, loss_fn), []
    for index in range(2):
        state, metrics = step(state, sharded.local_batch(make_batch(index)))
        found += [float(metrics[name]) for name in ("loss", "grad_norm", "experts/dropped")]
    return found


def test_the_same_assignments_are_dropped_where_sequences_lie_head_and_tail():
    alone = run_ranks(1, dropping, ss.Mesh())[0]
    assert alone[2] > 0
    for found in run_ranks(4, dropping, ss.Mesh(ep=2, cp=2)):
        assert found == pytest.approx(alone, rel=1e-12)
