"""What is gathered ahead, or lies in the host's memory, changes when and where, and no number."""

import pytest
import torch
from torch import Tensor

import shardspec as ss
from models.llama import RULES
from tests.distributed.harness import run_ranks
from tests.distributed.parity import loss_fn, make_batch, make_config, make_model

LAYERS = r"layers\.\d+"
POLICIES = {
    "prefetch 1": {"prefetch": 1},
    "prefetch 3": {"prefetch": 3},
    "prefetch 2, remat": {"prefetch": 2, "remat": True},
    "offload": {"offload": True},
    "offload of layers, prefetch 1": {"offload": LAYERS, "prefetch": 1},
    "prefetch 1, two microbatches": {"prefetch": 1, "accumulate": 2},
}


def train(_rank: int, _world: int, mesh: str, policy: dict) -> tuple[dict[str, Tensor], list[float], list[str]]:
    """Parameters and losses after three steps, and the kinds of device that the parameters lie on."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = make_model(make_config(tied=True))
    sharded = ss.shard(model, RULES, ss.Mesh.parse(mesh), make_batch(0), policy=ss.Policy(**policy))
    state = sharded.init(ss.adamw(lr=1e-2), seed=0)
    step, losses = ss.train_step(sharded, loss_fn, clip=0.5), []
    for number in range(3):
        state, metrics = step(state, sharded.local_batch(make_batch(number)))
        losses.append(float(metrics["loss"]))
        ss.eval_step(sharded, loss_fn)(state, sharded.local_batch(make_batch(number)))
    ahead = [
        str(len(module._get_fsdp_state()._states_to_forward_prefetch))
        for module in sharded.module.modules()
        if hasattr(module, "_get_fsdp_state")
    ]
    return sharded.state_dict(state), losses, ahead


def both(_rank: int, _world: int, mesh: str, policy: dict):
    torch.manual_seed(0)
    plain = {key: value for key, value in policy.items() if key in ("remat", "accumulate")}
    expected = train(_rank, _world, mesh, plain)
    torch.manual_seed(0)
    return expected, train(_rank, _world, mesh, policy)


@pytest.mark.parametrize(
    ("name", "mesh"), [*((name, "fsdp=2") for name in POLICIES), ("offload of layers, prefetch 1", "fsdp=2,tp=2")]
)
def test_a_step_gives_the_same_bits(name: str, mesh: str):
    for expected, found in run_ranks(ss.Mesh.parse(mesh).world, both, mesh, POLICIES[name]):
        assert found[1] == expected[1]
        assert all(torch.equal(found[0][key], value) for key, value in expected[0].items())
        assert set(expected[2]) == {"0"}
        assert ("prefetch" in POLICIES[name]) == (max(map(int, found[2])) > 0)


def test_a_pipeline_gathers_ahead_too():
    policy = {"prefetch": 1, "offload": True, "schedule": "1F1B", "microbatches": 4}
    plain = {"schedule": "1F1B", "microbatches": 4}
    found = run_ranks(4, train, "pp=2,fsdp=2", policy)
    expected = run_ranks(4, train, "pp=2,fsdp=2", plain)
    for one, other in zip(found, expected, strict=True):
        assert one[1] == other[1]
        assert all(torch.equal(one[0][key], value) for key, value in other[0].items())


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_distance_that_is_none_is_refused(value):
    with pytest.raises(ss.ShardingError, match="SS405"):
        ss.Policy(prefetch=value)


def test_a_pattern_of_offload_that_matches_no_unit_is_refused():
    with pytest.raises(ss.ShardingError, match="matches no unit"):
        ss.shard(
            make_model(make_config(tied=True)),
            RULES,
            ss.Mesh(),
            make_batch(0),
            policy=ss.Policy(offload=r"blocks\.\d+"),
        )
