"""Attention over a split sequence against the plain program in float64: loss, gradients, parameters after steps."""

from typing import Any

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from tests import reader
from tests.distributed.test_pipeline import gathered

STEPS = 2
CLIP = 0.5
TOLERANCE = 1e-10
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@attrs.frozen
class Case:
    """A mesh, a strategy, a kind of attention."""

    mesh: str
    strategy: str
    kind: str = "causal"
    balance: bool | None = None
    kv_heads: int = 8
    value_dim: int = 4
    remat: bool = False
    accumulate: int = 1

    def __str__(self) -> str:
        parts = [self.mesh, self.strategy, self.kind, f"kv={self.kv_heads}"]
        parts += [{True: "balanced", False: "in-order", None: "default"}[self.balance]]
        parts += ["remat"] * self.remat + [f"accumulate={self.accumulate}"] * (self.accumulate > 1)
        return " ".join(parts + [f"values={self.value_dim}"] * (self.value_dim != 4))

    @property
    def world(self) -> int:
        """The number of ranks."""
        return ss.Mesh.parse(self.mesh).world

    @property
    def policy(self) -> ss.Policy:
        """How it is run."""
        return ss.Policy(attention=self.strategy, balance=self.balance, remat=self.remat, accumulate=self.accumulate)

    def make(self) -> nn.Module:
        """The model; float64 by torch's default dtype."""
        layers = max(2, ss.Mesh.parse(self.mesh)["pp"])
        shape = reader.Shape(kind=self.kind, kv_heads=self.kv_heads, value_dim=self.value_dim, layers=layers)
        return reader.build(shape)

    def batch(self, step: int = 0) -> dict[str, Tensor]:
        """A global batch [8, 16]."""
        return reader.make_batch(step, documents=reader.has_documents(self.kind))

    def shard(self) -> Any:
        """The model on the mesh; called on every rank."""
        torch.set_default_dtype(torch.float64)
        rules = reader.table(self.kind, self.strategy)
        return ss.shard(self.make, rules, ss.Mesh.parse(self.mesh), self.batch(), policy=self.policy)


@attrs.frozen
class Outcome:
    """First loss and gradients, losses of the steps and of evaluations before them, parameters after them."""

    loss: float
    grads: dict[str, Tensor]
    losses: list[float]
    params: dict[str, Tensor]


def run_sharded(case: Case) -> tuple[Outcome, dict[str, Tensor]]:
    """What the ranks compute, and the weights that they began with; called on every rank."""
    sharded = case.shard()
    state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
    initial = gathered(state.params)
    grad_fn = sharded.value_and_grad(reader.loss_fn)
    (loss, _), grads = grad_fn(state.params, sharded.local_batch(case.batch()), state.rng)
    whole = gathered(grads)
    step, evaluate = ss.train_step(sharded, reader.loss_fn, clip=CLIP), ss.eval_step(sharded, reader.loss_fn)
    losses: list[float] = []
    for index in range(STEPS):
        batch = sharded.local_batch(case.batch(index))
        losses.append(float(evaluate(state, batch)["loss"]))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return Outcome(float(loss), whole, losses, gathered(state.params)), initial


def run_plain(case: Case, initial: dict[str, Tensor]) -> Outcome:
    """The same by a plain loop, torch's own optimizer and clipping."""
    model = case.make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    first = reader.plain_loss(model, case.batch())
    first.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    losses: list[float] = []
    for index in range(STEPS):
        optimizer.zero_grad()
        loss = reader.plain_loss(model, case.batch(index))
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses += [float(loss.detach())] * 2
    return Outcome(float(first.detach()), grads, losses, {n: p.detach() for n, p in model.named_parameters()})


def compare(case: Case) -> dict[str, float]:
    """What was compared -> the largest difference; called on every rank."""
    ours, initial = run_sharded(case)
    plain = run_plain(case, initial)
    found = {"loss": abs(ours.loss - plain.loss)}
    found["losses"] = max(abs(one - two) for one, two in zip(ours.losses, plain.losses, strict=True))
    for kind in ("grads", "params"):
        theirs, own = getattr(plain, kind), getattr(ours, kind)
        assert theirs.keys() == own.keys(), f"the {kind} have other names"
        found[kind] = max(float((theirs[name] - own[name]).abs().max()) for name in theirs)
    assert all(float(grad.abs().max()) > 1e4 * TOLERANCE for name, grad in plain.grads.items() if reached(name, case))
    return found


def reached(name: str, case: Case) -> bool:
    """Whether a parameter has a gradient."""
    return name != "slope" or case.kind == "biased"
