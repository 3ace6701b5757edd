"""Heads that the module counts itself, where no rule tells how many there are."""

import torch
from torch import nn

import shardspec as ss


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim, self.heads = 4, 8
        self.qkv = nn.Linear(32, 96, bias=False)
        self.proj = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return self.attn(x)


def trigger():
    rules = ss.Rules(
        params={r"attn\.qkv\.weight": "(3 H@tp hd) D", r"attn\.proj\.weight": "D (H@tp hd)"},
        activations={"x": "B S D", "attn": "B S D"},
    )
    ss.compile(Model, rules, ss.Mesh(tp=2), {"x": torch.zeros(2, 4, 32)})
