"""An operator of one's own without a rule."""

import torch
from torch import nn

import shardspec as ss
from tests import own_operators


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.gain = nn.Parameter(torch.empty(16))

    def forward(self, x):
        return own_operators.scaled_gelu(self.up(x), self.gain)


def trigger():
    rules = ss.Rules(params={r"up\.weight": "F@tp D", "gain": "F@tp"}, activations={"x": "B D"})
    ss.compile(Model, rules, ss.Mesh(tp=2), {"x": torch.zeros(4, 8)})
