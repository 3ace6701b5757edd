"""Repeated blocks inside repeated blocks: what an inner one owes reaches the point of the outer one."""

import pytest
import torch
from torch import nn

import shardspec as ss
from shardspec.testing import assert_parity

PARAMS = {r".*up\.weight": "F@tp D", r".*up\.bias": "F@tp", r".*down\.weight": "D F@tp"}
WITHOUT = {"x": "B S D", r"layers\.\d+\.mixture": "B S D"}
RULES = ss.Rules(params=PARAMS, activations={**WITHOUT, r"layers\.\d+\.mixture:in": "B S D"})
MESH = ss.Mesh(tp=2)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x):
        return sum(expert(x) * (index + 1) for index, expert in enumerate(self.experts))


class Layer(nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.mixture = Mixture(experts)

    def forward(self, x):
        return x + self.mixture(x)


class Model(nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(experts) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def batch():
    return {"x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


@pytest.mark.parametrize("experts", [1, 3])
def test_the_gradient_that_inner_blocks_owe_is_summed_at_the_point_they_share(experts):
    assert_parity(Model(experts), RULES, MESH, batch())
    moves = ss.compile(Model(experts), RULES, MESH, batch()).points["layers.1.mixture:in"].backward
    assert [(move.kind, move.axis) for move in moves] == [("all_reduce", "tp")]


def test_without_such_a_point_it_is_refused():
    with pytest.raises(ss.ShardingError) as caught:
        ss.compile(Model(2), ss.Rules(params=PARAMS, activations=WITHOUT), MESH, batch())
    assert [found.code for found in caught.value.diagnostics] == ["SS307"]
