"""Two key-value heads for the four ranks that would share them."""

import shardspec as ss
from tests import reader


def trigger():
    model = reader.build(reader.Shape(kv_heads=4))
    rules, policy = reader.table("causal", "ulysses"), ss.Policy(attention="ulysses")
    ss.compile(model, rules, ss.Mesh(cp=4, tp=2), reader.make_batch(documents=False), policy=policy)
