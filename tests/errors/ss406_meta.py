"""A model on meta, and nothing that gives its weights values."""

import torch

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    with torch.device("meta"):
        model = llama()()
    ss.shard(model, RULES, ss.Mesh()).init(ss.adamw(lr=1e-3))
