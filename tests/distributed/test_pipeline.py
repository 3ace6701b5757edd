"""Pipelines: the model is cut and the numbers stay those of the plain program."""

import itertools
import os
import signal
import time
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import shardspec as ss
from models import gpt2, vit
from models.llama.model import LlamaConfig
from shardspec.runtime import pipeline
from shardspec.schedule import SCHEDULES, orders, stages_per_rank
from shardspec.torch_private import schedule_actions
from tests.distributed import parity
from tests.distributed.harness import CollectiveLog, RankError, run_ranks
from tests.distributed.parity import CLIP, OPTIMIZER, SIZES, STEPS, TOLERANCE, loss_fn, make_batch
from tests.distributed.test_collectives import Calls, ranks_of
from tests.distributed.test_families import GPT2, GPT2_SIZES, VIT, VIT_SIZES, enlarged


def make_model(*, tied: bool, layers: int = 4, vocab: int = SIZES["vocab_size"]) -> torch.nn.Module:
    config = {**SIZES, "n_layers": layers, "vocab_size": vocab}
    return parity.make_model(LlamaConfig(**config, max_seq_len=32, tied=tied))


GPT2_OF_4 = attrs.evolve(GPT2, make=lambda tied: enlarged(gpt2.build(attrs.evolve(GPT2_SIZES, n_layers=4))))
VIT_OF_4 = attrs.evolve(VIT, make=lambda tied: enlarged(vit.build(attrs.evolve(VIT_SIZES, n_layers=4))))


@attrs.frozen
class Case:
    """A mesh and a schedule, with a variant of model and table."""

    mesh: str
    schedule: str = "1F1B"
    tied: bool = False
    sp: bool = True
    remat: bool = False
    microbatches: int = 4
    layers: int = 4
    other: parity.Family | None = None
    """Another family than Llama."""
    dtype: torch.dtype | None = None
    """In which parameters are read."""

    @property
    def family(self) -> parity.Family:
        if self.other is not None:
            return self.other
        return attrs.evolve(parity.LLAMA, make=lambda tied: make_model(tied=tied, layers=self.layers))

    def __str__(self) -> str:
        parts = [self.mesh, self.schedule, "sp" if self.sp else "no-sp", "tied" if self.tied else "untied"]
        return " ".join(parts + ["remat"] * self.remat + ([self.other.name] if self.other else []))

    @property
    def world(self) -> int:
        return ss.Mesh.parse(self.mesh).world

    @property
    def policy(self) -> ss.Policy:
        return ss.Policy(
            schedule=self.schedule, microbatches=self.microbatches, remat=self.remat, param_dtype=self.dtype
        )

    def shard(self) -> Any:
        torch.set_default_dtype(torch.float64)
        family, mesh = self.family, ss.Mesh.parse(self.mesh)
        return ss.shard(
            lambda: family.make(self.tied), family.rules[self.sp], mesh, family.batch(0), policy=self.policy
        )


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, from the ranks of all stages; what two stages hold must be bitwise the same."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: ss.full(tensor) for name, tensor in tensors.items()})
    found: dict[str, Tensor] = {}
    for name, tensor in itertools.chain.from_iterable(held.items() for held in every):
        assert name not in found or torch.equal(found[name], tensor), f"{name} differs between ranks"
        found[name] = tensor
    return found


def run_case(case: Case) -> dict[str, float]:
    """The largest differences from the plain program; called on every rank."""
    sharded, family = case.shard(), case.family
    make_batch = family.batch
    state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
    initial = gathered(state.params)
    (loss, _), grads = sharded.value_and_grad(loss_fn)(state.params, sharded.local_batch(make_batch(0)), state.rng)
    grads = gathered(grads)
    step, evaluate = ss.train_step(sharded, loss_fn, clip=CLIP), ss.eval_step(sharded, loss_fn)
    losses, norms, evaluated = [], [], []
    for index in range(STEPS):
        batch = sharded.local_batch(make_batch(index))
        evaluated.append(float(evaluate(state, batch)["loss"]))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    params = gathered(state.params)
    whole = sharded.state_dict(state)
    for name, tensor in params.items():
        assert torch.equal(whole[name], tensor), name
    plain = parity.run_plain(initial, parity.Case("", tied=case.tied, family=family))
    found = parity.differences(plain, parity.Outcome(float(loss), grads, losses, norms, params, initial))
    return {**found, "evaluated": max(abs(one - two) for one, two in zip(evaluated, plain.losses, strict=True))}


COVERING = [
    Case("pp=2", "GPipe"),
    Case("pp=2", tied=True),
    Case("pp=2", "Interleaved1F1B", tied=True),
    Case("pp=2", "ZBVZeroBubble", tied=True),
    Case("pp=2", "LoopedBFS", other=GPT2_OF_4),
    Case("pp=2", other=VIT, sp=False),
    Case("pp=2,fsdp=2", tied=True),
    Case("pp=2,fsdp=2", "InterleavedZeroBubble", sp=False),
    Case("pp=2,tp=2", remat=True),
    Case("pp=2,tp=2", "ZBVZeroBubble", sp=False, tied=True),
    Case("pp=2,fsdp=2", "ZBVZeroBubble", other=VIT_OF_4, sp=False),
    Case("dp=2,pp=2", "DualPipeV"),
    Case("pp=4", tied=True),
]


@pytest.mark.parametrize("world", sorted({case.world for case in COVERING}))
def test_loss_gradients_norms_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]

    def run(rank: int, size: int) -> list[dict[str, float]]:
        return [run_case(case) for case in cases]

    found = dict(zip(cases, run_ranks(world, run)[0], strict=True))
    assert {str(case): wrong for case, wrong in found.items() if max(wrong.values()) > TOLERANCE} == {}


def planned(plan: ss.Plan, rank: int) -> Calls:
    """What the plan says that a rank runs: the rows of its stages, sends and receives as two kinds of call."""
    mine = {stage.index for stage in plan.pipeline.on(plan.mesh.coordinate(rank)["pp"])}
    calls: Calls = Counter()
    for row in plan.collectives:
        ranks = ranks_of(plan.mesh, row.axes, rank)
        if row.kind == "send_recv":
            sender, receiver = (int(word) for word in row.where.split() if word.isdecimal())
            calls["send", ranks, row.bytes] += row.count * (sender in mine)
            calls["recv", ranks, row.bytes] += row.count * (receiver in mine)
        elif row.stage is None or row.stage in mine:
            calls[row.kind, ranks, row.bytes] += row.count
    return +calls


def compare_step(case: Case, rank: int) -> tuple[Calls, Calls]:
    """What the plan says of a step, and what one ran after a first."""
    sharded = case.shard()
    state = sharded.init(ss.adamw(lr=1e-3))
    step = ss.train_step(sharded, loss_fn, clip=1.0)
    batch = sharded.local_batch(make_batch(0))
    state, _ = step(state, batch)
    with CollectiveLog() as log:
        step(state, batch)
    ran = Counter((call.kind, call.ranks, call.bytes) for call in log.collectives)
    return planned(sharded.program(batch, loss_fn), rank), ran


LOGGED = [
    Case("pp=2,fsdp=2", tied=True),
    Case("pp=2,tp=2", remat=True),
    Case("pp=2,tp=2", "ZBVZeroBubble", sp=False, tied=True),
    Case("pp=2,fsdp=2", "Interleaved1F1B"),
    Case("pp=2,fsdp=2", "GPipe", dtype=torch.float32),
    Case("pp=2,tp=2", dtype=torch.float32),
]


def test_a_step_sends_and_reduces_what_the_plan_says_byte_by_byte():
    def run(rank: int, world: int) -> list[tuple[Calls, Calls]]:
        return [compare_step(case, rank) for case in LOGGED]

    for rank, found in enumerate(run_ranks(4, run)):
        for case, (expected, ran) in zip(LOGGED, found, strict=True):
            assert ran == expected, f"{case} on rank {rank}"


def test_a_rank_holds_its_own_stages_alone_and_every_mesh_begins_with_the_same_bits():
    def run(rank: int, world: int, case: Case) -> tuple[dict[str, Tensor], int, int]:
        sharded = case.shard()
        state = sharded.init(ss.adamw(lr=1e-3), seed=3)
        held = [name for stage in sharded.plan.pipeline.on(sharded.fabric.coordinate["pp"]) for name in stage.params]
        plans = {name: sharded.plan.params[name] for name in held if not sharded.plan.params[name].buffer}
        planned = sum(8 * torch.Size(plan.local_shape).numel() for plan in plans.values())
        resident = sum(tensor.to_local().nbytes for tensor in state.params.values())
        assert len(list(sharded.module.parameters())) == len(state.params)
        elsewhere = next(name for name in sharded.plan.params if name not in held)
        with pytest.raises(KeyError, match=f"{elsewhere} (lies on stage|is tok_embeddings)"):
            state.params[elsewhere]
        return sharded.state_dict(state), planned, resident

    [alone] = run_ranks(1, lambda rank, world: Case("").shard().init(ss.adamw(lr=1e-3), seed=3).params)
    for case in (Case("pp=2,tp=2"), Case("pp=2,fsdp=2", "ZBVZeroBubble")):
        for found, planned, resident in run_ranks(4, run, case):
            assert resident <= planned
            assert all(torch.equal(found[name], ss.full(tensor)) for name, tensor in alone.items())


def told(call: Any) -> str:
    """What a call is refused with."""
    with pytest.raises(ss.ShardingError) as error:
        call()
    return str(error.value)


def step_on(sharded: Any, batch: dict[str, Tensor]) -> None:
    state = sharded.init(ss.sgd(lr=1e-3))
    ss.train_step(sharded, loss_fn)(state, sharded.local_batch(batch))


def test_what_runs_is_what_the_timeline_is_drawn_from():
    for schedule, virtual in ((name, stages_per_rank(name)) for name in SCHEDULES):
        drawn, run = orders(schedule, 4, 8, virtual), schedule_actions(schedule, 4, virtual, 8)
        for one, two in zip(drawn, run, strict=True):
            computed = [(action.kind, action.stage, action.microbatch) for action in one if len(action.kind) == 1]
            assert computed == [action for action in two if len(action[0]) == 1]
            sent = {(action.kind, action.stage, action.microbatch) for action in one if "SEND" in action.kind}
            ends = {("SEND_B", 0), ("SEND_F", 4 * virtual - 1)}  # of these torch's own step makes nothing
            assert {call for call in sent if call[:2] not in ends} == {call for call in two if "SEND" in call[0]}


WRONG = {
    "16 rows cannot be cut into 3 microbatches": lambda: Case("pp=2", microbatches=3).shard(),
    "1F1B cannot run 1 microbatches through 2 stages on pp=2": lambda: Case("pp=2", microbatches=1).shard(),
    "DualPipeV cannot run 2 microbatches through 4 stages on pp=2": lambda: Case(
        "pp=2", "DualPipeV", microbatches=2
    ).shard(),
    "2 layers do not fill 4 stages": lambda: Case("pp=2", "ZBVZeroBubble", layers=2).shard(),
    "schedule='1f1b'": lambda: Case("pp=2", "1f1b").shard(),
    "10 rows cannot be cut into 4 microbatches": lambda: step_on(
        Case("pp=2").shard(), {name: item[:10] for name, item in make_batch(0).items()}
    ),
    "pp=2 and no inputs": lambda: ss.shard(lambda: make_model(tied=False), parity.RULES, ss.Mesh(pp=2)),
}


def test_what_no_pipeline_can_run_every_rank_is_told_before_the_first_send():
    def run(rank: int, world: int) -> dict[str, str]:
        return {words: told(call) for words, call in WRONG.items()}

    for found in run_ranks(2, run, timeout=60):
        assert [words for words, said in found.items() if words not in said] == []


def test_a_batch_of_another_shape_is_another_program_and_the_run_goes_on():
    def run(rank: int, world: int) -> list[float]:
        sharded = Case("pp=2", microbatches=2).shard()
        state = sharded.init(ss.sgd(lr=1e-3), seed=3)
        step, losses = ss.train_step(sharded, loss_fn), []
        for rows, length in ((16, 8), (8, 8), (16, 4), (16, 8)):
            batch = {name: item[:rows, :length] for name, item in make_batch(0).items()}
            state, metrics = step(state, sharded.local_batch(batch))
            losses.append(float(metrics["loss"]))
        return losses

    one, two = run_ranks(2, run, timeout=60)
    assert one == two
    assert len(set(one)) == 4


def test_where_a_rank_is_killed_in_the_midst_of_a_step_the_others_end_soon_with_an_error(tmp_path):
    def run(rank: int, world: int) -> None:
        sharded = Case("pp=4").shard()
        state = sharded.init(ss.sgd(lr=1e-3))
        step = ss.train_step(sharded, loss_fn)
        batch = sharded.local_batch(make_batch(0))
        state, _ = step(state, batch)
        if rank == 2:
            begin, forward = itertools.count(), pipeline.Flight._forward

            def dying(self: pipeline.Flight, stage: int, microbatch: int) -> None:
                if next(begin) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                forward(self, stage, microbatch)

            pipeline.Flight._forward = dying
        started = time.monotonic()
        try:
            step(state, batch)
        except Exception as error:
            (tmp_path / str(rank)).write_text(f"{time.monotonic() - started:.1f} {error}")
            os._exit(1)  # as a launcher's rank does: those that wait for this one hear of it

    with pytest.raises(RankError):
        run_ranks(4, run, timeout=60)
    wait_until = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < wait_until:
        time.sleep(0.05)
    told = [path.read_text() for path in sorted(tmp_path.iterdir())]
    assert told
    assert all("error[SS4" in text for text in told), told


def test_a_checkpoint_moves_between_a_pipeline_and_none(tmp_path):
    def trained(case: Case, steps: range, path: Any) -> dict[str, Tensor]:
        """Some steps from a checkpoint, or from the start, and then a checkpoint."""
        sharded = case.shard()
        state = ss.restore(sharded, path) if steps.start else sharded.init(ss.adamw(**OPTIMIZER), seed=3)
        step = ss.train_step(sharded, loss_fn, clip=CLIP)
        for index in steps:
            state, _ = step(state, sharded.local_batch(make_batch(index)))
        ss.save(state, path)
        return sharded.state_dict(state)

    def run(rank: int, world: int) -> None:
        stages, storage = Case("pp=2,tp=2", tied=True), Case("fsdp=4", tied=True, microbatches=1)
        whole = trained(storage, range(4), tmp_path / "whole")
        for name, (first, then) in {"to": (stages, storage), "from": (storage, stages)}.items():
            trained(first, range(2), tmp_path / name)
            moved = trained(then, range(2, 4), tmp_path / name)
            assert max(float((moved[name] - whole[name]).abs().max()) for name in whole) < TOLERANCE

    run_ranks(4, run)


def test_given_weights_and_a_step_of_ones_own_pieces_are_those_of_the_ready_made_step():
    def run(rank: int, world: int) -> float:
        sharded = Case("pp=2", tied=True).shard()
        state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
        given = sharded.load(sharded.state_dict(state), ss.adamw(**OPTIMIZER))
        assert all(torch.equal(ss.full(given.params[name]), ss.full(t)) for name, t in state.params.items())
        batch = sharded.local_batch(make_batch(0))
        _, grads = sharded.value_and_grad(loss_fn)(given.params, batch, given.rng)
        given = ss.update(given, grads, clip=CLIP)
        state, _ = ss.train_step(sharded, loss_fn, clip=CLIP)(state, batch)
        return max(float((ss.full(given.params[name]) - ss.full(t)).abs().max()) for name, t in state.params.items())

    assert max(run_ranks(2, run)) < TOLERANCE
