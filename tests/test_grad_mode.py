"""A block that runs without a gradient first, and with one then, is not one block."""

import pytest
import torch
from torch import nn

import shardspec as ss


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Layers that are read once to find a scale, and then run."""

    def __init__(self, look: bool):
        super().__init__()
        self.look = look
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def run(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        if self.look:
            with torch.no_grad():
                self.run(x)
        return self.run(x)


RULES = ss.Rules(
    params={r"layers\.\d+\.up\.weight": "F@tp D", r"layers\.\d+\.down\.weight": "D F@tp"},
    activations={"x": "B@dp D", r"layers\.\d+\.(up:in|down)": "B@dp D"},
)


@pytest.mark.parametrize("mesh", [ss.Mesh(tp=2), ss.Mesh(dp=2)], ids=str)
def test_what_gradients_owe_does_not_hang_on_a_look_without_one(mesh):
    plain, looking = (
        ss.compile(lambda look=look: Model(look), RULES, mesh, {"x": torch.zeros(8, 4)}) for look in (False, True)
    )
    assert looking.points == plain.points
    assert {name: param.owed for name, param in looking.params.items()} == {
        name: param.owed for name, param in plain.params.items()
    }
    assert any(param.owed for param in plain.params.values()) == (mesh == ss.Mesh(dp=2))
    assert any(point.backward for point in plain.points.values()) == (mesh == ss.Mesh(tp=2))
