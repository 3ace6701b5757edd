"""A dict in the place of a state."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama, make_batch, token_loss


def trigger():
    sharded = ss.shard(llama(), RULES, ss.Mesh())
    step = ss.train_step(sharded, token_loss)
    step({"norm.weight": 1}, sharded.local_batch(make_batch()))
