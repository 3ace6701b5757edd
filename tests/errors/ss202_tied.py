"""The second name of a tensor that two modules share, as in most small language models."""

import torch
from torch import nn

import shardspec as ss


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def trigger():
    rules = ss.Rules(params={r"embed\.weight": "V@fsdp D"}, activations={"tokens": "B@fsdp S"})
    ss.compile(Tied, rules, ss.Mesh(fsdp=2), {"tokens": torch.zeros(2, 4, dtype=torch.long)})
