"""What a step does to persistent buffers: a function of the user's, once a step, over what forward left."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from tests.distributed.harness import run_ranks

LEAN = 1 / 64


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


class Layer(nn.Module):
    """A product that a bias sways, and a tally of the positive entries of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.load = nn.Identity()
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(4, dtype=torch.long))
        self.register_buffer("split", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(self.load((x > 0).sum(0)))
        return (x @ self.weight.T + self.bias).tanh()


class Tally(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


RULES = ss.Rules(
    params={
        r"layers\.\d+\.weight": "F@fsdp D",
        r"layers\.\d+\.(bias|seen)": "F",
        r"layers\.\d+\.split": "F@tp",
    },
    activations={"x": "B@(dp,fsdp) D", r"layers\.\d+\.load": "D"},
    units=[r"layers\.\d+"],
)
BATCH = {"x": torch.linspace(-1, 2, 48, dtype=torch.float64).reshape(4, 12).T.contiguous() ** 3}


def squares(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return output.square().sum(), (batch["x"][:, 0] * 0 + 1).sum()


def lean(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sway towards what was seen less often than the mean, by how much less; begin to count anew."""
    found: dict[str, Tensor] = {}
    for layer in (name.removesuffix("seen") for name in buffers if name.endswith("seen")):
        seen = buffers[f"{layer}seen"].to(torch.get_default_dtype())
        found[f"{layer}bias"] = buffers[f"{layer}bias"] + LEAN * (seen.mean() - seen)
        found[f"{layer}seen"] = torch.zeros_like(buffers[f"{layer}seen"])
    return found


def expected(steps: int) -> list[list[float]]:
    """The biases after some steps with weights that stay the identity, by a loop over rows."""
    biases = [[0.0] * 4, [0.0] * 4]
    for _ in range(steps):
        seen = [[0] * 4, [0] * 4]
        for row in BATCH["x"].tolist():
            values = row
            for layer in range(2):
                for at in range(4):
                    seen[layer][at] += values[at] > 0
                values = [math.tanh(value + sway) for value, sway in zip(values, biases[layer], strict=True)]
        for layer in range(2):
            mean = sum(seen[layer]) / 4
            biases[layer] = [
                sway + LEAN * (mean - count) for sway, count in zip(biases[layer], seen[layer], strict=True)
            ]
    return biases


def biases_after(mesh: str, steps: int, **policy: Any) -> list[list[list[float]]]:
    """On each rank, the biases and the counts after some steps whose learning rate is nought."""

    def run(rank: int, world: int) -> list[list[float]]:
        sharded = ss.shard(Tally, RULES, ss.Mesh.parse(mesh), BATCH, policy=ss.Policy(**policy))
        state = sharded.init(ss.sgd(lr=0.0))
        step = ss.train_step(sharded, squares, buffers=lean)
        for _ in range(steps):
            state, _ = step(state, sharded.local_batch(BATCH))
        assert all(not ss.full(state.buffers[f"layers.{layer}.seen"]).any() for layer in range(2))
        return [ss.full(state.buffers[f"layers.{layer}.bias"]).tolist() for layer in range(2)]

    return run_ranks(ss.Mesh.parse(mesh).world, run)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize(("mesh", "accumulate"), [("", 1), ("", 3), ("dp=2", 2), ("fsdp=2", 1)])
def test_an_update_reads_the_total_of_all_ranks_and_microbatches_and_no_forward_counts_twice(mesh, accumulate, remat):
    wanted = expected(5)
    assert wanted[0] != wanted[1] != [0.0] * 4
    for found in biases_after(mesh, 5, accumulate=accumulate, remat=remat):
        assert found == wanted


def test_an_update_is_skipped_with_the_step_and_leaves_what_is_kept_as_it_was():
    sharded = ss.shard(Tally, RULES, ss.Mesh(), BATCH)
    keep = ss.train_step(sharded, squares, buffers=lean, donate=False)
    one = sharded.init(ss.sgd(lr=1e-2))
    two, _ = keep(one, BATCH)
    before, after = (ss.full(state.buffers["layers.0.bias"]) for state in (one, two))
    assert before.tolist() == [0.0] * 4
    assert after.tolist() == expected(1)[0]
    worse, _ = keep(two, {"x": BATCH["x"] * math.nan})
    assert torch.equal(ss.full(worse.buffers["layers.0.bias"]), after)
    donated, _ = ss.train_step(sharded, squares, buffers=lean)(two, BATCH)
    assert ss.full(donated.buffers["layers.0.bias"]).tolist() == expected(2)[0]
    with pytest.raises(ss.DonatedError):
        assert two.buffers


def in_place(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    buffers["layers.1.bias"].add_(1)
    return {}


WRONG = {
    "it returned a NoneType": lambda buffers: None,
    "it returned 'layers.0.weight'": lambda buffers: {"layers.0.weight": torch.zeros(4, 4)},
    "it returned 'layers.0.split'.*it is split": lambda buffers: {"layers.0.split": torch.zeros(4)},
    r"it returned \(3,\) torch.float64 for layers.0.bias": lambda buffers: {"layers.0.bias": torch.zeros(3)},
    "it returned a float for layers.0.bias": lambda buffers: {"layers.0.bias": 0.5},
    "it writes to layers.1.bias in place": in_place,
}


def test_an_update_that_is_none_is_told_on_every_rank_and_the_state_is_still_there():
    def run(rank: int, world: int) -> None:
        sharded = ss.shard(Tally, RULES, ss.Mesh(tp=2), BATCH)
        state = sharded.init(ss.sgd(lr=0.0))
        for words, update in WRONG.items():
            with pytest.raises(ss.ShardingError, match=f"(?s)SS407.*{words}"):
                ss.train_step(sharded, squares, buffers=update)(state, sharded.local_batch(BATCH))
        after, _ = ss.train_step(sharded, squares, buffers=lean)(state, sharded.local_batch(BATCH))
        assert ss.full(after.buffers["layers.0.bias"]).tolist() == expected(1)[0]

    run_ranks(2, run)
