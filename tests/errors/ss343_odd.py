"""A sequence of three positions on each rank, in two chunks."""

import shardspec as ss
from tests import reader


def trigger():
    batch = reader.make_batch(length=12, documents=False)
    rules, policy = reader.table("causal", "ring"), ss.Policy(attention="ring", balance=True)
    ss.compile(reader.build(reader.Shape()), rules, ss.Mesh(cp=4), batch, policy=policy)
