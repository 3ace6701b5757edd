"""Sharded training against the plain program in float64: loss, every gradient, parameters after 5 steps."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES, build
from models.llama.model import LlamaConfig
from models.llama.rules import WITHOUT_SP
from tests.distributed.harness import run_ranks

STEPS = 5
ROWS, SEQ = 16, 8  # two microbatches for each of 8 data ranks, one position for each of 8 tp ranks
CLIP = 0.5
TOLERANCE = 1e-10
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

# D is 18: over 4 or 8 storage ranks its rows do not divide, and over 8 two ranks own none.
SIZES = {
    "dim": 18,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "head_dim": 4,
    "ffn_dim": 24,
    "vocab_size": 40,
}


@attrs.frozen(eq=False, kw_only=True)
class Family:
    """What the comparison needs of a family of models."""

    name: str
    make: Callable[[bool], nn.Module]
    """Whether embeddings are tied -> a model whose every path carries gradients far above the tolerance."""
    rules: Mapping[bool, ss.Rules]
    """With sequence parallelism or not -> the table."""
    batch: Callable[[int], dict[str, Tensor]]
    """Step -> a global batch of 16 rows."""
    plain_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """The mean over the labels that count, by torch's own function."""


def all_meshes(limit: int = 8) -> Iterator[str]:
    """Every mesh over dp, fsdp and tp of up to `limit` ranks with sizes 1, 2, 4, 8: 20 of them."""
    for sizes in itertools.product((1, 2, 4, 8), repeat=3):
        if sizes[0] * sizes[1] * sizes[2] <= limit:
            named = zip(("dp", "fsdp", "tp"), sizes, strict=True)
            yield ",".join(f"{axis}={size}" for axis, size in named if size > 1)


def make_config(*, tied: bool) -> LlamaConfig:
    """The model of the tests; float64 by torch's default dtype."""
    return LlamaConfig(**SIZES, max_seq_len=32, tied=tied)


def make_batch(step: int) -> dict[str, Tensor]:
    """A global batch [16, 8] whose masked labels differ from row to row; the last row counts nothing."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, SEQ), generator=generator)
    labels = torch.randint(0, SIZES["vocab_size"], (ROWS, SEQ), generator=generator)
    masked = torch.rand(ROWS, SEQ, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
    return {"tokens": tokens, "labels": labels.masked_fill(masked, -100)}


def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and the number of labels that count."""
    return ss.cross_entropy(output, batch["labels"])


def plain_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the labels that count, by torch's own function."""
    logits = model(batch["tokens"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def make_model(config: LlamaConfig) -> nn.Module:
    """Weights ten times the usual, so that every path carries gradients far above the tolerance."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


LLAMA = Family(
    name="llama",
    make=lambda tied: make_model(make_config(tied=tied)),
    rules={True: RULES, False: WITHOUT_SP},
    batch=make_batch,
    plain_loss=plain_loss,
)


@attrs.frozen
class Case:
    """One mesh with one variant of model and table."""

    mesh: str
    sp: bool = True
    tied: bool = False
    accumulate: int = 1
    remat: bool = False
    family: Family = LLAMA

    @property
    def world(self) -> int:
        """The number of ranks."""
        return ss.Mesh.parse(self.mesh).world

    def __str__(self) -> str:
        parts = [] if self.family is LLAMA else [self.family.name]
        parts += [self.mesh or "one", "sp" if self.sp else "no-sp", "tied" if self.tied else "untied"]
        parts += [f"accumulate={self.accumulate}"] if self.accumulate > 1 else []
        return " ".join(parts + (["remat"] if self.remat else []))


@attrs.frozen
class Outcome:
    """What is compared: first loss and gradients, losses of the steps, parameters after them."""

    loss: float
    grads: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]
    initial: dict[str, Tensor]


def run_plain(initial: dict[str, Tensor], case: Case) -> Outcome:
    """The reference: a plain loop with torch's own optimizer and clipping."""
    family = case.family
    model = family.make(case.tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    first = family.plain_loss(model, family.batch(0))
    first.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = {name: parameter.grad.clone() for name, parameter in trained.items()}
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = family.plain_loss(model, family.batch(step))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Outcome(float(first.detach()), grads, losses, norms, params, initial)


def run_sharded(case: Case) -> Outcome:
    """The same on the ranks of a mesh; called on every rank."""
    torch.set_default_dtype(torch.float64)
    family = case.family
    policy = ss.Policy(accumulate=case.accumulate, remat=case.remat)
    mesh = ss.Mesh.parse(case.mesh)
    sharded = ss.shard(lambda: family.make(case.tied), family.rules[case.sp], mesh, family.batch(0), policy=policy)
    state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
    initial = {name: ss.full(tensor).clone() for name, tensor in state.params.items()}
    grad_fn = sharded.value_and_grad(loss_fn)
    (loss, _), grads = grad_fn(state.params, sharded.local_batch(family.batch(0)), state.rng)
    whole = {name: ss.full(grad).clone() for name, grad in grads.items()}
    step_fn = ss.train_step(sharded, loss_fn, clip=CLIP)
    losses, norms = [], []
    for step in range(STEPS):
        state, metrics = step_fn(state, sharded.local_batch(family.batch(step)))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    params = {name: ss.full(tensor).clone() for name, tensor in state.params.items()}
    return Outcome(float(loss), whole, losses, norms, params, initial)


def differences(plain: Outcome, sharded: Outcome) -> dict[str, float]:
    """What was compared -> the largest difference."""
    found = {
        "loss": abs(plain.loss - sharded.loss),
        "losses": max(abs(a - b) for a, b in zip(plain.losses, sharded.losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(plain.norms, sharded.norms, strict=True)),
    }
    assert plain.grads.keys() == sharded.grads.keys(), "the gradients have other names"
    for kind in ("grads", "params"):
        ours, theirs = getattr(sharded, kind), getattr(plain, kind)
        found[kind] = max(float((theirs[name] - ours[name]).abs().max()) for name in theirs)
    return found


def on_rank(rank: int, world: int, cases: list[Case], prepare: Callable[[], None] | None = None) -> list[Any]:
    """Run cases of one world size on this rank; rank 0 compares with the plain program."""
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    del world
    return [compare(case) if rank == 0 else run_sharded(case) and None for case in cases]


def compare(case: Case) -> dict[str, float]:
    """The largest differences of a case, on a rank that takes part."""
    sharded = run_sharded(case)
    return differences(run_plain(sharded.initial, case), sharded)


def run_cases(cases: list[Case], timeout: float = 600) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case with its largest differences; all cases of one world size run in the same ranks."""
    for world in sorted({case.world for case in cases}):
        same = [case for case in cases if case.world == world]
        yield from zip(same, run_ranks(world, on_rank, same, timeout=timeout)[0], strict=True)
