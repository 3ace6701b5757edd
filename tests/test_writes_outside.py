"""A write in a repeated block to a tensor from outside it: refused where the gradient behind it would be lost."""

import pytest
import torch
from torch import Tensor, nn

import shardspec as ss

TABLE = ss.Rules(
    params={r"layers\.\d+\.w": "D", "g": "D", r"up\.weight": "F@tp D", r"down\.weight": "D F@tp"},
    activations={"x|down|up:in": "B@dp D"},
)


class Layer(nn.Module):
    """`way` says which tensor it writes to."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.w, self.way = nn.Parameter(torch.linspace(0.5, 1.5, 8)), way

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        if self.way == "kept":
            kept.add_(self.w)
        elif self.way == "view":
            kept[:4].add_(self.w[:4])
        elif self.way == "own":
            x += self.w
        elif self.way == "out":
            torch.add(kept, self.w, out=kept)
        return x


class Model(nn.Module):
    """Replicated values in layers, then a split product; `again` reads the stream's first value at the end."""

    def __init__(self, way: str, *, again: bool = False, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.g = nn.Parameter(torch.ones(8))
        self.layers = nn.ModuleList(Layer(way) for _ in range(2))
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        kept = self.g * 1.0
        stream = first = self.g * 2.0
        for index, layer in enumerate(self.layers):
            stream = layer(stream, kept if index or not self.apart else self.g * 3.0)
        last = first if self.again else stream
        return self.down(self.up(x * kept * last))


def check(model: Model, mesh: ss.Mesh) -> ss.Plan:
    return ss.compile(model, TABLE, mesh, {"x": torch.zeros(4, 8)}, loss=lambda output, batch: (output.sum(), 4.0))


@pytest.mark.parametrize("way", ["kept", "view", "out"])
@pytest.mark.parametrize("mesh", [ss.Mesh(tp=2), ss.Mesh(dp=2), ss.Mesh(dp=2, tp=2)], ids=str)
def test_a_write_that_the_caller_reads_is_refused(way, mesh):
    """Else nothing would sum the gradients of `layers.*.w` over the mesh: each rank would train another model."""
    with pytest.raises(ss.ShardingError) as caught:
        check(Model(way), mesh)
    (found,) = caught.value.diagnostics
    assert found.code == "SS314"
    assert "writes in place to a tensor from outside its block, which is read again there" in found.what


def test_the_write_of_a_later_call_of_the_same_block_is_looked_at_too():
    """The first layer writes to a tensor that nothing reads again, the second to one that the model does."""
    with pytest.raises(ss.ShardingError, match="read again there"):
        check(Model("kept", apart=True), ss.Mesh(tp=2))


def test_a_write_is_seen_under_the_name_that_an_earlier_block_gave_back():
    with pytest.raises(ss.ShardingError, match="read again there"):
        check(Model("own", again=True), ss.Mesh(tp=2))


def test_a_residual_in_place_that_only_its_result_is_read_of_passes():
    """By hand: `w` is whole on every rank and meets rows that dp splits, so that its gradient is owed over dp."""
    plan = check(Model("own"), ss.Mesh(dp=2))
    assert {name: param.owed for name, param in plan.params.items()}["layers.0.w"] == ("dp",)


@pytest.mark.parametrize("way", ["kept", "view", "own", "out"])
def test_on_a_mesh_of_one_rank_nothing_is_owed_and_any_write_passes(way):
    check(Model(way), ss.Mesh())
