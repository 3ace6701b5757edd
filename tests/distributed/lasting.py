"""Runs that are saved on one mesh and go on on another."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from models.llama import RULES
from tests.distributed import parity
from tests.distributed.harness import run_ranks

MESHES = ("", "tp=2", "fsdp=3", "dp=2", "fsdp=2,tp=2", "fsdp=4")
BEFORE, AFTER = 2, 10
ROWS = 12
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "groups": {r".*norm.*": {"weight_decay": 0.0}}}


class Mixed(nn.Module):
    """A fused projection, a tied head of rows that no number of ranks divides, dropout, a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 2 * 8, bias=False)
        self.down = nn.Linear(8, 12)
        self.head = nn.Linear(12, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        x = self.embed(tokens)
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return self.head(x + F.dropout(self.down(F.silu(gate) * up), 0.25, self.training))


MIXED_RULES = ss.Rules(
    params={
        r"(embed|head)\.weight": "V@(tp,fsdp) D",
        r"norm\.(weight|bias)": "D@fsdp",
        r"up\.weight": "(2 F@tp) D",
        r"down\.weight": "D@fsdp F@tp",
        r"down\.bias": "D +tp",
        "seen": "",
    },
    activations={
        "tokens|labels": "B@(dp,fsdp) S",
        r"embed|down|up:in|head:in": "B@(dp,fsdp) S D",
        "head": "B@(dp,fsdp) S V@tp",
    },
    sizes={"F": 8},
)


def make_batch(step: int) -> dict[str, Tensor]:
    """A global batch [12, 8]: rows for 2, 3 and 4 data ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randint(0, 10, (ROWS, 8), generator=generator) for name in ("tokens", "labels")}


MODELS = {
    "llama": (lambda: parity.make_model(parity.make_config(tied=False)), RULES),
    "mixed": (Mixed, MIXED_RULES),
}


def shard(model: str, mesh: str) -> ss.Sharded:
    """A model of the tests on a mesh, in float64."""
    torch.set_default_dtype(torch.float64)
    build, rules = MODELS[model]
    return ss.shard(build, rules, ss.Mesh.parse(mesh), make_batch(0))


@attrs.frozen(eq=False)
class Run:
    """What is compared of a run: the whole state at a moment, and the losses after it."""

    whole: dict[str, Tensor]
    step: int
    rng: int
    losses: list[float]


def whole(state: ss.TrainState) -> dict[str, Tensor]:
    """Every tensor of a state, put together."""
    found = {f"params {name}": ss.full(tensor) for name, tensor in state.params.items()}
    found |= {f"buffers {name}": ss.full(tensor) for name, tensor in state.buffers.items()}
    assert state.opt_state is not None
    for key, slot in state.opt_state.slots.items():
        named = slot.items() if isinstance(slot, dict) else [("", slot)]
        found |= {f"{key} {name}": ss.full(tensor).clone() for name, tensor in named}
    return found


def go_on(sharded: ss.Sharded, state: ss.TrainState, steps: int) -> tuple[ss.TrainState, list[float]]:
    """So many steps from a state on."""
    step_fn = ss.train_step(sharded, parity.loss_fn, clip=0.5)
    losses: list[float] = []
    for _ in range(steps):
        state, metrics = step_fn(state, sharded.local_batch(make_batch(state.step)))
        losses.append(float(metrics["loss"]))
    return state, losses


def save_on(rank: int, world: int, cases: list[tuple[str, str]], root: Path) -> list[Run]:
    """Train on a mesh, save, and go on: `cases` are (model, mesh)."""
    runs: list[Run] = []
    for model, mesh in cases:
        sharded = shard(model, mesh)
        state, _ = go_on(sharded, sharded.init(ss.adamw(**OPTIMIZER), seed=5), BEFORE)
        ss.save(state, folder(root, model, mesh))
        found, step, rng = whole(state), state.step, state.rng
        runs.append(Run(found, step, rng, go_on(sharded, state, AFTER)[1]))
    return runs


def restore_on(rank: int, world: int, cases: list[tuple[str, str, str]], root: Path) -> list[Run]:
    """Restore on a mesh and go on: `cases` are (model, the mesh that saved, this one)."""
    runs: list[Run] = []
    for model, saved, mesh in cases:
        sharded = shard(model, mesh)
        state = ss.restore(sharded, folder(root, model, saved))
        found, step, rng = whole(state), state.step, state.rng
        runs.append(Run(found, step, rng, go_on(sharded, state, AFTER)[1]))
    return runs


def folder(root: Path, model: str, mesh: str) -> Path:
    """Where a mesh saves."""
    return root / model / (mesh or "one")


@attrs.frozen
class Outcome:
    """A pair of meshes, and how far the run that went on lies from the one that was not interrupted."""

    model: str
    saved: str
    restored: str
    differ: tuple[str, ...]
    """The tensors of the state that are not bitwise the same."""
    loss: float
    """The largest difference of ten losses; 0 on one mesh."""

    @property
    def fails(self) -> bool:
        return bool(self.differ) or not self.loss <= (0 if self.saved == self.restored else 1e-10)


def run_pairs(model: str, pairs: list[tuple[str, str]], root: Path) -> Iterator[Outcome]:
    """Save on the first mesh of each pair, restore on the second."""
    savers, first = _on_worlds(save_on, [(model, mesh) for mesh in dict.fromkeys(one for one, _ in pairs)], root)
    saved = dict(zip(savers, first, strict=True))
    cases, runs = _on_worlds(restore_on, [(model, *pair) for pair in pairs], root)
    for (_, one, two), run in zip(cases, runs, strict=True):
        before = saved[model, one]
        assert before.whole.keys() == run.whole.keys()
        differ = [name for name, tensor in before.whole.items() if not torch.equal(tensor, run.whole[name])]
        differ += [name for name in ("step", "rng") if getattr(before, name) != getattr(run, name)]
        loss = max(abs(a - b) for a, b in zip(before.losses, run.losses, strict=True))
        yield Outcome(model, one, two, tuple(differ), loss)


def _on_worlds(function: Any, cases: list[Any], root: Path) -> tuple[list[Any], list[Run]]:
    """The cases in order of their worlds, the last word of each being the mesh; and what rank 0 found of each."""
    world = lambda case: ss.Mesh.parse(case[-1]).world  # noqa: E731
    ordered = sorted(cases, key=world)
    runs: list[Run] = []
    for size, group in itertools.groupby(ordered, key=world):
        runs += run_ranks(size, function, list(group), root, timeout=600)[0]
    return ordered, runs
