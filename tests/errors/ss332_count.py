"""Experts that are counted by a whole number which the module keeps."""

import torch

import shardspec as ss
from tests.mixture import PLAIN_RULES, Config, Mixture, Plain, make_batch


class Counted(Plain):
    """A loop over as many experts as there are in all."""

    def __init__(self, n_experts, dim, ffn_dim):
        super().__init__(n_experts, dim, ffn_dim)
        self.n_experts = n_experts

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for index in range(self.n_experts):
            share = (weights * (ids == index)).sum(-1, keepdim=True)
            out = out + torch.tanh(hidden @ self.w1[index].T) @ self.w2[index].T * share
        return out


def trigger():
    ss.compile(Mixture(Config(kind=Counted)), PLAIN_RULES, ss.Mesh(ep=2), make_batch())
