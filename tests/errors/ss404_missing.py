"""A state dict that lacks a weight and has another one."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama


def trigger():
    weights = llama()().state_dict()
    weights["lm_head.weight"] = weights.pop("output.weight")
    ss.shard(llama(), RULES, ss.Mesh()).load(weights)
