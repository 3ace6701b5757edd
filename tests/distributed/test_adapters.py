"""A model of which little is trained, in the manner of LoRA: that alone has gradients, moments and groups."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from tests.distributed import parity
from tests.distributed.harness import run_ranks


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    was, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(was)
    torch.set_num_threads(threads)


class Adapted(nn.Module):
    """A frozen product and a low-rank one beside it."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer, bias=False)
        self.base.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(3, inner))
        self.b = nn.Parameter(torch.zeros(outer, 3))
        nn.init.normal_(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Adapted(10, 16)
        self.down = nn.Linear(16, 10, bias=False)
        self.down.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """A unit of nothing trained, two of both, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.embed.weight.requires_grad_(False)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


RULES = ss.Rules(
    params={
        r"(embed|head)\.weight": "V@(tp,fsdp) D",
        r"layers\.\d+\.up\.base\.weight": "F@(tp,fsdp) D",
        r"layers\.\d+\.up\.a": "R@fsdp D",
        r"layers\.\d+\.up\.b": "F@(tp,fsdp) R",
        r"layers\.\d+\.down\.weight": "D@fsdp F@tp",
        r"norm\.(weight|bias)": "D@fsdp",
    },
    activations={
        "tokens|labels": "B@(dp,fsdp) S",
        r"embed|layers\.\d+\.down|layers\.\d+\.up:in|head:in": "B@(dp,fsdp) S D",
        "head": "B@(dp,fsdp) S V@tp",
    },
    units=[r"layers\.\d+", "embed"],
)
TRAINED = {f"layers.{i}.up.{name}" for i in (0, 1) for name in "ab"} | {"norm.weight", "norm.bias", "head.weight"}
MESHES = ["", "fsdp=4", "fsdp=2,tp=2", "dp=2,fsdp=2"]
SCHEDULE = {r"layers\..*": {"lr": lambda step: 0.1 / step, "weight_decay": 0.0}, r"norm\..*": {"betas": (0.5, 0.7)}}
"""Groups: the adapters, the norm, and the head, which no pattern matches."""


def make_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(0, 12, (4, 6), generator=generator) for name in ("tokens", "labels")}


def plain_run(first: dict[str, Tensor], steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """torch's own optimizer over parameter groups: the gradients of each step, and the parameters at the end."""
    model = Model()
    model.load_state_dict(first)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[f"layers.{i}.up.{name}"] for i in (0, 1) for name in "ab"], "weight_decay": 0.0},
            {"params": [model.norm.weight, model.norm.bias], "betas": (0.5, 0.7)},
            {"params": [model.head.weight]},
        ],
        lr=0.02,
        weight_decay=0.1,
    )
    grads: list[dict[str, Tensor]] = []
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        batch = make_batch(step)
        F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()).backward()
        grads.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        optimizer.step()
    return grads, {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_only_adapters_are_trained_in_groups_as_torch_trains_them(mesh: str, tmp_path: Path):
    def run(rank: int, world: int) -> Any:
        build = lambda: ss.shard(Model, RULES, ss.Mesh.parse(mesh), make_batch(0))  # noqa: E731
        sharded, optimizer = build(), ss.adamw(lr=0.02, weight_decay=0.1, groups=SCHEDULE)
        state = sharded.init(optimizer, seed=2)
        first = sharded.state_dict(state)
        found = []
        for step in range(4):
            batch = sharded.local_batch(make_batch(step))
            _, grads = sharded.value_and_grad(parity.loss_fn)(state.params, batch, state.rng)
            found.append({name: ss.full(grad).clone() for name, grad in grads.items()})
            state, _ = ss.train_step(sharded, parity.loss_fn)(state, batch)
            assert state.opt_state["exp_avg"].keys() == TRAINED == grads.keys()
            if step == 1:
                ss.save(state, tmp_path / "adapters")
                sharded = build()
                state = ss.restore(sharded, tmp_path / "adapters", optimizer=optimizer)
        return first, found, sharded.state_dict(state)

    first, found, last = run_ranks(ss.Mesh.parse(mesh).world, run)[0]
    grads, expected = plain_run(first, 4)
    for ours, theirs in zip(found, grads, strict=True):
        assert ours.keys() == theirs.keys() == TRAINED
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-10
    for name, tensor in last.items():
        if name in TRAINED:
            assert float((tensor - expected[name]).abs().max()) < 1e-10, name
            assert not torch.equal(tensor, first[name])
        else:
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({r"layers\.\d+\.down\.weight": {}}, "matches no trainable parameter"),
        ({r"layers\..*": {}, r".*\.a": {}}, "is in two optimizer groups"),
        ({r"layer\.\d+\.up\.a": {"lr": math.pi}}, "matches no trainable parameter"),
    ],
    ids=["frozen", "twice", "typo"],
)
def test_groups_are_matched_both_ways_when_a_state_is_made(groups: dict, words: str):
    sharded = ss.shard(Model, RULES, ss.Mesh(), make_batch(0))
    with pytest.raises(ss.ShardingError, match=words) as caught:
        sharded.init(ss.adamw(groups=groups))
    assert caught.value.diagnostics[0].code == "SS407"
