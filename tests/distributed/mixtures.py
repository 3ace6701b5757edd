"""Both families of experts on a mesh against the plain program over the same microbatches, in float64."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardspec as ss
from models import deepseek, llama, mixtral
from models.deepseek.model import DeepSeekConfig
from models.llama import LlamaConfig
from models.mixtral.model import MixtralConfig
from tests.distributed.harness import run_ranks
from tests.distributed.parity import CLIP, OPTIMIZER, ROWS, SEQ, SIZES, STEPS, make_batch, make_model

VOCABULARY = 40
SPEED = 0.05  # of a selection bias: five steps change choices
MIXTRAL = MixtralConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=4, ffn_dim=24, n_experts=4, top_k=2,
    vocab_size=VOCABULARY, max_seq_len=32, balance_coef=0.3, z_coef=0.05,
)  # fmt: skip
DEEPSEEK = DeepSeekConfig(
    dim=16, n_layers=3, n_dense_layers=1, n_heads=4, q_rank=12, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6, ffn_dim=24,
    moe_dim=24, n_experts=8, top_k=3, n_groups=4, top_groups=2, vocab_size=VOCABULARY, max_seq_len=32,
)  # fmt: skip


def enlarged(model: nn.Module) -> nn.Module:
    """Weights several times the usual, so that every path carries gradients far above the tolerance."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


def balanced(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The update of DeepSeek's buffers, at a speed that five steps show."""
    return deepseek.balanced(buffers, speed=SPEED)


def cross_entropy(output: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return ss.cross_entropy(output, batch["labels"])


@attrs.frozen(eq=False, kw_only=True)
class Mixture:
    """What the comparison needs of a family."""

    name: str
    make: Callable[[int], nn.Module]
    """Number of layers -> a model whose every path carries gradients far above the tolerance."""
    rules: Mapping[bool, ss.Rules]
    """With sequence parallelism or not -> the table."""
    loss_fn: Callable[..., Any]
    update: Callable[..., Any] | None


FAMILIES = {
    "mixtral": Mixture(
        name="mixtral",
        make=lambda layers: enlarged(mixtral.build(attrs.evolve(MIXTRAL, n_layers=layers))),
        rules={True: mixtral.RULES, False: mixtral.WITHOUT_SP},
        loss_fn=mixtral.loss_fn,
        update=None,
    ),
    "deepseek": Mixture(
        name="deepseek",
        make=lambda layers: enlarged(deepseek.build(attrs.evolve(DEEPSEEK, n_layers=layers))),
        rules={True: deepseek.RULES, False: deepseek.WITHOUT_SP},
        loss_fn=cross_entropy,
        update=balanced,
    ),
}

MODELS = {
    "llama": Mixture(
        name="llama",
        make=lambda layers: make_model(LlamaConfig(**{**SIZES, "n_layers": layers}, max_seq_len=32)),
        rules={True: llama.RULES, False: llama.WITHOUT_SP},
        loss_fn=cross_entropy,
        update=None,
    ),
    **FAMILIES,
}
"""A dense model beside them."""


@attrs.frozen
class Case:
    """A family on a mesh."""

    family: str
    mesh: str
    sp: bool = True
    microbatches: int = 1
    remat: bool = False
    schedule: str = "1F1B"
    routing: str = ""
    """Which weights and biases the routers begin with, where not the drawn ones: a key of `ROUTINGS`."""

    @property
    def mixture(self) -> Mixture:
        return MODELS[self.family]

    @property
    def layers(self) -> int:
        """As few as there can be: a schedule with two stages a rank wants four."""
        return 4 if self.schedule != "1F1B" else 3 if self.family == "deepseek" else 2

    def batch(self, step: int) -> dict[str, Tensor]:
        """A global batch; with the places of its tokens where the sequence is split."""
        places = {"positions": torch.arange(SEQ)} if ss.Mesh.parse(self.mesh)["cp"] > 1 else {}
        return {**make_batch(step), **places}

    def make(self) -> nn.Module:
        """A model of its own."""
        return self.mixture.make(self.layers)

    def shard(self) -> ss.Sharded:
        """The model on its mesh, in float64; called on every rank."""
        torch.set_default_dtype(torch.float64)
        mesh = ss.Mesh.parse(self.mesh)
        counted = {"microbatches": self.microbatches} if mesh["pp"] > 1 else {"accumulate": self.microbatches}
        policy = ss.Policy(remat=self.remat, schedule=self.schedule, **counted)
        return ss.shard(self.make, self.mixture.rules[self.sp], mesh, self.batch(0), policy=policy)

    @property
    def world(self) -> int:
        return ss.Mesh.parse(self.mesh).world

    def __str__(self) -> str:
        parts = [self.family, self.mesh or "one", "sp" if self.sp else "no-sp"]
        parts += [f"microbatches={self.microbatches}"] if self.microbatches > 1 else []
        parts += [self.routing] if self.routing else []
        return " ".join(parts + ["remat"] * self.remat)


def to_some(state: dict[str, Tensor], wanted: int) -> None:
    """Have every token choose the first `wanted` experts."""
    for name, tensor in state.items():
        if name == "tok_embeddings.weight":
            tensor[:, 0] = 40.0  # what a router reads is normed: its first entry is then near the root of D
        elif name.endswith("gate.weight"):
            tensor[:, 0] = torch.where(torch.arange(len(tensor)) < wanted, 5.0, -5.0)
        elif name.endswith("router.bias"):
            tensor.copy_(torch.where(torch.arange(len(tensor)) < wanted, 50.0, -50.0))


def all_alike(state: dict[str, Tensor]) -> None:
    """Have every score be the same as every other."""
    for name, tensor in state.items():
        if name.endswith("gate.weight"):
            tensor.zero_()


ROUTINGS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "to one expert": lambda state: to_some(state, 1),
    "to none of a rank": lambda state: to_some(state, 3 if "layers.1.moe.router.bias" in state else 2),
    "ties": all_alike,
}


@attrs.frozen
class Outcome:
    """What is compared: first loss and gradients, losses and norms of the steps, parameters and buffers after them."""

    loss: float
    grads: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    initial: dict[str, Tensor]


def plain_sums(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The sum and the weight of each microbatch, by torch's own cross-entropy."""
    for rows in zip(*(item.chunk(case.microbatches) for item in (batch["tokens"], batch["labels"])), strict=True):
        output = model(rows[0])
        logits, aux = output if isinstance(output, tuple) else (output, 0.0)
        weight = (rows[1] != -100).sum()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[1].flatten(), ignore_index=-100, reduction="sum")
        yield loss + aux * weight, weight


def plain_gradients(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> float:
    """One loss over all microbatches; its gradients are left with the parameters."""
    model.zero_grad()
    total = (batch["labels"] != -100).sum()
    loss = 0.0
    for part, _ in plain_sums(case, model, batch):
        (part / total).backward()
        loss += float(part.detach()) / float(total)
    return loss


def run_plain(initial: dict[str, Tensor], case: Case) -> Outcome:
    """The reference: a plain loop with torch's own optimizer and clipping."""
    model = case.make()
    model.load_state_dict(initial, strict=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = plain_gradients(case, model, make_batch(0))
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(plain_gradients(case, model, make_batch(step)))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        if case.mixture.update is not None:
            move_biases(model)
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer for name, buffer in model.state_dict().items() if name not in params}
    return Outcome(loss, grads, losses, norms, params, buffers, initial)


def move_biases(model: nn.Module) -> None:
    """A router's bias goes up by `SPEED` where an expert had fewer tokens than the mean, down where it had more."""
    for router in model.modules():
        if hasattr(router, "counts"):
            for expert, count in enumerate(router.counts.tolist()):
                mean = sum(router.counts.tolist()) / len(router.counts)
                router.bias[expert] += SPEED * ((count < mean) - (count > mean))
            router.counts.zero_()


def gathered(tensors: Mapping[str, Tensor], world: int) -> dict[str, Tensor]:
    """Whole tensors by name, from the ranks of all stages."""
    own = {name: ss.full(tensor).clone() for name, tensor in tensors.items()}
    if world == 1:
        return own
    every: list[Any] = [None] * world
    dist.all_gather_object(every, own)
    found: dict[str, Tensor] = {}
    for name, tensor in itertools.chain.from_iterable(held.items() for held in every):
        assert name not in found or torch.equal(found[name], tensor), f"{name} differs between ranks"
        found[name] = tensor
    return found


def run_sharded(case: Case) -> Outcome:
    """The same on the ranks of a mesh; called on every rank."""
    mixture, sharded = case.mixture, case.shard()
    state = sharded.init(ss.adamw(**OPTIMIZER), seed=3)
    initial = gathered(state.params, case.world)
    if case.routing:
        initial = sharded.state_dict(state)
        ROUTINGS[case.routing](initial)
        state = sharded.load(initial, ss.adamw(**OPTIMIZER))
    grad_fn = sharded.value_and_grad(mixture.loss_fn)
    (loss, _), grads = grad_fn(state.params, sharded.local_batch(case.batch(0)), state.rng)
    whole = gathered(grads, case.world)
    step = ss.train_step(sharded, mixture.loss_fn, clip=CLIP, buffers=mixture.update)
    losses, norms = [], []
    for index in range(STEPS):
        state, metrics = step(state, sharded.local_batch(case.batch(index)))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    params, buffers = gathered(state.params, case.world), gathered(state.buffers, case.world)
    return Outcome(float(loss), whole, losses, norms, params, buffers, initial)


def differences(plain: Outcome, sharded: Outcome) -> dict[str, float]:
    """What was compared -> the largest difference."""
    found = {
        "loss": abs(plain.loss - sharded.loss),
        "losses": max(abs(a - b) for a, b in zip(plain.losses, sharded.losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(plain.norms, sharded.norms, strict=True)),
    }
    for kind in ("grads", "params", "buffers"):
        ours, theirs = getattr(sharded, kind), getattr(plain, kind)
        assert ours.keys() == theirs.keys(), f"the {kind} have other names"
        found[kind] = max((float((theirs[name] - ours[name]).abs().max()) for name in theirs), default=0.0)
    return found


def on_rank(rank: int, world: int, cases: list[Case]) -> list[Any]:
    """Run cases of one world size on this rank; rank 0 compares with the plain program."""
    torch.set_num_threads(1)
    del world
    found: list[Any] = []
    for case in cases:
        sharded = run_sharded(case)
        found.append(differences(run_plain(sharded.initial, case), sharded) if rank == 0 else None)
    return found


def run_cases(cases: list[Case], timeout: float = 600) -> Iterator[tuple[Case, dict[str, float]]]:
    """Each case with its largest differences; all cases of one world size run in the same ranks."""
    for world in sorted({case.world for case in cases}):
        same = [case for case in cases if case.world == world]
        yield from zip(same, run_ranks(world, on_rank, same, timeout=timeout)[0], strict=True)


assert ROWS % 16 == 0, "16 data ranks have a row each"
assert SEQ % 2 == 0, "two tp ranks have positions of their own"
