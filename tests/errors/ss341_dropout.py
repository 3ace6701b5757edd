"""Attention weights that are dropped."""

import shardspec as ss
from tests import reader


def trigger():
    model = reader.build(reader.Shape(dropout=0.1))
    rules = reader.table("causal", "allgather")
    ss.compile(model, rules, ss.Mesh(cp=2), reader.make_batch(documents=False))
