"""A model with operators of its own trains on a mesh as it does alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss
from tests.distributed.harness import run_ranks
from tests.own_operators import own_rules, register_all

OPS = torch.ops.own
STEPS = 3


class Model(nn.Module):
    """Fused operators between products: one of heads, one with a weight that tp splits, one along a whole dim."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.q = nn.Linear(8, 24, bias=False)
        self.o = nn.Linear(24, 8, bias=False)
        self.up = nn.Linear(8, 16, bias=False)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.down = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 24, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q = self.q(x)
        x = x + self.o(OPS.norm_heads(q, q.shape[-1] // 6))
        x = x + self.down(OPS.scaled_gelu(self.up(OPS.softmax(x)), self.gain))
        return self.head(x)


RULES = ss.Rules(
    params={
        r"(embed|head)\.weight": "V@fsdp D",
        r"q\.weight": "(H@tp hd)@fsdp D",
        r"o\.weight": "D@fsdp (H@tp hd)",
        r"up\.weight": "F@(tp,fsdp) D",
        "gain": "F@tp",
        r"down\.weight": "D@fsdp F@tp",
    },
    activations={"tokens|labels": "B@(dp,fsdp) S", r"embed|o|down|(q|up):in": "B@(dp,fsdp) S D"},
    sizes={"hd": 6},
)


def batch_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(0, 24, (8, 4), generator=generator) for name in ("tokens", "labels")}


def sharded_run(mesh: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Initial parameters, first gradients, parameters after the steps, losses."""
    torch.set_default_dtype(torch.float64)
    sharded = ss.shard(Model, RULES, ss.Mesh.parse(mesh), batch_of(0))

    def loss_fn(output: Tensor, batch: dict[str, Any]) -> Any:
        return ss.cross_entropy(output, batch["labels"])

    state = sharded.init(ss.sgd(lr=0.1), seed=0)
    initial = {name: ss.full(tensor).clone() for name, tensor in state.params.items()}
    _, grads = sharded.value_and_grad(loss_fn)(state.params, sharded.local_batch(batch_of(0)), state.rng)
    grads = {name: ss.full(grad).clone() for name, grad in grads.items()}
    step, losses = ss.train_step(sharded, loss_fn), []
    for index in range(STEPS):
        state, metrics = step(state, sharded.local_batch(batch_of(index)))
        losses.append(float(metrics["loss"]))
    return initial, grads, {name: ss.full(tensor).clone() for name, tensor in state.params.items()}, losses


def plain_run(initial: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """First gradients, parameters after the steps, losses: torch alone."""
    torch.set_default_dtype(torch.float64)
    model = Model()
    model.load_state_dict(initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads, losses = {}, []
    for index in range(STEPS):
        batch = batch_of(index)
        loss = nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        grads = grads or {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        losses.append(float(loss.detach()))
    return grads, dict(model.named_parameters()), losses


def on_rank(rank: int, world: int, mesh: str) -> float:
    """The largest difference from the plain program, of gradients, parameters and losses."""
    with own_rules():
        register_all()
        initial, grads, params, losses = sharded_run(mesh)
        wanted_grads, wanted, wanted_losses = plain_run(initial)
    gaps = [float((grads[name] - wanted_grads[name]).abs().max()) for name in wanted_grads]
    gaps += [float((params[name] - wanted[name]).abs().max()) for name in wanted]
    assert min(float(grad.abs().max()) for grad in wanted_grads.values()) > 1e-6, "every gradient says something"
    return max(gaps + [abs(one - two) for one, two in zip(losses, wanted_losses, strict=True)])


@pytest.mark.parametrize("mesh", ["tp=2", "fsdp=2,tp=2"])
def test_a_model_with_operators_of_its_own_trains_as_it_does_alone(mesh):
    assert max(run_ranks(ss.Mesh.parse(mesh).world, on_rank, mesh)) < 1e-10
