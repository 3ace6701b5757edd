"""A rule that calls a sum of squares linear."""

import torch

import shardspec as ss
from tests import own_operators


def trigger():
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).sin().reshape(4, 4)
    ss.register_rule(own_operators.sum_of_squares, "b d -> b", samples=[x], linear="x")
