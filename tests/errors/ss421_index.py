"""An id beyond the vocabulary, which only the running step can see."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama, make_batch, token_loss


def trigger():
    batch = make_batch(2, 8)
    sharded = ss.shard(llama(), RULES, ss.Mesh(), batch)
    state = sharded.init(ss.sgd(lr=0.1))
    step = ss.train_step(sharded, token_loss)
    step(state, sharded.local_batch({name: item + 100_000 for name, item in batch.items()}))
