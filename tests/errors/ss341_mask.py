"""A mask of documents in a ring."""

import shardspec as ss
from tests import reader


def trigger():
    model = reader.build(reader.Shape(kind="documents"))
    rules, policy = reader.table("documents", "ring"), ss.Policy(attention="ring")
    ss.compile(model, rules, ss.Mesh(cp=2), reader.make_batch(), policy=policy)
