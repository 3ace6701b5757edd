"""A mask whose rows every rank holds whole, beside queries that are split."""

import shardspec as ss
from tests import reader


def trigger():
    rules = reader.table("documents", "allgather").override(activations={r"rows": "B@(dp,fsdp) S", r"row_places": "S"})
    model = reader.build(reader.Shape(kind="documents"))
    ss.compile(model, rules, ss.Mesh(cp=2), reader.make_batch())
