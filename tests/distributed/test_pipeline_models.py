"""Pipelines over models that compute between layers, draw, tie by an attribute, freeze and write; planted bugs."""

import sys
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from shardspec.runtime import pipeline, step
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.parity import TOLERANCE, loss_fn
from tests.distributed.test_pipeline import gathered


class Odd(nn.Module):
    """Computes between its layers, ties its head by an attribute, hands its layers keywords, and drops out."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.head = None if tied else nn.Linear(6, 12, bias=False)
        self.shift = nn.Parameter(torch.randn(6))
        self.layers = nn.ModuleList(OddLayer() for _ in range(3))
        self.between = nn.ModuleDict({name: nn.LayerNorm(6) for name in ("first", "second")})
        self.drop = nn.Dropout(0.25)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.drop(self.embed(tokens) + self.shift)
        once = scale.cos()
        for layer, name in zip(self.layers, ("first", "second", None), strict=True):
            x = layer(x=x, scale=once)
            x = self.between[name](x * once) if name else x
        return nn.functional.linear(x, self.embed.weight) if self.head is None else self.head(x)


class OddLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.25)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.drop(self.linear(x).tanh() * scale)


ODD = ss.Rules(
    params={
        r"embed\.weight": "V D",
        "shift": "D",
        r"layers\.\d+\.linear\.weight": "E D",
        r"layers\.\d+\.linear\.bias": "E",
        r"between\.\w+\.(weight|bias)": "D",
    },
    activations={"tokens|labels": "B@(dp,fsdp) S", "scale": "B@(dp,fsdp) S 1"},
    pipeline=r"layers\.(?P<pp>\d+)",
    units=[],
)


def odd_run(
    policy: ss.Policy, mesh: ss.Mesh, make: Any = Odd, rules: ss.Rules = ODD
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """First loss, gradients, and parameters after three steps."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(7)
    batch = {name: torch.randint(0, 12, (8, 5), generator=generator) for name in ("tokens", "labels")}
    batch["scale"] = torch.rand(8, 5, 1, generator=generator)
    sharded = ss.shard(make, rules, mesh, batch, policy=policy)
    state = sharded.init(ss.adamw(lr=1e-2), seed=5)
    local = sharded.local_batch(batch)
    (loss, _), grads = sharded.value_and_grad(loss_fn)(state.params, local, state.rng)
    grads = {name: ss.full(grad) for name, grad in grads.items()}
    if mesh.world > 1:
        grads = gathered(grads)
    step = ss.train_step(sharded, loss_fn, clip=0.5)
    for _ in range(3):
        state, _ = step(state, local)
    return float(loss), grads, sharded.state_dict(state)


def farthest(mesh: ss.Mesh, policy: ss.Policy, prepare: Any = None, **options: Any) -> float:
    """The largest difference of a run in a pipeline from the same one, microbatch by microbatch, on one rank."""
    alone = ss.Policy(microbatches=policy.microbatches, param_dtype=policy.param_dtype)
    [(loss, grads, params)] = run_ranks(1, lambda rank, world: odd_run(alone, ss.Mesh(), **options))

    def run(rank: int, world: int) -> Any:
        if prepare is not None:
            prepare()
        return odd_run(policy, mesh, **options)

    differences: list[float] = []
    for found in run_ranks(mesh.world, run):
        differences.append(abs(found[0] - loss))
        for ours, theirs in ((found[1], grads), (found[2], params)):
            assert ours.keys() == theirs.keys()
            differences += [float((ours[name] - theirs[name]).abs().max()) for name in theirs]
    return max(differences)


class Beside(nn.Module):
    """Its layers hand on a sum and whole numbers beside what they compute on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.layers = nn.ModuleList(BesideLayer() for _ in range(4))
        self.head = nn.Linear(6, 12, bias=False)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(tokens)
        total, seen = torch.zeros((), dtype=x.dtype), torch.zeros_like(tokens)
        for layer in self.layers:
            x, total, seen = layer(x, seen, total=total)
        return self.head(x * (seen * scale.squeeze(-1)).unsqueeze(-1)) + total


class BesideLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, seen: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(x).tanh() * (1 + total)
        return x + y, total + y.mean(), seen + (y > 0).sum(-1)


def test_the_other_arguments_of_a_layer_cross_too_and_so_do_their_gradients():
    rules = ss.Rules(
        params={r"(embed|head)\.weight": "V D", r"layers\.\d+\.linear\.weight": "E D", r".*\.bias": "E"},
        activations={"tokens|labels": "B S", "scale": "B S 1"},
        pipeline=r"layers\.(?P<pp>\d+)",
        units=[LAYER],
    )
    for schedule, remat in (("1F1B", False), ("ZBVZeroBubble", False), ("Interleaved1F1B", True)):
        policy = ss.Policy(schedule=schedule, microbatches=4, remat=remat)
        assert farthest(ss.Mesh(pp=2), policy, make=Beside, rules=rules) < TOLERANCE

    class Alike(BesideLayer):
        """Its second argument is named as the third: names of what stands behind `*args` are those of the others."""

        def forward(self, x: Tensor, *seen: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return super().forward(x, *seen, total=total)

    def alike() -> nn.Module:
        model = Beside()
        model.layers = nn.ModuleList(Alike() for _ in range(4))
        return model

    batch = {name: torch.zeros(8, 5, dtype=torch.long) for name in ("tokens", "labels")}
    with pytest.raises(ss.ShardingError, match="SS331"):
        ss.compile(alike, rules, ss.Mesh(pp=2), batch | {"scale": torch.zeros(8, 5, 1)}, loss_fn)


@pytest.mark.parametrize("mesh", ["pp=2", "pp=3", "dp=2,pp=2"])
def test_what_stands_between_layers_and_what_is_drawn_is_as_without_a_pipeline(mesh: str):
    assert farthest(ss.Mesh.parse(mesh), ss.Policy(microbatches=4)) < TOLERANCE


def test_stages_as_told_recomputed_and_with_frozen_parameters():
    def frozen() -> nn.Module:
        model = Odd()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("layers.1.", "between.second")))
        return model

    policy = ss.Policy(microbatches=4, stages=[1, 2])
    assert farthest(ss.Mesh(pp=2), policy) < TOLERANCE
    again = attrs.evolve(policy, stages=None, remat=True)
    assert farthest(ss.Mesh(pp=2), again, rules=ODD.override(units=[LAYER])) < TOLERANCE
    assert farthest(ss.Mesh(pp=2), policy, make=frozen) < TOLERANCE


LAYER = r"layers\.\d+"


def test_compute_in_another_dtype_crosses_in_that_dtype():
    policy = ss.Policy(microbatches=4, param_dtype=torch.float32)
    rules = ODD.override(params={r"head\.weight": "V D"})
    assert farthest(ss.Mesh(pp=2), policy, make=lambda: Odd(tied=False), rules=rules) < 1e-5


BUGS = {
    "the gradients of a tied parameter are not summed": lambda: setattr(step, "sum_over_homes", lambda *_: None),
    "a tied parameter counts twice in the norm": lambda: setattr(pipeline.PipelinePlan, "homes", count_once),
    "a backward draws what another microbatch drew": lambda: setattr(pipeline.Flight, "_backward", misnumbered),
    "a stage is given what the microbatch before was": lambda: setattr(pipeline.Flight, "_arrived", stale),
}


def count_once(plan: Any, first: str) -> tuple[int, ...]:
    """Right for where it lies, wrong for how often."""
    homes = tuple(sorted({stage.rank for stage in plan.stages if first in stage.params}))
    return homes if sys._getframe(1).f_code.co_name != "sharing_degree" else homes[:1]


def misnumbered(flight: pipeline.Flight, stage: int, microbatch: int) -> None:
    flight.begin, right = (lambda _: None), flight.begin
    RIGHT_BACKWARD(flight, stage, microbatch)
    flight.begin = right


RIGHT_BACKWARD, RIGHT_ARRIVED = pipeline.Flight._backward, pipeline.Flight._arrived


def stale(flight: pipeline.Flight, kind: str, stage: int, microbatch: int) -> tuple[Tensor, ...]:
    found = RIGHT_ARRIVED(flight, kind, stage, microbatch)
    before, LAST[kind] = LAST.get(kind, found), found
    return tuple(tensor.detach().clone() for tensor in before)


LAST: dict[str, tuple[Tensor, ...]] = {}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_a_pipeline_fails_the_comparison(name: str):
    policy, options = ss.Policy(microbatches=4, remat=True), {"rules": ODD.override(units=[LAYER])}
    try:
        found = farthest(ss.Mesh(pp=2), policy, BUGS[name], **options)
    except RankError as error:
        assert "embed.weight differs between ranks" in str(error)  # noqa: PT017
    else:
        assert found > 1e-6


class Counting(Odd):
    """Counts its forwards where every stage would, and adds in place to what stands for an embedding."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()), persistent=persistent)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        x = self.embed(tokens)
        x += self.shift
        self.steps += 1
        for layer in self.layers:
            x = layer(x=x, scale=scale)
        return nn.functional.linear(self.between["first"](self.between["second"](x)), self.embed.weight)


def test_a_write_to_what_stands_for_an_embedding_is_made_and_one_to_a_shared_buffer_is_refused():
    rules = ODD.override(params={"steps": ""})
    assert (
        farthest(ss.Mesh(pp=2), ss.Policy(microbatches=2), make=lambda: Counting(persistent=False), rules=rules) < 1e-10
    )
    batch = {name: torch.zeros(8, 5, dtype=torch.long) for name in ("tokens", "labels")} | {
        "scale": torch.zeros(8, 5, 1)
    }
    with pytest.raises(ss.ShardingError, match=r"SS331.*the forward writes to the buffer steps"):
        ss.compile(lambda: Counting(persistent=True), rules, ss.Mesh(pp=2), batch, loss_fn)
