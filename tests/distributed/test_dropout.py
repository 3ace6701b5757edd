"""Dropout is keyed by the global index: every mesh drops the same elements, and remat drops them again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardspec as ss
from tests.distributed.harness import run_ranks

MESHES = {1: [""], 2: ["tp=2", "fsdp=2", "dp=2"], 4: ["fsdp=2,tp=2", "tp=4"]}


class Block(nn.Module):
    """A layer with dropout of attention weights, of a product split over heads, and of a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 32, bias=False)
        self.o = nn.Linear(32, 16, bias=False)
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        B, S, _ = x.shape
        q = self.q(x).view(B, S, -1, 4).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.1)
        x = x + self.drop(self.o(mixed.transpose(1, 2).reshape(B, S, -1)))
        return x + F.dropout(self.down(F.dropout(F.gelu(self.up(x)), 0.3)), 0.1)


class Model(nn.Module):
    """Two layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


RULES = ss.Rules(
    params={
        r"embed\.weight|head\.weight": "V@(tp,fsdp) D",
        r"layers\.\d+\.q\.weight": "(H@tp hd)@fsdp D",
        r"layers\.\d+\.o\.weight": "D@fsdp (H@tp hd)",
        r"layers\.\d+\.up\.weight": "F@(tp,fsdp) D",
        r"layers\.\d+\.down\.weight": "D@fsdp F@tp",
    },
    activations={
        "tokens|labels": "B@(dp,fsdp) S",
        r"embed|layers\.\d+\.(o|down)|layers\.\d+\.(q|up):in|head:in": "B@(dp,fsdp) S D",
    },
    units=[r"layers\.\d+"],
)


def losses(mesh: str, *, remat: bool, accumulate: int, seed: int = 1) -> list[float]:
    """Loss and gradient norm of four steps; called on every rank."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(0, 40, (8, 6), generator=generator) for name in ("tokens", "labels")}
    policy = ss.Policy(remat=remat, accumulate=accumulate)
    sharded = ss.shard(Model, RULES, ss.Mesh.parse(mesh), batch, policy=policy)
    state = sharded.init(ss.adamw(lr=1e-2), seed=seed)
    step = ss.train_step(sharded, lambda output, part: ss.cross_entropy(output, part["labels"]), clip=1.0)
    found: list[float] = []
    for _ in range(4):
        state, metrics = step(state, sharded.local_batch(batch))
        found += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return found


def on_rank(rank: int, world: int, accumulate: int) -> dict[tuple[str, bool], list[float]]:
    return {
        (mesh, remat): losses(mesh, remat=remat, accumulate=accumulate)
        for mesh in MESHES[world]
        for remat in (False, True)
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_mesh_drops_the_same_elements(accumulate):
    alone = run_ranks(1, on_rank, accumulate)[0]["", False]
    for world in MESHES:
        for ran in run_ranks(world, on_rank, accumulate):
            for key, found in ran.items():
                assert found == pytest.approx(alone, abs=1e-12), key


def test_steps_and_seeds_drop_other_elements():
    def on_one(rank, world):
        return losses("", remat=False, accumulate=1), losses("", remat=False, accumulate=1, seed=2)

    one, two = run_ranks(1, on_one)[0]
    assert abs(one[0] - two[0]) > 1e-6


def test_an_operator_whose_randomness_is_not_keyed_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.a(x) * torch.rand_like(x)

    rules = ss.Rules(params={r"a\.weight": "O I"}, activations={"x": "B@dp I"})
    with pytest.raises(ss.ShardingError, match="SS312"):
        ss.compile(Noisy(), rules, ss.Mesh(dp=2), {"x": torch.zeros(2, 4)})
