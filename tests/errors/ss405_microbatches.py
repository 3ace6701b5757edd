"""Fewer microbatches than a schedule keeps in flight."""

import shardspec as ss
from models.llama.rules import RULES
from tests.gallery.case import llama, make_batch, token_loss


def trigger():
    policy = ss.Policy(schedule="1F1B", microbatches=2)
    ss.compile(llama(), RULES, ss.Mesh(pp=4), make_batch(), token_loss, policy=policy)
