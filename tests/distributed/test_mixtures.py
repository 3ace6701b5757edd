"""Both families of experts compute on every mesh what their plain programs compute over the same microbatches."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import shardspec as ss
from tests.distributed import mixtures, test_collectives, test_pipeline
from tests.distributed.harness import CollectiveLog, run_ranks
from tests.distributed.mixtures import FAMILIES, OPTIMIZER, Case, run_cases, run_plain
from tests.distributed.parity import CLIP, TOLERANCE, make_batch
from tests.distributed.test_collectives import Calls

# Every pair of axes, and each axis under either family.
COVERING = [
    Case("mixtral", "ep=2", remat=True),
    Case("deepseek", "ep=2", microbatches=2, remat=True),
    Case("mixtral", "fsdp=2,ep=2", microbatches=2),
    Case("deepseek", "dp=2,ep=2"),
    Case("mixtral", "ep=2,tp=2"),
    Case("deepseek", "ep=2,tp=2", sp=False),
    Case("mixtral", "ep=2,pp=2", microbatches=2),
    Case("deepseek", "ep=2,pp=2", microbatches=4),
    Case("deepseek", "dp=2,fsdp=2"),
    Case("mixtral", "dp=2,tp=2", sp=False),
    Case("mixtral", "dp=2,pp=2", microbatches=2, schedule="ZBVZeroBubble"),
    Case("deepseek", "fsdp=2,tp=2", remat=True),
    Case("deepseek", "fsdp=2,pp=2", microbatches=2, schedule="Interleaved1F1B"),
    Case("mixtral", "tp=2,pp=2", microbatches=2, remat=True),
    Case("deepseek", "tp=2,pp=2", microbatches=2),
    Case("mixtral", "ep=2,cp=2", microbatches=2),
    Case("deepseek", "ep=2,cp=2", remat=True),
    Case("deepseek", "cp=2,tp=2"),
    Case("mixtral", "cp=2,pp=2", microbatches=2),
    Case("mixtral", "ep=4"),
    Case("mixtral", "ep=2,cp=2"),
    Case("deepseek", "ep=2,cp=2", microbatches=2),
    Case("deepseek", "ep=4", microbatches=2),
]
ADVERSARIAL = [
    *(Case(family, "ep=2", routing=routing) for family in FAMILIES for routing in mixtures.ROUTINGS),
    *(Case("deepseek", "ep=4", routing=routing) for routing in mixtures.ROUTINGS),
]


@pytest.mark.parametrize("world", [2, 4])
def test_loss_gradients_biases_and_parameters_after_five_steps_are_the_plain_programs(world: int):
    cases = [case for case in COVERING if case.world == world]
    found = dict(run_cases(cases))
    assert {str(case): wrong for case, wrong in found.items() if not max(wrong.values()) <= TOLERANCE} == {}


@pytest.mark.parametrize("world", [2, 4])
def test_all_tokens_to_one_expert_none_to_a_rank_and_ties_are_ordinary(world: int):
    cases = [case for case in ADVERSARIAL if case.world == world]
    found = dict(run_cases(cases))
    assert {str(case): wrong for case, wrong in found.items() if not max(wrong.values()) <= TOLERANCE} == {}


def test_what_is_compared_is_far_above_the_tolerance_and_the_biases_move():
    """Of the plain programs: each gradient, the losses of routing, and the selection biases after five steps."""
    torch.set_default_dtype(torch.float64)
    try:
        for family in FAMILIES:
            torch.manual_seed(0)
            case = Case(family, "")
            plain = run_plain({name: tensor.clone() for name, tensor in case.make().state_dict().items()}, case)
            assert min(float(grad.abs().max()) for grad in plain.grads.values()) > 1e6 * TOLERANCE
            biases = [buffer for name, buffer in plain.buffers.items() if name.endswith("bias")]
            assert all(float(bias.abs().max()) >= mixtures.SPEED for bias in biases)
            assert len(biases) == (2 if family == "deepseek" else 0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_reduces_and_sends_what_the_plan_says_beside_the_rows_that_travel():
    """Statistics of routing, their gradients, counts that are not made twice, and a scalar that crosses stages."""

    def run(rank: int, world: int, case: Case) -> tuple[Calls, Calls]:
        sharded = case.shard()
        state, batch = sharded.init(ss.adamw(lr=1e-3)), sharded.local_batch(case.batch(0))
        step = ss.train_step(sharded, case.mixture.loss_fn, clip=CLIP, buffers=case.mixture.update)
        state, _ = step(state, batch)
        with CollectiveLog() as log:
            step(state, batch)
        told = test_pipeline.planned if sharded.mesh["pp"] > 1 else test_collectives.planned
        ran = Counter((call.kind, call.ranks, call.bytes) for call in log.collectives)
        both = (told(sharded.program(batch, case.mixture.loss_fn), rank), ran)
        one, two = (Counter({call: n for call, n in calls.items() if call[0] != "all_to_all"}) for calls in both)
        return one, two

    for case in (Case("mixtral", "pp=2", microbatches=2), Case("deepseek", "ep=2", microbatches=2, remat=True)):
        for expected, ran in run_ranks(2, run, case):
            assert ran == expected, str(case)


def test_a_run_goes_on_from_one_mesh_of_experts_on_another(tmp_path: Path):
    mixture = FAMILIES["deepseek"]

    def trained(mesh: str, steps: range, path: Path) -> dict[str, torch.Tensor]:
        """Some steps from a checkpoint, or from the start, and then a checkpoint."""
        torch.set_default_dtype(torch.float64)
        sharded = ss.shard(lambda: mixture.make(3), mixture.rules[True], ss.Mesh.parse(mesh), make_batch(0))
        state = ss.restore(sharded, path) if steps.start else sharded.init(ss.adamw(**OPTIMIZER), seed=3)
        step = ss.train_step(sharded, mixture.loss_fn, clip=CLIP, buffers=mixture.update)
        for index in steps:
            state, _ = step(state, sharded.local_batch(make_batch(index)))
        ss.save(state, path)
        return sharded.state_dict(state)

    def run(rank: int, world: int) -> None:
        whole = trained("ep=4", range(4), tmp_path / "whole")
        for name, (first, then) in {"to": ("fsdp=2,ep=2", "ep=4"), "from": ("ep=4", "fsdp=2,ep=2")}.items():
            trained(first, range(2), tmp_path / name)
            moved = trained(then, range(2, 4), tmp_path / name)
            assert moved.keys() == whole.keys()
            assert max(float((moved[name] - whole[name]).abs().max()) for name in whole) < TOLERANCE

    run_ranks(4, run)
