"""Consecutive parts of a sequence that lies head and tail."""

import shardspec as ss
from shardspec.testing.threads import run_ranks
from tests import reader


def trigger():
    batch = reader.make_batch(documents=False)

    def run(rank: int) -> None:
        rules = reader.table("causal", "ring")
        sharded = ss.shard(lambda: reader.Reader(reader.Shape()), rules, ss.Mesh(cp=2), batch)
        state = sharded.init(ss.sgd(lr=0.1))
        own = {name: item.chunk(2, -1)[rank] for name, item in batch.items()}
        ss.train_step(sharded, reader.loss_fn)(state, own)

    run_ranks(2, run)
