"""Fused projections with parts of unequal length: every mesh computes, stores and gives back what one rank does."""

from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

import shardspec as ss
from models import gpt2
from shardspec.placement import RankMajor
from tests import fused
from tests.distributed import parity
from tests.distributed.harness import run_ranks
from tests.distributed.parity import TOLERANCE, Case, Family
from tests.distributed.test_collectives import compare_step
from tests.distributed.test_families import GPT2, varied

FUSED = Family(
    name="fused",
    make=lambda tied: fused.build(),
    rules={True: fused.RULES, False: fused.WITHOUT_SP},
    batch=parity.make_batch,
    plain_loss=parity.plain_loss,
)
BY_SLICES = attrs.evolve(FUSED, name="fused, cut by slices", make=lambda tied: fused.build(fused.SlicedAttention))
BY_HEADS = attrs.evolve(FUSED, name="fused, cut by heads", make=lambda tied: fused.build(fused.HeadsAttention))
GATHERED = attrs.evolve(
    FUSED,
    name="fused, gathered, and cut again",
    rules={
        True: fused.RULES.override(
            activations={r"layers\.\d+\.attention\.qkv": "B@(dp,fsdp) S@cp (H hd + K hd + K hd)",
                         r"layers\.\d+\.attention\.again": "B@(dp,fsdp) S@cp (H@tp hd + K@tp hd + K@tp hd)"},
        )
    },
    make=lambda tied: fused.build(fused.NamedAttention),
)  # fmt: skip
STRIDED = varied(
    GPT2,
    "stored in slices of strided rows",
    gpt2.RULES.override(params={r"h\.\d+\.attn\.c_attn\.weight": "(3 H@tp hd)@fsdp D"}),
)

CASES = [
    *(Case(mesh, family=FUSED) for mesh in ("", "tp=2", "fsdp=2", "fsdp=2,tp=2", "dp=2,tp=2")),
    Case("fsdp=2,tp=2", sp=False, remat=True, family=FUSED),
    Case("fsdp=2,tp=2", accumulate=2, family=BY_SLICES),
    Case("dp=2,fsdp=2", family=BY_HEADS),
    Case("tp=2", sp=False, family=BY_HEADS),
    Case("tp=2", family=GATHERED),
    Case("fsdp=2,tp=2", tied=True, family=STRIDED),
]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fused_projections_train_on_every_mesh_as_on_one_rank(world):
    ran = {str(case): found for case, found in parity.run_cases([case for case in CASES if case.world == world])}
    assert {name: found for name, found in ran.items() if max(found.values()) > TOLERANCE} == {}


@pytest.mark.parametrize("case", [Case("fsdp=2,tp=2", family=FUSED), Case("tp=2", family=GATHERED)], ids=str)
def test_a_step_of_fused_projections_runs_the_collectives_of_its_plan(case):
    for expected, ran in run_ranks(case.world, compare_step, case):
        assert ran == expected


# States

MESHES = {2: ["tp=2", "fsdp=2"], 4: ["fsdp=2,tp=2", "dp=2,tp=2", "fsdp=4"]}
BATCH = parity.make_batch(0)
WEIGHT = "layers.0.attention.wqkv.weight"


def sharded_on(mesh: str, rules: ss.Rules = fused.RULES) -> ss.Sharded:
    torch.set_num_threads(1)
    return ss.shard(fused.build, rules, ss.Mesh.parse(mesh), BATCH)


def stepped(sharded: ss.Sharded, state: ss.TrainState) -> ss.TrainState:
    return ss.train_step(sharded, parity.loss_fn)(state, sharded.local_batch(BATCH))[0]


def initial_and_loaded(rank: int, world: int, given: dict[str, Tensor] | None) -> dict[str, Any]:
    """What each mesh of a world has for initial weights, and gives back of weights that it was given."""
    found: dict[str, Any] = {}
    for mesh in MESHES.get(world, [""]):
        sharded = sharded_on(mesh)
        initial = sharded.state_dict(sharded.init(ss.adamw(lr=1e-3), seed=5))
        loaded = sharded.state_dict(sharded.load(given)) if given is not None else {}
        found[mesh] = {"initial": initial, "loaded": loaded}
    return found


def test_initial_and_loaded_weights_are_bitwise_the_same_on_every_mesh():
    alone = run_ranks(1, initial_and_loaded, None)[0][""]["initial"]
    given = {name: torch.randn_like(tensor) for name, tensor in alone.items()}
    for world in MESHES:
        for rank in run_ranks(world, initial_and_loaded, given):
            for mesh, found in rank.items():
                for name, tensor in alone.items():
                    assert torch.equal(found["initial"][name], tensor), f"{mesh} {name}"
                    assert torch.equal(found["loaded"][name], given[name]), f"{mesh} {name}"


def used_as_a_tensor(rank: int, world: int) -> dict[str, Any]:
    """What a user does with a state's tensors that lie rank-major."""
    sharded = sharded_on("fsdp=2,tp=2")
    state = sharded.init(ss.adamw(lr=1e-3), seed=5)
    before = state.params[WEIGHT]
    whole = ss.full(before)
    average = before.clone()
    state = stepped(sharded, state)
    after = state.params[WEIGHT]
    average.lerp_(after, 0.25)
    mixed = torch.lerp(whole, ss.full(after), 0.25)
    grad_fn = sharded.value_and_grad(parity.loss_fn)
    (loss, _), grads = grad_fn({**state.params, WEIGHT: average}, sharded.local_batch(BATCH), state.rng)
    refused: dict[str, str] = {}
    calls = {
        "softmax": lambda: after.softmax(0),
        "matmul": lambda: after @ after.t(),
        "rows": lambda: after[:3],
        "sum": lambda: after.sum(),
        "noise": lambda: torch.rand_like(after),
        "equal": lambda: torch.equal(after, after),
        "into": lambda: torch.add(after, after, out=after.clone()),
        "another": lambda: after + state.params["layers.0.feed_forward.w13.weight"],
        "plain": lambda: after + torch.zeros(40, 18),
        "local": lambda: after + torch.zeros(10, 18),
        "of another layout": lambda: after + state.params["norm.weight"],
        "consumed": lambda: before + 1,
    }
    for name, call in calls.items():
        try:
            call()
        except (TypeError, RuntimeError) as error:
            refused[name] = str(error)
    return {
        "kind": isinstance(after, DTensor) and all(isinstance(one, RankMajor) for one in after.placements),
        "refused": refused.keys() ^ calls.keys(),
        "mixed": torch.allclose(ss.full(average), mixed, rtol=0, atol=1e-7),
        "half": ss.full(after.to(torch.bfloat16)).equal(ss.full(after).to(torch.bfloat16)),
        "full_tensor": after.full_tensor().equal(ss.full(after)),
        "moment": ss.full(state.opt_state["exp_avg"][WEIGHT]).shape == whole.shape,
        "finite": bool(loss.isfinite()) and ss.full(grads[WEIGHT]).shape == whole.shape,
    }


def test_a_rank_major_tensor_takes_elementwise_operators_and_refuses_others():
    for found in run_ranks(4, used_as_a_tensor):
        assert found == {"kind": True, "refused": set(), "mixed": True, "half": True, "full_tensor": True,
                         "moment": True, "finite": True}  # fmt: skip


class DroppingAttention(fused.FusedAttention):
    """Drops elements of the packed product, before it is cut."""

    def cut(self, qkv):
        return super().cut(F.dropout(qkv, 0.3))


def dropped(rank: int, world: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for mesh in MESHES.get(world, [""]):
        torch.set_default_dtype(torch.float64)
        sharded = ss.shard(lambda: fused.build(DroppingAttention), fused.RULES, ss.Mesh.parse(mesh), BATCH)
        state = sharded.init(ss.adamw(lr=1e-2), seed=5)
        step = ss.train_step(sharded, parity.loss_fn)
        found[mesh] = []
        for _ in range(2):
            state, metrics = step(state, sharded.local_batch(BATCH))
            found[mesh] += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return found


def test_dropout_of_a_direct_sum_drops_the_same_elements_on_every_mesh():
    alone = run_ranks(1, dropped)[0][""]
    for world in MESHES:
        for mesh, found in run_ranks(world, dropped)[0].items():
            assert found == pytest.approx(alone, abs=1e-11), mesh


def saved_and_restored(rank: int, world: int, folder: str) -> bool:
    """Whether another mesh reads from a checkpoint what one wrote."""
    one, two = sharded_on("fsdp=2,tp=2"), sharded_on("dp=2,tp=2")
    state = stepped(one, one.init(ss.adamw(lr=1e-3), seed=5))
    ss.save(state, folder)
    again = ss.restore(two, folder)
    before, after = one.state_dict(state), two.state_dict(again)
    same = all(torch.equal(before[name], after[name]) for name in before)
    moments = (ss.full(one_state.opt_state["exp_avg"][WEIGHT]) for one_state in (state, again))
    return same and torch.equal(*moments)


def test_a_checkpoint_holds_direct_sums_in_the_order_of_the_model(tmp_path):
    assert all(run_ranks(4, saved_and_restored, str(tmp_path / "run")))
